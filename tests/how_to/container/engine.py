"""A Docker engine for the tests: the one that answers, else one that is started for them."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PACKAGES = {  # {command: Debian's package}
    "docker": "docker.io",
    "dockerd": "docker.io",
    "docker-compose": "docker-compose",
    "iptables": "iptables",
}


def answers() -> bool:
    """Whether a Docker engine answers, at DOCKER_HOST or where it usually is."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def obstacle() -> str | None:
    """Why no engine can be started here, or None."""
    if sys.platform != "linux":
        return "no Docker engine answers, and one can be started on Linux only"
    if os.geteuid() != 0:
        return "no Docker engine answers, and starting one takes root"
    if lacking := sorted({p for c, p in PACKAGES.items() if shutil.which(c) is None}):
        return f"no Docker engine answers, and to start one: apt-get install {' '.join(lacking)}"
    return None


@contextmanager
def running(folder: Path, seconds: float = 30) -> Iterator[None]:
    """Starts an engine with its state in `folder`, which must be new; ends it and all it started.

    It has namespaces of its own: the host's network, firewall and mounts stay as they are, and
    nothing of it outlives this process. It cannot reach a registry. Sets DOCKER_HOST meanwhile.
    Raises RuntimeError with the engine's last words if it does not answer within `seconds`.
    """
    folder.mkdir()
    address = f"unix://{folder}/docker.sock"
    flags = ["--host", address, "--data-root", folder / "data", "--exec-root", folder / "exec"]
    flags += ["--pidfile", folder / "dockerd.pid"]
    alone = "setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc"
    start = ["sh", "-c", 'ip link set lo up; dockerd "$@"', "sh", *flags]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*alone.split(), *start], stdout=log, stderr=log)
    before = os.environ.get("DOCKER_HOST")
    os.environ["DOCKER_HOST"] = address
    try:
        end = time.monotonic() + seconds
        while not answers():
            if process.poll() is not None or time.monotonic() > end:
                words = (folder / "log").read_text()[-500:]
                raise RuntimeError(f"the Docker engine does not answer:\n{words}")
            time.sleep(0.2)
        yield
    finally:
        ours = (
            []
            if process.poll() is not None
            else psutil.Process(process.pid).children(recursive=True)
        )
        process.kill()  # and, with it, the namespaces and all in them
        process.wait()
        psutil.wait_procs(ours, timeout=seconds)
        os.environ.pop("DOCKER_HOST")
        if before is not None:
            os.environ["DOCKER_HOST"] = before
        shutil.rmtree(folder)
