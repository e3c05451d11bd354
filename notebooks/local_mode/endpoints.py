"""Endpoints and batch transform for the embedded AWS (aws.py): a model that is deployed answers.

moto keeps the records of models and endpoint configurations. What is added here: an endpoint and a
transform job unpack the model's archive and start serving.py on loopback; InvokeEndpoint and
InvokeEndpointAsync reach it, with the service's limits; a log in CloudWatch; quotas; an end.

What differs from the service, on purpose: one variant, one instance and one container, in your own
Python environment and not in the image that the model names; no scaling, no data capture, no
notification. FailureReason ends with the last line of the log, which AWS leaves to CloudWatch. A
transform job sends whole objects, one after another (SplitType None, BatchStrategy SingleRecord).
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aws import ClientError, account_environment, list_keys, mapped, now, split_uri
from botocore.exceptions import BotoCoreError
from botocore.exceptions import ClientError as RequestError
from moto.core.responses import ActionResult, EmptyResult
from moto.sagemaker.exceptions import ResourceInUseException, SagemakerClientError, ValidationError
from moto.sagemaker.models import FakeEndpointConfig
from moto.sagemaker.responses import SageMakerResponse
from moto.sagemaker.utils import arn_formatter
from moto.sagemakerruntime.responses import SageMakerRuntimeResponse

SERVING = Path(__file__).with_name("serving.py")
PAYLOAD_BYTES = 6 * 2**20  # of InvokeEndpoint
RESPONSE_SECONDS = 60  # of InvokeEndpoint
ASYNC_SECONDS = 900  # of InvokeEndpointAsync, unless the request says more, up to an hour
START_SECONDS = 600  # until the container must answer /ping


class Container:
    """A model in a server process of its own, with its log in CloudWatch."""

    def __init__(self, server, model, folder, log_group, log_stream):
        self.server, self.model, self.folder = server, model, server.state / folder
        self.session = server.session(model.execution_role_arn, model.arn.split(":")[3])
        self.s3 = self.session.client("s3", endpoint_url=server.url)
        self.logs = self.session.client("logs", endpoint_url=server.url)
        self.group, self.stream, self.last_line = log_group, log_stream, ""
        self.process = self.port = self.reader = None

    def start(self):
        """Unpack, start, wait until the server answers. ClientError says why it does not."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "model").mkdir(parents=True)
        url = self.model.primary_container["ModelDataUrl"]
        archive = self.folder / "model.tar.gz"
        try:
            self.s3.download_file(*split_uri(url), str(archive))
            with tarfile.open(archive) as tar:
                tar.extractall(self.folder / "model", filter="data")
        except (RequestError, tarfile.TarError) as error:
            raise ClientError(
                f'Failed to download model data from URL "{url}". Please ensure that there is an '
                "object located at the URL and that the role passed to CreateModel has permissions "
                f"to download the object. ({error})"
            ) from error
        archive.unlink()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        requested = self.model.primary_container.get("Environment") or {}
        self.process = subprocess.Popen(
            [sys.executable, str(SERVING), str(self.port)],
            cwd=self.folder,
            env=account_environment(self.session.get_credentials(), self.session.region_name)
            | {name: mapped(value, self.folder) for name, value in requested.items()}
            | {"SAGEMAKER_BASE_DIR": str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group, which a signal reaches as a whole
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        deadline = time.monotonic() + START_SECONDS
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise ClientError(
                    "The primary container for production variant AllTraffic did not pass the ping "
                    f"health check. Please check CloudWatch logs. Its last line: {self.last_line}"
                )
            time.sleep(0.2)

    def is_ready(self):
        with contextlib.suppress(OSError):
            return self.ask("GET", "/ping", timeout=5)[0] == 200

    def ask(self, method, path, body=None, headers=None, timeout=RESPONSE_SECONDS):
        """Send a request to the server: status, content type, body (bytes). OSError if it fails."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers.get("Content-Type", ""), answer.read()
        except http.client.HTTPException as error:  # it went away in the middle
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def invoke(self, body, content_type, accept, timeout):
        """One inference: content type and body of the answer, or ModelError."""
        headers = {"Content-Type": content_type, "Accept": accept}
        headers = {name: value for name, value in headers.items() if value}
        try:
            status, answer_type, answer = self.ask("POST", "/invocations", body, headers, timeout)
        except OSError as error:
            raise ModelError(0, f"Your invocation timed out or broke off: {error}") from error
        if status >= 300:
            raise ModelError(status, answer.decode(errors="replace"))
        return answer_type, answer

    def read(self):
        """Send the server's lines to CloudWatch as they come; a role that may not has no log."""
        for line in self.process.stdout:
            self.last_line = line.decode(errors="replace").strip() or self.last_line
            self.log(self.stream, self.last_line)

    def log(self, stream, text):
        place = {"logGroupName": self.group, "logStreamName": stream}
        exists = self.logs.exceptions.ResourceAlreadyExistsException
        with contextlib.suppress(RequestError, BotoCoreError):
            with contextlib.suppress(exists):
                self.logs.create_log_group(logGroupName=self.group)
            with contextlib.suppress(exists):
                self.logs.create_log_stream(**place)
            event = {"timestamp": int(time.time() * 1000), "message": text}
            self.logs.put_log_events(**place, logEvents=[event])

    def kill(self):
        """End the server and what it started, and delete its folder."""
        if self.process:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.reader.join(timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)


class ModelError(Exception):
    """An answer other than 2xx from a container: its status (0: none came) and its text."""

    def __init__(self, status, text):
        kind = "client" if 400 <= status < 500 else "server"
        super().__init__(f'Received {kind} error ({status}) from primary with message "{text}".')
        self.status, self.text = status, text


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

    def answer_later(self, source, name, content_type, accept, timeout):
        """Take an object of S3 as the payload; the answer, or the error, becomes one too."""
        s3 = self.container.s3
        try:
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


class TransformJob:
    """A job that CreateTransformJob asks for: each object below a prefix becomes one answer."""

    def __init__(self, request, arn, container, region):
        self.request, self.arn, self.container, self.region = request, arn, container, region
        self.name = self.transform_job_name = request["TransformJobName"]
        request.pop("Tags", None)
        source = request["TransformInput"]["DataSource"]["S3DataSource"]
        if source["S3DataType"] != "S3Prefix" or request["TransformInput"].get("SplitType"):
            raise ClientError("The embedded AWS transforms whole objects of an S3Prefix.")
        self.source, self.target = source["S3Uri"], request["TransformOutput"]["S3OutputPath"]
        resources = request["TransformResources"]
        self.instance_count = resources["InstanceCount"]
        self.quota_names = [f"{resources['InstanceType']} for transform job usage"]
        self.status, self.failure_reason, self.wants_stop = "InProgress", None, threading.Event()
        self.creation_time, self.start_time, self.end_time = now(), None, None

    transform_job_status = property(lambda job: job.status)  # these are what moto's list reads
    transform_end_time = last_modified_time = property(lambda job: job.end_time)

    @property
    def is_running(self):
        return self.status in ("InProgress", "Stopping")

    @property
    def response_object(self):
        """DescribeTransformJob's answer: the request, and what became of it."""
        state = {
            "TransformJobArn": self.arn,
            "TransformJobStatus": self.status,
            "FailureReason": self.failure_reason,
            "CreationTime": self.creation_time,
            "TransformStartTime": self.start_time,
            "TransformEndTime": self.end_time,
        }
        return {name: value for name, value in (self.request | state).items() if value is not None}

    def run(self):
        """From InProgress to Completed, Failed or Stopped."""
        try:
            self.failure_reason = self.transform()
        except Exception as error:
            self.failure_reason = f"ClientError: {error}"[:1024]
        finally:
            self.container.kill()
            self.end_time = now()
            ended = "Failed" if self.failure_reason else "Completed"
            self.status = "Stopped" if self.wants_stop.is_set() else ended

    def transform(self):
        """Return the FailureReason, if any. One bad object does not keep the others back."""
        bucket, prefix = split_uri(self.source)
        keys = list_keys(self.container.s3, bucket, prefix)
        if not keys:
            raise ClientError(f'No S3 objects found under S3 URL "{self.source}".')
        self.container.start()
        self.start_time, bad = now(), 0
        for key in keys:
            if self.wants_stop.is_set():
                return None
            try:
                self.transform_object(bucket, key, prefix)
            except ModelError as error:
                bad += 1
                stream = f"{self.container.stream}/data-log"
                self.container.log(stream, f"{bucket}/{key}: {error}")
        return "ClientError: See job logs for more information" if bad else None

    def transform_object(self, bucket, key, prefix):
        s3, request = self.container.s3, self.request
        body = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        limit = request.get("MaxPayloadInMB", 6)
        if len(body) > limit * 2**20:
            raise ModelError(413, f"larger than MaxPayloadInMB, {limit}")
        content_type = request["TransformInput"].get("ContentType")
        seconds = (request.get("ModelClientConfig") or {}).get("InvocationsTimeoutInSeconds", 600)
        accept = request["TransformOutput"].get("Accept")
        answer_type, answer = self.container.invoke(body, content_type, accept, seconds)
        name = key[len(prefix) :].lstrip("/") or key.rpartition("/")[2]
        to_bucket, folder = split_uri(self.target.rstrip("/"))
        target = f"{folder}/{name}.out".lstrip("/")
        s3.put_object(Bucket=to_bucket, Key=target, Body=answer, ContentType=answer_type)


# The operations -----------------------------------------------------------------------------------
def extend_moto(server):
    """Give moto's response classes the operations on endpoints and transform jobs."""
    # moto's list of instance types is some years old.
    FakeEndpointConfig.validate_instance_type = lambda self, instance_type: None

    def answers(response_class):
        return lambda function: setattr(response_class, function.__name__, function)

    def begin(response, make, model_name, *place):
        """Make an endpoint or a transform job, with a container, and let it run."""
        backend = response.sagemaker_backend
        if model_name not in backend._models:
            arn = arn_formatter("model", model_name, backend.account_id, backend.region_name)
            raise ValidationError(f'Could not find model "{arn}".')
        try:
            made = make(Container(server, backend._models[model_name], *place))
            server.check_quotas(made)
        except (ClientError, PermissionError) as error:
            code = getattr(error, "code", ClientError.code)
            raise SagemakerClientError(code, str(error)) from error
        threading.Thread(target=made.run, daemon=True).start()
        return made

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
        record = self.sagemaker_backend.endpoints.get(self._get_param("EndpointName"))
        answer = deleted(self)  # raises if there is none
        server.jobs.pop(record.arn).delete()
        return answer

    @answers(SageMakerResponse)
    def create_transform_job(self):
        request, backend = json.loads(self.body), self.sagemaker_backend
        name, region = request["TransformJobName"], backend.region_name
        arn = arn_formatter("transform-job", name, backend.account_id, region)
        if name in backend.transform_jobs:
            raise ResourceInUseException(f"Job name must be unique: {arn} exists.")
        place = (f"transform_jobs/{name}", "/aws/sagemaker/TransformJobs")
        job = begin(
            self,
            lambda container: TransformJob(request, arn, container, region),
            request["ModelName"],
            *place,
            f"{name}/i-{uuid.uuid4().hex[:17]}",
        )
        backend.transform_jobs[name] = server.jobs[arn] = job
        return ActionResult({"TransformJobArn": arn})

    @answers(SageMakerResponse)
    def stop_transform_job(self):
        name, backend = self._get_param("TransformJobName"), self.sagemaker_backend
        backend.describe_transform_job(name)  # raises if unknown
        job = backend.transform_jobs[name]
        if not job.is_running:
            raise ValidationError(f"The transform job is in status {job.status}.")
        job.status = "Stopping"
        job.wants_stop.set()
        return EmptyResult()

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
        if not re.match(r"s3://[^/]+/.", given.get("inputlocation", "")):
            return refusal(400, "ValidationError", "InputLocation must be s3://bucket/key.")
        inference, name = given.get("inference-id") or str(uuid.uuid4()), str(uuid.uuid4())
        seconds = int(given.get("invocationtimeoutseconds", ASYNC_SECONDS))
        kind, accept = given.get("content-type"), given.get("accept")
        endpoint.queue.submit(
            endpoint.answer_later, given["inputlocation"], name, kind, accept, seconds
        )
        places = {"OutputLocation": ("S3OutputPath", f"{name}.out")}
        places["FailureLocation"] = ("S3FailurePath", f"{name}-error.out")
        headers = {
            f"X-Amzn-SageMaker-{header}": f"{endpoint.outputs[path].rstrip('/')}/{file}"
            for header, (path, file) in places.items()
            if path in endpoint.outputs
        }
        return reply(202, headers, json.dumps({"InferenceId": inference}))
