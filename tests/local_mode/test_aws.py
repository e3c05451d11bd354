"""The embedded AWS: jobs really run, end and fail as they do on SageMaker."""

import io
import os
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import urllib.error
import urllib.request
from datetime import timedelta
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import boto3
import numpy as np
import prepare_clips
import psutil
import pytest
from botocore.exceptions import ClientError
from conftest import ROOT
from embedded import free_port, own_aws
from local_mode import aws
from videos import every_frame, numbered, write_video

BUCKET, ROLE = "test-bucket", "arn:aws:iam::123456789012:role/test"
FINAL = ("Completed", "Failed", "Stopped")


@pytest.fixture(scope="module")
def port():
    """An embedded AWS of this module's own, with five seconds of grace; connected to."""
    with own_aws(grace_seconds=5, spot_interruptions=0) as port:
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        put("clips/train/raise/1.mp4", b"one")
        put("clips/train/raise/2.mp4", b"two")
        put("clips/training_notes.txt", b"not in the folder, but of the prefix")
        yield port


def put(key, body):
    boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=body)


def get(key):
    return boto3.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read()


def keys(prefix):
    listing = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return [item["Key"] for item in listing.get("Contents", [])]


def run(name, code, more_metrics=(), **request):
    """Create a training job that is one Python text: the request without the SDK."""
    request = {
        "TrainingJobName": name,
        "RoleArn": ROLE,
        "AlgorithmSpecification": {
            "TrainingImage": "none",
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["python3", "-u", "-c", textwrap.dedent(code)],
            "MetricDefinitions": [{"Name": "loss", "Regex": r"loss=(\S+)"}, *more_metrics],
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


def log(name, host=1, kind="Training"):
    logs, streams = boto3.client("logs"), {"logGroupName": f"/aws/sagemaker/{kind}Jobs"}
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


@pytest.mark.long
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


def test_metrics_in_the_log_reach_cloudwatch_under_the_job_s_name(port):
    code = "print(*[f'loss={x}' for x in [0.5, 2, 'nan', 0.75]], *range(2000), sep='\\n')"
    many = {"Name": "count", "Regex": r"^(\d+)$"}
    for name in ("measured", "measured-too"):
        run(name, code, more_metrics=[many])
    answers = {name: finish(name) for name in ("measured", "measured-too")}
    start, end = answers["measured"]["CreationTime"], answers["measured"]["TrainingEndTime"]
    mine = [{"Name": "TrainingJobName", "Value": "measured"}]
    found = {}
    for name, stat in [
        ("loss", "Minimum"),
        ("loss", "Maximum"),
        ("loss", "SampleCount"),
        ("count", "SampleCount"),
    ]:
        metric = {"Namespace": "/aws/sagemaker/TrainingJobs", "MetricName": name}
        stated = {"Metric": metric | {"Dimensions": mine}, "Period": 3600, "Stat": stat}
        answer = boto3.client("cloudwatch").get_metric_data(
            MetricDataQueries=[{"Id": "m", "MetricStat": stated}],
            StartTime=start - timedelta(seconds=1),
            EndTime=end + timedelta(seconds=1),
        )
        (found[name, stat],) = answer["MetricDataResults"][0]["Values"]
    assert list(found.values()) == [0.5, 2, 3, 2000]


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


def test_no_longer_waited_for_than_asked(port):
    run(
        "waited",
        "import time; time.sleep(600)",
        EnableManagedSpotTraining=True,
        StoppingCondition={"MaxRuntimeInSeconds": 3, "MaxWaitTimeInSeconds": 3},
    )
    answer = finish("waited")
    assert answer["TrainingJobStatus"] == "Stopped"
    assert answer["SecondaryStatus"] == "MaxWaitTimeExceeded"
    with pytest.raises(ClientError, match="Invalid MaxWaitTimeInSeconds"):
        run("impatient", "", EnableManagedSpotTraining=True)


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


def test_out_of_memory(port):
    """The kernel's SIGKILL, as a shell tells of it."""
    run("big", "import os; os.kill(os.getpid(), 9)")
    assert finish("big")["FailureReason"] == "AlgorithmError: , exit code: 137"


def instances(kind, count, **more):
    return {"ResourceConfig": {"InstanceType": kind, "InstanceCount": count, **more}}


def test_quotas_bite(port):
    spot = {
        "EnableManagedSpotTraining": True,
        "StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 60},
    }
    with pytest.raises(ClientError) as caught:
        run("none", "", **instances("ml.g5.xlarge", 1, VolumeSizeInGB=1))
    assert caught.value.response["Error"]["Code"] == "ResourceLimitExceeded"
    assert (
        "The account-level service limit 'ml.g5.xlarge for training job usage' is 0 Instances, with"
        " current utilization of 0 Instances and a request delta of 1 Instances. Please use AWS "
        "Service Quotas to request an increase for this quota."
    ) in str(caught.value)
    with pytest.raises(ClientError, match="for spot training job usage' is 2 .* delta of 3 "):
        run("three", "", **instances("ml.g4dn.xlarge", 3, VolumeSizeInGB=1), **spot)
    warm = instances("ml.g4dn.xlarge", 1, VolumeSizeInGB=1, KeepAlivePeriodInSeconds=600)
    with pytest.raises(ClientError, match="for training warm pool usage' is 0 "):
        run("warm", "", **warm)
    two = instances("ml.g4dn.xlarge", 2, VolumeSizeInGB=1)
    run("first", "import time; time.sleep(600)", **two)
    with pytest.raises(ClientError, match="utilization of 2 Instances and a request delta of 2 "):
        run("second", "", **two)
    run("other-quota", "", **two, **spot)
    boto3.client("sagemaker").stop_training_job(TrainingJobName="first")
    finish("first")
    run("second", "", **two)
    assert finish("second")["TrainingJobStatus"] == "Completed"
    finish("other-quota")


def test_a_quota_is_requested_once(port):
    client = boto3.client("service-quotas")
    quota = next(
        quota
        for quota in client.list_service_quotas(ServiceCode="sagemaker")["Quotas"]
        if quota["QuotaName"] == "ml.g5.xlarge for training job usage"
    )
    which = {"ServiceCode": "sagemaker", "QuotaCode": quota["QuotaCode"]}
    history = client.list_requested_service_quota_change_history_by_quota
    assert history(**which)["RequestedQuotas"] == []
    with pytest.raises(client.exceptions.IllegalArgumentException, match="greater than"):
        client.request_service_quota_increase(**which, DesiredValue=0)
    requested = client.request_service_quota_increase(**which, DesiredValue=1)["RequestedQuota"]
    assert (requested["Status"], requested["DesiredValue"]) == ("PENDING", 1)
    assert requested["Created"].year > 2000
    with pytest.raises(client.exceptions.ResourceAlreadyExistsException, match="Only one open"):
        client.request_service_quota_increase(**which, DesiredValue=2)
    assert history(**which)["RequestedQuotas"] == [requested]


# Processing jobs ----------------------------------------------------------------------------------
def process(name, code, count=1, inputs=(), outputs=(), **request):
    """Create a processing job that is one Python text: the request without the SDK."""
    request = {
        "ProcessingJobName": name,
        "RoleArn": ROLE,
        "AppSpecification": {
            "ImageUri": "none",
            "ContainerEntrypoint": ["python3", "-u", "-c", textwrap.dedent(code)],
        },
        "ProcessingResources": {
            "ClusterConfig": {
                "InstanceType": "ml.m5.large",
                "InstanceCount": count,
                "VolumeSizeInGB": 1,
            }
        },
        "ProcessingInputs": [{"InputName": str(i), "S3Input": x} for i, x in enumerate(inputs)],
        "ProcessingOutputConfig": {
            "Outputs": [{"OutputName": str(i), "S3Output": x} for i, x in enumerate(outputs)]
        },
    } | request
    boto3.client("sagemaker").create_processing_job(**request)


def into(uri, path, **more):
    return {"S3Uri": uri, "LocalPath": path, "S3DataType": "S3Prefix", "S3InputMode": "File"} | more


def out_of(path, uri, mode="EndOfJob"):
    return {"S3Uri": uri, "LocalPath": path, "S3UploadMode": mode}


def describe_processing(name):
    return boto3.client("sagemaker").describe_processing_job(ProcessingJobName=name)


def finish_processing(name):
    wait_until(lambda: describe_processing(name)["ProcessingJobStatus"] in FINAL)
    return describe_processing(name)


def test_a_processing_job(port):
    """Inputs whole and in shares, environment, both outputs, logs, last words."""
    code = """
        import json, os, pathlib, sys
        config = json.load(open("config/resourceconfig.json"))
        job = json.load(open("config/processingjobconfig.json"))
        whole, share = (pathlib.Path("processing", name) for name in ("whole", "share"))
        names = [sorted(p.name for p in folder.rglob("*.*")) for folder in (whole, share)]
        print(config["current_host"], config["hosts"], *names, os.environ["WHERE"])
        out = pathlib.Path(os.environ["WHERE"])
        (out / config["current_host"]).write_text(job["ProcessingJobName"])
        pathlib.Path("output/message").write_text("all is well ")
    """
    clips, out = f"s3://{BUCKET}/clips/train/", f"s3://{BUCKET}/processed"
    process(
        "processor",
        code,
        2,
        inputs=[
            into(clips, "/opt/ml/processing/whole"),
            into(clips, "/opt/ml/processing/share", S3DataDistributionType="ShardedByS3Key"),
        ],
        outputs=[
            out_of("/opt/ml/processing/out", f"{out}/end"),
            out_of("/opt/ml/processing/out", f"{out}/continuous/", "Continuous"),
        ],
        Environment={"WHERE": "/opt/ml/processing/out"},
    )
    answer = finish_processing("processor")
    assert answer["ProcessingJobStatus"] == "Completed", answer
    assert answer["ExitMessage"] == "all is well all is well "
    assert answer["ProcessingStartTime"] <= answer["ProcessingEndTime"]
    both = "['1.mp4', '2.mp4']"
    for number, share in ((1, "['1.mp4']"), (2, "['2.mp4']")):
        (line,) = log("processor", number, "Processing")
        assert line.startswith(f"127.0.0.{number} ['127.0.0.1', '127.0.0.2'] {both} {share} /")
    assert keys("processed/") == [
        *("processed/continuous/127.0.0.1", "processed/continuous/127.0.0.2"),
        *("processed/end/127.0.0.1", "processed/end/127.0.0.2"),
    ]
    assert get("processed/end/127.0.0.2") == b"processor"
    client = boto3.client("sagemaker")
    listed = client.list_processing_jobs(NameContains="processor")["ProcessingJobSummaries"]
    assert [job["ProcessingJobStatus"] for job in listed] == ["Completed"]
    client.delete_processing_job(ProcessingJobName="processor")
    with pytest.raises(ClientError, match="Could not find processing job"):
        describe_processing("processor")


def test_a_failing_processing_job(port):
    """It has a reason and last words, and the other host ends with it; nothing is uploaded."""
    code = """
        import json, pathlib, time
        pathlib.Path("processing/out/half").write_text("done")
        if json.load(open("config/resourceconfig.json"))["current_host"] == "127.0.0.1":
            time.sleep(600)
        pathlib.Path("output/message").write_text("2 bad clips")
        raise SystemExit(1)
    """
    output = out_of("/opt/ml/processing/out", f"s3://{BUCKET}/half")
    process("failing", code, 2, outputs=[output])
    answer = finish_processing("failing")
    assert answer["ProcessingJobStatus"] == "Failed"
    assert answer["FailureReason"] == "AlgorithmError: , exit code: 1"
    assert answer["ExitMessage"] == "2 bad clips"
    assert not keys("half")


def test_processing_jobs_stop(port):
    """By the API, with time to save; and at the limit of their time."""
    code = """
        import pathlib, signal, sys, time
        def leave(*_):
            pathlib.Path("processing/out/marker").write_text("saved")
            sys.exit(0)
        signal.signal(signal.SIGTERM, leave)
        print("started")
        time.sleep(600)
    """
    output = out_of("/opt/ml/processing/out", f"s3://{BUCKET}/stopped")
    process("stopped", code, outputs=[output])
    wait_until(lambda: log("stopped", 1, "Processing"))
    boto3.client("sagemaker").stop_processing_job(ProcessingJobName="stopped")
    assert finish_processing("stopped")["ProcessingJobStatus"] == "Stopped"
    assert get("stopped/marker") == b"saved"
    process("overdue", code, StoppingCondition={"MaxRuntimeInSeconds": 2})
    assert finish_processing("overdue")["ProcessingJobStatus"] == "Stopped"


def test_wrong_processing_requests(port):
    nothing = into(f"s3://{BUCKET}/nothing", "/opt/ml/processing/in")
    with pytest.raises(ClientError, match="No S3 objects found"):
        process("wrong", "", inputs=[nothing])
    with pytest.raises(ClientError, match="LocalPath /opt/ml/out: .* /opt/ml/processing/"):
        process("wrong", "", outputs=[out_of("/opt/ml/out", f"s3://{BUCKET}/out")])
    cluster = {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 3, "VolumeSizeInGB": 1}
    with pytest.raises(ClientError, match="for processing job usage' is 2 Instances"):
        process("wrong", "", ProcessingResources={"ClusterConfig": cluster})


@pytest.mark.long
def test_clips_are_prepared_on_two_instances(port, tmp_path):
    """By the SDK: every clip once, and all together what one machine makes of them."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.processing import FrameworkProcessor
    from sagemaker.core.shapes import (
        ProcessingInput,
        ProcessingOutput,
        ProcessingS3Input,
        ProcessingS3Output,
    )

    names = ["train/wave/1.mp4", "train/wave/1.avi", "train/sit/2.mp4", "val/sit/3.mkv"]
    for place, name in enumerate(names):
        options = {"codec": "mpeg4"} if name.endswith("avi") else {}
        write_video(tmp_path / "clips" / name, numbered(12 + place), **options)
    (tmp_path / "clips/val/sit/bad.mp4").write_bytes(b"no video")
    (tmp_path / "clips/train/metadata.csv").write_text("file_name,label\nwave/1.avi,wave\n")
    flags = ["--on_bad_clip", "skip"]
    prepare_clips.main([str(tmp_path / "clips"), str(tmp_path / "prepared"), *flags])
    for path in (tmp_path / "clips").rglob("*.*"):
        put(f"raw/{path.relative_to(tmp_path / 'clips').as_posix()}", path.read_bytes())

    processor = FrameworkProcessor(
        sagemaker_session=Session(boto_session=boto3.Session(), default_bucket=BUCKET),
        role=ROLE,
        image_uri="image:1",
        base_job_name="prepare",
        command=["python3"],
        instance_type="ml.m5.xlarge",
        instance_count=2,
        max_runtime_in_seconds=300,
        env={"PIP_NO_INDEX": "1"},
    )
    processor.run(
        code="prepare_clips.py",
        source_dir=str(ROOT / "scripts"),
        inputs=[
            ProcessingInput(
                input_name="clips",
                s3_input=ProcessingS3Input(
                    s3_uri=f"s3://{BUCKET}/raw/",
                    s3_data_type="S3Prefix",
                    s3_input_mode="File",
                    s3_data_distribution_type="ShardedByS3Key",
                    local_path="/opt/ml/processing/input/clips",
                ),
            )
        ],
        outputs=[
            ProcessingOutput(
                output_name="prepared",
                s3_output=ProcessingS3Output(
                    s3_uri=f"s3://{BUCKET}/prepared/",
                    s3_upload_mode="EndOfJob",
                    local_path="/opt/ml/processing/output",
                ),
            )
        ],
        arguments=[
            *("/opt/ml/processing/input/clips", "/opt/ml/processing/output"),
            *("--resource_config", "/opt/ml/config/resourceconfig.json", *flags),
        ],
        wait=False,
        logs=False,
    )
    job = processor.latest_job
    job.wait(poll=1)
    name = job.processing_job_name
    logs = [log(name, number, "Processing") for number in (1, 2)]
    assert job.processing_job_status == "Completed", logs
    counts = [line.split()[0] for lines in logs for line in lines if "clips prepared" in line]
    assert len(counts) == 2 and sum(map(int, counts)) == len(names), logs
    made = {key.removeprefix("prepared/"): get(key) for key in keys("prepared/")}
    (report,) = (name for name in made if name.startswith("bad_clips_127.0.0."))
    made["bad_clips.json"] = made.pop(report)
    files = [path for path in (tmp_path / "prepared").rglob("*") if path.is_file()]
    one_machine = {p.relative_to(tmp_path / "prepared").as_posix(): p.read_bytes() for p in files}
    del one_machine["clips_report.json"]  # of several machines, none sees the whole
    assert made.keys() == one_machine.keys()
    for name, data in made.items():
        if not name.endswith(".mp4"):
            assert data == one_machine[name]
            continue
        clips = [tmp_path / "two.mp4", tmp_path / "prepared" / name]
        clips[0].write_bytes(data)
        ours, theirs = (every_frame(clip).astype(int) for clip in clips)
        # x264 does not write the same bits each time: seen in one of some dozens of encodings.
        assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 2, name


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
    folder = aws.SyncedFolder(None, "s3://bucket/prefix", tmp_path)
    assert [path.parent.name for path, _ in folder.files()] == ["checkpoint-2"]
