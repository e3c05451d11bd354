"""An AWS account on this machine, so that the notebooks run without one: what they call.

It is moto (S3, IAM, STS, CloudWatch, SageMaker, ...) as a server on 127.0.0.1, extended where moto
stops short: training and processing jobs really run, endpoints answer, quotas bite. Each module of
this package plays one service or duty: ../README.md has a table of them, and the one table of what
the embedded AWS does differently from the service.

    python notebooks/local_mode/aws start        # and: status, stop, interrupt JOB

The server outlives the notebook that started it. Its one folder, <temp>/embedded-aws-<uid>-<port>,
holds `pid`, `server.log`, and for each job, host and endpoint a folder that is laid out as a
container's /opt/ml; `stop` deletes it.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil

PORT = 5599
GRACE_SECONDS = 120  # between SIGTERM and SIGKILL, as the service has it
# What a job sees of your environment: what a machine needs, and no secret of yours.
INHERITED = re.compile(
    r"HOME|USER|LANG|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS"
    r"|HF_HOME|HF_ENDPOINT|HF_HUB_OFFLINE|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|(?i:https?|no)_(?i:proxy)"
)
_servers = []  # started here; a Popen that is forgotten warns about a process meant to live on


def connect(endpoint_url):
    """Point this process at the embedded AWS, and start that if need be. None means AWS itself."""
    if endpoint_url is None:
        return None
    address = urlsplit(endpoint_url)
    if address.scheme != "http" or address.hostname not in ("127.0.0.1", "localhost"):
        raise ValueError(
            f"endpoint_url is {endpoint_url!r}: it must be None (AWS itself) or a loopback address "
            f"such as http://127.0.0.1:{PORT} (the embedded AWS)."
        )
    url = start(address.port or PORT)
    for name in list(os.environ):  # each of these would win over what is set below
        if name in ("AWS_PROFILE", "AWS_SESSION_TOKEN") or re.match(r"AWS_.*ENDPOINT_URL", name):
            del os.environ[name]
    # The account starts empty, so the role that you name need not exist in it.
    os.environ.update(_aws_variables(url), SAGEMAKER_VALIDATE_ROLE="false")
    return url


def disconnect(endpoint_url):
    """End the embedded AWS at `endpoint_url`; AWS itself (None) is left alone.

    Raises RuntimeError, with the names, if its account is not empty: then it runs on.
    """
    if endpoint_url is None:
        return
    port = urlsplit(endpoint_url).port or PORT
    left = _ask(port, "GET", "/_embedded_aws/account")
    if left:
        more = ", ..." if len(left) > 9 else ""
        raise RuntimeError(
            f"The embedded AWS on port {port} runs on, because its account is not empty "
            f"({len(left)}): {', '.join(left[:9])}{more}. `python notebooks/local_mode/aws stop "
            f"--port {port}` ends it all."
        )
    stop(port)


def start(
    port=PORT,
    grace_seconds=GRACE_SECONDS,
    spot_interruptions=1,
    enforce=False,
    no_capacity=(),
    namespaces=True,
):
    """Start the embedded AWS on 127.0.0.1:`port`, unless it runs there already; return its URL.

    Each managed-spot job that keeps checkpoints loses its instance `spot_interruptions` times.
    Everybody may do everything in it, unless `enforce` makes IAM's policies count (permissions.py).
    The service has no instance of a type in `no_capacity`, whatever the quota. A job is a PID
    namespace of its own where the machine allows that, unless `namespaces` is False (processes.py).
    """
    url, running = f"http://127.0.0.1:{port}", status(port)
    if running and enforce and not running["enforce"]:
        raise RuntimeError(
            f"The embedded AWS on port {port} allows everything. Stop it first (python "
            f"notebooks/local_mode/aws stop --port {port}), or name another port, for example "
            f"{port + 1}."
        )
    if running and running["python"] == sys.prefix:
        return url
    if running:
        raise RuntimeError(
            f"The embedded AWS on port {port} runs its jobs with the Python of {running['python']},"
            f" and you are in {sys.prefix}. Stop it (python notebooks/local_mode/aws stop "
            f"--port {port}), or name another port, for example {port + 1}."
        )
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise RuntimeError(
                f"Port {port} of 127.0.0.1 is in use by another program, or by another user. Name "
                f"another port, for example {port + 1}; `lsof -i :{port}` tells who has this one."
            )
    state = _state_folder(port)
    # The SDK's driver scripts do not quote: this link has no space, wherever Python lies.
    with contextlib.suppress(FileExistsError):  # another start, at the same time
        (state / "python").unlink(missing_ok=True)
        (state / "python").symlink_to(sys.prefix)
    environment = {name: value for name, value in os.environ.items() if INHERITED.fullmatch(name)}
    environment["PATH"] = f"{state}/python/bin:{os.environ.get('PATH', os.defpath)}"
    folder = str(Path(__file__).parent)  # Python runs its __main__.py
    command = [sys.executable, folder, "serve", f"--port={port}", f"--grace={grace_seconds}"]
    command.append(f"--spot-interruptions={spot_interruptions}")
    command += ["--enforce"] if enforce else []
    command += [f"--no-capacity={kind}" for kind in no_capacity]
    command += [] if namespaces else ["--no-namespaces"]
    with open(state / "server.log", "w") as log:
        server = subprocess.Popen(
            command,
            cwd=state,
            env=environment | _aws_variables(url),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # out of reach of a kernel's interrupt and of its end
        )
    _servers.append(server)
    (state / "pid").write_text(str(server.pid))
    deadline = time.monotonic() + 120
    while not status(port):
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            tail = (state / "server.log").read_text()[-2000:]
            raise RuntimeError(f"No start on port {port}; {state}/server.log ends with:\n{tail}")
        time.sleep(0.1)
    return url


def status(port=PORT):
    """Return what the embedded AWS on `port` tells of itself, or None if none of yours is there."""
    try:
        answer = _ask(port, "GET", "/_embedded_aws")
    except (OSError, http.client.HTTPException, ValueError):
        return None
    return answer if isinstance(answer, dict) and answer.get("user") == os.getuid() else None


def stop(port=PORT):
    """End the server on `port` and all of its jobs, delete its folder, and tell if it ran."""
    state, running, family = _state_folder(port), status(port), []
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        # A server that hangs is known by the file.
        server = psutil.Process(running["pid"] if running else int((state / "pid").read_text()))
        if server.cwd() == str(state):  # and no other program that has this number by now
            server.suspend()  # it shall start nothing while its children are counted
            family = [server, *server.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    for server in _servers:
        server.poll()
    psutil.wait_procs(family, timeout=10)
    shutil.rmtree(state, ignore_errors=True)
    return bool(family)


def interrupt(job_name, port=PORT):
    """Take the spot instance away from a job: it ends, and starts again from its checkpoints."""
    answer = _ask(port, "POST", "/_embedded_aws/interrupt", json.dumps({"job": job_name}))
    if "error" in answer:
        raise ValueError(answer["error"])


def _ask(port, method, path, body=None):
    """Ask the server itself; unlike urllib and boto3, http.client knows of no proxy."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def _aws_variables(url):
    """The environment variables that lead boto3 to the embedded AWS, past any proxy."""
    bypass = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "127.0.0.1"
    bypass += "" if "127.0.0.1" in bypass else ",127.0.0.1"
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": bypass,
        "no_proxy": bypass,
    }


def _state_folder(port):
    """The server's folder, private to this user."""
    state = Path(tempfile.gettempdir()).resolve() / f"embedded-aws-{os.getuid()}-{port}"
    if not re.fullmatch(r"[\w/.+-]+", str(state)):
        raise RuntimeError(
            f"The temporary folder {state.parent} has a space or a special character in its name, "
            "and the SDK's driver scripts do not quote. Set TMPDIR, for example to /tmp."
        )
    state.mkdir(mode=0o700, exist_ok=True)
    if state.is_symlink() or state.stat().st_uid != os.getuid():
        raise RuntimeError(f"{state} belongs to somebody else. Name another port.")
    state.chmod(0o700)
    return state
