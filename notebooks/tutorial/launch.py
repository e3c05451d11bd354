"""From a request to a finished job: upload, check before money is spent, start, follow, stop."""

import hashlib
import json
import logging
import os
import platform
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

os.environ["SAGEMAKER_VALIDATE_ROLE"] = "false"  # it would ask for more than least privilege

import pandas as pd
import rich
from botocore.exceptions import ClientError
from packaging.version import Version
from prepare_clips import ARCHIVES, CLUTTER, FORMATS, TABLES, files_below
from sagemaker.core import image_uris
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.instance_types_gpu_info import retrieve as gpus_by_instance
from sagemaker.core.shapes import S3DataSource
from sagemaker.core.training.configs import InputData, MetricDefinition

from tutorial import account

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
PROCESSING_LOG_GROUP = "/aws/sagemaker/ProcessingJobs"
RESERVED = ("code", "sm_drivers")  # channels of the SDK itself
START_MINUTES = 7  # assumed: a machine is found, fetches the image, installs the packages
# What is billed beside max_runtime, at most. SageMaker sends SIGKILL 2 minutes after SIGTERM, says
# the API reference of StopTrainingJob; the two others are assumed, for an image of some 10 GB.
MOST_START_MINUTES, GRACE_MINUTES, UPLOAD_MINUTES = 10, 2, 3
SPARE_GB = 15  # of a disk: packages, model, checkpoints
POLL_SECONDS = 3
# By kind of job: the parameter of its notebook that takes up a job again.
PARAMETERS = {"classification": "job_name", "segmentation": "segmentation_job"}
_NAMES = "loss eval_loss eval_accuracy eval_f1 test_accuracy test_f1 train_samples_per_second"
# Where SageMaker finds metrics: in the lines that Trainer logs.
METRICS = [
    MetricDefinition(name=name.replace("_", ":", 1), regex=rf"'{name}': '?([0-9][0-9.e+-]*)")
    for name in _NAMES.split()
]
# GB of the disk that comes with an instance, from EC2's pages of instance types.
OWN_DISK = {
    "ml.g4dn.xlarge": 125, "ml.g4dn.2xlarge": 225, "ml.g4dn.4xlarge": 225, "ml.g4dn.8xlarge": 900,
    "ml.g4dn.12xlarge": 900, "ml.g4dn.16xlarge": 900, "ml.g5.xlarge": 250, "ml.g5.2xlarge": 450,
    "ml.g5.4xlarge": 600, "ml.g5.8xlarge": 900, "ml.g5.12xlarge": 3800, "ml.g6.xlarge": 250,
    "ml.g6.2xlarge": 450, "ml.g6.4xlarge": 600, "ml.g6.8xlarge": 900, "ml.g6.12xlarge": 3760,
}  # fmt: skip
# What a job's failure says, and what to do. notebooks/troubleshooting.md has the whole table.
REMEDIES = [
    (r"CapacityError", "AWS has no free machine of this type: try later, or another instance_type, "
     "or several (how_to/train_for_less.ipynb)"),
    (r"429 Client Error|Too Many Requests|GatedRepo", "download the model once on your computer, "
     "and choose its folder in notebook 2; never put a token into the request"),
    (r"AccessDenied|download failed", "the execution role may not read or write there: its bucket "
     "and prefix must be those of notebook 1; clips in another bucket need a statement"),
    (r"requested image|pull algorithm|Access denied for repository",
     "the image cannot be fetched: take the address that launch.image returns for your Region"),
    (r"No matching distribution|[Tt]imed out", "the job has no way to the package index: it needs "
     "a NAT gateway, or an image with the packages in it"),
    (r"out of memory|OutOfMemory", "the clips of one step do not fit into the GPU: half of "
     "train_batch_size, and gradient_accumulation_steps = 2"),
    (r"exit code: 137|SIGKILL", "the machine's own memory was full: fewer "
     "dataloader_num_workers, or an instance with more memory"),
    (r"No space left", "the disk is full: an instance with a larger disk, or FastFile "
     "(how_to/train_on_many_machines.ipynb)"),
    (r"loss nan|non-finite", "the run has diverged: a lower learning_rate in notebook 2"),
    (r"not used by the HfArgumentParser|unknown flag",
     "the script has no such flag: correct the name; python ../scripts/train.py --help lists all"),
    (r"clips cannot be read|mixes up the frames",
     "run prepare_clips.py on the clips, and train on what it wrote"),
    (r"torch sees none", "the image does not fit the driver: a newer image, see launch.image"),
]  # fmt: skip
ANY_REMEDY = "do what the message says; the lines above it in the log say more"
# The command of a SourceCode for several GPUs or machines: f"{TORCHRUN} train.py". The variables
# are those of the SDK's start script, and torchrun's flags those of its Torchrun driver. torchrun
# passes the signal on; it would end the script after 30 s, and SageMaker gives 120.
TORCHRUN = (
    "exec env TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 NCCL_SOCKET_IFNAME=$SM_NETWORK_INTERFACE_NAME "
    "torchrun --nnodes=$SM_HOST_COUNT --node_rank=$SM_CURRENT_HOST_RANK "
    "--nproc_per_node=$((SM_NUM_GPUS>0?SM_NUM_GPUS:1)) "
    "--master_addr=$SM_MASTER_ADDR --master_port=$SM_MASTER_PORT"
)


def _environment() -> dict[str, str]:
    """What the script finds in its environment; never a key or password: the console shows it."""
    found = {
        "TENSORBOARD_LOGGING_DIR": "/opt/ml/output/tensorboard",
        "PYTHONUNBUFFERED": "1",  # each line is in the log at once
        "PIP_QUIET": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    command = ["git", "-C", str(account.HERE), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # there is no git
        return found
    return found | ({"GIT_COMMIT": git.stdout.strip()} if git.returncode == 0 else {})


ENVIRONMENT = _environment()


def _without_hint(record) -> bool:
    """Drops the SDK's warning that a command gets no hyperparameters: `arguments` passes them."""
    return "when 'command' is used" not in record.getMessage()


logging.getLogger("sagemaker.core.utils.utils").addFilter(_without_hint)


# ---- The parts of a request ----------------------------------------------------------------------


def new_run(here, job_name=None) -> SimpleNamespace:
    """A new S3 folder for one job: its `session` (of the SDK), `output` and `checkpoints`.

    The folders are in run.json before anything is in them. `job_name`: nothing is written down,
    because that job has its folders.
    """
    for field in ("homes", "jobs", "quotas", "dollars_per_hour"):
        if field not in here.run:
            raise RuntimeError(f"run.json has no {field}: run 01_setup.ipynb first")
    bucket = here.run["bucket"]
    output = _new_folder(here, "{time}")
    # With a slash: SageMaker restores what begins with this text, a folder `...-2` included.
    checkpoints = _new_folder(here, "checkpoints/{time}") + "/"
    if not job_name:
        here.add("homes", f"{output}/", checkpoints)
    rich.reconfigure(force_jupyter=False, force_terminal=False, quiet=True)
    log = logging.getLogger("sagemaker.core.resources")
    log.handlers, log.propagate = [logging.NullHandler()], False  # follow prints the job's log

    def note(params, **_):  # before the request goes out: a kernel that dies now loses no job
        here.add("jobs", f"training-job/{params['TrainingJobName']}")

    event = "provide-client-params.sagemaker.CreateTrainingJob"
    here.session.events.register(event, note, unique_id="note-job")
    no_telemetry = {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}
    session = Session(
        here.session,
        default_bucket=bucket,
        default_bucket_prefix=output.removeprefix(f"s3://{bucket}/"),
        sagemaker_config={"SchemaVersion": "1.0", "SageMaker": no_telemetry},
    )
    return SimpleNamespace(session=session, output=output, checkpoints=checkpoints)


def _new_folder(here, name: str) -> str:
    """The S3 address of a folder that run.json does not have yet; {time} in `name` is the time."""
    while True:
        folder = name.replace("{time}", time.strftime("%Y%m%d-%H%M%S"))
        address = f"s3://{here.run['bucket']}/{here.run['prefix']}/{folder}"
        if f"{address}/" not in here.run["homes"]:
            return address
        time.sleep(0.1)


def upload(here, job_name=None, kms_key=None, **more) -> tuple[list[InputData], dict]:
    """Brings the job's inputs to S3: (channels, flags).

    `channels` are `train`, the data set of run.json; `model`, if the model that notebook 2 chose is
    a folder; and `more`, as name=folder or name="s3://...". An s3:// address is used where it is.
    A folder that was uploaded before, and is unchanged, is not uploaded again. `flags` are the
    choices of notebook 2 without what became a channel. `job_name`: nothing is uploaded for a job
    that runs already. Raises ValueError and FileNotFoundError with the channel's name.
    """
    flags, sources = dict(here.run.get("choices") or {}), {"train": here.run.get("dataset")} | more
    model = str(flags.get("model_name", ""))
    if "model" not in more and (model.startswith("s3://") or Path(model or "-").is_dir()):
        sources["model"] = model
    if "model" in sources:
        flags.pop("model_name", None)
    if job_name:
        return [], flags
    if "model_name" in flags and Path(model).is_file():
        raise ValueError(
            f"{model} is a file of this computer, which the job cannot see. Make a folder of it, "
            "and choose the folder in notebook 2: python scripts/videomae_v2.py FILE FOLDER"
        )
    if not sources["train"]:
        raise RuntimeError("run.json has no dataset: run 02_local_smoke_train.ipynb first")
    for name, source in sources.items():
        if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in RESERVED:
            raise ValueError(
                f"channel {name!r}: ASCII letters, digits and _ only, because the name becomes a "
                f"variable of a shell; and not {' or '.join(RESERVED)}"
            )
        if not str(source).startswith("s3://") and not Path(source).is_dir():
            raise FileNotFoundError(f"channel {name!r}: there is no folder {source}")
    whole = {"s3_data_type": "S3Prefix", "s3_data_distribution_type": "FullyReplicated"}
    return [
        InputData(
            channel_name=name,
            data_source=S3DataSource(s3_uri=_in_s3(here, name, str(source), kms_key), **whole),
        )
        for name, source in sources.items()
    ], flags


def _in_s3(here, name: str, source: str, kms_key) -> str:
    """The S3 address of a channel's source, which is uploaded if it is a folder."""
    if source.startswith("s3://"):
        return source if source.endswith(".tar.gz") else source.rstrip("/") + "/"
    files, left_out = files_below(source)
    facts = [(str(f.relative_to(source)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    fingerprint = hashlib.sha256(json.dumps([facts, kms_key]).encode()).hexdigest()
    uploads, key = here.run.get("uploads") or {}, str(Path(source).resolve())
    before = uploads.get(key)
    place = f"s3://{here.run['bucket']}/{here.run['prefix']}/"
    if before and before["fingerprint"] == fingerprint and before["uri"].startswith(place):
        if len(objects_below(here, before["uri"])) == len(files):
            print(f"{name}: {len(files)} files, unchanged since the last upload")
            return before["uri"]
    uri = _new_folder(here, f"uploads/{{time}}/{name}") + "/"
    here.add("homes", uri)
    bucket, _, folder = uri.removeprefix("s3://").partition("/")
    client = here.session.client("s3")
    secret = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else None

    def send(file):
        place = folder + file.relative_to(source).as_posix()
        client.upload_file(str(file), bucket, place, ExtraArgs=secret)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, files))
    here.refresh()
    this = {key: {"fingerprint": fingerprint, "uri": uri}}
    here.remember(uploads=(here.run.get("uploads") or {}) | this)
    hidden = f", {len(left_out)} hidden or side files left out" if left_out else ""
    print(f"{name}: {len(files)} files uploaded to {folder}{hidden}")
    return uri


def objects_below(here, uri: str) -> dict[str, int]:
    """{name below `uri`: bytes} of the S3 objects there."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    found = here.session.resource("s3").Bucket(bucket).objects.filter(Prefix=prefix)
    return {item.key.removeprefix(prefix): item.size for item in found}


def arguments(hyperparameters: dict) -> list[str]:
    """The flags of a script: {"epochs": 10} -> ["--epochs", "10"], written as the SDK does it.

    A request with `entry_script` needs no such list, but there a shell is the first process of the
    container, and SIGTERM, which SageMaker sends to that process alone, never reaches the script.
    `command="exec python3 train.py"` puts the script in the shell's place. The SDK gives a command
    its `args` and no hyperparameters; these stay in the request, because the console shows them.
    """
    words = []
    for name, value in hyperparameters.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def script_of(source) -> str:
    """The name of the script that a SourceCode starts, by its command or as its entry_script."""
    words = (source.command or source.entry_script or "").split()
    return next((word for word in words if word.endswith((".py", ".sh"))), "")


def candidates(compute) -> list[tuple[str, int]]:
    """(instance type, number) of the machines of a Compute: of each preference, of which a job gets
    one, or of its instance_type."""
    kinds = compute.instance_preferences or [compute]
    return [(kind.instance_type, kind.instance_count or compute.instance_count) for kind in kinds]


def image(here, instance_type: str, family: str = "pytorch-amzn2023") -> str:
    """The address of AWS's newest training image of `family` for the Region and instance.

    `family`: pytorch-amzn2023, pytorch or huggingface (has transformers in it, needs a GPU), or the
    address of any image, which is returned as it is. Raises ValueError if the SDK knows none.
    """
    if "/" in family:
        return family
    if family not in ("pytorch-amzn2023", "pytorch", "huggingface"):
        raise ValueError(f"training image {family!r}: pytorch-amzn2023, pytorch, huggingface, or "
                         "a whole address")  # fmt: skip
    _refuse_old_gpus(instance_type)
    versions = image_uris.config_for_framework(family)["training"]["versions"]
    for version in sorted(versions, key=Version, reverse=True):  # as numbers: 2.10 is above 2.9
        bases = [name for name in versions[version] if name.startswith("pytorch")]
        options = {"base_framework_version": bases[0]} if bases else {}  # Hugging Face has them
        options |= {"instance_type": instance_type, "image_scope": "training", "version": version}
        try:
            return image_uris.retrieve(family, here.run["region"], **options)
        except ValueError:  # not in this Region, or not for such an instance
            continue
    raise ValueError(f"no {family} image for {instance_type} in {here.run['region']}")


def versions(training_image: str) -> pd.DataFrame:
    """The versions of Python and packages here and in a job on this image, read from its tag.

    The packages of scripts/requirements.txt are the same, because the job installs them.
    """
    tag = training_image.rpartition(":")[2]
    python = re.search(r"py3(\d+)", tag)
    python = f"3.{python[1]}" if python else "3.12" if "amzn2023" in tag else "unknown"
    there = {"python": python, "torch": tag.split("-")[0]}
    requirements = (account.HERE.parent / "scripts" / "requirements.txt").read_text()
    there |= dict(re.findall(r"^([\w-]+)==([\w.]+)$", requirements, re.MULTILINE))
    ours = {n: platform.python_version() if n == "python" else metadata.version(n) for n in there}
    table = pd.DataFrame({"here": ours, "in the job": there})
    same = [ours[name].startswith(version) for name, version in there.items()]
    return table.assign(note=["" if equal else "differs" for equal in same])


def _refuse_old_gpus(instance_type: str) -> None:
    if re.match(r"ml\.p[23]", instance_type):
        raise ValueError(
            f"{instance_type}: today's images are built for CUDA 13, which leaves V100 and K80 "
            "out. Take ml.g4dn.xlarge, ml.g5.xlarge or ml.g6.xlarge."
        )


def gpus_of(instance_type: str, region: str, if_unknown: int = 2) -> int:
    """How many GPUs an instance has. `if_unknown`: the answer for a new type with some."""
    if instance_type in account.INSTANCES:
        return account.INSTANCES[instance_type].gpus
    unknown = if_unknown if re.match(r"ml\.[gp]\d", instance_type) else 0
    return gpus_by_instance(region).get(instance_type, {}).get("Count", unknown)


def has_own_disk(instance_type: str) -> bool:
    """Whether the instance comes with a local disk, of a fixed size and encrypted in hardware."""
    types = r"ml\.(g4dn|g5|g6e?|g7e|p3dn|p4de?|p5e?n?|p6e?-\w+|trn\dn?|[cmr]\d\w*d\w*)\."
    return bool(re.match(types, instance_type))


# ---- Before money is spent -----------------------------------------------------------------------


def check(here, trainer, max_cost_usd: float, minutes: float | None = None, job_name=None) -> None:
    """Prints quota, data, expected minutes and cost, and the most that the job can cost.

    Raises ValueError, FileNotFoundError or RuntimeError for a request that SageMaker would refuse,
    that would fail in the job, or that could cost more than `max_cost_usd`. `minutes`: the expected
    ones, where they cannot be computed from run.json. `job_name`: that job is paid for already.
    """
    if job_name:
        return print(f"{job_name} was launched before: nothing to check")
    kinds, retries = candidates(trainer.compute), trainer._retry_strategy
    for instance, _ in kinds:
        _refuse_old_gpus(instance)
    check_name(trainer.base_job_name)
    check_script(trainer.source_code)
    check_hyperparameters(trainer.hyperparameters or {})
    check_command(trainer)
    check_machines(here, trainer)
    clips = check_data(here, trainer)
    starts = 1 + (retries.maximum_retry_attempts if retries else 0)
    check_money(here, trainer.compute, trainer.stopping_condition, max_cost_usd, starts=starts)
    most = (trainer.stopping_condition.max_runtime_in_seconds or 86400) / 60
    computed = expected_minutes(here, trainer, clips) if minutes is None else None
    minutes = computed if minutes is None else minutes
    if minutes is None:
        print("expected: not known for this instance type and model")
    else:
        price = max(here.run["dollars_per_hour"][name] * count for name, count in kinds)
        less = ", less on spot" if trainer.compute.enable_managed_spot_training else ""
        print(f"expected: {minutes:.0f} minutes, ${price * minutes / 60:.2f}{less}")
    if computed:
        print(f"          ({START_MINUTES} minutes assumed to start machine, image and packages; "
              f"{computed - START_MINUTES:.1f} for {_epochs(trainer):g} epochs)")  # fmt: skip
    if minutes and minutes > most:
        raise RuntimeError(
            f"Expected are {minutes:.0f} minutes, and SageMaker stops the job after {most:.0f}, "
            f"without a model. Set max_minutes to {2 * minutes:.0f} or more, or take fewer epochs, "
            'freeze = "backbone", or a faster instance_type.'
        )
    trainer.train(dry_run=True)  # the SDK's own checks; the code goes to S3, as it will for the job


def check_name(name: str) -> None:
    """Raises ValueError for a base_job_name that SageMaker refuses, or that the SDK changes."""
    if not re.fullmatch(r"[A-Za-z0-9](-*[A-Za-z0-9])*", name) or len(name) > 48:
        raise ValueError(
            f"base_job_name {name!r}: 1 to 48 ASCII letters, digits and dashes, such as "
            f"{re.sub('[^A-Za-z0-9]+', '-', name).strip('-')[:48] or 'video-classification'!r}"
        )


def check_script(source) -> None:
    """Raises RuntimeError for a script of which a notebook has written the first cells only."""
    script = Path(source.source_dir, script_of(source))
    text = script.read_text()
    try:
        compile(text, script.name, "exec")
        whole = "__main__" in text
    except SyntaxError:
        whole = False
    if not whole:
        raise RuntimeError(
            f"{script} is not complete: run the notebook that writes it (02 or 05) to its end"
        )


def check_hyperparameters(hyperparameters: dict) -> None:
    """Raises ValueError for the first one that would not arrive at the script as it is."""
    if len(hyperparameters) > 100:
        raise ValueError(f"{len(hyperparameters)} hyperparameters; SageMaker takes 100")
    for name, value in hyperparameters.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        why = None
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,256}", name):
            why = (
                "the name must have 1 to 256 ASCII letters, digits, _ or -: a dot breaks the start"
            )
        elif value is None:
            why = "would arrive as the word null: leave it out"
        elif isinstance(value, str) and "/" in value and Path(value).exists():
            why = "a path of this machine, not of the job's: make it a channel"
        elif "'" in text:
            why = "an apostrophe would break the start script: rename the file or folder"
        elif len(text) > 2500:
            why = "longer than 2,500 characters: put it into a file of a channel"
        if why:
            raise ValueError(f"hyperparameter {name}={text[:100]!r}: {why}")


def check_command(trainer) -> None:
    """Raises ValueError for a command that hides SIGTERM from the script, or lacks its flags."""
    source = trainer.source_code
    if not source.command:
        return
    if not source.command.startswith("exec "):
        raise ValueError(
            f"command {source.command!r}: begin it with exec. Else a shell stays the first process "
            "of the container, and the script never hears that its job is stopped or interrupted"
        )
    if [str(word) for word in source.args or []] != arguments(trainer.hyperparameters or {}):
        raise ValueError(
            "args and hyperparameters differ: the script gets args, and the console shows "
            "hyperparameters. Write args=launch.arguments(hyperparameters), and run the cell of "
            "the request again"
        )


def check_machines(here, trainer) -> None:
    """Raises ValueError for machines that would be paid and not used, or that exclude others."""
    compute, limits = trainer.compute, trainer.stopping_condition
    torchrun = trainer.distributed or "torchrun" in (trainer.source_code.command or "")
    kinds = candidates(compute)
    if trainer.training_input_mode not in ("File", "FastFile"):
        raise ValueError(
            f"input_mode is {trainer.training_input_mode!r}: it must be File or FastFile"
        )
    for instance, count in kinds:
        gpus = gpus_of(instance, here.run["region"], if_unknown=1)
        if not torchrun and max(gpus, count) > 1:
            raise ValueError(
                f"{count} x {instance}: several GPUs or machines need torchrun in the command of "
                "the request. Without it one slow process serves all GPUs of a machine, and each "
                "machine trains for itself. how_to/train_on_many_machines.ipynb has the request."
            )
    if len({gpus_of(name, here.run["region"], if_unknown=1) > 0 for name, _ in kinds}) > 1:
        raise ValueError("instance_preferences: one image runs all, so all with a GPU, or none")
    if compute.enable_managed_spot_training and compute.keep_alive_period_in_seconds:
        raise ValueError("spot and keep_warm exclude each other: set one of them")
    wait = limits.max_wait_time_in_seconds or 0
    if compute.enable_managed_spot_training and wait < limits.max_runtime_in_seconds:
        raise ValueError(
            f"max_wait is {wait}: it must be max_runtime, {limits.max_runtime_in_seconds}, or more"
        )


def check_data(here, trainer) -> dict[str, int]:
    """Prints what the channels hold, and returns {split: clips} of `train`, from S3's listing.

    Raises ValueError or FileNotFoundError for a channel that is empty, the whole of a bucket, or
    too large for the disk, and for a `train` channel of train.py without train/<label>/<clip>.
    """
    gigabytes, clips = 0, {}
    for channel in trainer.input_data_config or []:
        name, uri = channel.channel_name, channel.data_source.s3_uri
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        if not key.strip("/"):
            raise ValueError(
                f"channel {name!r}: {uri} is the whole bucket, and the job would fetch all of it. "
                f"Name a folder: s3://{bucket}/my_clips"
            )
        found = objects_below(here, uri)
        files = {name: size for name, size in found.items() if size}
        if not files:
            folders = f" but {len(found)} empty objects (folders of the console)" if found else ""
            raise FileNotFoundError(f"channel {name!r}: nothing lies below {uri}{folders}")
        gigabytes += sum(files.values()) / 1e9
        print(f"data:     {name}: {len(files)} files, {sum(files.values()) / 1e6:.1f} MB")
        if name == "train" and script_of(trainer.source_code) == "train.py":
            clips = _clips_by_split(uri, list(files))
    size, disks = trainer.compute.volume_size_in_gb or 30, {}
    for instance, _ in candidates(trainer.compute):
        disks[instance] = OWN_DISK.get(instance, float("inf")) if has_own_disk(instance) else size
    instance = min(disks, key=disks.get)  # of several, the one that would fail
    disk = disks[instance]
    if trainer.training_input_mode == "File" and gigabytes + SPARE_GB > disk:
        raise ValueError(
            f"The data has {gigabytes:.0f} GB, packages and checkpoints need {SPARE_GB} more, and "
            f"the disk of {instance} has {disk}. Raise volume_size_in_gb (instances without a disk "
            "of their own), take a larger instance_type, or FastFile "
            "(how_to/train_on_many_machines.ipynb)."
        )
    return clips


def _clips_by_split(uri: str, names: list[str]) -> dict[str, int]:
    """{split: clips} of a data set in S3. Raises ValueError with the address that would fit."""
    shown = [name.split("/") for name in names if "/." not in f"/{name}"]
    shown = [parts for parts in shown if not any(p.lower() in CLUTTER for p in parts)]
    videos = [parts for parts in shown if parts[-1].lower().endswith(FORMATS)]
    labelled = [parts for parts in videos if parts[0] == "train" and len(parts) > 2]
    if labelled:
        splits = [parts[0] for parts in videos if len(parts) > 2]
        return {split: splits.count(split) for split in sorted(set(splits))}
    lists = (*ARCHIVES, ".csv", ".jsonl", ".txt")
    if uri.endswith(ARCHIVES) or any(
        p[-1] in TABLES or (len(p) == 1 and p[0].lower().endswith(lists)) for p in shown
    ):
        return {}  # an archive or a table: train.py reads them
    above = uri.rstrip("/").split("/")
    inside = {"/".join(p[: p.index("train")]) for p in videos if "train" in p[1:-2]}
    if "train" in above[3:]:  # s3://bucket/clips/train/
        fits = f"The address is too deep; this one fits: {'/'.join(above[: above.index('train')])}/"
    elif inside:
        fits = f"The address is too high; this one fits: {uri}{sorted(inside)[0]}/"
    elif any(parts[0] == "train" for parts in videos):
        fits = "Put each clip into the folder of its label."
    else:
        fits = "Put the clips into such folders, or name the folder that holds train/."
    example = "/".join((videos or shown or [["nothing but hidden files"]])[0])
    raise ValueError(
        f"channel 'train': {uri} must hold train/<label>/<clip>, and holds {example}. {fits}"
    )


def check_money(here, compute, limits, max_cost_usd, use="training job usage", starts=1) -> float:
    """Prints the quotas and the most that a job costs; raises RuntimeError if one forbids it.

    `compute` and `limits` are the request's Compute and StoppingCondition. Returns dollars: those
    of the dearest machines, for max_runtime (on spot max_wait, with each new start in it), `starts`
    times the start, and the end. Spot costs less than this price, by how much is not known before.
    """
    spare, warm = compute.enable_managed_spot_training, compute.keep_alive_period_in_seconds or 0
    quotas, costs = here.run["quotas"], {}  # null: notebook 1 could not ask
    for instance, machines in candidates(compute):
        for kind in [
            f"{'spot ' if spare else ''}{use}",
            *["training warm pool usage"] * bool(warm),
        ]:
            name, known = f"{instance} for {kind}", account.quota_of(quotas, instance, kind)
            print(f"quota:    {name}: {known}")
            if known == "not listed" or (known != "not known" and known < machines):
                raise RuntimeError(
                    f"The quota {name!r} is below {machines} ({known}). Ask for more "
                    "(01_setup.ipynb has the link), and run that notebook again when AWS has "
                    "agreed. If AWS lists none, choose another type or Region. Until then: "
                    'instance_type = "ml.m5.xlarge" with freeze = "backbone".'
                )
        price = account.price(here, instance)
        if price is None:
            raise RuntimeError(
                f"No price of {instance}: the launch cannot be limited by its cost. Take a type "
                "that 01_setup.ipynb lists, or fetch its price: how_to/train_for_less.ipynb."
            )
        print(f"price:    {machines} x {instance}, ${price} an hour each")
        costs[instance] = machines * price
    running = (limits.max_wait_time_in_seconds if spare else limits.max_runtime_in_seconds) or 86400
    parts = {
        "until SageMaker stops it": running / 60,
        "to start": MOST_START_MINUTES * starts,
        "to stop": GRACE_MINUTES,
        "to upload": UPLOAD_MINUTES,
    } | ({"in the warm pool": warm / 60} if warm else {})
    most = max(costs.values()) * sum(parts.values()) / 60
    minutes = " + ".join(f"{value:g} {name}" for name, value in parts.items())
    print(f"at most:  ${most:.2f}")
    print(f"          (minutes: {minutes}; start and upload assumed)")
    if most > max_cost_usd:
        raise RuntimeError(
            f"At most ${most:.2f} is above max_cost_usd = {max_cost_usd}. Lower max_minutes, or "
            "raise max_cost_usd."
        )
    return most


def expected_minutes(here, trainer, clips: dict[str, int]) -> float | None:
    """Minutes of a job of train.py, start included; None if an instance or model is not known.

    From clips {split: number}, the model's operations, and what the instance is taken to do; of
    several preferred instances, the slowest. A clip is trained on by 3 forward passes' work, or by
    1 if the backbone is frozen.
    """
    flags, counts = trainer.hyperparameters or {}, clips or here.run.get("clip_counts") or {}
    gflop = here.run.get("gflop")
    if script_of(trainer.source_code) != "train.py" or not (gflop and counts):
        return None
    rates = [  # forward passes a second
        (account.clips_per_second(instance, gflop) or 0) * machines
        for instance, machines in candidates(trainer.compute)
    ]
    if not all(rates):
        return None
    work = 1 if flags.get("freeze") == "backbone" else 3
    passes = _epochs(trainer) * (work * counts.get("train", 0) + counts.get("validation", 0))
    passes += counts.get("validation", 0) + counts.get("test", 0)
    return START_MINUTES + passes / min(rates) / 60


def _epochs(trainer) -> float:
    flags = trainer.hyperparameters or {}
    return float(flags.get("epochs", flags.get("num_train_epochs", 10)))


# ---- The job -------------------------------------------------------------------------------------


def start(here, trainer, job_name: str | None = None, kind: str = "classification") -> str:
    """Starts the job, writes its name into run.json, and returns the name without waiting.

    `job_name`: takes up this job instead, and launches nothing. `kind`: classification writes
    training_job_name, where notebook 4 looks; any other writes <kind>_job_name.
    """
    field = "training_job_name" if kind == "classification" else f"{kind}_job_name"
    if job_name:
        describe(here, job_name)
        here.remember(**{field: job_name})
        print(f"{job_name} was launched before: nothing new is started")
        return job_name
    if getattr(trainer, "_latest_training_job", None):
        job_name = trainer._latest_training_job.training_job_name
        print(f"{job_name} was started by this request already. For one more job, run all cells.")
        return job_name
    trainer.train(wait=False, logs=False)
    if trainer._latest_training_job is None:  # the SDK swallows an interrupt
        raise RuntimeError(
            "The launch was interrupted, and the job may run all the same. launch.stop(here) stops "
            "it. Then run all cells again."
        )
    job_name = trainer._latest_training_job.training_job_name
    here.add("jobs", f"training-job/{job_name}")
    here.remember(**{field: job_name})
    back = f"launch.follow(here, {job_name!r})"
    if kind in PARAMETERS:
        back = f"{PARAMETERS[kind]} = {job_name!r}"
    print(f"{job_name} is started. To come back to it later: {back}")
    return job_name


def describe(here, job: str) -> dict:
    """DescribeTrainingJob. Raises RuntimeError with the jobs of run.json if there is no such."""
    try:
        return here.session.client("sagemaker").describe_training_job(TrainingJobName=job)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("ValidationException", "ResourceNotFound"):
            raise
        known = [item.split("/")[1] for item in here.run["jobs"] if item.startswith("training")]
        raise RuntimeError(
            f"There is no training job {job!r} in {here.run['region']}. run.json knows: "
            f"{', '.join(known) or 'none'}. job_name = None launches a new one."
        ) from error


class JobLog:
    """Prints what is new in a job's log: of a training job, no lines of the SDK's start script."""

    def __init__(self, here, job: str, group: str = LOG_GROUP):
        self.client, self.job, self.group = here.session.client("logs"), job, group
        self.whole = group != LOG_GROUP  # the start of a processing job is another
        self.tokens, self.begun = {}, set()  # by stream, one of each machine

    def print_new(self) -> None:
        where = {"logGroupName": self.group}
        try:
            found = self.client.describe_log_streams(**where, logStreamNamePrefix=f"{self.job}/")
        except self.client.exceptions.ResourceNotFoundException:  # the account's first job
            return
        for stream in (stream["logStreamName"] for stream in found["logStreams"]):
            while True:
                more = {"nextToken": self.tokens[stream]} if stream in self.tokens else {}
                page = self.client.get_log_events(
                    **where, logStreamName=stream, startFromHead=True, **more
                )
                for event in page["events"]:
                    self._print(stream, event["message"])
                if page["nextForwardToken"] == self.tokens.get(stream):  # the end, as yet
                    break
                self.tokens[stream] = page["nextForwardToken"]

    def _print(self, stream: str, line: str) -> None:
        if line.startswith("Starting training script"):
            self.begun.discard(stream)
        elif line.startswith(("Installing requirements", "Executing command")):
            self.begun.add(stream)
        if (self.whole or stream in self.begun) and not re.match(r"\++ ", line):
            host = re.search(r"/algo-(\d+)", stream)[1]
            print(line if host == "1" else f"{host}: {line}", flush=True)


def follow(here, job: str) -> None:
    """Prints the log of a job, live, until the job ends; all of it, if it has ended.

    Raises RuntimeError with the script's reason and a remedy if the job failed or was stopped.
    An interrupt ends the waiting, not the job.
    """
    log, phases = JobLog(here, job), 0
    try:
        while True:
            described = describe(here, job)  # before the log: what is said until then is in it
            changes = described["SecondaryStatusTransitions"]
            for change in changes[phases:]:
                print(f"{change['StartTime']:%H:%M:%S} -- {change['Status']}", flush=True)
            phases = len(changes)
            log.print_new()
            if described["TrainingJobStatus"] in ("Completed", "Failed", "Stopped"):
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"The job goes on, and is paid for. To come back to it: set its name, {job!r}, in the "
            "parameters, then run all cells. To stop it: launch.stop(here)"
        ) from None
    if described["TrainingJobStatus"] == "Failed":
        raise RuntimeError(explain(described.get("FailureReason", "")))
    if described["TrainingJobStatus"] == "Stopped":
        print(_why_stopped(described))


def explain(reason: str) -> str:
    """What SageMaker says of a failed job, its script's own words first, and what to do."""
    said = reason.removeprefix("AlgorithmError: ").strip()
    if not said.strip(", ") or said.startswith(", exit code"):
        said = f"The script gave no reason{said}"
    remedies = [remedy for pattern, remedy in REMEDIES if re.search(pattern, said)]
    return f"{said}\nWhat to do: {(remedies or [ANY_REMEDY])[0]}. All cases: troubleshooting.md"


def _why_stopped(described: dict) -> str:
    """One sentence for a job that ended without being completed or failed."""
    return {
        "MaxRuntimeExceeded": "Stopped: slower than max_minutes. There is no model. Raise it.",
        "MaxWaitTimeExceeded": "Stopped: no spot capacity for so long. Take spot = False.",
    }.get(described["SecondaryStatus"], "Stopped by you. There is no model; checkpoints are in S3.")


def result(here, job: str) -> dict:
    """Prints status, cost, phases and metrics of a job, and returns its description.

    The cost is an estimate: billed seconds times the price of notebook 1, kept machines included.
    """
    described = describe(here, job)
    billed = described.get("BillableTimeInSeconds", 0)
    trained = described.get("TrainingTimeInSeconds", 0)
    instance, machines = machines_of(described)
    print(f"{job}: {described['TrainingJobStatus']}, trained {trained} s, billed {billed} s")
    if described.get("EnableManagedSpotTraining") and trained:
        print(f"  spot saved {1 - billed / trained:.0%}")
    kept = described.get("WarmPoolStatus", {}).get("ResourceRetainedBillableTimeInSeconds", 0)
    price = here.run["dollars_per_hour"].get(instance)
    if price is not None:
        dollars = machines * (billed + kept) / 3600 * price
        print(f"  about ${dollars:.4f} on AWS: {machines} x {instance}, ${price} an hour")
    for phase in described["SecondaryStatusTransitions"]:
        end = phase.get("EndTime") or datetime.now(UTC)  # a job that runs is in its last phase
        seconds = (end - phase["StartTime"]).total_seconds()
        print(f"  {phase['StartTime']:%H:%M:%S} {phase['Status']:12} {seconds:6.0f} s")
    for metric in sorted(described.get("FinalMetricDataList", []), key=lambda m: m["MetricName"]):
        print(f"  {metric['MetricName']:24} {metric['Value']:.4f}")
    return described


def machines_of(described: dict) -> tuple[str, int]:
    """(instance type, number) on which a job runs, or for a list of preferences, the one it got."""
    compute = described["ResourceConfig"]
    instance = compute.get("SelectedInstanceType") or compute.get("InstanceType", "no machine yet")
    return instance, compute.get("SelectedInstanceCount") or compute.get("InstanceCount", 0)


def links(here, job: str) -> None:
    """Prints the addresses of a job, its log and its machine's graphs in the AWS console."""
    console = f"https://{here.run['region']}.console.aws.amazon.com"
    region = f"region={here.run['region']}"
    streams = LOG_GROUP.replace("/", "$252F") + f"$3FlogStreamNameFilter$3D{job}$252F"
    search = f"query=~'*7b*2faws*2fsagemaker*2fTrainingJobs*2cHost*7d*20{job}"
    print(f"job:      {console}/sagemaker/home?{region}#/jobs/{job}")
    print(f"log:      {console}/cloudwatch/home?{region}#logsV2:log-groups/log-group/{streams}")
    print(f"machine:  {console}/cloudwatch/home?{region}#metricsV2:graph=~();{search}")


def show_streams(here, job: str, lines: int = 4) -> None:
    """Prints the last lines of each log stream of a job, that is, of each of its machines."""
    logs = here.session.client("logs")
    found = logs.describe_log_streams(logGroupName=LOG_GROUP, logStreamNamePrefix=f"{job}/")
    for stream in (stream["logStreamName"] for stream in found["logStreams"]):
        events = logs.get_log_events(logGroupName=LOG_GROUP, logStreamName=stream)["events"]
        print(f"{stream.removeprefix(f'{job}/')}: {len(events)} lines; the last ones:")
        for event in events[-lines:]:
            print("  ", event["message"][:100])


def stop(here, *jobs: str) -> None:
    """Stops jobs that still run, and gives up machines that wait in a warm pool.

    `jobs`: names; without any, all jobs of run.json.
    """
    sagemaker = here.session.client("sagemaker")
    for item in reversed(here.run["jobs"]):
        kind, name = item.split("/")
        if jobs and name not in jobs:
            continue
        try:
            if kind == "processing-job":
                found = sagemaker.describe_processing_job(ProcessingJobName=name)
                if found["ProcessingJobStatus"] == "InProgress":
                    sagemaker.stop_processing_job(ProcessingJobName=name)
                    print(name, "is asked to stop")
            elif kind == "training-job":
                print(name, _stop_training(sagemaker, name))
        except ClientError as error:  # a record that was deleted must not protect the next job
            print(name, error.response["Error"]["Message"])


def _stop_training(sagemaker, name: str) -> str:
    """Stops a training job, or gives up its warm machine; returns the job's status."""
    found = sagemaker.describe_training_job(TrainingJobName=name)
    if found["TrainingJobStatus"] == "InProgress":
        sagemaker.stop_training_job(TrainingJobName=name)
    elif found.get("WarmPoolStatus", {}).get("Status") == "Available":
        waits = {"KeepAlivePeriodInSeconds": 0}
        sagemaker.update_training_job(TrainingJobName=name, ResourceConfig=waits)
    return sagemaker.describe_training_job(TrainingJobName=name)["TrainingJobStatus"]
