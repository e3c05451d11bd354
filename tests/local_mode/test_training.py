"""Training jobs of the SDK, by its driver scripts, really run, end and fail as on SageMaker."""

import textwrap

import boto3
import pytest
from account import BUCKET, ROLE, account_port, artefact, describe, finish, keys, log  # noqa: F401

SCRIPT = """
    import argparse, os, pathlib, sys
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--checkpoint_dir")
    args = parser.parse_args()
    model = pathlib.Path(os.environ["SM_MODEL_DIR"])
    print("started", args.mode, args.rate, args.checkpoint_dir)
    if args.mode == "fail":
        failure = pathlib.Path(os.environ["SM_OUTPUT_DIR"], "failure")
        failure.write_text("ValueError: cannot decode clip x.mp4")
        sys.exit(3)
    train = pathlib.Path(os.environ["SM_CHANNEL_TRAIN"])
    names = sorted(str(p.relative_to(train)) for p in train.rglob("*.*"))
    (model / "files").write_text(",".join(names))
    (model / "greeting").write_text(os.environ["GREETING"])
    pathlib.Path(os.environ["SM_OUTPUT_DATA_DIR"], "curve").write_text("1 2 3")
"""


@pytest.fixture(scope="module")
def trainer(port, tmp_path_factory):
    """trainer(mode): the SDK's ModelTrainer for SCRIPT."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training.configs import Compute, OutputDataConfig, SourceCode, Tag
    from sagemaker.train import ModelTrainer

    source = tmp_path_factory.mktemp("source")
    (source / "train.py").write_text(textwrap.dedent(SCRIPT))
    (source / "requirements.txt").write_text("boto3\n")

    def make(mode, requirements=None, **parameters):
        return ModelTrainer(
            sagemaker_session=Session(boto_session=boto3.Session(), default_bucket=BUCKET),
            role=ROLE,
            training_image="image:1",
            base_job_name=f"sdk-{mode}",
            source_code=SourceCode(
                source_dir=str(source), entry_script="train.py", requirements=requirements
            ),
            compute=Compute(instance_type="ml.m5.large", instance_count=1, volume_size_in_gb=30),
            hyperparameters={"mode": mode, **parameters},
            environment={"GREETING": "hello you", "PIP_NO_INDEX": "1"},
            output_data_config=OutputDataConfig(s3_output_path=f"s3://{BUCKET}/out"),
            tags=[Tag(key="project", value="clips")],
        )

    return make


def clips():
    from sagemaker.core.training.configs import InputData

    uri = f"s3://{BUCKET}/clips/train"
    return {"input_data_config": [InputData(channel_name="train", data_source=uri)]}


def test_a_passing_job(trainer, caplog):
    caplog.set_level("INFO", "sagemaker")
    model_trainer = trainer("pass", "requirements.txt", rate=0.5, checkpoint_dir="/opt/ml/here")
    model_trainer.train(**clips(), wait=True, logs=True)
    job = model_trainer._latest_training_job
    name = job.training_job_name
    assert job.training_job_status == "Completed"
    assert job.model_artifacts.s3_model_artifacts == (
        f"s3://{BUCKET}/out/{name}/output/model.tar.gz"
    )
    assert artefact(name) == {
        # The prefix is text: what lies beside the folder comes too, under its own name.
        "files": "raise/1.mp4,raise/2.mp4,training_notes.txt",
        "greeting": "hello you",
    }
    assert artefact(name, "output") == {"curve": "1 2 3"}
    (started,) = (line for line in log(name) if line.startswith("started"))
    assert started.startswith("started pass 0.5 ") and started.endswith("127.0.0.1/here")
    assert any("Requirement already satisfied: boto3" in line for line in log(name))
    assert log(name)[-1] == "Training Container Execution Completed"
    assert started in caplog.text  # what wait(logs=True) shows
    answer = describe(name)
    assert [step["Status"] for step in answer["SecondaryStatusTransitions"]] == [
        *("Starting", "Downloading", "Training", "Uploading", "Completed")
    ]
    assert answer["BillableTimeInSeconds"] == answer["TrainingTimeInSeconds"] > 0
    assert answer["Environment"]["GREETING"] == "hello you"
    assert answer["HyperParameters"]["checkpoint_dir"] == "/opt/ml/here"
    tags = boto3.client("sagemaker").list_tags(ResourceArn=answer["TrainingJobArn"])["Tags"]
    assert tags == [{"Key": "project", "Value": "clips"}]


def test_a_failing_job(trainer):
    from sagemaker.core.utils.exceptions import FailedStatusError

    model_trainer = trainer("fail")
    model_trainer.train(**clips(), wait=False)
    job = model_trainer._latest_training_job
    with pytest.raises(FailedStatusError, match="cannot decode clip x.mp4"):
        job.wait(poll=1)
    reason = "AlgorithmError: ValueError: cannot decode clip x.mp4, exit code: 3"
    assert describe(job.training_job_name)["FailureReason"] == reason
    assert not keys(f"out/{job.training_job_name}/output/model")


@pytest.mark.long
def test_two_hosts(port, tmp_path):
    """A real torchrun over two hosts, as the SDK's driver starts it."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training.configs import Compute, OutputDataConfig, SourceCode
    from sagemaker.train import ModelTrainer
    from sagemaker.train.distributed import Torchrun

    (tmp_path / "train.py").write_text(
        textwrap.dedent("""
        import os, pathlib, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor(10.0 ** dist.get_rank())
        dist.all_reduce(total)
        host = os.environ["SM_CURRENT_HOST"]
        print("sum", total.item(), "of", dist.get_world_size(), "on", host)
        pathlib.Path(os.environ["SM_MODEL_DIR"], "host").write_text(host)
        dist.destroy_process_group()
        """)
    )
    model_trainer = ModelTrainer(
        sagemaker_session=Session(boto_session=boto3.Session(), default_bucket=BUCKET),
        role=ROLE,
        training_image="image:1",
        base_job_name="two",
        source_code=SourceCode(source_dir=str(tmp_path), entry_script="train.py"),
        compute=Compute(instance_type="ml.m5.large", instance_count=2, volume_size_in_gb=30),
        distributed=Torchrun(),
        output_data_config=OutputDataConfig(s3_output_path=f"s3://{BUCKET}/out"),
    )
    model_trainer.train(wait=False)
    name = model_trainer._latest_training_job.training_job_name
    answer = finish(name)
    assert answer["TrainingJobStatus"] == "Completed", log(name)
    assert "sum 11.0 of 2 on 127.0.0.1" in log(name, 1)
    assert "sum 11.0 of 2 on 127.0.0.2" in log(name, 2)
    assert artefact(name) == {"host": "127.0.0.1"}
