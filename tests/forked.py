"""Runs train.py in processes of its own that need not load torch anew: each is a fork.

They are forked from one that has imported the script and done nothing else. They can be killed and
told to end like a process that `python train.py` starts; other tests start it that way.
"""

import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from unittest import mock

SCRIPTS = str(Path(__file__).parents[1] / "scripts")
TRAIN = f"{SCRIPTS}/train.py"
AS_A_SCRIPT = f"import runpy; runpy.run_path({TRAIN!r}, run_name='__main__')"
CONTEXT = multiprocessing.get_context("forkserver")


def _child(folder, files, flags, environment, code):
    """In the fork: its own session, folder and environment; what it says goes to `files`."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), number)
    multiprocessing.set_start_method("fork", force=True)  # the default, of a process that was not
    sys.path.insert(0, SCRIPTS)
    sys.argv = ["train.py", *flags]
    ended = 1
    try:
        exec(code, {"__name__": "__main__"})
        ended = 0
    except SystemExit as error:
        ended = error.code
    except BaseException:
        traceback.print_exc()
    finally:  # as Python ends: nothing waits for DataLoader's workers
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stdout.flush()
        os._exit(ended)


class Run:
    """One run, with what subprocess.CompletedProcess has once it has ended."""

    def __init__(self, folder, flags, code="import train; train.main()", **environment):
        """`code` is what the process does; `environment` is added to that of this process."""
        rank = environment.get("RANK", "")
        self.files = [Path(folder, f"{name}{rank}") for name in ("stdout", "stderr")]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
        flags = [str(flag) for flag in flags]
        arguments = (folder, self.files, flags, clean | environment, code)
        self.process = CONTEXT.Process(target=_child, args=arguments)
        CONTEXT.set_forkserver_preload(["train"])
        with mock.patch.dict(os.environ, PYTHONPATH=SCRIPTS):  # where the server looks for it
            self.process.start()  # the first one starts the server

    def wait(self, seconds=300):
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it still runs after {seconds} s: {self.stdout}"
        return self

    @property
    def returncode(self):
        return self.process.exitcode

    @property
    def stdout(self):
        return self.files[0].read_text()

    @property
    def stderr(self):
        return self.files[1].read_text()
