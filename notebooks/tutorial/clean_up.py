"""What the series made in the account: list it, delete it, look whether it is gone.

An item is a line of run.json: "s3://bucket/folder/" (homes), "training-job/<name>" and the like
(jobs), "endpoint/<name>", "log/<name>" of an endpoint, "endpoint-config/<name>", "model/<name>"
(deployed), "bucket/<name>", "role/<name>" (created). Nothing else is deleted.
"""

import re
import time
from contextlib import suppress

import boto3
import pandas as pd
from botocore.exceptions import ClientError, WaiterError

from tutorial import account

ORDER = ("deployed", "jobs", "homes", "created")  # what costs by the hour first, the role last
GONE = ("404", "NoSuchBucket", "NoSuchEntity", "ResourceNotFound", "ResourceNotFoundException")
LOOKS, SECONDS = 5, 2  # AWS may show for some seconds what it has deleted: look so often again
UNSEEN = ("model", "endpoint-config", "log")  # aws/caller_policy.json lets nobody look at these
WAIT = 5  # seconds between two questions whether a job or an endpoint has ended


def connect(output_dir="outputs") -> account.Account:
    """The account of run.json. Raises RuntimeError if notebook 1 has made nothing.

    Unlike account.connect it takes a run.json that notebook 1 has not finished.
    """
    here = account.read_run(output_dir)
    if "created" not in here.run:
        raise RuntimeError(
            "No run.json of 01_setup.ipynb in output_dir: nothing was made, or all of it is "
            "deleted."
        )
    account.aws.connect(here.run["endpoint_url"])
    here.session = boto3.Session(region_name=here.run["region"])
    return here


def listing(here) -> pd.DataFrame:
    """A table of what run.json lists, in the order of deletion, and what AWS says of each."""
    here.refresh()
    rows = [(_title(here, item), state(here, item)) for _, item in _items(here)]
    pd.set_option("display.max_colwidth", None)  # whole names
    return pd.DataFrame(rows, columns=["what", "state"])


def delete(here, confirm: bool = False) -> None:
    """Deletes what run.json lists, if `confirm`, and looks whether it is gone.

    run.json is written after each item: if the deletion is interrupted, the next call goes on. What
    was deleted before by somebody else counts as gone. What cannot be deleted stays in run.json,
    and RuntimeError names it with the reason. If all is gone, run.json goes too, and the embedded
    AWS ends; it raises RuntimeError if its account holds anything that run.json did not list.
    """
    if not confirm:
        print("Nothing is deleted. Set confirm_delete = True to delete.")
        return
    left = {}
    here.refresh()  # another notebook may have launched a job since
    for kind, item in _items(here):
        reason = outcome(here, item)
        print(f"{_title(here, item)}: {f'still there: {reason}' if reason else 'deleted'}")
        if reason:
            left[item] = reason
        else:
            _forget(here, kind, item)
    if left:
        names = "; ".join(f"{item}: {reason}" for item, reason in left.items())
        remedy = (
            "; aws/README.md has the permissions that you need" if "AccessDenied" in names else ""
        )
        raise RuntimeError(f"still in the account: {names}{remedy}")
    account.aws.disconnect(here.run["endpoint_url"])
    (here.output / "run.json").unlink()
    print("All is deleted. AWS was asked again for each item, and has it no more.")


def state(here, item) -> str:
    """What AWS says of an item: "gone", "there", a status, a size, or why it cannot be known.

    "perhaps there": AWS is not asked, because nobody needs the permission for it otherwise.
    """
    try:
        return _look(here, item)
    except ClientError as error:
        return "gone" if _absent(error) else f"not known: {error.response['Error']['Code']}"


def _items(here):
    """(list of run.json, item), in the order of deletion: in each list the newest first."""
    return [(kind, item) for kind in ORDER for item in reversed(here.run.get(kind, []))]


def _title(here, item):
    """An item as a reader knows it, without the account's number."""
    kind, _, name = item.partition("/")
    if kind == "s3:":
        kind, name = "folder", item.split("/", 3)[3]
    return f"{kind.replace('-', ' ')} {name}".replace(here.run.get("account", "?"), "<account>")


def _forget(here, kind, item):
    """Takes an item that is gone off run.json, and the uploads that lay in it."""
    here.drop(kind, item)
    uploads = here.run.get("uploads", {})
    kept = {source: of for source, of in uploads.items() if not of["uri"].startswith(item)}
    here.remember(**({"uploads": kept} if uploads else {}))


def _absent(error):
    """Whether an error of AWS says that the thing is not there."""
    code, message = error.response["Error"]["Code"], error.response["Error"]["Message"]
    return code in GONE or re.search(r"not (find|found)|does not exist", message) is not None


def outcome(here, item):
    """Deletes an item; returns why it is still there, or None if it is gone."""
    try:
        reason = _delete(here, item)
        for _ in range(0 if reason else LOOKS):
            reason = _left(here, item)
            if reason is None:
                break
            time.sleep(SECONDS)
    except WaiterError as error:
        return str(error)
    except ClientError as error:
        error_of = error.response["Error"]
        return None if _absent(error) else f"{error_of['Code']}: {error_of['Message']}"
    return reason


def _left(here, item):
    """Looks for a deleted item; returns how it is still there. None or a ClientError: gone."""
    kind, _, name = item.partition("/")
    if kind.endswith("-job") and _log_streams(here, kind, name):
        return "its log is still there"
    if kind == "transform-job":  # AWS keeps the record, at no cost
        return None
    if kind in UNSEEN:
        delete_deployed(here, kind, name)  # a ClientError if it is gone
        return "AWS could delete it a second time"
    found = state(here, item)
    return None if found == "gone" else f"AWS still shows it: {found}"


def _look(here, item):
    """The state of an item; ClientError if it is not there."""
    kind, _, name = item.partition("/")
    if kind in UNSEEN:
        return "perhaps there"
    if kind == "s3:":
        sizes = [version.size or 0 for version in _objects(here, item)]
        return f"{len(sizes)} objects, {sum(sizes) / 1e6:.1f} MB" if sizes else "gone"
    if kind.endswith("-job"):
        status = _described(here, kind, name)[f"{_job(kind)}JobStatus"]
        return "gone" if status == "Deleting" else status
    if kind == "endpoint":
        sagemaker = here.session.client("sagemaker")
        return sagemaker.describe_endpoint(EndpointName=name)["EndpointStatus"]
    if kind == "bucket":
        here.session.client("s3").head_bucket(Bucket=name)
    else:
        here.session.client("iam").get_role(RoleName=name)
    return "there"


def _delete(here, item):
    """Deletes an item; returns why it could not, or None. Waits where AWS demands it."""
    kind, _, name = item.partition("/")
    if kind == "s3:":
        return delete_folder(here, item)
    if kind.endswith("-job"):
        return delete_job(here, kind, name)
    if kind in ("bucket", "role"):
        return delete_bucket(here, name) if kind == "bucket" else delete_role(here, name)
    return delete_deployed(here, kind, name)


# Jobs ---------------------------------------------------------------------------------------------
def _job(kind):
    """training-job -> Training, as in the names of the API."""
    return kind.removesuffix("-job").capitalize()


def _described(here, kind, name):
    """AWS's record of a job."""
    describe = getattr(here.session.client("sagemaker"), f"describe_{kind.replace('-', '_')}")
    return describe(**{f"{_job(kind)}JobName": name})


def end_job(here, kind, name) -> None:
    """Stops a job if it runs, gives a waiting machine up, and returns when the job has ended.

    `kind`: "training-job", "processing-job" or "transform-job".
    """
    sagemaker, wanted = here.session.client("sagemaker"), {f"{_job(kind)}JobName": name}
    record = _described(here, kind, name)
    if record[f"{_job(kind)}JobStatus"] == "InProgress":
        print(f"stopping {kind.replace('-', ' ')} {name}", flush=True)
        getattr(sagemaker, f"stop_{kind.replace('-', '_')}")(**wanted)
    if record.get("WarmPoolStatus", {}).get("Status") == "Available":
        pool = {"KeepAlivePeriodInSeconds": 0}
        sagemaker.update_training_job(TrainingJobName=name, ResourceConfig=pool)
    waiter = sagemaker.get_waiter(f"{kind.replace('-', '_')}_completed_or_stopped")
    with suppress(WaiterError):  # it has failed, which ends it too
        waiter.wait(**wanted, WaiterConfig={"Delay": WAIT, "MaxAttempts": 120})


def _log_streams(here, kind, name):
    """The names of a job's log streams, one for each machine; none if it wrote no log."""
    logs = here.session.client("logs")
    pages = logs.get_paginator("describe_log_streams").paginate(
        logGroupName=f"/aws/sagemaker/{_job(kind)}Jobs", logStreamNamePrefix=f"{name}/"
    )
    try:
        return [stream["logStreamName"] for page in pages for stream in page["logStreams"]]
    except logs.exceptions.ResourceNotFoundException:
        return []


def delete_job(here, kind, name) -> None:
    """Ends a job, and deletes its log and its record. AWS keeps the record of a transform job."""
    sagemaker, logs = here.session.client("sagemaker"), here.session.client("logs")
    try:
        end_job(here, kind, name)
        recorded = True
    except ClientError as error:
        if not _absent(error):
            raise
        recorded = False  # somebody deleted the record; its log may be there
    for stream in _log_streams(here, kind, name):
        group = f"/aws/sagemaker/{_job(kind)}Jobs"
        logs.delete_log_stream(logGroupName=group, logStreamName=stream)
    if recorded and kind != "transform-job":
        getattr(sagemaker, f"delete_{kind.replace('-', '_')}")(**{f"{_job(kind)}JobName": name})


# Models in use ------------------------------------------------------------------------------------
def _log_of_endpoint(name):
    return f"/aws/sagemaker/Endpoints/{name}"


def delete_deployed(here, kind, name) -> None:
    """Deletes an endpoint, its log, its configuration ("endpoint-config"), or a model."""
    sagemaker = here.session.client("sagemaker")
    if kind == "log":
        here.session.client("logs").delete_log_group(logGroupName=_log_of_endpoint(name))
    elif kind == "endpoint":
        often = {"Delay": WAIT, "MaxAttempts": 240}
        with suppress(WaiterError):  # AWS cannot delete one that is still starting
            waiter = sagemaker.get_waiter("endpoint_in_service")
            waiter.wait(EndpointName=name, WaiterConfig=often)
        sagemaker.delete_endpoint(EndpointName=name)
        sagemaker.get_waiter("endpoint_deleted").wait(EndpointName=name, WaiterConfig=often)
    elif kind == "endpoint-config":
        sagemaker.delete_endpoint_config(EndpointConfigName=name)
    else:
        sagemaker.delete_model(ModelName=name)


# Files, bucket, role ------------------------------------------------------------------------------
def _objects(here, home):
    """The objects of a folder, given as s3://bucket/folder/, in all their versions."""
    bucket, _, prefix = home.removeprefix("s3://").partition("/")
    return here.session.resource("s3").Bucket(bucket).object_versions.filter(Prefix=prefix)


def delete_folder(here, home) -> str | None:
    """Deletes a folder of S3, old versions too; returns how many objects are left and why, or None.

    S3 may refuse some objects and delete the rest, without an error. A listing that is read on
    while its objects are deleted may end too early. So all is listed, deleted, and listed again,
    until nothing is left or nothing more can be deleted.
    """
    bucket = here.session.resource("s3").Bucket(home.split("/")[2])
    found, before, refused = list(_objects(here, home)), float("inf"), set()
    while 0 < len(found) < before:
        before, refused = len(found), set()
        for start in range(0, before, 1000):  # S3 takes 1,000 at once
            part = found[start : start + 1000]
            names = [{"Key": item.object_key, "VersionId": item.id} for item in part]
            answer = bucket.delete_objects(Delete={"Objects": names, "Quiet": True})
            refused |= {error["Code"] for error in answer.get("Errors", [])}
        found = list(_objects(here, home))
    why = ", ".join(sorted(refused)) or "S3 names no reason"
    return f"{len(found)} objects: {why}" if found else None


def delete_bucket(here, name) -> str | None:
    """Deletes a bucket if it is empty; returns why not, or None."""
    bucket = here.session.resource("s3").Bucket(name)
    if list(bucket.object_versions.limit(1)):
        return "something else lies in it"
    bucket.delete()
    return None


def delete_role(here, name) -> None:
    """Deletes a role, with its permissions."""
    role = here.session.resource("iam").Role(name)
    for policy in role.attached_policies.all():
        role.detach_policy(PolicyArn=policy.arn)
    for policy in role.policies.all():
        policy.delete()
    role.delete()
