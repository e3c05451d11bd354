"""The endpoint's handler: alone, and over HTTP in a server of its own and in Ray Serve."""

import ast
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import inference
import psutil
import pytest
import torch
import urllib3
from conftest import ROOT
from serving import servers
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor
from transformers.utils import import_utils
from videos import noise, write_sound, write_video

HTTP = urllib3.PoolManager(maxsize=8)
MP4, JSON = "video/mp4", "application/json"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder as train.py leaves it: a tiny random classifier of two labels."""
    torch.manual_seed(0)
    config = VideoMAEConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8, num_frames=4, use_mean_pooling=True, initializer_range=0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    VideoMAEForVideoClassification(config).save_pretrained(folder)
    VideoMAEImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Twenty videos, each of another length."""
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{n}.mp4", noise(n), rate=10) for n in range(5, 25)]


@pytest.fixture(scope="module")
def expected(model, videos):
    classifier = inference.load_classifier(model)
    return [inference.classify_video(video, classifier) for video in videos]


@pytest.fixture(scope="module")
def bucket():
    """An S3 with a bucket, and the variables that lead a process to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(port=0)
    moto.start()
    _, port = moto.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        s3 = boto3.client("s3")
    s3.create_bucket(Bucket="videos")
    yield s3, variables
    moto.stop()


LIMITS = {
    "WORKERS": 2, "INVOCATION_SECONDS": 15, "MAX_BODY_MB": 9, "MAX_VIDEO_MB": 8,
    "MAX_VIDEO_SECONDS": 60, "ALLOWED_PREFIX": "s3://videos/in",
}  # fmt: skip
KINDS = ["own", pytest.param("ray", marks=pytest.mark.long)]


@pytest.fixture(scope="module", params=KINDS)
def endpoint(request, model, bucket):
    with servers.running(request.param, model, faults=True, **LIMITS, **bucket[1]) as running:
        yield running


def post(endpoint, body, kind=MP4):
    """(status, answer) of a request."""
    head = {"Content-Type": kind} if kind else {}
    answer = HTTP.request("POST", endpoint.url, body=body, headers=head, retries=False, timeout=90)
    return answer.status, answer.data


def same(answer: bytes, expected: dict) -> bool:
    found = json.loads(answer)
    close = pytest.approx(expected["probabilities"][0], abs=1e-4)
    return found["duration"] == expected["duration"] and found["probabilities"][0] == close


def refusal(answer: bytes) -> str:
    """The line of an error, which tells nothing about the machine."""
    (line,) = json.loads(answer).values()
    assert "\n" not in line and 5 < len(line) < 250
    assert not re.search("Traceback|File |/tmp|/opt|site-packages", line), line
    return line


def test_the_answer_is_that_of_classify_video(endpoint, videos, expected):
    for kind in (MP4, "application/octet-stream", "video/MP4; codecs=x"):
        status, answer = post(endpoint, videos[3].read_bytes(), kind)
        assert status == 200 and same(answer, expected[3])
    assert servers.status(endpoint.ping) == 200


def test_the_log_names_the_device_of_each_worker(endpoint):
    assert re.search(r"the model is on cpu \(\d+ threads, torch 2\.\S+, CUDA ", endpoint.said())


def test_a_video_in_s3(endpoint, bucket, videos, expected):
    s3, _ = bucket
    for key in ("in/a b.mp4", "inside/a.mp4"):
        s3.upload_file(str(videos[5]), "videos", key)
    s3.put_object(Bucket="videos", Key="in/large.mp4", Body=b"0" * 8_000_001)

    def ask(uri, **settings):
        return post(endpoint, json.dumps({"s3_uri": uri, **settings}), JSON)

    status, answer = ask("s3://videos/in/a b.mp4", threshold=0)
    assert status == 200 and same(answer, expected[5])
    assert len(json.loads(answer)["intervals"]) == 2  # every label is above 0
    for uri, status, said in [
        ("s3://videos/inside/a.mp4", 403, "ALLOWED_PREFIX"),
        ("s3://others/in/a.mp4", 403, "ALLOWED_PREFIX"),
        ("s3://videos/in/none.mp4", 404, "no such object"),
        ("s3://videos/in/large.mp4", 413, "8.0 is above MAX_VIDEO_MB"),
        ("s3://videos/in/\ud800", 400, "not the address"),
    ]:
        found, answer = ask(uri)
        assert (found, said in refusal(answer)) == (status, True), answer
    for settings in ({"threshold": float("nan")}, {"window_seconds": True}, {"hop": 1}):
        status, answer = ask("s3://videos/in/a b.mp4", **settings)
        assert status == 400 and "threshold from 0 to 1" in refusal(answer)


BAD = [  # body, content type, status, a word of the line
    (b"", MP4, 400, "empty"),
    (b"no video", MP4, 400, "known format"),
    (b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n", MP4, 400, "known format"),
    (b"ffconcat version 1.0\nfile other.mp4\n", MP4, 400, "known format"),
    (b"\xff\xfe", JSON, 400, "not JSON"),
    (b"[" * 9_999, JSON, 400, "not JSON"),
    (b"[" * 10_001, JSON, 413, "10,000"),
    (b'{"s3_uri": 1}', JSON, 400, "not JSON"),
    (b'["s3_uri"]', JSON, 400, "not JSON"),
    (b"a,b", "text/csv", 415, "text/csv"),
    (b"0" * 8_500_000, MP4, 413, "8.5 is above MAX_VIDEO_MB, 8"),
    (b"0" * 9_500_000, MP4, 413, "above MAX_BODY_MB, 9"),
]


@pytest.mark.parametrize("body, kind, status, said", BAD, ids=lambda value: str(value)[:20])
def test_what_is_wrong_is_said_in_one_line(endpoint, body, kind, status, said):
    found, answer = post(endpoint, body, kind)
    assert found == status and said in refusal(answer)


def test_videos_that_are_none_or_too_long(endpoint, tmp_path, videos):
    write_sound(tmp_path / "sound.mp4")
    status, answer = post(endpoint, (tmp_path / "sound.mp4").read_bytes())
    assert status == 400 and refusal(answer).startswith("the video: no video stream")
    long = write_video(tmp_path / "long.mp4", noise(70, 16, 16), rate=1)
    status, answer = post(endpoint, long.read_bytes())
    assert status == 413 and "MAX_VIDEO_SECONDS" in refusal(answer)
    cut = videos[-1].read_bytes()
    status, answer = post(endpoint, cut[: len(cut) // 2])
    assert status == 400 and refusal(answer)


def test_two_hundred_requests_at_once_none_lost_none_mixed_up(endpoint, videos, expected):
    bodies = [video.read_bytes() for video in videos]

    def ask(i):
        if i % 20 == 7:
            body, kind, status, said = BAD[i // 20]
            found, answer = post(endpoint, body, kind)
            return "refused" if found == status and said in refusal(answer) else f"bad: {answer}"
        status, answer = post(endpoint, bodies[i % 20])
        return "right" if status == 200 and same(answer, expected[i % 20]) else f"{i}: {answer}"

    with ThreadPoolExecutor(8) as pool:
        assert Counter(pool.map(ask, range(200))) == {"right": 190, "refused": 10}
    assert left(endpoint) == [] and "died" not in endpoint.said()


def left(endpoint) -> list[Path]:
    """Bodies and videos on the disk, which belong to no request."""
    return list(endpoint.temporary.glob("video-*"))


@pytest.mark.long
def test_a_hang_and_a_crash_cost_one_answer_each(endpoint, videos, expected):
    """The other worker answers meanwhile, and each of the two is replaced."""
    with ThreadPoolExecutor(2) as pool:
        bad = pool.map(lambda body: post(endpoint, body), [b"hang", b"die"])
        status, answer = post(endpoint, videos[4].read_bytes())
        assert status == 200 and same(answer, expected[4])
    assert [(status, refusal(answer)) for status, answer in bad] == [
        (504, "no answer after INVOCATION_SECONDS, 15"),
        (500, "the process that read this video died"),
    ]
    assert_all_right(endpoint, videos, expected)


@pytest.mark.long
def test_a_killed_worker_does_no_harm_and_neither_do_all_of_them(endpoint, videos, expected):
    """Killed while they wait for work, as by the kernel when memory is short."""
    for count in (1, 2):
        killed = endpoint.workers()[:count]
        assert len(killed) == count
        for worker in killed:
            worker.kill()
        assert_all_right(endpoint, videos, expected)
    assert servers.status(endpoint.ping) == 200


def assert_all_right(endpoint, videos, expected):
    """Eight requests at once: more than there are workers."""

    def right(i):
        status, answer = post(endpoint, videos[i].read_bytes())
        return status == 200 and same(answer, expected[i])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(right, range(8))) == [True] * 8
    assert left(endpoint) == []


@pytest.mark.long
@pytest.mark.parametrize("kind", ["own", "ray"])
def test_a_server_is_healthy_only_with_a_model(kind, model, tmp_path):
    """First a model that is not loaded yet, then one that cannot be: its error is in the log."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "slow").touch()
    with servers.running(kind, folder, faults=True, wait=False) as endpoint:
        wait_until(
            lambda: endpoint.workers() and servers.status(endpoint.ping) == 503, endpoint.said
        )
        (endpoint.model / "broken").touch()
        (endpoint.model / "slow").unlink()
        wait_until(lambda: "ValueError: a model without weights" in endpoint.said(), endpoint.said)
        for _ in range(20):
            assert servers.status(endpoint.ping) != 200
            time.sleep(0.1)


def wait_until(condition, said=str, seconds=240):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, said()
        time.sleep(0.1)


@pytest.mark.long
def test_sigterm_lets_a_running_request_end(model):
    with (
        servers.running("own", model, faults=True) as endpoint,
        ThreadPoolExecutor(1) as pool,
    ):
        workers = endpoint.workers()
        answer = pool.submit(post, endpoint, b"wait")
        wait_until((endpoint.model / "waiting").exists)
        endpoint.process.terminate()
        wait_until(lambda: servers.status(endpoint.ping) == 0)  # takes no new ones
        (endpoint.model / "go").touch()
        assert answer.result() == (200, b"waited")
        endpoint.process.wait(30)
        assert left(endpoint) == [] and not psutil.wait_procs(workers, 10)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.long
def test_the_server_in_front_holds_no_body_in_memory(model):
    def peak():
        text = Path(f"/proc/{endpoint.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) / 1000  # MB

    with servers.running("own", model, MAX_VIDEO_MB=8) as endpoint:
        before = peak()
        status, answer = post(endpoint, bytes(90_000_000))
        assert status == 413 and "90.0 is above MAX_VIDEO_MB" in refusal(answer)
        assert peak() < before + 30


# ---- The handler alone


@pytest.mark.parametrize(
    "error, status, said",
    [(OSError(errno.ENOSPC, "No space left", "/tmp/x"), 507, "disk is full"),
     (OSError(errno.EIO, "Input/output error", "/tmp/x"), 500, "log"),
     (KeyError("secret"), 500, "log")],
)  # fmt: skip
def test_what_is_our_fault_is_a_5xx_and_its_reason_goes_to_the_log(
    error, status, said, monkeypatch, caplog
):
    def fail(*_):
        raise error

    monkeypatch.setattr(Path, "write_bytes", fail)
    found, answer = inference.answer(None, b"video", MP4)
    assert found == status and said in refusal(answer)
    assert "Traceback" in caplog.text


def test_a_new_worker_shares_the_cores_and_tidies_up_after_a_killed_one(
    model, monkeypatch, tmp_path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in (f"video-{ended.pid}-a", f"video-{os.getpid()}-b", "video-of-mine.mp4"):
        (tmp_path / name).mkdir()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as Ray has it, by OMP_NUM_THREADS
        monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
        monkeypatch.setenv("WORKERS", "2")
        assert inference.model_fn(str(model)).labels == ["LABEL_0", "LABEL_1"]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {f.name for f in tmp_path.iterdir()} == {f"video-{os.getpid()}-b", "video-of-mine.mp4"}


def test_a_gpu_that_torch_cannot_use_is_an_error_with_the_remedy(model, monkeypatch, tmp_path):
    """Else an endpoint answers at the price of a GPU and the speed of a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "all")  # which says nothing
    inference.check_gpu(f"{tmp_path}/nvidia[0-9]*")
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(inference.glob, "glob", partial(found, tmp_path))
    with pytest.raises(RuntimeError, match="nvidia0 is a GPU.* InferenceAmiVersion") as raised:
        inference.model_fn(str(model))
    assert "\n" not in str(raised.value)
    monkeypatch.setenv("ALLOW_CPU", "1")
    assert inference.model_fn(str(model)).model.device.type == "cpu"
    monkeypatch.delenv("ALLOW_CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    inference.check_gpu()


def found(folder, pattern):
    """What glob finds, as if /dev were another folder."""
    return [str(path) for path in folder.glob(Path(pattern).name)]


# ---- What the image has


SERVING = ROOT / "scripts" / "serving"
IN_THE_IMAGE = {"torch", "numpy", "boto3", "botocore", "tqdm", "safetensors", "starlette", "ray"}


def image_of_requirements() -> tuple[str, str]:
    """The versions of Python and torch in the image that requirements.txt is for."""
    text = (SERVING / "requirements.txt").read_text().replace("\n#", "")
    return re.search(r"Python (3\.\d+)\.\d+, torch ([\d.]+),", text).groups()


def test_transformers_takes_the_torch_of_the_image(monkeypatch):
    """If torch is too old, transformers does as if there were none."""
    _, version = image_of_requirements()
    package = import_utils._is_package_available
    for there, taken in {version: True, "2.0.0": False}.items():
        monkeypatch.setattr(
            import_utils, "_is_package_available",
            lambda name, there=there, **how: (True, there) if name == "torch" else package(name),
        )  # fmt: skip
        assert import_utils.is_torch_available.__wrapped__() is taken


def test_the_image_gets_what_it_lacks_and_no_torch():
    pins = dict(re.findall(r"^([\w-]+)(.*)$", (SERVING / "requirements.txt").read_text(), re.M))
    assert "torch" not in pins
    training = (ROOT / "scripts" / "requirements.txt").read_text()
    for name in pins.keys() - {"psutil"}:
        assert f"{name}{pins[name]}" in training.splitlines()
    of_module = {"sklearn": "scikit-learn", "PIL": "pillow"}
    ours = {"train", "inference", "worker"}
    for file in (ROOT / "scripts/inference.py", ROOT / "scripts/train.py", SERVING / "worker.py"):
        for module in modules_at_the_top(file) - ours - IN_THE_IMAGE:
            assert of_module.get(module, module) in pins, f"{file.name} imports {module}"


def modules_at_the_top(file: Path) -> set[str]:
    """The packages that a script imports, less the standard library's."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names


@pytest.mark.long
def test_the_requirements_fit_the_python_and_the_torch_of_the_image(tmp_path):
    """That there are wheels, and that nothing asks for another torch."""
    python, version = image_of_requirements()
    (tmp_path / "image.txt").write_text(f"torch=={version}")
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--only-binary", ":all:"]
    command += ["--python-version", python, "--constraint", tmp_path / "image.txt"]
    done = subprocess.run(
        [*command, SERVING / "requirements.txt"], capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "UV_TORCH_BACKEND"},
    )  # fmt: skip
    if done.returncode and re.search("(?i)dns|connect|request failed|timed out", done.stderr):
        pytest.skip(f"no package index: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0 and f"torch=={version}" in done.stdout, done.stderr


def test_the_own_server_is_small():
    """A reader who builds an image answers for each of its lines."""
    assert len((SERVING / "server.py").read_text().splitlines()) <= 90
