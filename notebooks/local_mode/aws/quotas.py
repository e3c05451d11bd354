"""Service Quotas: some of SageMaker's, requests to raise them, and whether a job fits into them."""

import hashlib
import json
import math
import time
import uuid

from moto.core.exceptions import JsonRESTError
from moto.servicequotas.exceptions import NoSuchResource
from moto.servicequotas.responses import ServiceQuotasResponse

from .basics import LimitExceeded, answers


def quotas(region):
    """Some of SageMaker's quotas. The codes are made up: look a quota up by its name."""
    limits = {"ml.g4dn.xlarge": 2.0, "ml.g5.xlarge": 0.0, "ml.g6.xlarge": 0.0}
    limits |= {"ml.m5.large": 20.0, "ml.m5.xlarge": 20.0}
    uses = {"training job usage": 1, "spot training job usage": 1, "processing job usage": 1}
    uses |= {"endpoint usage": 1, "transform job usage": 1}
    values = {f"{i} for {use}": limits[i] * uses[use] for i in limits for use in uses}
    # Nobody has one of these before asking. Here, somebody has asked for CPU instances.
    values |= {f"{i} for training warm pool usage": 2.0 * ("m5" in i) for i in limits}
    for name, value in values.items():
        code = "L-" + hashlib.sha256(name.encode()).hexdigest()[:8].upper()
        yield {
            "ServiceCode": "sagemaker",
            "ServiceName": "Amazon SageMaker",
            "QuotaArn": f"arn:aws:servicequotas:{region}:123456789012:sagemaker/{code}",
            "QuotaCode": code,
            "QuotaName": name,
            "Value": value,
            "Unit": "None",
            "Adjustable": True,
            "GlobalQuota": False,
        }


def quotas_in_use(job):
    """The names of the quotas that a job takes from, also after its end if it keeps a warm pool."""
    if job.is_running:
        return job.quota_names
    pool = getattr(job, "warm_pool", None)
    return job.quota_names[-1:] if pool and pool.status == "Available" else []


def check_quotas(server, job, predecessor=None):
    """Raise LimitExceeded if the job needs more instances than a quota leaves.

    `predecessor`: the job whose warm pool it takes over.
    """
    limits = {quota["QuotaName"]: int(quota["Value"]) for quota in quotas(job.region)}
    others = [o for o in server.jobs.values() if o.region == job.region and o is not predecessor]
    for name in job.quota_names:
        rivals = [other for other in others if name in quotas_in_use(other)]
        used = sum(other.instance_count for other in rivals)
        if used + job.instance_count > limits.get(name, math.inf):
            raise LimitExceeded(
                f"The account-level service limit '{name}' is {limits[name]} Instances, with "
                f"current utilization of {used} Instances and a request delta of "
                f"{job.instance_count} Instances. Please use AWS Service Quotas to request an "
                "increase for this quota. If AWS Service Quotas is not available, contact AWS "
                "support to request an increase for this quota."
            )


def extend_moto(server):
    """Give moto's Service Quotas those of SageMaker, and requests to raise them."""

    def list_quotas(self):  # nothing was changed here: the defaults are what applies
        if json.loads(self.body)["ServiceCode"] != "sagemaker":
            raise NoSuchResource
        return json.dumps({"Quotas": list(quotas(self.region))})

    ServiceQuotasResponse.list_service_quotas = list_quotas
    ServiceQuotasResponse.list_aws_default_service_quotas = list_quotas

    of_moto = ServiceQuotasResponse.get_service_quota

    @answers(ServiceQuotasResponse)
    def get_service_quota(self):
        wanted = json.loads(self.body)
        if wanted["ServiceCode"] != "sagemaker":
            return of_moto(self)
        return json.dumps({"Quota": quota_of(self)})

    def quota_of(response):
        """The quota of SageMaker that a request names."""
        wanted = json.loads(response.body)
        for quota in quotas(response.region):
            if all(quota[name] == wanted[name] for name in ("ServiceCode", "QuotaCode")):
                return quota
        raise NoSuchResource

    def requests_of(quota):
        return [item for item in server.quota_requests if item["QuotaArn"] == quota["QuotaArn"]]

    @answers(ServiceQuotasResponse)
    def request_service_quota_increase(self):  # nobody ever grants it here
        quota, desired = quota_of(self), json.loads(self.body)["DesiredValue"]
        if desired <= quota["Value"]:
            message = "You must provide a quota value greater than the current quota value."
            raise JsonRESTError("IllegalArgumentException", message)
        if requests_of(quota):
            message = "Only one open service quota increase request is allowed per quota."
            raise JsonRESTError("ResourceAlreadyExistsException", message)
        names = ("ServiceCode", "ServiceName", "QuotaArn", "QuotaCode", "QuotaName", "Unit")
        request = {name: quota[name] for name in (*names, "GlobalQuota")}
        request |= {"Id": uuid.uuid4().hex, "DesiredValue": desired, "Status": "PENDING"}
        request["Created"] = request["LastUpdated"] = time.time()
        server.quota_requests.append(request)
        return json.dumps({"RequestedQuota": request})

    @answers(ServiceQuotasResponse)
    def list_requested_service_quota_change_history_by_quota(self):
        return json.dumps({"RequestedQuotas": requests_of(quota_of(self))})
