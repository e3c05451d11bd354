"""The web site of the executed notebooks; .ci/run builds it whole, and tests/browser opens it."""

import tempfile

import nbformat
import pages
import pytest
from conftest import ROOT

EDITION = ROOT / "notebooks" / "zh-TW"
PNG = nbformat.v4.new_output("display_data", data={"image/png": "aGk="})


def executed(folder, **metadata):
    """Notebook 6 as run_all.py leaves it in output/executed: a picture, paths, a widget."""
    notebook = nbformat.read(ROOT / "notebooks" / "06_clean_up.ipynb", as_version=4)
    cell = notebook.cells[1]
    places = f"{folder}/run.json {ROOT}/a {tempfile.gettempdir()}/embedded-aws-0-5599/jobs/b"
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": places}
    account = nbformat.v4.new_output("stream", text='"aws:SourceAccount": "210987654321"')
    cell.outputs = [PNG, nbformat.v4.new_output("display_data", data=widget), account]
    cell.metadata |= metadata
    notebook.metadata["widgets"] = {"state": {}}
    (folder / "executed").mkdir()
    nbformat.write(notebook, folder / "executed" / "06_clean_up.ipynb")
    return cell.id


ALT = {"mystnb": {"image": {"alt": "a list"}}}


def test_pages_have_both_languages_and_nothing_private(tmp_path):
    executed(tmp_path, **ALT)
    source = tmp_path / "source"
    pages.collect(tmp_path, ["06_clean_up"], source)
    english, chinese = (
        nbformat.read(source / "notebooks" / name, as_version=4)
        for name in ("06_clean_up.ipynb", "zh-TW/06_clean_up.ipynb")
    )
    prose = nbformat.read(EDITION / "06_clean_up.ipynb", as_version=4).cells[0].source
    assert chinese.cells[0].source == prose != english.cells[0].source
    assert chinese.cells[1].outputs == english.cells[1].outputs
    _, places, account = english.cells[1].outputs
    assert places.data == {"text/plain": "outputs/run.json ../a embedded-aws/jobs/b"}
    assert account.text == '"aws:SourceAccount": "123456789012"'
    assert "widgets" not in english.metadata
    assert "(index.md)" in (source / "index.md").read_text()  # instead of the site's address
    assert "(../../index.md)" in (source / "notebooks/zh-TW/README.md").read_text()


def test_a_picture_without_an_alt_text_and_a_cell_that_failed_are_named(tmp_path):
    cell = executed(tmp_path)
    with pytest.raises(ValueError, match=f"06_clean_up: cell {cell} shows a picture, and its met"):
        pages.collect(tmp_path, ["06_clean_up"], tmp_path / "source")
    path = tmp_path / "executed" / "06_clean_up.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("error", ename="KeyError", evalue="a")]
    nbformat.write(notebook, path)
    with pytest.raises(ValueError, match=f"06_clean_up: cell {cell} failed with KeyError"):
        pages.collect(tmp_path, ["06_clean_up"], tmp_path / "source_2")


def test_a_link_that_leads_nowhere_is_an_error_and_nothing_is_written(tmp_path):
    """Only notebook 6 was executed, so nobody can follow a link to notebook 1."""
    executed(tmp_path, **ALT)
    with pytest.raises(RuntimeError, match=r"(?s)Sphinx warns:.*notebooks/01_setup\.ipynb"):
        pages.make(tmp_path, ["06_clean_up"], tmp_path / "site")
    assert [path.name for path in tmp_path.iterdir()] == ["executed"]


def test_what_was_not_executed_is_named(tmp_path):
    executed(tmp_path)
    with pytest.raises(FileNotFoundError, match="not executed yet: how_to/deploy. First:"):
        pages.make(tmp_path, ["06_clean_up", "how_to/deploy"], tmp_path / "site")


def test_the_preview_has_the_size_that_github_asks_for(tmp_path):
    from PIL import Image

    pages.draw_preview(ROOT / "notebooks/images/timeline.png", tmp_path / "social.png")
    with Image.open(tmp_path / "social.png") as picture:
        assert picture.size == (1280, 640)
