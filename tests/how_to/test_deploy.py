"""The guide's endpoint and batch transform job on an embedded AWS: requests, answers, their end."""

import ast
import io
import json
import re
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import boto3
import psutil
import pytest
import yaml
from botocore.client import BaseClient
from botocore.exceptions import ClientError, EndpointConnectionError
from cells import run_cell
from conftest import ROOT
from embedded import own_aws
from tutorial import SCRIPTS, account, clean_up, endpoint

NOTEBOOKS = ROOT / "notebooks"

BUCKET, ROLE = "test-bucket", "arn:aws:iam::123456789012:role/test"
TAGS = [{"Key": "project", "Value": "video-tutorial"}]
ANSWER = {"smoothed": [[0.9, 0.1]] * 2}
IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/ray:serve-ml-sagemaker-cpu-v1.4"
CONFIG = """
applications:
  - {name: judge, route_prefix: /, import_path: "deployment:app"}
"""
JUDGE = """
import json, os
from ray import serve
from starlette.responses import JSONResponse

@serve.deployment
class Judge:
    async def __call__(self, request):
        body, kind = await request.body(), request.headers["content-type"]
        if kind == "application/json":  # as inference.py: a video below ALLOWED_PREFIX
            import boto3
            place = json.loads(body)["s3_uri"]
            assert place.startswith(os.environ["ALLOWED_PREFIX"] + "/")
            bucket, key = place.removeprefix("s3://").split("/", 1)
            body = boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
        if body.startswith(b"this is not"):
            return JSONResponse({"error": "not a video"}, 400)
        return JSONResponse({"smoothed": [[0.9, 0.1]] * 2})

app = Judge.bind()
"""
# A server in another process tells the notebook's own what it must do: nothing here computes.
LIVING = """
import sys, time
from botocore.exceptions import ClientError
from tutorial import account, endpoint

here = account.connect(sys.argv[1])
name = sys.argv[2]
model = {"ModelName": name, "ExecutionRoleArn": here.run["role_arn"], "PrimaryContainer": {
    "Image": sys.argv[3], "ModelDataUrl": f"s3://{here.run['bucket']}/video-tutorial/{name}/m"}}
variant = {"VariantName": "AllTraffic", "ModelName": name, "InstanceType": "ml.m5.xlarge"}
config = {"EndpointConfigName": name, "ProductionVariants": [variant | {"InitialInstanceCount": 1}]}
endpoint._wait_for_endpoint = lambda *_: None
with endpoint.serving(here, sys.argv[4], model, config):
    print("in the block", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def port():
    with own_aws(grace_seconds=5) as port:
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield port


@pytest.fixture
def here(port, tmp_path, monkeypatch):
    """An account as notebook 1 leaves it, where waiting is short."""
    monkeypatch.setattr("time.sleep", lambda long, sleep=time.sleep: sleep(min(long, 0.5)))
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


def packed(folder, config, deployment, requirements=""):
    """The archive of a model that is one Python text."""
    files = {"config.yaml": config, "code/deployment.py": deployment}
    files["code/requirements.txt"] = requirements
    with tarfile.open(folder / "inference.tar.gz", mode="w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return folder / "inference.tar.gz"


@pytest.fixture
def asked(here, tmp_path, monkeypatch):
    """The guide's own requests: (archive of JUDGE, model, config, home)."""
    monkeypatch.setattr(endpoint, "pack", lambda *_: packed(tmp_path, CONFIG, JUDGE))
    settings = {"window_seconds": 2.5, "hop_seconds": 0.15, "threshold": 0.8}
    tested = SimpleNamespace(trained=SimpleNamespace(folder=tmp_path))
    made = run_cell("how_to/deploy", "request", endpoint=endpoint, here=here, tested=tested,
                    settings=settings, endpoint_instance="ml.m5.xlarge")  # fmt: skip
    return made["packed"], made["model"], made["config"], made["home"]


@pytest.fixture
def failing(asked, monkeypatch):
    """The same, for an endpoint that fails at once; nobody waits for its start."""
    asked[0].write_bytes(b"no archive")
    monkeypatch.setattr(endpoint, "_wait_for_endpoint", lambda *_: None)
    return asked


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


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 60 seconds"
        time.sleep(0.2)


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


@pytest.mark.long
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
                "Image": IMAGE,
                "ModelDataUrl": "HOME/model.tar.gz",
                "Environment": {
                    "ALLOWED_PREFIX": "HOME",
                    "RAYSERVE_BACKEND_TIMEOUT": "3600",
                    "INVOCATION_SECONDS": "3500",
                    "WORKERS": "1",
                    "MAX_BODY_MB": "100",
                    "WINDOW_SECONDS": "2.5",
                    "HOP_SECONDS": "0.15",
                    "THRESHOLD": "0.8",
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
                    "ContainerStartupHealthCheckTimeoutInSeconds": 1200,
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
def test_whatever_ends_the_block_the_endpoint_goes(here, failing, error):
    archive, model, config, _ = failing
    with pytest.raises(error), endpoint.serving(here, archive, model, config):
        assert len(left()) == 3
        raise error
    assert left() == []


def test_an_endpoint_that_is_interrupted_while_it_starts_goes_after_its_start(
    here, asked, monkeypatch
):
    """AWS refuses to delete an endpoint that is Creating."""
    archive, model, config, _ = asked
    packed(archive.parent, CONFIG, "", "no such package")  # a second or two of pip
    name, seen = config["EndpointConfigName"], []

    def interrupted(sagemaker, _):
        seen.append(sagemaker.describe_endpoint(EndpointName=name)["EndpointStatus"])
        raise KeyboardInterrupt

    monkeypatch.setattr(endpoint, "_wait_for_endpoint", interrupted)
    with pytest.raises(KeyboardInterrupt), endpoint.serving(here, archive, model, config):
        pass
    here.refresh()
    assert seen == ["Creating"] and left() == [] and here.run["deployed"] == [f"log/{name}"]


def watchdogs(name):
    """The command lines of the watchdogs of an endpoint."""
    found = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [command for command in found if "tutorial.watchdog" in command and name in command]


def test_a_killed_notebook_leaves_no_endpoint(here, failing):
    """The process dies by SIGKILL: nothing of it can take the endpoint down."""
    archive, name = failing[0], failing[1]["ModelName"]
    command = [sys.executable, "-c", LIVING, here.output, name, IMAGE, archive]
    with subprocess.Popen(command, cwd=NOTEBOOKS, stdout=subprocess.PIPE, text=True) as kernel:
        while "in the block" not in kernel.stdout.readline():
            assert kernel.poll() is None
        assert len(left()) == 3 and len(watchdogs(name)) == 1
        kernel.kill()
    wait_until(lambda: not watchdogs(name))
    here.refresh()
    assert left() == [] and here.run["deployed"] == [f"log/{name}"]


def test_a_watchdog_ends_with_its_block(here, failing):
    archive, model, config, _ = failing
    with endpoint.serving(here, archive, model, config):
        assert len(watchdogs(model["ModelName"])) == 1
    assert watchdogs(model["ModelName"]) == []


def test_nobody_waits_for_ever(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(TimeoutError, match="Creating after 2 min: AWS was asked no longer"):
        endpoint._wait(lambda: {"EndpointStatus": "Creating"}, "EndpointStatus", ["Creating"], 2)


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


def test_what_cannot_be_deleted_stays_in_run_json_and_is_named(here, failing, monkeypatch):
    packed, model, config, _ = failing
    with monkeypatch.context() as patch:
        patch.setattr(clean_up, "outcome", lambda _, item: "denied" if "endpoint/" in item else "")
        with pytest.raises(
            RuntimeError, match=r"run 06_clean_up\.ipynb now: endpoint/video-.*denied"
        ):
            with endpoint.serving(here, packed, model, config):
                pass
    here.refresh()
    assert f"endpoint/{config['EndpointConfigName']}" in here.run["deployed"]
    with monkeypatch.context() as patch:

        def no_network(*_):
            raise EndpointConnectionError(endpoint_url="https://aws")

        patch.setattr(clean_up, "outcome", no_network)
        with pytest.raises(
            RuntimeError, match=r"(?s)run 06_clean_up\.ipynb now.*Could not connect"
        ):
            endpoint.take_down(here, model["ModelName"])
    here.add("deployed", *(f"{kind}/{model['ModelName']}" for kind in ("endpoint-config", "model")))
    endpoint.take_down(here, model["ModelName"])
    assert left() == []


def scalable():
    scaling = boto3.client("application-autoscaling")
    found = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    policies = scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    alarms = boto3.client("cloudwatch").describe_alarms()["MetricAlarms"]
    return found, policies, alarms


def test_an_endpoint_that_scales_to_zero_is_written_down_and_taken_down(here, failing):
    archive, model, config, _ = failing
    name = config["EndpointConfigName"]
    endpoint.start(here, archive, model, config)
    endpoint.scale_to_zero(here, name)
    (target,), policies, (alarm,) = scalable()
    assert target["ResourceId"] == f"endpoint/{name}/variant/AllTraffic"
    assert (target["MinCapacity"], target["MaxCapacity"]) == (0, 1)
    assert {policy["PolicyType"] for policy in policies} == {"TargetTrackingScaling", "StepScaling"}
    (down,) = [one for one in policies if one["PolicyType"] == "TargetTrackingScaling"]
    metric = down["TargetTrackingScalingPolicyConfiguration"]["CustomizedMetricSpecification"]
    assert metric["MetricName"] == "ApproximateBacklogSizePerInstance"
    assert alarm["MetricName"] == "HasBacklogWithoutCapacity"
    assert alarm["Dimensions"] == metric["Dimensions"] == [{"Name": "EndpointName", "Value": name}]
    assert f"scaling/{name}" in here.run["deployed"]
    endpoint.take_down(here, name)
    here.refresh()
    assert left() == [] and scalable() == ([], [], []) and here.run["deployed"] == [f"log/{name}"]


def test_clean_up_takes_down_what_a_dead_computer_left(here, failing, port, monkeypatch):
    """Its names are in run.json; neither the take-down of the guide nor the watchdog runs."""
    packed, model, config, home = failing
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


@pytest.mark.long
def test_the_transform_job_answers_in_order_and_only_its_record_stays(
    here, asked, sent, tmp_path, capsys
):
    packed, model, _, home = asked
    files = [tmp_path / f"{number}.mp4" for number in range(3)]
    for file in files:
        file.write_bytes(b"clip")
    answers = endpoint.transform(here, packed, model, files, "ml.m5.xlarge")
    assert answers == [ANSWER] * 3
    here.refresh()
    (name,) = [job.removeprefix("transform-job/") for job in here.run["jobs"]]
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
        "MaxConcurrentTransforms": 1,
        "BatchStrategy": "SingleRecord",
        "ModelClientConfig": {"InvocationsTimeoutInSeconds": 300, "InvocationsMaxRetries": 0},
        "TransformInput": {
            "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "HOME/NAME/clips/"}},
            "ContentType": "video/mp4",
        },
        "TransformOutput": {"S3OutputPath": "HOME/NAME/transformed"},
        "TransformResources": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1},
        "Tags": TAGS,
    }
    assert left() == []


def test_a_failed_transform_job_says_why_and_leaves_no_model(here, failing, video):
    archive, model, _, _ = failing
    with pytest.raises(RuntimeError, match=r"(?s)Failed to download.*TransformJobs, video-transf"):
        endpoint.transform(here, archive, model, [video], "ml.m5.xlarge")
    assert left() == []


def test_a_transform_job_that_does_not_end_is_stopped(here, asked, video, monkeypatch):
    """And the cell may run again for the same model: AWS keeps the job, and its name."""
    archive, model, _, _ = asked
    wait = partial(endpoint._wait, minutes=1)
    monkeypatch.setattr(endpoint, "_wait", lambda *given: wait(*given[:3]))
    monkeypatch.setattr("time.sleep", lambda _: None)
    for _ in range(2):
        with pytest.raises(TimeoutError, match="InProgress after 1 min"):
            endpoint.transform(here, archive, model, [video], "ml.m5.xlarge")
    here.refresh()
    names = [job.removeprefix("transform-job/") for job in here.run["jobs"]]
    describe = boto3.client("sagemaker").describe_transform_job
    stopped = [describe(TransformJobName=name)["TransformJobStatus"] for name in names]
    assert stopped == ["Stopped"] * 2 and left() == []


def test_what_would_be_refused_is_refused_before_it_costs(here, capsys):
    endpoint.check_money(here, "ml.m5.xlarge", deploy=True, transform=True)
    assert "ml.m5.xlarge: $0.23 an hour, $5.52 a day" in capsys.readouterr().out
    endpoint.check_money(here, "ml.m5.xlarge")
    assert "nothing is made in your account" in capsys.readouterr().out
    here.run |= {"quotas": {}, "deployed": ["endpoint/video-old"]}
    endpoint.check_money(here, "ml.g5.xlarge")  # nothing is wanted: nothing to refuse
    with pytest.raises(RuntimeError, match="'ml.m5.xlarge for endpoint usage' is not listed"):
        endpoint.check_money(here, "ml.m5.xlarge", deploy=True)
    here.run["quotas"] = {"ml.m5.xlarge for endpoint usage": 0}
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


def test_the_archive_is_what_the_image_looks_for(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with tarfile.open(endpoint.pack(tmp_path / "model", tmp_path / "inference.tar.gz")) as tar:
        names = ("inference", "train", "worker", "deployment")
        code = [f"code/{name}.py" for name in names] + ["code/requirements.txt"]
        assert tar.getnames() == ["config.json", "config.yaml", *code]
        config = yaml.safe_load(tar.extractfile("config.yaml"))
    assert config["applications"][0]["import_path"] == "deployment:app"


# AWS's Ray Serve image 1.4, by its uv.lock (August 2026); sklearn and others it lacks.
IN_THE_IMAGE = "ray starlette fastapi torch numpy transformers safetensors tqdm boto3 botocore"
PACKAGES = {"av": "av", "sklearn": "scikit-learn", "decord": "decord"}  # by what is imported


def test_each_import_of_the_archive_is_in_the_image_or_in_its_requirements():
    listed = (Path(SCRIPTS) / "serving/requirements.txt").read_text()
    packages = re.findall(r"^([\w-]+)", listed, re.MULTILINE)
    own = {Path(name).stem for name in endpoint.SERVED} | {"videomae_v2"}
    for name in [name for name in endpoint.SERVED if name.endswith(".py")]:
        for node in ast.parse((Path(SCRIPTS) / name).read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                top = imported.partition(".")[0]
                known = {*own, *sys.stdlib_module_names, *IN_THE_IMAGE.split(), *packages}
                assert top in known or PACKAGES.get(top) in packages, f"{name} imports {top}"


def test_the_image_is_aws_s_ray_serve_image_in_the_region(here):
    assert endpoint.image(here, "ml.m5.xlarge") == IMAGE
    assert endpoint.image(here, "ml.g5.xlarge") == IMAGE.replace("-cpu-", "-cuda-")


def test_a_gpu_machine_gets_a_host_whose_driver_fits_the_image(here):
    ray = endpoint.image(here, "ml.g5.xlarge")
    assert endpoint.gpu_host(endpoint.image(here, "ml.m5.xlarge"), "ml.m5.xlarge") == {}
    old = {"InferenceAmiVersion": "al2-ami-sagemaker-inference-gpu-3-1"}
    assert endpoint.gpu_host(ray, "ml.g5.xlarge") == old
    assert endpoint.gpu_host("mine:2.6-cu124-py312", "ml.p4d.24xlarge") == old
    new = {"InferenceAmiVersion": "al2023-ami-sagemaker-inference-gpu-4-1"}
    assert endpoint.gpu_host("pytorch:2.14-cu133-amzn2023", "ml.g6.xlarge") == new
    batch = {"TransformAmiVersion": "al2-ami-sagemaker-batch-gpu-535"}
    assert endpoint.gpu_host(ray, "ml.g4dn.xlarge", transform=True) == batch
    with pytest.raises(ValueError, match=r"batch transform is known that fits CUDA 13"):
        endpoint.gpu_host("pytorch:2.14-cu133-amzn2023", "ml.g6.xlarge", transform=True)
    with pytest.raises(ValueError, match=r"my/image:1 on ml.g5.xlarge: .* fits CUDA \?"):
        endpoint.gpu_host("my/image:1", "ml.g5.xlarge")
    enum = boto3.client("sagemaker").meta.service_model.shape_for(
        "ProductionVariantInferenceAmiVersion"
    )
    assert set(endpoint.HOSTS.values()) <= set(enum.enum)


def test_a_gpu_endpoint_of_the_guide_names_its_host(here, failing):
    """Without the host, the container would not start: see local_mode/test_endpoints.py."""
    settings, tested = {}, SimpleNamespace(trained=SimpleNamespace(folder=here.output))
    given = {"endpoint": endpoint, "here": here, "tested": tested, "settings": settings}
    made = run_cell("how_to/deploy", "request", endpoint_instance="ml.g4dn.xlarge", **given)
    (variant,) = made["config"]["ProductionVariants"]
    assert variant["InferenceAmiVersion"] == "al2-ami-sagemaker-inference-gpu-3-1"


def test_a_private_network_reaches_the_model_and_isolation_is_refused(here, failing, sent):
    archive, model, config, _ = failing
    network = {"subnets": ["subnet-1"], "security_group_ids": ["sg-1"]}
    with endpoint.serving(here, archive, model, config, network=network):
        vpc = {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}
        assert sent["CreateModel"]["VpcConfig"] == vpc
    network["enable_network_isolation"] = True
    with pytest.raises(ValueError, match="packages from PyPI .* an image of your own"):
        with endpoint.serving(here, archive, model, config, network=network):
            pass
    assert left() == []


def test_the_gap_between_answers_is_said_in_words():
    other = {"smoothed": [[0.9, 0.1], [0.8, 0.2]]}
    assert endpoint.compared([ANSWER, ANSWER], [ANSWER, ANSWER]) == "identical"
    assert endpoint.compared([ANSWER, ANSWER], [ANSWER, other]) == "differs by 1e-01"
    with pytest.raises(ValueError, match="zip"):
        endpoint.compared([ANSWER], [])
