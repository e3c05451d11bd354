"""What jobs get from S3 and what reaches it: inputs, checkpoints, spot interruptions."""

import os
import textwrap
from types import SimpleNamespace

import boto3
import pytest
from account import (
    BUCKET,
    account_port,  # noqa: F401
    channel,
    describe,
    finish,
    get,
    keys,
    log,
    put,
    run,
    wait_until,
)
from botocore.exceptions import ClientError
from conftest import ROOT
from embedded import free_port
from local_mode import aws
from local_mode.aws.storage import MarkedFolder, SyncedFolder


def test_no_objects_under_the_prefix(port):
    for uri in (f"s3://{BUCKET}/nothing", "s3://no-such-bucket/clips"):
        with pytest.raises(ClientError, match=f'No S3 objects found under S3 URL "{uri}"'):
            run("empty", "", InputDataConfig=[channel(uri)])


def test_channels_are_sharded(port):
    code = """
        import json, pathlib
        host = json.load(open("input/config/resourceconfig.json"))["current_host"]
        print(host, sorted(p.name for p in pathlib.Path("input/data/train").rglob("*.*")))
    """
    uri, spread = f"s3://{BUCKET}/clips/train/", "ShardedByS3Key"
    run(
        "sharded",
        code,
        InputDataConfig=[channel(uri, S3DataDistributionType=spread)],
        ResourceConfig={"InstanceType": "ml.m5.large", "InstanceCount": 2, "VolumeSizeInGB": 1},
    )
    finish("sharded")
    assert log("sharded", 1) + log("sharded", 2) == [
        "127.0.0.1 ['1.mp4']",
        "127.0.0.2 ['2.mp4']",
    ]


def test_checkpoints_and_a_spot_interruption(port):
    """What is in S3 is there before the script, what it writes and deletes follows; a restart goes
    on."""
    put("ckpt/first/step", b"1")
    put("ckpt-of-another-run/step", b"100")
    code = """
        import os, pathlib, time
        folder = pathlib.Path(os.environ["CHECKPOINTS"])
        steps = sorted(int(p.read_text()) for p in folder.rglob("step"))
        print("found", steps)
        if steps[-1] >= 3:
            (folder / "last").write_text("written at the very end")
            raise SystemExit
        (folder / "second").mkdir()
        (folder / "second/step").write_text("3")
        (folder / "first/step").unlink()
        time.sleep(600)
    """
    run(
        "spot",
        code,
        EnableManagedSpotTraining=True,
        CheckpointConfig={"S3Uri": f"s3://{BUCKET}/ckpt/", "LocalPath": "/opt/ml/checkpoints"},
        Environment={"CHECKPOINTS": "/opt/ml/checkpoints"},
        StoppingCondition={"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 120},
    )
    wait_until(lambda: keys("ckpt/second"))  # while the job runs
    assert describe("spot")["TrainingJobStatus"] == "InProgress"
    aws.interrupt("spot", port)
    answer = finish("spot")
    assert answer["TrainingJobStatus"] == "Completed"
    assert log("spot") == ["found [1]", "found [3]"]
    assert keys("ckpt/") == ["ckpt/last", "ckpt/second/step"]
    assert get("ckpt/last") == b"written at the very end"
    states = [step["Status"] for step in answer["SecondaryStatusTransitions"]]
    assert states == [
        *("Starting", "Downloading", "Training", "Interrupted"),
        *("Starting", "Downloading", "Training", "Uploading", "Completed"),
    ]
    assert answer["BillableTimeInSeconds"] < answer["TrainingTimeInSeconds"]
    with pytest.raises(ValueError, match="not a running spot job"):
        aws.interrupt("spot", port)


def test_checkpoints_come_back_by_prefix(port):
    """Without a slash at its end, neighbours whose names begin alike come as well."""
    put("runs/nodes-1/step", b"1")
    put("runs/nodes-16/step", b"16")
    code = """
        import pathlib
        found = [path for path in pathlib.Path("checkpoints").rglob("*") if path.is_file()]
        print(sorted(str(path.relative_to("checkpoints")) for path in found))
    """
    for name, uri in {"by-text": "runs/nodes-1", "by-folder": "runs/nodes-1/"}.items():
        run(name, code, CheckpointConfig={"S3Uri": f"s3://{BUCKET}/{uri}"})
        assert finish(name)["TrainingJobStatus"] == "Completed"
    assert log("by-text") == ["['nodes-16/step', 'step']"]
    assert log("by-folder") == ["['step']"]
    assert keys("runs/") == ["runs/nodes-1/step", "runs/nodes-16/step"]


def test_markers_lie_beside_what_is_uploaded(port):
    """In the folders of checkpoints and of TensorBoard; they are never uploaded themselves."""
    code = """
        import pathlib, time
        folders = [pathlib.Path("checkpoints/step"), pathlib.Path("output/tensorboard")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
            (folder / "file").write_text("1")
        while not all((folder / "file.sagemaker-uploaded").exists() for folder in folders):
            time.sleep(0.1)
        print(*(sorted(path.name for path in folder.iterdir()) for folder in folders))
        (folders[0] / "file").write_text("22")
    """
    run(
        "marked",
        code,
        CheckpointConfig={"S3Uri": f"s3://{BUCKET}/marked"},
        TensorBoardOutputConfig={"S3OutputPath": f"s3://{BUCKET}/marked-board"},
    )
    assert finish("marked")["TrainingJobStatus"] == "Completed"
    (line,) = log("marked")
    assert line == " ".join(["['file', 'file.sagemaker-uploaded']"] * 2)
    assert keys("marked") == ["marked-board/marked/tensorboard-output/file", "marked/step/file"]
    assert get("marked/step/file") == b"22"


def test_a_marker_tells_that_an_upload_runs(tmp_path):
    """Also what a script may find that rotates its checkpoints meanwhile: the marker stays."""
    seen = []

    def upload_file(path, bucket, key):
        seen.append((key, sorted(p.name for p in tmp_path.rglob("*.sagemaker-*"))))
        (tmp_path / "checkpoint-1/weights").unlink()
        raise FileNotFoundError(path)

    job = SimpleNamespace(s3=SimpleNamespace(upload_file=upload_file))
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/weights").touch()
    folder = MarkedFolder(job, "s3://bucket/prefix", tmp_path)
    assert not folder.sync()
    assert seen == [("prefix/checkpoint-1/weights", ["weights.sagemaker-uploading"])]
    assert list(folder.files()) == []
    assert (tmp_path / "checkpoint-1/weights.sagemaker-uploading").exists()


@pytest.mark.long
def test_spot_weather(port):
    """The instance is taken away once a new checkpoint has reached S3, and comes back."""
    weather = free_port()
    code = """
        import pathlib, time
        folder = pathlib.Path("checkpoints")
        steps = len(list(folder.iterdir()))
        print("found", steps)
        for step in range(steps, 2 * steps + 1):
            (folder / str(step)).write_text("saved")
        time.sleep(600 if steps < 3 else 0)
    """
    before = os.environ["AWS_ENDPOINT_URL"]
    try:
        aws.start(weather, grace_seconds=5, spot_interruptions=2)
        aws.connect(f"http://127.0.0.1:{weather}")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        spot = {
            "EnableManagedSpotTraining": True,
            "StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 60},
        }
        run("weather", code, CheckpointConfig={"S3Uri": f"s3://{BUCKET}/ckpt"}, **spot)
        run("unsaved", "import time; time.sleep(8); print('spared')", **spot)
        answer = finish("weather")
        assert answer["TrainingJobStatus"] == "Completed"
        assert log("weather") == ["found 0", "found 1", "found 3"]
        states = [step["Status"] for step in answer["SecondaryStatusTransitions"]]
        assert states.count("Interrupted") == 2
        assert finish("unsaved")["TrainingJobStatus"] == "Completed"
        assert log("unsaved") == ["spared"]
    finally:
        aws.connect(before)
        aws.stop(weather)


ROTATION = """
    import pathlib, sys, threading, time
    sys.path.insert(0, {scripts!r})
    import train
    # A marker that a sync wrote while the script deleted the folder: S3 never gets it.
    remains = pathlib.Path("/opt/ml/checkpoints/checkpoint-1")
    resumed = any(remains.parent.glob("checkpoint-*"))
    remains.mkdir(parents=True, exist_ok=True)
    (remains / "optimizer.pt.sagemaker-uploaded").touch()
    def step_by_step(self, *args, **kwargs):  # so that a sync comes between two checkpoints
        time.sleep(0.3)
        while not resumed and self.state.global_step == 12:  # until its instance is taken
            time.sleep(0.1)
        return training_step(self, *args, **kwargs)
    training_step = train.ClipTrainer.training_step
    train.ClipTrainer.training_step = step_by_step
    train.main({flags})
    print("left", *sorted(path.name for path in remains.parent.glob("checkpoint-*")))
"""


@pytest.mark.long
def test_a_resumed_run_survives_it_all(port, clips_folder, native_checkpoint):
    """train.py rotates its checkpoints, among markers and remains; its instance is taken."""
    flags = ["--dataset", str(clips_folder), "--model_name", str(native_checkpoint)]
    flags += ["--epochs", "5", "--train_batch_size", "4", "--dataloader_num_workers", "1"]
    flags += ["--save_total_limit", "1", "--checkpoint_dir", "/opt/ml/checkpoints"]
    flags += ["--model_dir", "/opt/ml/model", "--output_data_dir", "/opt/ml/output/data"]
    flags += ["--resume_from_checkpoint", "auto"]
    code = textwrap.dedent(ROTATION.format(scripts=str(ROOT / "scripts"), flags=flags))
    entry = ["/bin/bash", "-c", 'python3 -u -c "$1" || exit 1', "bash", code]  # deaf to SIGTERM
    run(
        "rotating",
        "",
        EnableManagedSpotTraining=True,
        AlgorithmSpecification={
            "TrainingImage": "none",
            "TrainingInputMode": "File",
            "ContainerEntrypoint": entry,
        },
        CheckpointConfig={"S3Uri": f"s3://{BUCKET}/rotating/"},
        StoppingCondition={"MaxRuntimeInSeconds": 300, "MaxWaitTimeInSeconds": 300},
    )

    def saved():
        return {key.split("/")[1] for key in keys("rotating/")}

    wait_until(lambda: saved() & {"checkpoint-8", "checkpoint-12"}, 240)  # torch starts slowly
    aws.interrupt("rotating", port)
    answer = finish("rotating")
    assert answer["TrainingJobStatus"] == "Completed", log("rotating")
    assert any("going on from" in line for line in log("rotating"))
    left = log("rotating")[-1].split()
    assert left[0] == "left" and "checkpoint-1" not in left
    assert saved() == set(left[1:]) and "checkpoint-20" in left and len(left) <= 3
    assert not [key for key in keys("rotating/") if "sagemaker-" in key]
    files = {key.split("/")[2] for key in keys("rotating/checkpoint-20/")}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "plan.json"} <= files


def test_all_hosts_save(port):
    """Checkpoints of every host reach S3, and come back to every host; TensorBoard's only go."""
    code = """
        import json, pathlib, time
        host = json.load(open("input/config/resourceconfig.json"))["current_host"]
        folder = pathlib.Path("checkpoints")
        print("found", *sorted(path.name for path in folder.iterdir()))
        for there in (folder, pathlib.Path("output/tensorboard")):
            print("empty" if not list(there.iterdir()) else "full")
            (there / host).write_text(host)
    """
    put("hosts/old", b"1")
    run(
        "savers",
        code,
        CheckpointConfig={"S3Uri": f"s3://{BUCKET}/hosts"},
        TensorBoardOutputConfig={"S3OutputPath": f"s3://{BUCKET}/board/"},
        ResourceConfig={"InstanceType": "ml.m5.large", "InstanceCount": 2, "VolumeSizeInGB": 1},
    )
    assert finish("savers")["TrainingJobStatus"] == "Completed"
    assert log("savers", 1) == log("savers", 2) == ["found old", "full", "empty"]
    assert keys("hosts/") == ["hosts/127.0.0.1", "hosts/127.0.0.2", "hosts/old"]
    assert keys("board/") == [
        "board/savers/tensorboard-output/127.0.0.1",
        "board/savers/tensorboard-output/127.0.0.2",
    ]


def test_a_checkpoint_that_is_rotated_away_while_it_is_listed_is_passed_over(tmp_path, monkeypatch):
    """It has failed a job once, in the second between a listing and a look into the folder."""
    for name in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    scandir = os.scandir

    def gone(path="."):
        if str(path).endswith("checkpoint-1"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", gone)
    folder = SyncedFolder(None, "s3://bucket/prefix", tmp_path)
    assert [path.parent.name for path, _ in folder.files()] == ["checkpoint-2"]
