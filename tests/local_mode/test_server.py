"""The embedded AWS as a server: who reaches it, its command line, its start and its end."""

import inspect
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import boto3
import psutil
import pytest
from account import BUCKET, ROLE, account_port, wait_until  # noqa: F401
from embedded import free_port
from local_mode import aws

COMMAND = str(Path(aws.__file__).parent)  # Python runs a folder's __main__.py
README = Path(aws.__file__).parents[1] / "README.md"


def test_none_is_aws_itself(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert aws.connect(None) is None
    assert "AWS_ENDPOINT_URL" not in os.environ


@pytest.mark.parametrize("url", ["https://127.0.0.1:5599", "http://10.0.0.1:5599", "example.com"])
def test_only_loopback(url):
    with pytest.raises(ValueError, match="loopback"):
        aws.connect(url)


def test_start_is_idempotent(port):
    pid = aws.status(port)["pid"]
    assert aws.start(port) == f"http://127.0.0.1:{port}"
    assert aws.status(port)["pid"] == pid


def test_connect_leads_nowhere_else(port, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://10.0.0.1")
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("HTTP_PROXY", "http://10.0.0.1:1")
    aws.connect(f"http://127.0.0.1:{port}")
    assert BUCKET in [b["Name"] for b in boto3.Session().client("s3").list_buckets()["Buckets"]]


def test_port_of_another_program():
    other = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=other.serve_forever).start()
    try:
        with pytest.raises(RuntimeError, match=f"Port {other.server_port}.*another port"):
            aws.start(other.server_port)
    finally:
        other.shutdown()
        other.server_close()


def test_temporary_folder_with_a_space(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(aws.tempfile, "tempdir", str(tmp_path / "a b"))
    with pytest.raises(RuntimeError, match="TMPDIR"):
        aws.start(free_port())


def test_closed_to_web_pages(port):
    for header in ({"Origin": "http://example.com"}, {"Host": f"example.com:{port}"}):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/moto-api/", headers=header)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)


def test_the_readme_has_every_module_and_no_other():
    text = README.read_text()
    table = text[text.index("## The modules") : text.index("## What the embedded AWS does")]
    files = {path.name for path in Path(aws.__file__).parent.glob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", table)) == files


def test_the_differences_name_options_that_exist():
    """What the table of differences calls an option is one of aws.start, or shown by status."""
    table = README.read_text().partition("## What the embedded AWS does")[2]
    options = [*inspect.signature(aws.start).parameters]
    for name in ("enforce", "spot_interruptions", "no_capacity", "namespaces"):
        assert f"`{name}`" in table and name in options, name


def test_stop_ends_the_jobs_and_clears_up(port):
    """The command line, a server that outlives the process that started it, and its stop."""
    other = free_port()

    def cli(action):
        command = [sys.executable, COMMAND, action, "--port", str(other)]
        return subprocess.run(command, cwd="/", capture_output=True, text=True)

    def sleepers():  # by what they run: in a namespace they have numbers of their own
        known = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        return [words for words in known if str(pid_file) in " ".join(words)]

    assert cli("status").returncode == 1
    try:
        assert cli("start").stdout.strip().endswith(f"http://127.0.0.1:{other}")
        assert cli("status").returncode == 0
        folder = Path(aws.status(other)["folder"])
        assert folder.stat().st_mode & 0o777 == 0o700
        endpoint = {"endpoint_url": f"http://127.0.0.1:{other}"}
        pid_file = folder / "jobs/sleeper/127.0.0.1/pid"
        code = f"import time; open({str(pid_file)!r}, 'w')"
        boto3.client("s3", **endpoint).create_bucket(Bucket=BUCKET)
        boto3.client("sagemaker", **endpoint).create_training_job(
            TrainingJobName="sleeper",
            RoleArn=ROLE,
            AlgorithmSpecification={
                "TrainingImage": "none",
                "TrainingInputMode": "File",
                "ContainerEntrypoint": ["bash", "-c", f'python3 -c "{code}; time.sleep(600)"'],
            },
            OutputDataConfig={"S3OutputPath": f"s3://{BUCKET}/out"},
            ResourceConfig={"InstanceType": "m", "InstanceCount": 1, "VolumeSizeInGB": 1},
            StoppingCondition={"MaxRuntimeInSeconds": 600},
        )
        wait_until(pid_file.exists)
        assert sleepers()
    finally:
        stopped = cli("stop")
    assert stopped.returncode == 0
    assert not sleepers()
    assert aws.status(other) is None and not folder.exists()
    assert cli("stop").returncode == 0  # nothing to stop is no error
