"""The Chinese edition: the same code, and prose that is no older than the English one."""

import hashlib
import re

import nbformat
import pytest
from conftest import ROOT

FOLDER = ROOT / "notebooks"
EDITION = FOLDER / "zh-TW"
TUTORIAL = sorted(FOLDER.glob("0*.ipynb"))
PAGES = {ROOT / "README.md": EDITION / "README.md"}
PAGES |= {FOLDER / "troubleshooting.md": EDITION / "troubleshooting.md"}
HOW = "translate it anew, then write this hash of the English text beside it"


def hash_of(text):
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]


def cells(path):
    return nbformat.read(path, 4).cells


def sections(path):
    """The text of a page, cut before each heading."""
    return [part for part in re.split(r"(?m)^(?=#+ )", path.read_text()) if part]


def places(text):
    """What a translation keeps as it is: code, and where links lead to, by their last part.

    But that it opens its own edition.
    """
    text = text.replace("run_all.py --language zh-TW --open", "run_all.py --open")
    links = [target.rpartition("/")[2] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    return sorted(re.findall(r"`[^`\n]+`", text)), sorted(links)


def english_text(cell):
    """What of a cell is translated: the prose, or the alt text of what the code shows."""
    code = cell.cell_type == "code"
    return cell.metadata.get("mystnb", {}).get("image", {}).get("alt") if code else cell.source


def older(path, edition):
    """{cell: hash of its English text} of the cells whose English is not what was translated."""
    texts = {cell.id: english_text(cell) for cell in cells(path)}
    english = {name: hash_of(text) for name, text in texts.items() if text}
    known = {cell.id: cell.metadata.get("english") for cell in cells(edition)}
    return {name: value for name, value in english.items() if known.get(name) != value}


@pytest.mark.parametrize("path", TUTORIAL, ids=lambda path: path.stem)
def test_no_cell_was_changed_in_english_only(path):
    changed = older(path, EDITION / path.name)
    assert not changed, f"zh-TW/{path.name}: {HOW}, in the metadata of the cell: {changed}"


def test_what_was_changed_is_named_with_its_hash(tmp_path):
    """The prose of one cell, and the alt text of another."""
    (path,) = [path for path in TUTORIAL if path.stem == "04_results"]
    text, changed = path.read_text(), tmp_path / path.name
    (alt,) = (english_text(cell) for cell in cells(path) if cell.id == "timeline")
    changed.write_text(text.replace('"## The model', '"## The one').replace(alt, "A timeline"))
    found = older(changed, EDITION / path.name)
    assert found.keys() == {"connect-note", "timeline"} and found["timeline"] == hash_of(
        "A timeline"
    )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_section_was_changed_in_english_only(path):
    english, chinese = sections(path), sections(PAGES[path])
    known = [re.findall(r"<!-- english (\w+) -->", section) for section in chinese]
    assert [len(hashes) for hashes in known] == [1] * len(english), "one comment in each section"
    changed = {
        section.partition("\n")[0]: hash_of(section)
        for section, value in zip(english, known, strict=True)
        if [hash_of(section)] != value
    }
    assert not changed, f"zh-TW/{path.name}: {HOW}, in the comment below the heading: {changed}"


@pytest.mark.parametrize("path", TUTORIAL, ids=lambda path: path.stem)
def test_the_code_is_the_same_and_the_prose_names_the_same_things(path):
    for english, chinese in zip(cells(path), cells(EDITION / path.name), strict=True):
        assert (chinese.id, chinese.cell_type) == (english.id, english.cell_type)
        if english.cell_type == "code":
            assert chinese.source == english.source, english.id
        else:
            assert re.search("[\u4e00-\u9fff]", chinese.source), english.id
            assert places(chinese.source) == places(english.source), english.id


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_sections_name_the_same_things(path):
    for english, chinese in zip(sections(path), sections(PAGES[path]), strict=True):
        assert places(chinese) == places(english), english.partition("\n")[0]
