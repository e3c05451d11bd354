"""tutorial/container.py, without Docker; tests/how_to/test_container.py runs real containers."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tutorial import container

IMAGE = "763104351884.dkr.ecr.eu-west-1.amazonaws.com/pytorch:2.14-cpu-amzn2023-sagemaker"


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """Puts a command docker first, and alone, in PATH. Call it with lines of a shell script.

    The words of each call are a line of the file that it returns.
    """

    def write(script):
        calls, command = tmp_path / "calls", tmp_path / "bin" / "docker"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\necho "$*" >> "{calls}"\n{script}\n')
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(command.parent))
        return calls

    return write


# ---- What is missing ----------------------------------------------------------------------------


def test_no_image_is_named(docker):
    docker("true")
    assert container.lacking(None) == "the parameter local_container names no image"


def test_each_missing_thing_is_named(docker):
    docker("[ $1 = image ] || { echo gone >&2; exit 1; }")
    engine, compose, image = container.lacking(None).split("; ")
    assert engine == "the Docker engine does not answer: gone"
    assert compose.startswith("there is no Docker Compose") and image.endswith("names no image")


def test_there_is_no_command(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert container.lacking("image") == "there is no command `docker`: install Docker"
    assert container.stopped("folder") == []


@pytest.mark.parametrize(
    "script, said",
    [
        ('[ $1 != info ] || { echo "no daemon at x" >&2; exit 1; }', "not answer: no daemon at x"),
        ("[ $1 != compose ]", "there is no Docker Compose"),
        ("[ $1 != image ]", "Docker has no image some/image here"),
        ("true", ""),
    ],
)
def test_what_docker_lacks_is_said(docker, script, said):
    docker(script)
    found = container.lacking("some/image")
    assert said in found and bool(found) == bool(said)


def test_the_old_compose_command_will_do(docker, tmp_path):
    docker("[ $1 != compose ]")
    old = tmp_path / "bin" / "docker-compose"
    old.write_text("#!/bin/sh\n")
    old.chmod(0o755)
    assert container.lacking("image") == ""


def test_the_commands_name_region_registry_and_image():
    assert container.how_to_get(IMAGE).splitlines() == [
        "aws ecr get-login-password --region eu-west-1 |",
        "    docker login --username AWS --password-stdin "
        "763104351884.dkr.ecr.eu-west-1.amazonaws.com",
        f"docker pull {IMAGE}",
        f"local_container = '{IMAGE}'",
    ]


# ---- The run ------------------------------------------------------------------------------------


def test_the_folder_is_new_and_the_sdk_says_nothing_to_aws(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_USER_CONFIG_OVERRIDE", "")
    root = tmp_path / "a run"
    for _ in range(2):
        container.make_room(root)
        assert {path.name for path in root.iterdir()} == {"model", "algo-1", "sagemaker.yaml"}
        (root / "left by the run before").touch()
    settings = json.loads((root / "sagemaker.yaml").read_text())
    assert settings["SageMaker"]["PythonSDK"]["Modules"]["TelemetryOptOut"] is True
    assert os.environ["SAGEMAKER_USER_CONFIG_OVERRIDE"] == str(root / "sagemaker.yaml")


@pytest.mark.parametrize("reason", ["no flag --epoch", None])
def test_a_failure_has_the_reason_of_the_script_and_leaves_no_container(docker, tmp_path, reason):
    calls = docker('[ $1 != ps ] || printf "one\\ntwo\\n"')
    root = tmp_path / "a run"
    if reason:
        (root / "artifacts" / "output").mkdir(parents=True)
        (root / "artifacts" / "output" / "failure").write_text(reason)

    def train(input_data_config):
        raise RuntimeError("exit code 1")

    said = reason or "exit code 1; see the lines above"
    with pytest.raises(RuntimeError, match=f"^the job in the container failed: {said}$"):
        container.run(SimpleNamespace(train=train), [], root)
    listed, removed = calls.read_text().splitlines()
    assert listed.endswith(f"label=com.docker.compose.project.working_dir={root}")
    assert removed == "rm --force one two"


def test_a_run_that_succeeds_gets_its_channels_and_is_cleaned_too(docker, tmp_path):
    calls, given = docker('[ $1 != ps ] || echo "one"'), []
    container.run(SimpleNamespace(train=lambda input_data_config: given.append(1)), [], tmp_path)
    assert given == [1] and calls.read_text().splitlines()[-1] == "rm --force one"


# ---- The table ----------------------------------------------------------------------------------


def finished(folder, weight, torch_version, extra=()):
    """The folders (model, data) of a run of train.py."""
    model, data = folder / "model", folder / "data"
    for path in (model, data):
        path.mkdir(parents=True)
    save_file({"a": torch.zeros(2), "b": torch.tensor([1.0, weight])}, model / "model.safetensors")
    record = {"versions": {"torch": torch_version, "Transformers": "5.0"}}
    (model / "run_record.json").write_text(json.dumps(record))
    for name in extra:
        (model / name).touch()
    (data / "metrics.json").write_text(json.dumps({"eval_loss": 0.5, "eval_accuracy": weight}))
    return model, data


def test_two_runs_stand_side_by_side(tmp_path):
    outside = finished(tmp_path / "outside", 0.75, "2.14.0")
    inside = finished(tmp_path / "inside", 0.5, "2.10.0+cpu", extra=["more.json"])
    table = container.compare(outside, inside)
    assert list(table) == ["this computer", "container"]
    assert table.loc["validation accuracy"].tolist() == ["0.750", "0.500"]
    assert table.loc["torch"].tolist() == ["2.14.0", "2.10.0+cpu"]
    assert table.loc["files of the model"].tolist() == [
        "model.safetensors, run_record.json",
        "model.safetensors, more.json, run_record.json",
    ]
    assert table.loc["largest difference of a weight"].tolist() == ["", "2.5e-01"]


def test_without_a_container_the_table_has_one_column(tmp_path):
    table = container.compare(finished(tmp_path / "outside", 0.75, "2.14.0"), None)
    assert list(table) == ["this computer"] and table.loc["validation loss"].item() == "0.5000"
