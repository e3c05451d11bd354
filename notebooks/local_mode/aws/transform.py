"""Batch transform: each object below a prefix becomes one answer of a deployed model."""

import json
import threading
import uuid

from moto.core.responses import ActionResult, EmptyResult
from moto.sagemaker.exceptions import ResourceInUseException, ValidationError
from moto.sagemaker.responses import SageMakerResponse
from moto.sagemaker.utils import arn_formatter

from .basics import ClientError, answers, now
from .containers import ModelError, begin
from .storage import list_keys, split_uri


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
        container.instance_type = resources["InstanceType"]
        container.ami = resources.get("TransformAmiVersion")
        at_once, size = request.get("MaxConcurrentTransforms", 1), request.get("MaxPayloadInMB", 6)
        if at_once * size > 100:
            raise ClientError(
                f"MaxConcurrentTransforms ({at_once}) x MaxPayloadInMB ({size}) must not exceed 100"
            )
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
                if self.wants_stop.is_set():
                    return None
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


def extend_moto(server):
    """Give moto's response classes the operations on transform jobs."""

    @answers(SageMakerResponse)
    def create_transform_job(self):
        request, backend = json.loads(self.body), self.sagemaker_backend
        name, region = request["TransformJobName"], backend.region_name
        arn = arn_formatter("transform-job", name, backend.account_id, region)
        if name in backend.transform_jobs:
            raise ResourceInUseException(f"Job name must be unique: {arn} exists.")
        place = (f"transform_jobs/{name}", "/aws/sagemaker/TransformJobs")
        job = begin(
            server,
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
        job.container.kill()  # also one that is starting, or in the middle of a clip
        return EmptyResult()
