"""Records of runs in MLflow: the server, what jobs need to reach it, a table and a figure of runs.

The server is an MLflow app of SageMaker, for which you rent no machine, or any MLflow address.
"""

import io
import json
import tarfile
import time

import mlflow
import pandas as pd
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException

from tutorial import clean_up, launch, pictures

EXPERIMENT = "video-classification"
KIND = "mlflow-app/"  # of an item in run.json, which has the app's name: AWS chooses its ARN
MOST_MINUTES = 10  # to wait for an app; AWS takes some minutes to make one


# ---- The server ----------------------------------------------------------------------------------


def start(here, tracking_uri: str | None = None) -> str:
    """The address of the MLflow server, to which this notebook is connected from now on.

    tracking_uri: None: the MLflow app that run.json names, which is created if there is none. Or
    the address of any MLflow server; `sqlite:///name.db` is a file in the output folder, of which
    jobs on this computer know too. Raises RuntimeError if AWS cannot create the app.
    """
    files = None
    if tracking_uri is None:
        tracking_uri = _app(here)
    elif tracking_uri.startswith("sqlite:///"):
        file = here.output / tracking_uri.removeprefix("sqlite:///")
        tracking_uri, files = f"sqlite:///{file}", (here.output / "mlflow_files").as_uri()
    mlflow.set_tracking_uri(tracking_uri)
    try:  # the job must find the experiment: an app knows none that it was not told of
        mlflow.create_experiment(EXPERIMENT, artifact_location=files)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    mlflow.set_experiment(EXPERIMENT)
    print(f"records go to {tracking_uri.replace(here.run['account'], '<account>')}")
    return tracking_uri


def environment(tracking_uri: str) -> dict[str, str]:
    """What a job needs beside `report_to = "mlflow"`; Trainer's MLflowCallback reads it."""
    return {"MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_EXPERIMENT_NAME": EXPERIMENT}


def _app(here) -> str:
    """The ARN of the app of run.json, or of a new one, as soon as it answers."""
    sagemaker = here.session.client("sagemaker")
    known = [item for item in here.run.get("deployed", []) if item.startswith(KIND)]
    name = f"video-records-{time.strftime('%Y%m%d-%H%M%S')}"
    name = known[0].removeprefix(KIND) if known else name
    found = clean_up.find_mlflow_app(here, name)
    if found:
        arn = found["Arn"]
    else:
        here.add("deployed", f"{KIND}{name}")
        folder = f"s3://{here.run['bucket']}/{here.run['prefix']}/mlflow/"
        here.add("homes", folder)
        arn = sagemaker.create_mlflow_app(
            Name=name,
            ArtifactStoreUri=folder.rstrip("/"),
            RoleArn=here.run["role_arn"],
            ModelRegistrationMode="AutoModelRegistrationDisabled",
            Tags=[{"Key": "project", "Value": "video-tutorial"}],
        )["Arn"]
        print(f"{name} is being created: some minutes", flush=True)

    def ask():
        return sagemaker.describe_mlflow_app(Arn=arn)["Status"]

    status = clean_up.wait(("Creating", "Updating"), ask, name, MOST_MINUTES)
    if status not in ("Created", "Updated"):
        raise RuntimeError(
            f"{name} is {status}: look at it in Studio under MLflow. records.end(here) deletes it; "
            "then run this cell again."
        )
    return arn


def link(here, tracking_uri: str) -> str:
    """The address of MLflow's own pages, or the command that shows those of a file.

    The address of an app works once, and for five minutes.
    """
    if not tracking_uri.startswith("arn:"):
        command = f"mlflow ui --backend-store-uri {tracking_uri}"
        return tracking_uri if tracking_uri.startswith("http") else f"in a terminal: {command}"
    sagemaker = here.session.client("sagemaker")
    answer = sagemaker.create_presigned_mlflow_app_url(Arn=tracking_uri, ExpiresInSeconds=300)
    return answer["AuthorizedUrl"]


# ---- The runs ------------------------------------------------------------------------------------


def variant(trainer, name: str, **flags):
    """A copy of a request with other flags of train.py, whose run is called `name` in MLflow.

    Its checkpoints, if it keeps any, get a folder of their own.
    """
    flags = trainer.hyperparameters | flags | {"report_to": "mlflow", "run_name": name}
    source = trainer.source_code.model_copy(update={"args": launch.arguments(flags)})
    copy = trainer.model_copy(update={"hyperparameters": flags, "source_code": source})
    if copy.checkpoint_config:
        folder = f"{copy.checkpoint_config.s3_uri}/{name.replace(' ', '-')}"
        changed = copy.checkpoint_config.model_copy(update={"s3_uri": folder})
        copy.checkpoint_config = changed
    return copy


def complete(here, name: str, job: str) -> None:
    """Adds to the newest run called `name`: its job, its model in S3, metrics of the test clips.

    The file metrics.json, which has them, goes with the run.

    Raises RuntimeError if MLflow has no such run: then the job could not reach the server.
    """
    found = mlflow.search_runs(filter_string=f"tags.`mlflow.runName` = '{name}'", max_results=1)
    if found.empty:
        raise RuntimeError(f"MLflow has no run {name!r}: was report_to = mlflow in the request?")
    described = launch.describe(here, job)
    model = described["ModelArtifacts"]["S3ModelArtifacts"]
    bucket, _, key = model.removeprefix("s3://").partition("/")
    key = key.replace("/model.tar.gz", "/output.tar.gz")
    archive = here.session.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        (file,) = [item for item in tar if item.name.removeprefix("./") == "metrics.json"]
        metrics = tar.extractfile(file).read().decode()
    client, run = mlflow.MlflowClient(), found["run_id"].iloc[0]
    for tag, value in {"training_job": job, "model": model}.items():
        client.set_tag(run, tag, value)
    for metric, value in json.loads(metrics).items():
        if metric.startswith("test_") and isinstance(value, float):
            client.log_metric(run, metric, value)
    client.log_text(run, metrics, "metrics.json")


def table(*flags: str) -> pd.DataFrame:
    """A row for each run of the experiment, the newest first: `flags`, minutes, and metrics.

    The minutes are those of the training, without start, installation and upload.
    """
    runs = mlflow.search_runs()
    columns = {"minutes": (runs["metrics.train_runtime"] / 60).round(1)}
    columns |= {flag: runs.get(f"params.{flag}") for flag in flags}
    for metric in ("eval_loss", "eval_accuracy", "test_accuracy"):
        if f"metrics.{metric}" in runs:
            columns[metric] = runs[f"metrics.{metric}"].round(4)
    columns["job"] = runs.get("tags.training_job")
    shown = pd.DataFrame(columns)
    return shown.set_index(runs["tags.mlflow.runName"].rename("run"))


def figure(*names: str) -> Figure:
    """Training loss and validation accuracy by step, of the newest run of each name."""
    client, runs = mlflow.MlflowClient(), mlflow.search_runs()
    picture = Figure(figsize=(9, 3.4), layout="constrained")
    axes = dict(zip(("loss", "eval_accuracy"), picture.subplots(1, 2), strict=True))
    colours = (pictures.RIGHT, pictures.WRONG, pictures.TRUE)
    for number, name in enumerate(names):
        run = runs[runs["tags.mlflow.runName"] == name]["run_id"].iloc[0]
        style = {"color": colours[number % 3], "linestyle": ("-", "--", ":")[number % 3]}
        for metric, axis in axes.items():
            points = client.get_metric_history(run, metric)
            axis.plot([p.step for p in points], [p.value for p in points], label=name, **style)
    axes["loss"].set_title("training loss", loc="left")
    axes["eval_accuracy"].set_title("accuracy on the validation clips", loc="left")
    axes["eval_accuracy"].legend()
    for axis in axes.values():
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return picture


# ---- The end -------------------------------------------------------------------------------------


def end(here) -> None:
    """Deletes the MLflow app of run.json with all its records, and looks whether it is gone.

    The files of the runs are in S3, and 06_clean_up deletes them. Raises RuntimeError if the app is
    still there; then it stays in run.json.
    """
    for item in [item for item in here.run.get("deployed", []) if item.startswith(KIND)]:
        if reason := clean_up.outcome(here, item):
            raise RuntimeError(f"{item} is still there: {reason}")
        here.drop("deployed", item)
        print(f"{item.removeprefix(KIND)} is deleted")
