"""IAM for the embedded AWS: who may do what, enforced on every request (aws.start(enforce=True)).

moto tells who signed a request and which policies that principal has. It compares only actions,
and the resources of S3 and roles; it ignores the conditions of a policy. So the decision is made
here: action, resource ARN and conditions, as IAM's evaluation logic has it (an explicit Deny wins,
nothing is allowed by default). Every decision is a line in <state folder>/authorizations.jsonl.

The account begins with one user, `admin`, whose keys are the ones that aws.connect sets. A job acts
as its execution role, which the service must be trusted to assume.

../README.md says what of IAM is not known here. A statement that needs an operator or a variable
unknown here is an error, never a guess.
"""

import json
import re
import threading

import boto3
from moto.core.authorization import ActionAuthenticatorMixin
from moto.core.exceptions import AccessDeniedError, JsonRESTError
from moto.core.responses import ActionResult
from moto.iam.access_control import IAMPolicy, S3IAMRequest
from moto.iam.models import iam_backends
from moto.iam.responses import IamResponse
from moto.sts.models import sts_backends

ACCOUNT = "123456789012"  # moto's
SERVICE = "sagemaker.amazonaws.com"
# The name by which a request is signed -> the prefix of its actions in a policy.
PREFIXES = {"monitoring": "cloudwatch", "api.pricing": "pricing"}
# A bucket's subresources that moto's authorisation takes for the bucket itself.
SUBRESOURCES = {
    "encryption": "EncryptionConfiguration",
    "lifecycle": "LifecycleConfiguration",
    "ownershipControls": "BucketOwnershipControls",
    "publicAccessBlock": "BucketPublicAccessBlock",
}
JOBS_AND_MORE = {  # of SageMaker: the parameter that names it -> the kind in its ARN
    "TrainingJobName": "training-job",
    "ProcessingJobName": "processing-job",
    "TransformJobName": "transform-job",
    "NotebookInstanceName": "notebook-instance",
    "EndpointName": "endpoint",
    "EndpointConfigName": "endpoint-config",
    "ModelName": "model",
    "PipelineName": "pipeline",
    "ModelPackageGroupName": "model-package-group",
}
OF_A_STREAM = ("DeleteLogStream", "GetLogEvents", "PutLogEvents")  # the others: of the log group


# The decision -------------------------------------------------------------------------------------
def is_like(pattern, text):
    """Whether the text fits a pattern with * and ?."""
    expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(expression, text, re.DOTALL) is not None


OPERATORS = {
    "StringEquals": lambda wanted, found: wanted == found,
    "StringEqualsIgnoreCase": lambda wanted, found: wanted.lower() == found.lower(),
    "StringLike": is_like,
    "ArnEquals": is_like,  # the two are one for IAM
    "ArnLike": is_like,
    "Bool": lambda wanted, found: wanted.lower() == found.lower(),
}


def is_allowed(statements, action, resource="*", context=None):
    """Whether the statements of a principal's policies allow an action on a resource.

    `context` holds the request's condition keys, such as {"iam:PassedToService": "..."}; a
    condition on a key that the request lacks is not met. Raises ValueError on what IAM knows and
    this does not: condition operators beyond OPERATORS, policy variables.
    """
    effects = {s["Effect"] for s in statements if concerns(s, action, resource, context or {})}
    return effects == {"Allow"}


def concerns(statement, action, resource, context):
    """Whether a statement is about this action on this resource, its conditions included."""
    actions = any(
        is_like(pattern.lower(), action.lower())
        for pattern in listed(statement.get("Action", statement.get("NotAction")))
    )
    if actions == ("NotAction" in statement):
        return False
    if "${" in json.dumps(statement):
        raise ValueError(f"{statement.get('Sid')}: policy variables are not evaluated here.")
    # A trust policy names no resource: it is about the role that it belongs to.
    patterns = listed(statement.get("Resource", statement.get("NotResource", "*")))
    if any(is_like(pattern, resource) for pattern in patterns) == ("NotResource" in statement):
        return False
    return all(
        meets(operator, key, listed(wanted), context)
        for operator, keys in statement.get("Condition", {}).items()
        for key, wanted in keys.items()
    )


def meets(operator, key, wanted, context):
    """Whether the request's value of a condition key is one of those wanted."""
    found = {name.lower(): str(value) for name, value in context.items()}.get(key.lower())
    if operator == "Null":
        return (found is None) == (wanted[0].lower() == "true")
    if found is None:
        return operator.endswith("IfExists")
    compare = OPERATORS.get(operator.removesuffix("IfExists"))
    if compare is None:
        raise ValueError(f"The condition operator {operator} is not evaluated here.")
    return any(compare(value, found) for value in wanted)


def listed(value):
    return value if isinstance(value, list) else [value]


# What a request needs -----------------------------------------------------------------------------
def needs(service, action, resource, parameters, region):
    """The (action, resource ARN, condition keys) that a request must be allowed, one or several."""
    arn = f"arn:aws:{service}:{region}:{ACCOUNT}:"
    context, more = {}, []
    if service == "sagemaker":
        for name, kind in JOBS_AND_MORE.items():
            lists = action.startswith("List") and name != "PipelineName"  # a list is of "*"
            if name in parameters and not lists:
                resource = f"{arn}{kind}/{parameters[name]}"
                break
        resource = parameters.get("ResourceArn", parameters.get("PipelineExecutionArn", resource))
        if action == "CreateModelPackage":
            version = f"{arn}model-package/{parameters['ModelPackageGroupName']}"
            more.append((f"sagemaker:{action}", version, {}))
        if package := parameters.get("ModelPackageName", parameters.get("ModelPackageArn")):
            resource = package if package.startswith("arn:") else f"{arn}model-package/{package}"
        if action == "CreateEndpoint":
            config = f"{arn}endpoint-config/{parameters['EndpointConfigName']}"
            more.append((f"sagemaker:{action}", config, {}))
        if role := parameters.get("RoleArn", parameters.get("ExecutionRoleArn")):
            more.append(("iam:PassRole", role, {"iam:PassedToService": SERVICE}))
        if parameters.get("Tags") and action != "AddTags":
            more.append(("sagemaker:AddTags", resource, {}))
    elif service == "iam":
        for name, kind in {"RoleName": "role", "UserName": "user"}.items():
            if name in parameters:
                resource = f"arn:aws:iam::{ACCOUNT}:{kind}/{parameters[name]}"
        resource = parameters.get("PolicySourceArn", resource)
        if owner := parameters.get("AWSServiceName"):
            resource = f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/{owner}/AWSServiceRole"
            context["iam:AWSServiceName"] = owner
        if "PolicyArn" in parameters:
            context["iam:PolicyARN"] = parameters["PolicyArn"]
    elif service == "logs" and "logGroupName" in parameters:
        stream = parameters.get("logStreamName", "") if action in OF_A_STREAM else ""
        resource = f"{arn}log-group:{parameters['logGroupName']}:log-stream:{stream}"
    elif service == "servicequotas" and action == "RequestServiceQuotaIncrease":
        resource = f"{arn}{parameters['ServiceCode']}/{parameters['QuotaCode']}"
    elif service == "application-autoscaling" and not action.startswith("Describe"):
        context["application-autoscaling:service-namespace"] = parameters["ServiceNamespace"]
    elif service == "cloudwatch" and action in ("PutMetricAlarm", "DeleteAlarms"):
        names = parameters.get("AlarmNames") or [parameters["AlarmName"]]
        return [(f"cloudwatch:{action}", f"{arn}alarm:{name}", {}) for name in names]
    elif service == "cloudwatch" and "Namespace" in parameters:
        context["cloudwatch:namespace"] = parameters["Namespace"]
    return [(f"{service}:{action}", resource, context), *more]


def s3_needs(response, action, resource):
    """The same for S3, of whose requests moto knows the ARN."""
    query = response.querystring
    for name, what in SUBRESOURCES.items():
        if name in query:
            action = ("Get" if response.method == "GET" else "Put") + what
    if action == "DeleteObject" and response.method == "POST":  # several keys at once
        objects = re.findall(r"<Object>(.*?)</Object>", response.raw_body.decode(), re.DOTALL)
        return [
            (
                "s3:DeleteObjectVersion" if "<VersionId>" in item else "s3:DeleteObject",
                f"{resource}/{re.search('<Key>(.*?)</Key>', item)[1]}",
                {},
            )
            for item in objects
        ]
    action = {"HeadBucket": "ListBucket"}.get(action, action)
    context = {"s3:prefix": query["prefix"][0]} if "prefix" in query else {}
    return [(f"s3:{action}", resource, context)]


# In the server ------------------------------------------------------------------------------------
def simulate_anything(response):
    """The answer where nothing is enforced: the SDK asks before it uploads code."""
    actions = response._get_param("ActionNames", [])
    results = [{"EvalActionName": action, "EvalDecision": "allowed"} for action in actions]
    return ActionResult({"EvaluationResults": results, "IsTruncated": False})


def extend_moto(server):
    """Give moto the answers of an account that allows everything, or enforces policies."""
    IamResponse.simulate_principal_policy = simulate_anything
    if server.enforce:
        enforce(server)


def enforce(server):
    """Let the server refuse, from now on, what its principals' policies do not allow."""
    iam = iam_backends[ACCOUNT]["aws"]
    iam.create_user("us-east-1", "admin")
    iam.attach_user_policy("arn:aws:iam::aws:policy/AdministratorAccess", "admin")
    key = iam.create_access_key("admin")
    key.access_key_id = key.secret_access_key = "testing"  # as aws.connect sets them
    record, lock = server.state / "authorizations.jsonl", threading.Lock()
    record.write_text("")

    def authorize(response, request_class, resource="*"):
        action = response._get_action()
        path, _, query = response.uri.partition("?")
        is_invocation = path.endswith("invocations")  # of an endpoint: the body is for the model
        request = request_class(
            account_id=response.current_account,
            method=response.method,
            path=response.raw_path + (f"?{query}" if query else ""),
            data={} if is_invocation else response.data,  # moto takes it for an empty body
            body=response.raw_body,
            headers=response.headers,
            action=action,
        )  # raises if the access key is unknown
        request.check_signature()
        service = PREFIXES.get(request._service, request._service)
        if (service, action) == ("sts", "GetCallerIdentity"):  # everybody may, always
            return
        is_json = is_invocation or "json" in response.headers.get("Content-Type", "")
        if service == "s3":
            needed = s3_needs(response, action, resource)
        else:
            parameters = (
                {"EndpointName": response.raw_path.split("/")[2]}
                if is_invocation
                else json.loads(response.body or "{}")
                if is_json
                else {name: values[0] for name, values in response.querystring.items()}
            )
            needed = needs(service, action, resource, parameters, response.region)
        policies = request._access_key.collect_policies()
        statements = [s for policy in policies for s in statements_of(policy)]
        response.statements = statements  # DeleteEndpoint asks for more than its own action
        for action, resource, context in needed:
            allowed = is_allowed(statements, action, resource, context)
            line = {"principal": request._access_key.arn, "action": action, "resource": resource}
            line |= {"context": context, "allowed": allowed}
            with lock, record.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if allowed:
                continue
            if request_class is S3IAMRequest:
                request._raise_access_denied()
            what = f"{action} on resource: {resource} because no identity-based policy allows the "
            error = AccessDeniedError(request._access_key.arn, f"{what}{action} action")
            raise as_json(error) if is_json else error

    ActionAuthenticatorMixin._authenticate_and_authorize_action = authorize
    IamResponse.simulate_principal_policy = simulate_principal_policy


def as_json(error):
    answer = JsonRESTError("AccessDeniedException", error.message)
    answer.code = 400
    return answer


def statements_of(policy):
    """The statements of one of moto's policies."""
    return listed(IAMPolicy(policy)._policy_json["Statement"])


def statements_of_role(role):
    """All statements of a role's permission policies."""
    policies = [*role.policies.values(), *role.managed_policies.values()]
    return [statement for policy in policies for statement in statements_of(policy)]


def simulate_principal_policy(response):
    """What a role may do, by the request's actions and resources, without condition keys."""
    role = iam_backends[ACCOUNT]["aws"].get_role_by_arn(response._get_param("PolicySourceArn"))
    statements = statements_of_role(role)
    results = [
        {
            "EvalActionName": action,
            "EvalResourceName": resource,
            "EvalDecision": "allowed"
            if is_allowed(statements, action, resource)
            else "implicitDeny",
        }
        for action in response._get_param("ActionNames", [])
        for resource in response._get_param("ResourceArns", None) or ["*"]
    ]
    return ActionResult({"EvaluationResults": results, "IsTruncated": False})


def role_session(role_arn, region):
    """A boto3 session as the role, which SageMaker assumes for a job.

    Raises PermissionError, in the service's words, if there is no such role or its trust policy
    does not let SageMaker in.
    """
    backend = iam_backends[ACCOUNT]["aws"]
    role = next((role for role in backend.roles.values() if role.arn == role_arn), None)
    trusting = [] if role is None else statements_of(role.assume_role_policy_document)
    trusting = [s for s in trusting if SERVICE in listed(s["Principal"].get("Service"))]
    if not is_allowed(trusting, "sts:AssumeRole", context={"aws:SourceAccount": ACCOUNT}):
        raise PermissionError(
            f"Could not assume role {role_arn}. Please ensure that the role exists and allows "
            f"principal '{SERVICE}' to assume the role."
        )
    assumed = sts_backends[ACCOUNT]["aws"].assume_role(
        region_name=region,
        role_session_name="SageMaker",
        role_arn=role_arn,
        policy=None,
        duration=43200,
        external_id=None,
    )
    return boto3.Session(
        assumed.access_key_id, assumed.secret_access_key, assumed.session_token, region
    )
