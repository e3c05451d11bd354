"""A model that answers on AWS: an asynchronous endpoint, a batch transform job, and their end.

Each name stands in run.json before the thing is made, so 06_clean_up finds what an interruption
left. What serving and transform make, they take down, also after an error or Ctrl-C.
"""

import json
import tarfile
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
from botocore.exceptions import ClientError, WaiterError
from packaging.version import Version
from sagemaker.core import image_uris

from tutorial import SCRIPTS, account, clean_up
from tutorial.results import split_uri

TAGS = [{"Key": "project", "Value": "video-tutorial"}]

# What the model server of AWS's PyTorch image must know: TorchServe, and the toolkit before it.
SERVER = {
    "SAGEMAKER_PROGRAM": "inference.py",  # the handler, in the archive's folder code
    "SAGEMAKER_SUBMIT_DIRECTORY": "/opt/ml/model/code",
    "SAGEMAKER_MODEL_SERVER_WORKERS": "1",  # one video at a time gets all cores
    "TS_DEFAULT_RESPONSE_TIMEOUT": "3600",  # seconds for an answer; without it 120
    "TS_MAX_REQUEST_SIZE": str(2**30),  # bytes of a request; without it 6.5 MB
}


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
        known = "not known" if quotas is None else f"{quotas.get(name, 0):.0f}"
        print(f"quota of {name}: {known}")
        if wanted and quotas is not None and not quotas.get(name):
            raise RuntimeError(
                f"The quota {name!r} is 0: ask for 1 (how_to/train_for_less.ipynb), then run "
                "01_setup.ipynb again."
            )
    if not deploy and not transform:
        print("deploy and transform are False: nothing is made in your account")


def pack(folder, archive) -> Path:
    """Writes model.tar.gz for an endpoint: the model, and in code/ what answers requests."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for path in sorted(Path(folder).iterdir()):
            tar.add(path, arcname=path.name)
        for name in ("inference.py", "train.py", "requirements.txt"):
            tar.add(Path(SCRIPTS) / name, arcname=f"code/{name}")
    print(f"{Path(archive).name}: {Path(archive).stat().st_size / 1e6:.1f} MB")
    return Path(archive)


def image(here, instance: str) -> str:
    """The address of AWS's newest PyTorch image for inference that the SDK knows."""
    versions = image_uris.config_for_framework("pytorch")["inference"]["versions"]
    return image_uris.retrieve(
        "pytorch",
        here.run["region"],
        version=max(versions, key=Version),
        instance_type=instance,
        image_scope="inference",
    )


def new_name(here) -> tuple[str, str]:
    """A name for a model and its endpoint, and its folder s3://bucket/prefix/name."""
    name = f"video-endpoint-{time.strftime('%Y%m%d-%H%M%S')}"
    return name, f"s3://{here.run['bucket']}/{here.run['prefix']}/{name}"


def _make_model(here, packed, request):
    """Uploads the archive, once, and creates the model of a create_model request."""
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
def serving(here, packed, model: dict, config: dict):
    """An endpoint as long as the `with` block lasts: `with serving(...) as ask: ask("a.mp4")`.

    `packed`: of pack. `model`, `config`: requests of create_model and create_endpoint_config.
    Yields a function: see ask. Raises RuntimeError with AWS's reason if the endpoint does not
    start. Whatever ends the block, the endpoint is deleted, and AWS is asked whether it is gone.
    """
    name, sagemaker = config["EndpointConfigName"], here.session.client("sagemaker")
    try:
        _make_model(here, packed, model)
        here.add("deployed", *(f"{kind}/{name}" for kind in ("endpoint-config", "log", "endpoint")))
        sagemaker.create_endpoint_config(**config, Tags=TAGS)
        sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name, Tags=TAGS)
        print(f"{name} starts, and is billed from now on; on AWS it takes 5 to 10 minutes")
        _wait_for_endpoint(sagemaker, name)
        yield partial(ask, here, name, f"{_home(model)}/questions")
    finally:
        take_down(here, name)


def _wait_for_endpoint(sagemaker, name):
    """Returns when it is in service; raises RuntimeError with the reason if it is not."""
    try:
        often = {"Delay": 5, "MaxAttempts": 720}  # seconds; an hour
        sagemaker.get_waiter("endpoint_in_service").wait(EndpointName=name, WaiterConfig=often)
    except WaiterError as error:
        state = sagemaker.describe_endpoint(EndpointName=name)
        reason = state.get("FailureReason", state["EndpointStatus"])
        log = f"/aws/sagemaker/Endpoints/{name}"
        raise RuntimeError(f"{reason}\nThe rest is in the log group {log}.") from error
    print("in service")


def ask(here, name: str, folder: str, path, seconds: int = 3700) -> dict:
    """The endpoint's answer for a video file: what inference.classify_video returns.

    The file goes to `folder` in S3; the endpoint writes its answer, or its error, there too.
    Raises RuntimeError with the endpoint's error, TimeoutError without an answer in `seconds`.
    """
    s3 = here.session.client("s3")
    question = f"{folder}/{Path(path).name}"
    s3.upload_file(str(path), *split_uri(question))
    places = here.session.client("sagemaker-runtime").invoke_endpoint_async(
        EndpointName=name,
        InputLocation=question,
        ContentType="video/mp4",
        InvocationTimeoutSeconds=3600,
    )
    for _ in range(seconds):
        for place in ("OutputLocation", "FailureLocation"):
            bucket, key = split_uri(places[place])
            try:
                text = s3.get_object(Bucket=bucket, Key=key)["Body"].read().decode()
            except s3.exceptions.NoSuchKey:
                continue
            if place == "FailureLocation":
                raise RuntimeError(text)
            return json.loads(text)
        time.sleep(1)
    raise TimeoutError(f"no answer for {question} within {seconds} seconds")


def take_down(here, name: str) -> None:
    """Deletes endpoint, configuration and model of this name, if run.json lists them.

    AWS deletes an endpoint only after its start: the deletion waits for it. Then AWS is asked
    again. What is gone leaves run.json; the endpoint's log stays, for 06_clean_up. Raises
    RuntimeError that names what is left.
    """
    left = []
    here.refresh()
    for item in [f"{kind}/{name}" for kind in ("endpoint", "endpoint-config", "model")]:
        if item not in here.run.get("deployed", []):
            continue
        print(f"deleting {item}", flush=True)
        reason = clean_up.outcome(here, item)
        if reason:
            left.append(f"{item} ({reason})")
        else:
            here.drop("deployed", item)
    if left:
        raise RuntimeError(f"still there, run 06_clean_up.ipynb now: {', '.join(left)}")
    print(f"{name} is gone: AWS was asked again")


# ---- Batch transform ----------------------------------------------------------------------------


def transform(here, packed, model: dict, files, instance: str) -> list[dict]:
    """The answers of a batch transform job for video files, in their order; the job ends itself.

    `packed`: of pack. `model`: a create_model request; job and model get its name, with "transform"
    for "endpoint". An error or Ctrl-C stops the job. Raises RuntimeError with AWS's reason if the
    job fails.
    """
    name, home = model["ModelName"].replace("video-endpoint", "video-transform"), _home(model)
    model, s3 = model | {"ModelName": name}, here.session.client("s3")
    here.add("jobs", f"transform-job/{name}")
    try:
        _make_model(here, packed, model)
        for number, file in enumerate(files):
            s3.upload_file(str(file), *split_uri(f"{home}/clips/{number:03}"))
        _run_transform_job(here, name, home, instance)
    finally:
        with suppress(ClientError):  # it was not created
            clean_up.end_job(here, "transform-job", name)
        take_down(here, name)
    answers = []
    for number in range(len(files)):
        bucket, key = split_uri(f"{home}/transformed/{number:03}.out")
        answers.append(json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read()))
    return answers


def _run_transform_job(here, name, home, instance):
    """Starts the job, waits for its end, and prints its minutes and dollars."""
    sagemaker, price = here.session.client("sagemaker"), here.run["dollars_per_hour"].get(instance)
    source = {"S3DataType": "S3Prefix", "S3Uri": f"{home}/clips/"}
    sagemaker.create_transform_job(
        TransformJobName=name,
        ModelName=name,
        MaxPayloadInMB=100,  # the most that there is
        ModelClientConfig={"InvocationsTimeoutInSeconds": 3600, "InvocationsMaxRetries": 0},
        TransformInput={"DataSource": {"S3DataSource": source}, "ContentType": "video/mp4"},
        TransformOutput={"S3OutputPath": f"{home}/transformed"},
        TransformResources={"InstanceType": instance, "InstanceCount": 1},
        Tags=TAGS,
    )
    each = "" if price is None else f" at ${price} an hour"
    print(f"{name} starts, and is billed{each} until its end; on AWS it takes 5 to 10 minutes")
    try:
        waiter = sagemaker.get_waiter("transform_job_completed_or_stopped")
        waiter.wait(TransformJobName=name, WaiterConfig={"Delay": 5, "MaxAttempts": 720})
    except WaiterError as error:
        job = sagemaker.describe_transform_job(TransformJobName=name)
        reason = job.get("FailureReason", job["TransformJobStatus"])
        log = f"/aws/sagemaker/TransformJobs, {name}"
        raise RuntimeError(f"{reason}\nThe lines of each file are in the log {log}.") from error
    job = sagemaker.describe_transform_job(TransformJobName=name)
    if job["TransformJobStatus"] == "Stopped":
        raise RuntimeError(f"{name} was stopped before its end: run the cell again")
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
