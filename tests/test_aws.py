"""The embedded AWS: jobs really run, end and fail as they do on SageMaker."""

import io
import os
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import urllib.error
import urllib.request
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError
from local_mode import aws

BUCKET, ROLE = "test-bucket", "arn:aws:iam::123456789012:role/test"
FINAL = ("Completed", "Failed", "Stopped")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forget_sdk_clients():
    """The SDK keeps its first clients, with their endpoint, for as long as the process lives."""
    from sagemaker.core.utils import utils

    for meta in (utils.SingletonMeta, utils._ClientCacheMeta):
        meta._instances.clear()
    utils._ClientCacheMeta._default = None


@pytest.fixture(scope="module")
def port():
    """An embedded AWS of this module's own, with five seconds of grace; connected to."""
    before, port = dict(os.environ), free_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    try:
        aws.start(port, grace_seconds=5)
        aws.connect(f"http://127.0.0.1:{port}")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        put("clips/train/raise/1.mp4", b"one")
        put("clips/train/raise/2.mp4", b"two")
        put("clips/training_notes.txt", b"not in the folder, but of the prefix")
        forget_sdk_clients()
        yield port
    finally:
        aws.stop(port)
        os.environ.clear()
        os.environ.update(before)
        forget_sdk_clients()


def put(key, body):
    boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=body)


def get(key):
    return boto3.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read()


def keys(prefix):
    listing = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return [item["Key"] for item in listing.get("Contents", [])]


def run(name, code, **request):
    """Create a training job that is one Python text: the request without the SDK."""
    request = {
        "TrainingJobName": name,
        "RoleArn": ROLE,
        "AlgorithmSpecification": {
            "TrainingImage": "none",
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["python3", "-u", "-c", textwrap.dedent(code)],
            "MetricDefinitions": [{"Name": "loss", "Regex": r"loss=(\S+)"}],
        },
        "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/out"},
        "ResourceConfig": {
            "InstanceType": "ml.m5.large",
            "InstanceCount": 1,
            "VolumeSizeInGB": 1,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
    } | request
    boto3.client("sagemaker").create_training_job(**request)


def channel(uri, name="train", **source):
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, **source}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not (result := condition()):
        assert time.monotonic() < deadline, "nothing happened for 60 seconds"
        time.sleep(0.1)
    return result


def describe(name):
    return boto3.client("sagemaker").describe_training_job(TrainingJobName=name)


def finish(name):
    wait_until(lambda: describe(name)["TrainingJobStatus"] in FINAL)
    return describe(name)


def log(name, host=1):
    logs, streams = boto3.client("logs"), {"logGroupName": aws.LOG_GROUP}
    try:
        found = logs.describe_log_streams(**streams, logStreamNamePrefix=f"{name}/algo-{host}-")
        (stream,) = (stream["logStreamName"] for stream in found["logStreams"])
    except (ClientError, ValueError):  # not there yet
        return []
    events = logs.get_log_events(**streams, logStreamName=stream, startFromHead=True)["events"]
    return [event["message"] for event in events]


def artefact(name, what="model"):
    """The names and contents in a job's archive."""
    with tarfile.open(fileobj=io.BytesIO(get(f"out/{name}/output/{what}.tar.gz"))) as tar:
        return {m.name: tar.extractfile(m).read().decode() for m in tar if m.isfile()}


# The server ---------------------------------------------------------------------------------------
def test_none_is_aws_itself(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert aws.connect(None) is None
    assert "AWS_ENDPOINT_URL" not in os.environ


@pytest.mark.parametrize("url", ["https://127.0.0.1:5599", "http://10.0.0.1:5599", "example.com"])
def test_only_loopback(url):
    with pytest.raises(ValueError, match="loopback"):
        aws.connect(url)


def test_start_is_idempotent(port):
    pid = aws.status(port)["pid"]
    assert aws.start(port) == f"http://127.0.0.1:{port}"
    assert aws.status(port)["pid"] == pid


def test_connect_leads_nowhere_else(port, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://10.0.0.1")
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("HTTP_PROXY", "http://10.0.0.1:1")
    aws.connect(f"http://127.0.0.1:{port}")
    assert BUCKET in [b["Name"] for b in boto3.Session().client("s3").list_buckets()["Buckets"]]


def test_port_of_another_program():
    other = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=other.serve_forever).start()
    try:
        with pytest.raises(RuntimeError, match=f"Port {other.server_port}.*another port"):
            aws.start(other.server_port)
    finally:
        other.shutdown()
        other.server_close()


def test_temporary_folder_with_a_space(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(aws.tempfile, "tempdir", str(tmp_path / "a b"))
    with pytest.raises(RuntimeError, match="TMPDIR"):
        aws.start(free_port())


def test_closed_to_web_pages(port):
    for header in ({"Origin": "http://example.com"}, {"Host": f"example.com:{port}"}):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/moto-api/", headers=header)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)


def test_stop_ends_the_jobs_and_clears_up(port):
    """The command line, a server that outlives the process that started it, and its stop."""
    other = free_port()

    def cli(action):
        command = [sys.executable, aws.__file__, action, "--port", str(other)]
        return subprocess.run(command, capture_output=True, text=True)

    assert cli("status").returncode == 1
    try:
        assert cli("start").stdout.strip().endswith(f"http://127.0.0.1:{other}")
        assert cli("status").returncode == 0
        folder = Path(aws.status(other)["folder"])
        assert folder.stat().st_mode & 0o777 == 0o700
        endpoint = {"endpoint_url": f"http://127.0.0.1:{other}"}
        pid_file = folder / "jobs/sleeper/127.0.0.1/pid"
        code = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid()))"
        boto3.client("s3", **endpoint).create_bucket(Bucket=BUCKET)
        boto3.client("sagemaker", **endpoint).create_training_job(
            TrainingJobName="sleeper",
            RoleArn=ROLE,
            AlgorithmSpecification={
                "TrainingImage": "none",
                "TrainingInputMode": "File",
                "ContainerEntrypoint": ["bash", "-c", f'python3 -c "{code}; time.sleep(600)"'],
            },
            OutputDataConfig={"S3OutputPath": f"s3://{BUCKET}/out"},
            ResourceConfig={"InstanceType": "m", "InstanceCount": 1, "VolumeSizeInGB": 1},
            StoppingCondition={"MaxRuntimeInSeconds": 600},
        )
        pid = int(wait_until(lambda: pid_file.exists() and pid_file.read_text()))
    finally:
        stopped = cli("stop")
    assert stopped.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert aws.status(other) is None and not folder.exists()
    assert cli("stop").returncode == 0  # nothing to stop is no error


def test_quotas_by_name(port):
    client = boto3.client("service-quotas")
    pages = client.get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
    found = {quota["QuotaName"]: quota for page in pages for quota in page["Quotas"]}
    for use in ("training job usage", "spot training job usage", "training warm pool usage"):
        quota = found[f"ml.g4dn.xlarge for {use}"]
        one = client.get_service_quota(ServiceCode="sagemaker", QuotaCode=quota["QuotaCode"])
        assert one["Quota"] == quota and quota["Adjustable"]


# Jobs, by the SDK and its driver scripts ----------------------------------------------------------
SCRIPT = """
    import argparse, os, pathlib, signal, sys, time
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--checkpoint_dir")
    args = parser.parse_args()
    model = pathlib.Path(os.environ["SM_MODEL_DIR"])

    def leave(*_):
        time.sleep(1)  # saving takes a while
        (model / "marker").write_text("saved after SIGTERM")
        print("saved after SIGTERM")
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    print("started", args.mode, args.rate, args.checkpoint_dir)
    if args.mode == "fail":
        failure = pathlib.Path(os.environ["SM_OUTPUT_DIR"], "failure")
        failure.write_text("ValueError: cannot decode clip x.mp4")
        sys.exit(3)
    if args.mode == "wait":
        time.sleep(600)
    train = pathlib.Path(os.environ["SM_CHANNEL_TRAIN"])
    names = sorted(str(p.relative_to(train)) for p in train.rglob("*.*"))
    (model / "files").write_text(",".join(names))
    (model / "greeting").write_text(os.environ["GREETING"])
    pathlib.Path(os.environ["SM_OUTPUT_DATA_DIR"], "curve").write_text("1 2 3")
"""


@pytest.fixture(scope="module")
def trainer(port, tmp_path_factory):
    """trainer(mode): the SDK's ModelTrainer for SCRIPT."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training.configs import Compute, OutputDataConfig, SourceCode, Tag
    from sagemaker.train import ModelTrainer

    source = tmp_path_factory.mktemp("source")
    (source / "train.py").write_text(textwrap.dedent(SCRIPT))
    (source / "requirements.txt").write_text("boto3\n")

    def make(mode, requirements=None, **parameters):
        return ModelTrainer(
            sagemaker_session=Session(boto_session=boto3.Session(), default_bucket=BUCKET),
            role=ROLE,
            training_image="image:1",
            base_job_name=f"sdk-{mode}",
            source_code=SourceCode(
                source_dir=str(source), entry_script="train.py", requirements=requirements
            ),
            compute=Compute(instance_type="ml.m5.large", instance_count=1, volume_size_in_gb=30),
            hyperparameters={"mode": mode, **parameters},
            environment={"GREETING": "hello you", "PIP_NO_INDEX": "1"},
            output_data_config=OutputDataConfig(s3_output_path=f"s3://{BUCKET}/out"),
            tags=[Tag(key="project", value="clips")],
        )

    return make


def clips():
    from sagemaker.core.training.configs import InputData

    uri = f"s3://{BUCKET}/clips/train"
    return {"input_data_config": [InputData(channel_name="train", data_source=uri)]}


def test_a_passing_job(trainer, caplog):
    caplog.set_level("INFO", "sagemaker")
    model_trainer = trainer("pass", "requirements.txt", rate=0.5, checkpoint_dir="/opt/ml/here")
    model_trainer.train(**clips(), wait=True, logs=True)
    job = model_trainer._latest_training_job
    name = job.training_job_name
    assert job.training_job_status == "Completed"
    assert job.model_artifacts.s3_model_artifacts == (
        f"s3://{BUCKET}/out/{name}/output/model.tar.gz"
    )
    assert artefact(name) == {
        # The prefix is text: what lies beside the folder comes too, under its own name.
        "files": "raise/1.mp4,raise/2.mp4,training_notes.txt",
        "greeting": "hello you",
    }
    assert artefact(name, "output") == {"curve": "1 2 3"}
    (started,) = (line for line in log(name) if line.startswith("started"))
    assert started.startswith("started pass 0.5 ") and started.endswith("127.0.0.1/here")
    assert any("Requirement already satisfied: boto3" in line for line in log(name))
    assert log(name)[-1] == "Training Container Execution Completed"
    assert started in caplog.text  # what wait(logs=True) shows
    answer = describe(name)
    assert [step["Status"] for step in answer["SecondaryStatusTransitions"]] == [
        *("Starting", "Downloading", "Training", "Uploading", "Completed")
    ]
    assert answer["BillableTimeInSeconds"] == answer["TrainingTimeInSeconds"] > 0
    assert answer["Environment"]["GREETING"] == "hello you"
    assert answer["HyperParameters"]["checkpoint_dir"] == "/opt/ml/here"
    tags = boto3.client("sagemaker").list_tags(ResourceArn=answer["TrainingJobArn"])["Tags"]
    assert tags == [{"Key": "project", "Value": "clips"}]


def test_a_failing_job(trainer):
    from sagemaker.core.utils.exceptions import FailedStatusError

    model_trainer = trainer("fail")
    model_trainer.train(**clips(), wait=False)
    job = model_trainer._latest_training_job
    with pytest.raises(FailedStatusError, match="cannot decode clip x.mp4"):
        job.wait(poll=1)
    reason = "AlgorithmError: ValueError: cannot decode clip x.mp4, exit code: 3"
    assert describe(job.training_job_name)["FailureReason"] == reason
    assert not keys(f"out/{job.training_job_name}/output/model")


def test_a_stopped_job_saves(trainer):
    """The signal must reach the script, below a shell and a driver that stay until it is done."""
    model_trainer = trainer("wait")
    model_trainer.train(**clips(), wait=False)
    job = model_trainer._latest_training_job
    name = job.training_job_name
    wait_until(lambda: any(line.startswith("started") for line in log(name)))
    job.stop()
    assert describe(name)["TrainingJobStatus"] in ("Stopping", "Stopped")
    answer = finish(name)
    assert (answer["TrainingJobStatus"], answer["SecondaryStatus"]) == ("Stopped", "Stopped")
    assert artefact(name) == {"marker": "saved after SIGTERM"}
    assert "saved after SIGTERM" in log(name)
    with pytest.raises(ClientError, match="in status Stopped"):
        boto3.client("sagemaker").stop_training_job(TrainingJobName=name)


def test_two_hosts(port, tmp_path):
    """A real torchrun over two hosts, as the SDK's driver starts it."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training.configs import Compute, OutputDataConfig, SourceCode
    from sagemaker.train import ModelTrainer
    from sagemaker.train.distributed import Torchrun

    (tmp_path / "train.py").write_text(
        textwrap.dedent("""
        import os, pathlib, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor(10.0 ** dist.get_rank())
        dist.all_reduce(total)
        host = os.environ["SM_CURRENT_HOST"]
        print("sum", total.item(), "of", dist.get_world_size(), "on", host)
        pathlib.Path(os.environ["SM_MODEL_DIR"], "host").write_text(host)
        dist.destroy_process_group()
        """)
    )
    model_trainer = ModelTrainer(
        sagemaker_session=Session(boto_session=boto3.Session(), default_bucket=BUCKET),
        role=ROLE,
        training_image="image:1",
        base_job_name="two",
        source_code=SourceCode(source_dir=str(tmp_path), entry_script="train.py"),
        compute=Compute(instance_type="ml.m5.large", instance_count=2, volume_size_in_gb=30),
        distributed=Torchrun(),
        output_data_config=OutputDataConfig(s3_output_path=f"s3://{BUCKET}/out"),
    )
    model_trainer.train(wait=False)
    name = model_trainer._latest_training_job.training_job_name
    answer = finish(name)
    assert answer["TrainingJobStatus"] == "Completed", log(name)
    assert "sum 11.0 of 2 on 127.0.0.1" in log(name, 1)
    assert "sum 11.0 of 2 on 127.0.0.2" in log(name, 2)
    assert artefact(name) == {"host": "127.0.0.1"}


# Jobs, by the bare request ------------------------------------------------------------------------
def test_no_objects_under_the_prefix(port):
    for uri in (f"s3://{BUCKET}/nothing", "s3://no-such-bucket/clips"):
        with pytest.raises(ClientError, match=f'No S3 objects found under S3 URL "{uri}"'):
            run("empty", "", InputDataConfig=[channel(uri)])


def test_names_are_unique_until_deleted(port):
    client = boto3.client("sagemaker")
    run("twice", "")
    with pytest.raises(ClientError, match="ResourceInUse"):
        run("twice", "")
    finish("twice")
    client.delete_training_job(TrainingJobName="twice")
    with pytest.raises(ClientError, match="Could not find training job"):
        describe("twice")


def test_logs_metrics_and_exit_code(port):
    code = r"""
        import sys
        print("loss=0.9")
        sys.stdout.write("10%\r50%\r100%\n")
        print()
        print("x" * 300_000)
        print("loss=0.25")
        print("loss=unknown")
        sys.stdout.write("no newline at the end")
        sys.exit(7)
    """
    run("talker", code)
    answer = finish("talker")
    assert answer["FailureReason"] == "AlgorithmError: , exit code: 7"
    assert [(m["MetricName"], m["Value"]) for m in answer["FinalMetricDataList"]] == [
        ("loss", pytest.approx(0.25))
    ]
    lines = log("talker")
    assert lines[:3] == ["loss=0.9", "100%", " "]
    assert max(map(len, lines)) <= 256 * 1024
    assert sum(line.count("x") for line in lines) == 300_000
    assert lines[-1] == "no newline at the end"


def test_a_long_failure_is_cut(port):
    code = "open('output/failure', 'w').write('y' * 5000); raise SystemExit(1)"
    run("wordy", code)
    reason = finish("wordy")["FailureReason"]
    assert len(reason) == 1024 and reason.endswith("yyy, exit code: 1")


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


def test_too_long_and_deaf(port):
    """MaxRuntime; a script that ignores SIGTERM is killed, and what it left still uploaded."""
    code = """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open("model/half", "w").write("done")
        print("deaf")
        time.sleep(600)
    """
    run("late", code, StoppingCondition={"MaxRuntimeInSeconds": 1})
    answer = finish("late")
    assert answer["TrainingJobStatus"] == "Stopped"
    assert answer["SecondaryStatus"] == "MaxRuntimeExceeded"
    assert artefact("late") == {"half": "done"}


def test_a_broken_job_leaves_no_process(port):
    """Checkpoints that cannot be uploaded fail the job, and end its script."""
    code = """
        import pathlib, time
        pathlib.Path("checkpoints/step").write_text("1")
        time.sleep(600)
    """
    run("broken", code, CheckpointConfig={"S3Uri": "s3://no-such-bucket/ckpt"})
    assert "InternalServerError" in finish("broken")["FailureReason"]
    folder = f"{aws.status(port)['folder']}/jobs/broken/127.0.0.1"
    wait_until(lambda: folder not in [p.info["cwd"] for p in psutil.process_iter(["cwd"])])


def test_checkpoints_and_a_spot_interruption(port):
    """What is in S3 is there before the script, what it writes follows; a restart goes on."""
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
        CheckpointConfig={"S3Uri": f"s3://{BUCKET}/ckpt", "LocalPath": "/opt/ml/checkpoints"},
        Environment={"CHECKPOINTS": "/opt/ml/checkpoints"},
        StoppingCondition={"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 120},
    )
    wait_until(lambda: keys("ckpt/second"))  # while the job runs
    assert describe("spot")["TrainingJobStatus"] == "InProgress"
    aws.interrupt("spot", port)
    answer = finish("spot")
    assert answer["TrainingJobStatus"] == "Completed"
    assert log("spot") == ["found [1]", "found [1, 3]"]  # deletions do not reach S3
    assert get("ckpt/last") == b"written at the very end"
    states = [step["Status"] for step in answer["SecondaryStatusTransitions"]]
    assert states == [
        *("Starting", "Downloading", "Training", "Interrupted"),
        *("Starting", "Downloading", "Training", "Uploading", "Completed"),
    ]
    assert answer["BillableTimeInSeconds"] < answer["TrainingTimeInSeconds"]
    with pytest.raises(ValueError, match="not a running spot job"):
        aws.interrupt("spot", port)
