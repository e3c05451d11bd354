"""What the tests of the embedded AWS share: an account, the bare requests, and ways to wait."""

import io
import tarfile
import textwrap
import time

import boto3
import pytest
from botocore.exceptions import ClientError
from embedded import own_aws

BUCKET, ROLE = "test-bucket", "arn:aws:iam::123456789012:role/test"
FINAL = ("Completed", "Failed", "Stopped")


@pytest.fixture(scope="module", name="port")
def account_port():
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


def wait_until(condition, seconds=60, told=str):
    """Wait for a condition and return it; a failure says what `told()` returns."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"nothing happened for {seconds} s. {told()}"
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
