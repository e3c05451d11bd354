"""The model in processes of its own, which may hang or die without harm to the server in front.

Both servers use it: deployment.py in AWS's Ray Serve image, and server.py in an image of your own.
The environment sets WORKERS, INVOCATION_SECONDS, MAX_BODY_MB and SM_MODEL_DIR.
"""

import asyncio
import errno
import json
import logging
import multiprocessing
import os
import tempfile
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from pebble import ProcessExpired, ProcessPool

COUNT = int(os.environ.get("WORKERS", 1))  # processes with a model each, which share the cores
SECONDS = float(os.environ.get("INVOCATION_SECONDS", 3500))  # for an answer; AWS waits 3600 at most
MAX_MB = float(os.environ.get("MAX_BODY_MB", 100))  # of a body; Ray holds six copies of one

classifier = None  # in a worker


def load() -> None:
    """What a worker does first. If it raises, the log says why and the pool is broken."""
    global classifier
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s: %(message)s")
    import inference  # only here: the server in front needs no torch

    classifier = inference.model_fn(os.environ.get("SM_MODEL_DIR", "/opt/ml/model"))


def loaded() -> None:
    """What a worker can do as soon as it has loaded the model."""


def check() -> None:
    """Loads the model once, in a process that then ends. Raises if that fails; the log says why."""
    workers = Workers()
    try:
        workers.first.result()
    finally:
        workers.stop()


def work(path: str, content_type: str | None) -> tuple[int, str]:
    """The answer to the body that lies in a file."""
    import inference

    return inference.answer(classifier, Path(path).read_bytes(), content_type)


class Workers:
    """COUNT workers, each replaced when it dies or takes longer than SECONDS."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        """Begins to load. `first`: a future, done when a worker has the model, or can have none."""
        spawn = multiprocessing.get_context("spawn")  # a fork of threads (gRPC, CUDA) may hang
        self.pool = ProcessPool(COUNT, initializer=load, context=spawn)
        self.first = self.pool.schedule(loaded)

    def stop(self) -> None:
        self.pool.stop()
        self.pool.join()

    def healthy(self) -> bool:
        """Whether a worker has the model. Starts anew where the pool is broken: see `run`."""
        if not self.pool.active:
            self.stop()
            self.start()
        return self.first.done() and self.first.exception() is None

    async def run(self, *task):
        """What a worker returns. Raises TimeoutError, ProcessExpired, or what the task raises.

        A pool breaks if a worker dies while none is at work, and is then lost: take another.
        """
        for last in (False, True):
            self.healthy()
            try:
                function, *arguments = task
                future = self.pool.schedule(function, arguments, timeout=SECONDS)
                return await asyncio.wrap_future(future)
            except BrokenProcessPool:
                if last:
                    raise

    async def answer(self, request) -> tuple[int, str]:
        """The status and the JSON for a starlette request, whose body may be any size."""
        try:
            with tempfile.TemporaryDirectory(prefix=f"video-{os.getpid()}-") as folder:
                body, size = Path(folder) / "body", 0
                with body.open("wb") as file:
                    async for chunk in request.stream():
                        size += len(chunk)
                        if size <= MAX_MB * 1e6:  # else read on: senders wait until all is sent
                            file.write(chunk)
                if size > MAX_MB * 1e6:
                    return error(413, f"the body is above MAX_BODY_MB, {MAX_MB:g}; send s3_uri")
                return await self.run(work, str(body), request.headers.get("content-type"))
        except TimeoutError:
            return error(504, f"no answer after INVOCATION_SECONDS, {SECONDS:g}")
        except ProcessExpired:
            logging.exception("a worker died")
            return error(500, "the process that read this video died")
        except Exception as problem:
            logging.exception("a request failed")
            full = getattr(problem, "errno", None) == errno.ENOSPC
            return error(507, "the disk is full") if full else error(500, "the log says why")


def error(status: int, line: str) -> tuple[int, str]:
    return status, json.dumps({"error": line})
