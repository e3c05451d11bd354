"""What AWS says when it refuses: a table of its errors, and the hook that makes moto say the same.

moto and the service differ: where moto says "Could not find training job '...'", AWS says
"Requested resource not found.", with a code that the API's documentation does not name. Code that
looks for AWS's words works on AWS only if it meets them here.

Nobody has run AWS for this table. Each row names where others met the text; "" means that no text
was found: then the code is the documented one, or that of a sister operation, and the text is
neutral. Never let code depend on such a text.
"""

import json
import re
from functools import cache
from html import escape, unescape
from typing import NamedTuple

from moto.core.responses import ActionResult, BaseResponse
from moto.sagemaker.exceptions import ValidationError
from moto.sagemaker.responses import SageMakerResponse

# Where the texts were met, by short name; "owner/name#1" is an issue or pull request of GitHub.
DOCS = "AWS's documentation of the error"
OPERATOR = "aws/amazon-sagemaker-operator-for-k8s, clientwrapper/sagemaker_client_wrapper.go"
GRAND = "comic/grand-challenge.org, components/backends/amazon_sagemaker_base.py"
TERRAFORM = "hashicorp/terraform-provider-aws, internal/service/sagemaker"
IN_PUBLIC = "logs and texts in several public repositories"

INVALID = "ValidationException"


class Words(NamedTuple):
    """An error of some operations. `what` it is: missing, exists, state; or "" if moto has none."""

    operations: str  # a pattern
    what: str
    code: str
    status: int  # of HTTP
    text: str  # a template
    source: str


# fmt: off
TABLE = [  # a row: the operations, what it is, code, status; the text; where it was met
    # Training jobs
    Words("(Describe|Stop)TrainingJob", "missing", INVALID, 400,
          "Requested resource not found.",
          f"boto/boto3#2808, aws/amazon-sagemaker-examples#2360, {OPERATOR}"),
    Words("(Delete|Update)(Training|Processing)Job", "missing", "ResourceNotFound", 400,
          "Requested resource not found.",
          ""),
    Words("CreateTrainingJob", "exists", "ResourceInUse", 400,
          "Training job names must be unique within an AWS account and region, and a training "
          "job with this name already exists ({arn})",
          "aws/amazon-sagemaker-examples#3108"),
    Words("StopTrainingJob", "state", INVALID, 400,
          "The request was rejected because the training job is in status {status}.",
          "awslabs/benchmark-ai#928"),
    Words("(Delete|Update)(Training|Processing)Job", "state", "ResourceInUse", 400,
          "{arn} is in status {status}.",
          ""),
    # Processing and transform jobs
    Words("Describe(Processing|Transform)Job", "missing", INVALID, 400,
          "Could not find requested job with name: {name}",
          OPERATOR),
    Words("Stop(Processing|Transform)Job", "missing", INVALID, 400,
          "Could not find job to update with name: {name}",
          GRAND),
    Words("Create(Processing|Transform)Job", "exists", "ResourceInUse", 400,
          "Job name must be unique within an AWS account and region, and a job with this name "
          "already exists ({arn})",
          IN_PUBLIC),
    Words("Stop(Processing|Transform)Job", "state", INVALID, 400,
          "The request was rejected because the {thing} is in status {status}.",
          f"of a transform job: {GRAND}"),
    # Models and endpoints. A request may name what is missing: an endpoint's configuration, ...
    Words("(Describe|Delete|Update|Create)(Model|EndpointConfig|Endpoint)|CreateTransformJob",
          "missing", INVALID, 400,
          'Could not find {thing} "{arn}".',
          f"aws/amazon-sagemaker-examples#2402, {OPERATOR}, {TERRAFORM}"),
    Words("Create(Model|EndpointConfig|Endpoint)", "exists", INVALID, 400,
          'Cannot create already existing {thing} "{arn}".',
          "hashicorp/terraform-provider-aws#40080, awslabs/spot-tagging-bot-for-digital-assets#2"),
    Words("(Delete|Update)Endpoint", "state", INVALID, 400,
          'Cannot update in-progress endpoint "{arn}".',
          OPERATOR),
    Words("DeleteTrainingJob", "", "ResourceInUse", 400,
          "{arn} retains an Available warm pool.",
          ""),
    Words("UpdateTrainingJob", "", INVALID, 400,
          "{arn} has no warm pool that could be updated.",
          ""),
    # What this package says itself, in these words
    Words("CreateTrainingJob|CreateProcessingJob|CreateTransformJob", "", INVALID, 400,
          'No S3 objects found under S3 URL "{uri}" given in input data source. Please ensure '
          "that the bucket exists in the selected region ({region}), that objects exist under "
          'that S3 prefix, and that the role "{role}" has "s3:ListBucket" permissions on bucket '
          '"{bucket}".',
          "aws/amazon-sagemaker-examples#2489"),
    Words("Create(Training|Processing|Transform)Job|Create(Model|Endpoint)", "", INVALID, 400,
          "Could not assume role {role}. Please ensure that the role exists and allows "
          "principal 'sagemaker.amazonaws.com' to assume the role.",
          IN_PUBLIC),
    Words("CreateTrainingJob", "", INVALID, 400,
          "KeepAlivePeriodInSeconds excludes EnableManagedSpotTraining.",
          ""),
    Words("CreateTrainingJob", "", INVALID, 400,
          "InstancePreferences is mutually exclusive with {others}.",
          "the parameter's documentation in botocore"),
    Words("CreateTrainingJob", "", INVALID, 400,
          "InstanceCount must be in every InstancePreference, or in ResourceConfig alone.",
          ""),
    Words("CreateTransformJob", "", INVALID, 400,
          "MaxConcurrentTransforms ({count}) x MaxPayloadInMB ({size}) must not exceed 100",
          ""),
    Words("CreateProcessingJob", "", INVALID, 400,
          "LocalPath {path}: it must begin with /opt/ml/processing/.",
          ""),
    Words("CreateTrainingJob", "", INVALID, 400,
          "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to "
          "MaxRuntimeInSeconds",
          ""),
    Words("Create(Training|Processing|Transform)Job|CreateEndpoint",
          "", "ResourceLimitExceeded", 400,
          "The account-level service limit '{quota}' is {limit} Instances, with current "
          "utilization of {used} Instances and a request delta of {more} Instances. Please use "
          "AWS Service Quotas to request an increase for this quota. If AWS Service Quotas is "
          "not available, contact AWS support to request an increase for this quota.",
          IN_PUBLIC),
    Words("DeleteEndpoint", "", INVALID, 400,
          "An Application AutoScaling scalable target exists for a variant being deleted, and "
          "the IAM identity used to invoke DeleteEndpoint does not have {action} permission to "
          "deregister the scalable target.",
          "awslabs/stable-diffusion-aws-extension#161"),
    # Model registry and pipelines
    Words("(Describe|Delete)ModelPackage(Group)?|UpdateModelPackage", "missing", INVALID, 400,
          "{kind} {arn} does not exist.",
          f"of a group, its last words: {TERRAFORM}"),
    Words("(Describe|Delete|Update)Pipeline|StartPipelineExecution",
          "missing", "ResourceNotFound", 400,
          "Pipeline '{arn}' does not exist.",
          ""),
    Words("(Describe|Stop|List)PipelineExecution(Steps)?", "missing", "ResourceNotFound", 400,
          "Pipeline execution '{arn}' does not exist.",
          ""),
    Words("CreatePipeline", "exists", INVALID, 400,
          "Pipeline names must be unique within an AWS account and region. Pipeline with name "
          "({name}) already exists.",
          "its first sentence: awsdocs/aws-doc-sdk-examples, workflows/sagemaker_pipelines"),
    Words("StopPipelineExecution", "", "ConflictException", 400,
          "Pipeline execution with ARN {arn} is not running.",
          ""),
    Words("DeletePipeline", "", "ConflictException", 400,
          "Pipeline '{arn}' has running executions.",
          ""),
    Words("DeleteModelPackageGroup", "", "ConflictException", 400,
          "ModelPackageGroup {arn} has {count} versions.",
          ""),
    # The runtime
    Words("InvokeEndpoint(Async)?", "", "ValidationError", 400,
          "Endpoint {name} of account {account} not found.",
          "aws/amazon-sagemaker-examples#559"),
    Words("InvokeEndpoint", "", "ModelError", 424,
          'Received {side} error ({status}) from primary with message "{text}". See {log} in '
          "CloudWatch for more information.",
          "its first sentence: docs.aws.amazon.com; the log's address is a link on AWS"),
    Words("InvokeEndpoint", "", "ValidationError", 400,
          "{title} is asynchronous: {remedy}.",
          ""),
    Words("InvokeEndpointAsync", "", "ValidationError", 400,
          "{title} not found, or not {kind}.",
          ""),
    Words("InvokeEndpointAsync", "", "ValidationError", 400,
          "InputLocation must be {this}.",
          ""),
    Words("InvokeEndpointAsync", "", "ValidationError", 400,
          "Body and InputLocation are mutually exclusive. Provide exactly one of them.",
          "the parameters' documentation in botocore"),
    Words("InvokeEndpointAsync", "", "ValidationError", 400,
          "Body has {bytes} bytes: an inline payload has {limit} at most.",
          ""),
    Words("InvokeEndpoint", "", "413", 413,
          "HTTP content length exceeded {bytes} bytes.",
          ""),
    Words(".*", "", "AccessDeniedException", 400,
          "User: {user} is not authorized to perform: {action} on resource: {resource} because "
          "no identity-based policy allows the {action} action",
          f"{DOCS}: IAM, troubleshoot_access-denied"),
    Words(".*", "", "AccessDenied", 403,
          "User: {user} is not authorized to perform: {action} on resource: {resource} because "
          "no identity-based policy allows the {action} action",
          f"{DOCS}: IAM, troubleshoot_access-denied"),
    # S3. A HEAD request has no body: botocore takes code and text from the status.
    Words(".*", "", "AccessDenied", 403,
          "Access Denied",
          f"{DOCS}: S3, ErrorResponses"),
    Words(".*", "", "403", 403,
          "Forbidden",
          "HTTP"),
    Words("Head(Bucket|Object)", "", "404", 404,
          "Not Found",
          "HTTP"),
    Words(".*", "", "NoSuchBucket", 404,
          "The specified bucket does not exist",
          DOCS),
    Words("GetObject", "", "NoSuchKey", 404,
          "The specified key does not exist.",
          DOCS),
    Words("DeleteBucket", "", "BucketNotEmpty", 409,
          "The bucket you tried to delete is not empty",
          DOCS),
    # IAM
    Words(".*(Role|RolePolicy|RolePolicies)", "missing", "NoSuchEntity", 404,
          "The role with name {name} cannot be found.",
          IN_PUBLIC),
    Words(".*RolePolicy", "", "NoSuchEntity", 404,
          "The role policy with name {name} cannot be found.",
          IN_PUBLIC),
    Words("(Attach|Detach)RolePolicy", "", "NoSuchEntity", 404,
          "Policy {policy} was not found.",
          IN_PUBLIC),
    Words("CreateRole", "exists", "EntityAlreadyExists", 409,
          "Role with name {name} already exists.",
          IN_PUBLIC),
    Words("DeleteRole", "", "DeleteConflict", 409,
          "Cannot delete entity, must detach all policies first.",
          IN_PUBLIC),
    Words("DeleteRole", "", "DeleteConflict", 409,
          "Cannot delete entity, must delete policies first.",
          IN_PUBLIC),
    # CloudWatch Logs
    Words(".*Log.*", "", "ResourceNotFoundException", 400,
          "The specified log {part} does not exist.",
          IN_PUBLIC),
    Words("CreateLog(Group|Stream)", "", "ResourceAlreadyExistsException", 400,
          "The specified log {part} already exists",
          IN_PUBLIC),
    # Service Quotas
    Words(".*Quota.*", "missing", "NoSuchResourceException", 400,
          "The request failed because the specified quota or service does not exist.",
          ""),
    Words("RequestServiceQuotaIncrease", "", "ResourceAlreadyExistsException", 400,
          "Only one open service quota increase request is allowed per quota.",
          IN_PUBLIC),
    Words("RequestServiceQuotaIncrease", "", "IllegalArgumentException", 400,
          "You must provide a quota value greater than the current quota value.",
          IN_PUBLIC),
    # Application Auto Scaling
    Words("DeregisterScalableTarget|DeleteScalingPolicy", "missing", "ObjectNotFoundException", 400,
          "No scalable target found for service namespace: {namespace}, resource ID: "
          "{resource}, scalable dimension: {dimension}",
          IN_PUBLIC),
]
# fmt: on

# What moto, or this package, says in words of its own.
KINDS = {
    "exists": r"(?i)already exist|must be unique",
    "missing": r"(?i)not find|not found|cannot be found|does not exist|no scalable target"
    r"|not available in the current Region",
    "state": r"(?i)in status (?P<status>\w+)|in-progress",
}
THINGS = {"endpoint-config": "endpoint configuration"}  # as AWS calls them, by the kind in an ARN


@cache
def pattern(text):
    """A template as a pattern."""
    expression = re.escape(text).replace(r"\{arn\}", "arn:.+")
    return re.compile(re.sub(r"\\\{\w+\\\}", ".+", expression), re.DOTALL)


def row_of(operation, code, text):
    """The row of the table by which an operation may answer so, or None."""
    for row in TABLE:
        named = row.code == code and re.fullmatch(row.operations, operation)
        if named and pattern(row.text).fullmatch(text):
            return row
    return None


def in_aws_words(operation, text, names):
    """AWS's code, text and status for what moto says in its own; None if there is no such row.

    `names`: what the templates need, of the request: name, arn, thing, ...
    """
    for row in TABLE:
        known = row.what and re.fullmatch(row.operations, operation)
        if known and (found := re.search(KINDS[row.what], text)):
            return row.code, row.text.format(**names | found.groupdict()), row.status
    return None


def names_of(response, text):
    """What a request and moto's text about it name."""
    thing = re.sub("^[A-Z][a-z]+", "", response._get_action())  # StopTrainingJob: TrainingJob
    name = response._get_param(f"{thing}Name") or response._get_param("RoleName")
    kind = re.sub("(?<=[a-z])(?=[A-Z])", "-", thing).lower()
    arn = f"arn:aws:sagemaker:{response.region}:{response.current_account}:{kind}/{name}"
    arn = found[0] if (found := re.search(r"arn:aws:sagemaker:[^'\" )]+", text)) else arn
    kind = arn.split(":")[5].partition("/")[0]  # of what is missing, a configuration perhaps
    return {
        "name": name,
        "arn": arn,
        "thing": THINGS.get(kind, kind.replace("-", " ")),
        "kind": thing,
        "namespace": response._get_param("ServiceNamespace"),
        "resource": response._get_param("ResourceId"),
        "dimension": response._get_param("ScalableDimension"),
    }


def leave_out_what_is_empty(operation):
    """Let an operation answer without moto's empty structures, which AWS does not send."""
    whole = getattr(SageMakerResponse, operation)

    def describe(self):
        found = whole(self).result
        return ActionResult({name: value for name, value in found.items() if value != {}})

    setattr(SageMakerResponse, operation, describe)


def refuse_a_second(operation, parameter, kept):
    """Let an operation refuse a name that is taken; moto replaces what has it."""
    made = getattr(SageMakerResponse, operation)

    def create(self):
        if (name := self._get_param(parameter)) in getattr(self.sagemaker_backend, kept):
            raise ValidationError(f"{name} already exists.")  # the table says it as AWS does
        return made(self)

    setattr(SageMakerResponse, operation, create)


def extend_moto(server):
    """Let every answer of moto that refuses pass through the table."""
    for operation in ("describe_model", "describe_endpoint_config", "describe_endpoint"):
        leave_out_what_is_empty(operation)
    refuse_a_second("create_model", "ModelName", "_models")
    refuse_a_second("create_endpoint_config", "EndpointConfigName", "endpoint_configs")
    call_action = BaseResponse.call_action

    def call_action_in_aws_words(response):
        status, headers, body = call_action(response)
        if int(status) < 400 or not body:
            return status, headers, body
        body = body if isinstance(body, str) else body.decode()
        operation, is_xml = response._get_action(), body.startswith("<")
        if is_xml:
            code = re.search("<Code>(.*?)</Code>", body)[1]
            text = unescape(re.search("<Message>(.*?)</Message>", body, re.DOTALL)[1])
        else:
            answer = json.loads(body)
            code, text = answer.get("__type", ""), answer.get("message", answer.get("Message", ""))
        said = row_of(operation, code, text) is None and in_aws_words(
            operation, text, names_of(response, text)
        )
        if not said:
            return status, headers, body
        code, text, status = said
        if is_xml:
            body = re.sub("<Code>.*?</Code>", f"<Code>{code}</Code>", body)
            body = re.sub("<message>.*?</message>", "", body, flags=re.DOTALL)  # moto's alone
            error = f"<Message>{escape(text)}</Message>"
            body = re.sub("<Message>.*?</Message>", lambda _: error, body, flags=re.DOTALL)
        else:
            body = json.dumps({"__type": code, "message": text})
        return status, headers | {"x-amzn-errortype": code, "status": str(status)}, body

    BaseResponse.call_action = call_action_in_aws_words
