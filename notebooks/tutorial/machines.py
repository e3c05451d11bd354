"""Which machines, and how many: their cost and speed, an interruption, several of them, clips."""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from sagemaker.core import shapes
from sagemaker.core.network import NetworkConfig
from sagemaker.core.processing import FrameworkProcessor
from sagemaker.core.training import configs

from tutorial import SCRIPTS, account, launch, pictures

# ---- Which instance ------------------------------------------------------------------------------


def reading_seconds(clips, count: int = 20, frames: int = 16, size: int = 224) -> float:
    """CPU seconds in which one core of this computer reads a training clip: the mean of some.

    clips: a DatasetDict of prepare_clips.load_clips; up to `count` of its training clips are read.
    frames, size: of the model; 16 and 224 are those of the published VideoMAE models.
    """
    import train  # only here: it takes seconds

    paths = [video["path"] for video in clips["train"]["video"][:count]]
    train.read_clip(paths[0], frames, size)  # the first one loads the decoder
    start = time.process_time()
    for path in paths:
        train.read_clip(path, frames, size)
    return (time.process_time() - start) / len(paths)


def choice(here, instance_types, read_seconds: float, gflop=None, clips=None, epochs=10):
    """A table of instance types, the cheapest for the run first; prints what run that is.

    read_seconds: of reading_seconds; a vCPU is taken to read as fast as a core of this computer.
    gflop: of a forward pass (model_size.gflop); None: of notebook 2. clips: for training; None:
    those of run.json. A machine computes account.clips_per_second over 3, the cost of training in
    forward passes; without a GPU it trains the head only, over 1. "clips/s" is the lower of this
    and of what the vCPUs read; the "workers to feed it" read what it computes. "minutes" are
    launch.START_MINUTES and the epochs, without evaluation; "$ a run" bills all minutes.
    Raises RuntimeError for an instance type without a price or without an entry in
    account.INSTANCES, or if the work of the model is not known.
    """
    gflop, clips = gflop or here.run.get("gflop"), clips or here.run["clip_counts"]["train"]
    if not gflop:
        raise RuntimeError("run.json has no gflop: run 02_local_smoke_train.ipynb, or give one")
    print(f"{clips:,} clips x {epochs} epochs; {gflop:.3g} GFLOP to pass a clip forward")
    rows = {}
    for name in instance_types:
        account.price(here, name)  # asks AWS where the table lacks it
    prices = account.prices(here)
    for name in instance_types:
        if name not in account.INSTANCES:
            raise RuntimeError(
                f"{name}: its speed is not known. Add a row to INSTANCES in "
                "notebooks/tutorial/account.py, from AWS's instance page and the GPU's data sheet."
            )
        if name not in prices:
            raise RuntimeError(
                f"{name}: its price in {here.run['region']} is not known. Set fetch_prices = True, "
                "or type the price into notebooks/aws/prices.json."
            )
        machine, price = account.INSTANCES[name], prices[name][0]
        computes = account.clips_per_second(name, gflop) / (3 if machine.gpus else 1)
        rate = min(computes, machine.vcpus / read_seconds)
        minutes = launch.START_MINUTES + clips * epochs / rate / 60
        rows[name] = {
            "runs on": machine.what if machine.gpus else f"{machine.what}, head only",
            "GB in a GPU": machine.memory_gb // machine.gpus if machine.gpus else "no GPU",
            "vCPUs": machine.vcpus,
            "clips/s": round(rate, 1),
            "workers to feed it": round(computes * read_seconds, 1),
            "$ an hour": price,
            "price of": prices[name][1],
            "$ per 1,000 clips": round(price / 3.6 / rate, 4),
            "minutes": round(minutes, 1),
            "$ a run": round(price * minutes / 60, 2),
        }
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("$ a run")


def spot_dollars(table, saving: float, interruptions: float, lost_minutes: float) -> pd.Series:
    """Dollars of the run on spot instances, for each row of `choice`.

    saving: the share of the price that spot saves. Each interruption costs launch.START_MINUTES of
    a new start and `lost_minutes` of steps that are done again.
    """
    minutes = table["minutes"] + interruptions * (launch.START_MINUTES + lost_minutes)
    return table["$ an hour"] * (1 - saving) * minutes / 60


def choice_figure(table, spot, quotas) -> Figure:
    """Dollars of the run on demand and on spot, and its hours on demand, for each row of `choice`.

    spot: dollars (spot_dollars). quotas: of run.json; None: not known. A mark is hollow if the
    quota for this use (training job or spot training job) is 0 or not listed.
    """
    figure = Figure(figsize=(9.5, 0.45 * len(table) + 1.4), layout="constrained")
    (dollars, time), rows = figure.subplots(1, 2, sharey=True), range(len(table))[::-1]
    for row, (name, facts) in zip(rows, table.iterrows(), strict=True):
        style = {"color": pictures.RIGHT, "markersize": 10} | _fill(quotas, name, account.USES[0])
        spare = {"color": pictures.WRONG, "markersize": 9} | _fill(quotas, name, account.USES[1])
        dollars.plot([spot[name], facts["$ a run"]], [row, row], color="0.8", zorder=1)
        dollars.plot(spot[name], row, "^", **spare)
        dollars.plot(facts["$ a run"], row, "o", **style)
        time.plot(facts["minutes"] / 60, row, "o", **style)
        for axis, x, text in (
            (dollars, facts["$ a run"], f"${facts['$ a run']:.2f}"),
            (time, facts["minutes"] / 60, f"{facts['minutes'] / 60:.2g} h"),
        ):
            axis.annotate(text, (x, row), (9, -4), textcoords="offset points")
    dollars.plot([], [], "o", color=pictures.RIGHT, label="on demand")
    dollars.plot([], [], "^", color=pictures.WRONG, label="spot")
    dollars.plot([], [], "o", color="0.4", mfc="white", label="hollow: quota 0 or not listed")
    heads = table["runs on"].str.contains("head only").map({True: "\nhead only", False: ""})
    dollars.set_yticks(rows, table.index + heads)
    dollars.set_title("dollars for the whole run", loc="left")
    time.set_title("hours, on demand", loc="left")
    for axis in (dollars, time):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
        axis.margins(x=0.25, y=0.08)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _fill(quotas, name: str, use: str) -> dict:
    """The style of a mark: hollow if the quota of an instance type for `use` is 0 or not listed."""
    return {} if quotas is None or quotas.get(f"{name} for {use}") else {"mfc": "white"}


# ---- An interruption -----------------------------------------------------------------------------


def interrupted(flags: dict, folder, blows: dict[str, int]) -> pd.DataFrame:
    """Trains here with `flags` of train.py, interrupts the run, lets it go on, until it is done.

    folder: for checkpoints and the model; it must be new or empty. blows: {name of a signal: after
    which step it is sent}, in this order. Returns a row for each signal: the step that was reached,
    the step of the checkpoint from which the next start went on, how many steps were done twice,
    the median seconds per step of the whole run, and the product of both, the seconds lost. Raises
    RuntimeError, with the end of the log, if the script fails, or ends before a signal is due.
    """
    more = {"model_dir": f"{folder}/model", "output_data_dir": f"{folder}/data"}
    more |= {"checkpoint_dir": f"{folder}/checkpoints", "resume_from_checkpoint": "auto"}
    more |= {"logging_steps": 1, "dataloader_num_workers": 0}  # a line for each step
    command = [sys.executable, f"{SCRIPTS}/train.py"]
    command += [f"--{name}={value}" for name, value in (flags | more).items()]
    rows, reached, seconds = {}, 0, []
    for name, due in [*blows.items(), (None, None)]:
        step, sent, log, before = 0, False, [], None
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        with process:
            for line in process.stdout:
                log.append(line)
                if found := re.search(r"going on from .*checkpoint-(\d+)", line):
                    step = int(found[1])
                    *_, last = rows
                    rows[last] |= {"went on from": step, "steps done twice": reached - step}
                if found := re.search(r"saved at step (\d+)", line):
                    step = int(found[1])
                if "{'loss'" in line:
                    step, now = step + 1, time.monotonic()
                    seconds += [now - before] if before else []
                    before = now
                    if step == due:
                        process.send_signal(signal.Signals[name])
                        sent = True
                        if name == "SIGKILL":
                            break
        if name and not sent or not name and process.returncode:
            raise RuntimeError("".join(log)[-1500:])
        if name:
            rows[name] = {"stopped at step": step}
            reached = step
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("signal")
    table["seconds per step"] = statistics.median(seconds)
    table["seconds lost"] = table["steps done twice"] * table["seconds per step"]
    return table.round(2)


# ---- Several machines ----------------------------------------------------------------------------


def volume_gb(here, channels, instance_type: str, input_mode: str = "File") -> int:
    """GB of disk to ask for: 50, and in File mode twice what the channels hold in S3.

    Prints both, and which disk counts: an instance with a disk of its own ignores this number.
    """
    sizes = [launch.objects_below(here, channel.data_source.s3_uri) for channel in channels]
    gigabytes = sum(sum(files.values()) for files in sizes) / 1e9
    wanted = 50 + (int(2 * gigabytes) if input_mode == "File" else 0)
    print(f"{gigabytes:.2f} GB in S3, {10 * gigabytes:.0f} s to copy at 100 MB/s (an assumption);")
    if launch.has_own_disk(instance_type):
        own = launch.OWN_DISK.get(instance_type)
        size = f" of {own} GB" if own else ""
        print(f"{instance_type} has a disk of its own{size}, which counts, not volume_size_in_gb")
    else:
        print(f"{input_mode} mode: a disk of {wanted} GB")
    return wanted


def on_instances(trainer, count: int):
    """A copy of a request for `count` instances, with the same number of clips per step in all.

    The request has a command and args (launch.arguments), as in the guide. The copy's model,
    checkpoints and curves get folders of their own. Raises ValueError if the clips of a step have
    no `count` equal parts.
    """
    clips = trainer.hyperparameters["train_batch_size"] * trainer.compute.instance_count
    if clips % count:
        raise ValueError(
            f"compare_nodes: {clips} clips per step (train_batch_size x instances) have no {count} "
            "equal parts"
        )
    compute = trainer.compute.model_copy(update={"instance_count": count})
    flags = trainer.hyperparameters | {"train_batch_size": clips // count}
    source = trainer.source_code.model_copy(update={"args": launch.arguments(flags)})
    changes = {"compute": compute, "hyperparameters": flags, "source_code": source}
    copy = trainer.model_copy(update=changes)
    output, checkpoints = trainer.output_data_config, trainer.checkpoint_config
    board = trainer._tensorboard_output_config
    copy.output_data_config = output.model_copy(
        update={"s3_output_path": f"{output.s3_output_path}/on-{count}"}
    )
    copy.checkpoint_config = checkpoints.model_copy(
        update={"s3_uri": f"{checkpoints.s3_uri.rstrip('/')}/on-{count}/"}
    )
    return copy.with_tensorboard_output_config(
        board.model_copy(update={"s3_output_path": f"{board.s3_output_path}/on-{count}"})
    )


def tensorboard(here, job: str) -> dict[str, pd.Series]:
    """{name of a curve: its values by step} of a job, from the TensorBoard files in S3.

    The files stay in output/tensorboard/<job>. Raises FileNotFoundError if there are none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    uri = launch.describe(here, job)["TensorBoardOutputConfig"]["S3OutputPath"] + "/"
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    folder = Path(here.output, "tensorboard", job)
    folder.mkdir(parents=True, exist_ok=True)
    files = launch.objects_below(here, uri)
    if not files:
        raise FileNotFoundError(f"{job}: no curves below {uri}; it needs report_to = tensorboard")
    for name in files:
        here.session.client("s3").download_file(bucket, prefix + name, folder / Path(name).name)
    events = EventAccumulator(str(folder)).Reload()
    points = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    return {n: pd.Series({p.step: p.value for p in found}) for n, found in points.items()}


def comparison(here, jobs: dict[int, str], curves: dict[int, dict]) -> pd.DataFrame:
    """A row for each job, by its number of instances: seconds, speed, dollars, loss and accuracy.

    jobs: {instances: name}; curves: {instances: what tensorboard() returns}. "training, s" are the
    steps and evaluations; "job, s" has downloads and packages too. Dollars are billed seconds times
    the price of notebook 1.
    """
    rows = {}
    for count, job in jobs.items():
        described = launch.describe(here, job)
        price = here.run["dollars_per_hour"][launch.machines_of(described)[0]]
        final = {m["MetricName"]: m["Value"] for m in described.get("FinalMetricDataList", [])}
        rows[count] = {
            "job, s": described["TrainingTimeInSeconds"],
            "training, s": round(curves[count]["train/train_runtime"].iloc[-1]),
            "clips/s": round(curves[count]["train/train_samples_per_second"].iloc[-1], 1),
            "$": round(count * described["BillableTimeInSeconds"] / 3600 * price, 3),
            "validation loss": round(final["eval:loss"], 4),
            "test accuracy": round(final.get("test:accuracy", float("nan")), 4),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("instances")


def loss_figure(curves: dict[int, dict]) -> Figure:
    """The training loss by step, of each number of instances, each line thinner than before."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axis, colours = figure.subplots(), (pictures.RIGHT, pictures.WRONG, pictures.TRUE)
    for number, (count, found) in enumerate(curves.items()):
        style = {"color": colours[number % 3], "linestyle": "--" if number else "-"}
        label, loss = f"{count} instance{'s' if count > 1 else ''}", found["train/loss"]
        axis.plot(loss.index, loss, linewidth=max(1.5, 6 - 4 * number), label=label, **style)
    axis.set(xlabel="step", ylabel="training loss")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title("Training loss: the same steps on one machine and on several", loc="left")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


# ---- A Processing job ----------------------------------------------------------------------------


def prepare(
    here, run, channels, instances: int, max_cost_usd: float, instance_type="ml.m5.xlarge",
    max_minutes=60, disk_gb=50, kms_key=None, network=None,
) -> str:  # fmt: skip
    """Prepares the clips of the channel `train` by prepare_clips.py on `instances` machines.

    run: of launch.new_run. Each machine takes a part of the files; unreadable clips are left out
    and listed in bad_clips_<machine>.json beside the result. Prints what the job costs at most, and
    raises RuntimeError if that is above `max_cost_usd`; prints its log until it ends; raises
    RuntimeError with the reason if the job fails. Afterwards the channel names the prepared clips.
    Returns the job's name.
    kms_key, network (keywords of configs.Networking): as in the training request.
    """
    (clips,) = [channel for channel in channels if channel.channel_name == "train"]
    machines = configs.Compute(instance_type=instance_type, instance_count=instances)
    limits = configs.StoppingCondition(max_runtime_in_seconds=60 * max_minutes)
    launch.check_money(here, machines, limits, max_cost_usd, use="processing job usage")
    closed = dict(network or {})
    encrypt = closed.pop("enable_inter_container_traffic_encryption", None)
    own_disk = launch.has_own_disk(instance_type)
    processor = FrameworkProcessor(
        sagemaker_session=run.session,
        role=here.run["role_arn"],
        image_uri=launch.image(here, instance_type),
        command=["python3"],
        base_job_name="video-prepare",
        instance_type=instance_type,
        instance_count=instances,
        volume_size_in_gb=disk_gb,
        volume_kms_key=None if own_disk else kms_key,
        output_kms_key=kms_key,
        max_runtime_in_seconds=60 * max_minutes,
        network_config=NetworkConfig(encrypt_inter_container_traffic=encrypt, **closed)
        if network
        else None,
        tags=[{"Key": "project", "Value": "video-tutorial"}],
    )
    raw, ready = "/opt/ml/processing/input/clips", "/opt/ml/processing/output"
    source = shapes.ProcessingS3Input(
        s3_uri=clips.data_source.s3_uri, s3_data_type="S3Prefix", s3_input_mode="File",
        s3_data_distribution_type="ShardedByS3Key", local_path=raw,
    )  # fmt: skip
    prepared = f"{run.output}/prepared/"
    target = shapes.ProcessingS3Output(s3_uri=prepared, s3_upload_mode="EndOfJob", local_path=ready)
    arguments = ["--on_bad_clip", "skip", "--resource_config", "/opt/ml/config/resourceconfig.json"]
    processor.run(
        code="prepare_clips.py", source_dir=SCRIPTS, arguments=[raw, ready, *arguments],
        inputs=[shapes.ProcessingInput(input_name="clips", s3_input=source)],
        outputs=[shapes.ProcessingOutput(output_name="prepared", s3_output=target)],
        wait=False, logs=False, kms_key=kms_key,
    )  # fmt: skip
    job = processor.latest_job.processing_job_name
    here.add("jobs", f"processing-job/{job}")
    print(f"{job} is started; the cell waits for it", flush=True)
    client, status = here.session.client("sagemaker"), "InProgress"
    log = launch.JobLog(here, job, launch.PROCESSING_LOG_GROUP)
    while status in ("InProgress", "Stopping"):
        time.sleep(launch.POLL_SECONDS)
        found = client.describe_processing_job(ProcessingJobName=job)
        status = found["ProcessingJobStatus"]
        log.print_new()
    if status != "Completed":
        reason = found.get("FailureReason") or found.get("ExitMessage") or "it gave no reason"
        raise RuntimeError(f"{job} {status}, the clips are not prepared: {reason}")
    clips.data_source.s3_uri = prepared
    print(f"prepared clips: {prepared}")
    return job
