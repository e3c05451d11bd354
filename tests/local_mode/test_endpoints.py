"""Endpoints and batch transform: what the embedded AWS serves. The guide: how_to/test_deploy."""

import io
import json
import tarfile
from pathlib import Path

import boto3
import psutil
import pytest
from account import BUCKET, ROLE, account_port, get, keys, put, wait_until  # noqa: F401
from botocore.exceptions import ClientError
from embedded import own_aws
from local_mode import aws

START = 300  # seconds; Ray takes ten, and more where others compute too
IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/ray:serve-ml-sagemaker-cpu-v1.4"
CONFIG = """
applications:
  - {name: greeter, route_prefix: /, import_path: "deployment:app"}
"""
DEPLOYMENT = """
import asyncio, os
from ray import serve
from starlette.responses import JSONResponse

@serve.deployment
class Greeter:
    def __init__(self):
        self.greeting = open(os.path.join(os.environ["SM_MODEL_DIR"], "greeting")).read()

    async def __call__(self, request):
        body = await request.body()
        if body == b"bad":
            return JSONResponse({"error": "not a video"}, 400)
        if body == b"slow":
            await asyncio.sleep(600)
        print("asked for", len(body), "bytes")
        kind = request.headers.get("content-type")
        return JSONResponse({"greeting": self.greeting, "to": body.decode("latin-1"), "as": kind})

app = Greeter.bind()
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


def create_model(name, url, image=IMAGE, **environment):
    container = {"Image": image, "ModelDataUrl": url, "Environment": environment}
    boto3.client("sagemaker").create_model(
        ModelName=name, ExecutionRoleArn=ROLE, PrimaryContainer=container
    )


def create_endpoint(name, model, variant=(), **config):
    """An endpoint; with AsyncInferenceConfig in `config` an asynchronous one."""
    client = boto3.client("sagemaker")
    machine = {"InstanceType": "ml.m5.xlarge", "InitialInstanceCount": 1}
    variant = {"VariantName": "AllTraffic", "ModelName": model, **machine, **dict(variant)}
    client.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant], **config)
    client.create_endpoint(EndpointName=name, EndpointConfigName=name)


def describe(name):
    return boto3.client("sagemaker").describe_endpoint(EndpointName=name)


def settled(name):
    wait_until(lambda: describe(name)["EndpointStatus"] != "Creating", START)
    return describe(name)


def delete_endpoint(name):
    settled(name)
    boto3.client("sagemaker").delete_endpoint(EndpointName=name)


def server_state():
    return aws.status(int(boto3.client("sagemaker").meta.endpoint_url.rpartition(":")[2]))


def servers():
    """The numbers of the processes that this embedded AWS runs: containers, and their Ray."""
    return {child.pid for child in psutil.Process(server_state()["pid"]).children(recursive=True)}


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
    files = {"greeting": "hello", "config.yaml": CONFIG, "code/deployment.py": DEPLOYMENT}
    put("model.tar.gz", archive(files))
    create_model("greeter", f"s3://{BUCKET}/model.tar.gz", RAYSERVE_BACKEND_TIMEOUT="20")
    return "greeter"


@pytest.fixture(scope="module")
def later(model):
    """The name of an asynchronous endpoint in service."""
    places = {"S3OutputPath": f"s3://{BUCKET}/out/", "S3FailurePath": f"s3://{BUCKET}/failed"}
    create_endpoint("later", model, AsyncInferenceConfig={"OutputConfig": places})
    assert settled("later")["EndpointStatus"] == "InService"
    return "later"


@pytest.mark.long
def test_an_endpoint_answers_refuses_and_goes_with_all_its_processes(model):
    before = servers()
    create_endpoint("now", model)
    assert describe("now")["EndpointStatus"] == "Creating"
    client, runtime = boto3.client("sagemaker"), boto3.client("sagemaker-runtime")
    with pytest.raises(ClientError, match="Cannot update in-progress endpoint") as error:
        client.delete_endpoint(EndpointName="now")
    assert error.value.response["Error"]["Code"] == "ValidationException"
    assert settled("now")["EndpointStatus"] == "InService", describe("now")["FailureReason"]
    payload = bytes(range(256))  # as in a video: no text
    answer = runtime.invoke_endpoint(EndpointName="now", Body=payload, ContentType="video/mp4")
    assert answer["ContentType"] == "application/json"
    expected = {"greeting": "hello", "to": payload.decode("latin-1"), "as": "video/mp4"}
    assert json.loads(answer["Body"].read()) == expected
    with pytest.raises(ClientError, match="not a video") as error:
        runtime.invoke_endpoint(EndpointName="now", Body=b"bad", ContentType="video/mp4")
    assert error.value.response["Error"]["Code"] == "ModelError"
    assert error.value.response["OriginalStatusCode"] == 400
    with pytest.raises(ClientError, match="RAYSERVE_BACKEND_TIMEOUT") as error:
        runtime.invoke_endpoint(EndpointName="now", Body=b"slow")
    assert error.value.response["OriginalStatusCode"] == 504
    with pytest.raises(ClientError, match="length exceeded"):
        runtime.invoke_endpoint(EndpointName="now", Body=bytes(6 * 2**20 + 1))
    wait_until(lambda: "asked for 256 bytes" in log("/aws/sagemaker/Endpoints/now"))
    started = servers() - before
    assert len(started) > 5  # Ray's
    shown = [psutil.Process(pid).cmdline() for pid in started]
    (python,) = (words[0] for words in shown if any(w.endswith("serving.py") for w in words))
    assert python.startswith(server_state()["folder"])  # Ray fails where Python's path has a space
    client.delete_endpoint(EndpointName="now")
    with pytest.raises(ClientError, match="Could not find endpoint"):
        describe("now")
    with pytest.raises(ClientError, match="not found"):
        runtime.invoke_endpoint(EndpointName="now", Body=b"x")
    running = [psutil.Process(pid) for pid in started if psutil.pid_exists(pid)]
    assert [p for p in running if p.status() != psutil.STATUS_ZOMBIE] == []
    assert list(Path(server_state()["folder"]).glob("r*")) == []  # Ray's files


@pytest.mark.long
def test_asynchronous_success_and_failure(later):
    runtime = boto3.client("sagemaker-runtime")
    put("in/good.mp4", b"\xff\x00")
    put("in/bad.mp4", b"bad")
    asked = {
        name: {"InputLocation": f"s3://{BUCKET}/in/{name}.mp4", "ContentType": "video/mp4"}
        for name in ("bad", "good", "missing")
    }
    asked["inline"] = {"Body": b"{}", "ContentType": "application/json"}
    answers = {
        name: runtime.invoke_endpoint_async(EndpointName=later, **question)
        for name, question in asked.items()
    }
    assert answers["good"]["InferenceId"]
    places = {n: a["OutputLocation"].split("/", 3)[3] for n, a in answers.items()}
    errors = {n: a["FailureLocation"].split("/", 3)[3] for n, a in answers.items()}
    wait_until(lambda: keys(places["inline"]) and keys(errors["missing"]))
    expected = {"greeting": "hello", "to": "\xff\x00", "as": "video/mp4"}
    assert json.loads(get(places["good"])) == expected
    inline = json.loads(get(places["inline"]))
    assert (inline["to"], inline["as"]) == ("{}", "application/json")
    assert b"client error (400)" in get(errors["bad"])
    assert b"NoSuchKey" in get(errors["missing"])
    assert not keys(places["bad"]) and not keys(errors["good"])


@pytest.mark.long
def test_each_kind_of_invocation_has_its_kind_of_endpoint(later):
    with pytest.raises(ClientError, match="use InvokeEndpointAsync"):
        boto3.client("sagemaker-runtime").invoke_endpoint(EndpointName=later, Body=b"x")


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ({}, "Provide exactly one of them"),
        ({"Body": b"{}", "InputLocation": f"s3://{BUCKET}/in/a.mp4"}, "mutually exclusive"),
        ({"Body": bytes(128_001)}, "128000 at most"),
    ],
)
@pytest.mark.long
def test_a_question_has_a_small_body_or_an_address(later, question, reason):
    runtime = boto3.client("sagemaker-runtime")
    with pytest.raises(ClientError, match=reason) as error:
        runtime.invoke_endpoint_async(EndpointName=later, **question)
    assert error.value.response["Error"]["Code"] == "ValidationError"
    runtime.invoke_endpoint_async(EndpointName=later, Body=bytes(128_000))


def test_the_scaling_of_an_endpoint_ends_with_it(port):
    create_model("scaled", f"s3://{BUCKET}/nothing.tar.gz")
    create_endpoint("scaled", "scaled")
    scaling = boto3.client("application-autoscaling")
    target = {"ServiceNamespace": "sagemaker", "ResourceId": "endpoint/scaled/variant/AllTraffic"}
    dimension = "sagemaker:variant:DesiredInstanceCount"
    scaling.register_scalable_target(
        **target, ScalableDimension=dimension, MinCapacity=0, MaxCapacity=1
    )
    delete_endpoint("scaled")
    found = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")
    assert found["ScalableTargets"] == []


def test_who_may_not_end_the_scaling_cannot_delete_the_endpoint():
    """AWS's answer to a role that may do all in SageMaker, and nothing in Auto Scaling."""
    allowed = {"Effect": "Allow", "Action": "sagemaker:*", "Resource": "*"}
    trust = {"Effect": "Allow", "Action": "sts:AssumeRole"}
    trust["Principal"] = {"Service": "sagemaker.amazonaws.com"}
    with own_aws(enforce=True):
        iam = boto3.client("iam")
        iam.create_role(RoleName="test", AssumeRolePolicyDocument=document(trust))
        iam.create_user(UserName="limited")
        iam.put_user_policy(UserName="limited", PolicyName="all", PolicyDocument=document(allowed))
        key = iam.create_access_key(UserName="limited")["AccessKey"]
        create_model("scaled", f"s3://{BUCKET}/nothing.tar.gz")
        create_endpoint("scaled", "scaled")
        settled("scaled")
        boto3.client("application-autoscaling").register_scalable_target(
            ServiceNamespace="sagemaker",
            ResourceId="endpoint/scaled/variant/AllTraffic",
            ScalableDimension="sagemaker:variant:DesiredInstanceCount",
        )
        limited = boto3.client(
            "sagemaker",
            aws_access_key_id=key["AccessKeyId"],
            aws_secret_access_key=key["SecretAccessKey"],
        )
        missing = "does not have application-autoscaling:DeregisterScalableTarget permission"
        with pytest.raises(ClientError, match=missing):
            limited.delete_endpoint(EndpointName="scaled")
        boto3.client("sagemaker").delete_endpoint(EndpointName="scaled")  # the administrator


def document(statement):
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


@pytest.mark.parametrize(
    ("name", "files", "reason"),
    [
        pytest.param(
            "raises",
            {"config.yaml": CONFIG, "code/deployment.py": "raise OSError('no weights')"},
            "no weights",
            marks=pytest.mark.long,
        ),
        ("no-archive", None, "Failed to download model data"),
    ],
)
def test_a_model_that_does_not_load_fails_with_the_reason(port, name, files, reason):
    if files:
        put(f"{name}.tar.gz", archive(files))
    create_model(name, f"s3://{BUCKET}/{name}.tar.gz")
    before = servers()
    create_endpoint(name, name)
    ended = settled(name)
    assert ended["EndpointStatus"] == "Failed" and reason in ended["FailureReason"]
    boto3.client("sagemaker").delete_endpoint(EndpointName=name)  # on AWS it bills until then
    assert servers() <= before


GPU_IMAGE = IMAGE.replace("-cpu-", "-cuda-")
DRIVER_550 = "al2-ami-sagemaker-inference-gpu-3-1"


@pytest.mark.parametrize(
    ("name", "image", "host", "reason"),
    [
        ("default-host", GPU_IMAGE, {}, "CannotStartContainerError"),
        (
            "newer-host",
            GPU_IMAGE,
            {"InferenceAmiVersion": "al2023-ami-sagemaker-inference-gpu-4-1"},
            "CannotStartContainerError",
        ),
        # The driver fits, so the container starts; it has nothing to run.
        ("right-host", GPU_IMAGE, {"InferenceAmiVersion": DRIVER_550}, "Failed to download model"),
        ("own-image", "my/image:1", {}, "plays AWS's Ray Serve image only"),
    ],
)
def test_a_container_starts_on_a_host_that_fits_its_image(port, name, image, host, reason):
    create_model(name, f"s3://{BUCKET}/nothing.tar.gz", image)
    create_endpoint(name, name, {"InstanceType": "ml.g4dn.xlarge", **host})
    assert reason in settled(name)["FailureReason"]
    groups = boto3.client("logs").describe_log_groups(
        logGroupNamePrefix=f"/aws/sagemaker/Endpoints/{name}"
    )
    assert groups["logGroups"] == []  # as on AWS: no log says why
    delete_endpoint(name)


def test_wrong_requests(model):
    with pytest.raises(ClientError, match="Could not find model"):
        create_endpoint("orphan", "no-such-model")
    with pytest.raises(ClientError, match="Could not find endpoint"):
        describe("orphan")
    with pytest.raises(ClientError, match="'ml.g5.xlarge for endpoint usage' is 0") as error:
        create_endpoint("many", model, {"InstanceType": "ml.g5.xlarge"})
    assert error.value.response["Error"]["Code"] == "ResourceLimitExceeded"
    with pytest.raises(ClientError, match="must not exceed 100"):
        transform("too-much", model, "clips/", MaxPayloadInMB=60, MaxConcurrentTransforms=2)


def transform(name, model, prefix, resources=(), **more):
    source = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/{prefix}"}}
    machine = {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, **dict(resources)}
    boto3.client("sagemaker").create_transform_job(
        TransformJobName=name,
        ModelName=model,
        TransformInput={"DataSource": source, "ContentType": "video/mp4"},
        TransformOutput={"S3OutputPath": f"s3://{BUCKET}/{name}"},
        TransformResources=machine,
        **more,
    )


def transformed(name):
    client = boto3.client("sagemaker")
    state = lambda: client.describe_transform_job(TransformJobName=name)  # noqa: E731
    wait_until(lambda: state()["TransformJobStatus"] in ("Completed", "Failed", "Stopped"), START)
    return state()


@pytest.mark.long
def test_a_folder_is_transformed_and_one_bad_clip_fails_alone(model):
    for name, body in {"a/1.mp4": b"one", "a/2.mp4": b"bad", "b/3.mp4": b"three"}.items():
        put(f"clips-to-judge/{name}", body)
    before = servers()
    transform("folder", model, "clips-to-judge/", MaxPayloadInMB=1)
    job = transformed("folder")
    assert job["TransformJobStatus"] == "Failed"
    assert job["FailureReason"] == "ClientError: See job logs for more information"
    assert keys("folder/") == ["folder/a/1.mp4.out", "folder/b/3.mp4.out"]
    assert json.loads(get("folder/b/3.mp4.out"))["to"] == "three"
    assert "clips-to-judge/a/2.mp4" in log("/aws/sagemaker/TransformJobs")
    transform("nothing", model, "no-such-folder/")
    assert "No S3 objects found" in transformed("nothing")["FailureReason"]
    assert servers() <= before


def test_a_transform_job_needs_a_fitting_host_too(port):
    put("one-clip/1.mp4", b"one")
    create_model("on-gpu", f"s3://{BUCKET}/nothing.tar.gz", GPU_IMAGE)
    for name, host, reason in (
        ("old-host", {}, "CannotStartContainerError"),
        ("fitting", {"TransformAmiVersion": "al2-ami-sagemaker-batch-gpu-535"}, "download model"),
    ):
        transform(name, "on-gpu", "one-clip/", {"InstanceType": "ml.g4dn.xlarge", **host})
        assert reason in transformed(name)["FailureReason"]


@pytest.mark.long
def test_a_transform_job_that_hangs_stops_at_once(model):
    put("hanging/1.mp4", b"slow")
    client, before = boto3.client("sagemaker"), servers()
    transform("stopped", model, "hanging/")
    wait_until(lambda: servers() - before)
    client.stop_transform_job(TransformJobName="stopped")
    assert transformed("stopped")["TransformJobStatus"] == "Stopped"
    assert keys("stopped/") == [] and servers() <= before
    with pytest.raises(ClientError, match="is in status Stopped"):
        client.stop_transform_job(TransformJobName="stopped")
