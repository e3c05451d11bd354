"""The instances that jobs get: preferences, types that are not to be had, warm pools."""

import boto3
import pytest
from account import BUCKET, ROLE, account_port, describe, finish, run, wait_until  # noqa: F401
from botocore.exceptions import ClientError
from embedded import own_aws

KIND = {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1}


@pytest.fixture(scope="module", name="port")
def port_without_capacity():
    """Its m5.xlarge and g5 are not to be had; the quota for g5 is 0."""
    with own_aws(grace_seconds=5, no_capacity=["ml.m5.xlarge", "ml.g5.xlarge"]) as port:
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield port


def resources(*preferences, **more):
    listed = [{"InstanceType": kind} | more for kind in preferences]
    count = {} if more else {"InstanceCount": 1}
    return {"InstancePreferences": listed, "VolumeSizeInGB": 1, **count}


def test_no_capacity_fails_the_job_and_costs_nothing(port):
    run("nowhere", "", ResourceConfig=KIND | {"InstanceType": "ml.m5.xlarge"})
    answer = finish("nowhere")
    assert answer["TrainingJobStatus"] == answer["SecondaryStatus"] == "Failed"
    assert answer["FailureReason"] == (
        "CapacityError: Unable to provision requested ML compute capacity. Please retry using a "
        "different ML instance type."
    )
    assert "TrainingStartTime" not in answer and "BillableTimeInSeconds" not in answer


def test_the_first_preference_with_quota_and_capacity_is_taken(port):
    kinds = "ml.g5.xlarge", "ml.m5.xlarge", "ml.m5.large", "ml.g4dn.xlarge"
    code = "import json; print(json.load(open('input/config/resourceconfig.json')))"
    run("choosy", code, ResourceConfig=resources(*kinds), RetryStrategy={"MaximumRetryAttempts": 3})
    answer = finish("choosy")
    assert answer["TrainingJobStatus"] == "Completed"
    taken = answer["ResourceConfig"]
    assert (taken["SelectedInstanceType"], taken["SelectedInstanceCount"]) == ("ml.m5.large", 1)
    assert [one["InstanceType"] for one in taken["InstancePreferences"]] == list(kinds)
    assert answer["RetryStrategy"] == {"MaximumRetryAttempts": 3}
    run("several", "", ResourceConfig=resources("ml.m5.large", InstanceCount=2))
    assert finish("several")["ResourceConfig"]["SelectedInstanceCount"] == 2
    run("none-there", "", ResourceConfig=resources("ml.m5.xlarge"))
    assert finish("none-there")["FailureReason"].startswith("CapacityError: ")
    with pytest.raises(ClientError, match="ml.g5.xlarge for training job usage' is 0 "):
        run("none-allowed", "", ResourceConfig=resources("ml.g5.xlarge", "ml.g6.xlarge"))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (KIND | resources("ml.m5.large"), "mutually exclusive with InstanceType"),
        (resources("ml.m5.large") | {"InstanceCount": None}, "InstanceCount must be in every"),
    ],
)
def test_preferences_that_contradict_the_request_are_refused(config, text, port):
    config = {name: value for name, value in config.items() if value is not None}
    with pytest.raises(ClientError, match=text) as error:
        run("contradictory", "", ResourceConfig=config)
    assert error.value.response["Error"]["Code"] == "ValidationException"


def pool(name):
    return describe(name)["WarmPoolStatus"]


def test_a_warm_pool_is_taken_over_given_up_and_billed(port):
    client = boto3.client("sagemaker")
    warm = {"ResourceConfig": KIND | {"KeepAlivePeriodInSeconds": 600}}
    run("first", "import time; time.sleep(2)", **warm)
    assert pool("first") == {"Status": "InUse", "ResourceRetainedBillableTimeInSeconds": 0}
    finish("first")
    assert pool("first")["Status"] == "Available"
    wait_until(lambda: pool("first")["ResourceRetainedBillableTimeInSeconds"] >= 1)
    with pytest.raises(ClientError, match="ResourceInUse"):
        client.delete_training_job(TrainingJobName="first")

    other = KIND | {"VolumeSizeInGB": 2, "KeepAlivePeriodInSeconds": 600}
    run("no-match", "", ResourceConfig=other)
    finish("no-match")
    assert pool("first")["Status"] == "Available"
    with pytest.raises(ClientError, match="training warm pool usage' is 2 .*utilization of 2 "):
        run("too-many", "", ResourceConfig=other | {"VolumeSizeInGB": 3})

    run("second", "", **warm)  # within the quota: it takes the instance of the first
    finish("second")
    kept = pool("first")
    assert (kept["Status"], kept["ReusedByJob"]) == ("Reused", "second")
    client.delete_training_job(TrainingJobName="first")

    nothing = {"KeepAlivePeriodInSeconds": 0}
    assert pool("second")["Status"] == "Available"
    client.update_training_job(TrainingJobName="second", ResourceConfig=nothing)
    assert pool("second")["Status"] == "Available"  # it takes a while
    with pytest.raises(ClientError, match="ResourceInUse"):
        client.delete_training_job(TrainingJobName="second")
    wait_until(lambda: pool("second")["Status"] == "Terminated")
    with pytest.raises(ClientError, match="no warm pool"):
        client.update_training_job(TrainingJobName="second", ResourceConfig=nothing)
    client.delete_training_job(TrainingJobName="second")

    run("last", "", ResourceConfig=other | {"KeepAlivePeriodInSeconds": 0})
    finish("last")  # it keeps nothing, so what it took over ends with it
    assert (pool("no-match")["ReusedByJob"], pool("last")["Status"]) == ("last", "Terminated")


def test_a_warm_pool_survives_a_job_s_error_but_not_a_lack_of_capacity(port):
    warm = KIND | {"KeepAlivePeriodInSeconds": 1, "VolumeSizeInGB": 9}
    run("broken", "raise SystemExit(1)", ResourceConfig=warm)
    assert finish("broken")["WarmPoolStatus"]["Status"] == "Available"
    wait_until(lambda: pool("broken")["Status"] == "Terminated")
    run("nothing", "", ResourceConfig=warm | {"InstanceType": "ml.m5.xlarge"})
    assert finish("nothing")["WarmPoolStatus"]["Status"] == "Terminated"
    spot = {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 60}
    with pytest.raises(ClientError, match="excludes EnableManagedSpotTraining"):
        run("s", "", ResourceConfig=warm, EnableManagedSpotTraining=True, StoppingCondition=spot)
    run("cold", "", ResourceConfig=KIND)
    assert "WarmPoolStatus" not in finish("cold")
