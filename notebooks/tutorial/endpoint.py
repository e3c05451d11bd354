"""A model that answers on AWS: an asynchronous endpoint, a batch transform job, and their end.

Each name stands in run.json before the thing is made, so 06_clean_up finds what an interruption
left. What serving and transform make, they take down, also after an error or Ctrl-C. If the kernel
of the notebook dies, watchdog.py takes the endpoint down.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
from botocore.exceptions import BotoCoreError, ClientError
from sagemaker.core import image_uris

from tutorial import SCRIPTS, account, clean_up
from tutorial.results import split_uri

TAGS = [{"Key": "project", "Value": "video-tutorial"}]

RAY = "1.4"  # AWS's Ray Serve image: the newest minor that sagemaker 3.27.0 knows
CUDA = {"serve-ml-sagemaker-cuda-v1.4": 12}  # of images without -cu129- or the like in their name
# A host of SageMaker whose NVIDIA driver fits, by the image's CUDA version. An endpoint that names
# none gets driver 470 (CUDA 11.4) on g4dn and g5: docs.aws.amazon.com, "inference-gpu-drivers".
HOSTS = {12: "al2-ami-sagemaker-inference-gpu-3-1", 13: "al2023-ami-sagemaker-inference-gpu-4-1"}
BATCH_HOST = "al2-ami-sagemaker-batch-gpu-535"  # the newest for transform jobs: CUDA 12

# The environment of the server: the first for AWS's image, the others for scripts/serving/worker.py
SERVER = {
    "RAYSERVE_BACKEND_TIMEOUT": "3600",  # seconds for an answer; without it 300
    "INVOCATION_SECONDS": "3500",  # then the worker that hangs is replaced
    "WORKERS": "1",  # one video at a time gets all cores
    "MAX_BODY_MB": "100",  # of a video in a request; a larger one comes by its address in S3
}
START_MINUTES, TRANSFORM_MINUTES = 45, 60  # then nobody waits any longer
SERVED = ("inference.py", "train.py", "serving/worker.py", "serving/deployment.py",
          "serving/requirements.txt")  # fmt: skip


# ---- Before: money, archive, image --------------------------------------------------------------


def check_money(here, instance: str, deploy: bool = False, transform: bool = False) -> None:
    """Prints what an instance costs, and its quotas. Raises RuntimeError if one forbids the use.

    An endpoint has no end of its own. So there is a price by the hour and by the day, and no "at
    most" as for a training job (launch.check_money).
    """
    for item in here.run.get("deployed", []):
        if item.startswith("endpoint/"):
            print(f"{item} is perhaps still there, and billed: 06_clean_up deletes it")
    quotas, price = here.run["quotas"], account.price(here, instance)
    if price is not None:
        print(f"{instance}: ${price} an hour, ${24 * price:.2f} a day")
    elif deploy or transform:
        raise RuntimeError(f"No price of {instance}: how_to/train_for_less.ipynb fetches it.")
    for wanted, use in ((deploy, "endpoint usage"), (transform, "transform job usage")):
        name = f"{instance} for {use}"
        known = account.quota_of(quotas, instance, use)
        print(f"quota of {name}: {known}")
        if wanted and known in (0, "not listed"):
            raise RuntimeError(
                f"The quota {name!r} is {known}: ask for 1 (how_to/train_for_less.ipynb), then run "
                "01_setup.ipynb again."
            )
    if not deploy and not transform:
        print("deploy and transform are False: nothing is made in your account")


def pack(folder, archive) -> Path:
    """Writes model.tar.gz for an endpoint: the model, config.yaml, and in code/ what answers."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for path in sorted(Path(folder).iterdir()):
            tar.add(path, arcname=path.name)
        tar.add(Path(SCRIPTS) / "serving/config.yaml", arcname="config.yaml")
        for name in SERVED:
            tar.add(Path(SCRIPTS) / name, arcname=f"code/{Path(name).name}")
    print(f"{Path(archive).name}: {Path(archive).stat().st_size / 1e6:.1f} MB")
    return Path(archive)


def image(here, instance: str) -> str:
    """The address of AWS's Ray Serve image, for a machine with or without a GPU."""
    return image_uris.retrieve(
        "ray-serve",
        here.run["region"],
        version=RAY,
        instance_type=instance,
        image_scope="inference",
    )


def gpu_host(image: str, instance: str, transform: bool = False) -> dict:
    """The host whose NVIDIA driver fits the image, for a production variant; {} without a GPU.

    {"InferenceAmiVersion": ...}, or with `transform` {"TransformAmiVersion": ...}. With another
    host the container does not start, and writes no log. Raises ValueError if the image's CUDA
    version is not known, or no host fits it.
    """
    if not re.match(r"ml\.[gp]\d", instance):
        return {}
    tag = image.rpartition(":")[2]
    found = re.search(r"-cu(\d\d)\d", tag)
    cuda = int(found[1]) if found else CUDA.get(tag)
    hosts = {12: BATCH_HOST} if transform else HOSTS
    if cuda not in hosts:
        use = "batch transform" if transform else "an endpoint"
        raise ValueError(
            f"{image} on {instance}: no host for {use} is known that fits CUDA {cuda or '?'}. Take "
            "an instance without a GPU, or an image with CUDA 12 and -cu129- or the like in its tag"
        )
    return {"TransformAmiVersion" if transform else "InferenceAmiVersion": hosts[cuda]}


def new_name(here) -> tuple[str, str]:
    """A name for a model and its endpoint, and its folder s3://bucket/prefix/name."""
    name = f"video-endpoint-{_stamp()}"
    return name, f"s3://{here.run['bucket']}/{here.run['prefix']}/{name}"


def _stamp():
    """The time, and four random characters: an account may be shared, and a cell run twice."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _make_model(here, packed, request, network):
    """Uploads the archive, once, and creates the model of a create_model request.

    `network`: {"subnets": [...], "security_group_ids": [...]}, or None. Raises ValueError for
    network isolation, because AWS's image installs packages when it starts.
    """
    if network:
        if network.get("enable_network_isolation"):
            raise ValueError(
                "AWS's image installs packages from PyPI when it starts. A model without a network "
                "needs an image of your own: see scripts/serving/Dockerfile."
            )
        vpc = {"Subnets": network["subnets"], "SecurityGroupIds": network["security_group_ids"]}
        request = request | {"VpcConfig": vpc}
    place = request["PrimaryContainer"]["ModelDataUrl"]
    here.add("homes", f"{place.rpartition('/')[0]}/")
    bucket, key = split_uri(place)
    s3 = here.session.client("s3")
    try:
        there = s3.head_object(Bucket=bucket, Key=key)["ContentLength"]
    except ClientError:
        there = None
    if there != Path(packed).stat().st_size:
        s3.upload_file(str(packed), bucket, key)
    here.add("deployed", f"model/{request['ModelName']}")
    here.session.client("sagemaker").create_model(**request, Tags=TAGS)


def _home(request):
    """s3://bucket/prefix/name, the folder of a create_model request."""
    return request["PrimaryContainer"]["ModelDataUrl"].rpartition("/")[0]


# ---- The endpoint -------------------------------------------------------------------------------


@contextmanager
def serving(here, packed, model: dict, config: dict, network=None):
    """An endpoint as long as the `with` block lasts: `with serving(...) as ask: ask("a.mp4")`.

    Arguments, errors and what it yields: see start. Whatever ends the block, the endpoint is
    deleted, and AWS is asked whether it is gone. If this process dies, watchdog.py does that.
    """
    name, dog = config["EndpointConfigName"], None
    try:
        here.add("deployed", f"endpoint/{name}")
        dog = _start_watchdog(here, name)
        yield start(here, packed, model, config, network)
    finally:
        take_down(here, name)
        if dog:
            dog.terminate()  # not if take_down has failed: then it goes on
            dog.wait()


def start(here, packed, model: dict, config: dict, network=None):
    """Makes an endpoint, which is billed until take_down; returns a function: see ask.

    `packed`: of pack. `model`, `config`: requests of create_model and create_endpoint_config.
    `network`: {"subnets": [...], "security_group_ids": [...]}, where your account demands a private
    network; it needs a way to S3, and to PyPI for the packages. Raises RuntimeError with AWS's
    reason if the endpoint does not start, TimeoutError if that takes START_MINUTES.
    """
    name, sagemaker = config["EndpointConfigName"], here.session.client("sagemaker")
    _make_model(here, packed, model, network)
    here.add("deployed", *(f"{kind}/{name}" for kind in ("endpoint-config", "log", "endpoint")))
    sagemaker.create_endpoint_config(**config, Tags=TAGS)
    sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name, Tags=TAGS)
    print(f"{name} starts, and is billed from now on; on AWS it takes 5 to 10 minutes")
    _wait_for_endpoint(sagemaker, name)
    return partial(ask, here, name, f"{_home(model)}/questions")


def _start_watchdog(here, name):
    """A process that outlives this one, and takes the endpoint down if this one dies."""
    command = [sys.executable, "-m", "tutorial.watchdog", here.output, name, str(os.getpid())]
    with open(here.output / "watchdog.log", "a") as log:
        return subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # out of reach of what interrupts or ends the kernel
        )


def _wait(describe, field, busy, minutes):
    """AWS's record, once its `field` is none of `busy`. Raises TimeoutError after `minutes`."""
    status = clean_up.wait(busy, lambda: describe()[field], field, minutes)
    if status in busy:
        raise TimeoutError(f"{status} after {minutes} min: AWS was asked no longer")
    return describe()


def _wait_for_endpoint(sagemaker, name):
    """Returns when it is in service; raises RuntimeError with the reason if it is not."""
    look = partial(sagemaker.describe_endpoint, EndpointName=name)
    state = _wait(look, "EndpointStatus", ["Creating"], START_MINUTES)
    if state["EndpointStatus"] != "InService":
        reason = state.get("FailureReason", state["EndpointStatus"])
        log = f"/aws/sagemaker/Endpoints/{name}"
        raise RuntimeError(f"{reason}\nThe rest is in the log group {log}.")
    print("in service")


def scale_to_zero(here, name: str) -> None:
    """Lets an endpoint in service give its machine up while nobody asks, and take one again.

    The policies are those of docs.aws.amazon.com, "async-inference-autoscale". A question at zero
    machines waits until one has started. run.json lists it as scaling/<name>; take_down ends it.
    """
    here.add("deployed", f"scaling/{name}")
    scaling = here.session.client("application-autoscaling")
    target = {
        "ServiceNamespace": "sagemaker",
        "ResourceId": f"endpoint/{name}/variant/AllTraffic",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
    }
    metric = {"Namespace": "AWS/SageMaker", "Statistic": "Average"}
    metric["Dimensions"] = [{"Name": "EndpointName", "Value": name}]
    scaling.register_scalable_target(**target, MinCapacity=0, MaxCapacity=1)
    scaling.put_scaling_policy(
        **target,
        PolicyName="to-zero",
        PolicyType="TargetTrackingScaling",
        TargetTrackingScalingPolicyConfiguration={
            "TargetValue": 5.0,  # questions that wait
            "CustomizedMetricSpecification": metric
            | {"MetricName": "ApproximateBacklogSizePerInstance"},
            "ScaleInCooldown": 600,  # seconds
            "ScaleOutCooldown": 300,
        },
    )
    policy = scaling.put_scaling_policy(
        **target,
        PolicyName="from-zero",
        PolicyType="StepScaling",
        StepScalingPolicyConfiguration={
            "AdjustmentType": "ChangeInCapacity",
            "MetricAggregationType": "Average",
            "Cooldown": 300,
            "StepAdjustments": [{"MetricIntervalLowerBound": 0, "ScalingAdjustment": 1}],
        },
    )
    here.session.client("cloudwatch").put_metric_alarm(
        **metric,
        AlarmName=f"{name}-from-zero",
        MetricName="HasBacklogWithoutCapacity",
        EvaluationPeriods=2,
        Period=60,  # seconds
        Threshold=1,
        ComparisonOperator="GreaterThanOrEqualToThreshold",
        AlarmActions=[policy["PolicyARN"]],
    )
    print(f"{name} gives its machine up when nobody asks; a question takes one again")


def ask(here, name: str, folder: str, path, seconds: int = 3700) -> dict:
    """The endpoint's answer for a video file: what inference.classify_video returns.

    The file goes to `folder` in S3, and the question names it: it holds 128,000 bytes at most. The
    endpoint writes its answer, or its error, to S3 too. Raises RuntimeError with the endpoint's
    error, TimeoutError without an answer in `seconds`.
    """
    s3 = here.session.client("s3")
    video = f"{folder}/{Path(path).name}"
    s3.upload_file(str(path), *split_uri(video))
    places = here.session.client("sagemaker-runtime").invoke_endpoint_async(
        EndpointName=name,
        Body=json.dumps({"s3_uri": video}),
        ContentType="application/json",
        InvocationTimeoutSeconds=3600,
    )
    for second in range(1, seconds + 1):
        for place in ("OutputLocation", "FailureLocation"):
            bucket, key = split_uri(places[place])
            try:
                text = s3.get_object(Bucket=bucket, Key=key)["Body"].read().decode()
            except s3.exceptions.NoSuchKey:
                continue
            if place == "FailureLocation":
                raise RuntimeError(text)
            return json.loads(text)
        if second % 60 == 0:
            print(f"no answer, {second // 60} min", flush=True)
        time.sleep(1)
    raise TimeoutError(f"no answer for {video} within {seconds} seconds")


def take_down(here, name: str) -> None:
    """Deletes scaling, endpoint, configuration and model of this name, if run.json lists them.

    AWS deletes an endpoint only after its start: the deletion waits for it. Then AWS is asked
    again. What is gone leaves run.json; the endpoint's log stays, for 06_clean_up. Raises
    RuntimeError that names what is left.
    """
    left = []
    here.refresh()
    for item in [f"{kind}/{name}" for kind in ("scaling", "endpoint", "endpoint-config", "model")]:
        if item not in here.run.get("deployed", []):
            continue
        waits = ", once it has started" if item.startswith("endpoint/") else ""
        print(f"deleting {item}{waits}", flush=True)
        try:
            reason = clean_up.outcome(here, item)
        except BotoCoreError as error:  # no network, or the sign-in has expired
            reason = str(error)
        if reason:
            left.append(f"{item} ({reason})")
        else:
            here.drop("deployed", item)
    if left:
        raise RuntimeError(f"still there, run 06_clean_up.ipynb now: {', '.join(left)}")
    print(f"{name} is gone: AWS was asked again")


# ---- Batch transform ----------------------------------------------------------------------------


def transform(here, packed, model: dict, files, instance: str, network=None) -> list[dict]:
    """The answers of a batch transform job for video files, in their order; the job ends itself.

    `packed`: of pack. `model`: a create_model request; job and model get a name of their own, since
    AWS keeps a job's name for ever. `network`: see serving. A video gets 300 seconds, and the job
    an hour; then, and after an error or Ctrl-C, the job is stopped. Raises RuntimeError with AWS's
    reason if it fails, TimeoutError if it does not end.
    """
    name = f"video-transform-{_stamp()}"
    home = f"{_home(model)}/{name}"
    model, s3 = model | {"ModelName": name}, here.session.client("s3")
    here.add("jobs", f"transform-job/{name}")
    try:
        _make_model(here, packed, model, network)
        for number, file in enumerate(files):
            s3.upload_file(str(file), *split_uri(f"{home}/clips/{number:03}"))
        _run_transform_job(here, model, home, instance)
    finally:
        with suppress(ClientError):  # it was not created
            clean_up.end_job(here, "transform-job", name)
        take_down(here, name)
    answers = []
    for number in range(len(files)):
        bucket, key = split_uri(f"{home}/transformed/{number:03}.out")
        answers.append(json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read()))
    return answers


def _run_transform_job(here, model, home, instance):
    """Starts the job, waits for its end, and prints its minutes and dollars."""
    name, sagemaker = model["ModelName"], here.session.client("sagemaker")
    price = here.run["dollars_per_hour"].get(instance)
    host = gpu_host(model["PrimaryContainer"]["Image"], instance, transform=True)
    source = {"S3DataType": "S3Prefix", "S3Uri": f"{home}/clips/"}
    sagemaker.create_transform_job(
        TransformJobName=name,
        ModelName=name,
        # AWS's image does not tell SageMaker how it wants its requests: so each of these is said.
        MaxPayloadInMB=100,  # the most that there is, for MaxConcurrentTransforms together
        MaxConcurrentTransforms=1,
        BatchStrategy="SingleRecord",
        ModelClientConfig={"InvocationsTimeoutInSeconds": 300, "InvocationsMaxRetries": 0},
        TransformInput={"DataSource": {"S3DataSource": source}, "ContentType": "video/mp4"},
        TransformOutput={"S3OutputPath": f"{home}/transformed"},
        TransformResources={"InstanceType": instance, "InstanceCount": 1} | host,
        Tags=TAGS,
    )
    each = "" if price is None else f" at ${price} an hour"
    print(f"{name} starts, and is billed{each} until its end; on AWS it takes 5 to 10 minutes")
    look = partial(sagemaker.describe_transform_job, TransformJobName=name)
    job = _wait(look, "TransformJobStatus", ["InProgress", "Stopping"], TRANSFORM_MINUTES)
    if job["TransformJobStatus"] == "Stopped":
        raise RuntimeError(f"{name} was stopped before its end: run the cell again")
    if job["TransformJobStatus"] == "Failed":
        log = f"/aws/sagemaker/TransformJobs, {name}"
        raise RuntimeError(f"{job['FailureReason']}\nThe lines of each file are in the log {log}.")
    minutes = (job["TransformEndTime"] - job["TransformStartTime"]).total_seconds() / 60
    cost = "" if price is None else f", about ${price * minutes / 60:.2f}"
    print(f"completed after {minutes:.1f} minutes{cost}")


# ---- After --------------------------------------------------------------------------------------


def difference(answer: dict, other: dict) -> float:
    """The largest difference between the curves (`smoothed`) of two answers for one video."""
    return float(np.abs(np.subtract(answer["smoothed"], other["smoothed"])).max())


def compared(answers: list[dict], others: list[dict]) -> str:
    """In words, the largest difference between the curves of answers for the same videos."""
    gap = max(difference(*pair) for pair in zip(answers, others, strict=True))
    return "identical" if gap == 0 else f"differs by {gap:.0e}"
