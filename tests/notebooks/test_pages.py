"""The web site of the executed notebooks; .ci/run builds it whole, and tests/browser opens it."""

import nbformat
import pages
import pytest
from conftest import ROOT

EDITION = ROOT / "notebooks" / "zh-TW"
PNG = nbformat.v4.new_output("display_data", data={"image/png": "aGk="})


def executed(folder, **metadata):
    """Notebook 6 as run_all.py leaves it in output/executed: a picture, a path, a widget."""
    notebook = nbformat.read(ROOT / "notebooks" / "06_clean_up.ipynb", as_version=4)
    cell = notebook.cells[1]
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": f"{folder}/run.json"}
    cell.outputs = [PNG, nbformat.v4.new_output("display_data", data=widget)]
    cell.metadata |= metadata
    notebook.metadata["widgets"] = {"state": {}}
    (folder / "executed").mkdir()
    nbformat.write(notebook, folder / "executed" / "06_clean_up.ipynb")
    return cell.id


def test_pages_have_both_languages_one_output_and_no_path_of_this_computer(tmp_path):
    executed(tmp_path, mystnb={"image": {"alt": "a list"}})
    source = tmp_path / "source"
    pages.collect(tmp_path, ["06_clean_up"], source)
    english, chinese = (
        nbformat.read(source / "notebooks" / name, as_version=4)
        for name in ("06_clean_up.ipynb", "zh-TW/06_clean_up.ipynb")
    )
    prose = nbformat.read(EDITION / "06_clean_up.ipynb", as_version=4).cells[0].source
    assert chinese.cells[0].source == prose != english.cells[0].source
    assert chinese.cells[1].outputs == english.cells[1].outputs
    assert english.cells[1].outputs[1].data == {"text/plain": "outputs/run.json"}
    assert "widgets" not in english.metadata
    assert "(index.md)" in (source / "index.md").read_text()  # instead of the site's address
    assert "(../../index.md)" in (source / "notebooks/zh-TW/README.md").read_text()


def test_a_picture_without_an_alt_text_is_named(tmp_path):
    cell = executed(tmp_path)
    with pytest.raises(ValueError, match=f"06_clean_up: pictures without an alt text: {cell}"):
        pages.collect(tmp_path, ["06_clean_up"], tmp_path / "source")


def test_what_was_not_executed_is_named(tmp_path):
    executed(tmp_path)
    with pytest.raises(FileNotFoundError, match="not executed yet: how_to/deploy. First:"):
        pages.make(tmp_path, ["06_clean_up", "how_to/deploy"], tmp_path / "site")


def test_the_preview_has_the_size_that_github_asks_for(tmp_path):
    from PIL import Image

    pages.draw_preview(ROOT / "notebooks/images/timeline.png", tmp_path / "social.png")
    with Image.open(tmp_path / "social.png") as picture:
        assert picture.size == (1280, 640)
