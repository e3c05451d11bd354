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
    """What a translation keeps as it is: code, and where links lead to, by their last part."""
    links = [target.rpartition("/")[2] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    return sorted(re.findall(r"`[^`\n]+`", text)), sorted(links)


def older(path, edition):
    """{cell: hash of its English text} of the cells whose English is not what was translated."""
    english = {cell.id: hash_of(cell.source) for cell in cells(path) if cell.cell_type != "code"}
    known = {cell.id: cell.metadata.get("english") for cell in cells(edition)}
    return {name: value for name, value in english.items() if known.get(name) != value}


@pytest.mark.parametrize("path", TUTORIAL, ids=lambda path: path.stem)
def test_no_cell_was_changed_in_english_only(path):
    changed = older(path, EDITION / path.name)
    assert not changed, f"zh-TW/{path.name}: {HOW}, in the metadata of the cell: {changed}"


def test_a_changed_cell_is_named_with_its_hash(tmp_path):
    (path,) = [path for path in TUTORIAL if path.stem == "06_clean_up"]
    changed = tmp_path / path.name
    changed.write_text(path.read_text().replace('"## List', '"## List it all'))
    assert older(changed, EDITION / path.name) == {
        cell.id: hash_of(cell.source) for cell in cells(changed) if cell.id == "list-note"
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_section_was_changed_in_english_only(path):
    english, chinese = sections(path), sections(PAGES[path])
    known = [re.search(r"<!-- english (\w+) -->", section)[1] for section in chinese]
    assert len(known) == len(english)
    changed = {
        section.partition("\n")[0]: hash_of(section)
        for section, value in zip(english, known, strict=True)
        if hash_of(section) != value
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
