"""Notebook 6 on folders larger than a page of S3's answers, and what happens if something stays."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from botocore.config import Config
from cells import run_cell, run_cells
from conftest import ROOT
from local_mode import aws
from test_aws import forget_sdk_clients, free_port

BUCKET, FOLDER = "of-the-series", "video-tutorial/1/"
HOME = f"s3://{BUCKET}/{FOLDER}"


@pytest.fixture
def port(monkeypatch):
    """An embedded AWS of one test's own, connected to; the working folder is notebooks/."""
    before, port = dict(os.environ), free_port()
    monkeypatch.chdir(ROOT / "notebooks")
    try:
        aws.connect(f"http://127.0.0.1:{port}")
        forget_sdk_clients()
        yield port
    finally:
        aws.stop(port)
        os.environ.clear()
        os.environ.update(before)
        forget_sdk_clients()


@pytest.fixture
def run_file(port, tmp_path):
    """The run.json of a series that made a bucket and one folder in it."""
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    run = {"region": "us-east-1", "endpoint_url": f"http://127.0.0.1:{port}", "jobs": []}
    run |= {"homes": [HOME], "created": [f"bucket/{BUCKET}"]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path / "run.json"


def clean_up(run_file, stop=None):
    return run_cells("06_clean_up", {"output_dir": run_file.parent, "confirm_delete": True}, stop)


def fill(names, operation="put_object"):
    """Makes an object of each name, 16 at once, or calls another operation of S3 on it."""
    call = getattr(boto3.client("s3", config=Config(max_pool_connections=16)), operation)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: call(Bucket=BUCKET, Key=FOLDER + name), names))


def test_a_folder_of_3000_objects_goes_and_all_else_with_it(run_file, port):
    fill([f"{number:04}" for number in range(3000)])
    clean_up(run_file)
    assert not run_file.exists() and aws.status(port) is None


def test_old_versions_and_delete_markers_go_too(run_file):
    boto3.resource("s3").BucketVersioning(BUCKET).enable()
    names = [f"{number:04}" for number in range(600)]
    for operation in ("put_object", "put_object", "delete_object"):
        fill(names, operation)
    assert clean_up(run_file, stop="disconnect")["left"] == {}
    assert boto3.client("s3").list_buckets()["Buckets"] == []


def test_what_s3_refuses_is_counted_and_stays_on_the_list(run_file, port):
    """More than a page of it, before and after what S3 does delete."""
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject"}
    deny["Resource"] = [f"arn:aws:s3:::{BUCKET}/{FOLDER}{part}*" for part in ("a", "c")]
    policy = json.dumps({"Version": "2012-10-17", "Statement": [deny]})
    boto3.client("s3").put_bucket_policy(Bucket=BUCKET, Policy=policy)
    sizes = {"a": 1100, "b": 1100, "c": 1}
    fill([f"{part}{number:04}" for part, size in sizes.items() for number in range(size)])
    with pytest.raises(RuntimeError) as caught:
        clean_up(run_file)
    assert f"{HOME}: 1101 objects: AccessDenied; bucket/{BUCKET}: some" in str(caught.value)
    stored = [item.key for item in boto3.resource("s3").Bucket(BUCKET).objects.all()]
    assert len(stored) == 1101 and not any(key.startswith(f"{FOLDER}b") for key in stored)
    run = json.loads(run_file.read_text())
    assert run["homes"] == [HOME] and run["created"] == [f"bucket/{BUCKET}"]
    assert aws.status(port)


def test_the_log_of_a_job_goes_whole(port):
    """A page of CloudWatch's answer lists 50 streams."""
    group, logs = "/aws/sagemaker/TrainingJobs", boto3.client("logs")
    logs.create_log_group(logGroupName=group)
    for number in range(120):
        logs.create_log_stream(logGroupName=group, logStreamName=f"video-1/algo-{number}")
    deleted = []
    sagemaker = boto3.client("sagemaker")
    sagemaker.delete_training_job = lambda TrainingJobName: deleted.append(TrainingJobName)
    given = {"logs": logs, "sagemaker": sagemaker, "end_job": lambda kind, name: None}
    run_cell("06_clean_up", "delete-job", **given)["delete_job"]("training-job/video-1")
    assert logs.describe_log_streams(logGroupName=group)["logStreams"] == []
    assert deleted == ["video-1"]


def test_the_embedded_aws_does_not_end_while_its_account_holds_something(run_file, port):
    """Also of what the list does not name, in any Region."""
    region, run = "eu-west-1", json.loads(run_file.read_text())
    run_file.write_text(json.dumps(run | {"homes": [], "created": []}))
    boto3.client("iam").create_role(RoleName="forgotten", AssumeRolePolicyDocument="{}")
    role, image = "arn:aws:iam::123456789012:role/forgotten", {"Image": "my/image:1"}
    sagemaker, logs = boto3.client("sagemaker", region), boto3.client("logs", region)
    sagemaker.create_model(ModelName="m", ExecutionRoleArn=role, PrimaryContainer=image)
    logs.create_log_group(logGroupName="g")
    logs.create_log_stream(logGroupName="g", logStreamName="s")
    with pytest.raises(RuntimeError) as caught:
        clean_up(run_file)
    found = f"(4): bucket/{BUCKET}, role/forgotten, model/m, log stream s"
    assert found in str(caught.value) and run_file.exists() and aws.status(port)
    boto3.client("s3").delete_bucket(Bucket=BUCKET)
    boto3.client("iam").delete_role(RoleName="forgotten")
    sagemaker.delete_model(ModelName="m")
    logs.delete_log_stream(logGroupName="g", logStreamName="s")
    clean_up(run_file)
    assert not run_file.exists() and aws.status(port) is None
