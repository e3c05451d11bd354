"""An AWS account on this machine, so that the notebooks run without one.

It is moto (S3, IAM, STS, CloudWatch Logs, SageMaker, ...) as a server on 127.0.0.1, extended where
moto stops short: a training job really runs, by the request's own entry point, without Docker and
without root; a job can be stopped, interrupted and deleted; SageMaker's quotas are answered.

    python notebooks/local_mode/aws.py start        # and: status, stop, interrupt JOB

The account lives in the server's memory: buckets, roles, jobs and logs are gone when it stops.
The server outlives the notebook that started it. Its one folder, <temp>/embedded-aws-<uid>-<port>,
holds `pid`, `server.log` and `jobs/<job>/<host>/`, laid out as a container's /opt/ml; `stop`
deletes it.

What differs from the service, on purpose: a job runs in your own Python environment, not in the
image that it names, and pip installs its requirements there. Hosts are called 127.0.0.1,
127.0.0.2, ...; of several hosts only the first one's model, output and checkpoints are kept.
FastFile is staged as File. Checkpoints lie below /opt/ml. A spot job is billed 30 % of its time.
A stopped job's script gets SIGTERM, as the API's documentation has it; users of AWS's own images
report that a shell in between swallows it (aws/deep-learning-containers#632): rely on checkpoints.

Whoever can log in to this machine can reach the port. Linux and macOS; on Windows use WSL.
"""

import argparse
import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import psutil

PORT = 5599
GRACE_SECONDS = 120  # between SIGTERM and SIGKILL, as the service has it
SYNC_SECONDS = 3  # between two looks at the checkpoints
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
# What a job sees of your environment: what a machine needs, and no secret of yours.
INHERITED = re.compile(
    r"HOME|USER|LANG|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS"
    r"|HF_HOME|HF_ENDPOINT|HF_HUB_OFFLINE|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|(?i:https?|no)_(?i:proxy)"
)
_servers = []  # started here; a Popen that is forgotten warns about a process meant to live on


# What notebooks call ------------------------------------------------------------------------------
def connect(endpoint_url):
    """Point this process at the embedded AWS, and start that if need be. None means AWS itself."""
    if endpoint_url is None:
        return None
    address = urlsplit(endpoint_url)
    if address.scheme != "http" or address.hostname not in ("127.0.0.1", "localhost"):
        raise ValueError(
            f"endpoint_url is {endpoint_url!r}: it must be None (AWS itself) or a loopback address "
            f"such as http://127.0.0.1:{PORT} (the embedded AWS)."
        )
    url = start(address.port or PORT)
    for name in list(os.environ):  # each of these would win over what is set below
        if name in ("AWS_PROFILE", "AWS_SESSION_TOKEN") or re.match(r"AWS_.*ENDPOINT_URL", name):
            del os.environ[name]
    # The account starts empty, so the role that you name need not exist in it.
    os.environ.update(_aws_variables(url), SAGEMAKER_VALIDATE_ROLE="false")
    return url


def disconnect(endpoint_url):
    """End the embedded AWS at `endpoint_url`; AWS itself (None) is left alone."""
    if endpoint_url is not None:
        stop(urlsplit(endpoint_url).port or PORT)


def start(port=PORT, grace_seconds=GRACE_SECONDS):
    """Start the embedded AWS on 127.0.0.1:`port`, unless it runs there already; return its URL."""
    url, running = f"http://127.0.0.1:{port}", status(port)
    if running and running["python"] == sys.prefix:
        return url
    if running:
        raise RuntimeError(
            f"The embedded AWS on port {port} runs its jobs with the Python of {running['python']},"
            f" and you are in {sys.prefix}. Stop it (aws.py stop --port {port}), or name another "
            f"port, for example {port + 1}."
        )
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise RuntimeError(
                f"Port {port} of 127.0.0.1 is in use by another program, or by another user. Name "
                f"another port, for example {port + 1}; `lsof -i :{port}` tells who has this one."
            )
    state = _state_folder(port)
    # The SDK's driver scripts do not quote: this link has no space, wherever Python lies.
    with contextlib.suppress(FileExistsError):  # another start, at the same time
        (state / "python").unlink(missing_ok=True)
        (state / "python").symlink_to(sys.prefix)
    environment = {name: value for name, value in os.environ.items() if INHERITED.fullmatch(name)}
    environment["PATH"] = f"{state}/python/bin:{os.environ.get('PATH', os.defpath)}"
    command = [sys.executable, __file__, "serve", f"--port={port}", f"--grace={grace_seconds}"]
    with open(state / "server.log", "w") as log:
        server = subprocess.Popen(
            command,
            cwd=state,
            env=environment | _aws_variables(url),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # out of reach of a kernel's interrupt and of its end
        )
    _servers.append(server)
    (state / "pid").write_text(str(server.pid))
    deadline = time.monotonic() + 120
    while not status(port):
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            tail = (state / "server.log").read_text()[-2000:]
            raise RuntimeError(f"No start on port {port}; {state}/server.log ends with:\n{tail}")
        time.sleep(0.1)
    return url


def status(port=PORT):
    """Return what the embedded AWS on `port` tells of itself, or None if none of yours is there."""
    try:
        answer = _ask(port, "GET", "/_embedded_aws")
    except (OSError, http.client.HTTPException, ValueError):
        return None
    return answer if isinstance(answer, dict) and answer.get("user") == os.getuid() else None


def stop(port=PORT):
    """End the server on `port` and all of its jobs, delete its folder, and tell if it ran."""
    state, running, family = _state_folder(port), status(port), []
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        # A server that hangs is known by the file.
        server = psutil.Process(running["pid"] if running else int((state / "pid").read_text()))
        if f"--port={port}" in server.cmdline():
            server.suspend()  # it shall start nothing while its children are counted
            family = [server, *server.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    for server in _servers:
        server.poll()
    psutil.wait_procs(family, timeout=10)
    shutil.rmtree(state, ignore_errors=True)
    return bool(family)


def interrupt(job_name, port=PORT):
    """Take the spot instance away from a job: it ends, and starts again from its checkpoints."""
    answer = _ask(port, "POST", "/_embedded_aws/interrupt", json.dumps({"job": job_name}))
    if "error" in answer:
        raise ValueError(answer["error"])


def _ask(port, method, path, body=None):
    """Ask the server itself; unlike urllib and boto3, http.client knows of no proxy."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def _aws_variables(url):
    """The environment variables that lead boto3 to the embedded AWS, past any proxy."""
    bypass = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "127.0.0.1"
    bypass += "" if "127.0.0.1" in bypass else ",127.0.0.1"
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": bypass,
        "no_proxy": bypass,
    }


def _state_folder(port):
    """The server's folder, private to this user."""
    state = Path(tempfile.gettempdir()).resolve() / f"embedded-aws-{os.getuid()}-{port}"
    if not re.fullmatch(r"[\w/.+-]+", str(state)):
        raise RuntimeError(
            f"The temporary folder {state.parent} has a space or a special character in its name, "
            "and the SDK's driver scripts do not quote. Set TMPDIR, for example to /tmp."
        )
    state.mkdir(mode=0o700, exist_ok=True)
    if state.is_symlink() or state.stat().st_uid != os.getuid():
        raise RuntimeError(f"{state} belongs to somebody else. Name another port.")
    state.chmod(0o700)
    return state


# A training job, in the server --------------------------------------------------------------------
class ClientError(Exception):
    """What is wrong with a request, in the service's words."""


class TrainingJob:
    """A training job: what DescribeTrainingJob answers, and the thread that makes it true."""

    def __init__(self, request, arn, session, server):
        self.request, self.arn, self.server = request, arn, server
        self.name = self.training_job_name = request["TrainingJobName"]
        self.tags = request.pop("Tags", None) or []
        self.folder = server.state / "jobs" / self.name
        self.region = session.region_name
        self.s3 = session.client("s3", endpoint_url=server.url)
        self.logs = session.client("logs", endpoint_url=server.url)
        self.wants_stop, self.interrupted = threading.Event(), threading.Event()
        self.processes, self.events, self.metrics, self.transitions = [], [], {}, []
        self.specification = request.get("AlgorithmSpecification") or {}
        self.resources = request.get("ResourceConfig") or {}
        definitions = self.specification.get("MetricDefinitions") or []
        self.patterns = {item["Name"]: re.compile(item["Regex"]) for item in definitions}
        if not self.specification.get("ContainerEntrypoint"):
            raise ClientError("The embedded AWS runs no image: name a ContainerEntrypoint.")
        if not self.checkpoint_folder().startswith("/opt/ml/"):
            raise ClientError("CheckpointConfig: the embedded AWS needs a LocalPath in /opt/ml.")
        for channel in request.get("InputDataConfig") or []:
            self.list_channel(channel)
        folder = request["OutputDataConfig"]["S3OutputPath"].rstrip("/")
        self.output = f"{folder}/{self.name}/output"
        self.training_job_status, self.failure_reason = "InProgress", None
        self.creation_time, self.training_start_time, self.training_end_time = now(), None, None
        self.move("Starting", "Starting the training job")

    @property
    def response_object(self):
        """DescribeTrainingJob's answer: the request, and what became of it."""
        state = {
            "TrainingJobArn": self.arn,
            "TrainingJobStatus": self.training_job_status,
            "SecondaryStatus": self.transitions[-1]["Status"],
            "SecondaryStatusTransitions": self.transitions,
            "FailureReason": self.failure_reason,
            "CreationTime": self.creation_time,
            "LastModifiedTime": self.last_modified_time,
            "TrainingStartTime": self.training_start_time,
            "TrainingEndTime": self.training_end_time,
            "ModelArtifacts": {"S3ModelArtifacts": f"{self.output}/model.tar.gz"},
            "FinalMetricDataList": list(self.metrics.values()),
        }
        if self.training_start_time and self.training_end_time:
            trained = self.training_end_time - self.training_start_time
            seconds = state["TrainingTimeInSeconds"] = int(trained.total_seconds()) + 1
            spot = self.request.get("EnableManagedSpotTraining")
            state["BillableTimeInSeconds"] = max(1, int(seconds * 0.3)) if spot else seconds
        return {name: value for name, value in (self.request | state).items() if value is not None}

    @property
    def is_running(self):
        return self.training_job_status in ("InProgress", "Stopping")

    def checkpoint_folder(self):
        return (self.request.get("CheckpointConfig") or {}).get("LocalPath", "/opt/ml/checkpoints")

    def move(self, secondary, message, primary=None):
        """Go to the next secondary status. A final primary status ends the job."""
        moment = self.last_modified_time = now()
        if self.transitions:
            self.transitions[-1]["EndTime"] = moment
        self.transitions.append(
            {"Status": secondary, "StartTime": moment, "StatusMessage": message}
        )
        if primary in ("Completed", "Failed", "Stopped"):
            self.transitions[-1]["EndTime"] = self.training_end_time = moment
        self.training_job_status = primary or self.training_job_status

    def fail(self, reason):
        self.failure_reason = reason
        self.move("Failed", "Training job failed", "Failed")

    def run(self):
        """Go from Starting to Completed, Failed or Stopped."""
        try:
            while self.attempt() == "Interrupted":
                self.move("Interrupted", "The spot instance was taken back")
                self.move("Starting", "Preparing the instances for training")
                self.interrupted.clear()
        except ClientError as error:
            self.fail(f"ClientError: {error}"[:1024])
        except Exception as error:
            traceback.print_exc()  # into server.log
            self.fail(f"InternalServerError: {error}"[:1024])
        finally:
            self.kill()

    def attempt(self):
        """Stage, train, upload. Return why the training was told to end, if it was."""
        shutil.rmtree(self.folder, ignore_errors=True)  # a new instance has an empty disk
        self.move("Downloading", "Downloading input data")
        hosts = [f"127.0.0.{i + 1}" for i in range(self.resources.get("InstanceCount") or 1)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            master_port = probe.getsockname()[1]
        roots = [self.stage(host, hosts, master_port) for host in hosts]
        if self.wants_stop.is_set():
            return self.move("Stopped", "Training job stopped", "Stopped")
        self.move("Training", "Training image download completed. Training in progress.")
        self.training_start_time = self.training_start_time or now()
        why = self.train(roots, master_port)
        if why == "Interrupted":
            return why
        self.move("Uploading", "Uploading generated training model")
        self.upload(roots[0] / "output/data", "output")
        codes = [process.returncode for process in self.processes]
        if why is None and any(codes):
            # The hosts that were killed because another one failed have a negative code.
            code, root = max(zip(codes, roots, strict=True))
            code = 128 - code if code < 0 else code  # as a shell tells of a signal
            failure, ending = root / "output/failure", f", exit code: {code}"
            text = failure.read_text(errors="replace").strip() if failure.exists() else ""
            return self.fail(f"AlgorithmError: {text}"[: 1024 - len(ending)] + ending)
        self.upload(roots[0] / "model", "model")
        if why == "MaxRuntimeExceeded":
            self.move(why, "Training job runtime exceeded MaxRuntimeInSeconds provided", "Stopped")
        else:
            final = why or "Completed"
            self.move(final, f"Training job {final.lower()}", final)

    def list_channel(self, channel):
        """A channel's bucket, prefix and keys, or a ClientError that says what is wrong with it."""
        source = channel["DataSource"].get("S3DataSource") or {}
        mode = channel.get("InputMode") or self.specification["TrainingInputMode"]
        if source.get("S3DataType") != "S3Prefix" or mode not in ("File", "FastFile"):
            raise ClientError(
                f"Channel {channel['ChannelName']}: the embedded AWS reads an S3Prefix, in File or "
                "FastFile mode."
            )
        bucket, prefix = split_uri(source["S3Uri"])
        keys = list_keys(self.s3, bucket, prefix)
        if not keys:
            raise ClientError(
                f'No S3 objects found under S3 URL "{source["S3Uri"]}" given in input data source. '
                f"Please ensure that the bucket exists in the selected region ({self.region}), that"
                f" objects exist under that S3 prefix, and that the role "
                f'"{self.request.get("RoleArn")}" has "s3:ListBucket" permissions on bucket '
                f'"{bucket}".'
            )
        return bucket, prefix, keys

    def stage(self, host, hosts, master_port):
        """Make the folder that the host's container would see as /opt/ml."""
        root, channels = self.folder / host, {}
        for folder in ("input/config", "input/data", "model", "output/data"):
            (root / folder).mkdir(parents=True)
        for channel in self.request.get("InputDataConfig") or []:
            name, source = channel["ChannelName"], channel["DataSource"]["S3DataSource"]
            spread = source.get("S3DataDistributionType") or "FullyReplicated"
            try:
                bucket, prefix, keys = self.list_channel(channel)
            except ClientError as error:
                raise ClientError(f"Data download failed: {error}") from error
            if spread == "ShardedByS3Key":
                keys = keys[hosts.index(host) :: len(hosts)]
            # Below the prefix if that is a folder; otherwise under the name of its own.
            cut = prefix.rfind("/") + 1
            for key in keys:
                start_at = len(prefix) + 1 if key.startswith(f"{prefix}/") else cut
                self.download(bucket, key, root / "input/data" / name / key[start_at:])
            channels[name] = {
                "TrainingInputMode": "File",
                "S3DistributionType": spread,
                "RecordWrapperType": "None",
            }
        adapt_drivers(root, master_port)
        group = {
            "instance_group_name": "homogeneousCluster",
            "instance_type": self.resources.get("InstanceType"),
            "hosts": hosts,
        }
        parameters = self.request.get("HyperParameters") or {}
        configs = {
            "inputdataconfig": channels,
            "hyperparameters": {key: mapped(text, root) for key, text in parameters.items()},
            "resourceconfig": {
                "current_host": host,
                "current_instance_type": group["instance_type"],
                "current_group_name": group["instance_group_name"],
                "hosts": hosts,
                "instance_groups": [group],
                "network_interface_name": LOOPBACK,
            },
        }
        for name, content in configs.items():
            (root / f"input/config/{name}.json").write_text(json.dumps(content))
        return root

    def train(self, roots, master_port):
        """Run the entry point on every host to its end. Return why it was told to end, or None."""
        self.processes, readers, checkpoints = [], [], []
        with contextlib.suppress(self.logs.exceptions.ResourceAlreadyExistsException):
            self.logs.create_log_group(logGroupName=LOG_GROUP)
        for number, root in enumerate(roots, 1):
            if config := self.request.get("CheckpointConfig"):
                local = Path(mapped(self.checkpoint_folder(), root))
                checkpoints.append(Checkpoints(self, config["S3Uri"], local))
            stream = f"{self.name}/algo-{number}-{int(self.creation_time.timestamp())}"
            with contextlib.suppress(self.logs.exceptions.ResourceAlreadyExistsException):
                self.logs.create_log_stream(logGroupName=LOG_GROUP, logStreamName=stream)
            process = self.launch(root, master_port)
            self.processes.append(process)
            readers.append(threading.Thread(target=self.read, args=(process.stdout, stream)))
            readers[-1].start()
        why = self.watch(checkpoints[:1])
        self.kill()  # what the entry point left behind: a container takes everything with it
        for reader in readers:
            reader.join(timeout=10)
        self.send_logs()
        for checkpoint in checkpoints[:1]:
            checkpoint.sync()
        return why

    def launch(self, root, master_port):
        """Start the request's entry point, with /opt/ml mapped to the host's folder."""
        command = self.specification["ContainerEntrypoint"]
        command = command + self.specification.get("ContainerArguments", [])
        requested = self.request.get("Environment") or {}
        environment = {
            **os.environ,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "TRAINING_JOB_NAME": self.name,
            "TRAINING_JOB_ARN": self.arn,
            "PYTHONUNBUFFERED": "1",  # as in the images: lines reach the log when printed
            "GLOO_SOCKET_IFNAME": LOOPBACK,
            "PET_MASTER_PORT": str(master_port),  # torchrun's default is one for all jobs
            **{name: mapped(value, root) for name, value in requested.items()},
        }
        return subprocess.Popen(
            [mapped(part, root) for part in command],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group, which signals reach as a whole
        )

    def watch(self, checkpoints):
        """Wait for the processes; end them when asked to, when late, or when one has failed."""
        condition = self.request.get("StoppingCondition") or {}
        limit = condition.get("MaxRuntimeInSeconds") or 86400
        why, deadline, next_sync = None, time.monotonic() + limit, 0
        while any(process.poll() is None for process in self.processes):
            late = time.monotonic() > deadline
            if why:
                if late:
                    self.kill()
            elif any(process.poll() for process in self.processes):
                self.kill()
            elif late or self.wants_stop.is_set() or self.interrupted.is_set():
                why = "MaxRuntimeExceeded" if late else "Interrupted"
                why = "Stopped" if self.wants_stop.is_set() else why
                deadline = time.monotonic() + self.server.grace_seconds
                if why != "Interrupted":
                    self.move("Stopping", "Stopping the training job", "Stopping")
                for process in self.processes:
                    with contextlib.suppress(OSError):
                        os.killpg(process.pid, signal.SIGTERM)
            self.send_logs()
            if time.monotonic() > next_sync:
                for checkpoint in checkpoints:
                    checkpoint.sync()
                next_sync = time.monotonic() + SYNC_SECONDS
            time.sleep(0.2)
        return why

    def kill(self):
        """SIGKILL to the hosts' groups, and to children in their own (torchrun's workers)."""
        for process in self.processes:
            children = []
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(process.pid).children(recursive=True)
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            for child in children:
                with contextlib.suppress(psutil.Error):
                    child.kill()

    def read(self, pipe, stream):
        """Collect a host's lines; of a progress bar, what a terminal shows in the end."""
        while line := pipe.readline(256 * 1024 - 26):  # the longest event that CloudWatch takes
            text = line.decode(errors="replace").rstrip("\r\n").split("\r")[-1]
            self.events.append((stream, int(time.time() * 1000), text or " "))
            for name, pattern in self.patterns.items():
                if found := pattern.search(text):
                    with contextlib.suppress(ValueError, IndexError):
                        value = {"MetricName": name, "Value": float(found[1]), "Timestamp": now()}
                        self.metrics[name] = value

    def send_logs(self):
        """Send the lines collected so far to CloudWatch Logs."""
        count, streams = len(self.events), {}
        for stream, moment, text in self.events[:count]:
            streams.setdefault(stream, []).append({"timestamp": moment, "message": text})
        del self.events[:count]
        for stream, events in streams.items():
            for i in range(0, len(events), 1000):
                self.logs.put_log_events(
                    logGroupName=LOG_GROUP, logStreamName=stream, logEvents=events[i : i + 1000]
                )

    def download(self, bucket, key, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.s3.download_file(bucket, key, str(path))

    def upload(self, folder, name):
        """Upload what is in a folder as <name>.tar.gz."""
        archive = self.folder / f"{name}.tar.gz"
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, arcname=path.name)
        self.s3.upload_file(str(archive), *split_uri(f"{self.output}/{archive.name}"))


class Checkpoints:
    """A folder that begins as a copy of an S3 prefix, which then follows it (not deletions)."""

    def __init__(self, job, uri, folder):
        self.job, self.folder = job, folder
        self.bucket, self.prefix = split_uri(f"{uri.rstrip('/')}/")
        folder.mkdir(parents=True, exist_ok=True)
        for key in list_keys(job.s3, self.bucket, self.prefix):
            job.download(self.bucket, key, folder / key[len(self.prefix) :])
        self.sent = dict(self.files())

    def files(self):
        """Each file, with what tells one version of it from the next."""
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # the script rotates its checkpoints
                if path.is_file():
                    yield path, (path.stat().st_mtime_ns, path.stat().st_size)

    def sync(self):
        """Upload what is new or has changed."""
        for path, version in self.files():
            if self.sent.get(path) != version:
                key = f"{self.prefix}{path.relative_to(self.folder).as_posix()}"
                with contextlib.suppress(FileNotFoundError):
                    self.job.s3.upload_file(str(path), self.bucket, key)
                    self.sent[path] = version


def now():
    return datetime.now(UTC)


def mapped(text, root):
    return text.replace("/opt/ml", str(root))


def split_uri(uri):
    """s3://bucket/some/prefix -> bucket, some/prefix"""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def list_keys(s3, bucket, prefix):
    """Every key that begins with the prefix (text, not a folder), without folder markers."""
    try:
        pages = list(s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix))
    except s3.exceptions.NoSuchBucket:
        return []
    keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    return [key for key in keys if not key.endswith("/")]


def adapt_drivers(root, master_port):
    """Fit the job's copy of the SDK's driver scripts to a folder, to loopback and to SIGTERM."""
    for path in (root / "input/data/sm_drivers").rglob("*.*"):
        text = mapped(path.read_text(), root)
        text = text.replace('SM_MASTER_ADDR = "algo-1"', 'SM_MASTER_ADDR = "127.0.0.1"')
        text = text.replace("SM_MASTER_PORT = 7777", f"SM_MASTER_PORT = {master_port}")
        # Shell and driver get the group's SIGTERM too, and must outlive the script, which saves
        # and prints meanwhile. A script inherits an ignored signal, but not a handler.
        if path.name == "sm_train.sh":
            text = text.replace("set -e", "trap : TERM\nset -e", 1)
        if path.name == "utils.py":
            text += "\nimport signal\nsignal.signal(signal.SIGTERM, lambda *_: None)\n"
        path.write_text(text)


# The server ---------------------------------------------------------------------------------------
def quotas(region):
    """Some of SageMaker's quotas. The codes are made up: look a quota up by its name."""
    limits = {"ml.g4dn.xlarge": 2.0, "ml.g5.xlarge": 0.0, "ml.g6.xlarge": 0.0, "ml.m5.large": 4.0}
    uses = {"training job usage": 1, "spot training job usage": 1, "training warm pool usage": 0}
    for name, value in [(f"{i} for {u}", limits[i] * uses[u]) for i in limits for u in uses]:
        code = "L-" + hashlib.sha256(name.encode()).hexdigest()[:8].upper()
        yield {
            "ServiceCode": "sagemaker",
            "ServiceName": "Amazon SageMaker",
            "QuotaArn": f"arn:aws:servicequotas:{region}:123456789012:sagemaker/{code}",
            "QuotaCode": code,
            "QuotaName": name,
            "Value": value,
            "Unit": "None",
            "Adjustable": True,
            "GlobalQuota": False,
        }


class Server:
    """moto's server, with a door of its own and the operations that moto lacks."""

    def __init__(self, port, grace_seconds):
        self.port, self.grace_seconds, self.jobs = port, grace_seconds, {}
        self.url, self.state = f"http://127.0.0.1:{port}", _state_folder(port)

    def serve(self):
        os.environ["MOTO_DISABLE_GLOBAL_CORS"] = "true"  # read when moto is imported
        os.environ["MOTO_IAM_LOAD_MANAGED_POLICIES"] = "true"  # AmazonSageMakerFullAccess, ...
        from moto.moto_server import werkzeug_app as app
        from werkzeug.serving import make_server

        extend_moto(self)
        self.moto = app.DomainDispatcherApplication(app.create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        handler = app.MotoRequestHandler
        server = make_server("127.0.0.1", self.port, self.answer, True, request_handler=handler)
        shutil.rmtree(self.state / "jobs", ignore_errors=True)
        server.serve_forever()

    def answer(self, environ, start_response):
        """Answer a request (WSGI): our own paths here, everything else in moto."""
        path, code, body = environ["PATH_INFO"], "200 OK", {}
        host = environ.get("HTTP_HOST", "").rpartition(":")[0]
        if "HTTP_ORIGIN" in environ or host not in ("127.0.0.1", "localhost"):
            code = "403 Forbidden"  # a page in a browser, which shall start no training job here
        elif path == "/_embedded_aws":
            jobs = sorted(name for name, job in self.jobs.items() if job.is_running)
            body = {"url": self.url, "user": os.getuid(), "pid": os.getpid(), "python": sys.prefix}
            body |= {"folder": str(self.state), "running_jobs": jobs}
        elif path == "/_embedded_aws/interrupt":
            length = int(environ["CONTENT_LENGTH"])
            job = self.jobs.get(name := json.loads(environ["wsgi.input"].read(length))["job"])
            if job and job.is_running and job.request.get("EnableManagedSpotTraining"):
                job.interrupted.set()
            else:
                body = {"error": f"{name} is not a running spot job."}
        else:
            return self.moto(environ, start_response)
        start_response(code, [("Content-Type", "application/json")])
        return [json.dumps(body).encode()]


def extend_moto(server):
    """Give moto's response classes the operations that they lack, or only pretend to have."""
    import boto3
    from moto.core.responses import ActionResult, EmptyResult
    from moto.iam.responses import IamResponse
    from moto.sagemaker.exceptions import ResourceInUseException, ValidationError
    from moto.sagemaker.models import FakeTrainingJob
    from moto.sagemaker.responses import SageMakerResponse
    from moto.servicequotas.exceptions import NoSuchResource
    from moto.servicequotas.responses import ServiceQuotasResponse

    def answers(response_class):
        return lambda function: setattr(response_class, function.__name__, function)

    def job_of(response):
        backend, name = response.sagemaker_backend, response._get_param("TrainingJobName")
        backend.describe_training_job(name)  # raises moto's "Could not find training job"
        return backend.training_jobs[name]

    @answers(SageMakerResponse)
    def create_training_job(self):
        request, backend = json.loads(self.body), self.sagemaker_backend
        name, region = request["TrainingJobName"], backend.region_name
        arn = FakeTrainingJob.arn_formatter(name, backend.account_id, region)
        if name in backend.training_jobs:
            raise ResourceInUseException(f"Training job names must be unique: {arn} exists.")
        try:
            job = TrainingJob(request, arn, boto3.Session(region_name=region), server)
        except (ClientError, re.error) as error:
            raise ValidationError(str(error)) from error
        backend.training_jobs[name] = server.jobs[name] = job
        threading.Thread(target=job.run, daemon=True).start()
        return ActionResult({"TrainingJobArn": arn})

    @answers(SageMakerResponse)
    def stop_training_job(self):
        job = job_of(self)
        if not job.is_running:
            raise ValidationError(
                "The request was rejected because the training job is in status "
                f"{job.training_job_status}."
            )
        job.training_job_status = "Stopping"
        job.wants_stop.set()
        return EmptyResult()

    @answers(SageMakerResponse)
    def delete_training_job(self):
        job = job_of(self)
        if job.is_running:
            raise ResourceInUseException(f"{job.arn} is in status {job.training_job_status}.")
        del self.sagemaker_backend.training_jobs[job.name], server.jobs[job.name]
        shutil.rmtree(job.folder, ignore_errors=True)
        return EmptyResult()

    @answers(IamResponse)
    def simulate_principal_policy(self):  # the SDK asks before it uploads code; all is allowed
        actions = self._get_param("ActionNames", [])
        results = [{"EvalActionName": action, "EvalDecision": "allowed"} for action in actions]
        return ActionResult({"EvaluationResults": results, "IsTruncated": False})

    @answers(ServiceQuotasResponse)
    def list_service_quotas(self):
        if json.loads(self.body)["ServiceCode"] != "sagemaker":
            raise NoSuchResource
        return json.dumps({"Quotas": list(quotas(self.region))})

    of_moto = ServiceQuotasResponse.get_service_quota

    @answers(ServiceQuotasResponse)
    def get_service_quota(self):
        wanted = json.loads(self.body)
        if wanted["ServiceCode"] != "sagemaker":
            return of_moto(self)
        for quota in quotas(self.region):
            if quota["QuotaCode"] == wanted["QuotaCode"]:
                return json.dumps({"Quota": quota})
        raise NoSuchResource


def main():
    """The command line. Returns the exit code, or an error message."""
    parser = argparse.ArgumentParser(description="The embedded AWS: moto, whose training jobs run.")
    parser.add_argument("action", choices=["start", "status", "stop", "interrupt", "serve"])
    parser.add_argument("job", nargs="?", help="the spot job to interrupt")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--grace", type=float, default=GRACE_SECONDS, help="SIGTERM to SIGKILL, s")
    options = parser.parse_args()
    nothing = f"No embedded AWS runs on port {options.port}."
    try:
        if options.action == "serve":  # in the foreground; `start` puts this in the background
            Server(options.port, options.grace).serve()
        elif options.action == "start":
            print(f"The embedded AWS answers at {start(options.port, options.grace)}")
        elif options.action == "stop":
            print("Stopped." if stop(options.port) else nothing)
        elif options.action == "interrupt":
            interrupt(options.job, options.port)
        else:
            running = status(options.port)
            print(json.dumps(running, indent=2) if running else nothing)
            return 0 if running else 1
    except (OSError, RuntimeError, ValueError) as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
