"""Pipelines of the embedded AWS: steps become jobs, conditions decide, packages are registered."""

import json

import boto3
import pytest
from account import BUCKET, ROLE, account_port, keys, wait_until  # noqa: F401
from botocore.exceptions import ClientError

GROUP = "video-models"
ENDED = ("Succeeded", "Failed", "Stopped")


def steps(train="print('acc=0.9')", least=0.5, **more):
    """Prepare writes a file, Train reads it and prints an accuracy, Good asks, Register registers.

    Train stands first: the order is that of what each step needs.
    """
    cluster = {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1}
    clips = {"Get": "Steps.Prepare.ProcessingOutputConfig.Outputs['clips'].S3Output.S3Uri"}
    folder = [f"s3://{BUCKET}", {"Get": "Execution.PipelineExecutionId"}, "clips"]
    write = "open('processing/output/a.txt', 'w').write('clip')"
    accuracy = {"Get": "Steps.Train.FinalMetricDataList['eval:acc'].Value"}
    return [
        {"Name": "Train", "Type": "Training", "Arguments": {
            "TrainingJobName": "video-train",
            "AlgorithmSpecification": {
                "TrainingImage": "none", "TrainingInputMode": "File",
                "ContainerEntrypoint": ["python3", "-u", "-c", train],
                "MetricDefinitions": [{"Name": "eval:acc", "Regex": r"acc=(\S+)"}]},
            "InputDataConfig": [{"ChannelName": "train", "DataSource": {"S3DataSource": {
                "S3DataType": "S3Prefix", "S3Uri": clips}}}],
            "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/out"}, "RoleArn": ROLE,
            "ResourceConfig": cluster, "StoppingCondition": {"MaxRuntimeInSeconds": 60}}},
        {"Name": "Good", "Type": "Condition", "Arguments": {
            "Conditions": [{"Type": "GreaterThanOrEqualTo", "LeftValue": accuracy,
                            "RightValue": {"Get": "Parameters.Least"}}],
            "IfSteps": [{"Name": "Register", "Type": "RegisterModel", "Arguments": {
                "ModelPackageGroupName": GROUP,
                "CustomerMetadataProperties": {
                    "acc": {"Std:Join": {"On": "", "Values": [accuracy]}}},
                "InferenceSpecification": {"Containers": [{"Image": "none", "ModelDataUrl": {
                    "Get": "Steps.Train.ModelArtifacts.S3ModelArtifacts"}}],
                    "SupportedContentTypes": ["a/b"], "SupportedResponseMIMETypes": ["a/b"]},
                "ModelApprovalStatus": "PendingManualApproval"}}],
            "ElseSteps": []}},
        {"Name": "Prepare", "Type": "Processing", "Arguments": {
            "AppSpecification": {
                "ImageUri": "none", "ContainerEntrypoint": ["python3", "-c", write]},
            "ProcessingResources": {"ClusterConfig": cluster}, "RoleArn": ROLE,
            "ProcessingOutputConfig": {"Outputs": [{"OutputName": "clips", "S3Output": {
                "S3Uri": {"Std:Join": {"On": "/", "Values": folder}},
                "LocalPath": "/opt/ml/processing/output", "S3UploadMode": "EndOfJob"}}]}}},
        *more.values(),
    ]  # fmt: skip


@pytest.fixture
def sagemaker(port):
    client = boto3.client("sagemaker", region_name="us-east-1")
    client.create_model_package_group(ModelPackageGroupName=GROUP)
    client.describe_model_package_group(
        ModelPackageGroupName=GROUP
    )  # as AWS answers: own_aws looks
    yield client
    for one in client.list_pipelines()["PipelineSummaries"]:
        client.delete_pipeline(PipelineName=one["PipelineName"])
    for one in client.list_model_packages(ModelPackageGroupName=GROUP)["ModelPackageSummaryList"]:
        client.delete_model_package(ModelPackageName=one["ModelPackageArn"])
    client.delete_model_package_group(ModelPackageGroupName=GROUP)


def start(sagemaker, least=0.5, **changes):
    """An execution of a new pipeline."""
    parameters = [{"Name": "Least", "Type": "Float", "DefaultValue": 0.99}]
    definition = {"Version": "2020-12-01", "Parameters": parameters, "Steps": steps(**changes)}
    request = {"PipelineDefinition": json.dumps(definition), "RoleArn": ROLE}
    sagemaker.create_pipeline(PipelineName="video-pipeline", **request)
    started = sagemaker.start_pipeline_execution(
        PipelineName="video-pipeline", PipelineParameters=[{"Name": "Least", "Value": str(least)}]
    )
    return started["PipelineExecutionArn"]


def describe(sagemaker, execution):
    return sagemaker.describe_pipeline_execution(PipelineExecutionArn=execution)


def finish(sagemaker, execution):
    """(the execution's last description, {step: its facts})"""
    wait_until(lambda: describe(sagemaker, execution)["PipelineExecutionStatus"] in ENDED)
    return describe(sagemaker, execution), listed(sagemaker, execution)


def listed(sagemaker, execution):
    found = sagemaker.list_pipeline_execution_steps(
        PipelineExecutionArn=execution, SortOrder="Ascending"
    )
    return {step["StepName"]: step for step in found["PipelineExecutionSteps"]}


def test_the_steps_run_in_the_order_of_what_they_need_and_pass_on_what_they_made(sagemaker):
    train = "print('acc=0.' + str(len(open('input/data/train/a.txt').read())))"
    execution = start(sagemaker, least=0.4, train=train)
    described, found = finish(sagemaker, execution)
    assert described["PipelineExecutionStatus"] == "Succeeded", (described, found)
    assert list(found) == ["Prepare", "Train", "Good", "Register"]
    assert {step["StepStatus"] for step in found.values()} == {"Succeeded"}
    identifier = execution.rpartition("/")[2]
    assert keys(f"{identifier}/") == [f"{identifier}/clips/a.txt"]
    job = found["Train"]["Metadata"]["TrainingJob"]["Arn"].rpartition("/")[2]
    assert job.startswith(
        f"video-train-{identifier}-"
    ) and f"out/{job}/output/model.tar.gz" in keys("out/")
    assert (
        found["Prepare"]["Metadata"]["ProcessingJob"]["Arn"].split("/")[1].startswith("pipelines-")
    )
    assert found["Good"]["Metadata"]["Condition"] == {"Outcome": "True"}
    arn = found["Register"]["Metadata"]["RegisterModel"]["Arn"]
    package = sagemaker.describe_model_package(ModelPackageName=arn)
    (container,) = package["InferenceSpecification"]["Containers"]
    assert container["ModelDataUrl"] == f"s3://{BUCKET}/out/{job}/output/model.tar.gz"
    assert package["CustomerMetadataProperties"] == {"acc": "0.4"}
    assert package["ModelApprovalStatus"] == "PendingManualApproval"


def test_below_the_condition_nothing_is_registered(sagemaker):
    described, found = finish(sagemaker, start(sagemaker, least=0.95))
    assert described["PipelineExecutionStatus"] == "Succeeded"
    assert found["Good"]["Metadata"]["Condition"] == {"Outcome": "False"}
    assert "Register" not in found
    packages = sagemaker.list_model_packages(ModelPackageGroupName=GROUP)
    assert packages["ModelPackageSummaryList"] == []


def test_a_failed_job_fails_its_step_and_the_execution_and_starts_no_more(sagemaker):
    described, found = finish(sagemaker, start(sagemaker, train="raise SystemExit(3)"))
    assert described["PipelineExecutionStatus"] == "Failed"
    assert described["FailureReason"] == "Step failure: One or multiple steps failed."
    assert list(found) == ["Prepare", "Train"] and "exit code: 3" in found["Train"]["FailureReason"]


def test_a_property_that_the_step_lacks_and_a_step_unknown_here_fail_the_execution(sagemaker):
    _, found = finish(sagemaker, start(sagemaker, train="print('no metric')"))
    assert "eval:acc" in found["Good"]["FailureReason"]
    sagemaker.delete_pipeline(PipelineName="video-pipeline")
    ask = {"Name": "Ask", "Type": "Callback", "Arguments": {}}
    _, found = finish(sagemaker, start(sagemaker, ask=ask))
    assert "Callback" in found["Ask"]["FailureReason"]


def test_an_execution_that_is_stopped_stops_its_job_and_only_then_the_pipeline_can_go(sagemaker):
    execution = start(sagemaker, train="import time; time.sleep(60)")
    wait_until(
        lambda: "TrainingJob" in listed(sagemaker, execution).get("Train", {}).get("Metadata", {})
    )
    with pytest.raises(ClientError, match="ConflictException"):
        sagemaker.delete_pipeline(PipelineName="video-pipeline")
    sagemaker.stop_pipeline_execution(PipelineExecutionArn=execution)
    described, found = finish(sagemaker, execution)
    assert described["PipelineExecutionStatus"] == found["Train"]["StepStatus"] == "Stopped"
    job = found["Train"]["Metadata"]["TrainingJob"]["Arn"].rpartition("/")[2]
    job = sagemaker.describe_training_job(TrainingJobName=job)
    assert job["TrainingJobStatus"] == "Stopped"
    sagemaker.delete_pipeline(PipelineName="video-pipeline")
    with pytest.raises(sagemaker.exceptions.ResourceNotFound):
        sagemaker.describe_pipeline(PipelineName="video-pipeline")
    with pytest.raises(sagemaker.exceptions.ResourceNotFound):
        sagemaker.describe_pipeline_execution(PipelineExecutionArn=execution)


def test_a_group_is_deleted_after_its_versions(sagemaker):
    finish(sagemaker, start(sagemaker))
    with pytest.raises(ClientError, match="ConflictException"):
        sagemaker.delete_model_package_group(ModelPackageGroupName=GROUP)
    (package,) = sagemaker.list_model_packages(ModelPackageGroupName=GROUP)[
        "ModelPackageSummaryList"
    ]
    sagemaker.delete_model_package(ModelPackageName=package["ModelPackageArn"])
    with pytest.raises(ClientError, match="does not exist"):
        sagemaker.delete_model_package(ModelPackageName=package["ModelPackageArn"])
    with pytest.raises(ClientError, match="ModelPackageGroup .* does not exist"):
        sagemaker.delete_model_package_group(ModelPackageGroupName="video-other")
