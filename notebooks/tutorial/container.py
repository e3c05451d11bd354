"""The guide run_in_a_container: what Docker lacks here, a run in a container, and what it left."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file


def lacking(image: str | None) -> str:
    """What a run of `image` in a container lacks on this computer, in words; "" if nothing.

    It looks for the command docker, the engine, Docker Compose and the image, and names each that
    is missing. What cannot be seen without the one before is not looked for.
    """
    missing = []
    if shutil.which("docker") is None:
        missing.append("there is no command `docker`: install Docker")
    else:
        engine = _docker("info")
        if engine.returncode:
            missing.append(f"the Docker engine does not answer: {engine.stderr.strip()}")
        if _docker("compose", "version").returncode and not shutil.which("docker-compose"):
            missing.append("there is no Docker Compose: install its plugin, `docker compose`")
    if image is None:
        missing.append("the parameter local_container names no image")
    elif not missing and _docker("image", "inspect", image).returncode:
        missing.append(f"Docker has no image {image} here: pull it first")
    return "; ".join(missing)


def how_to_get(image: str) -> str:
    """The commands that fetch an image from Amazon ECR, the image registry of AWS, and name it.

    image: its whole address, <account>.dkr.ecr.<Region>.amazonaws.com/<name>:<tag>.
    """
    registry = image.split("/")[0]
    region = registry.split(".")[3]
    return (
        f"aws ecr get-login-password --region {region} |\n"
        f"    docker login --username AWS --password-stdin {registry}\n"
        f"docker pull {image}\n"
        f"local_container = {image!r}"
    )


def make_room(root: Path) -> None:
    """Makes `root` anew, with what ModelTrainer needs there before a run in a container.

    The folders are made before the engine makes them as root; you could not delete those. A
    settings file keeps the SDK from sending usage data to AWS: it would need credentials.
    """
    shutil.rmtree(root, ignore_errors=True)
    for folder in ("model", "algo-1/input/data", "algo-1/output/data"):
        (root / folder).mkdir(parents=True)
    silent = {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}
    settings = root / "sagemaker.yaml"
    settings.write_text(json.dumps({"SchemaVersion": "1.0", "SageMaker": silent}))
    os.environ["SAGEMAKER_USER_CONFIG_OVERRIDE"] = str(settings)


def run(trainer, channels: list, root: Path) -> None:
    """Trains in a container, and removes the stopped container; its image stays.

    trainer: a ModelTrainer with Mode.LOCAL_CONTAINER and local_container_root=root. channels: its
    InputData. Raises RuntimeError with the reason that the script left in /opt/ml/output/failure.
    """
    try:
        trainer.train(input_data_config=channels)
    except RuntimeError as error:
        failure = root / "artifacts" / "output" / "failure"
        reason = failure.read_text() if failure.exists() else f"{error}; see the lines above"
        raise RuntimeError(f"the job in the container failed: {reason}") from None
    finally:
        if ended := stopped(root):
            _docker("rm", "--force", *ended)


def stopped(root: Path) -> list[str]:
    """The ids of the containers that runs with this root have left."""
    label = f"label=com.docker.compose.project.working_dir={root}"
    return _docker("ps", "--all", "--quiet", "--filter", label).stdout.split()


def _docker(*words: str) -> subprocess.CompletedProcess:
    """A docker command with its output; returncode 127 if there is no such command."""
    try:
        return subprocess.run(["docker", *words], capture_output=True, text=True)
    except FileNotFoundError:
        return subprocess.CompletedProcess(words, 127, "", "no command docker")


def compare(outside: tuple[Path, Path], inside: tuple[Path, Path] | None) -> pd.DataFrame:
    """A table of two runs of train.py: a column for each; one column if `inside` is None.

    outside, inside: the folders (model, data) of a run, SM_MODEL_DIR and SM_OUTPUT_DATA_DIR. The
    last row is the largest absolute difference of a weight.
    """
    columns = {"this computer": _facts(*outside)}
    if inside:
        ours, theirs = (load_file(model / "model.safetensors") for model, _ in (outside, inside))
        apart = max(float((theirs[name] - weight).abs().max()) for name, weight in ours.items())
        columns["container"] = _facts(*inside) | {"largest difference of a weight": f"{apart:.1e}"}
    return pd.DataFrame(columns).fillna("")


def _facts(model: Path, data: Path) -> dict[str, str]:
    """What a run has left, in words and numbers."""
    metrics = json.loads((data / "metrics.json").read_text())
    record = json.loads((model / "run_record.json").read_text())
    versions = {name.lower(): version for name, version in record["versions"].items()}
    files = sorted(path for path in model.iterdir() if path.is_file())
    return {
        "validation loss": f"{metrics['eval_loss']:.4f}",
        "validation accuracy": f"{metrics['eval_accuracy']:.3f}",
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "files of the model": ", ".join(path.name for path in files),
        "size of the model, MB": f"{sum(path.stat().st_size for path in files) / 1e6:.1f}",
    }
