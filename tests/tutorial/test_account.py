"""Notebook 1's part of an account: sign in, role, bucket, quotas; and what run.json keeps of it."""

import json
import os
from unittest.mock import Mock

import boto3
import pytest
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError, NoCredentialsError, TokenRetrievalError
from embedded import free_port, own_aws
from local_mode import aws
from tutorial import account

ROLE = "SageMaker-Video-ExecutionRole"
TYPES = ["ml.m5.xlarge", "ml.g4dn.xlarge", "ml.g5.xlarge", "ml.p9.xlarge"]


@pytest.fixture
def url():
    """The address of an embedded AWS of one test's own; begin() starts it."""
    with own_aws(start=False) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def here(url, tmp_path):
    return account.begin(tmp_path, url)


def ready(here):
    account.execution_role(here, ROLE, create=True)
    account.make_bucket(here)


def refused(code, operation="GetRole"):
    return ClientError({"Error": {"Code": code, "Message": "no"}}, operation)


# Sign in ------------------------------------------------------------------------------------------
def test_begin_writes_where_and_as_whom_and_connect_finds_it(here, url, tmp_path):
    assert here.run["region"] == "us-east-1" and here.run["endpoint_url"] == url
    assert here.run["bucket"] == f"sagemaker-us-east-1-{here.run['account']}"
    with pytest.raises(RuntimeError, match=r"run 01_setup\.ipynb first"):  # no role yet
        account.connect(tmp_path)
    ready(here)
    found = account.connect(tmp_path)
    assert found.run == here.run == json.loads((tmp_path / "run.json").read_text())
    assert found.session.region_name == "us-east-1"


def test_two_notebooks_forget_nothing_of_each_other(here, tmp_path):
    ready(here)
    other = account.connect(tmp_path)  # a kernel that stays open while this one goes on
    here.add("jobs", "training-job/one")
    other.remember(dataset="clips")
    other.add("homes", "s3://b/x/")
    here.add("jobs", "training-job/one", "training-job/two")
    here.drop("jobs", "training-job/two")
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["jobs"], run["homes"]) == (["training-job/one"], ["s3://b/x/"])
    assert run["dataset"] == "clips" and here.run == run
    assert not (tmp_path / "run.json.new").exists()


def test_the_account_s_number_is_not_printed(here, capsys):
    ready(here)
    assert here.run["account"] not in capsys.readouterr().out


def test_without_credentials_the_remedy_is_named(monkeypatch, tmp_path):
    def refuse(session, name, **options):
        raise NoCredentialsError

    monkeypatch.setattr(boto3.Session, "client", refuse)
    with pytest.raises(RuntimeError, match="No valid AWS credentials or Region.*`aws configure"):
        account.begin(tmp_path, region="us-east-1")
    assert not (tmp_path / "run.json").exists()


def test_the_next_day_the_notebooks_ask_for_a_new_sign_in(here, monkeypatch, tmp_path):
    ready(here)
    error = TokenRetrievalError(provider="sso", error_msg="Token has expired and refresh failed")
    monkeypatch.setattr("botocore.client.BaseClient._make_api_call", Mock(side_effect=error))
    with pytest.raises(RuntimeError, match="No valid AWS credentials.*`aws sso login`"):
        account.connect(tmp_path)


def test_a_sign_in_to_another_account_is_refused(here, tmp_path):
    ready(here)
    here.remember(account="111122223333")
    with pytest.raises(RuntimeError, match="signed in to another account than that of run.json"):
        account.connect(tmp_path)


def test_run_json_of_another_region_is_refused_while_it_lists_something(here, url, tmp_path):
    ready(here)
    with pytest.raises(RuntimeError, match="lists what you have in us-east-1 of another Region"):
        account.begin(tmp_path, url, region="eu-west-1")
    here.remember(created=[], dataset="clips", choices={"freeze": "none"}, uploads={"clips": {}})
    moved = account.begin(tmp_path, url, region="eu-west-1")
    assert moved.run["region"] == "eu-west-1" and moved.run["bucket"].startswith("sagemaker-eu-")
    assert moved.run["dataset"] == "clips" and moved.run["choices"] == {"freeze": "none"}
    assert "uploads" not in moved.run and "role_arn" not in moved.run


def test_begin_again_goes_on_with_the_same_account(here, url, tmp_path):
    ready(here)
    here.remember(jobs=["training-job/video-1"], homes=["s3://b/h/"])
    again = account.begin(tmp_path, url)
    assert again.run == here.run
    ready(again)
    assert sorted(again.run["created"]) == [f"bucket/{again.run['bucket']}", f"role/{ROLE}"]


@pytest.mark.parametrize("same_port", [True, False])
def test_an_embedded_account_that_is_gone_is_begun_anew(here, url, tmp_path, capsys, same_port):
    ready(here)
    kept = {"dataset": "clips", "choices": {"model_name": "m"}, "clip_counts": {"train": 1}}
    here.remember(**kept, gflop=0.5, jobs=["training-job/video-1"], training_job_name="video-1")
    aws.stop(int(url.rpartition(":")[2]))  # as a reboot
    if same_port:
        with pytest.raises(RuntimeError, match=r"gone.*Run 01_setup\.ipynb again"):
            account.connect(tmp_path)
    other = free_port()
    try:
        new = account.begin(tmp_path, url if same_port else f"http://127.0.0.1:{other}")
        assert "is gone: this one is new" in capsys.readouterr().out
        assert kept.items() <= new.run.items() and new.run["gflop"] == 0.5
        assert new.run["jobs"] == new.run["created"] == []
        assert "training_job_name" not in new.run and "role_arn" not in new.run
        ready(new)
        account.connect(tmp_path)
    finally:
        aws.stop(other)


# Role and bucket ----------------------------------------------------------------------------------
def test_the_role_gets_the_least_that_a_job_needs_and_full_access_if_wanted(here):
    role = boto3.resource("iam").Role(ROLE)
    account.execution_role(here, ROLE, create=True)
    assert here.run["role_arn"] == role.arn and role.assume_role_policy_document == account.policy(
        here, "trust_policy"
    )
    least = account.policy(here, "execution_policy")
    assert role.Policy("video-tutorial").policy_document == least
    assert here.run["bucket"] in json.dumps(least) and "${" not in json.dumps(least)
    account.execution_role(here, ROLE, full_access=True)
    assert [policy.arn for policy in role.attached_policies.all()] == [account.FULL_ACCESS]
    assert list(role.policies.all()) == []
    account.execution_role(here, ROLE)  # takes the other way's back
    assert list(role.attached_policies.all()) == []
    assert role.Policy("video-tutorial").policy_document == least


def test_a_role_that_was_there_keeps_its_permissions_and_is_not_ours_to_delete(here):
    boto3.client("iam").create_role(RoleName="theirs", AssumeRolePolicyDocument="{}")
    account.execution_role(here, "theirs", create=True)
    role = boto3.resource("iam").Role("theirs")
    assert list(role.policies.all()) == [] and here.run["created"] == []
    assert here.run["role_arn"] == role.arn


def test_without_a_role_the_remedies_are_named(here):
    with pytest.raises(RuntimeError, match=f"No role '{ROLE}'.*create_role = True"):
        account.execution_role(here, ROLE)
    assert "role_arn" not in here.run


@pytest.fixture
def person(tmp_path):
    """person(*actions): an account of somebody who may do these alone, where policies count."""
    with own_aws(enforce=True):
        admin = boto3.Session()

        def sign_in(*actions):
            admin.client("iam").create_user(UserName="me")
            allowed = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
            admin.client("iam").put_user_policy(
                UserName="me",
                PolicyName="mine",
                PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [allowed]}),
            )
            key = admin.client("iam").create_access_key(UserName="me")["AccessKey"]
            os.environ["AWS_ACCESS_KEY_ID"] = key["AccessKeyId"]
            os.environ["AWS_SECRET_ACCESS_KEY"] = key["SecretAccessKey"]
            return account.begin(tmp_path)  # by the environment, as on AWS

        yield sign_in


@pytest.mark.parametrize(
    "may, create, action", [("s3:*", False, "look up"), ("iam:GetRole", True, "create")]
)
def test_who_may_not_ask_iam_is_told_to_give_the_arn(person, may, create, action):
    here = person(may)
    with pytest.raises(RuntimeError, match=f"You may not {action} the role '{ROLE}'.*to the ARN"):
        account.execution_role(here, ROLE, create=create)
    assert "role_arn" not in here.run and here.run["created"] == []


def test_an_arn_is_taken_without_a_word_to_iam_and_is_never_deleted(person, capsys):
    here, arn = person("s3:*"), "arn:aws:iam::123456789012:role/service-role/theirs"
    account.execution_role(here, arn, create=True)  # IAM would refuse whatever it is asked
    account.make_bucket(here)
    assert here.run["role_arn"] == arn and "execution role: theirs" in capsys.readouterr().out
    assert here.run["created"] == [f"bucket/{here.run['bucket']}"]
    passed = account.policy(here, "caller_policy", arn)["Statement"][1]
    assert passed["Action"] == "iam:PassRole" and passed["Resource"] == arn


@pytest.mark.parametrize(
    "arn",
    [
        "arn:aws:sts::123456789012:assumed-role/theirs/me",  # of get-caller-identity
        "arn:aws:iam::111122223333:role/theirs",
    ],
)
def test_an_arn_that_jobs_cannot_use_is_refused(here, arn):
    with pytest.raises(RuntimeError, match="no role of your account.*:role/<name>"):
        account.execution_role(here, arn)
    assert "role_arn" not in here.run


def test_a_bucket_is_made_once_and_in_the_region(url, tmp_path):
    here = account.begin(tmp_path, url, region="eu-west-1", bucket="of-a-reader", prefix="mine")
    there = {"LocationConstraint": "eu-west-1"}
    boto3.client("s3").create_bucket(Bucket="of-before", CreateBucketConfiguration=there)
    account.make_bucket(here)
    account.make_bucket(here)
    assert here.run["created"] == ["bucket/of-a-reader"] and here.run["prefix"] == "mine"
    where = boto3.client("s3").get_bucket_location(Bucket="of-a-reader")["LocationConstraint"]
    assert where == "eu-west-1"
    account.make_bucket(account.begin(tmp_path, url, region="eu-west-1", bucket="of-before"))
    assert json.loads((tmp_path / "run.json").read_text())["created"] == ["bucket/of-a-reader"]


def stranger():
    """S3, as another account sees it."""
    role = "arn:aws:iam::111122223333:role/stranger"
    keys = boto3.client("sts").assume_role(RoleArn=role, RoleSessionName="me")["Credentials"]
    return boto3.client(
        "s3",
        aws_access_key_id=keys["AccessKeyId"],
        aws_secret_access_key=keys["SecretAccessKey"],
        aws_session_token=keys["SessionToken"],
    )


def test_a_bucket_of_another_account_is_refused(here):
    stranger().create_bucket(Bucket=here.run["bucket"])  # anybody can guess the name
    with pytest.raises(RuntimeError, match="is not yours to use: it belongs to another account"):
        account.make_bucket(here)
    assert here.run["created"] == []


def test_nothing_goes_to_a_bucket_that_somebody_took_over(here, tmp_path):
    """Deleted, and made again by a stranger who lets everybody write: moto's way with buckets."""
    from sagemaker.core.helper.session_helper import Session

    ready(here)
    bucket, s3 = here.run["bucket"], here.session.client("s3")
    s3.put_object(Bucket=bucket, Key="mine", Body=b"clip")
    s3.delete_object(Bucket=bucket, Key="mine")
    s3.delete_bucket(Bucket=bucket)
    stranger().create_bucket(Bucket=bucket)
    with pytest.raises(RuntimeError, match="is not yours to use"):
        account.connect(tmp_path)
    (tmp_path / "clip.mp4").write_bytes(b"clip")
    again = account.connect(tmp_path, check=False)
    with pytest.raises(S3UploadFailedError, match="AccessDenied"):
        again.session.client("s3").upload_file(str(tmp_path / "clip.mp4"), bucket, "clip.mp4")
    with pytest.raises((ClientError, S3UploadFailedError), match="AccessDenied"):  # as SourceCode
        sdk = Session(again.session, default_bucket=bucket)
        sdk.upload_data(str(tmp_path / "clip.mp4"), bucket=bucket, key_prefix="code")
    assert "Contents" not in stranger().list_objects_v2(Bucket=bucket)


def test_a_bucket_of_another_region_is_refused(url, tmp_path):
    where = {"LocationConstraint": "eu-west-1"}
    here = account.begin(tmp_path, url, bucket="of-a-reader")
    boto3.client("s3").create_bucket(Bucket="of-a-reader", CreateBucketConfiguration=where)
    with pytest.raises(RuntimeError, match="lies in eu-west-1, and a job in us-east-1.*Set region"):
        account.make_bucket(here)
    here = account.begin(tmp_path, url, region="eu-west-1", bucket="of-a-reader")
    account.make_bucket(here)
    assert here.run["created"] == []


def test_s3_deletes_broken_uploads_from_a_new_bucket(here):
    account.make_bucket(here)
    rules = boto3.client("s3").get_bucket_lifecycle_configuration(Bucket=here.run["bucket"])
    (rule,) = rules["Rules"]
    assert rule["Status"] == "Enabled" and rule["Filter"] == {"Prefix": ""}
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    assert not rule.keys() & {"Expiration", "NoncurrentVersionExpiration", "Transitions"}


def test_a_bucket_without_that_rule_is_still_a_bucket(person, capsys):
    here = person("s3:CreateBucket", "s3:ListBucket")
    account.make_bucket(here)
    assert "No rule deletes broken uploads: AccessDenied" in capsys.readouterr().out
    assert here.run["created"] == [f"bucket/{here.run['bucket']}"] and account.bucket_exists(here)


# Quotas -------------------------------------------------------------------------------------------
def test_the_table_has_quota_price_and_speed_and_run_json_remembers(here):
    table = account.instances(here, TYPES)
    assert list(table.index) == TYPES
    assert list(table["quota on demand"]) == [20, 2, 0, "not listed"]
    assert table.loc["ml.g4dn.xlarge", "$ an hour"] == 0.736
    assert table.loc["ml.m5.xlarge", "estimated from"].endswith("backbone frozen")
    train_a_clip = 3 * account.VIT_B_GFLOP * 1e9  # operations, and the T4 does 0.35 * 65e12 a s
    speed = table.loc["ml.g4dn.xlarge", "clips/s"]
    assert speed == pytest.approx(0.35 * 65e12 / train_a_clip, abs=0.05)
    run = json.loads((here.output / "run.json").read_text())
    assert run["quotas"]["ml.g5.xlarge for spot training job usage"] == 0
    assert run["quotas"]["ml.m5.xlarge for processing job usage"] == 20
    assert run["dollars_per_hour"]["ml.g5.xlarge"] == 1.408


def test_who_may_not_read_quotas_gets_null_not_zero(here, monkeypatch, capsys):
    class Quotas:
        def get_paginator(self, listing):
            raise refused("AccessDeniedException", listing)

    monkeypatch.setattr(boto3.Session, "client", lambda session, name, **options: Quotas())
    table = account.instances(here, TYPES)
    assert set(table["quota on demand"]) == {"not known"}
    assert json.loads((here.output / "run.json").read_text())["quotas"] is None
    assert "cannot be read: AccessDeniedException" in capsys.readouterr().out
    account.advise(here, "ml.g5.xlarge")
    assert "Your quota is not known." in capsys.readouterr().out


def test_quotas_are_listed_a_hundred_at_a_time(here):
    asked = []
    here.session.events.register(
        "provide-client-params.service-quotas", lambda params, **_: asked.append(params)
    )
    account.quotas(here)
    assert [request["MaxResults"] for request in asked] == [100, 100]


@pytest.mark.parametrize(
    "instance, said",
    [
        ("ml.g4dn.xlarge", "Your quota is 2."),
        ("ml.g5.xlarge", 'Ask for 1 now. Until then use instance_type = "ml.m5.xlarge".'),
        ("ml.p9.xlarge", "AWS lists no quota of ml.p9.xlarge here"),
    ],
)
def test_the_advice_follows_the_quota(here, capsys, instance, said):
    limits = account.quotas(here)
    account.advise(here, instance)
    out = capsys.readouterr().out
    assert said in out
    code = here.quota_codes.get(f"{instance} for training job usage", "")
    assert out.rstrip().endswith(f"/services/sagemaker/quotas/{code}") and bool(code) == (
        f"{instance} for training job usage" in limits
    )


def test_a_quota_is_asked_for_once_and_by_its_use(here):
    assert account.request_quota(here, "ml.g5.xlarge") == "requested 1: PENDING"
    assert account.request_quota(here, "ml.g5.xlarge") == "a request of yours is still open"
    spot = "spot training job usage"
    assert account.request_quota(here, "ml.g5.xlarge", spot, 2) == "requested 2: PENDING"
    assert "ask in the console" in account.request_quota(here, "ml.p9.xlarge")
    with pytest.raises(ValueError, match="it must be one of training job usage"):
        account.request_quota(here, "ml.g5.xlarge", "training")


# Versions -----------------------------------------------------------------------------------------
def test_a_python_that_cannot_unpack_safely_is_refused(monkeypatch):
    monkeypatch.delattr("tarfile.data_filter")
    with pytest.raises(RuntimeError, match=r"3\.11\.4 or newer unpacks safely"):
        account.versions()


def test_a_missing_package_is_named(monkeypatch):
    def version(package):
        raise account.PackageNotFoundError(package)

    monkeypatch.setattr(account, "version", version)
    with pytest.raises(RuntimeError, match="torch is not installed: run the cell above"):
        account.versions()
