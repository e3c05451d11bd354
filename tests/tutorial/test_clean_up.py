"""The clean-up: what it deletes, that it looks again, and what happens if something stays.

What a role with AmazonSageMakerFullAccess alone can clean up: tests/aws/test_clean_up_rights.py.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from embedded import own_aws
from local_mode import aws
from tutorial import account, clean_up

BUCKET, FOLDER = "of-the-series", "video-tutorial/1/"
HOME = f"s3://{BUCKET}/{FOLDER}"
ROLE, IMAGE = "arn:aws:iam::123456789012:role/mine", {"Image": "my/image:1"}
JOB = "training-job/video-1"


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


def test_nothing_is_deleted_in_a_bucket_of_another_account(run_file):
    """One that a stranger has made under the name of a bucket that is gone."""
    has(run_file, bucket=BUCKET, account="210987654321")
    key = f"{HOME.split('/', 3)[3]}theirs"
    boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=b"")
    with pytest.raises(RuntimeError, match="AccessDenied"):
        delete(run_file)
    assert boto3.client("s3").head_object(Bucket=BUCKET, Key=key)
    assert HOME in json.loads(run_file.read_text())["homes"]


def error(code, message, operation="Operation"):
    return ClientError({"Error": {"Code": code, "Message": message}}, operation)


def of_kind(monkeypatch, kind, **functions):
    """Lets other functions look at the items of a kind, or delete them."""
    monkeypatch.setitem(clean_up.KINDS, kind, clean_up.KINDS[kind]._replace(**functions))


@pytest.fixture
def fast(monkeypatch):
    """Time that passes at once: the seconds that the clean-up would have slept."""
    slept = []
    monkeypatch.setattr(clean_up, "time", SimpleNamespace(sleep=slept.append))
    return slept


@pytest.fixture
def here(tmp_path, monkeypatch, fast):
    """An account without an AWS: for what AWS says, and never for what it has."""
    monkeypatch.setattr(clean_up, "_log_streams", lambda here, kind, name: [])
    run = {"region": "us-east-1", "account": "123456789012", "endpoint_url": None}
    return account.Account(tmp_path, run)


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
    assert f"- folder {FOLDER}: 1101 objects: AccessDenied\n" in str(caught.value)
    assert f"- bucket {BUCKET}: something else lies in it" in str(caught.value)
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
        "endpoint m", "log m", "endpoint config m", "model m", "training job video-1",
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


def test_what_is_gone_leaves_the_list_with_its_uploads(run_file, port, monkeypatch):
    """run.json is written after each item, and forgets the uploads of a folder that is gone."""
    fill(["a"])
    uploads = {"clips": {"fingerprint": "1", "uri": f"{HOME}train"}}
    uploads["model"] = {"fingerprint": "2", "uri": f"s3://{BUCKET}/else/model"}
    has(run_file, created=[f"bucket/{BUCKET}", "role/mine"], uploads=uploads)

    def interrupted(here, name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        of_kind(patch, "role", delete=interrupted)
        delete(run_file)
    run = json.loads(run_file.read_text())
    assert run["homes"] == [] and run["created"] == ["role/mine"]
    assert list(run["uploads"]) == ["model"]
    delete(run_file)  # the role was never made: gone counts as deleted
    assert not run_file.exists() and aws.status(port) is None


def make_one_of_each(run_file):
    """A folder with a broken upload, a bucket, a role, a model in use, its log and its scaling."""
    sagemaker = boto3.client("sagemaker")
    fill(["a", "b"])
    boto3.client("s3").create_multipart_upload(Bucket=BUCKET, Key=f"{FOLDER}large")
    boto3.client("iam").create_role(RoleName="mine", AssumeRolePolicyDocument="{}")
    sagemaker.create_model(ModelName="m", ExecutionRoleArn=ROLE, PrimaryContainer=IMAGE)
    variant = {"VariantName": "v", "ModelName": "m", "InstanceType": "ml.m5.large"}
    variant["InitialInstanceCount"] = 1
    sagemaker.create_endpoint_config(EndpointConfigName="m", ProductionVariants=[variant])
    boto3.client("logs").create_log_group(logGroupName="/aws/sagemaker/Endpoints/m")
    register("endpoint/m/variant/v")
    deployed = ["model/m", "endpoint-config/m", "log/m", "endpoint/m", "scaling/m"]
    has(run_file, created=[f"bucket/{BUCKET}", "role/mine"], deployed=deployed)


def register(resource):
    boto3.client("application-autoscaling").register_scalable_target(
        ServiceNamespace="sagemaker",
        ResourceId=resource,
        ScalableDimension="sagemaker:variant:DesiredInstanceCount",
        MinCapacity=0,
        MaxCapacity=1,
    )


def in_account():
    """The kinds of items that AWS has, by its own lists."""
    sagemaker, s3 = boto3.client("sagemaker"), boto3.client("s3")
    scaling = boto3.client("application-autoscaling")
    buckets = s3.list_buckets()["Buckets"]
    found = {
        "bucket": buckets,
        "role": boto3.client("iam").list_roles()["Roles"],
        "model": sagemaker.list_models()["Models"],
        "endpoint-config": sagemaker.list_endpoint_configs()["EndpointConfigs"],
        "log": boto3.client("logs").describe_log_groups()["logGroups"],
        "scaling": scaling.describe_scalable_targets(ServiceNamespace="sagemaker")[
            "ScalableTargets"
        ],
    }
    if buckets:
        found["s3:"] = s3.list_objects_v2(Bucket=BUCKET).get("Contents")
        found["s3:"] = found["s3:"] or s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    return {kind for kind, things in found.items() if things}


def test_an_interruption_at_any_point_loses_nothing(run_file, port):
    """Ctrl-C before each request to AWS, in turn: what is there is on the list; then it goes on."""
    make_one_of_each(run_file)
    assert len(in_account()) == 7
    number, requests, calm = 0, 0, False

    def count(**request):
        nonlocal requests
        requests += 1
        if requests == number:
            raise KeyboardInterrupt

    while not calm:
        number, requests, here = number + 1, 0, clean_up.connect(run_file.parent)
        here.session.events.register("before-call.*.*", count)
        try:
            clean_up.delete(here, confirm=True)
            calm = True
        except KeyboardInterrupt:
            run = json.loads(run_file.read_text())
            listed = [item for field in clean_up.ORDER for item in run.get(field, [])]
            assert in_account() <= {item.split("/")[0] for item in listed}, number
    assert number > 5 and not run_file.exists() and aws.status(port) is None


def test_an_upload_that_broke_off_is_listed_and_ended(run_file, port):
    """S3 keeps its parts, lists no object, and bills them."""
    s3, key = boto3.client("s3"), f"{FOLDER}model.tar.gz"
    upload = s3.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
    s3.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"1")
    elsewhere = s3.create_multipart_upload(Bucket=BUCKET, Key="mine/a")["UploadId"]
    here = clean_up.connect(run_file.parent)
    assert clean_up.state(here, HOME) == "0 objects, 0.0 MB, 1 broken uploads"
    assert clean_up.outcome(here, HOME) is None and clean_up.state(here, HOME) == "gone"
    (left,) = s3.list_multipart_uploads(Bucket=BUCKET)["Uploads"]
    assert left["UploadId"] == elsewhere


def test_the_scaling_of_this_endpoint_ends_and_no_other(run_file, port):
    for name in ("video-1", "video-10"):
        register(f"endpoint/{name}/variant/AllTraffic")
    here, scaling = clean_up.connect(run_file.parent), boto3.client("application-autoscaling")
    assert clean_up.state(here, "scaling/video-1") == "there"
    assert clean_up.outcome(here, "scaling/video-1") is None
    assert clean_up.outcome(here, "scaling/video-1") is None  # gone already
    (left,) = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert left["ResourceId"] == "endpoint/video-10/variant/AllTraffic"


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
    "code, message",
    [
        ("ValidationException", "Requested resource not found."),  # AWS, of a training job
        ("ValidationException", "Could not find requested job with name: video-1"),
        ("ValidationException", "Could not find training job 'video-1'"),  # moto
        ("ValidationException", 'Could not find model "arn:aws:sagemaker:us-east-1:1:model/m".'),
        ("ValidationException", "ModelPackageGroup arn:aws:... does not exist."),
        ("ResourceNotFound", "Pipeline 'arn:aws:...' does not exist."),
        ("ResourceNotFoundException", "The specified log group does not exist."),
        ("NoSuchEntity", "The role with name mine cannot be found."),
        ("NoSuchBucket", "The specified bucket does not exist"),
        ("404", "Not Found"),
    ],
)
def test_what_aws_no_longer_knows_is_gone(here, monkeypatch, code, message):
    def look(here, name):
        raise error(code, message)

    of_kind(monkeypatch, "training-job", look=look, delete=look)
    assert clean_up.state(here, JOB) == "gone" and clean_up.outcome(here, JOB) is None


@pytest.mark.parametrize(
    "code, message",
    [
        ("AccessDeniedException", "User me is not authorized: the policy was not found"),
        ("AccessDenied", "Access Denied"),
        ("ThrottlingException", "Rate exceeded; the request could not find a slot"),
        (
            "ValidationException",
            "An Application AutoScaling scalable target exists for a variant being deleted, and the"
            " IAM identity used to invoke DeleteEndpoint does not have application-autoscaling:"
            "DeregisterScalableTarget permission to deregister the scalable target.",
        ),
        ("ValidationException", 'Cannot update in-progress endpoint "arn:aws:...:endpoint/m".'),
    ],
)
def test_what_aws_refuses_is_not_gone(here, monkeypatch, code, message):
    def refuse(here, name):
        raise error(code, message)

    of_kind(monkeypatch, "endpoint", look=refuse, delete=refuse)
    assert clean_up.state(here, "endpoint/m") == f"not known: {code}"
    assert message in clean_up.outcome(here, "endpoint/m")
    here.remember(deployed=["endpoint/m"])
    with pytest.raises(RuntimeError) as caught:
        clean_up.delete(here, confirm=True)
    lacks = "Denied" in code or "permission" in message
    assert ("attach caller_policy.json of notebooks/aws" in str(caught.value)) == lacks
    assert json.loads((here.output / "run.json").read_text())["deployed"] == ["endpoint/m"]


def test_it_looks_again_until_aws_shows_the_deletion(run_file, monkeypatch):
    states = ["there", "there", "gone"]
    here = clean_up.connect(run_file.parent)
    boto3.client("iam").create_role(RoleName="mine", AssumeRolePolicyDocument="{}")
    monkeypatch.setattr(clean_up, "state", lambda here, item: states.pop(0))
    assert clean_up.outcome(here, "role/mine") is None and states == []


def test_what_aws_still_shows_after_the_deletion_stays_on_the_list(run_file, port, monkeypatch):
    """Of a call that answered well, but deleted nothing."""
    of_kind(monkeypatch, "bucket", delete=lambda here, name: None)
    with pytest.raises(RuntimeError, match=f"bucket {BUCKET}: AWS still shows it: there"):
        delete(run_file)
    run = json.loads(run_file.read_text())
    assert run["created"] == [f"bucket/{BUCKET}"] and run["homes"] == [] and aws.status(port)


def test_no_reason_shows_the_account_s_number(here, monkeypatch):
    def refuse(here, name):
        message = "User: arn:aws:iam::123456789012:user/me is not authorized"
        raise error("AccessDenied", message, "DeleteBucket")

    of_kind(monkeypatch, "bucket", delete=refuse)
    here.remember(created=[f"bucket/{BUCKET}"])
    with pytest.raises(RuntimeError) as caught:
        clean_up.delete(here, confirm=True)
    assert "AccessDenied in DeleteBucket: User: arn:aws:iam::<account>:" in str(caught.value)
    assert "123456789012" not in str(caught.value)


@pytest.mark.parametrize("item", ["model/m", "endpoint-config/m", "log/m"])
def test_what_nobody_may_look_at_is_deleted_twice(run_file, monkeypatch, item):
    """aws/caller_policy.json lets nobody describe these: AWS must say that they are not there."""
    here, made, kind = clean_up.connect(run_file.parent), [], item.split("/")[0]

    def delete_it(here, name):
        made.append(name)
        if len(made) > 2:
            raise error("ValidationException", "Could not find it.")

    with monkeypatch.context() as patch:
        of_kind(patch, kind, delete=delete_it)
        assert clean_up.outcome(here, item) is None and made == ["m"] * 3
        of_kind(patch, kind, delete=lambda here, name: None)
        assert clean_up.outcome(here, item) == "AWS could delete it a second time"
    sagemaker, logs = boto3.client("sagemaker"), boto3.client("logs")
    sagemaker.create_model(ModelName="m", ExecutionRoleArn=ROLE, PrimaryContainer=IMAGE)
    logs.create_log_group(logGroupName="/aws/sagemaker/Endpoints/m")
    assert clean_up.outcome(here, item) is None
    assert ("model" in item) == (sagemaker.list_models()["Models"] == [])
    assert ("log" in item) == (logs.describe_log_groups()["logGroups"] == [])


class SageMaker:
    """Answers in turn what a record shows, its last answer for ever, and notes what is done."""

    def __init__(self, **answers):
        self.answers, self.made = answers, []

    def __getattr__(self, operation):
        def call(**request):
            if operation not in self.answers:
                self.made.append(operation)
                return {}
            turns = self.answers[operation]
            return turns.pop(0) if len(turns) > 1 else turns[0]

        return call


@pytest.fixture
def account_with(tmp_path, monkeypatch, fast):
    """An account whose every client is the given one, and whose jobs wrote no log."""

    def account_with(client):
        monkeypatch.setattr(boto3.Session, "client", lambda session, service: client)
        monkeypatch.setattr(clean_up, "_log_streams", lambda here, kind, name: [])
        monkeypatch.setattr(clean_up, "_left", lambda here, item: None)
        return account.Account(tmp_path, {}, boto3.Session(region_name="us-east-1"))

    return account_with


def job(status, pool=None):
    return {"TrainingJobStatus": status} | ({"WarmPoolStatus": {"Status": pool}} if pool else {})


@pytest.mark.parametrize(
    "records, calls",
    [
        (["InProgress", "Stopping", "Stopped"], ["stop_training_job"]),
        ([("Completed", "Available")] * 4 + [("Completed", "Terminated")], ["update_training_job"]),
        ([("Completed", "Available")] * 4 + [("Completed", "Reused")], ["update_training_job"]),
        (["Failed"], []),
        (
            ["InProgress", ("Stopping", "InUse"), ("Stopped", "InUse"), ("Stopped", "Available")]
            + [("Stopped", "Available"), ("Stopped", "Terminated")],
            ["stop_training_job", "update_training_job"],
        ),
    ],
)
def test_a_job_is_ended_before_its_record_goes(account_with, fast, records, calls):
    """So that nothing writes or costs any more: also a machine that waits in a warm pool.

    AWS deletes no record while its warm pool is Available, and the pool takes its time.
    """
    records = [job(*([one] if isinstance(one, str) else one)) for one in records]
    client = SageMaker(describe_training_job=records)
    assert clean_up.outcome(account_with(client), JOB) is None
    assert client.made == [*calls, "delete_training_job"] and len(records) == 1


@pytest.mark.parametrize(
    "item, answers, made, reason",
    [
        (JOB, [job("Stopping")], [], "still Stopping after 15 minutes"),
        (
            JOB,
            [job("Completed", "Available")],
            ["update_training_job"],
            "still Available after 15 minutes",
        ),
        (
            "transform-job/t",
            [{"TransformJobStatus": "InProgress"}, {"TransformJobStatus": "Stopping"}],
            ["stop_transform_job"],
            "still Stopping after 15 minutes",
        ),
        (
            "endpoint/e",
            [{"EndpointStatus": "Creating"}],
            [],
            "still Creating after 60 minutes",
        ),
        (
            "endpoint/e",
            [{"EndpointStatus": "InService"}, {"EndpointStatus": "Deleting"}],
            ["delete_endpoint"],
            "still Deleting after 15 minutes",
        ),
    ],
)
def test_what_never_ends_is_said_and_not_deleted(
    account_with, fast, capsys, item, answers, made, reason
):
    """With a line a minute, and what to do: the wait has an end, and nothing counts as deleted."""
    operation = f"describe_{item.split('/')[0].replace('-', '_')}"
    client = SageMaker(**{operation: answers})
    said = clean_up.outcome(account_with(client), item)
    assert said.startswith(reason) and "open a case with AWS Support" in said
    assert client.made == made
    minutes = sum(fast) / 60
    assert capsys.readouterr().out.count("waiting, minute") == minutes > 10


def test_an_endpoint_is_deleted_when_its_start_has_ended(account_with, fast, capsys):
    """AWS refuses to delete one that is Creating. One whose start failed must be deleted too."""
    states = ["Creating"] * 20 + ["Failed", "Deleting"]
    answers = [{"EndpointStatus": state} for state in states]

    class Endpoints(SageMaker):
        def describe_endpoint(self, EndpointName):
            if not answers:
                raise error("ValidationException", 'Could not find endpoint "arn:aws:...".')
            return answers.pop(0)

        def delete_endpoint(self, EndpointName):
            assert len(answers) == 1  # it does not start any more
            self.made.append("delete")

    client = Endpoints()
    assert clean_up.outcome(account_with(client), "endpoint/e") is None and client.made == [
        "delete"
    ]
    assert "endpoint e is Creating: waiting, minute 1" in capsys.readouterr().out


def test_a_job_that_ends_while_it_is_stopped_is_no_error(account_with):
    class Ended(SageMaker):
        def stop_training_job(self, TrainingJobName):
            message = "The request was rejected because the training job is in status Completed."
            raise error("ValidationException", message)

    client = Ended(describe_training_job=[job("InProgress"), job("Completed")])
    assert clean_up.outcome(account_with(client), JOB) is None
    assert client.made == ["delete_training_job"]


def test_a_pipeline_is_stopped_and_its_jobs_are_noted_before_it_goes(account_with, tmp_path):
    """With the pipeline go the names of the jobs that its steps started; the jobs stay."""
    arn, steps = "arn:aws:sagemaker:us-east-1:1:pipeline/video-p/execution/x", []
    for kind, name in (("TrainingJob", "training-job/video-a"), ("Condition", None)):
        made = {"Arn": f"arn:aws:sagemaker:us-east-1:1:{name}"} if name else {"Outcome": "true"}
        steps.append({"StepName": kind, "Metadata": {kind: made}})
    status = [{"PipelineExecutionStatus": one} for one in ("Executing", "Stopping", "Stopped")]
    client = SageMaker(describe_pipeline_execution=status)
    listed = {
        "list_pipeline_executions": {"PipelineExecutionSummaries": [{"PipelineExecutionArn": arn}]},
        "list_pipeline_execution_steps": {"PipelineExecutionSteps": steps},
    }
    client.get_paginator = lambda operation: SimpleNamespace(
        paginate=lambda **request: [listed[operation]]
    )
    here = account_with(client)
    here.remember(deployed=["pipeline/video-p"], jobs=["training-job/video-b"])
    assert clean_up.outcome(here, "pipeline/video-p") is None
    assert client.made == ["stop_pipeline_execution", "delete_pipeline"]
    assert here.run["jobs"] == ["training-job/video-b", "training-job/video-a"]
    items = clean_up._items(here)
    assert next(items) == ("deployed", "pipeline/video-p")
    here.add("jobs", "training-job/video-c")  # noted while the list is gone through
    assert next(items) == ("jobs", "training-job/video-c")


def test_a_group_of_models_goes_with_its_versions(account_with):
    client = SageMaker()
    versions = {"ModelPackageSummaryList": [{"ModelPackageArn": "1"}, {"ModelPackageArn": "2"}]}
    client.get_paginator = lambda operation: SimpleNamespace(paginate=lambda **request: [versions])
    assert clean_up.outcome(account_with(client), "model-package-group/video-m") is None
    assert client.made == ["delete_model_package"] * 2 + ["delete_model_package_group"]


def test_a_part_that_somebody_deleted_does_not_make_the_rest_gone(here, monkeypatch):
    """The deletion ends early with "does not exist": then AWS is asked for the item itself."""
    group = "model-package-group"

    def delete_a_part(here, name):
        raise error("ValidationException", "ModelPackage arn:aws:... does not exist.")

    of_kind(monkeypatch, group, look=lambda here, name: "Completed", delete=delete_a_part)
    assert clean_up.outcome(here, f"{group}/video-m") == "AWS still shows it: Completed"
