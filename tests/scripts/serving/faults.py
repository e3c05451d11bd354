"""The real handler, as code/inference.py of a test's endpoint: it does what a test asks it to.

Files in the model's folder say how it loads, a body what happens to a request.
"""

import os
import signal
import time
from pathlib import Path

import handler  # scripts/inference.py under another name


def model_fn(folder):
    while (Path(folder) / "slow").exists():
        time.sleep(0.1)
    if (Path(folder) / "broken").exists():
        raise ValueError("a model without weights")
    return handler.model_fn(folder)


def answer(classifier, body, content_type):
    if body == b"hang":
        time.sleep(3600)
    if body == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    if body == b"wait":
        folder = Path(os.environ["SM_MODEL_DIR"])
        (folder / "waiting").touch()
        while not (folder / "go").exists():
            time.sleep(0.1)
        return 200, "waited"
    return handler.answer(classifier, body, content_type)
