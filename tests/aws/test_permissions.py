"""The policies in notebooks/aws/ are enough for the series, and for nothing more.

What is checked: the notebooks that use AWS run on an embedded AWS that enforces IAM
(local_mode/aws/permissions.py), the cells as a user with caller_policy.json, the jobs as a role
with trust_policy.json and execution_policy.json. Every request is judged by action, resource ARN
and conditions, and refused if no statement allows it; so are the forbidden ones below.

What is not: AWS's own evaluation, and requests that only AWS makes (pulling the image, metrics).
Those are in NOT_MADE_HERE, from AWS's documentation, and are judged by the same evaluator.
"""

import ast
import json
import os
import sys
from collections import namedtuple
from string import Template
from types import SimpleNamespace

import boto3
import cfnlint.api
import cfnlint.decode
import pytest
import yaml
from botocore.exceptions import ClientError
from cells import notebook_cells, run_cell, run_cells
from conftest import ROOT
from embedded import forget_sdk_clients, own_aws
from local_mode import aws
from tutorial import endpoint

NOTEBOOKS, TEMPLATE = ROOT / "notebooks", ROOT / "notebooks/aws/account.yaml"
ACCOUNT, REGION, PREFIX = "123456789012", "us-east-1", "video-tutorial"
ROLE, BUCKET = "SageMaker-Video-ExecutionRole", f"sagemaker-{REGION}-{ACCOUNT}"
ROLE_ARN, BUCKET_ARN = f"arn:aws:iam::{ACCOUNT}:role/{ROLE}", f"arn:aws:s3:::{BUCKET}"
KEY = f"{PREFIX}/a"  # of an object
VALUES = {
    "bucket": BUCKET,
    "prefix": PREFIX,
    "region": REGION,
    "account": ACCOUNT,
    "role_name": ROLE,
}
LOGS = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/sagemaker"
JOBS = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}"
TRAINING, PROCESSING = f"{JOBS}:training-job/video-1", f"{JOBS}:processing-job/video-1"
REPOSITORY = f"arn:aws:ecr:{REGION}:763104351884:repository"
PIPELINE, REGISTRY = f"{JOBS}:pipeline/video-p", f"{JOBS}:model-package-group/video-m"
EXECUTION, MODEL_VERSION = f"{PIPELINE}/execution/a", f"{JOBS}:model-package/video-m/1"
SCALING = {"application-autoscaling:service-namespace": "sagemaker"}
ALARM = f"arn:aws:cloudwatch:{REGION}:{ACCOUNT}:alarm"
SCALING_ROLE = "sagemaker.application-autoscaling.amazonaws.com"
PASSED = {"iam:PassedToService": "sagemaker.amazonaws.com"}
DENIED = ("AccessDenied", "AccessDeniedException")

# What the policies allow although no cell and no job asks the embedded AWS for it (yet).
NOT_MADE_HERE = {
    "execution_policy": [
        # AWS's list of what CreateTrainingJob needs, and the SDK's own policy for training
        ("s3:GetBucketLocation", BUCKET_ARN, {}),
        # what SageMaker does in S3 when a script rotates its checkpoints
        ("s3:DeleteObject", f"{BUCKET_ARN}/{PREFIX}/checkpoints/1/checkpoint-4/optimizer.pt", {}),
        ("logs:DescribeLogStreams", f"{LOGS}/TrainingJobs:log-stream:", {}),
        ("ecr:GetAuthorizationToken", "*", {}),
        ("ecr:BatchCheckLayerAvailability", f"{REPOSITORY}/pytorch-training", {}),
        ("ecr:BatchGetImage", f"{REPOSITORY}/pytorch-training", {}),
        ("ecr:GetDownloadUrlForLayer", f"{REPOSITORY}/pytorch-training", {}),
        ("ecr:GetDownloadUrlForLayer", f"{REPOSITORY}/ray", {}),
        # an upload of several parts that breaks off; a checkpoint that the script has deleted
        ("s3:AbortMultipartUpload", f"{BUCKET_ARN}/{PREFIX}/1/job/output/model.tar.gz", {}),
        ("s3:DeleteObject", f"{BUCKET_ARN}/{PREFIX}/checkpoints/1/checkpoint-1/model", {}),
    ],
    "caller_policy": [
        # the role with AmazonSageMakerFullAccess instead of a policy of its own (full_access)
        (
            "iam:AttachRolePolicy",
            ROLE_ARN,
            {"iam:PolicyARN": "arn:aws:iam::aws:policy/AmazonSageMakerFullAccess"},
        ),
        ("iam:PutRolePolicy", ROLE_ARN, {}),
        ("iam:ListRolePolicies", ROLE_ARN, {}),
        ("iam:DeleteRolePolicy", ROLE_ARN, {}),
        (
            "iam:DetachRolePolicy",
            ROLE_ARN,
            {"iam:PolicyARN": "arn:aws:iam::aws:policy/AmazonSageMakerFullAccess"},
        ),
        # an upload of several parts that breaks off
        ("s3:AbortMultipartUpload", f"{BUCKET_ARN}/{PREFIX}/1/train/a.mp4", {}),
        # jobs: stop, delete, tags, preparing clips; giving up a warm pool
        ("sagemaker:UpdateTrainingJob", TRAINING, {}),
        ("sagemaker:StopTrainingJob", TRAINING, {}),
        ("sagemaker:DeleteTrainingJob", TRAINING, {}),
        ("sagemaker:AddTags", TRAINING, {}),
        ("sagemaker:CreateProcessingJob", PROCESSING, {}),
        ("sagemaker:DescribeProcessingJob", PROCESSING, {}),
        ("sagemaker:StopProcessingJob", PROCESSING, {}),
        ("sagemaker:DeleteProcessingJob", PROCESSING, {}),
        ("sagemaker:StopTransformJob", f"{JOBS}:transform-job/video-1", {}),
        ("logs:DeleteLogStream", f"{LOGS}/TrainingJobs:log-stream:video-1/algo-1-1", {}),
        # the graphs of a job in the console, to which launch.links leads
        ("cloudwatch:GetMetricData", "*", {}),
        # quota and price
        (
            "servicequotas:RequestServiceQuotaIncrease",
            f"arn:aws:servicequotas:{REGION}:{ACCOUNT}:sagemaker/L-1",
            {},
        ),
        (
            "iam:CreateServiceLinkedRole",
            f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/servicequotas.amazonaws.com/x",
            {"iam:AWSServiceName": "servicequotas.amazonaws.com"},
        ),
        ("pricing:GetProducts", "*", {}),
        # the rule of the bucket that notebook 1 makes: S3 ends uploads that broke off
        ("s3:PutLifecycleConfiguration", BUCKET_ARN, {}),
        # an endpoint that scales to zero
        ("application-autoscaling:RegisterScalableTarget", "*", SCALING),
        ("application-autoscaling:PutScalingPolicy", "*", SCALING),
        ("application-autoscaling:DescribeScalableTargets", "*", {}),
        ("application-autoscaling:DeregisterScalableTarget", "*", SCALING),
        ("sagemaker:DescribeEndpointConfig", f"{JOBS}:endpoint-config/video-e", {}),
        ("sagemaker:UpdateEndpointWeightsAndCapacities", f"{JOBS}:endpoint/video-e", {}),
        ("cloudwatch:PutMetricAlarm", f"{ALARM}:video-e-from-zero", {}),
        ("cloudwatch:DescribeAlarms", f"{ALARM}:video-e-from-zero", {}),
        ("cloudwatch:PutMetricAlarm", f"{ALARM}:TargetTracking-endpoint/video-e/variant/a", {}),
        ("cloudwatch:DeleteAlarms", f"{ALARM}:video-e-from-zero", {}),
        (
            "iam:CreateServiceLinkedRole",
            f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/{SCALING_ROLE}/x",
            {"iam:AWSServiceName": SCALING_ROLE},
        ),
    ],
    # a pipeline, a registry of models, and their end
    "caller_policy_guides": [
        ("sagemaker:CreatePipeline", PIPELINE, {}),
        ("sagemaker:UpdatePipeline", PIPELINE, {}),
        ("sagemaker:DescribePipeline", PIPELINE, {}),
        ("sagemaker:StartPipelineExecution", PIPELINE, {}),
        ("sagemaker:DescribePipelineExecution", EXECUTION, {}),
        ("sagemaker:ListPipelineExecutionSteps", EXECUTION, {}),
        ("sagemaker:ListPipelineExecutions", PIPELINE, {}),
        ("sagemaker:StopPipelineExecution", EXECUTION, {}),
        ("sagemaker:DeletePipeline", PIPELINE, {}),
        ("sagemaker:AddTags", PIPELINE, {}),
        ("sagemaker:CreateModelPackageGroup", REGISTRY, {}),
        ("sagemaker:AddTags", REGISTRY, {}),
        ("sagemaker:DescribeModelPackageGroup", REGISTRY, {}),
        ("sagemaker:CreateModelPackage", MODEL_VERSION, {}),
        ("sagemaker:DescribeModelPackage", MODEL_VERSION, {}),
        ("sagemaker:UpdateModelPackage", MODEL_VERSION, {}),  # to approve it
        ("sagemaker:ListModelPackages", "*", {}),
        ("sagemaker:DeleteModelPackage", MODEL_VERSION, {}),
        ("sagemaker:DeleteModelPackageGroup", REGISTRY, {}),
    ],
    # what the execution role does for a pipeline: it starts the jobs, as itself, and registers
    "pipeline_policy": [
        *(
            (f"sagemaker:{verb}{kind}Job", f"{JOBS}:{kind.lower()}-job/video-1", {})
            for verb in ("Create", "Describe", "Stop")
            for kind in ("Training", "Processing")
        ),
        ("sagemaker:AddTags", TRAINING, {}),
        ("iam:PassRole", ROLE_ARN, PASSED),
        ("sagemaker:CreateModelPackageGroup", REGISTRY, {}),
        ("sagemaker:DescribeModelPackageGroup", REGISTRY, {}),
        ("sagemaker:CreateModelPackage", MODEL_VERSION, {}),
        ("sagemaker:DescribeModelPackage", MODEL_VERSION, {}),
    ],
}
# The SDK asks for it and does without: see test_the_sdk_s_own_validation_wants_more_...
WITHHELD = ("iam:SimulatePrincipalPolicy",)
Account = namedtuple("Account", "admin caller principal folder")


def policy(name, **values):
    """A policy of notebooks/aws/ with its parameters filled in."""
    text = (NOTEBOOKS / "aws" / f"{name}.json").read_text()
    return json.loads(Template(text).substitute(VALUES | values))


def statements(name, without=None):
    return [s for s in policy(name)["Statement"] if s["Sid"] != without]


def run(notebook, parameters, stop=None):
    """Executes a notebook's code cells, up to `stop`, with those of the parameters it has."""
    (known,) = (cell.source for cell in notebook_cells(notebook) if cell.id == "parameters")
    names = {target.id for node in ast.parse(known).body for target in node.targets}
    return run_cells(notebook, {k: v for k, v in parameters.items() if k in names}, stop)


def deploy(results):
    """The guide's requests: an endpoint that answers, a batch transform job, and their end.

    `results`: the variables of notebook 4.
    """
    here, video, machine = results["here"], results["long_video"], "ml.m5.xlarge"
    settings = {"window_seconds": 2.5, "hop_seconds": 0.3, "threshold": 0.8}
    given = {"here": here, "endpoint": endpoint, "settings": settings}
    given |= {"tested": SimpleNamespace(trained=results["trained"]), "endpoint_instance": machine}
    made = run_cell("how_to/deploy", "request", **given)
    with endpoint.serving(here, made["packed"], made["model"], made["config"]) as ask:
        assert "intervals" in ask(video)
    (answer,) = endpoint.transform(here, made["packed"], made["model"], [video], machine)
    assert "intervals" in answer


def install_role(iam):
    """The execution role as an administrator makes it, from the two policies."""
    trust = json.dumps(policy("trust_policy"))
    try:
        iam.create_role(RoleName=ROLE, AssumeRolePolicyDocument=trust)
    except iam.exceptions.EntityAlreadyExistsException:
        iam.update_assume_role_policy(RoleName=ROLE, PolicyDocument=trust)
    for attached in iam.list_attached_role_policies(RoleName=ROLE)["AttachedPolicies"]:
        iam.detach_role_policy(RoleName=ROLE, PolicyArn=attached["PolicyArn"])
    permissions = json.dumps(policy("execution_policy"))
    iam.put_role_policy(RoleName=ROLE, PolicyName="video-tutorial", PolicyDocument=permissions)


@pytest.fixture(scope="module")
def account():
    """An embedded AWS that enforces IAM, with a user who has caller_policy.json and nothing else.

    This process is signed in as that user.
    """
    with own_aws(grace_seconds=5, enforce=True) as port:
        admin = boto3.Session(region_name=REGION)
        iam = admin.client("iam")
        iam.create_user(UserName="reader")
        created = iam.create_policy(
            PolicyName="video-tutorial", PolicyDocument=json.dumps(policy("caller_policy"))
        )
        iam.attach_user_policy(UserName="reader", PolicyArn=created["Policy"]["Arn"])
        key = iam.create_access_key(UserName="reader")["AccessKey"]
        os.environ["AWS_ACCESS_KEY_ID"] = key["AccessKeyId"]
        os.environ["AWS_SECRET_ACCESS_KEY"] = key["SecretAccessKey"]
        forget_sdk_clients()
        reader = f"arn:aws:iam::{ACCOUNT}:user/reader"
        yield Account(admin, boto3.Session(region_name=REGION), reader, aws._state_folder(port))


def decisions(account):
    """Every request so far, as the embedded AWS judged it."""
    lines = (account.folder / "authorizations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def belongings(session):
    """All that the series could have left in the account."""
    sagemaker, logs = session.client("sagemaker"), session.client("logs")
    streams = [
        stream["logStreamName"]
        for group in logs.describe_log_groups()["logGroups"]
        for page in logs.get_paginator("describe_log_streams").paginate(
            logGroupName=group["logGroupName"]
        )
        for stream in page["logStreams"]
    ]
    return {
        "buckets": [bucket["Name"] for bucket in session.client("s3").list_buckets()["Buckets"]],
        "roles": [role["RoleName"] for role in session.client("iam").list_roles()["Roles"]],
        "models": sagemaker.list_models()["Models"],
        "endpoint configurations": sagemaker.list_endpoint_configs()["EndpointConfigs"],
        "endpoints": sagemaker.list_endpoints()["Endpoints"],
        "log groups of endpoints": logs.describe_log_groups(
            logGroupNamePrefix="/aws/sagemaker/Endpoints/"
        )["logGroups"],
        "training jobs": sagemaker.list_training_jobs()["TrainingJobSummaries"],
        "processing jobs": sagemaker.list_processing_jobs()["ProcessingJobSummaries"],
        "log streams": streams,
    }


@pytest.fixture(scope="module")
def series(account, clips_folder, tmp_path_factory):
    """The notebooks under the policies: {policy: [(action, resource, context), ...]}."""
    output, url = tmp_path_factory.mktemp("series"), os.environ["AWS_ENDPOINT_URL"]
    embedded = yaml.safe_load((NOTEBOOKS / "local_mode/parameters.yaml").read_text())
    parameters = embedded | {"endpoint_url": url, "output_dir": str(output), "compare_nodes": [1]}
    parameters |= {"epochs": 1, "prepare_instances": 2, "deploy": True, "transform": True}
    parameters["hyperparameters"] = {
        "epochs": 1,
        "train_batch_size": 16,
        "report_to": "tensorboard",
    }
    choices = {"model_name": "local_mode/tiny_videomae_v2", "learning_rate": 4e-4}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(NOTEBOOKS)
        patch.setenv("MPLBACKEND", "agg")
        # Who is signed in stays so: connect would set the administrator's keys.
        patch.setattr(aws, "connect", lambda endpoint_url: endpoint_url)
        patch.setattr(aws, "disconnect", lambda endpoint_url: None)
        patch.syspath_prepend(str(ROOT / "scripts"))
        before = belongings(account.admin)
        run("01_setup", parameters)
        install_role(account.admin.client("iam"))
        run_file = output / "run.json"
        handed_over = {"dataset": str(clips_folder), "choices": choices}  # by notebook 2
        run_file.write_text(json.dumps(json.loads(run_file.read_text()) | handed_over))
        job = run("03_remote_launch", parameters)["described"]
        run("how_to/train_on_many_machines", parameters)
        between = belongings(account.admin)
        deploy(run("04_results", parameters))
        run("06_clean_up", parameters)
        after = belongings(account.admin)
    assert job["TrainingJobStatus"] == "Completed"
    made = {name: [] for name in NOT_MADE_HERE}
    for line in decisions(account):
        if line["principal"] == f"arn:aws:sts::{ACCOUNT}:assumed-role/{ROLE}/SageMaker":
            name = "execution_policy"
        elif line["principal"] == account.principal:
            name = "caller_policy"
        else:
            continue
        if line["action"] in WITHHELD:
            continue
        assert line["allowed"], f"{name} does not allow {line['action']} on {line['resource']}"
        made[name].append((line["action"], line["resource"], line["context"]))
    return made | {"belongings": (before, between, after)}


# The series passes --------------------------------------------------------------------------------
@pytest.mark.long
def test_the_series_runs_under_the_policies(series):
    """The fixture asserts that nothing was refused; here, that caller and job did act."""
    assert {"sagemaker:CreateTrainingJob", "iam:PassRole", "s3:DeleteObjectVersion"} <= {
        action for action, *_ in series["caller_policy"]
    }
    assert {"sagemaker:CreateEndpoint", "sagemaker:CreateTransformJob"} <= {
        action for action, *_ in series["caller_policy"]
    }
    assert {"s3:GetObject", "s3:PutObject", "logs:PutLogEvents"} <= {
        action for action, *_ in series["execution_policy"]
    }


@pytest.mark.long
def test_the_account_is_as_empty_after_as_before(series):
    before, between, after = series["belongings"]
    first = ("buckets", "roles", "training jobs", "processing jobs", "log streams")
    assert all(between[kind] for kind in first), "notebooks 1 and 3 made one of each"
    assert after == before


@pytest.mark.parametrize("name", NOT_MADE_HERE)
def test_what_only_aws_does_is_allowed_too(name):
    from local_mode.aws.permissions import is_allowed

    for action, resource, context in NOT_MADE_HERE[name]:
        assert is_allowed(statements(name), action, resource, context), action


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "sid"),
    [(name, s["Sid"]) for name in NOT_MADE_HERE for s in policy(name)["Statement"]],
)
def test_no_statement_is_superfluous(series, name, sid):
    from local_mode.aws.permissions import is_allowed

    rest = statements(name, without=sid)
    assert not all(is_allowed(rest, *request) for request in series[name] + NOT_MADE_HERE[name])


@pytest.mark.long
@pytest.mark.parametrize("name", NOT_MADE_HERE)
def test_no_action_is_superfluous(series, name):
    allowed = set()
    for statement in statements(name):
        actions = statement["Action"]
        allowed |= {actions} if isinstance(actions, str) else set(actions)
    assert not any("*" in action for action in allowed)
    assert allowed == {action for action, *_ in series[name] + NOT_MADE_HERE[name]}


# All else is refused ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sessions(account):
    """{who: boto3 session}, in an account where the others have a bucket, a role and a job.

    The tests of the series come before, because they compare the account with an empty one.
    """
    s3, iam = account.admin.client("s3"), account.admin.client("iam")
    install_role(iam)
    iam.create_role(RoleName="Admins", AssumeRolePolicyDocument=json.dumps(policy("trust_policy")))
    for bucket in {BUCKET, "somebody-elses"} - {b["Name"] for b in s3.list_buckets()["Buckets"]}:
        s3.create_bucket(Bucket=bucket)
    s3.put_object(Bucket="somebody-elses", Key=KEY, Body=b"secret")
    s3.put_object(Bucket=BUCKET, Key="other-project/a", Body=b"secret")
    s3.put_object(Bucket=BUCKET, Key=KEY, Body=b"ours")
    assumed = account.admin.client("sts").assume_role(RoleArn=ROLE_ARN, RoleSessionName="job")
    keys = assumed["Credentials"]
    job = boto3.Session(
        keys["AccessKeyId"], keys["SecretAccessKey"], keys["SessionToken"], region_name=REGION
    )
    return {"caller": account.caller, "job": job}


def training_request(role_arn, name="video-denied", code="", **request):
    """CreateTrainingJob's request, of a job that is one Python text."""
    return {
        "TrainingJobName": name,
        "RoleArn": role_arn,
        "AlgorithmSpecification": {
            "TrainingImage": "none",
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["python3", "-c", code],
        },
        "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/{PREFIX}/out"},
        "ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1},
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
    } | request


ADMIN_POLICY = "arn:aws:iam::aws:policy/AdministratorAccess"
ANYTHING = '{"Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}'
TRAINING_LOG = {"logGroupName": "/aws/sagemaker/TrainingJobs"}
FORBIDDEN = [  # who, action, client, its method, arguments
    ("caller", "s3:GetObject", "s3", "get_object", {"Bucket": "somebody-elses", "Key": KEY}),
    ("caller", "s3:GetObject", "s3", "get_object", {"Bucket": BUCKET, "Key": "other-project/a"}),
    ("caller", "s3:PutObject", "s3", "put_object", {"Bucket": BUCKET, "Key": "video-tutorial2/a"}),
    ("caller", "s3:DeleteBucket", "s3", "delete_bucket", {"Bucket": "somebody-elses"}),
    ("caller", "s3:PutBucketPolicy", "s3", "put_bucket_policy", {"Bucket": BUCKET, "Policy": "{}"}),
    (
        "caller",
        "iam:PassRole",
        "sagemaker",
        "create_training_job",
        training_request(f"arn:aws:iam::{ACCOUNT}:role/Admins"),
    ),
    ("caller", "iam:CreateUser", "iam", "create_user", {"UserName": "me-again"}),
    ("caller", "iam:CreateAccessKey", "iam", "create_access_key", {"UserName": "admin"}),
    (
        "caller",
        "iam:AttachRolePolicy",
        "iam",
        "attach_role_policy",
        {"RoleName": ROLE, "PolicyArn": ADMIN_POLICY},
    ),
    (
        "caller",
        "iam:PutRolePolicy",
        "iam",
        "put_role_policy",
        {"RoleName": "Admins", "PolicyName": "all", "PolicyDocument": ANYTHING},
    ),
    (
        "caller",
        "iam:CreateServiceLinkedRole",
        "iam",
        "create_service_linked_role",
        {"AWSServiceName": "autoscaling.amazonaws.com"},
    ),
    (
        "caller",
        "ec2:RunInstances",
        "ec2",
        "run_instances",
        {"ImageId": "ami-1", "MinCount": 1, "MaxCount": 1},
    ),
    (
        "caller",
        "sagemaker:StopTrainingJob",
        "sagemaker",
        "stop_training_job",
        {"TrainingJobName": "somebody-elses"},
    ),
    (
        "caller",
        "sagemaker:CreateNotebookInstance",
        "sagemaker",
        "create_notebook_instance",
        {"NotebookInstanceName": "n", "InstanceType": "ml.t3.medium", "RoleArn": ROLE_ARN},
    ),
    (
        "caller",
        "sagemaker:CreateEndpoint",
        "sagemaker",
        "create_endpoint",
        {"EndpointName": "somebody-elses", "EndpointConfigName": "video-1"},
    ),
    (
        "caller",
        "sagemaker:InvokeEndpointAsync",
        "sagemaker-runtime",
        "invoke_endpoint_async",
        {"EndpointName": "somebody-elses", "InputLocation": f"s3://{BUCKET}/{KEY}"},
    ),
    (
        "caller",
        "logs:DeleteLogGroup",
        "logs",
        "delete_log_group",
        {"logGroupName": "/aws/sagemaker/Endpoints/somebody-elses"},
    ),
    (
        "caller",
        "secretsmanager:GetSecretValue",
        "secretsmanager",
        "get_secret_value",
        {"SecretId": "password"},
    ),
    ("caller", "logs:DeleteLogGroup", "logs", "delete_log_group", TRAINING_LOG),
    (
        "caller",
        "logs:GetLogEvents",
        "logs",
        "get_log_events",
        TRAINING_LOG | {"logStreamName": "somebody-elses/algo-1"},
    ),
    ("job", "s3:GetObject", "s3", "get_object", {"Bucket": "somebody-elses", "Key": KEY}),
    ("job", "s3:PutObject", "s3", "put_object", {"Bucket": BUCKET, "Key": "other-project/a"}),
    ("job", "s3:DeleteObject", "s3", "delete_object", {"Bucket": BUCKET, "Key": KEY}),
    (
        "caller",
        "application-autoscaling:DeregisterScalableTarget",
        "application-autoscaling",
        "deregister_scalable_target",
        {
            "ServiceNamespace": "ecs",
            "ResourceId": "service/somebody/elses",
            "ScalableDimension": "ecs:service:DesiredCount",
        },
    ),
    (
        "job",
        "iam:PutRolePolicy",
        "iam",
        "put_role_policy",
        {"RoleName": ROLE, "PolicyName": "all", "PolicyDocument": ANYTHING},
    ),
    (
        "job",
        "sagemaker:CreateTrainingJob",
        "sagemaker",
        "create_training_job",
        training_request(ROLE_ARN),
    ),
    (
        "job",
        "logs:CreateLogStream",
        "logs",
        "create_log_stream",
        {"logGroupName": "/company/audit", "logStreamName": "s"},
    ),
    (
        "job",
        "cloudwatch:PutMetricData",
        "cloudwatch",
        "put_metric_data",
        {"Namespace": "Company/Billing", "MetricData": [{"MetricName": "m", "Value": 1.0}]},
    ),
    (
        "job",
        "secretsmanager:GetSecretValue",
        "secretsmanager",
        "get_secret_value",
        {"SecretId": "password"},
    ),
]


@pytest.mark.parametrize(
    ("who", "action", "client", "method", "arguments"),
    FORBIDDEN,
    ids=[f"{who}-{action}-{i}" for i, (who, action, *_) in enumerate(FORBIDDEN)],
)
def test_the_rest_is_refused(account, sessions, who, action, client, method, arguments):
    with pytest.raises(ClientError) as error:
        getattr(sessions[who].client(client), method)(**arguments)
    assert error.value.response["Error"]["Code"] in DENIED
    last = decisions(account)[-1]
    assert (last["action"], last["allowed"]) == (action, False)
    if client != "s3":  # S3 does not tell why
        assert f"is not authorized to perform: {action} on resource: " in str(error.value)


def test_conditions_count():
    from local_mode.aws.permissions import is_allowed

    caller, job = statements("caller_policy"), statements("execution_policy")
    for service, expected in {"sagemaker.amazonaws.com": True, "ec2.amazonaws.com": False}.items():
        context = {"iam:PassedToService": service}
        assert is_allowed(caller, "iam:PassRole", ROLE_ARN, context) is expected
    assert not is_allowed(caller, "iam:PassRole", ROLE_ARN)
    assert not is_allowed(job, "cloudwatch:PutMetricData", "*")


def test_another_account_cannot_borrow_the_role_through_sagemaker():
    from local_mode.aws.permissions import is_allowed

    trust = statements("trust_policy")
    assert is_allowed(trust, "sts:AssumeRole", context={"aws:SourceAccount": ACCOUNT})
    assert not is_allowed(trust, "sts:AssumeRole", context={"aws:SourceAccount": "somebody-elses"})
    assert not is_allowed(trust, "sts:AssumeRole")


def test_full_access_is_wider():
    """What notebook 1 says of AmazonSageMakerFullAccess, by the copy of it that moto has."""
    from local_mode.aws.permissions import is_allowed
    from moto.iam.aws_managed_policies import aws_managed_policies_data

    full = json.loads(aws_managed_policies_data)["AmazonSageMakerFullAccess"]["Document"]
    for action, resource, context in [
        ("s3:GetObject", "arn:aws:s3:::company-sagemaker-data/a", {}),
        ("s3:DeleteObject", f"{BUCKET_ARN}/other-project/a", {}),
        ("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/Admins", PASSED),
        ("sagemaker:StopTrainingJob", f"{JOBS}:training-job/somebody-elses", {}),
        ("sagemaker:CreateEndpoint", f"{JOBS}:endpoint/somebody-elses", {}),
        ("sagemaker:CreateNotebookInstance", f"{JOBS}:notebook-instance/n", {}),
    ]:
        assert is_allowed(full["Statement"], action, resource, context), action
        for name in NOT_MADE_HERE:
            assert not is_allowed(statements(name), action, resource, context), (name, action)


def test_a_deny_wins_and_what_is_not_understood_is_an_error():
    from local_mode.aws.permissions import is_allowed

    allow = {"Sid": "A", "Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    deny = allow | {"Effect": "Deny", "Action": "s3:Delete*"}
    assert is_allowed([allow, deny], "s3:GetObject")
    assert not is_allowed([allow, deny], "s3:DeleteObject")
    assert not is_allowed([allow | {"NotResource": "a*", "Resource": []}], "ec2:RunInstances")
    with pytest.raises(ValueError, match="NumericLessThan"):
        strange = {"NumericLessThan": {"s3:max-keys": "10"}}
        is_allowed([allow | {"Condition": strange}], "s3:ListBucket", "*", {"s3:max-keys": 5})
    with pytest.raises(ValueError, match="policy variables"):
        is_allowed([allow | {"Resource": "arn:aws:s3:::b/${aws:username}"}], "s3:GetObject")


# What a reader sees -------------------------------------------------------------------------------
def finish(sagemaker, name):
    """Waits for a job (boto3's waiter knows the end states) and returns its description."""
    waiter = sagemaker.get_waiter("training_job_completed_or_stopped")
    waiter.wait(TrainingJobName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 60})
    return sagemaker.describe_training_job(TrainingJobName=name)


def test_a_job_cannot_write_elsewhere_and_says_so(sessions):
    sagemaker = sessions["caller"].client("sagemaker")
    elsewhere = {"OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/other-project"}}
    sagemaker.create_training_job(**training_request(ROLE_ARN, "video-elsewhere", **elsewhere))
    with pytest.raises(Exception, match="terminal failure"):
        finish(sagemaker, "video-elsewhere")
    job = sagemaker.describe_training_job(TrainingJobName="video-elsewhere")
    assert job["FailureReason"].startswith("ClientError: ")
    assert "AccessDenied" in job["FailureReason"]


def test_a_script_has_the_permissions_of_the_role_and_no_others(sessions):
    code = (
        "import boto3; print(boto3.client('sts').get_caller_identity()['Arn'])\n"
        f"boto3.client('s3').put_object(Bucket='{BUCKET}', Key='{PREFIX}/from-script', Body=b'1')\n"
        "boto3.client('s3').list_buckets()"
    )
    sagemaker = sessions["caller"].client("sagemaker")
    sagemaker.create_training_job(**training_request(ROLE_ARN, "video-script", code))
    with pytest.raises(Exception, match="terminal failure"):
        finish(sagemaker, "video-script")
    logs = sessions["caller"].client("logs")
    streams = logs.describe_log_streams(**TRAINING_LOG, logStreamNamePrefix="video-script/")
    (stream,) = (stream["logStreamName"] for stream in streams["logStreams"])
    found = logs.get_log_events(**TRAINING_LOG, logStreamName=stream)["events"]
    text = "\n".join(event["message"] for event in found)
    assert f"assumed-role/{ROLE}/SageMaker" in text
    assert "(AccessDenied) when calling the ListBuckets operation" in text


ROTATION = """
import pathlib, time
old, new = pathlib.Path("checkpoints/old"), pathlib.Path("checkpoints/new")
old.write_text("1")
while not old.with_name("old.sagemaker-uploaded").exists():
    time.sleep(0.1)
old.unlink()
new.write_text("2")
"""


def test_a_job_s_role_deletes_checkpoints_and_nothing_else(account, sessions):
    """A role without the permission: the job goes on, the object stays, the server's log says so.

    What SageMaker does then is documented nowhere.
    """
    without = statements("execution_policy", "DeleteCheckpointsThatTheJobHasDeleted")
    iam, sagemaker = account.admin.client("iam"), account.admin.client("sagemaker")
    trust = json.dumps(policy("trust_policy"))
    keeper = iam.create_role(RoleName="keeper", AssumeRolePolicyDocument=trust)["Role"]["Arn"]
    document = json.dumps(policy("execution_policy") | {"Statement": without})
    iam.put_role_policy(RoleName="keeper", PolicyName="video-tutorial", PolicyDocument=document)
    left = {}
    for role, folder in [(ROLE_ARN, "checkpoints/1"), (ROLE_ARN, "b"), (keeper, "checkpoints/2")]:
        name = f"video-{folder.replace('/', '-')}"
        uri = f"{PREFIX}/{folder}/"
        config = {"CheckpointConfig": {"S3Uri": f"s3://{BUCKET}/{uri}"}}
        sagemaker.create_training_job(**training_request(role, name, ROTATION, **config))
        assert finish(sagemaker, name)["TrainingJobStatus"] == "Completed"
        listing = account.admin.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=uri)
        left[folder] = [item["Key"].removeprefix(uri) for item in listing["Contents"]]
    assert left == {"checkpoints/1": ["new"], "b": ["new", "old"], "checkpoints/2": ["new", "old"]}
    text = (account.folder / "server.log").read_text()
    assert f"video-checkpoints-2: {PREFIX}/checkpoints/2/old stays in S3: " in text
    assert "video-checkpoints-1:" not in text


def test_clips_that_the_role_cannot_list_are_refused_at_launch(sessions):
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://somebody-elses/{PREFIX}/"}
    channel = {"ChannelName": "train", "DataSource": {"S3DataSource": source}}
    request = training_request(ROLE_ARN, "video-unlisted", InputDataConfig=[channel])
    with pytest.raises(ClientError, match='has "s3:ListBucket" permissions on bucket'):
        sessions["caller"].client("sagemaker").create_training_job(**request)


def test_enforcing_where_everything_was_allowed_is_refused(monkeypatch):
    answer = {"python": sys.prefix, "enforce": False}
    monkeypatch.setattr(aws, "status", lambda port: answer)
    with pytest.raises(RuntimeError, match="allows everything. Stop it first"):
        aws.start(1, enforce=True)


def test_a_role_that_does_not_trust_sagemaker_is_refused(account, sessions):
    iam, trust = account.admin.client("iam"), policy("trust_policy", account="somebody-elses")
    iam.update_assume_role_policy(RoleName=ROLE, PolicyDocument=json.dumps(trust))
    with pytest.raises(ClientError, match="Could not assume role"):
        sessions["caller"].client("sagemaker").create_training_job(**training_request(ROLE_ARN))
    install_role(iam)


def test_the_sdk_s_own_validation_wants_more_than_a_job_needs(account, sessions, monkeypatch):
    """Whoever may simulate policies, as administrators do, must switch this validation off.

    It takes a role for unusable that has no rights on network interfaces, and it simulates without
    condition keys. The caller of these policies may not simulate: the SDK warns, and goes on.
    """
    from sagemaker.core.helper import iam_role_resolver as sdk
    from sagemaker.core.helper.session_helper import Session

    monkeypatch.setenv("SAGEMAKER_VALIDATE_ROLE", "true")
    as_admin = Session(account.admin, default_bucket=BUCKET)
    with pytest.raises(sdk.RoleValidationError, match="ec2:CreateNetworkInterface"):
        sdk.resolve_and_validate_role(ROLE_ARN, sagemaker_session=as_admin)
    as_caller = Session(account.caller, default_bucket=BUCKET)
    assert sdk.resolve_and_validate_role(ROLE_ARN, sagemaker_session=as_caller) == ROLE_ARN
    monkeypatch.setenv("SAGEMAKER_VALIDATE_ROLE", "false")
    assert sdk.resolve_and_validate_role(ROLE_ARN, sagemaker_session=as_admin) == ROLE_ARN


# The files ----------------------------------------------------------------------------------------
def lint(template):
    """What cfn-lint finds, hints included, but for the advice to write ${AWS::Partition}."""
    options = cfnlint.api.ManualArgs(include_checks=["I"], ignore_checks=["I3042"])
    return [str(match) for match in cfnlint.api.lint(template, config=options)]


def test_cfn_lint_finds_nothing():
    assert lint(TEMPLATE.read_text()) == []


@pytest.mark.parametrize("name", NOT_MADE_HERE)
def test_policies_are_valid_as_they_stand_and_fit(name):
    """cfn-lint knows AWS's actions and their resources; a managed policy has 6,144 characters."""
    text = (NOTEBOOKS / "aws" / f"{name}.json").read_text()
    assert {s["Effect"] for s in json.loads(text)["Statement"]} == {"Allow"}
    filled = policy(name, bucket="b" * 63, role_name="r" * 64)
    assert len(json.dumps(filled, separators=(",", ":"))) < 6144
    properties = {"PolicyDocument": filled}
    resource = {"Type": "AWS::IAM::ManagedPolicy", "Properties": properties}
    assert lint(json.dumps({"Resources": {"Policy": resource}})) == []
    wrong = dict(filled["Statement"][0], Action="s3:GetObjekt")
    filled["Statement"].append(wrong)
    assert any("getobjekt" in found for found in lint(json.dumps({"Resources": {"P": resource}})))


def test_the_template_makes_the_same_role_and_policies(account):
    """The embedded AWS makes role, policy and bucket of it; the next test reads the rest."""
    stacks = account.admin.client("cloudformation")
    parameters = {"Email": "reader@example.com", "RoleName": "FromTemplate", "Prefix": "clips/mine"}
    stacks.create_stack(
        StackName="video-tutorial",
        TemplateBody=TEMPLATE.read_text(),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in parameters.items()],
    )
    (stack,) = stacks.describe_stacks(StackName="video-tutorial")["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
    bucket = f"sagemaker-video-{REGION}-{ACCOUNT}"
    assert (outputs["Bucket"], outputs["Prefix"]) == (bucket, "clips/mine")
    assert outputs["RoleArn"] == f"arn:aws:iam::{ACCOUNT}:role/FromTemplate"
    account.admin.client("s3").head_bucket(Bucket=bucket)

    iam, values = account.admin.client("iam"), {"bucket": bucket, "prefix": "clips/mine"}
    values["role_name"] = outputs["RoleName"]
    role = iam.get_role(RoleName="FromTemplate")["Role"]
    assert role["AssumeRolePolicyDocument"] == policy("trust_policy")
    inline = iam.get_role_policy(RoleName="FromTemplate", PolicyName="video-tutorial")
    document = inline["PolicyDocument"]  # moto writes that of a stack as Python would
    document = ast.literal_eval(document) if isinstance(document, str) else document
    assert document == policy("execution_policy", **values)
    made = iam.get_policy_version(PolicyArn=outputs["CallerPolicyArn"], VersionId="v1")
    wanted = policy("caller_policy", **values)
    wanted["Statement"] = [s for s in wanted["Statement"] if not s["Sid"].startswith("Manage")]
    assert made["PolicyVersion"]["Document"] == wanted


def test_the_bucket_is_private_encrypted_versioned_and_tidied_and_the_bill_is_watched():
    template, problems = cfnlint.decode.decode(str(TEMPLATE))
    assert not problems
    resources = {name: r["Properties"] for name, r in template["Resources"].items()}
    bucket = resources["Bucket"]
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4
    assert bucket["BucketEncryption"] and bucket["VersioningConfiguration"]["Status"] == "Enabled"
    assert template["Resources"]["Bucket"]["DeletionPolicy"] == "Retain"
    rules = {rule["Id"]: rule for rule in bucket["LifecycleConfiguration"]["Rules"] if "Id" in rule}
    assert rules["checkpoints"]["Prefix"] == {"Fn::Sub": "${Prefix}/checkpoints/"}
    assert rules["leftovers"]["NoncurrentVersionExpiration"]["NoncurrentDays"] == 7
    (only,) = resources["BucketPolicy"]["PolicyDocument"]["Statement"]
    assert (only["Effect"], only["Principal"], only["Action"]) == ("Deny", "*", "s3:*")
    assert only["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    alarms = [n["Notification"] for n in resources["Budget"]["NotificationsWithSubscribers"]]
    assert {(a["NotificationType"], a["Threshold"]) for a in alarms} == {
        ("ACTUAL", 80),
        ("FORECASTED", 100),
    }
