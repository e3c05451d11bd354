"""The guide run_in_a_container in real containers: one job that succeeds, and how others fail."""

import json
import os
import time
from contextlib import ExitStack
from subprocess import run

import pytest
import yaml
from cells import run_cells
from conftest import ROOT, TINY
from container import engine, image
from tutorial import container

GUIDE = "how_to/run_in_a_container"
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
        run(["docker", "rmi", "--force", IMAGE], check=True, capture_output=True)
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
def guide(tmp_path, clips_folder, monkeypatch):
    """Runs the guide up to a cell, after notebooks 1 and 2; without any AWS credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in (
        "AWS_CONFIG_FILE",
        "AWS_SHARED_CREDENTIALS_FILE",
        "SAGEMAKER_USER_CONFIG_OVERRIDE",
    ):
        monkeypatch.setenv(name, os.devnull)  # the last one is set by the guide
    monkeypatch.chdir(ROOT / "notebooks")
    output = tmp_path / "my outputs"  # a space, as readers have them
    output.mkdir()
    choices = {"model_name": str(TINY), "learning_rate": 1e-3}
    known = {"region": "us-east-1", "dataset": str(clips_folder), "choices": choices}
    (output / "run.json").write_text(json.dumps(known))

    def run_guide(image, stop=None):
        given = {"output_dir": str(output), "local_container": image, "smoke_batch": 4}
        return run_cells(GUIDE, given, stop)

    return run_guide


@pytest.mark.long
def test_the_same_job_in_a_container(guide, local_image, capfd):
    """The whole guide, as a reader runs it."""
    made = guide(local_image)
    log = capfd.readouterr().out
    assert "Missing here: nothing" in log and "Both runs are here." in log
    assert "--dataloader_num_workers 0" in log and "'eval_accuracy'" in log

    root = made["root"]
    # Whoever is not root, as the container is, must be able to collect the weights.
    assert (root / "model" / "model.safetensors").stat().st_mode & 0o044 == 0o044
    assert (root / "compressed_artifacts" / "model.tar.gz").exists()
    table = container.compare((made["job"] / "model", made["job"] / "data"), made["inside"])
    assert {"model.safetensors", "config.json", "preprocessor_config.json"} <= {
        *table.loc["files of the model", "container"].split(", ")
    }
    ours, theirs = table.drop("largest difference of a weight").T.values.tolist()
    assert ours == theirs  # the image holds the versions of this machine
    assert float(table.loc["largest difference of a weight", "container"]) < 1e-6
    compose = yaml.safe_load((root / "docker-compose.yaml").read_text())
    environment = compose["services"]["algo-1"]["environment"]
    assert not any(line.startswith("AWS_") for line in environment), "credentials go in"
    assert container.stopped(root) == []
    container.make_room(root)  # makes the folder anew, whoever owns what is in it
    assert not (root / "artifacts").exists()


@pytest.mark.long
def test_a_failed_job_says_why(guide, local_image):
    made = guide(local_image, stop="container-run")
    made["trainer"].source_code.args += ["--epoch", "2"]
    inputs = [made["InputData"](channel_name=n, data_source=s) for n, s in made["channels"].items()]
    with pytest.raises(RuntimeError, match="not used by the HfArgumentParser: .'--epoch'") as error:
        container.run(made["trainer"], inputs, made["root"])
    assert str(error.value).startswith("the job in the container failed: ")
    assert container.stopped(made["root"]) == []


@pytest.mark.long
def test_an_image_that_is_not_there(local_image):
    assert container.lacking("no-such-image").startswith("Docker has no image no-such-image here")
    assert container.lacking(local_image) == ""


@pytest.mark.long
def test_without_an_engine_the_guide_says_so_and_goes_on(guide, monkeypatch, capsys):
    """The same table, with one column; and the commands to get Docker's image."""
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    made = guide("some-image")
    said = capsys.readouterr().out
    assert "docker pull" in said and "docker login" in said
    assert f"No second column, because {made['lacking']}." in said
    assert not (made["root"] / "artifacts").exists() and made["inside"] is None
