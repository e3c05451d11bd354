"""What the series made in the account: list it, delete it, look whether it is gone.

An item is a line of run.json: "s3://bucket/folder/" (homes), "training-job/<name>" and the like
(jobs), "scaling/<endpoint>", "endpoint/<name>", "log/<endpoint>", "endpoint-config/<name>",
"model/<name>", "pipeline/<name>", "model-package-group/<name>", "mlflow-app/<name>" (deployed),
"bucket/<name>", "role/<name>" (created). KINDS, at the end, says how each kind is looked at and
deleted. Nothing else is deleted.
"""

import re
import time
from collections import namedtuple
from functools import partial

import boto3
import pandas as pd
from botocore.exceptions import ClientError

from tutorial import account

ORDER = ("deployed", "jobs", "homes", "created")  # what costs by the hour first, the role last
GONE = ("404", "NoSuchBucket", "NoSuchEntity", "NoSuchUpload", "ObjectNotFoundException")
GONE += ("ResourceNotFound", "ResourceNotFoundException")
DENIED = ("403", "AccessDenied", "AccessDeniedException", "UnauthorizedOperation")
LOOKS, SECONDS = 5, 2  # AWS may show for some seconds what it has deleted: look so often again
WAIT = 5  # seconds between two questions whether something has ended
STOP_MINUTES = 15  # of a job, until it is said that it does not end
START_MINUTES = 60  # of an endpoint: as long as AWS waits for a container that does not answer
ENDED = ("Completed", "Failed", "Stopped")  # of a job
REMEDY = (
    "You lack permissions: attach caller_policy.json of notebooks/aws to the user or role that you "
    'are signed in as ("Who gets which" in aws/README.md), then run this cell again.'
)

Kind = namedtuple("Kind", "look delete")  # both are called with (here, name)


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
    if "bucket" in here.run:
        account.expect_the_owner(here)
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
    for field, item in _items(here):
        reason = outcome(here, item)
        print(f"{_title(here, item)}: {f'still there: {reason}' if reason else 'deleted'}")
        if reason:
            left[_title(here, item)] = reason
        else:
            _forget(here, field, item)
    if left:
        reasons = "\n".join(f"- {title}: {reason}" for title, reason in left.items())
        remedy = f"\n{REMEDY}" if re.search("AccessDenied|may not|permission", reasons) else ""
        raise RuntimeError(f"still in the account:\n{reasons}{remedy}")
    account.aws.disconnect(here.run["endpoint_url"])
    (here.output / "run.json").unlink()
    print("All is deleted. AWS was asked again for each item, and has it no more.")


def state(here, item) -> str:
    """What AWS says of an item: "gone", "there", a status, a size, or why it cannot be known.

    "perhaps there": AWS is not asked, because nobody needs the permission for it otherwise.
    """
    kind, name = _parts(item)
    if kind.look is None:
        return "perhaps there"
    try:
        return kind.look(here, name)
    except ClientError as error:
        return "gone" if _absent(error) else f"not known: {error.response['Error']['Code']}"


def outcome(here, item) -> str | None:
    """Deletes an item, and looks whether it is gone; returns why it is still there, or None."""
    kind, name = _parts(item)
    try:
        reason = kind.delete(here, name)
        for _ in range(0 if reason else LOOKS):
            reason = _left(here, item)
            if reason is None:
                return None
            time.sleep(SECONDS)
    except ClientError as error:
        # A part of it may be gone, and the item itself still there: look.
        return _left(here, item) if _absent(error) else _words(here, error)
    return reason


def _items(here):
    """(list of run.json, item), in the order of deletion: in each list as in KINDS, newest first.

    What the deletion of a pipeline adds to the jobs comes too.
    """
    kinds = list(KINDS.values())
    for field in ORDER:
        items = reversed(here.run.get(field, []))
        for item in sorted(items, key=lambda item: kinds.index(_parts(item)[0])):
            yield field, item


def _parts(item):
    """The Kind of an item, and its name: "model/m" -> KINDS["model"], "m"."""
    kind, _, name = item.partition("/")
    return (KINDS["folder"], item) if kind == "s3:" else (KINDS[kind], name)


def _title(here, item):
    """An item as a reader knows it, without the account's number."""
    kind, _, name = item.partition("/")
    if kind == "s3:":
        kind, name = "folder", item.split("/", 3)[3]
    return _hidden(here, f"{kind.replace('-', ' ')} {name}")


def _hidden(here, text):
    return text.replace(here.run.get("account", "?"), "<account>")


def _forget(here, field, item):
    """Takes an item that is gone off run.json, and the uploads that lay in it, at one go."""
    here.refresh()
    here.run[field] = [other for other in here.run[field] if other != item]
    uploads = here.run.get("uploads", {})
    for source in [key for key, of in uploads.items() if of["uri"].startswith(item)]:
        del uploads[source]
    here.write()


def _absent(error):
    """Whether an error of AWS says that the thing is not there.

    Some services have a code for it. SageMaker has "ValidationException" for this and for much
    else; its message tells: "Requested resource not found.", "Could not find model ...",
    "ModelPackageGroup ... does not exist."
    """
    code, message = error.response["Error"]["Code"], error.response["Error"]["Message"]
    words = r"not found|(could|can)\s*not find|does not exist|no scalable target"
    unknown = re.search(words, message, re.IGNORECASE) is not None
    return code in GONE or (code in ("ValidationException", "ValidationError") and unknown)


def _denied(error):
    return error.response["Error"]["Code"] in DENIED


def _words(here, error):
    """An error of AWS in one line. S3 does not say in its message what was refused."""
    code, message = error.response["Error"]["Code"], error.response["Error"]["Message"]
    where = f" in {error.operation_name}" if _denied(error) else ""
    return _hidden(here, f"{code}{where}: {message}")


def _left(here, item):
    """Looks for a deleted item; returns how it is still there, or None if it is gone."""
    kind, name = _parts(item)
    if kind.look is None:
        try:
            kind.delete(here, name)
        except ClientError as error:
            return None if _absent(error) else _words(here, error)
        return "AWS could delete it a second time"
    if item.split("/")[0].endswith("-job") and _log_streams(here, *item.split("/")):
        return "its log is still there"
    found = state(here, item)
    if item.startswith("transform-job/") and found in ENDED:
        return None  # AWS keeps the record, at no cost
    return None if found == "gone" else f"AWS still shows it: {found}"


def wait(busy, ask, what, minutes):
    """Asks AWS until the answer is none of the `busy` ones; returns the last answer.

    Prints a line each minute. After `minutes` it returns though the answer is a busy one.
    """
    for turn in range(minutes * 60 // WAIT):
        status = ask()
        if status not in busy:
            return status
        if turn % (60 // WAIT) == 0:
            print(f"{what} is {status}: waiting, minute {turn * WAIT // 60}", flush=True)
        time.sleep(WAIT)
    return ask()


def _endless(status, minutes, what):
    """What to say of something that does not end."""
    return (
        f"still {status} after {minutes} minutes. Run this cell again in an hour. If {what} is "
        f"{status} the next day, open a case with AWS Support: nobody else can end it."
    )


# Jobs ---------------------------------------------------------------------------------------------
def _job(kind):
    """training-job -> Training, as in the names of the API."""
    return kind.removesuffix("-job").capitalize()


def _described(here, kind, name):
    """AWS's record of a job."""
    describe = getattr(here.session.client("sagemaker"), f"describe_{kind.replace('-', '_')}")
    return describe(**{f"{_job(kind)}JobName": name})


def look_job(kind, here, name) -> str:
    """The status of a job. `kind`: as of end_job."""
    status = _described(here, kind, name)[f"{_job(kind)}JobStatus"]
    return "gone" if status == "Deleting" else status


def end_job(here, kind, name) -> str | None:
    """Stops a job if it runs, and gives a waiting machine up; returns when both have ended.

    `kind`: "training-job", "processing-job" or "transform-job". Waits for 15 minutes, and then
    returns why the job or the machine has not ended. Otherwise returns None.
    """
    ask, what = partial(look_job, kind, here, name), f"{kind.replace('-', ' ')} {name}"
    if ask() == "InProgress":
        print(f"stopping {what}", flush=True)
        stop = getattr(here.session.client("sagemaker"), f"stop_{kind.replace('-', '_')}")
        _unless_ended(stop, **{f"{_job(kind)}JobName": name})
    busy = ("InProgress", "Stopping")
    status = wait(busy, ask, what, STOP_MINUTES)
    if status in busy:
        return _endless(status, STOP_MINUTES, "the job")
    return _give_up_machine(here, name, what) if kind == "training-job" else None


def _unless_ended(call, **request):
    """Asks AWS to end something. It refuses if that has ended in the meantime."""
    try:
        call(**request)
    except ClientError as error:
        if error.response["Error"]["Code"] != "ValidationException":
            raise


def _give_up_machine(here, name, what):
    """Ends a machine that AWS keeps for the next job (a warm pool); returns why it has not ended.

    AWS deletes no record of a job while its machine waits.
    """

    def pool():
        return _described(here, "training-job", name).get("WarmPoolStatus", {}).get("Status")

    what = f"the warm pool of {what}"
    status = wait(("InUse",), pool, what, STOP_MINUTES)
    if status == "Available":
        kept = {"KeepAlivePeriodInSeconds": 0}
        update = here.session.client("sagemaker").update_training_job
        _unless_ended(update, TrainingJobName=name, ResourceConfig=kept)
        status = wait(("Available",), pool, what, STOP_MINUTES)
    still = status in ("InUse", "Available")
    return _endless(status, STOP_MINUTES, "its warm pool") if still else None


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


def delete_job(kind, here, name) -> str | None:
    """Ends a job, and deletes its record and its log; returns why the log or the job is left.

    Whoever may delete the record and not the log gets rid of the record. AWS keeps the record of a
    transform job.
    """
    delete = getattr(here.session.client("sagemaker"), f"delete_{kind.replace('-', '_')}", None)
    try:
        reason = end_job(here, kind, name)
        if reason:
            return reason
        refused = _delete_log(here, kind, name)
        if delete:
            delete(**{f"{_job(kind)}JobName": name})
    except ClientError as error:
        if not _absent(error):
            raise
        refused = _delete_log(here, kind, name)  # somebody deleted the record; its log may be there
    return refused and f"its log stays: {refused}"


def _delete_log(here, kind, name):
    """Deletes a job's log streams; returns what AWS says if it refuses."""
    group, logs = f"/aws/sagemaker/{_job(kind)}Jobs", here.session.client("logs")
    try:
        for stream in _log_streams(here, kind, name):
            logs.delete_log_stream(logGroupName=group, logStreamName=stream)
    except ClientError as error:
        if not _denied(error):
            raise
        return _words(here, error)


# Models in use ------------------------------------------------------------------------------------
def _scalable(here, name):
    """What Application Auto Scaling has registered of an endpoint: one target for each variant."""
    scaling = here.session.client("application-autoscaling")
    pages = scaling.get_paginator("describe_scalable_targets").paginate(
        ServiceNamespace="sagemaker"
    )
    found = [target for page in pages for target in page["ScalableTargets"]]
    return [one for one in found if one["ResourceId"].startswith(f"endpoint/{name}/")]


def look_scaling(here, name) -> str:
    """Whether an endpoint's number of machines is scaled: "there" or "gone"."""
    return "there" if _scalable(here, name) else "gone"


def delete_scaling(here, name) -> None:
    """Ends the scaling of an endpoint, with its scaling policies and the alarm that wakes it."""
    for target in _scalable(here, name):
        here.session.client("application-autoscaling").deregister_scalable_target(
            ServiceNamespace="sagemaker",
            ResourceId=target["ResourceId"],
            ScalableDimension=target["ScalableDimension"],
        )
    here.session.client("cloudwatch").delete_alarms(AlarmNames=[f"{name}-from-zero"])


def look_endpoint(here, name) -> str:
    """The status of an endpoint."""
    return here.session.client("sagemaker").describe_endpoint(EndpointName=name)["EndpointStatus"]


def delete_endpoint(here, name) -> str | None:
    """Deletes an endpoint; returns why it is left, or None.

    AWS refuses while the endpoint starts or changes. That may take an hour if its container never
    answers, and this function waits as long.
    """
    ask, what = partial(look_endpoint, here, name), f"endpoint {name}"
    busy = ("Creating", "Updating", "SystemUpdating", "RollingBack")
    status = wait(busy, ask, what, START_MINUTES)
    if status in busy:
        return _endless(status, START_MINUTES, "the endpoint")
    here.session.client("sagemaker").delete_endpoint(EndpointName=name)
    status = wait((status, "Deleting"), ask, what, STOP_MINUTES)  # a ClientError if it is gone
    return _endless(status, STOP_MINUTES, "the endpoint")


def delete_endpoint_config(here, name) -> None:
    """Deletes the configuration of an endpoint."""
    here.session.client("sagemaker").delete_endpoint_config(EndpointConfigName=name)


def delete_log(here, name) -> None:
    """Deletes the log of an endpoint."""
    group = f"/aws/sagemaker/Endpoints/{name}"
    here.session.client("logs").delete_log_group(logGroupName=group)


def delete_model(here, name) -> None:
    """Deletes a model. Its files in S3 belong to a folder."""
    here.session.client("sagemaker").delete_model(ModelName=name)


# Pipelines and the model registry -----------------------------------------------------------------
def _pages(here, operation, field, **request):
    """All that a listing of SageMaker has in a field of its pages."""
    pages = here.session.client("sagemaker").get_paginator(operation).paginate(**request)
    return [one for page in pages for one in page[field]]


def look_pipeline(here, name) -> str:
    """The status of a pipeline: Active, or "gone"."""
    sagemaker = here.session.client("sagemaker")
    status = sagemaker.describe_pipeline(PipelineName=name)["PipelineStatus"]
    return "gone" if status == "Deleting" else status


def delete_pipeline(here, name) -> str | None:
    """Stops the executions of a pipeline and deletes it; returns why it is left, or None.

    AWS keeps the jobs of its steps, and their names go with the pipeline: so they are noted in
    run.json before.
    """
    listed = {"PipelineName": name}
    for run in _pages(here, "list_pipeline_executions", "PipelineExecutionSummaries", **listed):
        reason = _end_execution(here, run["PipelineExecutionArn"], f"a run of pipeline {name}")
        if reason:
            return reason
        here.add("jobs", *_jobs_of_execution(here, run["PipelineExecutionArn"]))
    here.session.client("sagemaker").delete_pipeline(PipelineName=name)


def _end_execution(here, arn, what):
    """Stops an execution of a pipeline, if it runs; returns why it has not ended, or None."""
    sagemaker, busy = here.session.client("sagemaker"), ("Executing", "Stopping")

    def ask():
        found = sagemaker.describe_pipeline_execution(PipelineExecutionArn=arn)
        return found["PipelineExecutionStatus"]

    if ask() == "Executing":
        sagemaker.stop_pipeline_execution(PipelineExecutionArn=arn)
    status = wait(busy, ask, what, STOP_MINUTES)
    return _endless(status, STOP_MINUTES, what) if status in busy else None


def _jobs_of_execution(here, arn):
    """The jobs of a pipeline's execution, as items: training-job/<name> is the end of an ARN."""
    listed, jobs = {"PipelineExecutionArn": arn}, []
    for step in _pages(here, "list_pipeline_execution_steps", "PipelineExecutionSteps", **listed):
        for kind in ("TrainingJob", "ProcessingJob", "TransformJob"):
            if kind in step.get("Metadata", {}):
                jobs.append(step["Metadata"][kind]["Arn"].split(":")[-1])
    return jobs


def look_model_package_group(here, name) -> str:
    """The status of a group of model versions, or "gone"."""
    sagemaker, wanted = here.session.client("sagemaker"), {"ModelPackageGroupName": name}
    status = sagemaker.describe_model_package_group(**wanted)["ModelPackageGroupStatus"]
    return "gone" if status == "Deleting" else status


def delete_model_package_group(here, name) -> None:
    """Deletes a group of model versions, and before it the versions in it."""
    sagemaker, wanted = here.session.client("sagemaker"), {"ModelPackageGroupName": name}
    for version in _pages(here, "list_model_packages", "ModelPackageSummaryList", **wanted):
        sagemaker.delete_model_package(ModelPackageName=version["ModelPackageArn"])
    sagemaker.delete_model_package_group(**wanted)


# Records ------------------------------------------------------------------------------------------
def find_mlflow_app(here, name) -> dict | None:
    """The summary (Arn, Status) of an MLflow app, by its name; None if AWS has none (any more)."""
    found = [app for app in _pages(here, "list_mlflow_apps", "Summaries") if app["Name"] == name]
    return next((app for app in found if app["Status"] != "Deleted"), None)


def look_mlflow_app(here, name) -> str:
    """The status of an MLflow app, or "gone"."""
    found = find_mlflow_app(here, name)
    return found["Status"] if found else "gone"


def delete_mlflow_app(here, name) -> str | None:
    """Deletes an MLflow app with its records, and waits; returns why it is left, or None."""
    busy = ("Creating", "Updating")  # AWS deletes none of these
    status = wait(busy, partial(look_mlflow_app, here, name), name, STOP_MINUTES)
    if status in busy:
        return _endless(status, STOP_MINUTES, name)
    if status not in ("gone", "Deleting"):
        arn = find_mlflow_app(here, name)["Arn"]
        here.session.client("sagemaker").delete_mlflow_app(Arn=arn)
    status = wait(("Deleting",), partial(look_mlflow_app, here, name), name, STOP_MINUTES)
    return None if status == "gone" else f"AWS still shows it: {status}"


# Files, bucket, role ------------------------------------------------------------------------------
def _in_folder(here, home, what):
    """What lies in a folder, s3://bucket/folder/; None if you may not list it.

    `what`: "object_versions" (old versions and delete markers too), "objects" (the newest versions)
    or "multipart_uploads" (uploads that broke off: S3 keeps their parts, and bills them).
    """
    bucket, _, prefix = home.removeprefix("s3://").partition("/")
    collection = getattr(here.session.resource("s3").Bucket(bucket), what)
    try:
        return list(collection.filter(Prefix=prefix))
    except ClientError as error:
        if _denied(error) and what != "objects":
            return None
        raise


def look_folder(here, home) -> str:
    """How much lies in a folder, or "gone". Says what you may not list."""
    versions = _in_folder(here, home, "object_versions")
    uploads = _in_folder(here, home, "multipart_uploads")
    objects = _in_folder(here, home, "objects") if versions is None else versions
    unlisted = [
        name
        for name, found in (("old versions", versions), ("broken uploads", uploads))
        if found is None
    ]
    if not objects and not uploads and not unlisted:
        return "gone"
    text = f"{len(objects)} objects, {sum(one.size or 0 for one in objects) / 1e6:.1f} MB"
    text += f", {len(uploads)} broken uploads" if uploads else ""
    return text + (f"; you may not list {' and '.join(unlisted)}" if unlisted else "")


def delete_folder(here, home) -> str | None:
    """Deletes a folder of S3, old versions and broken uploads too; returns what is left, or None.

    Who may not list the old versions deletes the objects that the folder shows. A bucket that keeps
    versions keeps them then. So nobody knows whether some are left, and this is said.
    """
    uploads, hidden = _in_folder(here, home, "multipart_uploads"), []
    for upload in uploads or []:
        upload.abort()
    what = "object_versions"
    if _in_folder(here, home, what) is None:
        what, hidden = "objects", ["old versions (s3:ListBucketVersions)"]
    left = _delete_objects(here, home, what)
    if uploads is None:
        hidden.append("parts of broken uploads (s3:ListBucketMultipartUploads)")
    if left or not hidden:
        return left
    return f"you may not list {' and '.join(hidden)}: if there are any, they stay"


def _delete_objects(here, home, what):
    """Deletes the objects of a folder; returns how many are left and why, or None.

    S3 may refuse some objects and delete the rest, without an error. A listing that is read on
    while its objects are deleted may end too early. So all is listed, deleted, and listed again,
    until nothing is left or nothing more can be deleted. `what`: as of _in_folder.
    """
    bucket = here.session.resource("s3").Bucket(home.split("/")[2])
    found, before, refused = _in_folder(here, home, what), float("inf"), set()
    while 0 < len(found) < before:
        before, refused = len(found), set()
        for start in range(0, before, 1000):  # S3 takes 1,000 at once
            part = found[start : start + 1000]
            names = [{"Key": one.key} for one in part]
            if what == "object_versions":
                names = [{"Key": one.object_key, "VersionId": one.id} for one in part]
            answer = bucket.delete_objects(Delete={"Objects": names, "Quiet": True})
            refused |= {error["Code"] for error in answer.get("Errors", [])}
        found = _in_folder(here, home, what)
    why = ", ".join(sorted(refused)) or "S3 names no reason"
    return f"{len(found)} objects: {why}" if found else None


def look_bucket(here, name) -> str:
    """Says "there"; a ClientError if it is not."""
    here.session.client("s3").head_bucket(Bucket=name)
    return "there"


def delete_bucket(here, name) -> str | None:
    """Deletes a bucket if it is empty; returns why not, or None."""
    try:
        here.session.client("s3").delete_bucket(Bucket=name)
    except ClientError as error:
        if error.response["Error"]["Code"] != "BucketNotEmpty":
            raise
        return "something else lies in it"


def look_role(here, name) -> str:
    """Says "there"; a ClientError if it is not."""
    here.session.client("iam").get_role(RoleName=name)
    return "there"


def delete_role(here, name) -> None:
    """Deletes a role, with its permissions."""
    role = here.session.resource("iam").Role(name)
    for policy in role.attached_policies.all():
        role.detach_policy(PolicyArn=policy.arn)
    for policy in role.policies.all():
        policy.delete()
    role.delete()


# In the order of deletion: an endpoint before its parts, and before the log that it writes.
# A kind without `look`: caller_policy.json lets nobody look at these. They are deleted twice.
KINDS = {
    "scaling": Kind(look_scaling, delete_scaling),
    "endpoint": Kind(look_endpoint, delete_endpoint),
    "log": Kind(None, delete_log),
    "endpoint-config": Kind(None, delete_endpoint_config),
    "model": Kind(None, delete_model),
    "pipeline": Kind(look_pipeline, delete_pipeline),
    "model-package-group": Kind(look_model_package_group, delete_model_package_group),
    "mlflow-app": Kind(look_mlflow_app, delete_mlflow_app),
    "folder": Kind(look_folder, delete_folder),  # written s3://bucket/folder/
    "bucket": Kind(look_bucket, delete_bucket),
    "role": Kind(look_role, delete_role),
}
for _kind in ("training-job", "processing-job", "transform-job"):
    KINDS[_kind] = Kind(partial(look_job, _kind), partial(delete_job, _kind))
