"""The embedded AWS has SageMaker's quotas, and they bite."""

import boto3
import pytest
from account import account_port, finish, run  # noqa: F401
from botocore.config import Config
from botocore.exceptions import ClientError


def test_quotas_by_name(port):
    client = boto3.client("service-quotas")
    pages = client.get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
    found = {quota["QuotaName"]: quota for page in pages for quota in page["Quotas"]}
    for use in ("training job usage", "spot training job usage", "training warm pool usage"):
        quota = found[f"ml.g4dn.xlarge for {use}"]
        one = client.get_service_quota(ServiceCode="sagemaker", QuotaCode=quota["QuotaCode"])
        assert one["Quota"] == quota and quota["Adjustable"]


def instances(kind, count, **more):
    return {"ResourceConfig": {"InstanceType": kind, "InstanceCount": count, **more}}


def test_quotas_bite(port):
    spot = {
        "EnableManagedSpotTraining": True,
        "StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 60},
    }
    with pytest.raises(ClientError) as caught:
        run("none", "", **instances("ml.g5.xlarge", 1, VolumeSizeInGB=1))
    assert caught.value.response["Error"]["Code"] == "ResourceLimitExceeded"
    assert (
        "The account-level service limit 'ml.g5.xlarge for training job usage' is 0 Instances, with"
        " current utilization of 0 Instances and a request delta of 1 Instances. Please use AWS "
        "Service Quotas to request an increase for this quota."
    ) in str(caught.value)
    with pytest.raises(ClientError, match="for spot training job usage' is 2 .* delta of 3 "):
        run("three", "", **instances("ml.g4dn.xlarge", 3, VolumeSizeInGB=1), **spot)
    warm = instances("ml.g4dn.xlarge", 1, VolumeSizeInGB=1, KeepAlivePeriodInSeconds=600)
    with pytest.raises(ClientError, match="for training warm pool usage' is 0 "):
        run("warm", "", **warm)
    two = instances("ml.g4dn.xlarge", 2, VolumeSizeInGB=1)
    run("first", "import time; time.sleep(600)", **two)
    with pytest.raises(ClientError, match="utilization of 2 Instances and a request delta of 2 "):
        run("second", "", **two)
    run("other-quota", "", **two, **spot)
    boto3.client("sagemaker").stop_training_job(TrainingJobName="first")
    finish("first")
    run("second", "", **two)
    assert finish("second")["TrainingJobStatus"] == "Completed"
    finish("other-quota")


def test_a_quota_is_requested_once(port):
    client = boto3.client("service-quotas")
    quota = next(
        quota
        for quota in client.list_service_quotas(ServiceCode="sagemaker")["Quotas"]
        if quota["QuotaName"] == "ml.g5.xlarge for training job usage"
    )
    which = {"ServiceCode": "sagemaker", "QuotaCode": quota["QuotaCode"]}
    history = client.list_requested_service_quota_change_history_by_quota
    assert history(**which)["RequestedQuotas"] == []
    with pytest.raises(client.exceptions.IllegalArgumentException, match="greater than"):
        client.request_service_quota_increase(**which, DesiredValue=0)
    requested = client.request_service_quota_increase(**which, DesiredValue=1)["RequestedQuota"]
    assert (requested["Status"], requested["DesiredValue"]) == ("PENDING", 1)
    assert requested["Created"].year > 2000
    with pytest.raises(client.exceptions.ResourceAlreadyExistsException, match="Only one open"):
        client.request_service_quota_increase(**which, DesiredValue=2)
    assert history(**which)["RequestedQuotas"] == [requested]


def test_no_price_is_listed_and_the_answer_comes_at_once(port):
    """moto has no Pricing API: its error 500 was asked again for ten seconds."""
    once = Config(retries={"total_max_attempts": 1})
    pricing = boto3.client("pricing", region_name="us-east-1", config=once)
    assert pricing.get_products(ServiceCode="AmazonSageMaker")["PriceList"] == []
