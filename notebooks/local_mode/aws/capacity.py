"""The instances that a job gets: quota, capacity, a warm pool that an earlier job has kept.

A training job with KeepAlivePeriodInSeconds keeps its instances when it ends. They are billed until
that time is over, until UpdateTrainingJob gives them up, or until a matching job takes them over:
https://docs.aws.amazon.com/sagemaker/latest/dg/train-warm-pools.html
"""

from datetime import timedelta

from moto.core.responses import ActionResult
from moto.sagemaker.exceptions import ValidationError
from moto.sagemaker.responses import SageMakerResponse

from .basics import ClientError, LimitExceeded, answers, now
from .quotas import check_quotas

NO_CAPACITY = (
    "CapacityError: Unable to provision requested ML compute capacity. Please retry using a "
    "different ML instance type."
)
TERMINATION = timedelta(seconds=3)  # that a pool takes to end, once it is told to


def choose_instances(server, job):
    """Settle on the first instances of a request for which there is quota and capacity.

    Without capacity the job fails later (`has_capacity`). LimitExceeded if no quota is left.
    """
    allowed, refusals = [], []
    for preference in preferences(job.resources, job.request):
        job.use(*preference)
        pool = matching_pool(server, job)
        try:
            check_quotas(server, job, pool and pool.job)
            allowed.append((preference, pool))
        except LimitExceeded as error:
            refusals.append(error)
    if not allowed:
        raise refusals[0]
    there = [(kind, pool) for kind, pool in allowed if pool or kind[0] not in server.no_capacity]
    preference, pool = (there or allowed)[0]
    job.use(*preference)
    job.has_capacity = bool(there)
    if pool:
        pool.reused_by, pool.reused_at = job.name, now()
    if pool or job.resources.get("KeepAlivePeriodInSeconds"):
        job.warm_pool = WarmPool(job)


def preferences(resources, request):
    """The instance types and counts that a request names, in its order."""
    listed, count = resources.get("InstancePreferences"), resources.get("InstanceCount")
    if not listed:
        return [(resources.get("InstanceType"), count or 1)]
    others = ("InstanceType", "InstanceGroups", "InstancePlacementConfig")
    if any(resources.get(name) for name in others) or request.get("EnableManagedSpotTraining"):
        raise ClientError(
            "InstancePreferences is mutually exclusive with InstanceType, InstanceGroups, "
            "InstancePlacementConfig and EnableManagedSpotTraining."
        )
    if any(("InstanceCount" in one) == bool(count) for one in listed):
        raise ClientError(
            "InstanceCount must be in every InstancePreference, or in ResourceConfig alone."
        )
    return [(one["InstanceType"], one.get("InstanceCount") or count) for one in listed]


class WarmPool:
    """What a training job keeps of its instances."""

    def __init__(self, job):
        self.job, self.reused_by, self.reused_at = job, None, None
        self.seconds, self.earliest_end = job.resources.get("KeepAlivePeriodInSeconds") or 0, None

    def keep(self, seconds):
        """Change how long it is kept. Its end takes a few seconds."""
        self.seconds, self.earliest_end = seconds, now() + TERMINATION

    @property
    def end(self):
        broken = not self.job.start_time or self.job.failed_by_service
        end = self.job.end_time + timedelta(seconds=0 if broken else self.seconds)
        return max(end, self.earliest_end or end)

    @property
    def status(self):
        if self.job.is_running:
            return "InUse"
        if self.reused_by:
            return "Reused"
        return "Available" if now() < self.end else "Terminated"

    def describe(self):
        """WarmPoolStatus of DescribeTrainingJob."""
        status, kept = self.status, timedelta(0)
        if status != "InUse":
            kept = (self.reused_at or min(now(), self.end)) - self.job.end_time
        answer = {
            "Status": status,
            "ResourceRetainedBillableTimeInSeconds": int(kept.total_seconds()),
        }
        return answer | ({"ReusedByJob": self.reused_by} if self.reused_by else {})


def matching_pool(server, job):
    """The warm pool that a training job takes over, or None."""
    for other in server.jobs.values():
        pool = getattr(other, "warm_pool", None)
        if job.kind == "Training" and pool and pool.status == "Available":
            if what_must_match(other) == what_must_match(job):
                return pool
    return None


def what_must_match(job):
    resources, request = job.resources, job.request
    flags = ("EnableInterContainerTrafficEncryption", "EnableNetworkIsolation")
    return [
        *(job.region, request["RoleArn"], request.get("VpcConfig")),
        *(job.instance_type, job.instance_count),
        *(resources.get("VolumeKmsKeyId"), resources.get("VolumeSizeInGB")),
        *(bool(request.get(flag)) for flag in flags),
    ]


def extend_moto(server):
    """Give moto UpdateTrainingJob, as far as it concerns warm pools."""

    @answers(SageMakerResponse)
    def update_training_job(self):
        name, backend = self._get_param("TrainingJobName"), self.sagemaker_backend
        backend.describe_training_job(name)  # raises if unknown
        job, wanted = backend.training_jobs[name], self._get_param("ResourceConfig") or {}
        if "KeepAlivePeriodInSeconds" in wanted:
            pool = job.warm_pool
            if not pool or pool.status not in ("InUse", "Available"):
                raise ValidationError(f"{job.arn} has no warm pool that could be updated.")
            pool.keep(wanted["KeepAlivePeriodInSeconds"])
        return ActionResult({"TrainingJobArn": job.arn})
