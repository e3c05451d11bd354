"""Studio: a kernel in the home folder, beside Studio's own Python (aws/README.md)."""

import importlib
import os
import re
import subprocess
import sys

import nbformat
import pytest
import tutorial
from conftest import ROOT

PINNED = "six==1.16.0"  # small, and not the version that the tests have


@pytest.mark.long
def test_the_kernel_has_its_own_packages_and_outlives_the_terminal(tmp_path):
    """JupyterLab's Python stays as it is, and finds the kernel by the home folder alone."""
    (commands,) = re.findall(
        r"```bash\n(python3 -m venv.*?)```",
        (ROOT / "notebooks/aws/README.md").read_text(),
        flags=re.DOTALL,
    )
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "requirements.txt").write_text(f"ipykernel\n{PINNED}\n")
    here = {**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    home = here | {"HOME": str(tmp_path), "VIRTUAL_ENV": ""}
    subprocess.run(["bash", "-e", "-c", commands], cwd=clone, env=home, check=True)

    where = "import six, sys; print(six.__version__, sys.prefix)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(where)])
    nbformat.write(notebook, clone / "a.ipynb")

    def printed(kernel):
        command = [sys.executable, "-m", "papermill", "-k", kernel, "a.ipynb", "b.ipynb"]
        subprocess.run(command, cwd=clone, env=home, check=True, capture_output=True)
        return nbformat.read(clone / "b.ipynb", 4).cells[0].outputs[0].text.split()

    assert printed("video-tutorial") == ["1.16.0", str(clone / ".venv")]
    assert printed("python3")[0] != "1.16.0"


def test_who_takes_studios_own_python_is_told_the_kernel(monkeypatch, capsys):
    importlib.reload(tutorial)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "prefix", "/opt/conda")
    monkeypatch.setattr("pathlib.Path.exists", lambda path: "resource-metadata" in path.name)
    importlib.reload(tutorial)
    assert 'Choose the kernel "Video tutorial": see aws/README.md' in capsys.readouterr().out
