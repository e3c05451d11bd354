"""What training and processing jobs share: hosts, processes, logs, metrics, status, operations."""

import contextlib
import json
import math
import re
import shutil
import socket
import sys
import threading
import time
import traceback

from moto.core.responses import ActionResult, EmptyResult
from moto.sagemaker.exceptions import ResourceInUseException, SagemakerClientError, ValidationError
from moto.sagemaker.responses import SageMakerResponse
from moto.sagemaker.utils import arn_formatter

from . import processes
from .basics import ClientError, account_environment, mapped, now
from .capacity import NO_CAPACITY, choose_instances
from .storage import Checkpoints, list_keys, local_name, split_uri

SYNC_SECONDS = 3  # between two looks at the checkpoints
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


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
        self.status, self.failure_reason, self.failed_by_service = "InProgress", None, False
        self.creation_time, self.start_time, self.end_time = now(), None, None
        self.read_request()
        if not self.specification.get("ContainerEntrypoint"):
            raise ClientError("The embedded AWS runs no image: name a ContainerEntrypoint.")
        self.warm_pool = None
        choose_instances(server, self)
        self.move("Starting", f"Starting the {self.kind.lower()} job")

    @property
    def is_running(self):
        return self.status in ("InProgress", "Stopping")

    def use(self, instance_type, count):
        self.instance_type, self.instance_count = instance_type, count
        self.quota_names = [f"{instance_type} for {use}" for use in self.uses]

    @property
    def described_resources(self):
        """The request's, and which of its preferences was taken."""
        taken = {
            "SelectedInstanceType": self.instance_type,
            "SelectedInstanceCount": self.instance_count,
        }
        chosen = self.start_time and "InstancePreferences" in self.resources
        return self.resources | (taken if chosen else {})

    @property
    def run_seconds(self):
        """How long it has run, the download included, but no pause between spot instances."""
        steps = [s for s in self.transitions if s["Status"] not in ("Starting", "Interrupted")]
        times = [(step.get("EndTime") or now()) - step["StartTime"] for step in steps]
        return sum(span.total_seconds() for span in times)

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
        if not self.has_capacity:
            return self.fail(NO_CAPACITY)
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
            self.failed_by_service = not denied
            self.fail(f"{'ClientError' if denied else 'InternalServerError'}: {error}"[:1024])
        finally:
            self.kill()

    def attempt(self):
        """Stage, execute, upload. Return "Interrupted" if the spot instances were taken away."""
        shutil.rmtree(self.folder, ignore_errors=True)  # a new instance has an empty disk
        self.move("Downloading", "Downloading input data")
        self.start_time = self.start_time or now()  # what is billed begins with image and download
        hosts = [f"127.0.0.{i + 1}" for i in range(self.instance_count)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            master_port = probe.getsockname()[1]
        roots = [self.stage(host, hosts, master_port) for host in hosts]
        if self.wants_stop.is_set():
            return self.move("Stopped", f"{self.kind} job stopped", "Stopped")
        self.move("Training", "Training image download completed. Training in progress.")
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
        for key in keys:
            self.download(bucket, key, folder / local_name(key, prefix))

    def resource_config(self, host, hosts):
        """What the host's container reads in resourceconfig.json."""
        group = {
            "instance_group_name": "homogeneousCluster",
            "instance_type": self.instance_type,
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
        command = [mapped(part, root) for part in command]
        return processes.start(command, root, environment, self.server.namespace)

    def watch(self, folders):
        """Wait for the processes; end them when asked to, when late, or when one has failed."""
        condition = self.request.get("StoppingCondition") or {}
        longest = condition.get("MaxRuntimeInSeconds") or 86400
        limits = {"MaxRuntimeExceeded": longest - self.run_seconds}
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
                    processes.terminate(process, self.server.namespace)
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
        """End what runs on the hosts."""
        for process in self.processes:
            processes.kill(process)

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


def add_operations(server, job_class):
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
        if job.warm_pool and job.warm_pool.status == "Available":
            raise ResourceInUseException(f"{job.arn} retains an Available warm pool.")
        del jobs_of(self)[job.name], server.jobs[job.arn]
        shutil.rmtree(job.folder, ignore_errors=True)
        return EmptyResult()

    for operation in (create, stop, delete):
        setattr(SageMakerResponse, f"{operation.__name__}_{kind}_job", operation)
