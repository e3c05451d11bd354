"""Bad clips: prepare_clips' check before training, and a training without it or past it.

No crash without a message, no hang, no other clip instead.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import av
import clip_files
import datasets
import decord
import numpy as np
import prepare_clips
import pytest
from conftest import ROOT
from videos import noise, numbered, write_sound, write_video

SEEDED = 300  # damaged files of each run


def rows_of(folder):
    """<folder>/<split>/<label>/* as train.load_clips has them, without its rules."""
    found = datasets.DatasetDict()
    for split in sorted(folder.iterdir()):
        labels = sorted(label.name for label in split.iterdir())
        paths = [path for label in labels for path in sorted((split / label).iterdir())]
        found[split.name] = datasets.Dataset.from_dict(
            {"video": [str(path) for path in paths], "label": [path.parent.name for path in paths]},
            features=datasets.Features(
                {"video": datasets.Video(decode=False), "label": datasets.ClassLabel(names=labels)}
            ),
        )
    return found


def clip_tree(folder, *names):
    for name in names:
        write_video(folder / name, numbered(20))
    return folder


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
    import torch
    import train

    rng = np.random.default_rng(0)
    sources = []
    for name, gop in (("a.mp4", "12"), ("b.mp4", "60"), ("c.mkv", "12")):
        write_video(tmp_path / name, numbered(60) // 2 + noise(60, 64, 100) // 4, g=gop)
        sources.append((name[-4:], (tmp_path / name).read_bytes()))
    kinds, folder = {}, tmp_path / "clips"
    for i in range(SEEDED):
        suffix, data = sources[i % 3]
        what, data = damaged(data, rng)
        path = folder / "train" / "ab"[i % 2] / f"{i:03}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        kinds[str(path)] = what
    clip_tree(folder, *(f"{split}/{x}/good.mp4" for split in ("train", "validation") for x in "ab"))
    good, bad = prepare_clips.check_clips(rows_of(folder), 16, on_bad_clip="skip")
    assert set(bad) <= set(kinds) and all(reason and "\n" not in reason for reason in bad.values())
    assert {kinds[path] for path in bad} == set(kinds.values())  # of each kind, some are unreadable
    left = [video["path"] for video in good["train"]["video"]]
    assert len(left) + len(bad) == SEEDED + 2
    assert len({*left} & {*kinds}) > 1  # some damage is where no decoder looks
    args = types.SimpleNamespace(
        num_frames=16, image_size=32, sampling="uniform", sampling_rate=2, rate=0, zoom=0.15,
        horizontal_flip=False, seed=0, eval_views=1, eval_crops=1,
    )  # fmt: skip
    batches = train.Clips(good["train"], args, training=True)
    loader = torch.utils.data.DataLoader(
        Tried(batches), batch_size=None, num_workers=1, sampler=range(2 * len(batches)), timeout=120
    )
    outcomes = list(loader)
    assert len(outcomes) == 2 * len(left)
    for position, shape in enumerate(outcomes):
        path = left[position % len(left)]
        assert shape == "[16, 3, 32, 32]" or shape.startswith(path), shape


class Tried:
    """The shape of each clip, or the message of its error."""

    def __init__(self, clips):
        self.clips = clips

    def __getitem__(self, position):
        try:
            return str([*self.clips[position]["pixel_values"].shape])
        except ValueError as error:
            return str(error)


PROBE = clip_files.clip_problem


def probe_of_a_bad_decoder(path, num_frames):
    if "train/a/crash" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    if "train/a/hang" in path:
        time.sleep(600)
    if "train/b/strange" in path:
        raise MemoryError
    return PROBE(path, num_frames)


def test_a_decoder_that_crashes_or_hangs_is_reported_like_any_bad_clip(tmp_path, monkeypatch):
    names = ("a/crash.mp4", "a/hang.mp4", "a/good.mp4", "b/good.mp4", "b/strange.mp4")
    clip_tree(tmp_path, *(f"{split}/{name}" for split in ("train", "validation") for name in names))
    monkeypatch.setattr(prepare_clips, "clip_problem", probe_of_a_bad_decoder)
    monkeypatch.setattr(prepare_clips, "DECODE_SECONDS", 2)
    good, bad = prepare_clips.check_clips(rows_of(tmp_path), 16, on_bad_clip="skip")
    assert {re.sub(".*/", "", path): why for path, why in bad.items()} == {
        "crash.mp4": "crashed the process that read it (exit code -9)",
        "hang.mp4": "not done after 4 s",
        "strange.mp4": "MemoryError()",
    }
    assert len(good["train"]) == 2 and len(good["validation"]) == 5


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
import clip_files
import prepare_clips
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(clip_files.clip_problem({str(tmp_path / "huge.avi")!r}, 16)[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    reason, megabytes = result.stdout.splitlines()[-2:]
    assert reason.startswith("frames of 12000 x 12000 pixels")
    assert int(megabytes) < 2000


def test_names_links_and_endings(tmp_path, capsys):
    """Names with spaces, accents and Chinese; links; endings that lie."""
    import train

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
    (place / "old.txt").write_text("a file that nobody looks at")
    good, bad = prepare_clips.check_clips(train.load_clips(str(folder)), 8, on_bad_clip="skip")
    assert {re.sub(".*/", "", p): why.split(";")[0] for p, why in bad.items()} == {
        "broken link.mp4": "no such file (a broken link?)",
        "text.mp4": "not a video, or damaged (Invalid data found when processing input)",
    }
    assert len(good["train"]) == 4
    for video in good["train"]["video"]:
        assert train.read_clip(video["path"], 8, 32).shape == (8, 3, 32, 32)
    assert "ignored, as hidden, no video" in capsys.readouterr().out


@pytest.mark.long
def test_ten_thousand_files(tmp_path):
    import train

    write_video(tmp_path / "clip.mp4", numbered(2))
    for split, count in (("train", 4500), ("validation", 500)):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / label / f"{i}.mp4").hardlink_to(tmp_path / "clip.mp4")
    clips = train.load_clips(str(tmp_path))
    assert len(clips["train"]) == 9000 and len(clips["validation"]) == 1000
    clips["train"] = clips["train"].shuffle(seed=0).select(range(1000))
    assert prepare_clips.check_clips(clips, 2)[1] == {}


def test_skipping_leaves_no_class_empty(tmp_path):
    clip_tree(tmp_path, *(f"{split}/{x}/1.mp4" for split in ("train", "validation") for x in "ab"))
    (tmp_path / "train" / "b" / "1.mp4").write_bytes(b"")
    clips = rows_of(tmp_path)
    with pytest.raises(ValueError, match=r"b/1.mp4: empty file(.|\n)*--on_bad_clip skip$"):
        prepare_clips.check_clips(clips, 16)
    with pytest.raises(ValueError, match=r"split train has no clip left of \['b'\]"):
        prepare_clips.check_clips(clips, 16, on_bad_clip="skip")


def test_every_bad_clip_is_in_one_report_and_short_ones_are_mentioned_once(tmp_path, capsys):
    clip_tree(tmp_path, *(f"train/{label}/{i}.mp4" for label in "ab" for i in range(4)))
    a, b = tmp_path / "train" / "a", tmp_path / "train" / "b"
    (a / "0.mp4").write_bytes(b"")
    (a / "1.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (a / "2.mp4").write_bytes((a / "2.mp4").read_bytes()[:1000])
    write_video(b / "0.mp4", noise(20), codec="libsvtav1")
    write_sound(b / "1.mp4")
    write_video(b / "2.mp4", noise(5))
    with pytest.raises(ValueError) as error:
        prepare_clips.check_clips(rows_of(tmp_path), num_frames=16)
    report = str(error.value)
    reasons = {
        "a/0.mp4": "empty file", "a/1.mp4": "damaged", "a/2.mp4": "damaged",
        "b/0.mp4": "(av1); try: prepare_clips.py, or ffmpeg", "b/1.mp4": "no video stream",
    }  # fmt: skip
    if not decord.__version__.startswith("0.6."):  # decord2 reads AV1
        del reasons["b/0.mp4"]
    assert report.startswith(f"{len(reasons)} of 8 clips cannot be read:\n")
    for name, why in reasons.items():
        assert [why in line for line in report.splitlines() if name in line] == [True], report
    assert "/b/2.mp4" not in report
    out = capsys.readouterr().out
    assert out.startswith("opening 8 clips, to be sure of them\n")
    assert out.count("1 clips have fewer than 16 frames and repeat some: ") == 1


STREAMS = {
    "mpeg2.mpeg": {"codec": "mpeg2video", "rate": 25, "bf": "2"},
    "mpeg2_without_b.mpg": {"codec": "mpeg2video", "rate": 25},
    "wmv2.wmv": {"codec": "wmv2"},
    "h264.ts": {"bf": "2"},
}


@pytest.mark.parametrize("name", STREAMS)
def test_containers_in_which_decord_finds_other_frames_are_compared(tmp_path, name):
    path = write_video(tmp_path / name, numbered(100), **STREAMS[name])
    total, why = clip_files.clip_problem(str(path), 16)
    assert total == 0 and "decord mixes up the frames" in why and "prepare_clips.py" in why
    if name != "h264.ts":  # which decord often cannot read at all
        write_video(path, np.repeat(numbered(1), 100, axis=0), **STREAMS[name])  # any frame will do
        assert clip_files.clip_problem(str(path), 16) == (100, None)


def test_the_picture_of_an_audio_file_is_no_clip(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as song:
        picture, sound = song.add_stream("mjpeg"), song.add_stream("aac", rate=16000)
        picture.width, picture.height, picture.pix_fmt = 96, 64, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        song.mux(picture.encode(av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        silence.sample_rate = 16000
        song.mux(sound.encode(silence))
        song.mux(sound.encode(None))
    assert clip_files.clip_problem(str(path), 16) == (0, "no video stream (audio only)")


def test_a_long_clip_is_compared_within_little_memory(tmp_path):
    """Comparing all thumbnails with all sampled ones at once took 1.3 GB of 10,000 frames."""
    path = tmp_path / "long.wmv"
    write_video(path, np.broadcast_to(numbered(1, 32, 64), (3000, 32, 64, 3)), codec="wmv2")
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import clip_files
import prepare_clips
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(clip_files.clip_problem({str(path)!r}, 16))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[0] == "(3000, None)"
    assert int(result.stdout.splitlines()[1]) < 200


def test_a_rare_class_that_the_validation_split_misses_is_no_bad_clip(tmp_path):
    import train

    clip = write_video(tmp_path / "clip.mp4", numbered(20)).read_bytes()
    for label, count in (("a", 2), ("b", 20)):
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "train" / label / f"{i}.mp4").write_bytes(clip)
    clips = train.load_clips(str(tmp_path))
    assert set(clips["validation"]["label"]) == {1}  # one of two would be half of the class
    assert prepare_clips.check_clips(clips, 16)[1] == {}


@pytest.mark.long
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
