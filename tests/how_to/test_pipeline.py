"""The pipeline of the guide: its definition, its check, its picture, and one execution."""

import json

import boto3
import pytest
from cells import run_cells
from conftest import ROOT, TINY
from embedded import forget_sdk_clients, own_aws
from local_mode import aws
from tutorial import account, clean_up

NOTEBOOKS, GUIDE = ROOT / "notebooks", "how_to/make_it_a_pipeline"
ROLE = "SageMaker-Video-ExecutionRole"


@pytest.fixture(scope="module")
def guide(clips_folder, tmp_path_factory):
    """The guide's variables before anything is started, by a reader with the documented rights.

    The embedded AWS enforces IAM: the reader has caller_policy and caller_policy_guides, the role
    what notebook 1 and the guide give it.
    """
    output = tmp_path_factory.mktemp("guide")
    with own_aws(grace_seconds=5, enforce=True) as port, pytest.MonkeyPatch.context() as patch:
        patch.chdir(NOTEBOOKS)
        patch.setenv("MPLBACKEND", "agg")
        here = account.begin(output, f"http://127.0.0.1:{port}")
        iam = here.session.client("iam")
        iam.create_user(UserName="reader")
        for name in ("caller_policy", "caller_policy_guides"):
            document = json.dumps(account.policy(here, name, ROLE))
            made = iam.create_policy(PolicyName=name, PolicyDocument=document)
            iam.attach_user_policy(UserName="reader", PolicyArn=made["Policy"]["Arn"])
        key = iam.create_access_key(UserName="reader")["AccessKey"]
        patch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        patch.setattr(
            aws, "connect", lambda endpoint_url: endpoint_url
        )  # who is signed in stays so
        patch.setattr(aws, "disconnect", lambda endpoint_url: None)
        forget_sdk_clients()
        here.session = boto3.Session(region_name=here.run["region"])
        account.execution_role(here, ROLE, create=True)
        account.make_bucket(here)
        account.quotas(here)
        account.prices(here)
        choices = {"model_name": str(TINY), "learning_rate": 4e-4, "dataloader_num_workers": 0}
        here.remember(dataset=str(clips_folder), choices=choices)
        parameters = {"epochs": 1, "train_batch_size": 8, "least_accuracy": 0.0}
        yield run_cells(GUIDE, parameters | {"output_dir": str(output)}, stop="permit")


def test_the_definition_makes_the_requests_that_aws_publishes_in_their_order(guide):
    table = guide["table"]
    assert table["type"].to_dict() == {
        "Prepare": "Processing", "Train": "Training", "GoodEnough": "Condition",
        "Register": "RegisterModel",
    }  # fmt: skip
    waits = {
        "Prepare": "",
        "Train": "Prepare",
        "GoodEnough": "Train",
        "Register": "GoodEnough, Train",
    }
    assert table["waits for"].to_dict() == waits
    assert table["request"].loc[["Prepare", "Train", "Register"]].tolist() == [
        "CreateProcessingJob", "CreateTrainingJob", "CreateModelPackage",
    ]  # fmt: skip
    assert json.loads(guide["definition"])["Version"] == "2020-12-01"


def test_executions_share_no_folder(guide):
    """Clips of the last execution, or its checkpoints, must not get into the next one."""
    first, train, *_ = guide["pipeline"].steps_of(guide["definition"])
    (output,) = first["Arguments"]["ProcessingOutputConfig"]["Outputs"]
    assert "Execution.PipelineExecutionId" in json.dumps(output["S3Output"]["S3Uri"])
    assert "CheckpointConfig" not in train["Arguments"]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda train: train.pop("TrainingJobName"), "Train: TrainingJobName is None"),
        (
            lambda train: train.update(TrainingJobName="my-job"),
            "Train: TrainingJobName is 'my-job'",
        ),
        (lambda train: train.pop("OutputDataConfig"), 'Train: .*"OutputDataConfig"'),
        (lambda train: train.update(Colour="red"), 'Train: .*"Colour"'),
    ],
)
def test_the_check_names_the_step_whose_request_aws_would_refuse(guide, change, words):
    definition = json.loads(guide["definition"])
    change(next(s for s in definition["Steps"] if s["Name"] == "Train")["Arguments"])
    with pytest.raises(ValueError, match=words):
        guide["pipeline"].check(guide["here"], json.dumps(definition))


def test_the_picture_has_each_step_with_its_status(guide):
    import pandas as pd

    pipeline, definition = guide["pipeline"], guide["definition"]
    shown = {text.get_text() for text in pipeline.graph(definition).axes[0].texts}
    assert {"Prepare\nProcessing", "Register\nRegisterModel"} <= shown
    steps = pd.DataFrame({"status": {"Prepare": "Succeeded", "Train": "Failed"}})
    shown = {text.get_text() for text in pipeline.graph(definition, steps).axes[0].texts}
    assert {"Prepare\nSucceeded", "Train\nFailed", "Register\nnot run"} <= shown


@pytest.mark.long
def test_the_guide_runs_with_the_documented_rights_and_leaves_nothing(guide, capsys, monkeypatch):
    """Without the role's new rights a step fails; with them a model is registered."""
    here, pipeline, definition = guide["here"], guide["pipeline"], guide["definition"]
    name, group = guide["name"], guide["group"]
    monkeypatch.setattr(clean_up, "WAIT", 1)
    monkeypatch.setattr(clean_up, "SECONDS", 0)
    refused = pipeline.start(here, name, group, definition)
    with pytest.raises(RuntimeError, match="step Prepare: .*AccessDenied"):
        pipeline.follow(here, refused)
    account.permit(here, "pipeline_policy")
    assert pipeline.names(here) == (name, group)  # run it again: the same pipeline
    execution = pipeline.start(here, name, group, definition)
    steps = pipeline.follow(here, execution)
    assert steps["status"].to_dict() == dict.fromkeys(guide["table"].index, "Succeeded")
    jobs = [item for item in here.run["jobs"] if "video-" in item]
    assert [job.split("/")[0] for job in jobs] == ["processing-job", "training-job"]
    (version,) = pipeline.versions(here, group).itertuples()
    assert version.approval == "PendingManualApproval"
    assert version.training_job == jobs[1].split("/")[1] and 0 <= float(version.accuracy) <= 1
    strict = pipeline.start(here, name, group, definition, LeastAccuracy=1.01)
    steps = pipeline.follow(here, strict)
    assert steps["made, or found"]["GoodEnough"] == "False" and "Register" not in steps.index
    clean_up.delete(here, confirm=True)
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}  # who may all
    sagemaker = boto3.Session(**keys, region_name="us-east-1").client("sagemaker")
    for kind in ("pipelines", "model_package_groups", "training_jobs", "processing_jobs"):
        found = getattr(sagemaker, f"list_{kind}")()
        assert not [value for key, value in found.items() if "Summar" in key and value]
