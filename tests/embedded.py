"""An embedded AWS of a test's own, and this process as it was before at the end."""

import os
import socket
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

from contract import watched
from forked_aws import Fork
from local_mode import aws


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forget_sdk_clients():
    """The SDK keeps its first clients, with their endpoint, for as long as the process lives."""
    from sagemaker.core.utils import utils

    for meta in (utils.SingletonMeta, utils._ClientCacheMeta):
        meta._instances.clear()
    utils._ClientCacheMeta._default = None


@contextmanager
def own_aws(start=True, **options):
    """The port of an embedded AWS, connected to; at its end all that it set here is undone.

    With start=False only the port is given: what is tested starts it there. `options` are those of
    aws.start. Every answer that this process gets is held to AWS's contract (contract.py): what
    breaks it fails at the end.
    """
    before, port = dict(os.environ), free_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    forked = SimpleNamespace(Popen=Fork, DEVNULL=subprocess.DEVNULL)
    try:
        forget_sdk_clients()
        with mock.patch.object(aws, "subprocess", forked), watched() as breaches:
            if start:
                aws.start(port, **options)
                aws.connect(f"http://127.0.0.1:{port}")
            yield port
        assert not breaches, "\n".join(dict.fromkeys(breaches))
    finally:
        aws.stop(port)
        os.environ.clear()
        os.environ.update(before)
        forget_sdk_clients()
