"""Runs cells of the notebooks in this process, so that a test can look at what they made."""

from functools import cache

import nbformat
from conftest import ROOT


@cache  # nbformat validates what it reads, which takes a second
def notebook_cells(name):
    """The cells of notebooks/<name>.ipynb; do not change them."""
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells


def compiled(name, cell):
    """The code of a cell, without its lines with magics."""
    lines = (line for line in cell.source.splitlines() if line[:1] not in "%!" or not line)
    return compile("\n".join(lines), f"{name}:{cell.id}", "exec")


def run_cell(name, cell_id, **given):
    """What one cell defines in a namespace where only `given` is known before."""
    (cell,) = (cell for cell in notebook_cells(name) if cell.id == cell_id)
    exec(compiled(name, cell), given)
    return given


def run_cells(name, parameters, stop=None):
    """The variables of a notebook after its code cells, up to the one with id `stop`.

    `parameters` replace those of the parameters cell; an unknown one raises KeyError. The working
    folder must be notebooks/, as for a reader.
    """
    variables = {"__name__": "__main__"}
    for cell in notebook_cells(name):
        if cell.id == stop:
            break
        if cell.cell_type == "code" and not cell.source.startswith("%%"):
            exec(compiled(name, cell), variables)
            if cell.id == "parameters":
                if unknown := parameters.keys() - variables:
                    raise KeyError(f"{name} has no parameter {unknown}")
                variables |= parameters
    return variables
