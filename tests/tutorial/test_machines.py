"""What the guides to cheaper and to more machines compute; what an interruption really costs."""

from types import SimpleNamespace

import boto3
import pandas as pd
import pytest
from sagemaker.core.shapes import S3DataSource
from sagemaker.core.training import configs
from tutorial import account, launch, machines

PRICES = {"ml.m5.xlarge": 0.23, "ml.g4dn.xlarge": 0.736, "ml.g6.xlarge": 1.127}
KEY = "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"


@pytest.fixture
def here(tmp_path):
    """An account that nobody asks; run.json of a ViT-B and 320 training clips."""
    run = {"region": "us-east-1", "gflop": 357, "clip_counts": {"train": 320}, "jobs": []}
    run |= {"dollars_per_hour": PRICES, "role_arn": "arn:aws:iam::123456789012:role/test"}
    return account.Account(tmp_path, run, boto3.Session(region_name="us-east-1"))


# Which instance -----------------------------------------------------------------------------------
def test_the_cheapest_instance_for_the_run_comes_first(here):
    table = machines.choice(here, PRICES, read_seconds=0.01, clips=5000, epochs=10)
    assert list(table["$ a run"]) == sorted(table["$ a run"])
    row = table.loc["ml.g4dn.xlarge"]
    rate = account.clips_per_second("ml.g4dn.xlarge", 357) / 3
    minutes = launch.START_MINUTES + 50_000 / rate / 60
    assert row["clips/s"] == pytest.approx(rate, abs=0.05)
    assert row["minutes"] == pytest.approx(minutes, abs=0.05)
    assert row["$ a run"] == pytest.approx(0.736 * minutes / 60, abs=0.005)
    assert row["$ per 1,000 clips"] == pytest.approx(1000 / rate / 3600 * 0.736, abs=1e-4)
    assert table.loc["ml.m5.xlarge", "runs on"] == "4 vCPUs, head only"


def test_the_memory_is_that_of_one_gpu_because_a_batch_must_fit_into_one(here):
    types = ["ml.g4dn.xlarge", "ml.g4dn.12xlarge", "ml.m5.xlarge"]
    memory = machines.choice(here, types, 0.01)["GB in a GPU"]
    assert [memory[name] for name in types] == [16, 16, "no GPU"]


def test_a_gpu_waits_for_clips_that_its_cpus_read_too_slowly(here):
    fast = machines.choice(here, ["ml.g4dn.xlarge"], read_seconds=0.001).iloc[0]
    slow = machines.choice(here, ["ml.g4dn.xlarge"], read_seconds=1).iloc[0]
    assert slow["clips/s"] == 4  # four vCPUs, a clip a second each
    assert slow["workers to feed it"] == pytest.approx(fast["clips/s"], abs=0.05)
    assert slow["$ a run"] > fast["$ a run"]


def test_the_plan_is_that_of_run_json_if_none_is_given(here):
    types = ["ml.g4dn.xlarge"]
    given = machines.choice(here, types, 0.01, gflop=357, clips=320, epochs=10)
    assert machines.choice(here, types, 0.01).equals(given)


def test_what_the_table_cannot_know_is_an_error_with_the_remedy(here):
    with pytest.raises(RuntimeError, match="ml.p5.48xlarge: its speed .*account.py"):
        machines.choice(here, ["ml.p5.48xlarge"], 0.01)
    here.run["region"] = "eu-north-1"  # the table has no price there
    with pytest.raises(RuntimeError, match="ml.g4dn.xlarge: its price .*fetch_prices = True"):
        machines.choice(here, ["ml.g4dn.xlarge"], 0.01)
    here.run["gflop"] = None
    with pytest.raises(RuntimeError, match="no gflop: run 02_local_smoke_train.ipynb"):
        machines.choice(here, ["ml.g4dn.xlarge"], 0.01)


def test_each_interruption_of_a_spot_run_costs_a_start_and_the_lost_steps(here):
    table = machines.choice(here, ["ml.g4dn.xlarge"], 0.01)
    undisturbed = machines.spot_dollars(table, saving=0.6, interruptions=0, lost_minutes=5)
    twice = machines.spot_dollars(table, saving=0.6, interruptions=2, lost_minutes=5)
    assert undisturbed.iloc[0] == pytest.approx(0.4 * table["$ a run"].iloc[0], abs=0.005)
    more = 0.4 * 0.736 * 2 * (launch.START_MINUTES + 5) / 60
    assert (twice - undisturbed).iloc[0] == pytest.approx(more)


def test_the_figure_names_the_instances_in_order_and_without_a_quota_they_are_hollow(here):
    table = machines.choice(here, PRICES, 0.01)
    quotas = {"ml.m5.xlarge for training job usage": 1, "ml.g4dn.xlarge for training job usage": 0}
    quotas["ml.g6.xlarge for spot training job usage"] = 1  # all others are not listed
    spot = machines.spot_dollars(table, 0.6, 1, 1)
    figure = machines.choice_figure(table, spot, quotas)
    dollars = figure.axes[0]
    shown = [text.get_text().split("\n") for text in dollars.get_yticklabels()]
    assert [name for name, *_ in shown] == list(table.index)
    assert [name for name, *more in shown if more] == ["ml.m5.xlarge"]  # trains its head only
    for marker, filled in (("o", "ml.m5.xlarge"), ("^", "ml.g6.xlarge")):  # on demand, on spot
        marks = [m for m in dollars.lines if m.get_marker() == marker and len(m.get_xdata())]
        fills = {table.index[len(table) - 1 - int(m.get_ydata()[0])]: m.get_mfc() for m in marks}
        assert [name for name, fill in fills.items() if fill != "white"] == [filled]
        assert fills.keys() == PRICES.keys()
    assert "hollow: quota 0 or not listed" in [text.get_text() for text in figure.legends[0].texts]


def test_the_time_to_read_a_clip_is_measured_on_real_clips(clips_folder):
    import prepare_clips

    clips = prepare_clips.load_clips(str(clips_folder))
    assert 0 < machines.reading_seconds(clips, count=2, frames=4, size=32) < 5


# An interruption ----------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.parametrize("save_minutes", [0, 1e-6])
def test_a_signal_loses_no_step_and_a_sudden_end_those_since_the_checkpoint(
    clips_folder, native_checkpoint, tmp_path, save_minutes
):
    """test_resume.py holds the weights of such runs equal to those of an undisturbed one."""
    flags = {"dataset": clips_folder, "model_name": native_checkpoint, "train_batch_size": 2}
    flags["save_minutes"] = save_minutes
    table = machines.interrupted(flags | {"max_steps": 8}, tmp_path, {"SIGTERM": 2, "SIGKILL": 5})
    told, killed = table.loc["SIGTERM"], table.loc["SIGKILL"]
    assert told["stopped at step"] == told["went on from"] >= 2 and told["steps done twice"] == 0
    assert killed["stopped at step"] == 5
    if save_minutes:  # after each step: at most the one is lost that is not saved yet
        assert killed["went on from"] >= 4
    else:
        assert killed["went on from"] == told["went on from"] < 5
    assert killed["steps done twice"] == 5 - killed["went on from"]
    assert (table["seconds per step"] > 0).all() and told["seconds lost"] == 0
    lost = killed["steps done twice"] * killed["seconds per step"]
    assert killed["seconds lost"] == pytest.approx(lost, abs=0.05)
    assert (tmp_path / "model/model.safetensors").exists()


@pytest.mark.long
def test_a_script_that_fails_by_itself_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="no/such/clips"):
        machines.interrupted({"dataset": "no/such/clips"}, tmp_path, {"SIGTERM": 2})


# Several machines ---------------------------------------------------------------------------------
def channel(uri="s3://bucket/clips/"):
    kind = {"s3_data_type": "S3Prefix", "s3_data_distribution_type": "FullyReplicated"}
    return configs.InputData(channel_name="train", data_source=S3DataSource(s3_uri=uri, **kind))


def test_file_mode_needs_a_disk_for_twice_the_clips(here, monkeypatch, capsys):
    monkeypatch.setattr(launch, "objects_below", lambda here, uri: {"a": 30e9, "b": 10e9})
    assert machines.volume_gb(here, [channel()], "ml.m5.xlarge") == 50 + 80
    assert machines.volume_gb(here, [channel()], "ml.m5.xlarge", "FastFile") == 50
    said = capsys.readouterr().out
    assert "40.00 GB in S3, 400 s to copy" in said and "File mode: a disk of 130 GB" in said


def test_the_disk_that_a_machine_brings_is_the_one_that_counts(here, monkeypatch, capsys):
    monkeypatch.setattr(launch, "objects_below", lambda here, uri: {"a": 1e9})
    machines.volume_gb(here, [channel()], "ml.g4dn.xlarge")
    said = capsys.readouterr().out
    assert "ml.g4dn.xlarge has a disk of its own of 125 GB" in said and "52 GB" not in said


def test_the_jobs_are_compared_by_their_own_numbers(here, monkeypatch):
    def describe(here, job):
        final = {"eval:loss": 0.5854, "test:accuracy": 0.7125}
        return {
            "TrainingTimeInSeconds": 400, "BillableTimeInSeconds": 360,
            "ResourceConfig": {"InstanceType": "ml.g4dn.xlarge"},
            "FinalMetricDataList": [{"MetricName": n, "Value": v} for n, v in final.items()],
        }  # fmt: skip

    monkeypatch.setattr(launch, "describe", describe)
    names = ("train/train_runtime", "train/train_samples_per_second", "train/loss")
    curves = {
        count: dict(zip(names, (pd.Series([100 / count]), pd.Series([20.04 * count]),
                                pd.Series({1: 0.7, 2: 0.6})), strict=True))
        for count in (1, 2)
    }  # fmt: skip
    table = machines.comparison(here, {1: "one", 2: "two"}, curves)
    assert list(table["training, s"]) == [100, 50] and list(table["clips/s"]) == [20, 40.1]
    assert list(table["$"]) == [0.074, 0.147]  # 360 s at $0.736 an hour, once and twice
    assert list(table["test accuracy"]) == [0.7125, 0.7125]
    lines = machines.loss_figure(curves).axes[0].lines
    assert [line.get_label() for line in lines] == ["1 instance", "2 instances"]
    assert lines[0].get_linewidth() > lines[1].get_linewidth()  # both can be seen
    assert list(lines[1].get_ydata()) == [0.7, 0.6]


def test_a_job_without_curves_says_what_it_lacks(here, monkeypatch):
    board = {"TensorBoardOutputConfig": {"S3OutputPath": "s3://bucket/board"}}
    monkeypatch.setattr(launch, "describe", lambda here, job: board)
    monkeypatch.setattr(launch, "objects_below", lambda here, uri: {})
    with pytest.raises(FileNotFoundError, match="s3://bucket/board/; it needs report_to"):
        machines.tensorboard(here, "job")


# A Processing job ---------------------------------------------------------------------------------
@pytest.fixture
def processing(here, monkeypatch):
    """processing(answer, **more): (what the SDK was asked for, the channel) of machines.prepare."""
    asked, here.run["quotas"] = {}, {"ml.m5.xlarge for processing job usage": 2}

    class Processor:
        latest_job = SimpleNamespace(processing_job_name="video-prepare-1")

        def __init__(self, **request):
            asked.update(request)

        def run(self, **how):
            asked.update(how)

    def prepare(answer, instances=2, most=5, **more):
        def get_log_events(logStreamName, nextToken="", **_):  # two lines, and then the end
            assert logStreamName.startswith("video-prepare-1/algo-")
            events = [] if nextToken else [{"message": "+ pip"}, {"message": "7 clips are cut"}]
            return {"events": events, "nextForwardToken": "end"}

        def describe_log_streams(logGroupName, logStreamNamePrefix):
            assert logGroupName == "/aws/sagemaker/ProcessingJobs"
            names = [f"{logStreamNamePrefix}algo-{number}-1" for number in (1, 2)]
            return {"logStreams": [{"logStreamName": name} for name in names]}

        client = SimpleNamespace(
            describe_processing_job=lambda ProcessingJobName: answer,
            describe_log_streams=describe_log_streams,
            get_log_events=get_log_events,
            exceptions=SimpleNamespace(ResourceNotFoundException=KeyError),
        )  # fmt: skip
        monkeypatch.setattr(here.session, "client", lambda name: client)
        clips = channel()
        run = SimpleNamespace(session=None, output="s3://bucket/run")
        machines.prepare(here, run, [clips], instances, most, **more)
        return asked, clips

    monkeypatch.setattr(machines, "FrameworkProcessor", Processor)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0)
    monkeypatch.setattr(launch, "image", lambda *_: "my/image:1")
    prepare.asked = asked
    return prepare


def test_prepared_clips_become_the_channel_and_each_machine_gets_a_part(processing, here, capsys):
    asked, clips = processing({"ProcessingJobStatus": "Completed"}, max_minutes=30)
    assert clips.data_source.s3_uri == "s3://bucket/run/prepared/"
    (source,), (target,) = asked["inputs"], asked["outputs"]
    assert source.s3_input.s3_data_distribution_type == "ShardedByS3Key"
    assert source.s3_input.s3_uri == "s3://bucket/clips/"
    assert target.s3_output.s3_uri == "s3://bucket/run/prepared/"
    assert asked["max_runtime_in_seconds"] == 1800 and asked["network_config"] is None
    assert here.run["jobs"] == ["processing-job/video-prepare-1"]  # notebook 6 deletes it
    said = capsys.readouterr().out
    assert "at most:  $0.34" in said  # two machines for 45 minutes
    assert "\n7 clips are cut\n2: 7 clips are cut\n" in said and "pip" not in said


def test_key_and_network_reach_the_processing_job(processing):
    network = {"subnets": ["subnet-1"], "security_group_ids": ["sg-1"]}
    network |= {"enable_network_isolation": True, "enable_inter_container_traffic_encryption": True}
    asked, _ = processing({"ProcessingJobStatus": "Completed"}, kms_key=KEY, network=network)
    assert {asked[name] for name in ("volume_kms_key", "output_kms_key", "kms_key")} == {KEY}
    closed = asked["network_config"]
    assert (closed.subnets, closed.security_group_ids) == (["subnet-1"], ["sg-1"])
    assert closed.enable_network_isolation and closed.encrypt_inter_container_traffic


@pytest.mark.parametrize("instances, most, message", [(3, 5, "is below 3"), (2, 0.1, "At most")])
def test_a_preparation_that_is_too_large_is_not_started(processing, instances, most, message):
    with pytest.raises(RuntimeError, match=message):
        processing({"ProcessingJobStatus": "Completed"}, instances, most)
    assert not processing.asked


def test_a_preparation_that_fails_says_why_and_the_channel_stays(processing, here):
    failed = {"ProcessingJobStatus": "Failed", "FailureReason": "no clip can be read"}
    with pytest.raises(RuntimeError, match="video-prepare-1 Failed.*no clip can be read"):
        processing(failed)
