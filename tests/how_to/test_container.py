"""The guide run_in_a_container in real containers: one job that succeeds, and how others fail."""

import os
import subprocess
import tarfile
import time
from contextlib import ExitStack

import nbformat
import pytest
import yaml
from conftest import ROOT, TINY
from container import engine, image

NOTEBOOK = ROOT / "notebooks" / "how_to" / "run_in_a_container.ipynb"
IMAGE = "videomae-tests"


@pytest.fixture(scope="module", autouse=True)
def stage_time(request):
    """Says how long all of this took, engine and image included."""
    start = time.monotonic()
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\ncontainer stage: {time.monotonic() - start:.0f} s")


@pytest.fixture(scope="module")
def local_image(tmp_path_factory):
    """The name of an image that runs train.py, in an engine that answers; else the test is skipped.

    An engine that was there before loses the image at the end, and keeps what it had.
    """
    if engine.answers():
        image.build(IMAGE)
        yield IMAGE
        subprocess.run(["docker", "rmi", "--force", IMAGE], check=True, capture_output=True)
    elif obstacle := engine.obstacle():
        pytest.skip(obstacle)
    else:
        with ExitStack() as stack:
            try:
                stack.enter_context(engine.running(tmp_path_factory.mktemp("docker") / "engine"))
            except RuntimeError as error:  # root, but in a container that may not do this
                pytest.skip(str(error))
            image.build(IMAGE)
            yield IMAGE


@pytest.fixture
def notebook(tmp_path, clips_folder, monkeypatch):
    """What the guide's cells before the script leave behind; without any AWS credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in (
        "AWS_CONFIG_FILE",
        "AWS_SHARED_CREDENTIALS_FILE",
        "SAGEMAKER_USER_CONFIG_OVERRIDE",
    ):
        monkeypatch.setenv(name, os.devnull)  # the last one is set by the notebook
    monkeypatch.chdir(NOTEBOOK.parent.parent)
    cells = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, 4).cells}
    flags = "--epochs 1 --train_batch_size 4 --eval_batch_size 4 --learning_rate 1e-3"
    names = {"output_dir": str(tmp_path), "model_name": str(TINY), "local_container": None}

    def run(*ids):
        for cell in ids:
            exec(compile(cells[cell], f"run_in_a_container, cell {cell}", "exec"), names)
        return names

    run("start", "imports")
    names |= {
        "output": tmp_path,
        "smoke": clips_folder,
        "flags": [*flags.split(), "--model_name", str(TINY)],
    }
    return names, run


@pytest.mark.long
def test_the_same_job_in_a_container(notebook, local_image, capfd):
    names, run = notebook
    names["local_container"] = local_image
    run(
        "run-script",
        "artefact",
        "container-lacking",
        "container-check",
        "container-trainer",
        "container-run",
    )
    log = capfd.readouterr().out
    assert "Docker answers" in log
    assert "--dataloader_num_workers 0" in log and "'eval_accuracy'" in log

    root = names["root"]
    # Whoever is not root, as the container is, must be able to collect the weights.
    assert (root / "model" / "model.safetensors").stat().st_mode & 0o044 == 0o044
    with tarfile.open(root / "compressed_artifacts" / "model.tar.gz") as packed:
        files = packed.getnames()
    assert {"model.safetensors", "config.json", "preprocessor_config.json"} <= {*files}
    run("container-artefact")
    apart = float(capfd.readouterr().out.split("largest difference of a weight:")[1])
    assert apart < 1e-6  # the image holds the versions of this machine
    compose = yaml.safe_load((root / "docker-compose.yaml").read_text())
    environment = compose["services"]["algo-1"]["environment"]
    assert not any(line.startswith("AWS_") for line in environment), "credentials go in"


@pytest.mark.long
def test_a_failed_job_says_why(notebook, local_image, capfd):
    names, run = notebook
    names["local_container"] = local_image
    names["flags"] += ["--epoch", "2"]
    run("container-lacking", "container-check", "container-trainer")
    with pytest.raises(RuntimeError, match="not used by the HfArgumentParser: .'--epoch'") as error:
        run("container-run")
    assert str(error.value).startswith("the job in the container failed: ")
    left = subprocess.run(names["left"].split(), capture_output=True, text=True, check=True)
    assert left.stdout == ""
    run("container-trainer")  # makes the folder anew, whoever owns what is in it


@pytest.mark.long
def test_an_image_that_is_not_there(notebook, local_image, capfd):
    names, run = notebook
    names["local_container"] = "no-such-image-of-videomae-tests"
    run("container-lacking", "container-check", "container-trainer")
    with pytest.raises(RuntimeError, match="see the lines above"):
        run("container-run")
    assert "no-such-image-of-videomae-tests" in capfd.readouterr().out


@pytest.mark.parametrize(
    "wanted, address, path, reason",
    [
        (None, None, None, "local_container names no image"),
        ("some-image", "tcp://127.0.0.1:1", None, "127.0.0.1:1"),
        ("some-image", None, "/nowhere", "no command `docker`"),
    ],
)
def test_without_an_engine_the_notebook_says_so_and_goes_on(
    notebook, monkeypatch, capsys, wanted, address, path, reason
):
    names, run = notebook
    names["local_container"] = wanted
    if address:
        monkeypatch.setenv("DOCKER_HOST", address)
    if path:
        monkeypatch.setenv("PATH", path)
    run("container-lacking", "container-check", "container-trainer", "container-run")
    names["AutoModelForVideoClassification"] = names["finished"] = None
    run("container-artefact")
    said = capsys.readouterr().out
    assert reason in said and "docker pull" in said and "docker login" in said
    assert not (names["root"] / "compressed_artifacts").exists()
