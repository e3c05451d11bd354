"""Notebooks 1, 3 and 4: the request as a whole, what is refused before it, and an empty account."""

import json
import os

import boto3
import pytest
from botocore.client import BaseClient
from cells import run_cells
from conftest import ROOT
from local_mode import aws
from test_aws import forget_sdk_clients, free_port

ACCOUNT = "123456789012"
BUCKET = f"sagemaker-us-east-1-{ACCOUNT}"
KEY = f"arn:aws:kms:us-east-1:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"


@pytest.fixture(scope="module")
def account():
    """The endpoint of an embedded AWS of this module's own."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    port = free_port()
    try:
        forget_sdk_clients()
        yield f"http://127.0.0.1:{port}"
    finally:
        aws.stop(port)
        os.environ.clear()
        os.environ.update(before)
        forget_sdk_clients()


@pytest.fixture(autouse=True)
def in_notebooks(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")


@pytest.fixture(scope="module")
def set_up(account, tmp_path_factory):
    """set_up(): an output folder as notebooks 1 and 2 leave it; the clips are but names."""
    first = tmp_path_factory.mktemp("set up")
    for clip in ("train/a/1.mp4", "train/b/2.mp4", "test/a/3.mp4"):
        (first / "clips" / clip).parent.mkdir(parents=True)
        (first / "clips" / clip).write_bytes(b"clip")
    os.chdir(ROOT / "notebooks")
    run_cells("01_setup", {"endpoint_url": account, "create_role": True, "output_dir": str(first)})
    run = json.loads((first / "run.json").read_text()) | {"dataset": str(first / "clips")}

    def folder(**changes):
        output = tmp_path_factory.mktemp("output")
        (output / "run.json").write_text(json.dumps(run | changes))
        return output

    return folder


class Captured(Exception):
    """Carries the request that would have gone to AWS."""


@pytest.fixture
def request_of(set_up, monkeypatch):
    """request_of(**parameters): notebook 3's CreateTrainingJob, its run's S3 folder as HOME."""
    call = BaseClient._make_api_call

    def capture(client, operation, parameters):
        if operation == "CreateTrainingJob":
            raise Captured(parameters)
        return call(client, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", capture)

    def request(**parameters):
        output = set_up()
        with pytest.raises(Captured) as caught:
            run_cells("03_remote_launch", parameters | {"output_dir": str(output)})
        home, checkpoints = json.loads((output / "run.json").read_text())["homes"][-2:]
        (sent,) = caught.value.args
        text = json.dumps(sent).replace(sent["TrainingJobName"], "JOB")
        text = text.replace(f"s3://{BUCKET}/{checkpoints}", "CHECKPOINTS")
        return json.loads(text.replace(f"s3://{BUCKET}/{home}", "HOME")), home

    return request


def channel(name, uri, **more):
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, **more}


def test_the_request_by_default(request_of):
    sent, _ = request_of(training_image="my/image:1")
    assert sent.pop("Environment").keys() == {
        "TENSORBOARD_LOGGING_DIR", "PIP_QUIET", "PIP_DISABLE_PIP_VERSION_CHECK", "GIT_COMMIT"
    }  # fmt: skip
    definitions = sent["AlgorithmSpecification"].pop("MetricDefinitions")
    assert {d["Name"] for d in definitions} >= {"loss", "eval:loss", "eval:accuracy", "test:f1"}
    start = "/opt/ml/input/data/sm_drivers/sm_train.sh"
    job = "HOME/video-classification/JOB/input"
    assert sent == {
        "TrainingJobName": "JOB",
        "RoleArn": f"arn:aws:iam::{ACCOUNT}:role/SageMaker-Video-ExecutionRole",
        "AlgorithmSpecification": {
            "TrainingImage": "my/image:1",
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["/bin/bash"],
            "ContainerArguments": ["-c", f"chmod +x {start} && {start}"],
        },
        "HyperParameters": {
            "model_name": "OpenGVLab/VideoMAE2/distill/vit_b_k710_dl_from_giant.pth",
            "epochs": "10",
            "train_batch_size": "4",
            "eval_batch_size": "8",
            "learning_rate": "5e-05",
            "horizontal_flip": "true",
            "report_to": "tensorboard",
        },
        "InputDataConfig": [
            channel("train", "HOME/train/"),
            channel("code", f"{job}/code", InputMode="File"),
            channel("sm_drivers", f"{job}/sm_drivers", InputMode="File"),
        ],
        "ResourceConfig": {
            "InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 50
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
        "EnableManagedSpotTraining": False,
        "OutputDataConfig": {"S3OutputPath": "HOME/job/output", "CompressionType": "GZIP"},
        "CheckpointConfig": {"S3Uri": "CHECKPOINTS/job", "LocalPath": "/opt/ml/checkpoints"},
        "TensorBoardOutputConfig": {
            "S3OutputPath": "HOME/job/tensorboard", "LocalPath": "/opt/ml/output/tensorboard"
        },
        "Tags": [{"Key": "project", "Value": "video-tutorial"}],
    }  # fmt: skip


def test_the_request_with_everything(request_of, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").write_bytes(b"weights")
    network = {
        "subnets": ["subnet-1"],
        "security_group_ids": ["sg-1"],
        "enable_network_isolation": True,
        "enable_inter_container_traffic_encryption": True,
    }
    sent, home = request_of(
        training_image="my/image:1", spot=True, instance_count=2, input_mode="FastFile",
        instance_type="ml.m5.xlarge", kms_key=KEY, network=network, max_runtime=600, max_wait=900,
        tags={"team": "video", "stage": "test"}, channels={"model": str(tmp_path / "weights")},
        hyperparameters={"epochs": 1, "freeze": "all_but_4"}, job_prefix="video-other",
    )  # fmt: skip
    assert sent["ResourceConfig"] == {
        "InstanceType": "ml.m5.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 50,
        "VolumeKmsKeyId": KEY,
    }  # fmt: skip
    assert sent["VpcConfig"] == {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}
    assert sent["EnableNetworkIsolation"] and sent["EnableInterContainerTrafficEncryption"]
    assert sent["EnableManagedSpotTraining"]
    assert sent["StoppingCondition"] == {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 900}
    assert sent["OutputDataConfig"]["KmsKeyId"] == KEY
    assert sent["AlgorithmSpecification"]["TrainingInputMode"] == "FastFile"
    modes = {c["ChannelName"]: c.get("InputMode") for c in sent["InputDataConfig"]}
    assert modes == {"train": None, "model": None, "code": "File", "sm_drivers": "File"}
    assert {tag["Key"]: tag["Value"] for tag in sent["Tags"]} == {"team": "video", "stage": "test"}
    assert sent["HyperParameters"] == {"epochs": "1", "freeze": "all_but_4"}
    bucket = boto3.resource("s3").Bucket(BUCKET)
    uploaded = [item.Object() for item in bucket.objects.filter(Prefix=f"{home}/")]
    assert any(item.key.endswith("code/train.py") for item in uploaded)
    assert {item.ssekms_key_id for item in uploaded} == {KEY}  # clips, weights and code
    (start,) = (item for item in uploaded if item.key.endswith("/sm_train.sh"))
    assert b"torchrun_driver.py" in start.get()["Body"].read()


def test_a_machine_with_its_own_disk_gets_no_key_for_it(request_of):
    sent, _ = request_of(training_image="my/image:1", kms_key=KEY)
    assert "VolumeKmsKeyId" not in sent["ResourceConfig"]
    assert sent["OutputDataConfig"]["KmsKeyId"] == KEY


def test_several_gpus_run_under_torchrun(request_of, set_up):
    prices, quotas = {"ml.g4dn.12xlarge": 5}, {"ml.g4dn.12xlarge for training job usage": 1}
    output = set_up(dollars_per_hour=prices, quotas=quotas)
    made = run_cells(
        "03_remote_launch",
        {"output_dir": str(output), "instance_type": "ml.g4dn.12xlarge"},
        stop="launch",
    )
    assert made["gpus"] == 4
    assert made["make_trainer"]("job", 1, {}).distributed is not None


def test_a_warm_pool(request_of, set_up):
    quotas = {f"ml.g4dn.xlarge for training {use} usage": 1 for use in ("job", "warm pool")}
    output = set_up(quotas=quotas)
    parameters = {"output_dir": str(output), "keep_warm": 600, "training_image": "my/image:1"}
    with pytest.raises(Captured) as caught:
        run_cells("03_remote_launch", parameters)
    assert caught.value.args[0]["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600


def test_clips_in_s3_are_used_where_they_are(request_of, set_up):
    boto3.client("s3").put_object(Bucket=BUCKET, Key="mine/train/a/1.mp4", Body=b"clip")
    output = set_up(dataset=f"s3://{BUCKET}/mine")
    with pytest.raises(Captured) as caught:
        run_cells("03_remote_launch", {"output_dir": str(output), "training_image": "my/image:1"})
    uri = caught.value.args[0]["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"]
    assert uri == f"s3://{BUCKET}/mine/"  # with the slash: mine2/ is another data set


def test_notebook_2_fetches_clips_from_s3(set_up):
    for clip in ("train/a/1.mp4", "train/b/2.mp4"):
        boto3.client("s3").put_object(Bucket=BUCKET, Key=f"theirs/{clip}", Body=b"clip")
        boto3.client("s3").put_object(Bucket=BUCKET, Key=f"theirs2/{clip}", Body=b"other")
    parameters = {"output_dir": str(set_up()), "dataset": f"s3://{BUCKET}/theirs"}
    made = run_cells("02_local_smoke_train", parameters, stop="write-header")
    files = {p.relative_to(made["dataset"]).as_posix() for p in made["dataset"].rglob("*.*")}
    assert files == {"train/a/1.mp4", "train/b/2.mp4"}
    with pytest.raises(FileNotFoundError, match="nothing lies below"):
        run_cells("02_local_smoke_train", parameters | {"dataset": f"s3://{BUCKET}/no"})


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"hyperparameters": {"a.b": 1}}, "hyperparameter a.b='1': .* a dot breaks"),
        ({"hyperparameters": {"舉手": 1}}, "ASCII"),
        ({"hyperparameters": {"model_name": "it's"}}, "an apostrophe would break"),
        ({"hyperparameters": {"seed": None}}, "leave it out"),
        ({"hyperparameters": {"x": "y" * 2501}}, "longer than 2,500 characters"),
        ({"hyperparameters": {"model_name": "local_mode/tiny_videomae_v2"}}, "make it a channel"),
        ({"hyperparameters": {f"x{i}": i for i in range(101)}}, "SageMaker takes 100"),
        ({"channels": {"my-clips": "local_mode"}}, "channel 'my-clips': ASCII letters"),
        ({"channels": {"code": "local_mode"}}, "channel 'code'.* not code or sm_drivers"),
        ({"channels": {"more": "no/such/folder"}}, "channel 'more': there is no folder"),
        ({"channels": {"more": f"s3://{BUCKET}/nothing"}}, "channel 'more': nothing lies below"),
        ({"input_mode": "Fastfile"}, "input_mode is 'Fastfile'"),
        ({"spot": True, "keep_warm": 60}, "exclude each other"),
        ({"spot": True, "max_wait": 60}, "max_wait is 60: it must be max_runtime, 3600"),
        ({"max_cost_usd": 0.5}, "above max_cost_usd = 0.5"),
        ({"instance_count": 3}, "quota 'ml.g4dn.xlarge for training job usage' is below 3"),
        ({"instance_type": "ml.g5.xlarge"}, "request_quota"),
        ({"keep_warm": 60}, "quota 'ml.g4dn.xlarge for training warm pool usage' is below 1"),
        (
            {"training_image": "huggingface", "instance_type": "ml.m5.xlarge"},
            "no huggingface image",
        ),
    ],
)
def test_what_would_fail_is_refused_before_it_costs(set_up, parameters, message):
    output = set_up()
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=message):
        run_cells("03_remote_launch", parameters | {"output_dir": str(output)}, stop="launch")


def test_an_instance_without_a_price_is_refused(set_up):
    output = set_up(dollars_per_hour={"ml.m5.large": 0.1})
    with pytest.raises(RuntimeError, match="No price of ml.g4dn.xlarge: run 01_setup with fetch"):
        run_cells("03_remote_launch", {"output_dir": str(output)}, stop="launch")


def test_unreadable_quotas_are_no_obstacle(set_up, capsys):
    output = set_up(quotas=None)
    run_cells("03_remote_launch", {"output_dir": str(output)}, stop="launch")
    assert "ml.g4dn.xlarge for training job usage: not known" in capsys.readouterr().out


ODD = {
    "plain": "a b",
    "quotes": 'say "yes"',
    "shell": "$HOME `id` \\ & | ; * #",
    "chinese": "舉手",
    "lines": "one\ntwo",
    "list": [1, "a b"],
    "flag": True,
    "rate": 1e-5,
    "dashed-name": "x",
}


def test_values_that_pass_the_check_arrive(set_up, tmp_path):
    """Through the SDK's own start script, in a real job."""
    (tmp_path / "train.py").write_text(
        "import json, os, sys\n"
        "json.dump(sys.argv[1:], open(os.environ['SM_MODEL_DIR'] + '/argv.json', 'w'))\n"
    )
    made = run_cells(
        "03_remote_launch",
        {"output_dir": str(set_up()), "hyperparameters": ODD, "training_image": "my/image:1"},
        stop="launch",
    )
    made["code"] = made["configs"].SourceCode(source_dir=str(tmp_path), entry_script="train.py")
    trainer = made["make_trainer"]("odd", 1, ODD)
    trainer.train(wait=True, logs=False)
    job = trainer._latest_training_job.training_job_name
    folder = aws.status(int(made["endpoint_url"].rpartition(":")[2]))["folder"]
    argv = json.load(open(f"{folder}/jobs/{job}/127.0.0.1/model/argv.json"))
    arrived = dict(zip(argv[::2], argv[1::2], strict=True))
    expected = {f"--{name}": v if isinstance(v, str) else json.dumps(v) for name, v in ODD.items()}
    assert arrived == expected
