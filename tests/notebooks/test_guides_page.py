"""notebooks/how_to/README.md: the way from a question to a guide."""

import re

import nbformat
import pytest
from conftest import ROOT

FOLDER = ROOT / "notebooks" / "how_to"
PAGE = (FOLDER / "README.md").read_text()
GUIDES = {path.name for path in FOLDER.glob("*.ipynb") if not path.name.startswith("local_")}
ROWS = re.findall(r"^\| (?!My question|Guide|---)(.+?) \| (.+?) \|(?: (.+?) \|)?$", PAGE, re.M)


def linked(text):
    return {target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target}


def headings(guide):
    cells = nbformat.read(FOLDER / guide, 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.findall(r"^#{2,} (.+)$", text, re.M)


def test_every_link_of_the_page_leads_somewhere():
    assert all((FOLDER / target).exists() for target in linked(PAGE))


def test_every_guide_answers_a_question_and_has_its_time_and_money():
    """And a guide that does not exist is not promised."""
    questions = "\n".join(answer for _, answer, rest in ROWS if not rest)
    prices = {name: row for row in ROWS if row[2] for name in linked(row[0])}
    assert linked(questions) == GUIDES == prices.keys()
    assert all(re.search(r"\d+ minutes", time) for _, time, _ in prices.values())
    assert all(re.search(r"nothing|\$", money) for *_, money in prices.values())


@pytest.mark.parametrize("question, answer", [row[:2] for row in ROWS if not row[2]])
def test_a_section_that_the_page_names_is_in_the_guide(question, answer):
    (guide,) = linked(answer)
    for title in re.findall(r'"(.+?)"', answer):
        assert title in headings(guide)
    for number in re.findall(r"section (\d)", answer):
        assert any(title.startswith(f"{number}. ") for title in headings(guide))


@pytest.mark.parametrize("guide", sorted(GUIDES))
def test_the_minutes_and_dollars_are_those_that_the_guide_says(guide):
    first = nbformat.read(FOLDER / guide, 4).cells[0].source
    (row,) = (row for row in ROWS if row[2] and guide in linked(row[0]))
    for number in re.findall(r"^\d+ minutes|\$[\d.]+\d", f"{row[1]}\n{row[2]}", re.M):
        assert number in first
