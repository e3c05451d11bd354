"""Endpoints: the record, the queue of an asynchronous one, InvokeEndpoint, InvokeEndpointAsync."""

import json
import re
import uuid
from concurrent.futures import ThreadPoolExecutor

from botocore.exceptions import ClientError as RequestError
from moto.applicationautoscaling.models import (
    ApplicationAutoscalingBackend,
    applicationautoscaling_backends,
)
from moto.sagemaker.exceptions import SagemakerClientError, ValidationError
from moto.sagemaker.models import FakeEndpointConfig
from moto.sagemaker.responses import SageMakerResponse
from moto.sagemaker.utils import arn_formatter
from moto.sagemakerruntime.responses import SageMakerRuntimeResponse

from .basics import ClientError, answers, now
from .containers import RESPONSE_SECONDS, START_SECONDS, ModelError, begin
from .permissions import is_allowed
from .storage import split_uri

PAYLOAD_BYTES = 6 * 2**20  # of InvokeEndpoint
BODY_BYTES = 128_000  # of InvokeEndpointAsync
ASYNC_SECONDS = 900  # of InvokeEndpointAsync, unless the request says more, up to an hour

DEREGISTER = "application-autoscaling:DeregisterScalableTarget"
SCALES = (  # the role that AWS makes and takes if the request names none
    "sagemaker.application-autoscaling.amazonaws.com/"
    "AWSServiceRoleForApplicationAutoScaling_SageMakerEndpoint"
)
NOT_DEREGISTERED = (
    "An Application AutoScaling scalable target exists for a variant being deleted, and the IAM "
    f"identity used to invoke DeleteEndpoint does not have {DEREGISTER} permission to deregister "
    "the scalable target."
)


def scalable_targets(name, account, region):
    """The registered targets of an endpoint, whose number of instances follows its queue."""
    backend = applicationautoscaling_backends[account][region]
    known = backend.describe_scalable_targets("sagemaker", None, None)
    return [target for target in known if target.resource_id.startswith(f"endpoint/{name}/")]


class Endpoint:
    """An endpoint: moto's record of it, the container that answers, the queue before it."""

    def __init__(self, record, config, container, region):
        self.record, self.container, self.region = record, container, region
        self.name, self.request = record.endpoint_name, {}
        (self.variant,) = config.production_variants
        self.instance_count = self.variant.get("InitialInstanceCount", 1)
        self.quota_names = [f"{self.variant.get('InstanceType')} for endpoint usage"]
        asynchronous = config.async_inference_config or {}
        self.outputs = asynchronous.get("OutputConfig")
        container.instance_type = self.variant.get("InstanceType", "")
        container.ami = self.variant.get("InferenceAmiVersion")
        container.seconds = self.variant.get(
            "ContainerStartupHealthCheckTimeoutInSeconds", START_SECONDS
        )
        at_once = asynchronous.get("ClientConfig", {}).get("MaxConcurrentInvocationsPerInstance")
        self.queue = ThreadPoolExecutor(at_once or 1)
        record.endpoint_status = "Creating"

    @property
    def is_running(self):
        return self.record.endpoint_status in ("Creating", "InService")

    def run(self):
        """From Creating to InService, or to Failed."""
        try:
            self.container.start()
            status = "InService"
        except ClientError as error:
            self.record.failure_reason, status = str(error)[:1024], "Failed"
        if self.record.endpoint_status == "Deleting":  # meanwhile
            return self.container.kill()
        self.record.endpoint_status, self.record.last_modified_time = status, now()

    def delete(self):
        self.record.endpoint_status = "Deleting"
        self.queue.shutdown(wait=False, cancel_futures=True)
        self.container.kill()

    def answer_later(self, body, source, name, content_type, accept, timeout):
        """Ask with `body` or, if it is empty, with an object of S3; the answer becomes one too."""
        s3 = self.container.s3
        try:
            if not body:
                bucket, key = split_uri(source)
                body = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
            answer_type, answer = self.container.invoke(body, content_type, accept, timeout)
            target = f"{self.outputs['S3OutputPath'].rstrip('/')}/{name}.out"
        except (ModelError, RequestError) as error:
            if self.record.endpoint_status == "Deleting" or "S3FailurePath" not in self.outputs:
                return
            target = f"{self.outputs['S3FailurePath'].rstrip('/')}/{name}-error.out"
            answer_type, answer = "text/plain", str(error).encode()
        bucket, key = split_uri(target)
        s3.put_object(Bucket=bucket, Key=key, Body=answer, ContentType=answer_type)


def extend_moto(server):
    """Give moto's response classes the operations on endpoints."""
    # moto's list of instance types is some years old.
    FakeEndpointConfig.validate_instance_type = lambda self, instance_type: None

    created = SageMakerResponse.create_endpoint

    @answers(SageMakerResponse)
    def create_endpoint(self):
        name, backend = self._get_param("EndpointName"), self.sagemaker_backend
        if name in backend.endpoints:
            raise ValidationError(f'Cannot create already existing endpoint "{name}".')
        config = backend.endpoint_configs.get(self._get_param("EndpointConfigName"))
        answer = created(self)  # raises if there is no such configuration
        record = backend.endpoints[name]
        place = (f"endpoints/{name}", f"/aws/sagemaker/Endpoints/{name}")
        place = (*place, f"AllTraffic/i-{uuid.uuid4().hex[:17]}")
        model_name = config.production_variants[0]["ModelName"]
        try:
            server.jobs[record.arn] = begin(
                server,
                self,
                lambda container: Endpoint(record, config, container, backend.region_name),
                model_name,
                *place,
            )
        except SagemakerClientError:
            del backend.endpoints[name]
            raise
        return answer

    deleted = SageMakerResponse.delete_endpoint

    @answers(SageMakerResponse)
    def delete_endpoint(self):
        name = self._get_param("EndpointName")
        record = self.sagemaker_backend.endpoints.get(name)
        if record and record.endpoint_status == "Creating":
            raise ValidationError(f'Cannot update in-progress endpoint "{record.arn}".')
        targets = scalable_targets(name, self.current_account, self.region)
        statements = getattr(self, "statements", None)  # of the caller's policies, if they count
        context = {"application-autoscaling:service-namespace": "sagemaker"}
        allowed = statements is None or is_allowed(statements, DEREGISTER, context=context)
        if targets and not allowed:
            raise ValidationError(NOT_DEREGISTERED)
        answer = deleted(self)  # raises if there is none
        for target in targets:
            dimension = target.scalable_dimension
            backend = target.applicationautoscaling_backend
            backend.deregister_scalable_target("sagemaker", target.resource_id, dimension)
        server.jobs.pop(record.arn).delete()
        return answer

    deregistered = ApplicationAutoscalingBackend.deregister_scalable_target

    def deregister_scalable_target(self, namespace, r_id, dimension):
        deregistered(self, namespace, r_id, dimension)
        for key in [key for key, policy in self.policies.items() if policy.resource_id == r_id]:
            del self.policies[key]  # moto keeps them

    ApplicationAutoscalingBackend.deregister_scalable_target = deregister_scalable_target
    registered = ApplicationAutoscalingBackend.register_scalable_target

    def register_scalable_target(self, *where, role_arn=None, **limits):
        role = f"arn:aws:iam::{self.account_id}:role/aws-service-role/{SCALES}"
        return registered(self, *where, role_arn=role_arn or role, **limits)

    ApplicationAutoscalingBackend.register_scalable_target = register_scalable_target

    SageMakerRuntimeResponse.use_raw_body = True  # a video is no text

    def reply(status, headers, body):  # moto takes the status from the headers
        return status, headers | {"status": status}, body

    def refusal(status, code, message, **more):
        body = json.dumps({"message": message} | more)
        return reply(status, {"x-amzn-errortype": code} if code else {}, body)

    def endpoint_of(response):
        """The endpoint that an invocation names, and its ARN; None if it does not answer."""
        name = response.path.split("/")[2]
        arn = arn_formatter("endpoint", name, response.current_account, response.region)
        endpoint = server.jobs.get(arn)
        ready = endpoint and endpoint.record.endpoint_status == "InService"
        return (endpoint if ready else None), f"Endpoint {name} of account {arn.split(':')[4]}"

    @answers(SageMakerRuntimeResponse)
    def invoke_endpoint(self):
        endpoint, title = endpoint_of(self)
        if endpoint is None:
            return refusal(400, "ValidationError", f"{title} not found.")
        if endpoint.outputs:
            message = f"{title} is asynchronous: use InvokeEndpointAsync."
            return refusal(400, "ValidationError", message)
        if len(self.raw_body) > PAYLOAD_BYTES:
            return refusal(413, None, f"HTTP content length exceeded {PAYLOAD_BYTES} bytes.")
        kind, accept = self.headers.get("Content-Type"), self.headers.get("Accept")
        try:
            answer = endpoint.container.invoke(self.raw_body, kind, accept, RESPONSE_SECONDS)
        except ModelError as error:
            log = endpoint.container.group
            message = f"{error} See {log} in CloudWatch for more information."
            original = {"OriginalStatusCode": error.status, "OriginalMessage": error.text}
            return refusal(424, "ModelError", message, **original)
        variant = {"x-Amzn-Invoked-Production-Variant": endpoint.variant["VariantName"]}
        return 200, {"Content-Type": answer[0], **variant}, answer[1]

    @answers(SageMakerRuntimeResponse)
    def invoke_endpoint_async(self):
        endpoint, title = endpoint_of(self)
        if endpoint is None or not endpoint.outputs:
            return refusal(400, "ValidationError", f"{title} not found, or not asynchronous.")
        start = "x-amzn-sagemaker-"
        given = {name.lower(): value for name, value in self.headers.items()}
        given = {name.removeprefix(start): given[name] for name in given if name.startswith(start)}
        body, source = self.raw_body, given.get("inputlocation", "")
        if bool(body) == bool(source):
            message = "Body and InputLocation are mutually exclusive. Provide exactly one of them."
            return refusal(400, "ValidationError", message)
        if len(body) > BODY_BYTES:
            message = f"Body has {len(body)} bytes: an inline payload has {BODY_BYTES} at most."
            return refusal(400, "ValidationError", message)
        if source and not re.match(r"s3://[^/]+/.", source):
            return refusal(400, "ValidationError", "InputLocation must be s3://bucket/key.")
        inference, name = given.get("inference-id") or str(uuid.uuid4()), str(uuid.uuid4())
        seconds = int(given.get("invocationtimeoutseconds", ASYNC_SECONDS))
        kind, accept = given.get("content-type"), given.get("accept")
        endpoint.queue.submit(endpoint.answer_later, body, source, name, kind, accept, seconds)
        places = {"OutputLocation": ("S3OutputPath", f"{name}.out")}
        places["FailureLocation"] = ("S3FailurePath", f"{name}-error.out")
        headers = {
            f"X-Amzn-SageMaker-{header}": f"{endpoint.outputs[path].rstrip('/')}/{file}"
            for header, (path, file) in places.items()
            if path in endpoint.outputs
        }
        return reply(202, headers, json.dumps({"InferenceId": inference}))
