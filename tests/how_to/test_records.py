"""Records in MLflow: the app of SageMaker, against botocore's model; runs, with a local server."""

import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import boto3
import mlflow
import pytest
from botocore.stub import ANY, Stubber
from conftest import ROOT, TINY
from embedded import free_port
from sagemaker.core.training import configs
from tutorial import account, launch, records

ARN = "arn:aws:sagemaker:us-east-1:123456789012:mlflow-app/app-ABCDEF"
ROLE = "arn:aws:iam::123456789012:role/SageMaker-Video-ExecutionRole"
RUN = {"bucket": "b", "prefix": "p", "region": "us-east-1", "account": "123456789012"}


@pytest.fixture
def aws(tmp_path, monkeypatch):
    """(here, stub): SageMaker answers what the test says, in the shapes that botocore knows."""
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    client = boto3.client("sagemaker", region_name="us-east-1", **keys)
    here = account.Account(tmp_path, RUN | {"role_arn": ROLE, "homes": [], "deployed": []})
    here.session = SimpleNamespace(client=lambda name: client)
    here.write()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(mlflow, "set_tracking_uri", lambda uri: None)
    monkeypatch.setattr(mlflow, "create_experiment", lambda name, artifact_location: None)
    monkeypatch.setattr(mlflow, "set_experiment", lambda name: None)
    with Stubber(client) as stub:
        yield here, stub
        stub.assert_no_pending_responses()


def apps(stub, *statuses, name):
    for status in statuses:
        summaries = [{"Arn": ARN, "Name": name, "Status": status}] if status else []
        stub.add_response("list_mlflow_apps", {"Summaries": summaries}, {})


def statuses(stub, *found):
    for status in found:
        stub.add_response("describe_mlflow_app", {"Arn": ARN, "Status": status}, {"Arn": ARN})


def test_the_app_is_created_once_under_a_name_that_run_json_has_before(aws, monkeypatch):
    here, stub = aws
    request = {"Name": ANY, "ArtifactStoreUri": "s3://b/p/mlflow", "RoleArn": ROLE, "Tags": ANY}
    request |= {"ModelRegistrationMode": "AutoModelRegistrationDisabled"}
    apps(stub, None, name="")
    stub.add_response("create_mlflow_app", {"Arn": ARN}, request)
    statuses(stub, "Creating", "Created")
    before = []
    event = "provide-client-params.sagemaker.CreateMlflowApp"
    client = here.session.client("sagemaker")
    client.meta.events.register(
        event,
        lambda params, **_: before.append(
            (params["Name"], *account.read_run(here.output).run["deployed"])
        ),
    )
    assert records.start(here) == ARN
    ((name, item),) = before
    assert item == f"mlflow-app/{name}" and name.startswith("video-")
    assert here.run["homes"] == ["s3://b/p/mlflow/"]  # its files go with the others
    apps(stub, "Created", name=name)
    statuses(stub, "Created")
    assert records.start(here) == ARN and here.run["deployed"] == [item]


def test_an_app_that_fails_ends_the_waiting_with_what_to_do(aws):
    here, stub = aws
    here.add("deployed", "mlflow-app/video-records-1")
    apps(stub, "CreateFailed", name="video-records-1")
    statuses(stub, "CreateFailed")
    with pytest.raises(RuntimeError, match=r"CreateFailed.*records.end\(here\)"):
        records.start(here)


def test_the_app_is_deleted_and_looked_for(aws):
    here, stub = aws
    here.add("deployed", "mlflow-app/video-records-1", "model/other")
    apps(stub, "Created", "Created", name="video-records-1")
    stub.add_response("delete_mlflow_app", {"Arn": ARN}, {"Arn": ARN})
    apps(stub, "Deleting", "Deleted", "Deleted", name="video-records-1")
    records.end(here)
    assert here.run["deployed"] == ["model/other"]


def test_an_app_that_stays_stays_in_run_json(aws):
    here, stub = aws
    here.add("deployed", "mlflow-app/video-records-1")
    apps(stub, "Created", "Created", name="video-records-1")
    stub.add_response("delete_mlflow_app", {"Arn": ARN}, {"Arn": ARN})
    apps(stub, "DeleteFailed", name="video-records-1")
    with pytest.raises(RuntimeError, match="video-records-1 is still there.*DeleteFailed"):
        records.end(here)
    assert here.run["deployed"] == ["mlflow-app/video-records-1"]


def test_the_link_to_an_app_is_asked_for(aws):
    here, stub = aws
    answer = {"AuthorizedUrl": "https://app.example/auth?token=1"}
    stub.add_response(
        "create_presigned_mlflow_app_url", answer, {"Arn": ARN, "ExpiresInSeconds": 300}
    )
    assert records.link(here, ARN) == answer["AuthorizedUrl"]


def test_the_plug_in_that_reaches_an_app_by_its_arn_is_installed():
    """mlflow finds it by its entry points; the SDK requires it."""
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    store = _tracking_store_registry.get_store_builder(ARN)
    assert store.__module__.startswith("sagemaker_mlflow.")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a local MLflow server."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "files")]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)


@pytest.mark.long
def test_two_runs_of_the_script_are_compared_with_a_local_server(
    server, clips_folder, tmp_path, monkeypatch
):
    """The script as a job starts it, the cells' functions, and a server in between."""
    here = account.Account(tmp_path, dict(RUN))
    uri = records.start(here, server)
    trainer = SimpleNamespace(
        hyperparameters={"epochs": 2, "train_batch_size": 4, "logging_steps": 2},
        source_code=configs.SourceCode(source_dir=".", command="exec python3 train.py"),
        checkpoint_config=None,
    )
    trainer.model_copy = lambda update: SimpleNamespace(**vars(trainer) | update)
    archives = {}
    for name, more in {"whole model": {}, "head only": {"freeze": "backbone"}}.items():
        request = records.variant(trainer, name, **more)
        assert request.hyperparameters.items() >= (more | {"epochs": 2}).items()
        root = tmp_path / name
        environment = os.environ | records.environment(uri) | {
            "SM_CHANNEL_TRAIN": str(clips_folder), "SM_CHANNEL_MODEL": str(TINY),
            "SM_MODEL_DIR": str(root / "model"), "SM_OUTPUT_DATA_DIR": str(root / "data"),
        }  # fmt: skip
        root.mkdir()
        command = [sys.executable, str(ROOT / "scripts/train.py"), *request.source_code.args]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        subprocess.run(["tar", "czf", root / "output.tar.gz", "-C", root / "data", "."], check=True)
        archives[f"job of {name}"] = root
    model = {"ModelArtifacts": {"S3ModelArtifacts": "s3://b/p/model.tar.gz"}}
    monkeypatch.setattr(launch, "describe", lambda here, job: model)
    for job, root in archives.items():
        body = (root / "output.tar.gz").open("rb")
        here.session = SimpleNamespace(
            client=lambda _, body=body: SimpleNamespace(get_object=lambda **_: {"Body": body})
        )
        records.complete(here, root.name, job)
    table = records.table("freeze", "num_train_epochs")
    assert list(table.index) == ["head only", "whole model"]
    assert table["freeze"].to_dict() == {"head only": "backbone", "whole model": "none"}
    assert table["job"].to_dict() == {root.name: job for job, root in archives.items()}
    for name in table.index:
        metrics = json.loads((tmp_path / name / "data" / "metrics.json").read_text())
        assert table.loc[name, "test_accuracy"] == pytest.approx(metrics["test_accuracy"], abs=1e-4)
        (run,) = mlflow.search_runs(filter_string=f"tags.`mlflow.runName` = '{name}'")["run_id"]
        assert json.loads(mlflow.artifacts.load_text(f"runs:/{run}/metrics.json")) == metrics
    loss, accuracy = records.figure("whole model", "head only").axes
    assert [len(line.get_xdata()) > 1 for line in (*loss.lines, *accuracy.lines)] == [True] * 4
    with pytest.raises(RuntimeError, match="no run 'nobody'"):
        records.complete(here, "nobody", "job")
