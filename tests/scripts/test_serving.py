"""The endpoint's handler: alone, and in the model server of AWS's images, over HTTP."""

import errno
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import inference
import pytest
import torch
import urllib3
from serving import server
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor
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


@pytest.fixture(scope="module")
def endpoint(model, bucket, tmp_path_factory):
    if reason := server.obstacle():
        pytest.skip(reason)
    archive = server.write_artefact(model, tmp_path_factory.mktemp("artefact") / "model.tar.gz")
    limits = {"TS_MAX_REQUEST_SIZE": 9_000_000, "MAX_VIDEO_MB": 8, "MAX_VIDEO_SECONDS": 60}
    allowed = {"ALLOWED_PREFIX": "s3://videos/in", "TS_DEFAULT_RESPONSE_TIMEOUT": 600}
    with server.running(archive, workers=2, **limits, **allowed, **bucket[1]) as running:
        yield running


def post(endpoint, body, kind=MP4):
    """(status, answer) of /invocations."""
    head = {"Content-Type": kind} if kind else {}
    url = f"{endpoint.url}/invocations"
    answer = HTTP.request("POST", url, body=body, headers=head, retries=False, timeout=60)
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


@pytest.mark.long
def test_the_answer_is_that_of_classify_video(endpoint, videos, expected):
    assert HTTP.request("GET", f"{endpoint.url}/ping").status == 200
    status, answer = post(endpoint, videos[3].read_bytes())
    assert status == 200 and same(answer, expected[3])
    status, answer = post(endpoint, videos[3].read_bytes(), "application/octet-stream")
    assert status == 200 and same(answer, expected[3])


def test_the_limits_of_the_server_itself(endpoint):
    """What lifts them: the toolkit's SAGEMAKER_MODEL_SERVER_TIMEOUT does not reach TorchServe."""
    status, answer = post(endpoint, b"0" * 9_500_000)  # above 6,553,500, the server's default
    assert (status, answer) == (413, b"")
    answer = HTTP.request("GET", f"{endpoint.url}/models/model").json()
    assert answer[0]["responseTimeout"] == 600


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
    before = sorted(file.name for file in endpoint.temporary.iterdir())
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
    assert sorted(file.name for file in endpoint.temporary.iterdir()) == before  # nothing is left
    assert "Worker died" not in endpoint.log.read_text()


class Context:
    """Of the toolkit's context, what the handler uses."""

    def set_response_status(self, code, phrase):
        self.status = code


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
    context = Context()
    answer = inference.transform_fn(None, b"video", MP4, None, context)
    assert context.status == status and said in refusal(answer)
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
        torch.set_num_threads(4)
        monkeypatch.setenv("SAGEMAKER_MODEL_SERVER_WORKERS", "2")
        assert inference.model_fn(str(model)).labels == ["LABEL_0", "LABEL_1"]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {f.name for f in tmp_path.iterdir()} == {f"video-{os.getpid()}-b", "video-of-mine.mp4"}
