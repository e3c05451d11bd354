"""What the clean-up can do with caller_policy.json, and with AmazonSageMakerFullAccess alone.

On an embedded AWS that enforces IAM. FullAccess is moto's copy of the managed policy: whoever sets
up Studio for a single user acts as a role that has this policy and no other.
"""

import json
import os
from string import Template

import boto3
import pytest
from conftest import ROOT
from embedded import forget_sdk_clients, own_aws
from local_mode import aws
from tutorial import clean_up

ACCOUNT, REGION, PREFIX = "123456789012", "us-east-1", "video-tutorial"
ROLE, BUCKET = "SageMaker-Video-ExecutionRole", f"sagemaker-{REGION}-{ACCOUNT}"
FOLDER = f"{PREFIX}/1/"
HOME, JOBS = f"s3://{BUCKET}/{FOLDER}", "/aws/sagemaker/TrainingJobs"
FULL_ACCESS = "arn:aws:iam::aws:policy/AmazonSageMakerFullAccess"
DEPLOYED = ["model/video-m", "endpoint-config/video-m", "log/video-m", "scaling/video-m"]
VALUES = {"bucket": BUCKET, "prefix": PREFIX, "region": REGION, "account": ACCOUNT}


@pytest.fixture(scope="module")
def keys():
    """{who: access key} of "admin", "reader" (caller_policy) and "full" (FullAccess alone)."""
    with own_aws(enforce=True) as port:
        iam = boto3.client("iam")
        text = (ROOT / "notebooks/aws/caller_policy.json").read_text()
        policy = Template(text).substitute(VALUES, role_name=ROLE)
        made = iam.create_policy(PolicyName="caller", PolicyDocument=policy)
        keys = {"admin": ("testing", "testing")}
        for user, arn in {"reader": made["Policy"]["Arn"], "full": FULL_ACCESS}.items():
            iam.create_user(UserName=user)
            iam.attach_user_policy(UserName=user, PolicyArn=arn)
            key = iam.create_access_key(UserName=user)["AccessKey"]
            keys[user] = (key["AccessKeyId"], key["SecretAccessKey"])
        with pytest.MonkeyPatch.context() as patch:  # who is signed in stays so
            patch.setattr(aws, "connect", lambda endpoint_url: endpoint_url)
            patch.setattr(aws, "disconnect", lambda endpoint_url: None)
            patch.setattr(clean_up, "SECONDS", 0)
            yield keys
        assert aws.status(port)


def sign_in(keys, who):
    os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = keys[who]
    forget_sdk_clients()


def make(folder, versions):
    """What the series leaves, made by an administrator; returns its run.json."""
    s3, logs, sagemaker = boto3.client("s3"), boto3.client("logs"), boto3.client("sagemaker")
    s3.create_bucket(Bucket=BUCKET)
    if versions:
        boto3.resource("s3").BucketVersioning(BUCKET).enable()
    for body in (b"old", b"new"):
        s3.put_object(Bucket=BUCKET, Key=f"{FOLDER}train/a.mp4", Body=body)
    s3.create_multipart_upload(Bucket=BUCKET, Key=f"{FOLDER}model.tar.gz")
    trust = (ROOT / "notebooks/aws/trust_policy.json").read_text()
    trust = Template(trust).substitute(VALUES)
    boto3.client("iam").create_role(RoleName=ROLE, AssumeRolePolicyDocument=trust)
    role, image = f"arn:aws:iam::{ACCOUNT}:role/{ROLE}", {"Image": "my/image:1"}
    sagemaker.create_model(ModelName="video-m", ExecutionRoleArn=role, PrimaryContainer=image)
    variant = {"VariantName": "v", "ModelName": "video-m", "InstanceType": "ml.m5.large"}
    variant["InitialInstanceCount"] = 1
    sagemaker.create_endpoint_config(EndpointConfigName="video-m", ProductionVariants=[variant])
    boto3.client("application-autoscaling").register_scalable_target(
        ServiceNamespace="sagemaker",
        ResourceId="endpoint/video-m/variant/v",
        ScalableDimension="sagemaker:variant:DesiredInstanceCount",
        MinCapacity=0,
        MaxCapacity=1,
    )
    sagemaker.create_training_job(
        TrainingJobName="video-1",
        RoleArn=role,
        AlgorithmSpecification={
            "TrainingImage": "none",
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["true"],
        },
        OutputDataConfig={"S3OutputPath": f"{HOME}out"},
        ResourceConfig={"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1},
        StoppingCondition={"MaxRuntimeInSeconds": 60},
    )
    for group in (JOBS, "/aws/sagemaker/Endpoints/video-m"):
        if not logs.describe_log_groups(logGroupNamePrefix=group)["logGroups"]:
            logs.create_log_group(logGroupName=group)
    logs.create_log_stream(logGroupName=JOBS, logStreamName="video-1/algo-1-0")
    run = {"region": REGION, "account": ACCOUNT, "endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    run |= {"jobs": ["training-job/video-1"], "homes": [HOME], "deployed": DEPLOYED}
    run["created"] = [f"role/{ROLE}", f"bucket/{BUCKET}"]
    (folder / "run.json").write_text(json.dumps(run))
    return folder / "run.json"


def belongings():
    """What is in the account, counted."""
    s3, logs, sagemaker = boto3.client("s3"), boto3.client("logs"), boto3.client("sagemaker")
    scaling = boto3.client("application-autoscaling")
    groups = logs.describe_log_groups(logGroupNamePrefix="/aws/sagemaker/Endpoints")["logGroups"]
    there = bool(s3.list_buckets()["Buckets"])
    found = s3.list_object_versions(Bucket=BUCKET) if there else {}
    uploads = s3.list_multipart_uploads(Bucket=BUCKET) if there else {}
    counts = {
        "buckets": int(there),
        "objects": sum(one["IsLatest"] for one in found.get("Versions", [])),
        "old versions": sum(not one["IsLatest"] for one in found.get("Versions", [])),
        "uploads": len(uploads.get("Uploads", [])),
        "roles": len(boto3.client("iam").list_roles()["Roles"]),
        "records of jobs": len(sagemaker.list_training_jobs()["TrainingJobSummaries"]),
        "logs of jobs": len(logs.describe_log_streams(logGroupName=JOBS)["logStreams"]),
        "logs of endpoints": len(groups),
        "models": len(sagemaker.list_models()["Models"]),
        "configurations": len(sagemaker.list_endpoint_configs()["EndpointConfigs"]),
        "scaling": len(
            scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
        ),
    }
    return {what: count for what, count in counts.items() if count}


@pytest.mark.parametrize("versions", [False, True], ids=["plain bucket", "bucket with versions"])
def test_full_access_alone_cleans_up_what_it_may_and_the_caller_s_policy_the_rest(
    keys, tmp_path, versions
):
    sign_in(keys, "admin")
    run_file = make(tmp_path, versions)
    assert len(belongings()) == (11 if versions else 10)

    sign_in(keys, "full")
    here = clean_up.connect(tmp_path)
    rows = dict(clean_up.listing(here).itertuples(index=False))
    hidden = "; you may not list old versions and broken uploads"
    assert rows[f"folder {FOLDER}"] == f"1 objects, 0.0 MB{hidden}"
    for _ in range(2):  # the second call knows as well what the first one left
        with pytest.raises(RuntimeError) as caught:
            clean_up.delete(here, confirm=True)
        _, *reasons, remedy = str(caught.value).splitlines()
        assert remedy == clean_up.REMEDY and "caller_policy.json" in remedy
        for item, why in {
            "log video-m": "AccessDeniedException in DeleteLogGroup: ",
            "training job video-1": "its log stays: AccessDeniedException in DeleteLogStream: ",
            f"folder {FOLDER}": "you may not list old versions (s3:ListBucketVersions) and parts"
            " of broken uploads (s3:ListBucketMultipartUploads): if there are any, they stay",
            f"bucket {BUCKET.replace(ACCOUNT, '<account>')}": "AccessDenied in DeleteBucket: ",
            f"role {ROLE}": "AccessDenied in ",
        }.items():
            (reason,) = [line for line in reasons if line.startswith(f"- {item}: ")]
            assert why in reason
        assert len(reasons) == 5
    run = json.loads(run_file.read_text())
    assert run["deployed"] == ["log/video-m"] and run["jobs"] == ["training-job/video-1"]
    assert run["homes"] == [HOME] and len(run["created"]) == 2

    sign_in(keys, "admin")
    left = {"buckets": 1, "uploads": 1, "roles": 1, "logs of jobs": 1, "logs of endpoints": 1}
    assert belongings() == left | ({"old versions": 2} if versions else {})

    sign_in(keys, "reader")
    clean_up.delete(clean_up.connect(tmp_path), confirm=True)
    assert not run_file.exists()
    sign_in(keys, "admin")
    assert belongings() == {}
