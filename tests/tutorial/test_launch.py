"""Notebook 3 and its guide: the whole request, what is refused before it, the job, its end."""

import json
import time
from types import SimpleNamespace

import boto3
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator
from cells import run_cell, run_cells
from conftest import ROOT
from embedded import own_aws
from local_mode import aws
from sagemaker.core.shapes import InstancePreference, RetryStrategy, S3DataSource
from sagemaker.core.training import configs
from sagemaker.train import ModelTrainer
from tutorial import account, clean_up, launch

ACCOUNT, USE = "123456789012", "training job usage"
BUCKET = f"sagemaker-us-east-1-{ACCOUNT}"
KEY = f"arn:aws:kms:us-east-1:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
LESSON, GUIDE = "03_remote_launch", "how_to/train_on_many_machines"
CHOICES = {"model_name": "owner/some_model", "learning_rate": 4e-4}


@pytest.fixture(scope="module")
def endpoint():
    """The endpoint of an embedded AWS of this module's own, which kills what will not end."""
    with own_aws(grace_seconds=5) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def in_notebooks(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")


@pytest.fixture(scope="module")
def set_up(endpoint, tmp_path_factory):
    """set_up(**changes): an output folder as notebooks 1 and 2 leave it; the clips are names."""
    first = tmp_path_factory.mktemp("set up")
    for clip in ("train/a/1.mp4", "train/b/2.mp4", "test/a/3.mp4"):
        (first / "clips" / clip).parent.mkdir(parents=True)
        (first / "clips" / clip).write_bytes(b"clip")
    here = account.begin(first, endpoint)
    account.execution_role(here, "SageMaker-Video-ExecutionRole", create=True)
    account.make_bucket(here)
    account.instances(here, ["ml.g4dn.xlarge"])
    here.remember(dataset=str(first / "clips"), choices=CHOICES)

    def folder(**changes):
        output = tmp_path_factory.mktemp("output")
        (output / "run.json").write_text(json.dumps(here.run | changes))
        return output

    return folder


def run_of(output) -> dict:
    return json.loads((output / "run.json").read_text())


def run_guide(output, options=None, **parameters):
    """The variables of the guide before its launch, with these values in its cell `options`."""
    parameters |= {"output_dir": str(output)}
    made = run_cells(GUIDE, parameters, stop="upload") | (options or {})
    for cell in ("upload", "prepare", "request", "cost-check"):
        made = run_cell(GUIDE, cell, **made)
    return made


class Captured(Exception):
    """Carries the request that would have gone to AWS."""


@pytest.fixture
def request_of(set_up, monkeypatch):
    """request_of(notebook, changes, **parameters): its CreateTrainingJob; its S3 folder as HOME.

    `options`: values of the guide's cell of that name.
    """
    call = BaseClient._make_api_call

    def capture(client, operation, parameters):
        if operation == "CreateTrainingJob":
            raise Captured(parameters)
        return call(client, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", capture)
    monkeypatch.setattr(launch, "image", lambda *_: "my/image:1")

    def request(notebook, changes=None, options=None, pause=0, **parameters):
        output = set_up(**changes or {})
        with pytest.raises(Captured) as caught:
            if notebook == GUIDE:
                made = run_guide(output, options, **parameters)
                time.sleep(pause)
                run_cell(GUIDE, "launch", **made)
            else:
                run_cells(notebook, parameters | {"output_dir": str(output)})
        (sent,) = caught.value.args
        text = json.dumps(sent).replace(sent["TrainingJobName"], "JOB")
        for home in run_of(output)["homes"]:
            name = "CHECKPOINTS/" if "/checkpoints/" in home else "HOME/"
            name = f"UPLOADS/{home.split('/')[-2]}/" if "/uploads/" in home else name
            text = text.replace(home, name).replace(f'{home.rstrip("/")}"', f'{name}"')
        return json.loads(text), [
            h.removeprefix(f"s3://{BUCKET}/") for h in run_of(output)["homes"]
        ]

    return request


def channel(name, uri, **more):
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, **more}


def test_the_request_by_default(request_of):
    sent, _ = request_of(LESSON)
    assert sent.pop("Environment").keys() >= {
        "TENSORBOARD_LOGGING_DIR", "PIP_QUIET", "PIP_DISABLE_PIP_VERSION_CHECK"
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
            "model_name": "owner/some_model",  # of notebook 2, and
            "learning_rate": "0.0004",
            "epochs": "10",
            "train_batch_size": "4",
            "eval_batch_size": "8",
            "freeze": "none",
            "report_to": "tensorboard",
            "save_minutes": "10",  # what a machine that just vanishes costs at most
        },
        "InputDataConfig": [
            channel("train", "UPLOADS/train/"),
            channel("code", f"{job}/code", InputMode="File"),
            channel("sm_drivers", f"{job}/sm_drivers", InputMode="File"),
        ],
        "ResourceConfig": {
            "InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 50
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
        "OutputDataConfig": {"S3OutputPath": "HOME/output", "CompressionType": "GZIP"},
        "CheckpointConfig": {"S3Uri": "CHECKPOINTS/", "LocalPath": "/opt/ml/checkpoints"},
        "TensorBoardOutputConfig": {
            "S3OutputPath": "HOME/tensorboard", "LocalPath": "/opt/ml/output/tensorboard"
        },
        "Tags": [{"Key": "project", "Value": "video-tutorial"}],
    }  # fmt: skip


@pytest.mark.parametrize("notebook", [LESSON, GUIDE])
def test_what_notebook_2_chose_arrives_in_the_job_and_nothing_else_is_mirrored(
    request_of, notebook
):
    choices = CHOICES | {"horizontal_flip": True, "lora_rank": 8}
    sent, _ = request_of(notebook, {"choices": choices})
    arrived = sent["HyperParameters"]
    assert {name: arrived[name] for name in choices} == {
        "model_name": "owner/some_model", "learning_rate": "0.0004", "horizontal_flip": "true",
        "lora_rank": "8",
    }  # fmt: skip
    sent, _ = request_of(notebook)
    assert "horizontal_flip" not in sent["HyperParameters"]


def test_the_parameters_of_notebook_3_win_over_the_choices_of_notebook_2(request_of):
    mine = {"epochs": 3, "train_batch_size": 2, "freeze": "backbone", "max_minutes": 5}
    choices = CHOICES | {"epochs": 7, "freeze": "none"}
    sent, _ = request_of(LESSON, {"choices": choices}, instance_type="ml.m5.xlarge", **mine)
    arrived = sent["HyperParameters"]
    assert (arrived["epochs"], arrived["train_batch_size"], arrived["freeze"]) == (
        "3", "2", "backbone"
    )  # fmt: skip
    assert sent["StoppingCondition"] == {"MaxRuntimeInSeconds": 300}
    assert sent["ResourceConfig"]["InstanceType"] == "ml.m5.xlarge"


@pytest.mark.parametrize("notebook", [LESSON, GUIDE])
def test_a_model_on_this_disk_becomes_a_channel(request_of, notebook, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    sent, _ = request_of(notebook, {"choices": {"model_name": str(tmp_path)}})
    assert "model_name" not in sent["HyperParameters"]
    assert channel("model", "UPLOADS/model/") in sent["InputDataConfig"]


def test_the_request_with_everything(request_of, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").write_bytes(b"weights")
    network = {
        "subnets": ["subnet-1"],
        "security_group_ids": ["sg-1"],
        "enable_network_isolation": True,
        "enable_inter_container_traffic_encryption": True,
    }
    quotas = {f"ml.m5.xlarge for spot {USE}": 2}
    sent, homes = request_of(
        GUIDE, {"quotas": quotas, "choices": CHOICES | {"model_name": str(tmp_path / "weights")}},
        {"spot": True, "input_mode": "FastFile", "kms_key": KEY, "network": network},
        instance_type="ml.m5.xlarge", compare_nodes=[2], max_minutes=10,
        hyperparameters={"epochs": 1, "train_batch_size": 2, "freeze": "all_but_4"},
        pause=1,  # the SDK names what it uploads by the second
    )  # fmt: skip
    assert sent["ResourceConfig"] == {
        "InstanceType": "ml.m5.xlarge", "InstanceCount": 2, "VolumeSizeInGB": 50,
        "VolumeKmsKeyId": KEY,
    }  # fmt: skip
    assert sent["VpcConfig"] == {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}
    assert sent["EnableNetworkIsolation"] and sent["EnableInterContainerTrafficEncryption"]
    assert sent["EnableManagedSpotTraining"]
    assert sent["StoppingCondition"] == {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 1200}
    assert sent["OutputDataConfig"]["KmsKeyId"] == KEY
    assert sent["AlgorithmSpecification"]["TrainingInputMode"] == "FastFile"
    modes = {c["ChannelName"]: c.get("InputMode") for c in sent["InputDataConfig"]}
    assert modes == {"train": None, "model": None, "code": "File", "sm_drivers": "File"}
    assert sent["Tags"] == [{"Key": "project", "Value": "video-tutorial"}]
    arrived = {"epochs": "1", "freeze": "all_but_4", "learning_rate": "0.0004"}
    arrived |= {"train_batch_size": "2", "eval_batch_size": "8", "report_to": "tensorboard"}
    arrived |= {"logging_steps": "1", "save_minutes": "10"}
    assert sent["HyperParameters"] == arrived
    bucket = boto3.resource("s3").Bucket(BUCKET)
    uploaded = [item.Object() for home in homes for item in bucket.objects.filter(Prefix=home)]
    assert any(item.key.endswith("code/train.py") for item in uploaded)
    assert {item.ssekms_key_id for item in uploaded} == {KEY}  # clips, weights and code
    starts = [item for item in uploaded if item.key.endswith("/sm_train.sh")]
    for start in starts:  # of the dry run, and of the job
        text = start.get()["Body"].read()
        assert b"\nexec env" in text and b"torchrun --nnodes" in text and b" --epochs 1" in text
    assert len(starts) == 2


def test_a_machine_with_its_own_disk_gets_no_key_for_it(request_of):
    sent, _ = request_of(GUIDE, options={"kms_key": KEY})
    assert "VolumeKmsKeyId" not in sent["ResourceConfig"]
    assert sent["OutputDataConfig"]["KmsKeyId"] == KEY


# The SDK's table does not know g6.
@pytest.mark.parametrize("instance_type", ["ml.g4dn.12xlarge", "ml.g6.12xlarge"])
def test_several_gpus_run_under_torchrun(set_up, instance_type):
    output = set_up(dollars_per_hour={instance_type: 4}, quotas={f"{instance_type} for {USE}": 1})
    made = run_guide(output, instance_type=instance_type, compare_nodes=[1])
    assert made["requests"][1].source_code.command.startswith("exec env")
    parameters = {"output_dir": str(output), "instance_type": instance_type}
    with pytest.raises(ValueError, match="several GPUs or machines need torchrun in the command"):
        run_cells(LESSON, parameters, stop="launch")


def test_jobs_on_one_and_on_two_instances_differ_in_nothing_else(set_up):
    """The same clips per step in all; folders of their own, below those that notebook 6 deletes."""
    output = set_up()
    made = run_guide(output, hyperparameters={"epochs": 2, "train_batch_size": 3})
    one, two = made["requests"][1], made["requests"][2]
    assert (one.compute.instance_count, two.compute.instance_count) == (1, 2)
    assert one.hyperparameters == two.hyperparameters | {"train_batch_size": 6}
    for request in (one, two):  # and so say the flags that the script gets
        assert request.source_code.args == launch.arguments(request.hyperparameters)
    places = [
        (t.output_data_config.s3_output_path, t.checkpoint_config.s3_uri,
         t._tensorboard_output_config.s3_output_path) for t in (one, two)
    ]  # fmt: skip
    homes = tuple(run_of(output)["homes"])
    assert len({*places[0], *places[1]}) == 6
    assert all(place.startswith(homes) for both in places for place in both)


def test_a_warm_pool(request_of):
    quotas = {f"ml.g4dn.xlarge for training {use} usage": 1 for use in ("job", "warm pool")}
    sent, _ = request_of(GUIDE, {"quotas": quotas}, {"keep_warm": 600}, compare_nodes=[1])
    assert sent["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600


def put(*keys, body=b"clip"):
    for key in keys:
        boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=body)


def test_clips_in_s3_are_used_where_they_are(request_of):
    put("mine/train/a/1.mp4")
    sent, _ = request_of(LESSON, {"dataset": f"s3://{BUCKET}/mine"})
    uri = sent["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"]
    assert uri == f"s3://{BUCKET}/mine/"  # with the slash: mine2/ is another data set


# What is uploaded ---------------------------------------------------------------------------------
def test_what_is_unchanged_is_not_uploaded_again_and_a_changed_clip_is(set_up, tmp_path, capsys):
    clip = tmp_path / "clips/train/a/1.mp4"
    clip.parent.mkdir(parents=True)
    clip.write_bytes(b"one")
    output = set_up(dataset=str(tmp_path / "clips"))

    def uploaded():  # as after a restart of the kernel
        (train,), _ = launch.upload(account.connect(output))
        return train.data_source.s3_uri

    first = uploaded()
    assert uploaded() == first and "unchanged since the last upload" in capsys.readouterr().out
    clip.write_bytes(b"two")
    second = uploaded()
    assert second != first  # a job that runs keeps its clips
    assert {first, second} <= set(run_of(output)["homes"])
    key = second.removeprefix(f"s3://{BUCKET}/") + "train/a/1.mp4"
    assert boto3.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read() == b"two"
    boto3.client("s3").delete_object(Bucket=BUCKET, Key=key)
    third = uploaded()
    assert third not in (first, second)  # it is not there any more
    account.connect(output).remember(prefix="other-folder")  # which the role may read, and no other
    assert "/other-folder/uploads/" in uploaded()


def test_a_model_in_one_file_is_refused_before_the_upload(set_up, tmp_path):
    (tmp_path / "own.pth").write_bytes(b"weights")
    here = account.connect(set_up(choices={"model_name": str(tmp_path / "own.pth")}))
    with pytest.raises(ValueError, match="own.pth is a file.*videomae_v2.py FILE FOLDER"):
        launch.upload(here)
    assert not here.run.get("uploads")


def test_hidden_files_stay_here(set_up, tmp_path):
    for name in ("train/a/1.mp4", "train/a/.DS_Store", "train/.ipynb_checkpoints/1.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"clip")
    here = account.connect(set_up(dataset=str(tmp_path)))
    (train,), _ = launch.upload(here)
    assert list(launch.objects_below(here, train.data_source.s3_uri)) == ["train/a/1.mp4"]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"my-clips": "local_mode"}, "channel 'my-clips': ASCII letters"),
        ({"code": "local_mode"}, "channel 'code'.* not code or sm_drivers"),
        ({"more": "no/such/folder"}, "channel 'more': there is no folder"),
    ],
)
def test_a_channel_that_cannot_be_is_refused_before_the_upload(set_up, more, message):
    here = account.connect(set_up())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        launch.upload(here, **more)
    assert here.run["homes"] == []


# What is refused before it costs ------------------------------------------------------------------
@pytest.fixture
def trainer_of(set_up):
    """trainer_of(**changes): (here, a request as in notebook 3, with other fields)."""

    def make(run=None, train="mine", machine=None, limits=None, **fields):
        here = account.connect(set_up(**run or {}))
        put("mine/train/a/1.mp4", "mine/train/b/2.mp4")
        uri = train if train.startswith("s3://") else f"s3://{BUCKET}/{train}/"
        kind = {"s3_data_type": "S3Prefix", "s3_data_distribution_type": "FullyReplicated"}
        source = S3DataSource(s3_uri=uri, **kind)
        machine = {"instance_type": "ml.g4dn.xlarge", "instance_count": 1} | (machine or {})
        limits = {"max_runtime_in_seconds": 3600} | (limits or {})
        request = {
            "sagemaker_session": launch.new_run(here).session,
            "role": here.run["role_arn"],
            "base_job_name": "video-classification",
            "training_image": "my/image:1",
            "source_code": configs.SourceCode(source_dir="../scripts", entry_script="train.py"),
            "compute": configs.Compute(**machine),
            "stopping_condition": configs.StoppingCondition(**limits),
            "hyperparameters": {"epochs": 10},
            "input_data_config": [configs.InputData(channel_name="train", data_source=source)],
        }
        return here, ModelTrainer(**request | fields)

    return make


@pytest.mark.parametrize(
    "hyperparameters, message",
    [
        ({"a.b": 1}, "hyperparameter a.b='1': .* a dot breaks"),
        ({"舉手": 1}, "ASCII"),
        ({"model_name": "it's"}, "an apostrophe would break"),
        ({"seed": None}, "leave it out"),
        ({"x": "y" * 2501}, "longer than 2,500 characters"),
        ({"model_name": "local_mode/tiny_videomae_v2"}, "make it a channel"),
        ({f"x{i}": i for i in range(101)}, "SageMaker takes 100"),
    ],
)
def test_a_hyperparameter_that_would_not_arrive_is_refused(hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        launch.check_hyperparameters(hyperparameters)


@pytest.mark.parametrize("name", ["video", "video-2-b", "a" * 48])
def test_names_of_jobs_that_fit(name):
    launch.check_name(name)


@pytest.mark.parametrize(
    "name, fits",
    [
        ("my videos", "'my-videos'"),
        ("video_clips", "'video-clips'"),  # the SDK would change it, in silence
        ("-video", "'video'"),
        ("舉手", "'video-classification'"),
        ("a" * 49, f"'{'a' * 48}'"),  # the time at the end would be cut off
    ],
)
def test_names_of_jobs_that_sagemaker_changes_or_refuses(name, fits):
    with pytest.raises(ValueError, match=f"base_job_name .*{fits}"):
        launch.check_name(name)


@pytest.mark.parametrize(
    "changes, most, message",
    [
        ({"hyperparameters": {"a.b": 1}}, 5, "a dot breaks"),
        ({"base_job_name": "my videos"}, 5, "base_job_name 'my videos'"),
        ({"training_input_mode": "Fastfile"}, 5, "input_mode is 'Fastfile'"),
        ({"machine": {"enable_managed_spot_training": True, "keep_alive_period_in_seconds": 60}},
         5, "exclude each other"),
        ({"machine": {"enable_managed_spot_training": True},
          "limits": {"max_wait_time_in_seconds": 60}}, 5, "max_wait is 60: it must be max_runtime"),
        ({}, 0.5, "At most [$]0.92 is above max_cost_usd = 0.5"),
        ({"machine": {"instance_count": 2}}, 5, "need torchrun in the command"),
        ({"machine": {"instance_type": "ml.g5.xlarge"}}, 5, "'ml.g5.xlarge for training job usage' "
         "is below 1"),
        ({"machine": {"instance_type": "ml.p3.2xlarge"}}, 5, "V100 and K80"),
        ({"machine": {"keep_alive_period_in_seconds": 60}}, 5, "warm pool usage' is below 1"),
        ({"run": {"dollars_per_hour": {"ml.m5.large": 0.1}}}, 5, "No price of ml.g4dn.xlarge"),
        ({"run": {"dollars_per_hour": {}}}, 5, "how_to/train_for_less.ipynb"),
    ],
)  # fmt: skip
def test_what_would_fail_is_refused_before_it_costs(trainer_of, changes, most, message):
    here, trainer = trainer_of(**changes)
    with pytest.raises((ValueError, RuntimeError), match=message):
        launch.check(here, trainer, most)


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"compare_nodes": [2, 3], "hyperparameters": {"train_batch_size": 1}},
         "3 clips per step .* no 2 equal parts"),
        ({"compare_nodes": [4]}, "usage' is below 4"),
        ({"max_cost_usd": 1}, r"At most \$1.84 is above"),  # two instances for 75 minutes
        ({"prepare_instances": 30}, "quota 'ml.m5.xlarge for processing job usage' is below 30"),
        ({"prepare_instances": 2, "max_cost_usd": 0.4}, r"At most \$0.57 is above"),
    ],
)  # fmt: skip
def test_the_guide_refuses_too(set_up, parameters, message):
    output = set_up()
    with pytest.raises((ValueError, RuntimeError), match=message):
        run_guide(output, **parameters)
    assert run_of(output)["jobs"] == []


@pytest.mark.parametrize(
    "keys, address, message",
    [
        (["empty/"], "empty", "nothing lies below s3://.*/empty/ but 2 empty objects"),
        ([], "nowhere", "nothing lies below s3://.*/nowhere/$"),
        (["deep/train/a/1.mp4"], "deep/train", "too deep; this one fits: s3://[^/]+/deep/$"),
        (["deep/train/a/1.mp4"], "deep/train/a", "too deep; this one fits: s3://[^/]+/deep/$"),
        (["high/set/train/a/1.mp4"], "high", "holds set/train/a/1.mp4. The address is too high; "
         "this one fits: s3://[^/]+/high/set/$"),
        (["flat/train/1.mp4"], "flat", "Put each clip into the folder of its label"),
        (["other/a/1.mp4"], "other", "holds a/1.mp4. Put the clips into such folders"),
        (["text/train/a/notes.txt"], "text", "must hold train/<label>/<clip>, and holds train/a/"),
        ([], f"s3://{BUCKET}", "is the whole bucket"),
        ([], f"s3://{BUCKET}/", "is the whole bucket"),
    ],
)  # fmt: skip
def test_an_address_that_the_job_could_not_use_is_refused(trainer_of, keys, address, message):
    put("empty/train/", body=b"")
    put(*[key for key in keys if not key.endswith("/")])
    put("empty/", body=b"")
    here, trainer = trainer_of(train=address)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        launch.check(here, trainer, 5)


def test_archives_tables_and_the_layouts_of_other_scripts_pass(trainer_of):
    put("packed/clips.zip", "listed/metadata.csv", "listed/1.mp4", "davis/JPEGImages/480p/a/1.jpg")
    put("hub/train/metadata.csv", "hub/train/x.mp4", "lists/train.txt", "lists/videos/1.mp4")
    for train in ("packed", "listed", "hub", "lists", f"s3://{BUCKET}/packed/clips.zip"):
        here, trainer = trainer_of(train=train)
        launch.check(here, trainer, 5)
    code = configs.SourceCode(source_dir="../scripts", entry_script="train_segmentation.py")
    here, trainer = trainer_of(train="davis", source_code=code)
    launch.check(here, trainer, 5)


def test_clips_that_do_not_fit_the_disk_are_refused(trainer_of, monkeypatch):
    here, trainer = trainer_of()
    sizes = {"train/a/1.mp4": 60e9, "train/b/2.mp4": 51e9}
    monkeypatch.setattr(launch, "objects_below", lambda here, uri: sizes)
    with pytest.raises(
        ValueError, match="111 GB.* 15 more, and the disk of ml.g4dn.xlarge has 125"
    ):
        launch.check(here, trainer, 5)
    sizes["train/b/2.mp4"] = 49e9
    launch.check(here, trainer, 5)
    here, trainer = trainer_of(machine={"instance_type": "ml.m5.xlarge", "volume_size_in_gb": 50})
    with pytest.raises(ValueError, match="Raise volume_size_in_gb"):
        launch.check(here, trainer, 5)
    trainer.training_input_mode = "FastFile"
    launch.check(here, trainer, 5)


def test_the_expected_minutes_follow_from_clips_model_and_machine(trainer_of, capsys):
    clips = {"train": 320, "validation": 100, "test": 100}

    def minutes(**changes):
        here, trainer = trainer_of(run={"gflop": 357}, **changes)
        return launch.expected_minutes(here, trainer, clips)

    # 65 TFLOP/s, of which 35 % are reached; 357 GFLOP forward, 3 times that to train.
    rate = 0.35 * 65e3 / 357
    passes = 10 * (3 * 320 + 100) + 100 + 100
    assert minutes() == pytest.approx(launch.START_MINUTES + passes / rate / 60)
    passes = 10 * (320 + 100) + 100 + 100
    frozen = minutes(hyperparameters={"epochs": 10, "freeze": "backbone"})
    assert frozen == pytest.approx(launch.START_MINUTES + passes / rate / 60)
    assert minutes(machine={"instance_type": "ml.unknown"}) is None
    here, trainer = trainer_of(run={"gflop": 357, "clip_counts": {"train": 320}})
    launch.check(here, trainer, 5)  # counts what lies in S3: two clips
    shown = capsys.readouterr().out
    assert "expected: 7 minutes, $0.09" in shown and "7 minutes assumed" in shown
    assert "for 10 epochs" in shown


def test_a_job_that_cannot_be_ready_in_time_is_refused_with_the_remedy(trainer_of):
    slow = {"machine": {"instance_type": "ml.m5.xlarge"}, "limits": {"max_runtime_in_seconds": 900}}
    here, trainer = trainer_of(run={"gflop": 35700}, **slow)
    with pytest.raises(RuntimeError, match="Expected are .* minutes, .* after 15.* max_minutes to"):
        launch.check(here, trainer, 5)


def test_a_run_file_of_an_earlier_version_is_named_before_anything_starts(set_up):
    output = set_up()
    run = run_of(output)
    del run["jobs"]
    (output / "run.json").write_text(json.dumps(run))
    with pytest.raises(RuntimeError, match="run.json has no jobs: run 01_setup.ipynb first"):
        run_cells(LESSON, {"output_dir": str(output)}, stop="launch")


def test_notebook_3_before_notebook_2_says_so(set_up):
    with pytest.raises(RuntimeError, match="no dataset: run 02_local_smoke_train.ipynb first"):
        run_cells(LESSON, {"output_dir": str(set_up(dataset=None))}, stop="launch")


def test_unreadable_quotas_are_no_obstacle(set_up, capsys):
    run_cells(LESSON, {"output_dir": str(set_up(quotas=None))}, stop="launch")
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


# The job ------------------------------------------------------------------------------------------
@pytest.fixture
def launched(set_up, tmp_path):
    """launched(code): notebook 3 up to its launch, and a job that runs this train.py instead."""

    def start(code, hyperparameters=None):
        (tmp_path / "train.py").write_text(code)
        (tmp_path / "requirements.txt").write_text("")
        output = set_up()
        made = run_cells(LESSON, {"output_dir": str(output)}, stop="launch")
        trainer = made["trainer"]
        if hyperparameters:
            launch.check_hyperparameters(hyperparameters)
            trainer.hyperparameters = hyperparameters
        flags = launch.arguments(trainer.hyperparameters)
        changes = {"source_dir": str(tmp_path), "args": flags}
        trainer.source_code = trainer.source_code.model_copy(update=changes)
        start.trainer = trainer
        return output, made["here"], launch.start(made["here"], trainer)

    return start


def test_the_same_request_is_not_launched_twice(launched, capsys, monkeypatch):
    output, here, job = launched("print('once')\n__main__ = 1")
    trainer = launched.trainer
    monkeypatch.setattr(type(trainer), "train", lambda *_, **__: pytest.fail("launched again"))
    assert launch.start(here, trainer) == job
    assert "was started by this request already" in capsys.readouterr().out
    launch.follow(here, job)


def test_a_job_is_on_the_list_before_the_request_goes_out(set_up, trainer_of, monkeypatch):
    """A kernel that dies while AWS answers loses no job."""
    here, trainer = trainer_of()
    send = BaseClient._make_request

    def dies(client, model, *rest):
        if model.name == "CreateTrainingJob":
            raise KeyboardInterrupt
        return send(client, model, *rest)

    monkeypatch.setattr(BaseClient, "_make_request", dies)
    with pytest.raises(RuntimeError, match="interrupted, and the job may run all the same"):
        launch.start(here, trainer)
    (item,) = json.loads((here.output / "run.json").read_text())["jobs"]
    assert item.startswith("training-job/video-classification-")


@pytest.mark.parametrize("text", ["import torch\n", "def main(:\n"])
@pytest.mark.parametrize("start", [{"entry_script": "train.py"}, {"command": "exec a/b train.py"}])
def test_half_a_script_is_not_launched(trainer_of, tmp_path, text, start):
    (tmp_path / "train.py").write_text(text)
    code = configs.SourceCode(source_dir=str(tmp_path), **start)
    here, trainer = trainer_of(source_code=code)
    with pytest.raises(RuntimeError, match="train.py is not complete: run the notebook"):
        launch.check(here, trainer, 5)


@pytest.mark.parametrize(
    "command, args, message",
    [
        ("python3 train.py", ["--epochs", "10"], "begin it with exec.* never hears"),
        ("exec python3 train.py", ["--epochs", "3"], "args and hyperparameters differ"),
        ("exec python3 train.py", None, "args=launch.arguments"),
    ],
)
def test_a_command_that_hides_the_signal_or_the_flags_is_refused(
    trainer_of, command, args, message
):
    code = configs.SourceCode(source_dir="../scripts", command=command, args=args)
    here, trainer = trainer_of(source_code=code)
    with pytest.raises(ValueError, match=message):
        launch.check(here, trainer, 5)


def test_a_request_that_may_not_bring_its_code_to_s3_fails_before_the_money(
    trainer_of, monkeypatch
):
    """The dry run of the SDK; and it sends no job."""
    here, trainer = trainer_of()
    launch.check(here, trainer, 5)
    assert here.run["jobs"] == [] and trainer._latest_training_job is None
    send = BaseClient._make_request

    def refuse(client, model, *rest):
        if model.name == "PutObject":
            raise ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "PutObject")
        return send(client, model, *rest)

    monkeypatch.setattr(BaseClient, "_make_request", refuse)
    with pytest.raises(Exception, match="AccessDenied"):
        launch.check(here, trainer, 5)


# Several kinds of machines, of which AWS takes one that is free
def preferring(*instance_types, **more):
    kinds = [InstancePreference(instance_type=name) for name in instance_types]
    return configs.Compute(instance_preferences=kinds, instance_count=1, **more)


T4, L4 = "ml.g4dn.xlarge", "ml.g6.xlarge"
TWO = {
    "dollars_per_hour": {T4: 0.736, L4: 1.127},
    "quotas": {f"{T4} for {USE}": 1, f"{L4} for {USE}": 1},
    "gflop": 357,
    "clip_counts": {"train": 320},
}


def test_a_list_of_instance_types_is_sent_and_the_dearest_and_the_slowest_count(
    trainer_of, request_of, capsys
):
    here, trainer = trainer_of(run=TWO, compute=preferring(T4, L4))
    launch.check(here, trainer, 5)
    said = capsys.readouterr().out
    assert f"{T4} for {USE}: 1" in said and f"{L4} for {USE}: 1" in said
    assert f"at most:  ${1.127 * 75 / 60:.2f}" in said
    clips = {"train": 3200}
    slow, fast = (
        launch.expected_minutes(here, trainer_of(run=TWO, compute=machine)[1], clips)
        for machine in (preferring(T4, L4), preferring(L4))
    )
    assert slow > fast
    with pytest.raises(Captured) as caught:
        trainer.train(wait=False)
    kinds = [{"InstanceType": T4}, {"InstanceType": L4}]
    (sent,) = caught.value.args
    assert sent["ResourceConfig"] == {
        "InstanceCount": 1, "VolumeSizeInGB": 30, "InstancePreferences": kinds
    }  # fmt: skip
    model = boto3.client("sagemaker").meta.service_model.operation_model("CreateTrainingJob")
    report = ParamValidator().validate(sent, model.input_shape)
    assert not report.has_errors(), report.generate_report()


@pytest.mark.parametrize(
    "run, types, message",
    [
        ({"quotas": {f"{T4} for {USE}": 1}}, (T4, L4), f"'{L4} for {USE}' is below 1 .not listed"),
        ({"quotas": TWO["quotas"] | {f"{L4} for {USE}": 0}}, (T4, L4), "is below 1 .0.. Ask"),
        ({"dollars_per_hour": {T4: 0.7}}, (T4, L4), f"No price of {L4}"),
        ({}, (T4, "ml.m5.xlarge"), "all with a GPU, or none"),
        ({}, (T4, "ml.g4dn.12xlarge"), "1 x ml.g4dn.12xlarge: several GPUs"),
        ({}, (T4, "ml.p3.2xlarge"), "ml.p3.2xlarge: .* V100"),
    ],
)
def test_each_type_of_the_list_must_fit(trainer_of, run, types, message):
    here, trainer = trainer_of(run=TWO | run, compute=preferring(*types))
    with pytest.raises((ValueError, RuntimeError), match=message):
        launch.check(here, trainer, 5)


def test_each_retry_starts_once_more_at_most(trainer_of, capsys):
    here, trainer = trainer_of()
    trainer = trainer.with_retry_strategy(RetryStrategy(maximum_retry_attempts=3))
    launch.check(here, trainer, 5)
    assert f"at most:  ${0.736 * 105 / 60:.2f}" in capsys.readouterr().out


def test_at_most_names_all_that_is_billed(set_up, capsys):
    here = account.connect(set_up(quotas=None))
    compute = configs.Compute(instance_type=T4, instance_count=1, keep_alive_period_in_seconds=600)
    limits = configs.StoppingCondition(max_runtime_in_seconds=1800)
    minutes = 30 + launch.MOST_START_MINUTES + launch.GRACE_MINUTES + launch.UPLOAD_MINUTES + 10
    most = launch.check_money(here, compute, limits, 5)
    assert most == pytest.approx(0.736 * minutes / 60)
    said = capsys.readouterr().out
    for part in ("30 until SageMaker stops it", "10 to start", "2 to stop", "3 to upload",
                 "10 in the warm pool"):  # fmt: skip
        assert part in said
    spot = configs.Compute(instance_type=T4, instance_count=1, enable_managed_spot_training=True)
    limits.max_wait_time_in_seconds = 7200  # with each new start after an interruption
    assert launch.check_money(here, spot, limits, 5) == pytest.approx(0.736 * 135 / 60)


def test_what_a_job_of_a_list_costs_is_counted_by_the_machine_that_it_got(set_up, capsys):
    resources = {"InstancePreferences": [{"InstanceType": T4}], "InstanceCount": 2}
    assert launch.machines_of({"ResourceConfig": resources})[1] == 2
    resources |= {"SelectedInstanceType": L4, "SelectedInstanceCount": 2}
    assert launch.machines_of({"ResourceConfig": resources}) == (L4, 2)


def test_the_link_to_the_log_opens_the_streams_of_the_job(set_up, capsys):
    launch.links(account.connect(set_up()), "video-1")
    group = "$252Faws$252Fsagemaker$252FTrainingJobs"
    assert f"log-group/{group}$3FlogStreamNameFilter$3Dvideo-1$252F\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["g4dn.xlarge", "g7e.2xlarge", "p6-b200.48xlarge", "trn2.48xlarge"]
)
def test_machines_with_a_disk_of_their_own(name):
    assert launch.has_own_disk(f"ml.{name}") and not launch.has_own_disk("ml.m5.xlarge")


def test_spot_without_a_limit_of_waiting_is_refused(trainer_of):
    here, trainer = trainer_of(machine={"enable_managed_spot_training": True})
    with pytest.raises(ValueError, match="max_wait is 0: it must be max_runtime, 3600"):
        launch.check(here, trainer, 5)


@pytest.mark.long
def test_values_that_pass_the_check_arrive(launched, endpoint):
    """Through the SDK's own start script, in a real job."""
    _, here, job = launched(
        "import json, os, sys\n"
        "json.dump(sys.argv[1:], open(os.environ['SM_MODEL_DIR'] + '/argv.json', 'w'))\n",
        ODD,
    )
    launch.follow(here, job)
    folder = aws.status(int(endpoint.rpartition(":")[2]))["folder"]
    argv = json.load(open(f"{folder}/jobs/{job}/127.0.0.1/model/argv.json"))
    arrived = dict(zip(argv[::2], argv[1::2], strict=True))
    expected = {f"--{name}": v if isinstance(v, str) else json.dumps(v) for name, v in ODD.items()}
    assert arrived == expected


@pytest.mark.long
def test_a_job_is_followed_and_taken_up_again_by_its_name(launched, capsys, monkeypatch):
    output, here, job = launched("print('step 1', flush=True)\nprint('step 2')")
    assert run_of(output)["jobs"] == [f"training-job/{job}"]
    assert run_of(output)["training_job_name"] == job
    launch.follow(here, job)
    first = capsys.readouterr().out
    assert "step 1" in first and "step 2" in first and "Training" in first
    assert "resourceconfig.json" not in first  # of the SDK's start script

    # Another day: the same notebook with the job's name. Nothing is uploaded, nothing is launched.
    before, sent, call = run_of(output), [], BaseClient._make_api_call

    def listen(client, operation, parameters):
        sent.append(operation)
        return call(client, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", listen)
    made = run_cells(LESSON, {"output_dir": str(output), "job_name": job})
    assert not {"CreateTrainingJob", "PutObject", "CreateMultipartUpload"} & set(sent)
    assert run_of(output) == before
    again = capsys.readouterr().out
    assert "nothing new is started" in again and "step 2" in again
    assert made["described"]["TrainingJobStatus"] == "Completed"
    assert f"{job}: Completed" in again and "1 x ml.g4dn.xlarge, $0.736 an hour" in again


def test_a_job_that_does_not_exist_is_named_with_those_that_do(set_up):
    here = account.connect(set_up(jobs=["training-job/video-1", "processing-job/video-2"]))
    with pytest.raises(RuntimeError, match="no training job 'video-9' .* knows: video-1[.]"):
        launch.start(here, None, "video-9")


@pytest.mark.parametrize(
    "kind, back",
    [
        ("classification", "job_name = 'video-other'"),
        ("segmentation", "segmentation_job = 'video-other'"),
        ("comparison", "launch.follow(here, 'video-other')"),  # its guide has no such parameter
    ],
)
def test_a_started_job_says_how_to_come_back_to_it(set_up, capsys, kind, back):
    here, job = account.connect(set_up()), SimpleNamespace(training_job_name="video-other")
    trainer = SimpleNamespace(_latest_training_job=None)
    trainer.train = lambda **_: setattr(trainer, "_latest_training_job", job)
    launch.start(here, trainer, kind=kind)
    assert f"To come back to it later: {back}\n" in capsys.readouterr().out


def test_another_kind_of_job_leaves_the_classifier_alone(set_up):
    here = account.connect(set_up(training_job_name="video-mine"))
    job = SimpleNamespace(training_job_name="video-other")
    trainer = SimpleNamespace(_latest_training_job=None)
    trainer.train = lambda **_: setattr(trainer, "_latest_training_job", job)
    assert launch.start(here, trainer, kind="segmentation") == "video-other"
    assert here.run["training_job_name"] == "video-mine"
    assert here.run["segmentation_job_name"] == "video-other"
    assert here.run["jobs"] == ["training-job/video-other"]


@pytest.mark.long
def test_a_job_that_fails_says_why_and_what_to_do(launched):
    code = (  # as train.py ends
        "import os, sys\n"
        "with open(os.environ['SM_OUTPUT_DIR'] + '/failure', 'w') as file:\n"
        "    file.write('OutOfMemoryError: CUDA out of memory')\n"
        "sys.exit(1)"
    )
    _, here, job = launched(code)
    with pytest.raises(RuntimeError) as caught:
        launch.follow(here, job)
    reason, remedy = str(caught.value).split("\n")
    assert reason == "OutOfMemoryError: CUDA out of memory, exit code: 1"
    assert "half of train_batch_size" in remedy and remedy.endswith("troubleshooting.md")


@pytest.mark.parametrize(
    "reason, said, remedy",
    [
        ("AlgorithmError: ValueError: 3 of 9 clips cannot be read: a.mp4, exit code: 1",
         "ValueError: 3 of 9 clips cannot be read", "run prepare_clips.py"),
        ("AlgorithmError: , exit code: 1", "The script gave no reason, exit code: 1", "the log"),
        ("AlgorithmError: , exit code: 137", "The script gave no reason", "memory was full"),
        ("AlgorithmError: OutOfMemoryError: CUDA out of memory, exit code: 1", "OutOfMemoryError",
         "half of train_batch_size"),
        ("CapacityError: Unable to provision requested ML compute capacity.", "CapacityError",
         "another instance_type"),
        ("ClientError: Data download failed: AccessDenied", "ClientError", "execution role"),
    ],
)  # fmt: skip
def test_the_reason_comes_first_and_then_the_remedy(reason, said, remedy):
    first, second = launch.explain(reason).split("\n")
    assert first.startswith(said) and remedy in second


def test_every_remedy_stands_in_the_table():
    table = (ROOT / "notebooks/troubleshooting.md").read_text().lower()
    for pattern, _ in launch.REMEDIES:
        assert pattern.split("|")[0].lower() in table, pattern


def test_an_interrupt_ends_the_waiting_and_not_the_job(launched, monkeypatch, capsys):
    told = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))"  # else it has 120 s more
    program = f"import signal, sys, time\n{told}\nprint('it runs', flush=True)\ntime.sleep(600)"
    output, here, job = launched(program)

    def interrupt(seconds, sleep=time.sleep):
        if "it runs" in capsys.readouterr().out:
            raise KeyboardInterrupt
        sleep(0.2)

    with monkeypatch.context() as patch:
        patch.setattr(launch.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt, match=f"goes on.*'{job}'.*launch.stop"):
            launch.follow(here, job)
    client = boto3.client("sagemaker")
    assert client.describe_training_job(TrainingJobName=job)["TrainingJobStatus"] == "InProgress"
    # A record that was deleted by hand must not shield the others.
    here.run["jobs"].append("training-job/video-deleted-by-hand")
    launch.stop(here)
    status = client.describe_training_job(TrainingJobName=job)["TrainingJobStatus"]
    assert status in ("Stopping", "Stopped") and f"{job} {status}" in capsys.readouterr().out
    launch.follow(here, job)
    assert "Stopped by you" in capsys.readouterr().out


# Cleaning up --------------------------------------------------------------------------------------
@pytest.fixture
def cleaned(monkeypatch):
    """cleaned(output): what notebook 6 says is left; the embedded account stays for other tests."""
    monkeypatch.setattr(aws, "disconnect", lambda endpoint_url: None)

    def clean(output):
        here = clean_up.connect(output)
        try:
            clean_up.delete(here, confirm=True)
        except RuntimeError as error:
            return str(error)

    return clean


def jobs_and_objects():
    client, bucket = boto3.client("sagemaker"), boto3.resource("s3").Bucket(BUCKET)
    jobs = client.list_training_jobs()["TrainingJobSummaries"]
    return {job["TrainingJobName"] for job in jobs}, {item.key for item in bucket.objects.all()}


@pytest.mark.long
def test_clean_up_ends_what_runs_and_leaves_the_account_as_it_was(launched, cleaned):
    put("mine/train/a/1.mp4")
    before = jobs_and_objects()
    output, here, job = launched("import time\ntime.sleep(600)")
    during = jobs_and_objects()
    assert job in during[0] and during[1] > before[1]
    # The bucket holds clips that notebook 3 did not bring: it stays, and stays on the list.
    assert "something else lies in it" in cleaned(output)
    run = run_of(output)
    assert run["jobs"] == run["homes"] == [] and jobs_and_objects() == before
    assert run["created"] == [f"bucket/{BUCKET}"] and not run.get("uploads")
    iam = boto3.client("iam")  # the role is gone; the tests after this one need it
    trust = json.dumps({"Version": "2012-10-17", "Statement": []})
    iam.create_role(RoleName="SageMaker-Video-ExecutionRole", AssumeRolePolicyDocument=trust)


@pytest.mark.long
def test_clean_up_after_a_failed_launch(launched, cleaned):
    output, here, job = launched("raise SystemExit(1)")
    with pytest.raises(RuntimeError, match="exit code: 1"):
        launch.follow(here, job)
    here.remember(created=[])
    with pytest.raises(RuntimeError, match="exit code: 1\n.*06_clean_up.ipynb"):
        run_cells("04_results", {"output_dir": str(output)})
    assert cleaned(output) is None and not (output / "run.json").exists()


def test_without_confirmation_nothing_is_deleted(set_up, capsys):
    home = f"s3://{BUCKET}/video-tutorial/kept/"
    put("video-tutorial/kept/a")
    output, before = set_up(homes=[home]), jobs_and_objects()
    run = (output / "run.json").read_text()
    run_cells("06_clean_up", {"output_dir": str(output)})
    assert jobs_and_objects() == before and (output / "run.json").read_text() == run
    assert "Nothing is deleted" in capsys.readouterr().out


def test_what_s3_refuses_stays_on_the_list(set_up, cleaned, monkeypatch):
    home = f"s3://{BUCKET}/video-tutorial/refused/"
    put("video-tutorial/refused/a")
    output, call = set_up(homes=[home], created=[]), BaseClient._make_api_call

    def refuse(client, operation, parameters):
        if operation == "DeleteObjects":  # as S3 answers: 200, and an error for each key
            errors = [{"Key": "a", "Code": "AccessDenied", "Message": "Access Denied"}]
            return {"Errors": errors, "ResponseMetadata": {}}
        return call(client, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    assert "AccessDenied" in cleaned(output)
    assert run_of(output)["homes"] == [home]


def test_clean_up_touches_the_bucket_that_it_made_and_no_other(set_up, cleaned):
    s3 = boto3.client("s3")
    for name in ("made-by-the-series", "of-the-reader"):
        s3.create_bucket(Bucket=name)
    s3.put_object(Bucket="made-by-the-series", Key="video-tutorial/1/a", Body=b"a")
    homes = ["s3://made-by-the-series/video-tutorial/1/"]
    changes = {"bucket": "of-the-reader", "created": ["bucket/made-by-the-series"]}
    assert cleaned(set_up(homes=homes, **changes)) is None
    left = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    assert "of-the-reader" in left and "made-by-the-series" not in left


# Notebook 1 ---------------------------------------------------------------------------------------
def test_what_aws_holds_is_not_forgotten_with_another_region(endpoint, tmp_path):
    run = {"region": "eu-west-1", "account": ACCOUNT, "endpoint_url": None}
    run |= {"created": ["bucket/x"], "homes": [], "jobs": []}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(RuntimeError, match="eu-west-1 of another Region or account"):
        account.begin(tmp_path, endpoint)
    assert run_of(tmp_path) == run


def test_the_role_has_one_kind_of_permissions_at_a_time(endpoint, tmp_path):
    here = account.begin(tmp_path, endpoint)
    role = boto3.resource("iam").Role("video-other")
    for full in (True, False, True):
        account.execution_role(here, "video-other", create=True, full_access=full)
        assert [p.name for p in role.policies.all()] == ([] if full else ["video-tutorial"])
        assert len(list(role.attached_policies.all())) == full


def test_fetched_prices_add_up_and_win_over_the_table(endpoint, tmp_path):
    here = account.begin(tmp_path, endpoint)
    here.remember(fetched_prices={"ml.x": [3.0, "2026-11-01"], "ml.m5.large": [9.0, "2026-11-01"]})
    account.instances(here, ["ml.g4dn.xlarge"])
    prices = here.run["dollars_per_hour"]
    assert prices["ml.x"] == 3.0 and prices["ml.m5.large"] == 9.0
    assert 0 < prices["ml.g4dn.xlarge"] < 1  # of the table
