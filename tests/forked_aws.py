"""Starts the embedded AWS as a fork of a process that has imported moto: in 0.1 s and not in 2.

As a program it is that process. It reads what to start, a line of JSON each, and answers with the
process id. Tests of the start itself (local_mode/test_server.py) and the notebooks do without it.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
LOCK = threading.Lock()
SERVICES = ("s3", "iam", "sts", "logs", "sagemaker", "cloudwatch", "service-quotas")


class Fork:
    """What aws.start needs of a subprocess.Popen."""

    parent = None

    def __init__(self, command, cwd, env, stdout, **_):
        wanted = {"arguments": command[1:], "folder": str(cwd), "environment": env}
        with LOCK:
            if Fork.parent is None:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                Fork.parent = subprocess.Popen([sys.executable, __file__], bufsize=1, **pipes)
            print(json.dumps(wanted | {"log": stdout.name}), file=Fork.parent.stdin)
            self.pid = int(Fork.parent.stdout.readline())
        self.process = psutil.Process(self.pid)

    def poll(self):
        return None if self.process.is_running() else 1

    def kill(self):
        with contextlib.suppress(psutil.Error):
            self.process.kill()


def child(arguments, folder, environment, log):
    """In the fork: what `python arguments` is."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(folder)
    environment |= {name: value for name, value in os.environ.items() if name[:5] == "MOTO_"}
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def main():
    sys.path.insert(0, str(ROOT / "notebooks"))
    folder = ROOT / "notebooks/local_mode/aws"
    for module in ["server", *sorted(path.stem for path in folder.glob("[a-z]*.py"))]:
        importlib.import_module(f"local_mode.aws.{module}")
    from moto.core.utils import get_service_model
    from moto.iam.models import DEFAULT_ACCOUNT_ID, get_account_id_from, iam_backends
    from moto.moto_server import werkzeug_app  # noqa: F401

    for service in SERVICES:
        importlib.import_module(f"moto.{service.replace('-', '')}.responses")
        get_service_model(service)
    iam_backends[DEFAULT_ACCOUNT_ID]["aws"]  # this one, and then those of China and others:
    get_account_id_from("")  # a first request would wait for all of AWS's policies
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that have ended are no zombies
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            child(**json.loads(line))
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
