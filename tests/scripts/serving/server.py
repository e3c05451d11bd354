"""The model server of AWS's PyTorch inference images, on loopback, without root and without AWS."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import urllib3

CODE = Path(__file__).parents[3] / "scripts"


class Server(NamedTuple):
    """A running server: where it answers, its folder for temporary files, its log."""

    url: str
    temporary: Path
    log: Path


def obstacle() -> str | None:
    """Why TorchServe cannot run here, or None."""
    if lacking := [p for p in ("ts", "pkg_resources") if importlib.util.find_spec(p) is None]:
        return f"not installed: {' '.join(lacking)}; see requirements.txt"
    if shutil.which("java") is None:
        return "TorchServe needs Java 17: apt-get install openjdk-17-jre-headless"
    said = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < 17:
        return f"TorchServe needs Java 17, and this is: {said.splitlines()[0]}"
    return None


def write_artefact(model: Path, archive: Path) -> Path:
    """Packs a model.tar.gz for an endpoint: the model's files, and the code in code/."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for file in sorted(model.iterdir()):
            tar.add(file, file.name)
        for name in ("inference.py", "train.py", "requirements.txt"):
            tar.add(CODE / name, f"code/{name}")
    return archive


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def running(archive: Path, workers: int = 1, seconds: float = 120, **environ) -> Iterator[Server]:
    """Unpacks the artefact, serves it, and ends the server with all its processes.

    `environ` is the endpoint's environment. The requirements in the artefact are not installed:
    scripts/test_images.py does that. Raises RuntimeError with the end of the log if /ping does not
    answer in time. It answers before the model is loaded; the first requests wait for that.
    """
    # A short path, since the workers' sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        home, temporary = Path(folder), Path(folder) / "tmp"
        temporary.mkdir()
        with tarfile.open(archive) as tar:
            tar.extractall(home / "ml" / "model", filter="data")
        http, metrics, *grpc = free_ports(4)
        loopback = "http://127.0.0.1:"
        server = Server(f"{loopback}{http}", temporary, home / "log")
        given = {
            "SAGEMAKER_BASE_DIR": home / "ml", "SAGEMAKER_PROGRAM": "inference.py",
            "SAGEMAKER_MODEL_SERVER_WORKERS": workers, "SAGEMAKER_BIND_TO_PORT": http,
            # Only for running it here: loopback, and nothing shared with another server.
            "TS_INFERENCE_ADDRESS": server.url, "TS_MANAGEMENT_ADDRESS": server.url,
            "TS_METRICS_ADDRESS": f"{loopback}{metrics}", "TS_GRPC_INFERENCE_PORT": grpc[0],
            "TS_GRPC_MANAGEMENT_PORT": grpc[1], "TEMP": temporary, "TMPDIR": temporary,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        } | environ  # fmt: skip
        given = os.environ | {name: str(value) for name, value in given.items()}
        command = [sys.executable, Path(__file__).with_name("start.py")]
        with open(server.log, "w") as log:
            process = subprocess.Popen(
                command, cwd=home, env=given, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_for(server, process, seconds)
            yield server
        finally:
            end(process)


def wait_for(server: Server, process: subprocess.Popen, seconds: float) -> None:
    """Returns when /ping answers 200, as SageMaker waits for it."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and process.poll() is None:
        with suppress(urllib3.exceptions.HTTPError):
            if urllib3.request("GET", f"{server.url}/ping", retries=False).status == 200:
                return
        time.sleep(0.2)
    last = "\n".join(server.log.read_text().splitlines()[-30:])
    raise RuntimeError(f"the server is not ready after {seconds:.0f} s; its log ends:\n{last}")


def end(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=10)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
