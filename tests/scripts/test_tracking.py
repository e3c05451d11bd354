"""What a run tells while it runs: log lines that become metrics, TensorBoard, MLflow."""

import json
import re

import pytest
from conftest import TINY
from forked import AS_A_SCRIPT, Run
from tutorial import launch

HISTORY = {"train/loss": "loss", "eval/loss": "eval_loss", "eval/accuracy": "eval_accuracy"}


@pytest.fixture(scope="module")
def run(clips_folder, tmp_path_factory):
    """Runs the script as a job has it, once for each tracker: its folder and its log."""
    done = {}

    def tracked_by(tracker):
        if tracker not in done:
            root = tmp_path_factory.mktemp(tracker)
            environment = {
                "SM_CHANNEL_TRAIN": str(clips_folder),
                "SM_CHANNEL_MODEL": str(TINY),
                "SM_MODEL_DIR": str(root / "model"),
                "SM_OUTPUT_DATA_DIR": str(root / "data"),
                "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db",
            }
            flags = "--epochs 2 --train_batch_size 4 --logging_steps 2 --dataloader_num_workers 1"
            flags = [*flags.split(), "--report_to", tracker]
            result = Run(root, flags, AS_A_SCRIPT, **environment).wait()
            assert result.returncode == 0, result.stdout + result.stderr
            done[tracker] = root, result.stdout
        return done[tracker]

    return tracked_by


def history(root, name) -> list[float]:
    """The values of `name` in the order in which Trainer noted them."""
    state = json.loads((root / "model" / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


def metric_definitions() -> dict[str, str]:
    return {definition.name: definition.regex for definition in launch.METRICS}


@pytest.mark.long
def test_metric_definitions_find_each_value_in_the_log_and_no_other(run):
    root, log = run("tensorboard")
    final = json.loads((root / "data" / "metrics.json").read_text())  # the best model's, at the end
    definitions = metric_definitions()
    assert {"loss", "eval:loss", "eval:accuracy", "test:accuracy"} <= definitions.keys()
    for name, regex in definitions.items():
        key = name.replace(":", "_", 1)
        wanted = history(root, key) + ([final[key]] if key in final else [])
        found = [float(match) for line in log.splitlines() for match in re.findall(regex, line)]
        assert wanted and found == pytest.approx(wanted, rel=1e-3), name  # the log has 4 digits


@pytest.mark.parametrize(
    "line, value",
    [
        ("{'loss': '5.1e-05', 'epoch': '1'}", "5.1e-05"),
        ("{'loss': '1e+03'}", "1e+03"),
        ("{'loss': 0.25, 'epoch': 1.0}", "0.25"),  # transformers 4 had no quotes
        ("{'loss': '2'}", "2"),
        ("{'loss': 'nan', 'epoch': '1'}", None),  # CloudWatch takes no NaN
        ("{'loss': 'inf'}", None),
        ("{'eval_loss': '0.5', 'train_loss': '0.5', 'test_loss': '0.5'}", None),
    ],
)
def test_the_loss_is_found_however_it_is_written(line, value):
    assert re.findall(metric_definitions()["loss"], line) == ([value] if value else [])


def test_tensorboard_has_what_trainer_has_and_the_checkpoints_carry_it_to_s3(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root, _ = run("tensorboard")
    (events,) = (
        root / "checkpoints" / "runs"
    ).iterdir()  # SageMaker copies checkpoints as they come
    scalars = EventAccumulator(str(events)).Reload()
    for tag, name in HISTORY.items():
        values = [event.value for event in scalars.Scalars(tag)]
        assert values and values == pytest.approx(history(root, name), rel=1e-6)  # float32


@pytest.mark.long
def test_mlflow_has_what_trainer_has(run):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed; sagemaker brings it")
    root, _ = run("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    (tracked,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert tracked.info.status == "FINISHED" and float(tracked.data.params["num_train_epochs"]) == 2
    for name in HISTORY.values():
        values = [entry.value for entry in client.get_metric_history(tracked.info.run_id, name)]
        assert values and values == history(root, name)
