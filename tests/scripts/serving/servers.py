"""The two servers of an endpoint, each started as in its container, without Docker and AWS."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import urllib3

SCRIPTS = Path(__file__).parents[3] / "scripts"


class Server(NamedTuple):
    """A running server."""

    url: str  # takes requests
    ping: str
    temporary: Path
    model: Path  # its unpacked archive
    log: Path
    process: subprocess.Popen  # with all others below it

    def workers(self) -> list[psutil.Process]:
        """The processes that hold the model."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in family if "--multiprocessing-fork" in words(p)]

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def words(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def unpack(model: Path, home: Path, faults: bool = False) -> Path:
    """The folder `home`/model as SageMaker unpacks it: the model's files, config.yaml, code/."""
    folder = Path(shutil.copytree(model, home / "model"))
    serving, code = SCRIPTS / "serving", folder / "code"
    code.mkdir()
    shutil.copy(serving / "config.yaml", folder)
    sources = [serving / "deployment.py", serving / "worker.py", SCRIPTS / "inference.py"]
    for file in [*sources, SCRIPTS / "train.py"]:
        shutil.copy(file, code)
    if faults:
        (code / "inference.py").rename(code / "handler.py")
        shutil.copy(Path(__file__).with_name("faults.py"), code / "inference.py")
    return folder


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def running(kind: str, model: Path, faults=False, wait=True, **environ) -> Iterator[Server]:
    """Serves a model with "ray" or with "own", and ends all processes.

    faults: with faults.py. wait: until /ping answers 200. environ: the endpoint's environment.
    Raises RuntimeError with the end of the log if that takes more than four minutes.
    """
    with tempfile.TemporaryDirectory(prefix="s-") as home:  # short: sockets lie in it
        home = Path(home)
        (home / "tmp").mkdir()
        (home / "venv").symlink_to(sys.prefix)  # Ray does not quote: this path has no space
        folder = unpack(model, home, faults)
        given = {
            "SM_MODEL_DIR": folder, "TMPDIR": home / "tmp",
            "PYTHONUNBUFFERED": 1, "RAY_USAGE_STATS_ENABLED": 0,
            "RAY_prestart_worker_first_driver": 0,
            "PYTHONPATH": os.pathsep.join(map(str, (folder, folder / "code"))),
            "PATH": f"{home}/venv/bin{os.pathsep}{os.environ['PATH']}",
        } | environ  # fmt: skip
        given = os.environ | {name: str(value) for name, value in given.items()}
        given.pop("OMP_NUM_THREADS", None)
        port, *others = free_ports(5)
        command, url = COMMANDS[kind](home, folder, port, others, given)
        with open(home / "log", "w") as log:
            process = subprocess.Popen(
                command, cwd=home, env=given, stdout=log, stderr=log, start_new_session=True
            )
        ping = {"ray": "/-/healthz", "own": "/ping"}[kind]
        server = Server(
            f"http://127.0.0.1:{port}{url}", f"http://127.0.0.1:{port}{ping}",
            home / "tmp", folder, home / "log", process,
        )  # fmt: skip
        try:
            if wait:
                wait_for(server)
            yield server
        finally:
            end(process)


def own(home, folder, port, others, environ):
    """What the Dockerfile copies, and starts."""
    environ |= {"SAGEMAKER_BIND_TO_PORT": str(port), "HOST": "127.0.0.1"}
    del environ["PYTHONPATH"]
    program = home / "program"
    program.mkdir()
    for line in (SCRIPTS / "serving" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            for name in line.split()[1:-1]:
                shutil.copy(SCRIPTS / name, program)
    if (folder / "code" / "handler.py").exists():
        shutil.copytree(folder / "code", program, dirs_exist_ok=True)
    return [sys.executable, str(program / "server.py")], "/invocations"


# Ray ends if its helpers take 15 seconds (github.com/ray-project/ray/issues/65983), so it goes
# before other tests, where root runs them.
RAY = """
{{ renice -n -19 $$; echo -19 > /proc/$$/autogroup; }} >/dev/null 2>&1
for attempt in 1 2 3; do
  python -m ray.scripts.scripts start --head --port={0} --include-dashboard=False --num-gpus=0 \
    --temp-dir={home}/ray --object-store-memory=200000000 --block --no-monitor \
    --dashboard-agent-listen-port={1} --metrics-export-port={2} --runtime-env-agent-port={3}
done &
until [ -s ray/ray_current_cluster ]; do sleep 0.2; done
export RAY_ADDRESS=$(cat ray/ray_current_cluster)
python -m ray.serve.scripts start --http-host=127.0.0.1 --http-port={port}
python -m ray.serve.scripts run {folder}/config.yaml &
wait
"""


def ray(home, folder, port, others, environ):
    """The three commands of the image's entry point. Its proxy on port 8080 adds nothing."""
    environ.pop("RAY_ADDRESS", None)
    # Else `ray start` takes a token that another Ray left in the home folder, and `serve` none.
    environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex()}
    script = RAY.format(*others, home=home, folder=folder, port=port)
    return ["bash", "-c", script], "/"


COMMANDS = {"ray": ray, "own": own}


def status(url: str) -> int:
    """The status that a GET of a URL gets; 0 if nothing answers."""
    with suppress(urllib3.exceptions.HTTPError):
        return urllib3.request("GET", url, retries=False, timeout=5).status
    return 0


def wait_for(server: Server, seconds: float = 240) -> None:
    """Returns when the server says that it is healthy, as SageMaker waits for it."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and server.process.poll() is None:
        if status(server.ping) == 200:
            return
        time.sleep(0.2)
    last = "\n".join(server.said().splitlines()[-30:])
    raise RuntimeError(f"the server is not ready after {seconds:.0f} s; its log ends:\n{last}")


def end(process: subprocess.Popen) -> None:
    """Ends a process and all that it started, and nothing else."""
    family = []
    with suppress(psutil.NoSuchProcess):  # it has ended by itself
        first = psutil.Process(process.pid)
        family = [first, *first.children(recursive=True)]
    for member in family:  # some of Ray's are in no group of ours
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=2)  # Ray takes any time
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
