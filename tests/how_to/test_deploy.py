"""The guide's endpoint and batch transform job on an embedded AWS: requests, answers, their end."""

import io
import json
import re
import tarfile
import time
from types import SimpleNamespace

import boto3
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from cells import run_cell
from embedded import own_aws
from tutorial import account, clean_up, endpoint

BUCKET, ROLE = "test-bucket", "arn:aws:iam::123456789012:role/test"
TAGS = [{"Key": "project", "Value": "video-tutorial"}]
ANSWER = {"smoothed": [[0.9, 0.1]] * 2}
JUDGE = """
import json

def model_fn(model_dir):
    return ["a", "b"]

def transform_fn(model, body, content_type, accept, context):
    assert content_type == "video/mp4"
    if body.startswith(b"this is not"):  # as inference.py does: a status, and one line
        context.set_response_status(400, "Bad Request")
        return json.dumps({"error": "not a video"})
    return json.dumps({"smoothed": [[0.9, 0.1]] * 2})
"""


@pytest.fixture(scope="module")
def port():
    with own_aws(grace_seconds=5) as port:
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield port


@pytest.fixture
def here(port, tmp_path, monkeypatch):
    """An account as notebook 1 leaves it, where waiting is short."""
    monkeypatch.setattr("time.sleep", lambda _, sleep=time.sleep: sleep(0.1))
    uses = ("endpoint usage", "transform job usage")
    run = {"region": "us-east-1", "account": "123456789012"}  # who owns the bucket
    run["endpoint_url"] = f"http://127.0.0.1:{port}"
    run |= {"bucket": BUCKET, "prefix": "video-tutorial", "role_arn": ROLE}
    run |= {"homes": [], "jobs": [], "created": [], "dollars_per_hour": {"ml.m5.xlarge": 0.23}}
    run["quotas"] = {f"ml.m5.xlarge for {use}": 20 for use in uses}
    (tmp_path / "run.json").write_text(json.dumps(run))
    return account.connect(tmp_path)


@pytest.fixture
def video(tmp_path):
    (tmp_path / "long.mp4").write_bytes(b"clip")
    return tmp_path / "long.mp4"


@pytest.fixture
def asked(here, tmp_path, monkeypatch):
    """The guide's own requests: (archive of JUDGE, model, config, home)."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        entry = tarfile.TarInfo("code/inference.py")
        entry.size = len(JUDGE)
        tar.addfile(entry, io.BytesIO(JUDGE.encode()))
    (tmp_path / "inference.tar.gz").write_bytes(packed.getvalue())
    monkeypatch.setattr(endpoint, "pack", lambda *_: tmp_path / "inference.tar.gz")
    monkeypatch.setattr(endpoint, "image", lambda *_: "my/image:1")
    settings = {"window_seconds": 2.5, "hop_seconds": 0.15, "threshold": 0.8}
    tested = SimpleNamespace(trained=SimpleNamespace(folder=tmp_path))
    made = run_cell("how_to/deploy", "request", endpoint=endpoint, here=here, tested=tested,
                    settings=settings, endpoint_instance="ml.m5.xlarge")  # fmt: skip
    return made["packed"], made["model"], made["config"], made["home"]


@pytest.fixture
def sent(here, monkeypatch):
    """The requests that create something, by operation; each is in run.json before it is sent."""
    call, requests = BaseClient._make_api_call, {}

    def record(client, operation, request):
        if operation.startswith("Create") and operation != "CreateLogGroup":
            known = json.loads((here.output / "run.json").read_text())
            item = f"/{list(request.values())[0]}"
            assert any(i.endswith(item) for i in known.get("deployed", []) + known["jobs"]), item
            requests[operation] = request
        return call(client, operation, request)

    monkeypatch.setattr(BaseClient, "_make_api_call", record)
    return requests


def left():
    """What a guide has left in the account."""
    client = boto3.client("sagemaker")
    names = [item["EndpointName"] for item in client.list_endpoints()["Endpoints"]]
    configs = client.list_endpoint_configs()["EndpointConfigs"]
    names += [item["EndpointConfigName"] for item in configs]
    return names + [item["ModelName"] for item in client.list_models()["Models"]]


def plain(requests, home):
    """The requests with HOME and NAME instead of this run's own."""
    text = json.dumps(requests).replace(home, "HOME")
    return json.loads(text.replace(home.rpartition("/")[2], "NAME"))


def test_the_endpoint_of_the_guide_answers_refuses_and_is_gone(here, asked, sent, video, capsys):
    packed, model, config, home = asked
    no_video = video.with_name("no.mp4")
    no_video.write_text("this is not a video")
    with endpoint.serving(here, packed, model, config) as ask:
        assert endpoint.difference(ask(video), ANSWER) == 0
        with pytest.raises(RuntimeError, match=r'client error \(400\).*"not a video"'):
            ask(no_video)
        assert endpoint.difference(ask(video), ANSWER) == 0  # it goes on
        assert len(left()) == 3
    assert home.startswith(f"s3://{BUCKET}/video-tutorial/video-")
    name = home.rpartition("/")[2]
    assert plain(sent, home) == {
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
            "Tags": TAGS,
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
            "Tags": TAGS,
        },
        "CreateEndpoint": {"EndpointName": "NAME", "EndpointConfigName": "NAME", "Tags": TAGS},
    }
    here.refresh()
    assert left() == [] and here.run["deployed"] == [f"log/{name}"]
    assert here.run["homes"] == [f"{home}/"]
    assert f"{name} is gone: AWS was asked again" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_ends_the_block_the_endpoint_goes(here, asked, error):
    packed, model, config, _ = asked
    with pytest.raises(error), endpoint.serving(here, packed, model, config):
        assert len(left()) == 3
        raise error
    assert left() == []


def test_an_interrupted_start_is_taken_down_too(here, asked, monkeypatch):
    packed, model, config, _ = asked

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(endpoint, "_wait_for_endpoint", interrupted)
    with pytest.raises(KeyboardInterrupt), endpoint.serving(here, packed, model, config):
        pass
    assert left() == []


def test_an_endpoint_that_fails_says_why_and_goes(here, asked):
    packed, model, config, _ = asked
    packed.write_bytes(b"no archive")
    with pytest.raises(RuntimeError, match=r"(?s)Failed to download model data.*log group"):
        with endpoint.serving(here, packed, model, config):
            pass
    assert left() == []


def test_a_request_that_aws_refuses_leaves_nothing(here, asked):
    packed, model, config, _ = asked
    config["ProductionVariants"][0]["InstanceType"] = "ml.g5.xlarge"  # of which there are none
    with pytest.raises(ClientError, match="ResourceLimitExceeded"):
        with endpoint.serving(here, packed, model, config):
            pass
    here.refresh()
    assert left() == [] and [i for i in here.run["deployed"] if not i.startswith("log/")] == []


def test_what_cannot_be_deleted_stays_in_run_json_and_is_named(here, asked, monkeypatch):
    packed, model, config, _ = asked
    with monkeypatch.context() as patch:
        patch.setattr(clean_up, "outcome", lambda _, item: "denied" if "endpoint/" in item else "")
        with pytest.raises(
            RuntimeError, match=r"run 06_clean_up\.ipynb now: endpoint/video-.*denied"
        ):
            with endpoint.serving(here, packed, model, config):
                pass
    here.refresh()
    assert f"endpoint/{config['EndpointConfigName']}" in here.run["deployed"]
    here.add("deployed", *(f"{kind}/{model['ModelName']}" for kind in ("endpoint-config", "model")))
    endpoint.take_down(here, model["ModelName"])
    assert left() == []


def test_clean_up_takes_down_what_a_dead_kernel_left(here, asked, port, monkeypatch):
    """Its names are in run.json; the take-down of the guide does not run."""
    packed, model, config, home = asked
    monkeypatch.setattr(endpoint, "take_down", lambda *_: None)
    with endpoint.serving(here, packed, model, config):
        pass
    assert len(left()) == 3
    monkeypatch.setattr(account.aws, "disconnect", lambda _: None)  # other tests go on with it
    clean_up.delete(clean_up.connect(here.output), confirm=True)
    assert not (here.output / "run.json").exists() and left() == []
    groups = boto3.client("logs").describe_log_groups(
        logGroupNamePrefix=f"/aws/sagemaker/Endpoints/{model['ModelName']}"
    )
    assert groups["logGroups"] == []


def test_the_transform_job_answers_in_order_and_only_its_record_stays(
    here, asked, sent, tmp_path, capsys
):
    packed, model, _, home = asked
    files = [tmp_path / f"{number}.mp4" for number in range(3)]
    for file in files:
        file.write_bytes(b"clip")
    answers = endpoint.transform(here, packed, model, files, "ml.m5.xlarge")
    assert answers == [ANSWER] * 3
    name = model["ModelName"].replace("video-endpoint", "video-transform")
    printed = capsys.readouterr().out
    assert name.startswith("video-transform-") and model["ModelName"] not in printed
    assert f"{name} starts, and is billed at $0.23 an hour until its end" in printed
    assert re.search(r"completed after \d+\.\d minutes, about \$0\.\d\d", printed)
    requests = json.loads(json.dumps(plain(sent, home)).replace(name, "NAME"))
    assert requests["CreateModel"]["ModelName"] == "NAME"
    assert requests["CreateTransformJob"] == {
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
        "Tags": TAGS,
    }
    here.refresh()
    assert left() == [] and here.run["jobs"] == [f"transform-job/{name}"]


def test_a_failed_transform_job_says_why_and_leaves_no_model(here, asked, tmp_path):
    packed, model, _, _ = asked
    (tmp_path / "no.mp4").write_text("this is not a video")
    with pytest.raises(RuntimeError, match=r"(?s)See job logs.*TransformJobs, video-transform-"):
        endpoint.transform(here, packed, model, [tmp_path / "no.mp4"], "ml.m5.xlarge")
    assert left() == []


def test_what_would_be_refused_is_refused_before_it_costs(here, capsys):
    endpoint.check_money(here, "ml.m5.xlarge", deploy=True, transform=True)
    assert "ml.m5.xlarge: $0.23 an hour, $5.52 a day" in capsys.readouterr().out
    endpoint.check_money(here, "ml.m5.xlarge")
    assert "nothing is made in your account" in capsys.readouterr().out
    here.run |= {"quotas": {}, "deployed": ["endpoint/video-old"]}
    endpoint.check_money(here, "ml.g5.xlarge")  # nothing is wanted: nothing to refuse
    with pytest.raises(RuntimeError, match="'ml.m5.xlarge for endpoint usage' is 0"):
        endpoint.check_money(here, "ml.m5.xlarge", deploy=True)
    assert "endpoint/video-old is perhaps still there, and billed" in capsys.readouterr().out
    here.run["dollars_per_hour"] = {}
    with pytest.raises(RuntimeError, match="No price of ml.m5.xlarge: how_to/train_for_less"):
        endpoint.check_money(here, "ml.m5.xlarge", transform=True)


def test_nothing_is_made_by_default(here, sent):
    """The cells that make something do nothing where deploy and transform are False."""

    class Refusing:
        def __getattr__(self, name):
            raise AssertionError(f"endpoint.{name} is asked for")

    parameters = run_cell("how_to/deploy", "parameters")
    tested = SimpleNamespace(clips=[SimpleNamespace(file="a.mp4")])
    given = parameters | {"endpoint": Refusing(), "tested": tested, "checks": {}}
    given |= {"onnx_difference": 0.0, "same": True}
    for cell in ("serving", "transform"):
        run_cell("how_to/deploy", cell, **given)
    assert sent == {} and "deployed" not in here.run and here.run["homes"] == []


def test_the_archive_has_model_handler_and_packages(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with tarfile.open(endpoint.pack(tmp_path / "model", tmp_path / "inference.tar.gz")) as tar:
        code = [f"code/{name}" for name in ("inference.py", "train.py", "requirements.txt")]
        assert tar.getnames() == ["config.json", *code]


def test_the_image_is_the_newest_for_inference_in_the_region(here):
    found = endpoint.image(here, "ml.m5.xlarge")
    assert ".us-east-1." in found and "/pytorch-inference:" in found and "-cpu-" in found


def test_the_gap_between_answers_is_said_in_words():
    other = {"smoothed": [[0.9, 0.1], [0.8, 0.2]]}
    assert endpoint.compared([ANSWER, ANSWER], [ANSWER, ANSWER]) == "identical"
    assert endpoint.compared([ANSWER, ANSWER], [ANSWER, other]) == "differs by 1e-01"
    with pytest.raises(ValueError, match="zip"):
        endpoint.compared([ANSWER], [])
