"""Which training image a job gets, and scripts/requirements.txt over the packages it ships."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from packaging.version import Version
from sagemaker.core import image_uris
from sagemaker.core.utils import install_requirements
from tutorial import launch

REQUIREMENTS = ROOT / "scripts" / "requirements.txt"
AL2023 = "pytorch-amzn2023"  # the SDK's name for AWS's PyTorch images on Amazon Linux 2023


def image(training_image, region="us-east-1", instance_type="ml.g4dn.xlarge") -> str:
    """The URI that notebook 3 gets, as `<account>.dkr.ecr.<region>...:<tag>`."""
    here = SimpleNamespace(run={"region": region})
    return launch.image(here, instance_type, training_image)


# ---- Which image


@pytest.mark.parametrize("region", ["us-east-1", "ap-northeast-1"])
@pytest.mark.parametrize(
    "instance_type, device", [("ml.g4dn.xlarge", r"cu\d+"), ("ml.g6.12xlarge", r"cu\d+"),
                              ("ml.m5.large", "cpu")],
)  # fmt: skip
def test_the_default_is_the_newest_pytorch_for_the_region_and_device(region, instance_type, device):
    uri = image(AL2023, region, instance_type)
    host, _, name = uri.partition("/")
    assert re.fullmatch(rf"\d{{12}}\.dkr\.ecr\.{region}\.amazonaws\.com", host)
    version = re.fullmatch(rf"pytorch:([\d.]+)-{device}-amzn2023-sagemaker", name)[1]
    known = [v for v in image_uris.list_versions(AL2023, "training") if v[0].isdigit()]
    assert Version(version) == max(map(Version, known)) >= Version("2.14")


def test_versions_are_compared_as_numbers():
    assert ":2.10" in image("pytorch")  # not 2.9, and not the 2.8 at the end of an alphabet


def test_a_region_that_lacks_the_newest_gets_the_newest_that_it_has():
    versions = image_uris.config_for_framework(AL2023)["training"]["versions"]
    newest, second = sorted(versions, key=Version)[:-3:-1]
    lacking = versions[second]["registries"].keys() - versions[newest]["registries"].keys()
    assert lacking, "every Region has the newest: this test can go"
    assert f":{second}-" in image(AL2023, sorted(lacking)[0])


@pytest.mark.parametrize("region", ["us-east-1", "ap-northeast-1"])
def test_hugging_face_by_one_parameter(region):
    uri = image("huggingface", region, "ml.g5.xlarge")
    host, _, name = uri.partition("/")
    assert f".{region}." in host
    version = re.match(r"huggingface-pytorch-training:[\d.]+-transformers([\d.]+)-", name)[1]
    assert Version(version) >= Version("5.3")


def test_what_the_sdk_has_no_image_for_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="no huggingface image for ml.m5.large in us-east-1"):
        image("huggingface", instance_type="ml.m5.large")  # they are for GPUs only
    with pytest.raises(ValueError, match=f"no {AL2023} image for ml.trn1.2xlarge"):
        image(AL2023, instance_type="ml.trn1.2xlarge")
    with pytest.raises(ValueError, match="ml.p3.2xlarge: .* CUDA 13"):
        image(AL2023, instance_type="ml.p3.2xlarge")


def test_a_family_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="training image 'tensorflow': pytorch-amzn2023, pytorch"):
        image("tensorflow")


def test_an_image_of_ones_own_is_taken_as_it_is():
    own = "123456789012.dkr.ecr.us-east-1.amazonaws.com/mine:1"
    assert image(own) == own


@pytest.mark.parametrize(
    "training_image, python", [(AL2023, "3.12"), ("pytorch", "3.13"), ("huggingface", "3.12")]
)
def test_the_difference_between_here_and_the_job_is_shown(training_image, python):
    uri = image(training_image)
    table = launch.versions(uri)
    assert table.loc["python", "in the job"] == python
    torch_there = table.loc["torch", "in the job"]
    assert torch_there in uri and torch_there[0].isdigit()
    same = torch.__version__.startswith(torch_there)
    assert table.loc["torch", "note"] == ("" if same else "differs")
    for name, pin in pins().items():
        assert table.loc[name, "in the job"] == pin and table.loc[name, "note"] == ""


# ---- The requirements, over the packages that the images ship


def pins() -> dict[str, str]:
    lines = REQUIREMENTS.read_text()
    return dict(re.findall(r"^([\w-]+)==([\w.]+)$", lines, re.MULTILINE))


# As the Dockerfiles of github.com/aws/deep-learning-containers have them (2.9: with the newest
# pandas and pyarrow of its day).
SHIPPED = {
    "2.9.0-transformers5.3.0": """transformers==5.3.0 datasets==4.5.0 huggingface_hub==1.10.0
        accelerate==1.12.0 peft==0.18.1 evaluate==0.4.6 numpy==1.26.4 pandas==2.3.3 pyarrow==23.0.1
        dill==0.3.8 multiprocess==0.70.16 scikit-learn==1.7.2""",
    "2.11-transformers5.13": """transformers==5.13.1 datasets==5.0.0 huggingface_hub==1.23.0
        accelerate==1.14.0 peft==0.19.1 evaluate==0.4.6 hf-xet==1.5.1 scikit-learn""",
}


def linked(folder, *packages):
    """A folder from which just these packages of the running environment can be imported."""
    site = next(p for p in map(ROOT.__class__, sys.path) if (p / "torch").is_dir())
    folder.mkdir()
    for package in packages:
        for found in [*site.glob(package), *site.glob(f"{package}[.-]*")]:
            (folder / found.name).symlink_to(found)
    return folder


def run(*command, **environment) -> subprocess.CompletedProcess:
    """The command with its output, without a torch backend that uv would go and look for."""
    environment = {k: v for k, v in os.environ.items() if k != "UV_TORCH_BACKEND"} | environment
    command, folder = [*map(str, command)], ROOT / "scripts"
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.fixture(params=SHIPPED)
def shipped(request, tmp_path):
    """The Python of an environment with an image's packages, and the torch that runs here."""
    packages = SHIPPED[request.param].split()
    if "numpy==1.26.4" in packages and sys.version_info >= (3, 13):
        pytest.skip("numpy 1.26 has no wheels for this Python")
    python = tmp_path / "image" / "bin" / "python"
    uv = [sys.executable, "-m", "uv"]
    made = run(*uv, "venv", "--seed", "--python", sys.executable, tmp_path / "image")
    # torch lies outside the environment: pip sees it, and would not remove it.
    (tmp_path / "overrides.txt").write_text("torch; python_version < '3'")
    needed = ["sympy", "networkx", "jinja2"]  # of torch
    install = [*uv, "pip", "install", "--python", python, *packages, *needed]
    filled = made.returncode or run(*install, "--overrides", tmp_path / "overrides.txt")
    if made.returncode or filled.returncode:
        said = made.stderr if made.returncode else filled.stderr
        if re.search("(?i)dns|connect|request failed|timed out", said):
            pytest.skip(f"packages cannot be downloaded: {said.splitlines()[-1]}")
        pytest.fail(said)
    outside = linked(tmp_path / "torch", "torch", "torchgen", "functorch")
    (site,) = (tmp_path / "image" / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(str(outside))
    return request.param, python


@pytest.mark.long
def test_requirements_make_the_image_ready(shipped, clips_folder, tmp_path):
    name, python = shipped
    old = re.search(r"transformers==(\S+)", SHIPPED[name])[1]
    script = ROOT / "scripts" / "train.py"

    # Without transformers of its own, the script says at once what is missing.
    others = linked(tmp_path / "others", "av", "decord", "pebble")
    early = run(python, script, "--help", PYTHONPATH=str(others))
    assert early.returncode and "transformers>=5.18 is required" in early.stderr, early.stderr
    assert old in early.stderr and "pip install -r scripts/requirements.txt" in early.stderr

    # As the SDK's start script has it in the container; but no file is compiled before it is used.
    installed = run(python, install_requirements.__file__, REQUIREMENTS.name, PIP_NO_COMPILE="1")
    assert installed.returncode == 0, installed.stdout + installed.stderr

    flags = "--epochs 1 --train_batch_size 8 --dataloader_num_workers 1".split()
    folders = {
        "SM_CHANNEL_TRAIN": str(clips_folder), "SM_CHANNEL_MODEL": str(TINY),
        "SM_MODEL_DIR": str(tmp_path / "job" / "model"),
        "SM_OUTPUT_DATA_DIR": str(tmp_path / "job" / "data"),
    }  # fmt: skip
    job = run(python, script, *flags, "--report_to", "tensorboard", **folders)
    assert job.returncode == 0, job.stdout + job.stderr + installed.stdout
    record = json.loads((tmp_path / "job" / "model" / "run_record.json").read_text())
    versions = {package.lower(): version for package, version in record["versions"].items()}
    assert {package: versions[package] for package in pins()} == pins()
    assert torch.__version__.startswith(versions["torch"])  # metadata: "2.13.0", of "2.13.0+cu130"
    if "numpy==1.26.4" in SHIPPED[name]:
        assert versions["numpy"] == "1.26.4"  # what else the image has was built for it
