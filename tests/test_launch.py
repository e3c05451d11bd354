"""Notebooks 1, 3, 4 and 6: the whole request, what is refused before it, and an empty account."""

import json
import os

import boto3
import pytest
from botocore.client import BaseClient
from cells import notebook_cells, run_cells
from conftest import ROOT
from local_mode import aws
from test_aws import forget_sdk_clients, free_port

ACCOUNT, USE = "123456789012", "training job usage"
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
        text = text.replace(checkpoints, "CHECKPOINTS/").replace(home, "HOME/")
        return json.loads(text), home.removeprefix(f"s3://{BUCKET}/")

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
    uploaded = [item.Object() for item in bucket.objects.filter(Prefix=home)]
    assert any(item.key.endswith("code/train.py") for item in uploaded)
    assert {item.ssekms_key_id for item in uploaded} == {KEY}  # clips, weights and code
    (start,) = (item for item in uploaded if item.key.endswith("/sm_train.sh"))
    assert b"torchrun_driver.py" in start.get()["Body"].read()


def test_a_machine_with_its_own_disk_gets_no_key_for_it(request_of):
    sent, _ = request_of(training_image="my/image:1", kms_key=KEY)
    assert "VolumeKmsKeyId" not in sent["ResourceConfig"]
    assert sent["OutputDataConfig"]["KmsKeyId"] == KEY


@pytest.mark.parametrize(
    "instance_type, torchrun",
    [
        ("ml.g4dn.xlarge", False),
        ("ml.g4dn.12xlarge", True),
        ("ml.g6.12xlarge", True),  # which the SDK's table does not know
        ("ml.m5.xlarge", False),
    ],
)
def test_several_gpus_run_under_torchrun(set_up, instance_type, torchrun):
    output = set_up(dollars_per_hour={instance_type: 5}, quotas={f"{instance_type} for {USE}": 1})
    parameters = {"output_dir": str(output), "instance_type": instance_type}
    made = run_cells("03_remote_launch", parameters, stop="launch")
    trainer = made["make_trainer"]("job", 1, {})
    assert (trainer.distributed is not None) == torchrun


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
        ({"compare_nodes": [3]}, "train_batch_size 4 has no 3 equal parts"),
        ({"compare_nodes": [4]}, "usage' is below 4"),
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


def test_a_region_without_prices_says_how_to_get_them(set_up):
    output = set_up(dollars_per_hour={})
    with pytest.raises(RuntimeError, match="run 01_setup with fetch_prices = True"):
        run_cells("03_remote_launch", {"output_dir": str(output)}, stop="launch")


def test_a_run_file_of_an_earlier_version_is_named_before_anything_starts(set_up):
    output = set_up()
    run = json.loads((output / "run.json").read_text())
    del run["jobs"]
    (output / "run.json").write_text(json.dumps(run))
    with pytest.raises(RuntimeError, match="run.json has no jobs: run 01_setup.ipynb first"):
        run_cells("03_remote_launch", {"output_dir": str(output)}, stop="launch")


def test_notebook_3_before_notebook_2_says_so(set_up):
    output = set_up(dataset=None)  # as notebook 1 leaves it
    with pytest.raises(RuntimeError, match="no dataset: run 02_local_smoke_train.ipynb first"):
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


# Stopping and cleaning up -------------------------------------------------------------------------
@pytest.fixture
def launched(set_up, tmp_path):
    """launched(code): notebook 3 up to its launch, for a train.py with that code, and the job."""

    def start(code, **parameters):
        (tmp_path / "train.py").write_text(code)
        output = set_up()
        parameters |= {"output_dir": str(output), "training_image": "my/image:1"}
        made = run_cells("03_remote_launch", parameters, stop="launch")
        made["code"] = made["configs"].SourceCode(source_dir=str(tmp_path), entry_script="train.py")
        source = next(c.source for c in notebook_cells("03_remote_launch") if c.id == "launch")
        exec(source.partition("\n\n\njob = ")[0], made)  # what the cell defines, not its launch
        return output, made, made["launch"](made["make_trainer"]("job", 1, {}))

    return start


def cell(name, cell_id, variables):
    source = next(c.source for c in notebook_cells(name) if c.id == cell_id)
    exec(compile(source, f"{name}:{cell_id}", "exec"), variables)


def cleaned(output):
    """The variables of notebook 6 after all but its last cell, which would end the account."""
    parameters = {"output_dir": str(output), "confirm_delete": True}
    return run_cells("06_clean_up", parameters, stop="disconnect")


def jobs_and_objects():
    client, bucket = boto3.client("sagemaker"), boto3.resource("s3").Bucket(BUCKET)
    kept = {item.key for item in bucket.objects.all()} - {"mine/train/a/1.mp4"}
    jobs = client.list_training_jobs()["TrainingJobSummaries"]
    return {job["TrainingJobName"] for job in jobs}, kept


def test_a_job_is_written_down_before_it_ends_and_can_be_stopped(launched):
    output, made, job = launched("import time\ntime.sleep(600)")
    name = job.training_job_name
    assert json.loads((output / "run.json").read_text())["jobs"] == [f"training-job/{name}"]
    made["run"]["jobs"].append("training-job/video-deleted-by-hand")  # must not shield the other
    cell("03_remote_launch", "stop", made)  # with none of section 6, as after an interruption
    described = made["sagemaker"].describe_training_job(TrainingJobName=name)
    assert described["TrainingJobStatus"] in ("Stopping", "Stopped")


def test_clean_up_ends_what_runs_and_leaves_the_account_as_it_was(launched):
    before = jobs_and_objects()
    output, _, job = launched("import time\ntime.sleep(600)")
    during = jobs_and_objects()
    assert job.training_job_name in during[0] and during[1] > before[1]
    made = cleaned(output)
    run = json.loads((output / "run.json").read_text())
    assert run["jobs"] == run["homes"] == [] and jobs_and_objects() == before
    # The bucket holds clips that notebook 3 did not bring: it stays, and stays on the list.
    assert run["created"] == [f"bucket/{BUCKET}"]
    assert made["left"] == {f"bucket/{BUCKET}": "something else lies in it"}
    iam = boto3.client("iam")  # the role is gone; the tests after this one need it
    trust = json.dumps({"Version": "2012-10-17", "Statement": []})
    iam.create_role(RoleName="SageMaker-Video-ExecutionRole", AssumeRolePolicyDocument=trust)


def test_without_confirmation_nothing_is_deleted(set_up, capsys):
    home = f"s3://{BUCKET}/video-tutorial/kept/"
    boto3.client("s3").put_object(Bucket=BUCKET, Key="video-tutorial/kept/a", Body=b"a")
    output, before = set_up(homes=[home]), jobs_and_objects()
    run = (output / "run.json").read_text()
    run_cells("06_clean_up", {"output_dir": str(output)})
    assert jobs_and_objects() == before and (output / "run.json").read_text() == run
    shown = capsys.readouterr().out
    assert "video-tutorial/kept/ 1 objects, 0.0 MB" in shown and "nothing deleted" in shown
    assert cleaned(set_up(homes=[home], created=[]))["left"] == {}


def test_clean_up_after_a_failed_launch(launched):
    output, _, job = launched("raise SystemExit(1)")
    with pytest.raises(Exception, match="exit code: 1"):
        job.wait(poll=1)
    (output / "run.json").write_text(
        json.dumps(json.loads((output / "run.json").read_text()) | {"created": []})
    )
    with pytest.raises(RuntimeError, match="run.json has no training_job_name"):
        run_cells("04_results", {"output_dir": str(output)}, stop="unpack")
    failed = {"output_dir": str(output), "job_name": job.training_job_name}
    with pytest.raises(RuntimeError, match="exit code: 1\nTo clean up .* 06_clean_up.ipynb"):
        run_cells("04_results", failed, stop="unpack")
    assert cleaned(output)["left"] == {}


def test_what_s3_refuses_stays_on_the_list(set_up, monkeypatch):
    home = f"s3://{BUCKET}/video-tutorial/refused/"
    boto3.client("s3").put_object(Bucket=BUCKET, Key="video-tutorial/refused/a", Body=b"a")
    output, call = set_up(homes=[home], created=[]), BaseClient._make_api_call

    def refuse(client, operation, parameters):
        if operation == "DeleteObjects":  # as S3 answers: 200, and an error for each key
            errors = [{"Key": "a", "Code": "AccessDenied", "Message": "Access Denied"}]
            return {"Errors": errors, "ResponseMetadata": {}}
        return call(client, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    assert cleaned(output)["left"] == {home: "1 objects: AccessDenied"}
    assert json.loads((output / "run.json").read_text())["homes"] == [home]


def test_clean_up_touches_the_bucket_that_it_made_and_no_other(set_up):
    s3 = boto3.client("s3")
    for name in ("made-by-the-series", "of-the-reader"):
        s3.create_bucket(Bucket=name)
    s3.put_object(Bucket="made-by-the-series", Key="video-tutorial/1/a", Body=b"a")
    homes = ["s3://made-by-the-series/video-tutorial/1/"]
    changes = {"bucket": "of-the-reader", "created": ["bucket/made-by-the-series"]}
    assert cleaned(set_up(homes=homes, **changes))["left"] == {}
    left = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    assert "of-the-reader" in left and "made-by-the-series" not in left


def test_what_aws_holds_is_not_forgotten_with_another_region(account, tmp_path):
    run = {"region": "eu-west-1", "account": ACCOUNT, "endpoint_url": None}
    run |= {"created": ["bucket/x"], "homes": [], "jobs": []}
    (tmp_path / "run.json").write_text(json.dumps(run))
    parameters = {"endpoint_url": account, "output_dir": str(tmp_path)}
    with pytest.raises(RuntimeError, match="eu-west-1 of another Region or account"):
        run_cells("01_setup", parameters, stop="role-policy")
    assert json.loads((tmp_path / "run.json").read_text()) == run


def test_the_role_has_one_kind_of_permissions_at_a_time(account, tmp_path):
    parameters = {"endpoint_url": account, "create_role": True, "role_name": "video-other"}
    parameters["output_dir"] = str(tmp_path)
    role = boto3.resource("iam").Role("video-other")
    for full in (True, False, True):
        run_cells("01_setup", parameters | {"full_access": full}, stop="bucket")
        assert [p.name for p in role.policies.all()] == ([] if full else ["video-tutorial"])
        assert len(list(role.attached_policies.all())) == full


def test_fetched_prices_add_up_and_win_over_the_table(account, tmp_path):
    run = {"region": "us-east-1", "account": ACCOUNT, "endpoint_url": account}
    run["fetched_prices"] = {"ml.x": [3.0, "2026-11-01"], "ml.m5.large": [9.0, "2026-11-01"]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    parameters = {"endpoint_url": account, "create_role": True, "output_dir": str(tmp_path)}
    prices = run_cells("01_setup", parameters)["run"]["dollars_per_hour"]
    assert prices["ml.x"] == 3.0 and prices["ml.m5.large"] == 9.0
    assert 0 < prices["ml.g4dn.xlarge"] < 1  # of the table
