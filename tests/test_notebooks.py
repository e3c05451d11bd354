"""The notebooks as files, and what happens when a reader runs them and something is wrong."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def source(path):
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells)


def test_the_series_is_there():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@each
def test_committed_without_outputs_with_stable_ids(path):
    raw = json.loads(path.read_text())
    assert (raw["nbformat"], raw["nbformat_minor"] >= 5) == (4, True)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]+", cell["id"]) for cell in raw["cells"])
    assert len({cell["id"] for cell in raw["cells"]}) == len(raw["cells"])
    for cell in cells(path, "code"):
        assert cell.outputs == [] and cell.execution_count is None


@each
def test_parameters_come_first_in_a_code_cell_and_are_explained(path):
    code = cells(path, "code")
    assert code[0].metadata.tags == ["parameters"]
    assert not any("tags" in cell.metadata for cell in [*code[1:], *cells(path, "markdown")])
    lines = code[0].source.splitlines()
    for node in ast.parse(code[0].source).body:
        assert "#" in lines[node.lineno - 1]


@each
def test_headings_descend_and_the_close_repeats_the_opening(path):
    markdown = cells(path, "markdown")
    levels = [
        len(match[1])
        for cell in markdown
        for match in re.finditer(r"^(#+) ", cell.source, re.MULTILINE)
    ]
    assert levels[0] == 1 and levels[1:].count(1) == 0
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    opening, closing = markdown[0].source, markdown[-1].source
    assert "At the end of this notebook you have" in opening and "You now have" in closing
    assert opening.count("\n- ") == closing.count("\n- ") >= 3
    assert "Time and money" in opening and "You need" in opening


@each
def test_pacing(path):
    kinds = [cell.cell_type for cell in nbformat.read(path, 4).cells]
    assert "code code" not in " ".join(kinds)  # prose before each piece of code
    for cell in cells(path, "code"):
        assert cell.source.startswith("%%writefile") or cell.source.count("\n") < 25


@each
def test_nothing_private_is_committed(path):
    text = source(path)
    assert not re.search(r"\b\d{12}\b", text)
    assert not re.search(r"(/home/|/root/|/Users/|[A-Z]:\\)", text)
    assert not re.search(r"\binput\(|%store|trust_remote_code *=|AKIA[A-Z0-9]{16}", text)


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md"], ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path):
    text = source(path) if path.suffix == ".ipynb" else path.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (path.parent / unquote(target)).exists(), target


@pytest.mark.parametrize(
    "notebook, script",
    [
        ("02_local_smoke_train", "train.py"),
        ("04_results", "inference.py"),
        ("05_video_segmentation", "train_segmentation.py"),
    ],
)
def test_the_script_that_a_notebook_writes_is_the_committed_one(notebook, script):
    written = b""
    for cell in cells(ROOT / "notebooks" / f"{notebook}.ipynb", "code"):
        first, _, body = cell.source.partition("\n")
        if first.startswith("%%writefile"):
            assert first.split()[-1] == f"../scripts/{script}"
            assert ("-a" in first) == bool(written)
            written += body.encode() + b"\n"
    assert written == (ROOT / "scripts" / script).read_bytes()


def test_the_job_installs_what_the_reader_has():
    def pins(name):
        lines = (ROOT / name).read_text().splitlines()
        return {line for line in lines if line and not line.startswith("#")}

    assert pins("scripts/requirements.txt") < pins("requirements.txt")
    torch = [line for line in pins("requirements.txt") if re.match(r"torch\b", line)]
    assert torch == ["torch>=2.6"]
    assert "torch" not in {re.split("[=<>;]", line)[0] for line in pins("scripts/requirements.txt")}


def test_the_writefile_cell_writes_those_bytes(tmp_path):
    """IPython's own %%writefile, on the first two sections."""
    path = ROOT / "notebooks" / "02_local_smoke_train.ipynb"
    script = [c.source for c in cells(path, "code") if c.source.startswith("%%writefile")][:2]
    (tmp_path / "scripts").mkdir()
    (tmp_path / "notebooks").mkdir()
    code = "from IPython.core.interactiveshell import InteractiveShell as S\ns = S.instance()\n"
    code += "".join(f"s.run_cell({cell!r}).raise_error()\n" for cell in script)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "notebooks", check=True)
    written = (tmp_path / "scripts" / "train.py").read_bytes()
    assert len(written) > 2000 and (ROOT / "scripts" / "train.py").read_bytes().startswith(written)


def run_all(*arguments, **environment):
    names = [n for n in os.environ if not n.startswith("AWS_")]
    clean = {name: os.environ[name] for name in names} | {
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, str(ROOT / "notebooks" / "run_all.py"), *map(str, arguments)],
        env=clean | environment, capture_output=True, text=True,
    )  # fmt: skip


def parameter_file(folder, text):
    path = folder / "parameters.yaml"
    path.write_text(text)
    return path


def test_without_credentials_the_failing_cell_and_the_remedy_are_named(tmp_path):
    parameters = parameter_file(tmp_path, "region: us-east-1")
    result = run_all("--parameters", parameters, "--only", "01", "--output-dir", tmp_path / "o")
    assert result.returncode == 1
    assert "FAILED: 01_setup.ipynb, cell 'identity'" in result.stdout
    assert "No valid AWS credentials" in result.stdout and "aws configure" in result.stdout
    assert "No valid AWS credentials" in (tmp_path / "o" / "html" / "01_setup.html").read_text()


def test_without_a_role_the_remedy_is_named(tmp_path):
    from local_mode import aws
    from test_aws import free_port

    port = free_port()
    text = f"endpoint_url: http://127.0.0.1:{port}\ncreate_role: false"
    try:
        result = run_all(
            "--parameters", parameter_file(tmp_path, text), "--only", "01",
            "--output-dir", tmp_path / "o",
        )  # fmt: skip
    finally:
        aws.stop(port)
    assert result.returncode == 1 and "cell 'role-find'" in result.stdout
    assert "No role 'SageMaker-Video-ExecutionRole'" in result.stdout
    assert "create_role = True" in result.stdout


def test_notebook_3_alone_says_what_comes_first(tmp_path):
    parameters = parameter_file(tmp_path, "max_runtime: 60")
    result = run_all("--parameters", parameters, "--only", "03", "--output-dir", tmp_path / "o")
    assert result.returncode == 1 and "run 01_setup.ipynb first" in result.stdout


@pytest.mark.parametrize("run", [None, {"dataset": "clips"}], ids=["no run.json", "of notebook 2"])
def test_the_clean_up_says_that_there_is_nothing_to_clean(tmp_path, run):
    if run:
        (tmp_path / "run.json").write_text(json.dumps(run))
    parameters = parameter_file(tmp_path, "confirm_delete: true")
    result = run_all("--parameters", parameters, "--only", "06", "--output-dir", tmp_path)
    assert result.returncode == 1 and "FAILED: 06_clean_up.ipynb, cell 'connect'" in result.stdout
    assert "No run.json of 01_setup.ipynb in output_dir" in result.stdout


@pytest.mark.parametrize(
    "arguments, text, message",
    [
        (["--only", "07"], "", "--only 07: no notebook's name begins like this"),
        ([], "clip_hight: 96", "no notebook has the parameter clip_hight"),
        (["--parametres", "x"], "", "unrecognized arguments: --parametres"),
    ],
)
def test_wrong_calls_are_named(tmp_path, arguments, text, message):
    parameters = parameter_file(tmp_path, text)
    result = run_all("--parameters", parameters, "--output-dir", tmp_path / "o", *arguments)
    assert result.returncode != 0 and message in result.stderr


def test_a_python_that_cannot_unpack_safely_is_refused_at_once(monkeypatch):
    """As the 3.11.2 of Debian 12, which was seen to fail in notebook 4."""
    sys.path.insert(0, str(ROOT / "notebooks"))
    import run_all as series
    from cells import run_cell

    monkeypatch.delattr("tarfile.data_filter")
    assert series.main().startswith("Python 3.11.4 or newer is needed")
    with pytest.raises(RuntimeError, match="3.11.4 or newer unpacks safely"):
        run_cell("01_setup", "versions")


def test_local_parameters_are_known_and_change_values_only():
    sys.path.insert(0, str(ROOT / "notebooks"))
    import run_all as series

    file = ROOT / "notebooks" / "local_mode" / "parameters.yaml"
    assert set(series.parameters_of(NOTEBOOKS, file)) == set(NOTEBOOKS)
    for path in NOTEBOOKS:
        assert not re.search(r"\bif .*(endpoint_url|local)", source(path)), path


def test_paths_in_the_readme_exist():
    named = re.findall(r"`((?:notebooks|scripts|tests)/[\w./]+)`", (ROOT / "README.md").read_text())
    assert named and all((ROOT / name).exists() for name in named)
    assert Path(ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")


def test_the_readmes_pictures_are_small_and_made_by_the_series():
    folder = ROOT / "notebooks" / "images"
    shown = set(re.findall(r"\(notebooks/images/([\w.]+)\)", (ROOT / "README.md").read_text()))
    assert shown == {path.name for path in folder.iterdir()}  # none is missing, none is idle
    made = "".join(source(path) for path in NOTEBOOKS)
    for name in shown:
        assert f'"pictures" / "{name}"' in made, f"no notebook saves {name}"
        assert (folder / name).stat().st_size < 200_000, name


def test_the_gallery_is_refreshed_from_the_series(tmp_path):
    from PIL import Image

    sys.path.insert(0, str(ROOT / "notebooks"))
    import run_all as series

    for folder, colour in {"pictures": "red", "gallery": "blue"}.items():
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / folder / "curves.png")
    series.refresh_gallery(tmp_path / "pictures", tmp_path / "gallery")
    with Image.open(tmp_path / "gallery" / "curves.png") as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "pictures" / "curves.png").unlink()
    with pytest.raises(FileNotFoundError, match="curves.png"):
        series.refresh_gallery(tmp_path / "pictures", tmp_path / "gallery")
