"""The clean-up: what it deletes, that it looks again, and what happens if something stays."""

import json
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, WaiterError
from embedded import own_aws
from local_mode import aws
from tutorial import account, clean_up

BUCKET, FOLDER = "of-the-series", "video-tutorial/1/"
HOME = f"s3://{BUCKET}/{FOLDER}"


@pytest.fixture
def port(monkeypatch):
    """An embedded AWS of one test's own, connected to."""
    monkeypatch.setattr(clean_up, "SECONDS", 0)
    with own_aws() as port:
        yield port


@pytest.fixture
def run_file(port, tmp_path):
    """The run.json of a series that made a bucket and one folder in it."""
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    run = {"region": "us-east-1", "endpoint_url": f"http://127.0.0.1:{port}", "jobs": []}
    run |= {"account": "123456789012", "homes": [HOME], "created": [f"bucket/{BUCKET}"]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path / "run.json"


def delete(run_file):
    clean_up.delete(clean_up.connect(run_file.parent), confirm=True)


def has(run_file, **values):
    """Adds to run.json."""
    run_file.write_text(json.dumps(json.loads(run_file.read_text()) | values))


def error(code, message):
    return ClientError({"Error": {"Code": code, "Message": message}}, "operation")


def fill(names, operation="put_object"):
    """Makes an object of each name, 16 at once, or calls another operation of S3 on it."""
    call = getattr(boto3.client("s3", config=Config(max_pool_connections=16)), operation)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: call(Bucket=BUCKET, Key=FOLDER + name), names))


@pytest.mark.long
def test_a_folder_of_3000_objects_goes_and_all_else_with_it(run_file, port):
    fill([f"{number:04}" for number in range(3000)])
    delete(run_file)
    assert not run_file.exists() and aws.status(port) is None


@pytest.mark.long
def test_old_versions_and_delete_markers_go_too(run_file, monkeypatch):
    boto3.resource("s3").BucketVersioning(BUCKET).enable()
    names = [f"{number:04}" for number in range(600)]
    for operation in ("put_object", "put_object", "delete_object"):
        fill(names, operation)
    monkeypatch.setattr(aws, "disconnect", lambda endpoint_url: None)  # to look into it
    delete(run_file)
    assert boto3.client("s3").list_buckets()["Buckets"] == []


@pytest.mark.long
def test_what_s3_refuses_is_counted_and_stays_on_the_list(run_file, port):
    """More than a page of it, before and after what S3 does delete."""
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject"}
    deny["Resource"] = [f"arn:aws:s3:::{BUCKET}/{FOLDER}{part}*" for part in ("a", "c")]
    policy = json.dumps({"Version": "2012-10-17", "Statement": [deny]})
    boto3.client("s3").put_bucket_policy(Bucket=BUCKET, Policy=policy)
    sizes = {"a": 1100, "b": 1100, "c": 1}
    fill([f"{part}{number:04}" for part, size in sizes.items() for number in range(size)])
    with pytest.raises(RuntimeError) as caught:
        delete(run_file)
    assert f"{HOME}: 1101 objects: AccessDenied; bucket/{BUCKET}: some" in str(caught.value)
    stored = [item.key for item in boto3.resource("s3").Bucket(BUCKET).objects.all()]
    assert len(stored) == 1101 and not any(key.startswith(f"{FOLDER}b") for key in stored)
    run = json.loads(run_file.read_text())
    assert run["homes"] == [HOME] and run["created"] == [f"bucket/{BUCKET}"]
    assert aws.status(port)


def test_the_log_of_a_job_goes_whole(run_file, monkeypatch):
    """Also if somebody deleted the job's record. A page of CloudWatch's answer lists 50 streams."""
    group, logs = "/aws/sagemaker/TrainingJobs", boto3.client("logs")
    logs.create_log_group(logGroupName=group)
    for number in range(120):
        logs.create_log_stream(logGroupName=group, logStreamName=f"video-1/algo-{number}")
    logs.create_log_stream(logGroupName=group, logStreamName="video-10/algo-1")
    has(run_file, jobs=["training-job/video-1"], homes=[])
    monkeypatch.setattr(aws, "disconnect", lambda endpoint_url: None)
    delete(run_file)
    streams = logs.describe_log_streams(logGroupName=group)["logStreams"]
    assert [stream["logStreamName"] for stream in streams] == ["video-10/algo-1"]


def test_the_embedded_aws_does_not_end_while_its_account_holds_something(run_file, port):
    """Also of what the list does not name, in any Region."""
    region = "eu-west-1"
    has(run_file, homes=[], created=[])
    boto3.client("iam").create_role(RoleName="forgotten", AssumeRolePolicyDocument="{}")
    role, image = "arn:aws:iam::123456789012:role/forgotten", {"Image": "my/image:1"}
    sagemaker, logs = boto3.client("sagemaker", region), boto3.client("logs", region)
    sagemaker.create_model(ModelName="m", ExecutionRoleArn=role, PrimaryContainer=image)
    logs.create_log_group(logGroupName="g")
    logs.create_log_stream(logGroupName="g", logStreamName="s")
    with pytest.raises(RuntimeError) as caught:
        delete(run_file)
    found = f"(4): bucket/{BUCKET}, role/forgotten, model/m, log stream s"
    assert found in str(caught.value) and run_file.exists() and aws.status(port)
    boto3.client("s3").delete_bucket(Bucket=BUCKET)
    boto3.client("iam").delete_role(RoleName="forgotten")
    sagemaker.delete_model(ModelName="m")
    logs.delete_log_stream(logGroupName="g", logStreamName="s")
    delete(run_file)
    assert not run_file.exists() and aws.status(port) is None


def test_without_confirmation_nothing_is_deleted_and_the_list_says_what_is_there(run_file, capsys):
    fill(["a", "b"])
    boto3.client("iam").create_role(RoleName="mine", AssumeRolePolicyDocument="{}")
    created = [f"bucket/{BUCKET}", "role/mine", "role/gone"]
    jobs, deployed = ["training-job/video-1"], ["model/m", "endpoint-config/m", "endpoint/m"]
    has(run_file, created=created, jobs=jobs, deployed=[*deployed, "log/m"])
    before = run_file.read_bytes()
    here = clean_up.connect(run_file.parent)
    clean_up.delete(here, confirm=False)
    assert run_file.read_bytes() == before and "Nothing is deleted" in capsys.readouterr().out
    rows = dict(clean_up.listing(here).itertuples(index=False))
    assert list(rows)[:5] == [
        "log m", "endpoint m", "endpoint config m", "model m", "training job video-1",
    ]  # fmt: skip
    assert {what for what, state in rows.items() if state not in ("gone", "perhaps there")} == {
        f"folder {FOLDER}", f"bucket {BUCKET}", "role mine",
    }  # fmt: skip
    assert rows[f"folder {FOLDER}"] == "2 objects, 0.0 MB" and rows["role mine"] == "there"


@pytest.mark.parametrize("run", [None, {"dataset": "clips"}], ids=["no run.json", "of notebook 2"])
def test_before_notebook_1_there_is_nothing_to_clean(tmp_path, run):
    if run:
        (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(RuntimeError, match="No run.json of 01_setup.ipynb in output_dir: nothing"):
        clean_up.connect(tmp_path)


def test_an_interrupted_clean_up_goes_on_where_it_stopped(run_file, port, monkeypatch):
    """run.json is written after each item, and forgets the uploads of a folder that is gone."""
    fill(["a"])
    uploads = {"clips": {"fingerprint": "1", "uri": f"{HOME}train"}}
    uploads["model"] = {"fingerprint": "2", "uri": f"s3://{BUCKET}/else/model"}
    has(run_file, created=[f"bucket/{BUCKET}", "role/mine"], uploads=uploads)

    def interrupted(here, name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clean_up, "delete_role", interrupted)
        delete(run_file)
    run = json.loads(run_file.read_text())
    assert run["homes"] == [] and run["created"] == [f"bucket/{BUCKET}", "role/mine"]
    assert list(run["uploads"]) == ["model"]
    delete(run_file)  # the role was never made: gone counts as deleted
    assert not run_file.exists() and aws.status(port) is None


def test_an_account_that_is_gone_is_cleaned_up(run_file, port):
    """After a reboot: the embedded AWS is new, and empty."""
    has(run_file, jobs=["training-job/video-1", "processing-job/p", "transform-job/t"])
    has(run_file, deployed=["model/m", "endpoint-config/m", "log/m", "endpoint/m"])
    has(run_file, created=[f"bucket/{BUCKET}", "role/mine"])
    aws.stop(port)
    here = clean_up.connect(run_file.parent)
    assert set(clean_up.listing(here)["state"]) == {"gone", "perhaps there"}
    clean_up.delete(here, confirm=True)
    assert not run_file.exists() and aws.status(port) is None


@pytest.mark.parametrize(
    "message",
    [
        "Requested resource not found.",  # of AWS, for a job
        "Could not find training job 'video-1'",
        'Could not find model "arn:aws:sagemaker:us-east-1:1:model/m".',
    ],
)
def test_what_aws_no_longer_knows_is_gone(run_file, monkeypatch, message):
    here = clean_up.connect(run_file.parent)

    def look(here, item):
        raise error("ValidationException", message)

    monkeypatch.setattr(clean_up, "_look", look)
    monkeypatch.setattr(clean_up, "_described", lambda here, kind, name: look(here, name))
    assert clean_up.state(here, "training-job/video-1") == "gone"
    assert clean_up.outcome(here, "training-job/video-1") is None


def test_it_looks_again_until_aws_shows_the_deletion(run_file, monkeypatch):
    states = ["there", "there", "gone"]
    here = clean_up.connect(run_file.parent)
    boto3.client("iam").create_role(RoleName="mine", AssumeRolePolicyDocument="{}")
    monkeypatch.setattr(clean_up, "state", lambda here, item: states.pop(0))
    assert clean_up.outcome(here, "role/mine") is None and states == []


def test_what_aws_still_shows_after_the_deletion_stays_on_the_list(run_file, port, monkeypatch):
    """Of a call that answered well, but deleted nothing."""
    monkeypatch.setattr(clean_up, "delete_bucket", lambda here, name: None)
    with pytest.raises(RuntimeError, match=f"bucket/{BUCKET}: AWS still shows it: there"):
        delete(run_file)
    run = json.loads(run_file.read_text())
    assert run["created"] == [f"bucket/{BUCKET}"] and run["homes"] == [] and aws.status(port)


def test_who_may_not_delete_is_told_the_code_and_where_the_permissions_stand(run_file, monkeypatch):
    def refuse(here, home):
        raise error("AccessDenied", "you may not")

    monkeypatch.setattr(clean_up, "delete_folder", refuse)
    fill(["a"])
    with pytest.raises(RuntimeError) as caught:
        delete(run_file)
    assert f"{HOME}: AccessDenied: you may not" in str(caught.value)
    assert "aws/README.md has the permissions" in str(caught.value)


@pytest.mark.parametrize("item", ["model/m", "endpoint-config/m", "log/m"])
def test_what_nobody_may_look_at_is_deleted_twice(run_file, monkeypatch, item):
    """aws/caller_policy.json lets nobody describe these: AWS must say that they are not there."""
    here, made = clean_up.connect(run_file.parent), []

    def delete_deployed(here, kind, name):
        made.append(kind)
        if len(made) > 2:
            raise error("ValidationException", "Could not find it.")

    with monkeypatch.context() as patch:
        patch.setattr(clean_up, "delete_deployed", delete_deployed)
        assert clean_up.outcome(here, item) is None and len(made) == 3
        patch.setattr(clean_up, "delete_deployed", lambda here, kind, name: None)
        assert clean_up.outcome(here, item) == "AWS could delete it a second time"
    role, image = "arn:aws:iam::123456789012:role/mine", {"Image": "my/image:1"}
    sagemaker, logs = boto3.client("sagemaker"), boto3.client("logs")
    sagemaker.create_model(ModelName="m", ExecutionRoleArn=role, PrimaryContainer=image)
    logs.create_log_group(logGroupName="/aws/sagemaker/Endpoints/m")
    assert clean_up.outcome(here, item) is None
    assert ("model" in item) == (sagemaker.list_models()["Models"] == [])
    assert ("log" in item) == (logs.describe_log_groups()["logGroups"] == [])


@pytest.mark.parametrize(
    "status, pool, calls",
    [
        ("InProgress", None, ["stop", "wait", "delete"]),
        ("Completed", "Available", ["give up", "wait", "delete"]),
        ("Failed", "Terminated", ["wait", "delete"]),
    ],
)
def test_a_job_is_ended_before_its_record_goes(tmp_path, monkeypatch, status, pool, calls):
    """So that nothing writes or costs any more: also a machine that waits in a warm pool."""
    made, name = [], {"TrainingJobName": "video-1"}

    class SageMaker:
        def describe_training_job(self, **job):
            return {"TrainingJobStatus": status, "WarmPoolStatus": {"Status": pool}} | job

        def stop_training_job(self, **job):
            made.append("stop")

        def update_training_job(self, **job):
            assert job == name | {"ResourceConfig": {"KeepAlivePeriodInSeconds": 0}}
            made.append("give up")

        def delete_training_job(self, **job):
            assert job == name
            made.append("delete")

        def get_waiter(self, waiter):
            assert waiter == "training_job_completed_or_stopped"
            return self

        def wait(self, WaiterConfig, **job):
            made.append("wait")
            if status == "Failed":
                raise WaiterError(waiter, "the job has failed", {})

    waiter = "training_job_completed_or_stopped"
    monkeypatch.setattr(boto3.Session, "client", lambda session, service: SageMaker())
    monkeypatch.setattr(clean_up, "_log_streams", lambda here, kind, name: [])
    here = account.Account(tmp_path, {}, boto3.Session(region_name="us-east-1"))
    clean_up.delete_job(here, "training-job", "video-1")
    assert made == calls
