"""scripts/train.py with bad input: no crash without a message, no hang, no other clip instead."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import train
from conftest import ROOT
from videos import noise, numbered, write_video

SEEDED = 300  # damaged files of each run


def damaged(data, rng):
    """Bytes of a video, cut off, with flipped bits, or with a hole of zeros: (what, bytes)."""
    data = bytearray(data)
    what = rng.choice(["cut", "flip", "zero", "header"])
    if what == "cut":
        return what, bytes(data[: rng.integers(1, len(data))])
    if what == "zero":
        start = rng.integers(0, len(data))
        end = min(len(data), start + rng.integers(1, len(data) // 2))
        data[start:end] = bytes(end - start)
        return what, bytes(data)
    where = data.find(b"moov") if what == "header" else 0
    for _ in range(rng.integers(1, 40)):
        data[rng.integers(max(0, where), len(data))] ^= 1 << rng.integers(0, 8)
    return what, bytes(data)


def test_hundreds_of_damaged_files(tmp_path):
    """Each is reported with a reason, or it is read in full; whatever training draws later."""
    rng = np.random.default_rng(0)
    sources = []
    for name, gop in (("a.mp4", "12"), ("b.mp4", "60"), ("c.mkv", "12")):
        write_video(tmp_path / name, numbered(60) // 2 + noise(60, 64, 96) // 4, g=gop)
        sources.append((name[-4:], (tmp_path / name).read_bytes()))
    kinds = {}
    for i in range(SEEDED):
        suffix, data = sources[i % 3]
        what, data = damaged(data, rng)
        path = tmp_path / "train" / "ab"[i % 2] / f"{i:03}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        kinds[str(path)] = what
    for label in "ab":
        for split in ("train", "validation"):
            (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
            write_video(tmp_path / split / label / "good.mp4", numbered(20))
    clips = train.load_clips(str(tmp_path))
    good, bad = train.check_clips(clips, 16, on_bad_clip="skip")
    assert set(bad) <= set(kinds) and all(reason and "\n" not in reason for reason in bad.values())
    assert {kinds[path] for path in bad} == set(kinds.values())  # of each kind, some are unreadable
    left = [video["path"] for video in good["train"]["video"]]
    assert len(left) + len(bad) == SEEDED + 2 and {kinds.get(p) for p in left} >= {"flip", None}
    reading = {"num_frames": 16, "size": 32, "sampling_rate": 0}
    batches = train.TrainClips(good["train"], 0, **reading)
    loader = torch.utils.data.DataLoader(
        Tried(batches), batch_size=None, num_workers=1, sampler=range(2 * len(batches)), timeout=120
    )
    outcomes = list(loader)
    assert len(outcomes) == 2 * len(left)
    for position, shape in enumerate(outcomes):
        path = left[position % len(left)]
        assert shape == "[16, 3, 32, 32]" or shape.startswith(path), shape


class Tried(torch.utils.data.Dataset):
    """The shape of each clip, or the message of its error."""

    def __init__(self, clips):
        self.clips = clips

    def __getitem__(self, position):
        try:
            return str([*self.clips[position]["pixel_values"].shape])
        except ValueError as error:
            return str(error)


PROBE = train.clip_problem


def probe_of_a_bad_decoder(path, num_frames):
    if "train/a/crash" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    if "train/a/hang" in path:
        time.sleep(600)
    return PROBE(path, num_frames)


def test_a_decoder_that_crashes_or_hangs_is_reported_like_any_bad_clip(tmp_path, monkeypatch):
    for name in ("train/a/crash", "train/a/hang", "train/a/good", "train/b/good"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / f"{name}.mp4", numbered(20))
        copy = tmp_path / f"{name}.mp4".replace("train", "validation")
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_video(copy, numbered(20))
    monkeypatch.setattr(train, "clip_problem", probe_of_a_bad_decoder)
    monkeypatch.setattr(train, "DECODE_SECONDS", 2)
    clips = train.load_clips(str(tmp_path))
    _, bad = train.check_clips(clips, 16, on_bad_clip="skip")
    reasons = {re.sub(".*/", "", path): why for path, why in bad.items()}
    assert set(reasons) == {"crash.mp4", "hang.mp4"}
    assert "the decoder crashed" in reasons["crash.mp4"]
    assert "longer than 4 s" in reasons["hang.mp4"]


def test_a_decode_that_hangs_in_training_is_bounded(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", numbered(20))
    monkeypatch.setattr(train, "DECODE_SECONDS", 0.5)
    monkeypatch.setattr(train, "decode", lambda *args: time.sleep(60))
    with pytest.raises(ValueError, match="clip.mp4: decoding took more than 0.5 s"):
        train.read_clip(str(tmp_path / "clip.mp4"), 16, 32)


def test_an_enormous_frame_is_refused_before_it_is_decoded(tmp_path):
    """A header that says 12000 x 12000: sixteen such frames are 7 GB."""
    write_video(tmp_path / "small.avi", noise(20), codec="mjpeg", pix_fmt="yuvj420p")
    data = (tmp_path / "small.avi").read_bytes()
    size = (12000).to_bytes(2, "big") * 2
    data, count = re.subn(rb"(\xff\xc0\x00\x11\x08)....", lambda m: m[1] + size, data, flags=re.S)
    at = data.find(b"strf") + 12  # the container's own word
    data = data[:at] + (12000).to_bytes(4, "little") * 2 + data[at + 8 :]
    assert count >= 20
    (tmp_path / "huge.avi").write_bytes(data)
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import train
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(train.clip_problem({str(tmp_path / "huge.avi")!r}, 16)[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    reason, megabytes = result.stdout.splitlines()[-2:]
    assert reason.startswith("frames of 12000 x 12000 pixels")
    assert int(megabytes) < 2000


def test_names_links_and_endings(tmp_path, capsys):
    """Names with spaces, accents and Chinese; links; endings that lie."""
    folder = tmp_path / "我的 影片"
    real = tmp_path / "elsewhere.mp4"
    write_video(real, numbered(20))
    for label in ("舉手", "not raising é"):
        for split in ("train", "validation"):
            (folder / split / label).mkdir(parents=True)
            (folder / split / label / "片段 1 (é).MP4").write_bytes(real.read_bytes())
    place = folder / "train" / "舉手"
    (place / "link.mp4").symlink_to(real)
    (place / "broken link.mp4").symlink_to(tmp_path / "gone.mp4")
    (place / "text.mp4").write_text("not a video")
    (place / "really mkv.mp4").write_bytes(real.read_bytes())
    (place / "folder.mp4").mkdir()
    (place / "notes.txt").write_text("ignored")
    (place / "old.wmv").write_text("a video that we do not look at")
    good, bad = train.check_clips(train.load_clips(str(folder)), 8, on_bad_clip="skip")
    assert {re.sub(".*/", "", p): why.split(";")[0] for p, why in bad.items()} == {
        "broken link.mp4": "no such file (a broken link?)",
        "text.mp4": "not a video, or damaged (Invalid data found when processing input)",
    }
    assert len(good["train"]) == 4
    for video in good["train"]["video"]:
        assert train.read_clip(video["path"], 8, 32).shape == (8, 3, 32, 32)
    assert "2 files are left out, since they do not end in .mp4" in capsys.readouterr().out


def test_ten_thousand_files(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(2))
    for split, count in (("train", 4500), ("validation", 500)):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / label / f"{i}.mp4").hardlink_to(tmp_path / "clip.mp4")
    clips = train.load_clips(str(tmp_path))
    assert len(clips["train"]) == 9000 and len(clips["validation"]) == 1000
    clips["train"] = clips["train"].shuffle(seed=0).select(range(1000))
    assert train.check_clips(clips, 2)[1] == {}


def test_skipping_leaves_no_class_empty(tmp_path):
    for split in ("train", "validation"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            write_video(tmp_path / split / label / "1.mp4", numbered(20))
    (tmp_path / "train" / "b" / "1.mp4").write_bytes(b"")
    clips = train.load_clips(str(tmp_path))
    with pytest.raises(ValueError, match=r"b/1.mp4: empty file(.|\n)*--on_bad_clip skip"):
        train.check_clips(clips, 16)
    with pytest.raises(ValueError, match=r"split train has no clip left of \['b'\]"):
        train.check_clips(clips, 16, on_bad_clip="skip")


def test_a_rare_class_that_the_validation_split_misses_is_no_bad_clip(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", numbered(20)).read_bytes()
    for label, count in (("a", 2), ("b", 20)):
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "train" / label / f"{i}.mp4").write_bytes(clip)
    clips = train.load_clips(str(tmp_path))
    assert set(clips["validation"]["label"]) == {1}  # one of two would be half of the class
    assert train.check_clips(clips, 16)[1] == {}


def test_a_run_without_the_bad_clips_lists_them(clips_folder, native_checkpoint, tmp_path):
    for path in clips_folder.glob("*/*/*.mp4"):
        copy = tmp_path / "clips" / path.relative_to(clips_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    broken = sorted((tmp_path / "clips").glob("test/*/*.mp4"))[0]
    broken.unlink()
    broken.write_bytes(b"")
    command = [sys.executable, ROOT / "scripts" / "train.py", "--dataset", tmp_path / "clips"]
    command += ["--model_name", native_checkpoint, "--epochs", "1"]
    stopped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert stopped.returncode == 1 and f"{broken}: empty file (0 bytes)" in stopped.stderr
    result = subprocess.run([*command, "--on_bad_clip", "skip"], cwd=tmp_path, capture_output=True)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "outputs/data/metrics.json").read_text())
    assert metrics["skipped_clips"] == {str(broken): "empty file (0 bytes)"}
