"""An AWS account on this machine, so that the notebooks run without one.

It is moto (S3, IAM, STS, CloudWatch, SageMaker, ...) as a server on 127.0.0.1, extended where moto
stops short: training and processing jobs really run, by the request's own entry point, without
Docker and without root; they can be stopped, interrupted and deleted; the metrics that their logs
show reach CloudWatch; endpoints and batch transform jobs answer (endpoints.py); SageMaker's quotas
are answered, and bite.

    python notebooks/local_mode/aws.py start        # and: status, stop, interrupt JOB

The account lives in the server's memory: buckets, roles, jobs and logs are gone when it stops.
The server outlives the notebook that started it. Its one folder, <temp>/embedded-aws-<uid>-<port>,
holds `pid`, `server.log`, and for each job, host and endpoint a folder that is laid out as a
container's /opt/ml; `stop` deletes it.

Spot weather: a managed-spot job that keeps checkpoints loses its instances once, or as often as
`spot_interruptions` says, when a new checkpoint has reached S3; then it starts again from there.

What differs from the service, on purpose: a job runs in your own Python environment, not in the
image that it names, and pip installs its requirements there. Hosts are called 127.0.0.1,
127.0.0.2, ...; of several hosts only the first one's model and output are kept. FastFile is staged
as File. Checkpoints lie below /opt/ml. A spot job is billed 30 % of its time. A processing job that
fails uploads no EndOfJob output, since no document promises one. Quota requests stay pending.
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
import math
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
import uuid
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import psutil

PORT = 5599
GRACE_SECONDS = 120  # between SIGTERM and SIGKILL, as the service has it
SYNC_SECONDS = 3  # between two looks at the checkpoints
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
    """End the embedded AWS at `endpoint_url`; AWS itself (None) is left alone.

    Raises RuntimeError, with the names, if its account is not empty: then it runs on.
    """
    if endpoint_url is None:
        return
    port = urlsplit(endpoint_url).port or PORT
    left = _ask(port, "GET", "/_embedded_aws/account")
    if left:
        more = ", ..." if len(left) > 9 else ""
        raise RuntimeError(
            f"The embedded AWS on port {port} runs on, because its account is not empty "
            f"({len(left)}): {', '.join(left[:9])}{more}. `aws.py stop --port {port}` ends it all."
        )
    stop(port)


def start(port=PORT, grace_seconds=GRACE_SECONDS, spot_interruptions=1, enforce=False):
    """Start the embedded AWS on 127.0.0.1:`port`, unless it runs there already; return its URL.

    Each managed-spot job that keeps checkpoints loses its instance `spot_interruptions` times.
    Everybody may do everything in it, unless `enforce` makes IAM's policies count (permissions.py).
    """
    url, running = f"http://127.0.0.1:{port}", status(port)
    if running and enforce and not running["enforce"]:
        raise RuntimeError(
            f"The embedded AWS on port {port} allows everything. Stop it first (aws.py stop --port "
            f"{port}), or name another port, for example {port + 1}."
        )
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
    command.append(f"--spot-interruptions={spot_interruptions}")
    command += ["--enforce"] if enforce else []
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


# Jobs, in the server ------------------------------------------------------------------------------
class ClientError(Exception):
    """What is wrong with a request, in the service's words."""

    code = "ValidationException"


class LimitExceeded(ClientError):
    """A job that needs more instances than a quota leaves."""

    code = "ResourceLimitExceeded"


class Job:
    """A job: what Describe...Job answers, and the thread that makes it true.

    Hosts, processes, logs and status are the same for both kinds of jobs. A kind says what a host's
    folder holds (`stage`), which folders S3 follows (`synced`), and what is uploaded (`upload`).
    """

    kind = None  # Training or Processing, as the API's names have it

    def __init__(self, request, arn, session, server):
        self.request, self.arn, self.server = request, arn, server
        self.name = request[f"{self.kind}JobName"]
        self.tags = request.pop("Tags", None) or []
        self.folder = server.state / self.folder_name / self.name
        self.region, self.credentials = session.region_name, session.get_credentials()
        self.s3 = session.client("s3", endpoint_url=server.url)
        self.logs = session.client("logs", endpoint_url=server.url)
        self.cloudwatch = session.client("cloudwatch", endpoint_url=server.url)
        self.wants_stop, self.interrupted = threading.Event(), threading.Event()
        self.processes, self.events, self.transitions = [], [], []
        self.metrics, self.points = {}, []  # the last value of each, and what is not sent yet
        self.patterns, self.variables, self.interruptions_to_come = {}, {}, 0
        self.log_group = f"/aws/sagemaker/{self.kind}Jobs"
        self.status, self.failure_reason = "InProgress", None
        self.creation_time, self.start_time, self.end_time = now(), None, None
        self.read_request()
        if not self.specification.get("ContainerEntrypoint"):
            raise ClientError("The embedded AWS runs no image: name a ContainerEntrypoint.")
        self.instance_count = self.resources.get("InstanceCount") or 1
        self.quota_names = [f"{self.resources.get('InstanceType')} for {use}" for use in self.uses]
        self.move("Starting", f"Starting the {self.kind.lower()} job")

    @property
    def is_running(self):
        return self.status in ("InProgress", "Stopping")

    def move(self, secondary, message, primary=None):
        """Go to the next secondary status. A final primary status ends the job."""
        moment = self.last_modified_time = now()
        if self.transitions:
            self.transitions[-1]["EndTime"] = moment
        self.transitions.append(
            {"Status": secondary, "StartTime": moment, "StatusMessage": message}
        )
        if primary in ("Completed", "Failed", "Stopped"):
            self.transitions[-1]["EndTime"] = self.end_time = moment
        self.status = primary or self.status

    def fail(self, reason):
        self.failure_reason = reason
        self.move("Failed", f"{self.kind} job failed", "Failed")

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
            denied = re.search("AccessDenied|Forbidden", str(error))  # the role's fault, not ours
            self.fail(f"{'ClientError' if denied else 'InternalServerError'}: {error}"[:1024])
        finally:
            self.kill()

    def attempt(self):
        """Stage, execute, upload. Return "Interrupted" if the spot instances were taken away."""
        shutil.rmtree(self.folder, ignore_errors=True)  # a new instance has an empty disk
        self.move("Downloading", "Downloading input data")
        hosts = [f"127.0.0.{i + 1}" for i in range(self.instance_count)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            master_port = probe.getsockname()[1]
        roots = [self.stage(host, hosts, master_port) for host in hosts]
        if self.wants_stop.is_set():
            return self.move("Stopped", f"{self.kind} job stopped", "Stopped")
        self.move("Training", "Training image download completed. Training in progress.")
        self.start_time = self.start_time or now()
        why = self.execute(roots, master_port)
        if why == "Interrupted":
            return why
        self.move("Uploading", "Uploading generated training model")
        failure = None if why else self.failure(roots)
        self.upload(roots, failed=bool(failure))
        if failure:
            return self.fail(failure)
        if why and why.endswith("Exceeded"):
            limit = f"{why.removesuffix('Exceeded')}InSeconds"
            self.move(why, f"{self.kind} job runtime exceeded {limit} provided", "Stopped")
        else:
            final = why or "Completed"
            self.move(final, f"{self.kind} job {final.lower()}", final)

    def failure(self, roots):
        """The FailureReason, if a host ended with an exit code other than 0."""
        codes = [process.returncode for process in self.processes]
        if not any(codes):
            return None
        # The hosts that were killed because another one failed have a negative code.
        code, root = max(zip(codes, roots, strict=True))
        code = 128 - code if code < 0 else code  # as a shell tells of a signal: 137 for SIGKILL
        failure, ending = root / "output/failure", f", exit code: {code}"
        text = failure.read_text(errors="replace").strip() if failure.exists() else ""
        return f"AlgorithmError: {text}"[: 1024 - len(ending)] + ending

    def list_input(self, uri):
        """An input's bucket, prefix and keys, or a ClientError that says what is wrong with it."""
        bucket, prefix = split_uri(uri)
        keys = list_keys(self.s3, bucket, prefix)
        if not keys:
            raise ClientError(
                f'No S3 objects found under S3 URL "{uri}" given in input data source. '
                f"Please ensure that the bucket exists in the selected region ({self.region}), that"
                f" objects exist under that S3 prefix, and that the role "
                f'"{self.request.get("RoleArn")}" has "s3:ListBucket" permissions on bucket '
                f'"{bucket}".'
            )
        return bucket, prefix, keys

    def download_input(self, source, folder, host, hosts):
        """Put what one host gets of an S3 source into a folder."""
        try:
            bucket, prefix, keys = self.list_input(source["S3Uri"])
        except ClientError as error:
            raise ClientError(f"Data download failed: {error}") from error
        if source.get("S3DataDistributionType") == "ShardedByS3Key":
            keys = keys[hosts.index(host) :: len(hosts)]
        folder.mkdir(parents=True, exist_ok=True)
        # Below the prefix if that is a folder; otherwise under the name of its own.
        cut = prefix.rfind("/") + 1
        for key in keys:
            start_at = len(prefix) + 1 if key.startswith(f"{prefix}/") else cut
            self.download(bucket, key, folder / key[start_at:])

    def resource_config(self, host, hosts):
        """What the host's container reads in resourceconfig.json."""
        group = {
            "instance_group_name": "homogeneousCluster",
            "instance_type": self.resources.get("InstanceType"),
            "hosts": hosts,
        }
        return {
            "current_host": host,
            "current_instance_type": group["instance_type"],
            "current_group_name": group["instance_group_name"],
            "hosts": hosts,
            "instance_groups": [group],
            "network_interface_name": LOOPBACK,
        }

    def execute(self, roots, master_port):
        """Run the entry point on every host to its end. Return why it was told to end, or None."""
        self.processes, readers = [], []
        group, moment = self.log_group, int(self.creation_time.timestamp())
        with contextlib.suppress(self.logs.exceptions.ResourceAlreadyExistsException):
            self.logs.create_log_group(logGroupName=group)
        folders = [folder for root in roots for folder in self.synced(root)]
        for number, root in enumerate(roots, 1):
            stream = f"{self.name}/algo-{number}-{moment}"
            with contextlib.suppress(self.logs.exceptions.ResourceAlreadyExistsException):
                self.logs.create_log_stream(logGroupName=group, logStreamName=stream)
            process = self.launch(root, master_port)
            self.processes.append(process)
            readers.append(threading.Thread(target=self.read, args=(process.stdout, stream)))
            readers[-1].start()
        why = self.watch(folders)
        self.kill()  # what the entry point left behind: a container takes everything with it
        for reader in readers:
            reader.join(timeout=10)
        self.send_logs()
        for folder in folders:
            folder.sync()
        return why

    def launch(self, root, master_port):
        """Start the request's entry point, with /opt/ml mapped to the host's folder."""
        command = self.specification["ContainerEntrypoint"]
        command = command + (self.specification.get("ContainerArguments") or [])
        requested = self.request.get("Environment") or {}
        environment = {
            **account_environment(self.credentials, self.region),
            "GLOO_SOCKET_IFNAME": LOOPBACK,
            "PET_MASTER_PORT": str(master_port),  # torchrun's default is one for all jobs
            **self.variables,
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

    def watch(self, folders):
        """Wait for the processes; end them when asked to, when late, or when one has failed."""
        condition = self.request.get("StoppingCondition") or {}
        limits = {"MaxRuntimeExceeded": condition.get("MaxRuntimeInSeconds") or 86400}
        if wait := condition.get("MaxWaitTimeInSeconds"):  # a spot job's, from its creation on
            age = (now() - self.creation_time).total_seconds()
            limits["MaxWaitTimeExceeded"] = wait - age
        excess = min(limits, key=limits.get)
        why, deadline, next_sync = None, time.monotonic() + limits[excess], 0
        while any(process.poll() is None for process in self.processes):
            late = time.monotonic() > deadline
            if why:
                if late:
                    self.kill()
            elif any(process.poll() for process in self.processes):
                self.kill()
            elif late or self.wants_stop.is_set() or self.interrupted.is_set():
                why = excess if late else "Interrupted"
                why = "Stopped" if self.wants_stop.is_set() else why
                deadline = time.monotonic() + self.server.grace_seconds
                if why != "Interrupted":
                    self.move("Stopping", f"Stopping the {self.kind.lower()} job", "Stopping")
                for process in self.processes:
                    with contextlib.suppress(OSError):
                        os.killpg(process.pid, signal.SIGTERM)
            self.send_logs()
            if time.monotonic() > next_sync:
                # Spot weather; what came in the round before is complete by now, most likely.
                new = any(isinstance(f, Checkpoints) and f.has_new for f in folders)
                if new and not why and self.interruptions_to_come:
                    self.interruptions_to_come -= 1
                    self.interrupted.set()
                for folder in folders:
                    folder.sync()
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
                        self.points += [value] if math.isfinite(value["Value"]) else []

    def send_logs(self):
        """Send the lines collected so far to CloudWatch Logs, and their metrics to CloudWatch."""
        count, streams = len(self.events), {}
        for stream, moment, text in self.events[:count]:
            streams.setdefault(stream, []).append({"timestamp": moment, "message": text})
        del self.events[:count]
        for stream, events in streams.items():
            for i in range(0, len(events), 1000):
                place = {"logGroupName": self.log_group, "logStreamName": stream}
                self.logs.put_log_events(**place, logEvents=events[i : i + 1000])
        count, mine = len(self.points), [{"Name": f"{self.kind}JobName", "Value": self.name}]
        for i in range(0, count, 1000):  # what one request may hold
            data = [point | {"Dimensions": mine} for point in self.points[: min(1000, count - i)]]
            self.cloudwatch.put_metric_data(Namespace=self.log_group, MetricData=data)
            del self.points[: len(data)]

    def download(self, bucket, key, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.s3.download_file(bucket, key, str(path))


class TrainingJob(Job):
    """A job that CreateTrainingJob asks for."""

    kind, folder_name = "Training", "jobs"
    training_job_name = property(lambda job: job.name)  # these three are what moto's lists read
    training_job_status = property(lambda job: job.status)
    training_end_time = property(lambda job: job.end_time)

    def read_request(self):
        request = self.request
        self.specification = request.get("AlgorithmSpecification") or {}
        self.resources = request.get("ResourceConfig") or {}
        self.variables = {"TRAINING_JOB_NAME": self.name, "TRAINING_JOB_ARN": self.arn}
        definitions = self.specification.get("MetricDefinitions") or []
        self.patterns = {item["Name"]: re.compile(item["Regex"]) for item in definitions}
        self.checkpoints = request.get("CheckpointConfig") or {}
        self.tensorboard = request.get("TensorBoardOutputConfig") or {}
        self.checkpoint_path = self.checkpoints.get("LocalPath", "/opt/ml/checkpoints")
        self.tensorboard_path = self.tensorboard.get("LocalPath", "/opt/ml/output/tensorboard")
        for path in (self.checkpoint_path, self.tensorboard_path):
            if not path.startswith("/opt/ml/"):
                raise ClientError(f"LocalPath {path}: the embedded AWS needs one in /opt/ml.")
        if request.get("EnableManagedSpotTraining"):
            limits = request.get("StoppingCondition") or {}
            if limits.get("MaxWaitTimeInSeconds", 0) < limits.get("MaxRuntimeInSeconds", 1):
                raise ClientError(
                    "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal "
                    "to MaxRuntimeInSeconds"
                )
            self.uses = ["spot training job usage"]
            if self.checkpoints:
                self.interruptions_to_come = self.server.spot_interruptions
        else:
            self.uses = ["training job usage"]
        if self.resources.get("KeepAlivePeriodInSeconds"):
            self.uses.append("training warm pool usage")
        for channel in request.get("InputDataConfig") or []:
            source = channel["DataSource"].get("S3DataSource") or {}
            mode = channel.get("InputMode") or self.specification["TrainingInputMode"]
            if source.get("S3DataType") != "S3Prefix" or mode not in ("File", "FastFile"):
                raise ClientError(
                    f"Channel {channel['ChannelName']}: the embedded AWS reads an S3Prefix, in File"
                    " or FastFile mode."
                )
            self.list_input(source["S3Uri"])
        folder = request["OutputDataConfig"]["S3OutputPath"].rstrip("/")
        self.output = f"{folder}/{self.name}/output"

    @property
    def response_object(self):
        """DescribeTrainingJob's answer: the request, and what became of it."""
        state = {
            "TrainingJobArn": self.arn,
            "TrainingJobStatus": self.status,
            "SecondaryStatus": self.transitions[-1]["Status"],
            "SecondaryStatusTransitions": self.transitions,
            "FailureReason": self.failure_reason,
            "CreationTime": self.creation_time,
            "LastModifiedTime": self.last_modified_time,
            "TrainingStartTime": self.start_time,
            "TrainingEndTime": self.end_time,
            "ModelArtifacts": {"S3ModelArtifacts": f"{self.output}/model.tar.gz"},
            "FinalMetricDataList": list(self.metrics.values()),
        }
        if self.start_time and self.end_time:
            trained = self.end_time - self.start_time
            seconds = state["TrainingTimeInSeconds"] = int(trained.total_seconds()) + 1
            spot = self.request.get("EnableManagedSpotTraining")
            state["BillableTimeInSeconds"] = max(1, int(seconds * 0.3)) if spot else seconds
        return {name: value for name, value in (self.request | state).items() if value is not None}

    def stage(self, host, hosts, master_port):
        """Make the folder that the host's container would see as /opt/ml."""
        root, channels = self.folder / host, {}
        for folder in ("input/config", "input/data", "model", "output/data"):
            (root / folder).mkdir(parents=True)
        for channel in self.request.get("InputDataConfig") or []:
            name, source = channel["ChannelName"], channel["DataSource"]["S3DataSource"]
            self.download_input(source, root / "input/data" / name, host, hosts)
            channels[name] = {
                "TrainingInputMode": "File",
                "S3DistributionType": source.get("S3DataDistributionType") or "FullyReplicated",
                "RecordWrapperType": "None",
            }
        adapt_drivers(root, master_port)
        parameters = self.request.get("HyperParameters") or {}
        configs = {
            "inputdataconfig": channels,
            "hyperparameters": {key: mapped(text, root) for key, text in parameters.items()},
            "resourceconfig": self.resource_config(host, hosts),
        }
        for name, content in configs.items():
            (root / f"input/config/{name}.json").write_text(json.dumps(content))
        return root

    def synced(self, root):
        """The folders of a host that S3 follows while the job runs."""
        folders = []
        if self.checkpoints:
            path = mapped(self.checkpoint_path, root)
            folders.append(Checkpoints(self, self.checkpoints["S3Uri"], path))
        if self.tensorboard:
            uri = f"{self.tensorboard['S3OutputPath'].rstrip('/')}/{self.name}/tensorboard-output"
            folders.append(SyncedFolder(self, uri, mapped(self.tensorboard_path, root)))
        return folders

    def upload(self, roots, failed):
        """Upload output.tar.gz, and model.tar.gz unless the job has failed."""
        for folder, name in [("output/data", "output"), ("model", "model")][: 1 if failed else 2]:
            archive = self.folder / f"{name}.tar.gz"
            with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
                for path in sorted((roots[0] / folder).iterdir()):
                    tar.add(path, arcname=path.name)
            self.s3.upload_file(str(archive), *split_uri(f"{self.output}/{archive.name}"))


class ProcessingJob(Job):
    """A job that CreateProcessingJob asks for."""

    kind, folder_name, uses = "Processing", "processing_jobs", ["processing job usage"]
    processing_job_name = property(lambda job: job.name)  # these three are what moto's lists read
    processing_job_status = property(lambda job: job.status)
    processing_end_time = property(lambda job: job.end_time)

    def read_request(self):
        request = self.request
        self.specification = request["AppSpecification"]
        self.resources = request["ProcessingResources"]["ClusterConfig"]
        self.outputs = (request.get("ProcessingOutputConfig") or {}).get("Outputs") or []
        self.exit_message = None
        self.sources = [item.get("S3Input") or {} for item in request.get("ProcessingInputs", [])]
        usual = {"S3DataType": "S3Prefix", "S3InputMode": "File", "S3CompressionType": "None"}
        for end in [*self.sources, *(item.get("S3Output") or {} for item in self.outputs)]:
            path = end.get("LocalPath")
            if "S3Uri" not in end or any(end.get(x, usual[x]) != usual[x] for x in usual):
                raise ClientError("The embedded AWS copies files from and to an S3Prefix only.")
            if not f"{path}/".startswith("/opt/ml/processing/"):
                raise ClientError(f"LocalPath {path}: it must begin with /opt/ml/processing/.")
        for source in self.sources:
            self.list_input(source["S3Uri"])

    @property
    def response_object(self):
        """DescribeProcessingJob's answer: the request, and what became of it."""
        state = {
            "ProcessingJobArn": self.arn,
            "ProcessingJobStatus": self.status,
            "ExitMessage": self.exit_message,
            "FailureReason": self.failure_reason,
            "CreationTime": self.creation_time,
            "LastModifiedTime": self.last_modified_time,
            "ProcessingStartTime": self.start_time,
            "ProcessingEndTime": self.end_time,
        }
        return {name: value for name, value in (self.request | state).items() if value is not None}

    def stage(self, host, hosts, master_port):
        """Make the folder that the host's container would see as /opt/ml."""
        root = self.folder / host
        for folder in ("config", "output", "processing"):
            (root / folder).mkdir(parents=True)
        for source in self.sources:
            self.download_input(source, Path(mapped(source["LocalPath"], root)), host, hosts)
        for script in (root / "processing").rglob("runproc.sh"):  # of the SDK's FrameworkProcessor
            script.write_text(mapped(script.read_text(), root))
        for output in self.outputs:
            Path(mapped(output["S3Output"]["LocalPath"], root)).mkdir(parents=True, exist_ok=True)
        configs = {
            "resourceconfig": self.resource_config(host, hosts),
            "processingjobconfig": self.request | {"ProcessingJobArn": self.arn},
        }
        for name, content in configs.items():
            (root / f"config/{name}.json").write_text(json.dumps(content))
        return root

    def synced(self, root, mode="Continuous"):
        """The folders of a host that S3 follows: while the job runs, or (EndOfJob) afterwards."""
        outputs = [item["S3Output"] for item in self.outputs]
        outputs = [output for output in outputs if output["S3UploadMode"] == mode]
        return [SyncedFolder(self, o["S3Uri"], mapped(o["LocalPath"], root)) for o in outputs]

    def upload(self, roots, failed):
        """Upload every host's outputs, unless the job has failed, and keep its last words."""
        messages = [root / "output/message" for root in roots]
        text = "".join(m.read_text(errors="replace") for m in messages if m.exists())
        self.exit_message = text[:1024] or None
        for root in [] if failed else roots:
            for folder in self.synced(root, "EndOfJob"):
                folder.sync()


class SyncedFolder:
    """A folder that an S3 prefix follows, but for deletions."""

    def __init__(self, job, uri, folder):
        self.job, self.folder, self.sent = job, Path(folder), {}
        self.bucket, self.prefix = split_uri(f"{uri.rstrip('/')}/")
        self.folder.mkdir(parents=True, exist_ok=True)

    def files(self):
        """Each file, with what tells one version of it from the next."""
        # The script rotates its checkpoints: os.walk passes over a folder that has just gone.
        for place, _, names in os.walk(self.folder):
            for path in (Path(place, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    yield path, (path.stat().st_mtime_ns, path.stat().st_size)

    def sync(self):
        """Upload what is new or has changed, and tell if anything was."""
        uploaded = False
        for path, version in self.files():
            if self.sent.get(path) != version:
                key = f"{self.prefix}{path.relative_to(self.folder).as_posix()}"
                with contextlib.suppress(FileNotFoundError):
                    self.job.s3.upload_file(str(path), self.bucket, key)
                    self.sent[path], uploaded = version, True
        return uploaded


class Checkpoints(SyncedFolder):
    """A synced folder that begins as a copy of its prefix, and knows if it has got a new file."""

    def __init__(self, job, uri, folder):
        super().__init__(job, uri, folder)
        for key in list_keys(job.s3, self.bucket, self.prefix):
            job.download(self.bucket, key, self.folder / key[len(self.prefix) :])
        self.sent, self.has_new = dict(self.files()), False

    def sync(self):
        self.has_new |= super().sync()


def now():
    return datetime.now(UTC)


def account_environment(credentials, region):
    """The environment of a process that acts in the account, with the credentials of its role."""
    return {
        **os.environ,
        "AWS_ACCESS_KEY_ID": credentials.access_key,
        "AWS_SECRET_ACCESS_KEY": credentials.secret_key,
        "AWS_SESSION_TOKEN": credentials.token or "",
        "AWS_REGION": region,
        "AWS_DEFAULT_REGION": region,
        "PYTHONUNBUFFERED": "1",  # as in the images: lines reach the log when printed
    }


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
    except s3.exceptions.ClientError as error:
        if error.response["Error"]["Code"] not in ("NoSuchBucket", "AccessDenied"):
            raise
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
    limits = {"ml.g4dn.xlarge": 2.0, "ml.g5.xlarge": 0.0, "ml.g6.xlarge": 0.0}
    limits |= {"ml.m5.large": 20.0, "ml.m5.xlarge": 20.0}
    uses = {"training job usage": 1, "spot training job usage": 1, "processing job usage": 1}
    uses |= {"endpoint usage": 1, "transform job usage": 1}
    uses["training warm pool usage"] = 0
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

    def __init__(self, port, grace_seconds, spot_interruptions, enforce):
        self.port, self.grace_seconds, self.enforce = port, grace_seconds, enforce
        self.spot_interruptions = spot_interruptions
        self.jobs, self.quota_requests = {}, []  # jobs by ARN
        self.url, self.state = f"http://127.0.0.1:{port}", _state_folder(port)

    def serve(self):
        os.environ["MOTO_DISABLE_GLOBAL_CORS"] = "true"  # read when moto is imported
        os.environ["MOTO_IAM_LOAD_MANAGED_POLICIES"] = "true"  # AmazonSageMakerFullAccess, ...
        from moto.moto_server import werkzeug_app as app
        from werkzeug.serving import make_server

        extend_moto(self)
        import endpoints

        endpoints.extend_moto(self)
        if self.enforce:
            import permissions

            permissions.enforce(self)
        self.moto = app.DomainDispatcherApplication(app.create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        handler = app.MotoRequestHandler
        server = make_server("127.0.0.1", self.port, self.answer, True, request_handler=handler)
        for name in ("jobs", "processing_jobs", "transform_jobs", "endpoints"):
            shutil.rmtree(self.state / name, ignore_errors=True)
        server.serve_forever()

    def session(self, role_arn, region):
        """The boto3 session of a job: its role's, where policies count."""
        import boto3

        if not self.enforce:
            return boto3.Session(region_name=region)
        import permissions

        return permissions.role_session(role_arn, region)

    def answer(self, environ, start_response):
        """Answer a request (WSGI): our own paths here, everything else in moto."""
        path, code, body = environ["PATH_INFO"], "200 OK", {}
        host = environ.get("HTTP_HOST", "").rpartition(":")[0]
        if "HTTP_ORIGIN" in environ or host not in ("127.0.0.1", "localhost"):
            code = "403 Forbidden"  # a page in a browser, which shall start no training job here
        elif path == "/_embedded_aws":
            jobs = sorted(job.name for job in self.jobs.values() if job.is_running)
            body = {"url": self.url, "user": os.getuid(), "pid": os.getpid(), "python": sys.prefix}
            body |= {"folder": str(self.state), "running_jobs": jobs, "enforce": self.enforce}
        elif path == "/_embedded_aws/account":
            body = self.account()
        elif path == "/_embedded_aws/interrupt":
            length = int(environ["CONTENT_LENGTH"])
            name = json.loads(environ["wsgi.input"].read(length))["job"]
            jobs = [job for job in self.jobs.values() if job.name == name and job.is_running]
            jobs = [job for job in jobs if job.request.get("EnableManagedSpotTraining")]
            for job in jobs:
                job.interrupted.set()
            body = {} if jobs else {"error": f"{name} is not a running spot job."}
        else:
            return self.moto(environ, start_response)
        start_response(code, [("Content-Type", "application/json")])
        return [json.dumps(body).encode()]

    def account(self):
        """What the account holds, in every Region, as a list of names.

        Records of transform jobs and metrics do not count: nobody can delete them, as on AWS.
        """
        from moto.backends import get_backend

        def each(service):  # moto keeps a backend for each account and Region
            return [one for regions in get_backend(service).values() for one in regions.values()]

        names = [f"bucket/{name}" for s3 in each("s3") for name in s3.buckets]
        names += [f"role/{role.name}" for iam in each("iam") for role in iam.roles.values()]
        for sagemaker in each("sagemaker"):
            kinds = {"training-job": sagemaker.training_jobs, "endpoint": sagemaker.endpoints}
            kinds |= {"processing-job": sagemaker.processing_jobs, "model": sagemaker._models}
            kinds |= {"endpoint-config": sagemaker.endpoint_configs}
            names += [f"{kind}/{name}" for kind, known in kinds.items() for name in known]
        groups = [group for logs in each("logs") for group in logs.groups.values()]
        return names + [f"log stream {name}" for group in groups for name in group.streams]

    def check_quotas(self, job):
        """Raise LimitExceeded if the job needs more instances than a quota leaves."""
        limits = {quota["QuotaName"]: int(quota["Value"]) for quota in quotas(job.region)}
        running = [other for other in self.jobs.values() if other.is_running]
        for name in job.quota_names:
            rivals = [o for o in running if name in o.quota_names and o.region == job.region]
            used = sum(other.instance_count for other in rivals)
            if used + job.instance_count > limits.get(name, math.inf):
                raise LimitExceeded(
                    f"The account-level service limit '{name}' is {limits[name]} Instances, with "
                    f"current utilization of {used} Instances and a request delta of "
                    f"{job.instance_count} Instances. Please use AWS Service Quotas to request an "
                    "increase for this quota. If AWS Service Quotas is not available, contact AWS "
                    "support to request an increase for this quota."
                )


def extend_moto(server):
    """Give moto's response classes the operations that they lack, or only pretend to have."""
    from moto.core.exceptions import JsonRESTError
    from moto.core.responses import ActionResult, EmptyResult
    from moto.iam.responses import IamResponse
    from moto.sagemaker.exceptions import (
        ResourceInUseException,
        SagemakerClientError,
        ValidationError,
    )
    from moto.sagemaker.responses import SageMakerResponse
    from moto.sagemaker.utils import arn_formatter
    from moto.servicequotas.exceptions import NoSuchResource
    from moto.servicequotas.responses import ServiceQuotasResponse

    def answers(response_class):
        return lambda function: setattr(response_class, function.__name__, function)

    def add_operations(job_class):
        """Create, Stop and Delete for one kind of jobs; moto describes and lists what they keep."""
        kind = job_class.kind.lower()

        def jobs_of(response):
            return getattr(response.sagemaker_backend, f"{kind}_jobs")

        def job_of(response):
            name = response._get_param(f"{job_class.kind}JobName")
            getattr(response.sagemaker_backend, f"describe_{kind}_job")(name)  # raises if unknown
            return jobs_of(response)[name]

        def create(self):
            request, backend = json.loads(self.body), self.sagemaker_backend
            name, region = request[f"{job_class.kind}JobName"], backend.region_name
            arn = arn_formatter(f"{kind}-job", name, backend.account_id, region)
            if name in jobs_of(self):
                message = f"{job_class.kind} job names must be unique: {arn} exists."
                raise ResourceInUseException(message)
            try:
                job = job_class(request, arn, server.session(request["RoleArn"], region), server)
                server.check_quotas(job)
            except (ClientError, PermissionError, re.error) as error:
                code = getattr(error, "code", ClientError.code)
                raise SagemakerClientError(code, str(error)) from error
            jobs_of(self)[name] = server.jobs[arn] = job
            threading.Thread(target=job.run, daemon=True).start()
            return ActionResult({f"{job_class.kind}JobArn": arn})

        def stop(self):
            job = job_of(self)
            if not job.is_running:
                raise ValidationError(
                    f"The request was rejected because the {kind} job is in status {job.status}."
                )
            job.status = "Stopping"
            job.wants_stop.set()
            return EmptyResult()

        def delete(self):
            job = job_of(self)
            if job.is_running:
                raise ResourceInUseException(f"{job.arn} is in status {job.status}.")
            del jobs_of(self)[job.name], server.jobs[job.arn]
            shutil.rmtree(job.folder, ignore_errors=True)
            return EmptyResult()

        for operation in (create, stop, delete):
            setattr(SageMakerResponse, f"{operation.__name__}_{kind}_job", operation)

    add_operations(TrainingJob)
    add_operations(ProcessingJob)

    @answers(IamResponse)
    def simulate_principal_policy(self):  # the SDK asks before it uploads code; all is allowed
        actions = self._get_param("ActionNames", [])
        results = [{"EvalActionName": action, "EvalDecision": "allowed"} for action in actions]
        return ActionResult({"EvaluationResults": results, "IsTruncated": False})

    def list_quotas(self):  # nothing was changed here: the defaults are what applies
        if json.loads(self.body)["ServiceCode"] != "sagemaker":
            raise NoSuchResource
        return json.dumps({"Quotas": list(quotas(self.region))})

    ServiceQuotasResponse.list_service_quotas = list_quotas
    ServiceQuotasResponse.list_aws_default_service_quotas = list_quotas

    of_moto = ServiceQuotasResponse.get_service_quota

    @answers(ServiceQuotasResponse)
    def get_service_quota(self):
        wanted = json.loads(self.body)
        if wanted["ServiceCode"] != "sagemaker":
            return of_moto(self)
        return json.dumps({"Quota": quota_of(self)})

    def quota_of(response):
        """The quota of SageMaker that a request names."""
        wanted = json.loads(response.body)
        for quota in quotas(response.region):
            if all(quota[name] == wanted[name] for name in ("ServiceCode", "QuotaCode")):
                return quota
        raise NoSuchResource

    def requests_of(quota):
        return [item for item in server.quota_requests if item["QuotaArn"] == quota["QuotaArn"]]

    @answers(ServiceQuotasResponse)
    def request_service_quota_increase(self):  # nobody ever grants it here
        quota, desired = quota_of(self), json.loads(self.body)["DesiredValue"]
        if desired <= quota["Value"]:
            message = "You must provide a quota value greater than the current quota value."
            raise JsonRESTError("IllegalArgumentException", message)
        if requests_of(quota):
            message = "Only one open service quota increase request is allowed per quota."
            raise JsonRESTError("ResourceAlreadyExistsException", message)
        names = ("ServiceCode", "ServiceName", "QuotaArn", "QuotaCode", "QuotaName", "Unit")
        request = {name: quota[name] for name in (*names, "GlobalQuota")}
        request |= {"Id": uuid.uuid4().hex, "DesiredValue": desired, "Status": "PENDING"}
        request["Created"] = request["LastUpdated"] = time.time()
        server.quota_requests.append(request)
        return json.dumps({"RequestedQuota": request})

    @answers(ServiceQuotasResponse)
    def list_requested_service_quota_change_history_by_quota(self):
        return json.dumps({"RequestedQuotas": requests_of(quota_of(self))})


def main():
    """The command line. Returns the exit code, or an error message."""
    parser = argparse.ArgumentParser(description="The embedded AWS: moto, whose training jobs run.")
    parser.add_argument("action", choices=["start", "status", "stop", "interrupt", "serve"])
    parser.add_argument("job", nargs="?", help="the spot job to interrupt")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--grace", type=float, default=GRACE_SECONDS, help="SIGTERM to SIGKILL, s")
    parser.add_argument("--spot-interruptions", type=int, default=1, help="of each spot job")
    parser.add_argument("--enforce", action="store_true", help="IAM policies count")
    options = parser.parse_args()
    nothing = f"No embedded AWS runs on port {options.port}."
    world = options.grace, options.spot_interruptions, options.enforce
    try:
        if options.action == "serve":  # in the foreground; `start` puts this in the background
            Server(options.port, *world).serve()
        elif options.action == "start":
            url = start(options.port, *world)
            print(f"The embedded AWS answers at {url}")
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
    sys.modules["aws"] = sys.modules["__main__"]  # endpoints.py imports from here
    sys.exit(main())
