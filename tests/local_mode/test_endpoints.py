"""Endpoints and batch transform: what the embedded AWS serves. The guide: how_to/test_deploy."""

import io
import json
import tarfile

import boto3
import psutil
import pytest
from account import BUCKET, ROLE, account_port, get, keys, put, wait_until  # noqa: F401
from botocore.exceptions import ClientError
from local_mode import aws

INFERENCE = """
import json, os, time
from sagemaker_inference.errors import GenericInferenceToolkitError

def model_fn(model_dir):
    return open(os.path.join(model_dir, "greeting")).read()

def input_fn(body, content_type):
    if body == b"bad":
        raise GenericInferenceToolkitError(400, "not a video")
    if body == b"slow":
        time.sleep(600)
    return body.decode("latin-1")

def predict_fn(data, model):
    print("asked for", len(data), "bytes")
    return {"greeting": model, "to": data}

def output_fn(prediction, accept):
    return json.dumps(prediction), "application/json"
"""


def archive(files):
    """A model.tar.gz with these texts."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return packed.getvalue()


def create_model(name, url):
    container = {"Image": "none", "ModelDataUrl": url}
    boto3.client("sagemaker").create_model(
        ModelName=name, ExecutionRoleArn=ROLE, PrimaryContainer=container
    )


def create_endpoint(name, model, **config):
    """An endpoint; with AsyncInferenceConfig in `config` an asynchronous one."""
    client = boto3.client("sagemaker")
    variant = {"VariantName": "AllTraffic", "ModelName": model, "InstanceType": "ml.m5.xlarge"}
    variant |= {"InitialInstanceCount": 1}
    client.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant], **config)
    client.create_endpoint(EndpointName=name, EndpointConfigName=name)


def describe(name):
    return boto3.client("sagemaker").describe_endpoint(EndpointName=name)


def settled(name):
    wait_until(lambda: describe(name)["EndpointStatus"] != "Creating")
    return describe(name)


def servers():
    """The model servers that run for the embedded AWS of this test."""
    server = aws.status(int(boto3.client("sagemaker").meta.endpoint_url.rpartition(":")[2]))
    children = psutil.Process(server["pid"]).children(recursive=True)
    return [child for child in children if "serving.py" in " ".join(child.cmdline())]


def log(group):
    logs = boto3.client("logs")
    streams = logs.describe_log_streams(logGroupName=group)["logStreams"]
    events = [
        event["message"]
        for stream in streams
        for event in logs.get_log_events(
            logGroupName=group, logStreamName=stream["logStreamName"], startFromHead=True
        )["events"]
    ]
    return "\n".join(events)


@pytest.fixture(scope="module")
def model(port):
    """The name of a model that greets."""
    put("model.tar.gz", archive({"greeting": "hello", "code/inference.py": INFERENCE}))
    create_model("greeter", f"s3://{BUCKET}/model.tar.gz")
    return "greeter"


@pytest.fixture(scope="module")
def later(model):
    """The name of an asynchronous endpoint in service."""
    places = {"S3OutputPath": f"s3://{BUCKET}/out/", "S3FailurePath": f"s3://{BUCKET}/failed"}
    create_endpoint("later", model, AsyncInferenceConfig={"OutputConfig": places})
    assert settled("later")["EndpointStatus"] == "InService"
    return "later"


def test_an_endpoint_answers_refuses_and_goes(model):
    create_endpoint("now", model)
    assert describe("now")["EndpointStatus"] == "Creating"
    assert settled("now")["EndpointStatus"] == "InService"
    runtime, before = boto3.client("sagemaker-runtime"), len(servers())
    payload = bytes(range(256))  # as in a video: no text
    answer = runtime.invoke_endpoint(
        EndpointName="now", Body=payload, ContentType="application/octet-stream"
    )
    assert answer["ContentType"] == "application/json"
    expected = {"greeting": "hello", "to": payload.decode("latin-1")}
    assert json.loads(answer["Body"].read()) == expected
    with pytest.raises(ClientError, match="not a video") as error:
        runtime.invoke_endpoint(EndpointName="now", Body=b"bad", ContentType="video/mp4")
    assert error.value.response["Error"]["Code"] == "ModelError"
    assert error.value.response["OriginalStatusCode"] == 400
    with pytest.raises(ClientError, match="length exceeded"):
        runtime.invoke_endpoint(EndpointName="now", Body=bytes(6 * 2**20 + 1))
    wait_until(lambda: "asked for 256 bytes" in log("/aws/sagemaker/Endpoints/now"))
    boto3.client("sagemaker").delete_endpoint(EndpointName="now")
    with pytest.raises(ClientError, match="Could not find endpoint"):
        describe("now")
    assert len(servers()) == before - 1
    with pytest.raises(ClientError, match="not found"):
        runtime.invoke_endpoint(EndpointName="now", Body=b"x")


def test_asynchronous_success_and_failure(later):
    runtime = boto3.client("sagemaker-runtime")
    put("in/good.mp4", b"\xff\x00")
    put("in/bad.mp4", b"bad")
    answers = {
        name: runtime.invoke_endpoint_async(
            EndpointName=later, InputLocation=f"s3://{BUCKET}/in/{name}", ContentType="video/mp4"
        )
        for name in ("bad.mp4", "good.mp4", "missing.mp4")
    }
    assert answers["good.mp4"]["InferenceId"]
    places = {n: a["OutputLocation"].split("/", 3)[3] for n, a in answers.items()}
    errors = {n: a["FailureLocation"].split("/", 3)[3] for n, a in answers.items()}
    wait_until(lambda: keys(places["good.mp4"]) and keys(errors["missing.mp4"]))
    assert json.loads(get(places["good.mp4"])) == {"greeting": "hello", "to": "\xff\x00"}
    assert b"client error (400)" in get(errors["bad.mp4"])
    assert b"NoSuchKey" in get(errors["missing.mp4"])
    assert not keys(places["bad.mp4"]) and not keys(errors["good.mp4"])


def test_each_kind_of_invocation_has_its_kind_of_endpoint(later):
    with pytest.raises(ClientError, match="use InvokeEndpointAsync"):
        boto3.client("sagemaker-runtime").invoke_endpoint(EndpointName=later, Body=b"x")


@pytest.mark.parametrize(
    ("name", "files", "reason"),
    [
        ("raises", {"code/inference.py": "def model_fn(d): raise OSError('no weights')"}, "OSErr"),
        ("no-archive", None, "Failed to download model data"),
    ],
)
def test_a_model_that_does_not_load_fails_with_the_reason(port, name, files, reason):
    if files:
        put(f"{name}.tar.gz", archive(files))
    create_model(name, f"s3://{BUCKET}/{name}.tar.gz")
    before = len(servers())
    create_endpoint(name, name)
    ended = settled(name)
    assert ended["EndpointStatus"] == "Failed" and reason in ended["FailureReason"]
    boto3.client("sagemaker").delete_endpoint(EndpointName=name)  # on AWS it bills until then
    assert len(servers()) == before


def test_an_endpoint_that_is_deleted_while_it_starts_leaves_no_process(port):
    put("sleepy.tar.gz", archive({"code/inference.py": "import time; time.sleep(600)"}))
    create_model("sleepy", f"s3://{BUCKET}/sleepy.tar.gz")
    before = len(servers())
    create_endpoint("sleepy", "sleepy")
    wait_until(lambda: len(servers()) > before)
    boto3.client("sagemaker").delete_endpoint(EndpointName="sleepy")
    assert len(servers()) == before


def test_wrong_requests(model):
    with pytest.raises(ClientError, match="Could not find model"):
        create_endpoint("orphan", "no-such-model")
    with pytest.raises(ClientError, match="Could not find endpoint"):
        describe("orphan")
    client = boto3.client("sagemaker")
    client.create_endpoint_config(
        EndpointConfigName="many",
        ProductionVariants=[
            {
                "VariantName": "AllTraffic",
                "ModelName": model,
                "InstanceType": "ml.g5.xlarge",
                "InitialInstanceCount": 1,
            }
        ],
    )
    with pytest.raises(ClientError, match="'ml.g5.xlarge for endpoint usage' is 0") as error:
        client.create_endpoint(EndpointName="many", EndpointConfigName="many")
    assert error.value.response["Error"]["Code"] == "ResourceLimitExceeded"


def transform(name, model, prefix, **more):
    source = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/{prefix}"}}
    boto3.client("sagemaker").create_transform_job(
        TransformJobName=name,
        ModelName=model,
        TransformInput={"DataSource": source, "ContentType": "video/mp4"},
        TransformOutput={"S3OutputPath": f"s3://{BUCKET}/{name}"},
        TransformResources={"InstanceType": "ml.m5.xlarge", "InstanceCount": 1},
        **more,
    )


def transformed(name):
    client = boto3.client("sagemaker")
    state = lambda: client.describe_transform_job(TransformJobName=name)  # noqa: E731
    wait_until(lambda: state()["TransformJobStatus"] in ("Completed", "Failed", "Stopped"))
    return state()


def test_a_folder_is_transformed_and_one_bad_clip_fails_alone(model):
    for name, body in {"a/1.mp4": b"one", "a/2.mp4": b"bad", "b/3.mp4": b"three"}.items():
        put(f"clips-to-judge/{name}", body)
    before = len(servers())
    transform("folder", model, "clips-to-judge/")
    job = transformed("folder")
    assert job["TransformJobStatus"] == "Failed"
    assert job["FailureReason"] == "ClientError: See job logs for more information"
    assert keys("folder/") == ["folder/a/1.mp4.out", "folder/b/3.mp4.out"]
    assert json.loads(get("folder/b/3.mp4.out"))["to"] == "three"
    assert "clips-to-judge/a/2.mp4" in log("/aws/sagemaker/TransformJobs")
    transform("good", model, "clips-to-judge/b/", MaxPayloadInMB=1)
    assert transformed("good")["TransformJobStatus"] == "Completed"
    transform("nothing", model, "no-such-folder/")
    assert "No S3 objects found" in transformed("nothing")["FailureReason"]
    assert len(servers()) == before


def test_a_transform_job_stops(model):
    for i in range(40):
        put(f"many/{i}", b"x")
    client = boto3.client("sagemaker")
    transform("stopped", model, "many/")
    client.stop_transform_job(TransformJobName="stopped")
    assert transformed("stopped")["TransformJobStatus"] == "Stopped"
    assert len(keys("stopped/")) < 40
    with pytest.raises(ClientError, match="is in status Stopped"):
        client.stop_transform_job(TransformJobName="stopped")
