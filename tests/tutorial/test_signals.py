"""Who hears SIGTERM: the SDK's own start script as process 1, as in a container of SageMaker."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import boto3
import psutil
import pytest
from conftest import ROOT
from sagemaker.core.shapes import Channel, DataSource
from sagemaker.core.training import configs
from sagemaker.train import ModelTrainer
from sagemaker.train.distributed import Torchrun
from tutorial import account, launch

SCRIPT = """
import signal, sys, time

def leave(*_):
    print("saved", flush=True)
    sys.exit(143)

signal.signal(signal.SIGTERM, leave)
print("ready", sys.argv[1:], flush=True)
time.sleep(60)
"""
ALONE = ["unshare", *["--user", "--map-root-user"] * bool(os.getuid())]
ALONE += ["--pid", "--fork", "--kill-child"]  # the command is process 1 of a PID namespace
FLAGS = {"epochs": 10, "name": "it's 舉手 $HOME", "horizontal_flip": True}


@pytest.fixture
def container(tmp_path, monkeypatch):
    """container(**source_code): the process of a job's start script, once the script is ready.

    Everything is the SDK's, but for the folder that is /opt/ml and the name of the machine.
    """
    if not shutil.which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True).stderr:
        pytest.skip("this machine makes no PID namespaces")
    root, home = tmp_path / "ml", tmp_path / "code"
    (tmp_path / "python").symlink_to(sys.prefix)  # the SDK's script does not quote: no space
    home.mkdir()
    (home / "train.py").write_text(SCRIPT)
    (root / "input/config").mkdir(parents=True)
    (root / "output").mkdir()
    hosts = {"current_host": "localhost", "hosts": ["localhost"], "network_interface_name": "lo"}
    hosts["current_instance_type"] = "ml.m5.large"
    for name, content in {
        "resourceconfig": hosts, "inputdataconfig": {}, "hyperparameters": {}
    }.items():  # fmt: skip
        (root / f"input/config/{name}.json").write_text(json.dumps(content))

    def keep(trainer, channel_name, data_source, **_):
        shutil.copytree(data_source, root / "input/data" / channel_name)
        return Channel(channel_name=channel_name, data_source=DataSource())

    monkeypatch.setattr(ModelTrainer, "create_input_data_channel", keep)
    run = {"bucket": "bucket", "prefix": "video", "region": "us-east-1"}
    run |= {"homes": [], "jobs": [], "quotas": None, "dollars_per_hour": {}}
    here = account.Account(tmp_path, run, boto3.Session(region_name="us-east-1"))
    started = []

    def start(distributed=None, **source):
        trainer = ModelTrainer(
            sagemaker_session=launch.new_run(here).session,
            role="arn:aws:iam::123456789012:role/test",
            training_image="my/image:1",
            compute=configs.Compute(instance_type="ml.m5.large", instance_count=1),
            source_code=configs.SourceCode(source_dir=str(home), **source),
            output_data_config=configs.OutputDataConfig(s3_output_path="s3://bucket/output"),
            distributed=distributed,
        )
        trainer.train(dry_run=True)
        drivers = root / "input/data/sm_drivers"
        for path in drivers.rglob("*.*"):
            text = path.read_text().replace("/opt/ml", str(root))
            path.write_text(text.replace('"algo-1"', '"localhost"'))
        script = drivers / "sm_train.sh"
        path = f"{tmp_path}/python/bin:{os.environ['PATH']}"  # python3 and torchrun
        process = subprocess.Popen(
            [*ALONE, "/bin/bash", "-c", f"chmod +x {script} && {script}"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | launch.ENVIRONMENT | {"TRAINING_JOB_NAME": "video-1", "PATH": path},
        )  # fmt: skip
        started.append(process)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready"):
                (first,) = psutil.Process(process.pid).children()
                return SimpleNamespace(process=process, first=first, ready=line, lines=lines)
        pytest.fail("".join(lines))

    yield start
    for process in started:
        process.kill()  # and, by --kill-child, all in the namespace
        process.communicate()


def test_a_script_that_a_command_puts_in_the_shells_place_hears_of_its_end(container):
    args = launch.arguments(FLAGS)
    job = container(command="exec python3 train.py", args=args)
    flags = ["--epochs", "10", "--name", "it's 舉手 $HOME", "--horizontal_flip", "true"]
    assert job.ready == f"ready {flags}\n"  # as they were
    job.first.send_signal(signal.SIGTERM)
    said, _ = job.process.communicate(timeout=60)
    assert "saved" in said and job.process.returncode == 143


@pytest.mark.long
def test_torchrun_in_the_shells_place_passes_the_signal_on(container):
    job = container(command=f"{launch.TORCHRUN} train.py", args=["--epochs", "10"])
    assert job.ready == "ready ['--epochs', '10']\n"
    job.first.send_signal(signal.SIGTERM)
    said, _ = job.process.communicate(timeout=60)
    assert "saved" in said


@pytest.mark.parametrize("distributed", [None, pytest.param(Torchrun(), marks=pytest.mark.long)])
def test_a_script_below_the_sdks_driver_hears_nothing(container, distributed):
    """This is why the requests have a command. If it fails, the SDK passes the signal on."""
    job = container(entry_script="train.py", distributed=distributed)
    job.first.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        job.process.communicate(timeout=2)


def test_the_launches_of_the_series_have_such_a_command():
    """Each ModelTrainer of the notebooks; a shell before the script would swallow the signal."""
    found = 0
    folder = ROOT / "notebooks"
    for path in sorted([*folder.glob("0*.ipynb"), *folder.glob("how_to/*.ipynb")]):
        for cell in json.loads(path.read_text())["cells"]:
            text = "".join(cell["source"])
            if "= ModelTrainer(" in text:
                found += 1
                assert 'command="exec ' in text or "{launch.TORCHRUN}" in text, path.name
                assert "args=launch.arguments(" in text and "entry_script" not in text, path.name
    assert found >= 4 and launch.TORCHRUN.startswith("exec ")
