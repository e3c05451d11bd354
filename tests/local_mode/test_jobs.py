"""Jobs by the bare request: names, logs, metrics, limits of time, what a failure leaves."""

from datetime import timedelta

import boto3
import psutil
import pytest
from account import account_port, artefact, describe, finish, log, run, wait_until  # noqa: F401
from botocore.exceptions import ClientError
from local_mode import aws


def test_names_are_unique_until_deleted(port):
    client = boto3.client("sagemaker")
    run("twice", "")
    with pytest.raises(ClientError, match="ResourceInUse"):
        run("twice", "")
    finish("twice")
    client.delete_training_job(TrainingJobName="twice")
    with pytest.raises(ClientError, match="Requested resource not found"):
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


def test_out_of_memory(port):
    """The kernel's SIGKILL, as a shell tells of it. It comes from outside of the container."""
    run("big", "import time; print('started'); time.sleep(600)")
    wait_until(lambda: log("big"))
    folder = f"{aws.status(port)['folder']}/jobs/big/127.0.0.1"
    inside = [p for p in psutil.process_iter(["cwd", "cmdline"]) if p.info["cwd"] == folder]
    (process,) = (p for p in inside if p.info["cmdline"][0] == "python3")
    process.kill()
    assert finish("big")["FailureReason"] == "AlgorithmError: , exit code: 137"


def test_the_clock_begins_with_the_download(port):
    """What is billed: image and download too. MaxRuntimeInSeconds is of the same time."""
    run("timed", "print('done')")
    answer = finish("timed")
    steps = {step["Status"]: step for step in answer["SecondaryStatusTransitions"]}
    assert answer["CreationTime"] <= answer["TrainingStartTime"]
    start = (answer["TrainingStartTime"] - steps["Downloading"]["StartTime"]).total_seconds()
    assert 0 <= start < 1 and answer["TrainingStartTime"] <= steps["Training"]["StartTime"]
