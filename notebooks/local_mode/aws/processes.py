"""A job's process on each host: started as a container starts it, told to end, and killed.

SageMaker sends SIGTERM to a container's process 1 alone. The kernel drops it there, unless that
process has a handler for it. A shell has none, and passes nothing on to what it runs.
"""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import psutil

SHELLS = ("bash", "dash", "sh")
# The shell tells how process 1 ended, as a container does: 137 if by SIGKILL. `unshare --fork` does
# not. The second unshare turns into the command, and gives it a /proc of its own.
IN_A_NAMESPACE = ["--pid", "sh", "-c", '"$@"; exit $?', "sh", "unshare", "--mount-proc"]


def namespace():
    """The words before a command that make it process 1 of a PID namespace; [] where none may be.

    Linux only. Who is not root needs a user namespace for it, and a container often forbids both.
    """
    for user in ([], ["--user", "--map-current-user", "--keep-caps"]):
        words = ["unshare", *user, *IN_A_NAMESPACE]
        with contextlib.suppress(OSError):  # no such program: macOS
            if subprocess.run([*words, "true"], capture_output=True).returncode == 0:
                return words
    return []


def start(command, folder, environment, words):
    """Start a command; `words` as `namespace` gives them. Its output comes by the pipe `stdout`."""
    return subprocess.Popen(
        [*words, *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a process group, which is killed as a whole
    )


def terminate(process, words):
    """SIGTERM to the command alone, as it reaches the process 1 of a container."""
    with contextlib.suppress(psutil.Error):
        entry = psutil.Process(process.pid)
        if words:  # what was started is the shell of IN_A_NAMESPACE; its child is process 1
            for child in entry.children():
                child.send_signal(signal.SIGTERM)
        elif Path(entry.exe()).name not in SHELLS:  # outside a namespace it would kill a shell
            entry.send_signal(signal.SIGTERM)


def kill(process):
    """SIGKILL to the command and to all that it started, in groups of their own or not.

    Outside a namespace, what left the group and has lost its parent stays.
    """
    children = []
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
