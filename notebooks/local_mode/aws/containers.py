"""A deployed model's container: serving.py in a process of its own, its log, start and end.

It plays AWS's Ray Serve image, and no other. On a machine with a GPU it starts only if the host's
driver fits the image's CUDA, as on SageMaker.
"""

import contextlib
import http.client
import os
import re
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import psutil
from botocore.exceptions import BotoCoreError
from botocore.exceptions import ClientError as RequestError
from moto.sagemaker.exceptions import SagemakerClientError, ValidationError
from moto.sagemaker.utils import arn_formatter

from .basics import ClientError, account_environment, mapped
from .quotas import check_quotas
from .storage import split_uri

SERVING = Path(__file__).with_name("serving.py")
RESPONSE_SECONDS = 60  # of InvokeEndpoint
START_SECONDS = 600  # until the container must answer /ping, unless the request says more
# The CUDA version that the driver of a GPU host has: docs.aws.amazon.com, "inference-gpu-drivers".
HOSTS = {
    "": 11,  # the default for g4dn and g5
    "al2-ami-sagemaker-inference-gpu-2": 12,
    "al2-ami-sagemaker-inference-gpu-2-1": 12,
    "al2-ami-sagemaker-inference-gpu-3-1": 12,
    "al2023-ami-sagemaker-inference-gpu-4-1": 13,
    "al2-ami-sagemaker-batch-gpu-470": 11,
    "al2-ami-sagemaker-batch-gpu-535": 12,
}
NOT_STARTED = (  # on AWS some minutes after the request, with no log
    "CannotStartContainerError. Please ensure the model container for variant AllTraffic starts "
    "correctly when invoked with 'docker run <image> serve'"
)


def check_host(image, instance_type, ami):
    """Raises ClientError for an image that its machine cannot start: a driver of another CUDA.

    `ami`: InferenceAmiVersion or TransformAmiVersion. Also for an image that is not played here.
    """
    if "ray:" not in image:
        raise ClientError(f"{NOT_STARTED} (The embedded AWS plays AWS's Ray Serve image only.)")
    if re.match(r"ml\.[gp]\d", instance_type) and "-cuda-" in image:  # which has CUDA 12
        if HOSTS.get(ami or "") != 12:
            raise ClientError(NOT_STARTED)


class Container:
    """A model in a server process of its own, with its log in CloudWatch."""

    def __init__(self, server, model, folder, log_group, log_stream):
        self.server, self.model, self.folder = server, model, server.state / folder
        self.session = server.session(model.execution_role_arn, model.arn.split(":")[3])
        self.s3 = self.session.client("s3", endpoint_url=server.url)
        self.logs = self.session.client("logs", endpoint_url=server.url)
        self.group, self.stream, self.last_line = log_group, log_stream, ""
        self.process = self.port = self.reader = self.ray = None
        self.instance_type, self.ami, self.seconds = "", None, START_SECONDS
        self.ended = threading.Event()

    def start(self):
        """Unpack, start, wait until the server answers. ClientError says why it does not."""
        check_host(self.model.primary_container["Image"], self.instance_type, self.ami)
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "model").mkdir(parents=True)
        url = self.model.primary_container["ModelDataUrl"]
        archive = self.folder / "model.tar.gz"
        try:
            self.s3.download_file(*split_uri(url), str(archive))
            with tarfile.open(archive) as tar:
                tar.extractall(self.folder / "model", filter="data")
        except (RequestError, tarfile.TarError) as error:
            raise ClientError(
                f'Failed to download model data from URL "{url}". Please ensure that there is an '
                "object located at the URL and that the role passed to CreateModel has permissions "
                f"to download the object. ({error})"
            ) from error
        archive.unlink()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        requested = self.model.primary_container.get("Environment") or {}
        # The name of a socket holds 104 characters at least, of which Ray takes 64.
        place = self.server.state if len(str(self.server.state)) < 33 else "/tmp"
        self.ray = tempfile.mkdtemp(prefix="r", dir=place)
        # Ray does not quote: this way to Python has no space. -P: it finds no module here.
        python = str(self.server.state / "python" / "bin" / "python")
        self.process = subprocess.Popen(
            [python, "-P", str(SERVING), str(self.port), self.ray],
            cwd=self.folder,
            env=account_environment(self.session.get_credentials(), self.session.region_name)
            | {name: mapped(value, self.folder) for name, value in requested.items()}
            | {"SM_MODEL_DIR": str(self.folder / "model")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # by which `kill` knows what it started
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        deadline = time.monotonic() + self.seconds
        while not self.is_ready():
            failed = self.process.poll() is not None or time.monotonic() > deadline
            if failed or self.ended.is_set():
                self.kill()
                raise ClientError(
                    "The primary container for production variant AllTraffic did not pass the ping "
                    f"health check. Please check CloudWatch logs. Its last line: {self.last_line}"
                )
            time.sleep(0.2)

    def is_ready(self):
        with contextlib.suppress(OSError):
            return self.ask("GET", "/ping", timeout=5)[0] == 200

    def ask(self, method, path, body=None, headers=None, timeout=RESPONSE_SECONDS):
        """Send a request to the server: status, content type, body (bytes). OSError if it fails."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers.get("Content-Type", ""), answer.read()
        except http.client.HTTPException as error:  # it went away in the middle
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def invoke(self, body, content_type, accept, timeout):
        """One inference: content type and body of the answer, or ModelError."""
        headers = {"Content-Type": content_type, "Accept": accept}
        headers = {name: value for name, value in headers.items() if value}
        try:
            status, answer_type, answer = self.ask("POST", "/invocations", body, headers, timeout)
        except OSError as error:
            raise ModelError(0, f"Your invocation timed out or broke off: {error}") from error
        if status >= 300:
            raise ModelError(status, answer.decode(errors="replace"))
        return answer_type, answer

    def read(self):
        """Send the server's lines to CloudWatch as they come; a role that may not has no log."""
        for line in self.process.stdout:
            self.last_line = line.decode(errors="replace").strip() or self.last_line
            self.log(self.stream, self.last_line)

    def log(self, stream, text):
        place = {"logGroupName": self.group, "logStreamName": stream}
        exists = self.logs.exceptions.ResourceAlreadyExistsException
        with contextlib.suppress(RequestError, BotoCoreError):
            with contextlib.suppress(exists):
                self.logs.create_log_group(logGroupName=self.group)
            with contextlib.suppress(exists):
                self.logs.create_log_stream(**place)
            event = {"timestamp": int(time.time() * 1000), "message": text}
            self.logs.put_log_events(**place, logEvents=[event])

    def started(self, pid):
        """Whether a process belongs to this container: Ray's have process groups of their own."""
        with contextlib.suppress(OSError):
            return os.getsid(pid) == self.process.pid

    def kill(self):
        """End the server and what it started, and delete its folders. May be called twice."""
        self.ended.set()
        if self.process:
            for _ in range(2):  # what a process started before its end is there at the second look
                family = [one for one in psutil.process_iter() if self.started(one.pid)]
                for process in family:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                psutil.wait_procs(family, timeout=5)
            self.process.wait()
            self.reader.join(timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.ray:
            shutil.rmtree(self.ray, ignore_errors=True)


class ModelError(Exception):
    """An answer other than 2xx from a container: its status (0: none came) and its text."""

    def __init__(self, status, text):
        kind = "client" if 400 <= status < 500 else "server"
        super().__init__(f'Received {kind} error ({status}) from primary with message "{text}".')
        self.status, self.text = status, text


def begin(server, response, make, model_name, *place):
    """Make an endpoint or a transform job, with a container, and let it run."""
    backend = response.sagemaker_backend
    if model_name not in backend._models:
        arn = arn_formatter("model", model_name, backend.account_id, backend.region_name)
        raise ValidationError(f'Could not find model "{arn}".')
    try:
        made = make(Container(server, backend._models[model_name], *place))
        check_quotas(server, made)
    except (ClientError, PermissionError) as error:
        code = getattr(error, "code", ClientError.code)
        raise SagemakerClientError(code, str(error)) from error
    threading.Thread(target=made.run, daemon=True).start()
    return made
