"""Endpoints and batch transform: what the embedded AWS serves, and what the guide asks for."""

import io
import json
import tarfile
import time
from types import SimpleNamespace

import boto3
import psutil
import pytest
from account import BUCKET, ROLE, account_port, get, keys, put, wait_until  # noqa: F401
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from cells import notebook_cells, run_cells
from conftest import ROOT
from local_mode import aws
from tutorial import clean_up

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


# The guide ----------------------------------------------------------------------------------------
JUDGE = """
import json

def model_fn(model_dir):
    return ["a", "b"]

def transform_fn(model, body, content_type, accept, context):
    assert content_type == "video/mp4"
    if body.startswith(b"this is not"):  # as inference.py does: a status, and one line
        context.set_response_status(400, "Bad Request")
        return json.dumps({"error": "not a video"})
    found = [{"label": "a", "start": 0.0, "end": 1.5, "score": 0.9}]
    return json.dumps({"smoothed": [[0.9, 0.1]] * 2, "intervals": found})
"""


GUIDE = "how_to/deploy"


@pytest.fixture
def deployment(port, tmp_path, monkeypatch):
    """deployment(**parameters): its cells on the embedded AWS; their variables and requests.

    The archive is one of JUDGE's. Each thing must be in run.json before it is asked for.
    """
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr("time.sleep", lambda _, sleep=time.sleep: sleep(0.1))
    call, sent, run_file = BaseClient._make_api_call, {}, tmp_path / "run.json"
    uses = ("endpoint usage", "transform job usage")
    run = {"region": "us-east-1", "account": "1" * 12, "endpoint_url": f"http://127.0.0.1:{port}"}
    run |= {"bucket": BUCKET, "prefix": "video-tutorial", "role_arn": ROLE}
    run |= {"homes": [], "jobs": [], "created": [], "dollars_per_hour": {"ml.m5.xlarge": 0.23}}
    run["quotas"] = {f"ml.m5.xlarge for {use}": 20 for use in uses}
    clips = [tmp_path / f"judged/a/{i}.mp4" for i in range(20)]
    for clip in [*clips, tmp_path / "long.mp4"]:
        clip.parent.mkdir(parents=True, exist_ok=True)
        clip.write_bytes(b"clip")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")

    def record(client, operation, request):
        if operation.startswith("Create") and operation != "CreateLogGroup":
            known = json.loads(run_file.read_text())
            kind, name = list(request.items())[0]
            item = f"/{name}"
            assert any(i.endswith(item) for i in known.get("deployed", []) + known["jobs"]), kind
            sent[operation] = request
        return call(client, operation, request)

    def cells(fail_at=None, **parameters):
        run_file.write_text(json.dumps(run | parameters.pop("run", {})))
        parameters |= {"output_dir": str(tmp_path), "inference_image": "my/image:1"}
        made = run_cells(GUIDE, {"threshold": 0.8} | parameters, stop="judged")
        made |= {"files": clips, "labels": ["a", "b"], "predicted": [0] * len(clips)}
        made |= {"long_video": tmp_path / "long.mp4", "result": {"smoothed": [[0.9, 0.1]] * 2}}
        own = SimpleNamespace(classify_video=lambda *_, **__: made["result"])
        made |= {"inference": own, "classifier": None, "interval_label": "a"}
        made |= {"tested": SimpleNamespace(trained=SimpleNamespace(folder=tmp_path / "model"))}
        with monkeypatch.context() as patch:
            patch.setattr(BaseClient, "_make_api_call", record)
            code = {c.id: c.source for c in notebook_cells(GUIDE) if c.cell_type == "code"}
            for name in [*code][[*code].index("deploy-cost") :]:
                if name == fail_at:
                    break
                if name == "long-video":  # made above
                    continue
                exec(compile(code[name], name, "exec"), made)
                if name == "pack":
                    made["packed"].write_bytes(archive({"code/inference.py": JUDGE}))
        text = json.dumps(sent).replace(made.get("home", "-"), "HOME")
        return made, json.loads(text.replace(made.get("name", "-"), "NAME"))

    return cells


def test_the_requests_of_the_guide_and_what_it_shows(deployment, tmp_path, capsys):
    before = len(servers())
    made, sent = deployment(deploy=True, transform=True)
    tags = [{"Key": "project", "Value": "video-tutorial"}]
    assert sent == {
        "CreateModel": {
            "ModelName": "NAME",
            "ExecutionRoleArn": ROLE,
            "PrimaryContainer": {
                "Image": "my/image:1",
                "ModelDataUrl": "HOME/model.tar.gz",
                "Environment": {
                    "SAGEMAKER_PROGRAM": "inference.py",
                    "SAGEMAKER_SUBMIT_DIRECTORY": "/opt/ml/model/code",
                    "ALLOWED_PREFIX": "HOME",
                    "WINDOW_SECONDS": "2.5",
                    "HOP_SECONDS": "0.15",
                    "THRESHOLD": "0.8",
                    "TS_DEFAULT_RESPONSE_TIMEOUT": "3600",
                    "SAGEMAKER_MODEL_SERVER_WORKERS": "1",
                    "TS_MAX_REQUEST_SIZE": "1073741824",
                },
            },
            "Tags": tags,
        },
        "CreateEndpointConfig": {
            "EndpointConfigName": "NAME",
            "ProductionVariants": [
                {
                    "VariantName": "AllTraffic",
                    "ModelName": "NAME",
                    "InitialInstanceCount": 1,
                    "InstanceType": "ml.m5.xlarge",
                }
            ],
            "AsyncInferenceConfig": {
                "OutputConfig": {"S3OutputPath": "HOME/answers", "S3FailurePath": "HOME/failures"},
                "ClientConfig": {"MaxConcurrentInvocationsPerInstance": 1},
            },
            "Tags": tags,
        },
        "CreateEndpoint": {"EndpointName": "NAME", "EndpointConfigName": "NAME", "Tags": tags},
        "CreateTransformJob": {
            "TransformJobName": "NAME",
            "ModelName": "NAME",
            "MaxPayloadInMB": 100,
            "ModelClientConfig": {"InvocationsTimeoutInSeconds": 3600, "InvocationsMaxRetries": 0},
            "TransformInput": {
                "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "HOME/clips/"}},
                "ContentType": "video/mp4",
            },
            "TransformOutput": {"S3OutputPath": "HOME/transformed"},
            "TransformResources": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1},
            "Tags": tags,
        },
    }
    assert made["home"].startswith(f"s3://{BUCKET}/video-tutorial/video-")
    shown = capsys.readouterr().out
    assert "ml.m5.xlarge: $0.23 an hour, $5.52 a day" in shown
    assert "  0.00 to   1.50 s: 0.90" in shown
    assert 'client error (400) from primary with message "{"error": "not a video"}"' in shown
    assert shown.count("largest difference 0.0e+00") == 8
    assert json.loads((tmp_path / "run.json").read_text())["deployed"] == [f"log/{made['name']}"]
    assert len(servers()) == before and left_of_deployment() == []


def left_of_deployment():
    client = boto3.client("sagemaker")
    names = [item["EndpointName"] for item in client.list_endpoints()["Endpoints"]]
    configs = client.list_endpoint_configs()["EndpointConfigs"]
    names += [item["EndpointConfigName"] for item in configs]
    names += [item["ModelName"] for item in client.list_models()["Models"]]
    return [name for name in names if name.startswith("video-")]


def test_clean_up_takes_down_what_the_guide_left(deployment, tmp_path, port, monkeypatch):
    """As after a kernel that died while the endpoint ran."""
    before = len(servers())
    made, _ = deployment(deploy=True, fail_at="take-down")
    assert len(left_of_deployment()) == 3 and len(servers()) == before + 1
    monkeypatch.setattr(aws, "disconnect", lambda _: None)  # other tests go on with it
    clean_up.delete(clean_up.connect(tmp_path), confirm=True)
    assert not (tmp_path / "run.json").exists()
    assert left_of_deployment() == [] and len(servers()) == before
    groups = boto3.client("logs").describe_log_groups(
        logGroupNamePrefix=f"/aws/sagemaker/Endpoints/{made['name']}"
    )
    assert groups["logGroups"] == []


def test_nothing_is_made_by_default(deployment):
    made, sent = deployment()
    assert sent == {} and "deployed" not in made["run"] and made["run"]["homes"] == []


def test_what_would_be_refused_is_refused_before_it_costs(deployment):
    with pytest.raises(RuntimeError, match="'ml.m5.xlarge for endpoint usage' is 0"):
        deployment(deploy=True, run={"quotas": {}})
    with pytest.raises(RuntimeError, match="No price of ml.m5.xlarge: run train_for_less"):
        deployment(transform=True, run={"dollars_per_hour": {}})
