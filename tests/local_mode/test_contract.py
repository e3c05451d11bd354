"""The embedded AWS answers as AWS does: shapes from botocore's service models, words from words.py.

This module walks through the operations that the series uses. Beyond it, every test that has an
embedded AWS of its own is watched (embedded.own_aws), the run of the series among them.
"""

import re

import boto3
import botocore.session
import pytest
from account import BUCKET, ROLE, describe, finish, put, run, wait_until
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.exceptions import ClientError, ParamValidationError
from contract import breaches_of, validates, watched, wrong_in_answer
from embedded import own_aws
from local_mode.aws import words
from sagemaker.core.helper.session_helper import Session

TRUST = '{"Version": "2012-10-17", "Statement": []}'
FULL_ACCESS = "arn:aws:iam::aws:policy/AmazonSageMakerFullAccess"
TARGET = {"ServiceNamespace": "sagemaker", "ResourceId": "endpoint/e/variant/AllTraffic"}
TARGET["ScalableDimension"] = "sagemaker:variant:DesiredInstanceCount"


@pytest.fixture(scope="module", name="port")
def small_account():
    """An account with one of each: a job that is done, one that runs, a model, ..."""
    with own_aws(grace_seconds=1, spot_interruptions=0) as port:
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        put("clips/1.mp4", b"one")
        sagemaker = boto3.client("sagemaker")
        run("done", "print('loss=0.5')")
        run("runs", "import time; time.sleep(600)")
        sagemaker.create_processing_job(**processing_request("processed"))
        sagemaker.create_model(**model_request("m"))
        sagemaker.create_endpoint_config(**config_request("e"))
        sagemaker.create_endpoint(EndpointName="e", EndpointConfigName="e")
        sagemaker.create_transform_job(**transform_request("transformed"))
        boto3.client("iam").create_role(RoleName="role", AssumeRolePolicyDocument=TRUST)
        boto3.client("iam").attach_role_policy(RoleName="role", PolicyArn=FULL_ACCESS)
        finish("done")
        for kind, name in (("processing", "processed"), ("transform", "transformed")):
            ended(kind, name)
        wait_until(lambda: endpoint()["EndpointStatus"] == "Failed")  # it has no archive
        yield port


def endpoint():
    return boto3.client("sagemaker").describe_endpoint(EndpointName="e")


def ended(kind, name):
    """The description of a processing or transform job, when it has ended."""
    ask, key = getattr(boto3.client("sagemaker"), f"describe_{kind}_job"), kind.capitalize()
    wait_until(lambda: ask(**{f"{key}JobName": name})[f"{key}JobStatus"] in ("Completed", "Failed"))
    return ask(**{f"{key}JobName": name})


def processing_request(name):
    machine = {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1}
    return {
        "ProcessingJobName": name,
        "RoleArn": ROLE,
        "AppSpecification": {"ImageUri": "none", "ContainerEntrypoint": ["true"]},
        "ProcessingResources": {"ClusterConfig": machine},
    }


def model_request(name):
    container = {"Image": "none", "ModelDataUrl": f"s3://{BUCKET}/none.tar.gz"}
    return {"ModelName": name, "ExecutionRoleArn": ROLE, "PrimaryContainer": container}


def config_request(name, model="m"):
    variant = {"VariantName": "AllTraffic", "ModelName": model, "InstanceType": "ml.m5.xlarge"}
    variant["InitialInstanceCount"] = 1
    return {"EndpointConfigName": name, "ProductionVariants": [variant]}


def transform_request(name, model="m"):
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/clips/"}
    return {
        "TransformJobName": name,
        "ModelName": model,
        "TransformInput": {"DataSource": {"S3DataSource": source}},
        "TransformOutput": {"S3OutputPath": f"s3://{BUCKET}/transformed"},
        "TransformResources": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1},
    }


def training_request(name):
    """The request of account.run, as a dictionary."""
    specification = {"TrainingImage": "none", "TrainingInputMode": "File"}
    return {
        "TrainingJobName": name,
        "RoleArn": ROLE,
        "AlgorithmSpecification": specification | {"ContainerEntrypoint": ["true"]},
        "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/out"},
        "ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1},
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
    }


ANSWERS = [  # service, method, arguments
    ("sagemaker", "describe_training_job", {"TrainingJobName": "done"}),
    ("sagemaker", "describe_training_job", {"TrainingJobName": "runs"}),
    ("sagemaker", "list_training_jobs", {}),
    ("sagemaker", "describe_processing_job", {"ProcessingJobName": "processed"}),
    ("sagemaker", "list_processing_jobs", {}),
    ("sagemaker", "describe_transform_job", {"TransformJobName": "transformed"}),
    ("sagemaker", "list_transform_jobs", {}),
    ("sagemaker", "describe_model", {"ModelName": "m"}),
    ("sagemaker", "list_models", {}),
    ("sagemaker", "describe_endpoint_config", {"EndpointConfigName": "e"}),
    ("sagemaker", "list_endpoint_configs", {}),
    ("sagemaker", "describe_endpoint", {"EndpointName": "e"}),
    ("sagemaker", "list_endpoints", {}),
    ("s3", "list_buckets", {}),
    ("s3", "head_bucket", {"Bucket": BUCKET}),
    ("s3", "head_object", {"Bucket": BUCKET, "Key": "clips/1.mp4"}),
    ("s3", "list_objects_v2", {"Bucket": BUCKET}),
    ("s3", "list_object_versions", {"Bucket": BUCKET}),
    ("s3", "list_multipart_uploads", {"Bucket": BUCKET}),
    ("iam", "get_role", {"RoleName": "role"}),
    ("iam", "list_attached_role_policies", {"RoleName": "role"}),
    ("iam", "list_role_policies", {"RoleName": "role"}),
    ("sts", "get_caller_identity", {}),
    ("logs", "describe_log_groups", {}),
    ("logs", "describe_log_streams", {"logGroupName": "/aws/sagemaker/TrainingJobs"}),
    ("cloudwatch", "list_metrics", {"Namespace": "/aws/sagemaker/TrainingJobs"}),
    ("service-quotas", "list_service_quotas", {"ServiceCode": "sagemaker"}),
    ("service-quotas", "list_aws_default_service_quotas", {"ServiceCode": "sagemaker"}),
    ("pricing", "get_products", {"ServiceCode": "AmazonSageMaker"}),
    ("application-autoscaling", "describe_scalable_targets", {"ServiceNamespace": "sagemaker"}),
]


@pytest.mark.parametrize(
    ("service", "method", "arguments"),
    ANSWERS,
    ids=[f"{m}-{i}" for i, (_, m, _) in enumerate(ANSWERS)],
)
def test_an_answer_is_one_that_aws_could_give(port, service, method, arguments):
    with watched() as breaches:
        getattr(boto3.client(service), method)(**arguments)
    assert breaches == []


ARN = "arn:aws:sagemaker:us-east-1:123456789012"
INVALID, IN_USE = "ValidationException", "ResourceInUse"
GONE = "Requested resource not found."
TAKEN = (
    "Training job names must be unique within an AWS account and region, and a training job with "
    f"this name already exists ({ARN}:training-job/done)"
)
NOT_UNIQUE = "Job name must be unique within an AWS account and region, and a job with this name "
REJECTED = "The request was rejected because the"
NO_ENDPOINT = "Endpoint x of account 123456789012 not found."
REFUSALS = {  # (service, method): [(arguments, code, text), ...]
    ("sagemaker", "describe_training_job"): [({"TrainingJobName": "x"}, INVALID, GONE)],
    ("sagemaker", "stop_training_job"): [
        ({"TrainingJobName": "x"}, INVALID, GONE),
        ({"TrainingJobName": "done"}, INVALID, f"{REJECTED} training job is in status Completed."),
    ],
    ("sagemaker", "delete_training_job"): [
        ({"TrainingJobName": "x"}, "ResourceNotFound", GONE),
        (
            {"TrainingJobName": "runs"},
            IN_USE,
            f"{ARN}:training-job/runs is in status InProgress.",
        ),
    ],
    ("sagemaker", "create_training_job"): [(training_request("done"), IN_USE, TAKEN)],
    ("sagemaker", "describe_processing_job"): [
        ({"ProcessingJobName": "x"}, INVALID, "Could not find requested job with name: x")
    ],
    ("sagemaker", "stop_processing_job"): [
        ({"ProcessingJobName": "x"}, INVALID, "Could not find job to update with name: x"),
        (
            {"ProcessingJobName": "processed"},
            INVALID,
            f"{REJECTED} processing job is in status Completed.",
        ),
    ],
    ("sagemaker", "delete_processing_job"): [
        ({"ProcessingJobName": "x"}, "ResourceNotFound", GONE)
    ],
    ("sagemaker", "create_processing_job"): [
        (
            processing_request("processed"),
            IN_USE,
            f"{NOT_UNIQUE}already exists ({ARN}:processing-job/processed)",
        )
    ],
    ("sagemaker", "describe_transform_job"): [
        ({"TransformJobName": "x"}, INVALID, "Could not find requested job with name: x")
    ],
    ("sagemaker", "stop_transform_job"): [
        ({"TransformJobName": "x"}, INVALID, "Could not find job to update with name: x"),
        (
            {"TransformJobName": "transformed"},
            INVALID,
            f"{REJECTED} transform job is in status Failed.",
        ),
    ],
    ("sagemaker", "create_transform_job"): [
        (
            transform_request("transformed"),
            IN_USE,
            f"{NOT_UNIQUE}already exists ({ARN}:transform-job/transformed)",
        ),
        (transform_request("t", "x"), INVALID, f'Could not find model "{ARN}:model/x".'),
    ],
    ("sagemaker", "describe_model"): [
        ({"ModelName": "x"}, INVALID, f'Could not find model "{ARN}:model/x".')
    ],
    ("sagemaker", "delete_model"): [
        ({"ModelName": "x"}, INVALID, f'Could not find model "{ARN}:model/x".')
    ],
    ("sagemaker", "create_model"): [
        (model_request("m"), INVALID, f'Cannot create already existing model "{ARN}:model/m".')
    ],
    ("sagemaker", "describe_endpoint_config"): [
        (
            {"EndpointConfigName": "x"},
            INVALID,
            f'Could not find endpoint configuration "{ARN}:endpoint-config/x".',
        )
    ],
    ("sagemaker", "delete_endpoint_config"): [
        (
            {"EndpointConfigName": "x"},
            INVALID,
            f'Could not find endpoint configuration "{ARN}:endpoint-config/x".',
        )
    ],
    ("sagemaker", "create_endpoint_config"): [
        (
            config_request("e"),
            INVALID,
            f'Cannot create already existing endpoint configuration "{ARN}:endpoint-config/e".',
        ),
        (config_request("f", "x"), INVALID, f'Could not find model "{ARN}:model/x".'),
    ],
    ("sagemaker", "describe_endpoint"): [
        ({"EndpointName": "x"}, INVALID, f'Could not find endpoint "{ARN}:endpoint/x".')
    ],
    ("sagemaker", "delete_endpoint"): [
        ({"EndpointName": "x"}, INVALID, f'Could not find endpoint "{ARN}:endpoint/x".')
    ],
    ("sagemaker", "create_endpoint"): [
        (
            {"EndpointName": "e", "EndpointConfigName": "e"},
            INVALID,
            f'Cannot create already existing endpoint "{ARN}:endpoint/e".',
        ),
        (
            {"EndpointName": "f", "EndpointConfigName": "x"},
            INVALID,
            f'Could not find endpoint configuration "{ARN}:endpoint-config/x".',
        ),
    ],
    ("sagemaker-runtime", "invoke_endpoint"): [
        ({"EndpointName": "x", "Body": b"1"}, "ValidationError", NO_ENDPOINT)
    ],
    ("s3", "head_bucket"): [({"Bucket": "gone"}, "404", "Not Found")],
    ("s3", "list_objects_v2"): [
        ({"Bucket": "gone"}, "NoSuchBucket", "The specified bucket does not exist")
    ],
    ("s3", "get_object"): [
        ({"Bucket": BUCKET, "Key": "x"}, "NoSuchKey", "The specified key does not exist.")
    ],
    ("s3", "delete_bucket"): [
        ({"Bucket": BUCKET}, "BucketNotEmpty", "The bucket you tried to delete is not empty")
    ],
    ("iam", "get_role"): [
        ({"RoleName": "x"}, "NoSuchEntity", "The role with name x cannot be found.")
    ],
    ("iam", "delete_role"): [
        ({"RoleName": "x"}, "NoSuchEntity", "The role with name x cannot be found."),
        (
            {"RoleName": "role"},
            "DeleteConflict",
            "Cannot delete entity, must detach all policies first.",
        ),
    ],
    ("iam", "create_role"): [
        (
            {"RoleName": "role", "AssumeRolePolicyDocument": TRUST},
            "EntityAlreadyExists",
            "Role with name role already exists.",
        )
    ],
    ("logs", "describe_log_streams"): [
        (
            {"logGroupName": "x"},
            "ResourceNotFoundException",
            "The specified log group does not exist.",
        )
    ],
    ("application-autoscaling", "deregister_scalable_target"): [
        (
            TARGET,
            "ObjectNotFoundException",
            "No scalable target found for service namespace: sagemaker, resource ID: "
            "endpoint/e/variant/AllTraffic, scalable dimension: "
            "sagemaker:variant:DesiredInstanceCount",
        )
    ],
}


@pytest.mark.parametrize(
    ("call", "arguments", "code", "text"),
    [(call, *row) for call, rows in REFUSALS.items() for row in rows],
    ids=[
        f"{call[1]}-{row[1]}-{i}" for call, rows in REFUSALS.items() for i, row in enumerate(rows)
    ],
)
def test_a_refusal_has_aws_s_words(port, call, arguments, code, text):
    service, method = call
    with watched() as breaches, pytest.raises(ClientError) as caught:
        getattr(boto3.client(service), method)(**arguments)
    error = caught.value.response["Error"]
    assert (error["Code"], error["Message"]) == (code, text)
    assert breaches == []


# The table and the watch --------------------------------------------------------------------------
SERVICES = ("sagemaker", "sagemaker-runtime", "s3", "iam", "logs", "service-quotas")
# Codes that AWS uses beside those that a service's model declares.
COMMON = {"ValidationException", "AccessDenied", "AccessDeniedException", "403", "404", "413"}
COMMON |= {"BucketNotEmpty"}


def operations():
    """Every operation of the services that the series uses."""
    session = botocore.session.get_session()
    for service in (*SERVICES, "application-autoscaling"):
        model = session.get_service_model(service)
        yield from (model.operation_model(name) for name in model.operation_names)


def test_the_table_has_operations_and_codes_that_aws_has():
    known = list(operations())
    for row in words.TABLE:
        named = [one for one in known if re.fullmatch(row.operations, one.name)]
        assert named, row.operations
        declared = {shape.error_code for one in named for shape in one.error_shapes}
        assert row.code in declared | COMMON, row
        assert row.what in ("", *words.KINDS), row


def test_moto_s_words_are_noticed():
    moto = f"Could not find training job '{ARN}:training-job/x'."
    assert words.row_of("DescribeTrainingJob", INVALID, GONE)
    assert words.row_of("DescribeTrainingJob", INVALID, moto) is None
    assert words.row_of("DescribeTrainingJob", "ResourceNotFound", GONE) is None


def test_an_answer_that_aws_would_not_give_is_noticed(port):
    model = botocore.session.get_session().get_service_model("sagemaker")
    shape = model.operation_model("DescribeTrainingJob").output_shape
    answer = {k: v for k, v in describe("done").items() if k != "ResponseMetadata"}

    def wrong(**changes):
        (found,) = wrong_in_answer(shape, answer | changes)
        return found

    assert list(wrong_in_answer(shape, answer)) == []
    assert "none of" in wrong(TrainingJobStatus="Done")
    assert "does not fit" in wrong(TrainingJobArn="arn:aws:s3:::x")
    assert "not a timestamp" in wrong(CreationTime="today")
    assert "beyond 1 to" in wrong(BillableTimeInSeconds=0)
    del answer["TrainingJobArn"]
    assert list(wrong_in_answer(shape, answer)) == [".TrainingJobArn is missing"]


def test_a_member_that_aws_does_not_have_is_noticed():
    model = botocore.session.get_session().get_service_model("sagemaker")
    operation = model.operation_model("ListModels")
    http = AWSResponse("", 200, {}, None)
    http._content = b'{"Models": [{"ModelName": "m", "Colour": "red"}]}'
    assert "AWS has no .Models[].Colour" in " ".join(breaches_of(operation, http, {"Models": []}))


def test_every_client_checks_its_requests(port):
    """boto3 refuses, before anything is sent, what the service's model does not know."""
    with watched() as breaches:
        for client in (boto3.client("sagemaker"), Session().sagemaker_client):
            with pytest.raises(ParamValidationError, match="Unknown parameter.*Colour"):
                client.create_model(**model_request("n"), Colour="red")
    assert breaches == []
    unchecked = boto3.client("sagemaker", config=Config(parameter_validation=False))
    assert not validates(unchecked), "the watch would notice"
