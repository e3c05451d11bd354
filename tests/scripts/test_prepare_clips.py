"""scripts/prepare_clips.py: the same frames at the same times, bad clips named, nothing lost.

Its check of clips as they are is in test_bad_clips.py.
"""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from fractions import Fraction

import av
import clip_files
import decord
import huggingface_hub
import numpy as np
import prepare_clips
import pytest
from conftest import ROOT
from videos import every_frame, number, numbered, write_sound, write_video

SCRIPT = ROOT / "scripts" / "prepare_clips.py"


def decoded(path):
    """(all frames in sequence, uint8 [frames, height, width, 3]; frames per second)."""
    with av.open(str(path)) as container:
        return every_frame(path), container.streams.video[0].average_rate


def random_access(path, total):
    """The numbers that decord reads at shuffled places, in the order of the places."""
    places = np.random.default_rng(0).permutation(total)[:40]
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    assert len(reader) == total
    frames = reader.get_batch(places.tolist()).asnumpy()
    numbers = [number(frame) for frame in frames]
    return [numbers[i] for i in places.argsort()], np.sort(places).tolist()


def make(source, short_side=256):
    """Prepares one clip; returns the path of the result."""
    target = source.with_name("prepared.mp4")
    assert clip_files.prepare_clip(source, target, short_side, 12)
    return target


def with_scripts():
    """The environment, with scripts/ on PYTHONPATH, after another decoder that is there."""
    paths = [os.environ.get("PYTHONPATH", ""), str(SCRIPT.parent)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(*args, script=SCRIPT):
    """(exit code, stdout, stderr without progress bars) of the script in a process of its own."""
    env = with_scripts()
    command = [sys.executable, str(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    err = re.sub(r"\n?prepare clips: .*\n?", "", done.stderr)  # seen after 10 s on a slow machine
    return done.returncode, done.stdout, err


def patched(folder, code):
    """A script that runs prepare_clips with `code` executed first, in its workers as well."""
    path = folder / "patched.py"
    path.write_text(
        f"import os, sys, time\nimport prepare_clips\n{code}\n"
        'if __name__ == "__main__":\n    prepare_clips.main()\n'
    )
    return path


def tree(folder, *names):
    """Files with videos' names, which nobody opens."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


# ---- The same frames at the same times

SOURCES = {
    "h264_b.mp4": {"bf": "3", "g": "30"},
    "hevc.mp4": {"codec": "libx265", "x265-params": "log-level=error"},
    "mpeg4_b.avi": {"codec": "mpeg4", "bf": "2", "g": "60"},
    "mpeg4_b.mp4": {"codec": "mpeg4", "bf": "2", "g": "60"},
    "h264_b.avi": {"bf": "3", "g": "30"},
    "vp9.webm": {"codec": "libvpx-vp9", "cpu-used": "8"},
    "mpeg2.mpeg": {"codec": "mpeg2video", "rate": 25, "bf": "2"},
    "wmv2.WMV": {"codec": "wmv2"},
    "full_range.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "ntsc_in_ms.mkv": {"rate": Fraction(30000, 1001), "bf": "3"},
    "fast_in_ms.mkv": {"rate": 120},
    "slow.mp4": {"rate": Fraction(1, 2)},
}


@pytest.mark.parametrize("name", SOURCES)
def test_each_frame_is_kept_once_and_decord_reads_it(tmp_path, name):
    write_video(tmp_path / name, numbered(100), **SOURCES[name])
    source, _ = decoded(tmp_path / name)
    assert [number(frame) for frame in source] == list(range(100))
    result, rate = decoded(make(tmp_path / name))
    assert rate == SOURCES[name].get("rate", 12)
    assert [number(frame) for frame in result] == list(range(100))
    assert np.abs(result.astype(int) - source).mean() < 3
    read, places = random_access(tmp_path / "prepared.mp4", 100)
    assert read == places


@pytest.mark.parametrize("width, height, frames", [(96, 64, 1), (97, 65, 30), (48, 64, 30),
                                                   (72, 64, 30), (64, 48, 30)])  # fmt: skip
def test_odd_sizes_and_one_frame(tmp_path, width, height, frames):
    source = tmp_path / "clip.mp4"
    write_video(source, numbered(frames, height, width), pix_fmt="yuv444p")
    result, _ = decoded(make(source))
    assert abs(result.shape[1] - height) <= 1 and abs(result.shape[2] - width) <= 2
    read, places = random_access(tmp_path / "prepared.mp4", frames)
    assert read == places == list(range(frames))


def test_decord_reads_every_width_that_is_written(tmp_path):
    for width in sorted({clip_files.clip_size(width, 16, 256)[0] for width in range(1, 200)}):
        write_video(tmp_path / "clip.mp4", numbered(2, 16, width))
        reader = decord.VideoReader(str(tmp_path / "clip.mp4"), num_threads=1)
        assert reader.get_batch([1, 0]).shape == (2, 16, width, 3)


@pytest.mark.parametrize(
    "given, expected",
    [
        ((1280, 720), (454, 256)),
        ((720, 1280), (256, 454)),
        ((1920, 1080), (454, 256)),
        ((320, 240), (320, 240)),
        ((256, 144), (256, 144)),
    ],
)
def test_the_short_side_shrinks_and_never_grows(given, expected):
    assert clip_files.clip_size(*given, 256) == expected


def test_the_result_is_h264_with_a_short_gop_ready_to_stream(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(50, 64, 120), g="1")  # key frames only
    clip_files.prepare_clip(tmp_path / "clip.mp4", tmp_path / "out.mp4", 32, 5)
    with av.open(str(tmp_path / "out.mp4")) as container:
        frames = list(container.decode(video=0))
        keys = [i for i, frame in enumerate(frames) if frame.key_frame]
        assert {frame.pict_type for frame in frames} == {1, 2}  # I and P, no B
        assert (frame := container.streams.video[0]).format.name == "yuv420p"
        assert (frame.width, frame.height, frame.codec.name) == (60, 32, "h264")
        assert len(container.streams) == 1
    assert keys[0] == 0 and max(np.diff([*keys, 50])) == 5  # x264 adds some at scene changes
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_a_variable_frame_rate_keeps_its_time(tmp_path, name):
    steps = np.r_[np.full(45, 33), np.full(15, 200), np.full(40, 50)]
    ms = np.cumsum(steps) - steps[0]
    write_video(tmp_path / name, numbered(100), rate=1000, ms=ms, bf="3", g="30")
    result, rate = decoded(make(tmp_path / name))
    assert abs(rate - Fraction(99000, int(ms[-1]))) < 0.01
    assert abs(len(result) / rate - ms[-1] / 1000) < 2 / rate
    for i, frame in enumerate(result):
        around = [np.searchsorted(ms, 1000 * (i + d) / float(rate), "right") - 1 for d in (-1, 1)]
        assert max(0, around[0]) <= number(frame) <= around[1]
    read, places = random_access(tmp_path / "prepared.mp4", len(result))
    assert read == [number(result[i]) for i in places]


def test_a_variable_frame_rate_stays_within_bounds(tmp_path):
    ms = np.r_[np.arange(50) * 5, 400 + np.arange(50) * 5]  # 200 frames a second, and a gap
    write_video(tmp_path / "clip.mp4", numbered(100), rate=1000, ms=ms)
    result, rate = decoded(make(tmp_path / "clip.mp4"))
    assert rate == 60 and abs(len(result) - 0.65 * 60) <= 2


@pytest.mark.parametrize("variable", [False, True])
def test_a_cut_without_re_encoding_begins_where_it_was_cut(tmp_path, variable):
    ms = np.arange(100) * 250 // 3
    if variable:  # the last frames of what the cut left before its start are long ones
        ms[48:] += 1500
    encoder = {"rate": 1000, "ms": ms} if variable else {"rate": 12}
    options = {"bf": "3", "g": "30", "sc_threshold": "0"}
    write_video(tmp_path / "long.mp4", numbered(100), **encoder, **options)
    source = tmp_path / "cut.mp4"
    with av.open(str(tmp_path / "long.mp4")) as long, av.open(str(source), "w") as cut:
        stream = long.streams.video[0]
        copy = cut.add_stream_from_template(stream)
        offset = int(Fraction(int(ms[48]), 1000) / stream.time_base)
        long.seek(offset, stream=stream)
        for packet in long.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                packet.pts -= offset
                packet.dts -= offset
                cut.mux(packet)
    assert [number(frame) for frame in decoded(source)[0]] == list(range(48, 100))
    assert len(decord.VideoReader(str(source))) == 70  # decord ignores the edit list
    result, rate = decoded(make(source))
    assert [number(frame) for frame in result] == list(range(48, 100)) and abs(rate - 12) < 0.1
    read, places = random_access(tmp_path / "prepared.mp4", 52)
    assert read == [48 + place for place in places]


@pytest.mark.parametrize(
    "matrix, quarters",
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],  # (a, b, c, d): x' = ax + cy
)
def test_a_phone_clip_is_turned_upright(tmp_path, matrix, quarters):
    lying = numbered(30)
    lying[:, :10, :16] = (250, 0, 0)  # a corner of its own
    source = write_video(tmp_path / "clip.mp4", lying)
    data = bytearray(source.read_bytes())
    a, b, c, d = (n << 16 for n in matrix)
    at = data.find(b"tkhd") + 44  # after times, id, duration, layer and volume
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    source.write_bytes(data)
    result, _ = decoded(make(source, short_side=64))
    expected = np.rot90(decoded(source)[0], quarters, axes=(1, 2))
    assert result.shape == expected.shape
    assert np.abs(result.astype(int) - expected).mean() < 3
    reader = decord.VideoReader(str(tmp_path / "prepared.mp4"), num_threads=1)
    assert np.abs(reader[29].asnumpy().astype(int) - expected[29]).mean() < 3


def test_memory_does_not_grow_with_the_clip(tmp_path):
    code = (
        "import sys, pathlib, clip_files\n"
        "clip_files.prepare_clip(*map(pathlib.Path, sys.argv[1:]), 64, 12)\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print(int(status.split('VmHWM:')[1].split()[0]) // 1024)"
    )
    (tmp_path / "peak.py").write_text(code)
    peaks = []
    for frames in (60, 360):
        still = np.broadcast_to(numbered(1, 360, 640), (frames, 360, 640, 3))
        source = write_video(tmp_path / f"{frames}.mp4", still, preset="ultrafast", bf="0")
        peak = run(source, tmp_path / f"{frames}_out.mp4", script=tmp_path / "peak.py")[1]
        peaks.append(int(peak))
    assert peaks[1] - peaks[0] < 25  # MiB; 300 frames more are 99


# ---- The check


def test_the_check_notices_wrong_frames_and_not_still_scenes(tmp_path):
    source, target = write_video(tmp_path / "clip.mp4", numbered(60)), tmp_path / "out.mp4"
    thumbnails = clip_files.transcode(source, target, 256, 12)
    clip_files.check(target, thumbnails)
    faint = write_video(tmp_path / "faint.mp4", numbered(60) // 16 + 120)  # neighbours look alike
    with pytest.raises(ValueError, match="another frame than frame"):
        faint_thumbnails = clip_files.transcode(faint, tmp_path / "faint_out.mp4", 256, 12)
        clip_files.check(tmp_path / "faint_out.mp4", np.roll(faint_thumbnails, 1, axis=0))
    with pytest.raises(ValueError, match="another frame than frame"):
        clip_files.check(target, np.roll(thumbnails, 1, axis=0))
    with pytest.raises(ValueError, match="another frame than frame 0"):
        clip_files.check(target, np.full_like(thumbnails, 128))  # nothing like it at all
    with pytest.raises(ValueError, match="decord sees 60 of 59"):
        clip_files.check(target, thumbnails[:-1])
    still = write_video(tmp_path / "still.mp4", np.repeat(numbered(1), 60, axis=0))
    clip_files.check(target, clip_files.transcode(still, target, 256, 12))


def test_a_clip_that_fails_the_check_is_not_delivered(tmp_path, monkeypatch):
    source = write_video(tmp_path / "clip.mp4", numbered(60))
    right = clip_files.transcode
    monkeypatch.setattr(clip_files, "transcode", lambda *a: np.roll(right(*a), 1, axis=0))
    with pytest.raises(ValueError, match="another frame"):
        clip_files.prepare_clip(source, tmp_path / "out.mp4", 256, 12)
    assert os.listdir(tmp_path) == ["clip.mp4"]


# ---- Folders and names


def test_folders_and_other_files_are_kept_and_hidden_ones_are_not(tmp_path):
    source, output = tmp_path / "my clips", tmp_path / "out"
    for name in ("train/wave/1.MP4", "train/wave/deep/er/2.avi", "val/sit/3.mkv", "4.mov",
                 "train/wave/.5.mp4", ".hidden/6.mp4"):  # fmt: skip
        write_video(source / name, numbered(12))
    (source / "metadata.csv").write_text("file_name,label\n")
    (source / "train" / "wave" / "1.txt").write_text("note")
    (source / "elsewhere").symlink_to(write_video(tmp_path / "else/7.mp4", numbered(12)).parent)
    code, out, _ = run(source, output)
    left_out, few, summary, *table = out.splitlines()
    assert few == "no test split, and too few clips (3) to draw one"
    assert [line.split()[:4] for line in table[1:3]] == [
        ["train", "wave", "2", "2"], ["validation", "sit", "1", "1"],
    ]  # fmt: skip
    assert left_out == f"2 hidden files or folders are left out: {source / '.hidden'}"
    assert code == 0 and summary.startswith("5 clips prepared, 0 already there, 0 bad: 0.0 MB -> ")
    assert {str(f.relative_to(output)) for f in output.rglob("*") if f.is_file()} == {
        "train/wave/1.MP4.mp4", "train/wave/deep/er/2.avi.mp4", "val/sit/3.mkv.mp4", "4.mov.mp4",
        "metadata.csv", "train/wave/1.txt", "elsewhere/7.mp4", "clips_report.json",
    }  # fmt: skip
    assert (output / "metadata.csv").read_text() == "file_name,label\n"


def test_what_systems_put_beside_clips_is_left_out_and_counted(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", numbered(5)).read_bytes()
    left_out = ["a/._1.mp4", "a/.DS_Store", "a/Thumbs.db", "a/desktop.ini", "__MACOSX/a/._1.mp4"]
    left_out += ["a/.ipynb_checkpoints/1-checkpoint.mp4", "b/deep/.Trash-1000/files/2.mp4"]
    for name in ["a/1.mp4", "b/deep/2.mp4", *left_out]:
        (tmp_path / "clips" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clips" / name).write_bytes(clip)
    code, out, _ = run(tmp_path / "clips", tmp_path / "out")
    assert code == 0 and "2 clips prepared" in out
    assert f"7 hidden files or folders are left out: {tmp_path}/clips/__MACOSX\n" in out
    found = [f for f in (tmp_path / "out").rglob("*") if f.is_file()]
    assert sorted(f.relative_to(tmp_path / "out").as_posix() for f in found) == [
        "a/1.mp4", "b/deep/2.mp4",
    ]  # fmt: skip


def test_links_to_folders_are_followed_but_not_back_up(tmp_path):
    clips = tree(tmp_path / "clips", "wave/2.mp4", "wave/10.mp4")
    tree(tmp_path, "session/1.mp4", "third/deep/3.mp4")
    (clips / "wave/more").symlink_to(tmp_path / "session")  # some clips of a class
    (clips / "third").symlink_to(tmp_path / "third")  # a class
    (clips / "wave/self").symlink_to(clips / "wave")
    (clips / "wave/up").symlink_to(clips)
    (clips / "wave/loop").symlink_to(clips / "wave/loop")
    (clips / "nothing.mp4").symlink_to(tmp_path / "gone.mp4")  # is to be reported as a bad clip
    files, left_out = prepare_clips.files_below(clips)
    assert not left_out and [str(file.relative_to(clips)) for file in files] == [
        "nothing.mp4", "third/deep/3.mp4", "wave/2.mp4", "wave/10.mp4", "wave/loop",
        "wave/more/1.mp4",
    ]  # fmt: skip


def test_two_folders_that_link_to_each_other_are_walked_once(tmp_path):
    clips = tree(tmp_path / "clips", "wave/2.mp4")
    session = tree(tmp_path / "session", "1.mp4")
    (clips / "wave/more").symlink_to(session)
    (session / "up").symlink_to(clips)
    assert len(prepare_clips.files_below(clips)[0]) == 2


def test_digits_of_other_scripts_are_text(tmp_path):
    tree(tmp_path, "1²2.mp4", "1a2.mp4", "1٣2.mp4")
    assert len(prepare_clips.files_below(tmp_path)[0]) == 3


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a/x.mp4", "a/x.mp4"),
        ("a/x.avi", "a/x.avi.mp4"),
        ("a/x.avi.mp4", "a/x.avi.mp4.mp4"),  # else it would meet the one above
        ("a/x.mp4.mp4", "a/x.mp4.mp4.mp4"),
        ("c/y.MP4", "c/y.MP4.mp4"),
        ("v1.0_take 2.mp4", "v1.0_take 2.mp4"),
    ],
)
def test_a_name_alone_tells_the_output(name, expected):
    path = prepare_clips.Path
    assert prepare_clips.output_name(path(name)) == path(expected)


def test_labels_still_find_their_clips(tmp_path):
    """A metadata.csv is rewritten so that `datasets` finds each clip with the label it had."""
    import datasets

    labels = {"one.mp4": "wave", "deep/two, too.avi": "sit", "deep/two.mkv": "wave"}
    for name in labels:
        write_video(tmp_path / "clips/train" / name, numbered(5))
    rows = "".join(f'"{label}","{name}",{i}\n' for i, (name, label) in enumerate(labels.items()))
    table = tmp_path / "clips/train/metadata.csv"
    table.write_text("\ufefflabel,file_name,take\n" + rows, "utf-8")
    assert run(tmp_path / "clips", tmp_path / "out")[0] == 0
    found = datasets.load_dataset(
        "videofolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=tmp_path / "cache"
    ).cast_column("video", datasets.Video(decode=False))
    assert {row["video"]["path"].rsplit("out/train/")[1]: row["label"] for row in found} == {
        "one.mp4": "wave", "deep/two, too.avi.mp4": "sit", "deep/two.mkv.mp4": "wave",
    }  # fmt: skip


def test_a_share_may_be_empty_and_reports_carry_the_machine(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/1.mp4").write_bytes(b"")
    config, output = tmp_path / "resourceconfig.json", tmp_path / "out"
    config.write_text('{"current_host": "algo-2", "hosts": ["algo-1", "algo-2"]}')
    flags = ("--resource_config", config)
    code, out, _ = run(tmp_path / "nothing", output, *flags)
    assert code == 0 and out.startswith("0 clips prepared")
    code, _, err = run(tmp_path / "bad", output, *flags)
    assert code == 1 and "also in" in err and "bad_clips_algo-2.json" in err
    assert os.listdir(output) == ["bad_clips_algo-2.json"]
    config.write_text('{"current_host": "algo-1", "hosts": ["algo-1"]}')
    assert "no such folder" in run(tmp_path / "nothing", output, *flags)[2]
    config.unlink()
    assert "Leave --resource_config out" in run(tmp_path / "bad", output, *flags)[2]


@pytest.mark.parametrize(
    "source, output, message",
    [
        ("nothing", "out", "nothing: no such folder"),
        ("empty", "out", "empty holds no videos"),
        ("clips", "clips", "clips is inside .*clips: choose an output folder elsewhere"),
        ("clips", "clips/../clips/out", "is inside .*clips: choose"),
    ],
)
def test_wrong_folders_are_refused_in_one_sentence(tmp_path, source, output, message):
    write_video(tmp_path / "clips/a/1.mp4", numbered(5))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=message):
        prepare_clips.main([str(tmp_path / source), str(tmp_path / output)])
    assert not (tmp_path / "out").exists() and not (tmp_path / "clips/out").exists()


def test_help_names_every_flag():
    code, out, _ = run("--help")
    assert code == 0 and "recordings my_clips --cut table.csv" in out
    assert all(f"--{flag}" in out for flag in ("short_side", "gop", "workers", "timeout"))


# ---- Data sets: folders, archives, the Hub


def pack(archive, folder):
    """All of `folder` in an archive of the kind that its name says."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for file in sorted(folder.rglob("*")):
                packed.write(file, file.relative_to(folder))
    else:
        kind = {".tar": "", ".tgz": "gz"}.get(archive.suffix, archive.suffix[1:])
        with tarfile.open(archive, f"w:{kind}") as packed:
            packed.add(folder, ".")
    return archive


def names(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


@pytest.mark.parametrize("inside", ["", "data", "__MACOSX"])
def test_a_folder_is_the_one_that_holds_train(tmp_path, monkeypatch, inside):
    folder = tree(tmp_path / "home/my clips" / inside, "train/a/1.mp4", "train/train/2.mp4")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = folder if inside != "__MACOSX" else folder.parent  # train.py then says what is missing
    assert prepare_clips.fetch("~/my clips") == found
    monkeypatch.chdir(tmp_path)
    assert prepare_clips.fetch("home/my clips").resolve() == found


def test_two_folders_with_train_are_an_error(tmp_path):
    tree(tmp_path, "one/train/a/1.mp4", "two/train/a/1.mp4")
    with pytest.raises(ValueError, match=r"clips in \S*/one, \S*/two. Name the one"):
        prepare_clips.fetch(str(tmp_path))


@pytest.mark.parametrize("name", ["c.tar.gz", "c.tgz", "c.tar", "c.zip", "v1.0.tar.xz"])
@pytest.mark.parametrize("given", ["archive", "folder"])
def test_an_archive_is_unpacked_beside_itself_once(tmp_path, name, given):
    clips = tree(
        tmp_path / "clips", "UCF/train/手/1.mp4", "UCF/test/手/2.mp4", "__MACOSX/train/._1.mp4"
    )
    archive = pack(tmp_path / "data" / name, clips)
    dataset = str(archive if given == "archive" else archive.parent)
    expected = archive.parent / f"{name}.unpacked" / "UCF"
    for _ in range(2):
        assert prepare_clips.fetch(dataset) == expected
        assert names(expected) == ["test/手/2.mp4", "train/手/1.mp4"]
        assert sorted(os.listdir(archive.parent)) == [name, f"{name}.unpacked"]
        (expected / "test/手/2.mp4").touch()  # is not written anew
    time.sleep(0.01)
    archive.touch()
    with pytest.raises(RuntimeError, match=f"{archive}: newer than .*; delete that folder"):
        prepare_clips.fetch(dataset)


def test_an_archive_without_train_is_its_folder(tmp_path):
    archive = pack(tmp_path / "c.zip", tree(tmp_path / "clips", "a/1.mp4"))
    assert prepare_clips.fetch(str(archive)) == tmp_path / "c.zip.unpacked"


def test_parts_in_several_archives_are_an_error_and_not_lost(tmp_path):
    for split in ("train", "validation"):
        pack(tmp_path / f"data/{split}.zip", tree(tmp_path / split, f"{split}/a/1.mp4"))
    pack(tmp_path / "data/notes.zip", tree(tmp_path / "notes", "read me.txt"))
    for _ in range(2):
        message = r"clips in \S*/train.zip.unpacked, \S*/validation.zip.unpacked. Name"
        with pytest.raises(ValueError, match=message):
            prepare_clips.fetch(str(tmp_path / "data"))


def test_names_of_a_zip_that_does_not_say_utf_8(tmp_path):
    """As macOS writes them: without the mark, Python takes them for those of MS-DOS."""
    archive = pack(tmp_path / "c.zip", tree(tmp_path / "clips", "train/舉手/1.mp4"))
    data = bytearray(archive.read_bytes())
    for mark, at in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):
        place = -1
        while (place := data.find(mark, place + 1)) >= 0:
            data[place + at] &= ~0x08
    archive.write_bytes(data)
    assert names(prepare_clips.fetch(str(archive))) == ["train/舉手/1.mp4"]


def evil(kind, archive):
    archive.parent.mkdir(parents=True)
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("train/a/../../../../evil.mp4", "evil")
    elif kind == "absolute zip":
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr(f"{archive.parent.parent}/evil.mp4", "evil")
    elif kind == "damaged":
        archive.write_bytes(b"neither a zip file nor a tar file")
    else:
        with tarfile.open(archive, "w:gz") as packed:
            member = tarfile.TarInfo("../../evil.mp4" if kind == "tar" else "link")
            if kind == "link":
                member.type, member.linkname = tarfile.SYMTYPE, str(archive.parent.parent)
            packed.addfile(member)


@pytest.mark.parametrize("kind", ["zip", "absolute zip", "tar", "link", "damaged"])
def test_an_archive_that_would_leave_its_folder_or_is_damaged_is_refused(tmp_path, kind):
    archive = tmp_path / "data" / ("c.zip" if "zip" in kind else "c.tar.gz")
    evil(kind, archive)
    with pytest.raises(RuntimeError, match=f"{archive}: cannot be unpacked"):
        prepare_clips.fetch(str(archive))
    assert os.listdir(tmp_path) == ["data"] and os.listdir(archive.parent) == [archive.name]


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    archive = pack(tmp_path / "data/c.zip", tree(tmp_path / "clips", "train/a/1.mp4"))

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system", str(archive.parent))

    monkeypatch.setattr(prepare_clips.tempfile, "mkdtemp", refuse)
    with pytest.raises(RuntimeError) as error:
        prepare_clips.fetch(str(archive))
    assert str(archive) in str(error.value) and "Read-only file system" in str(error.value)
    assert str(error.value).endswith("Unpack it elsewhere and name the folder.")


def test_two_processes_unpack_at_once(tmp_path):
    clips = tree(tmp_path / "clips", *(f"train/a/{i}.mp4" for i in range(30)))
    archive = pack(tmp_path / "data/c.tar.gz", clips)
    code = (
        "import pathlib, sys, time, prepare_clips\n"
        "right = prepare_clips.os.rename\n"
        "def rename(*args):\n"
        "    pathlib.Path(sys.argv[2], sys.argv[3]).touch()\n"
        "    while len(list(pathlib.Path(sys.argv[2]).iterdir())) < 2: time.sleep(0.01)\n"
        "    right(*args)\n"  # both have unpacked all, and neither has renamed it
        "prepare_clips.os.rename = rename\n"
        "print(prepare_clips.fetch(sys.argv[1]))"
    )
    (tmp_path / "ready").mkdir()
    env = with_scripts()
    command = [sys.executable, "-c", code, str(archive), str(tmp_path / "ready")]
    pipe = {"stdout": subprocess.PIPE, "env": env, "text": True}
    both = [subprocess.Popen([*command, str(i)], **pipe) for i in range(2)]
    target = tmp_path / "data/c.tar.gz.unpacked"
    for process in both:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and out.splitlines()[-1] == str(target)
    assert len(names(target)) == 30
    assert sorted(os.listdir(archive.parent)) == [archive.name, target.name]


@pytest.mark.parametrize("layout", ["folder", "data", "archive"])
def test_a_data_set_of_the_hub(tmp_path, monkeypatch, layout):
    hub = tree(tmp_path / "hub", "README.md")
    clips = tree(tmp_path / "clips", "train/a/1.mp4")
    inside = {"folder": hub, "data": hub / "data", "archive": hub / "UCF.tar.gz.unpacked"}[layout]
    if layout == "archive":
        (hub / "UCF.tar.gz").symlink_to(pack(tmp_path / "blobs/f00.gz", clips))
    else:
        tree(inside, "train/a/1.mp4")
    asked = []
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(hub)
    )
    assert prepare_clips.fetch("owner/name") == inside
    assert asked == [(("owner/name",), {"repo_type": "dataset"})]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)  # tests are offline
    message = r"^--dataset owner/name: no such folder, and the Hub did not give it .*HF_TOKEN"
    with pytest.raises(RuntimeError, match=message):
        prepare_clips.fetch("owner/name")


def test_what_is_no_data_set_is_told(tmp_path):
    for missing in (str(tmp_path / "typo"), "~/typo", "./typo", "typo", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"^--dataset {missing}: no such folder. It ho"):
            prepare_clips.fetch(missing)
    with pytest.raises(ValueError, match="clip.mp4: neither a folder nor one of .zip .tar"):
        prepare_clips.fetch(str(tree(tmp_path, "clip.mp4") / "clip.mp4"))


def test_an_archive_is_prepared_like_a_folder(tmp_path):
    write_video(tmp_path / "clips/UCF/train/a/1.avi", numbered(5), codec="mpeg4")
    archive = pack(tmp_path / "data/c.tar.gz", tmp_path / "clips")
    for source in (archive, archive.parent):
        code, out, err = run(source, tmp_path / "out")
        assert code == 0 and err == ""
        assert names(tmp_path / "out") == ["clips_report.json", "train/a/1.avi.mp4"]
    code, _, err = run("nobody/nothing", tmp_path / "out")
    assert code == 1 and err.startswith("nobody/nothing: no such folder, and the Hub did not")


# ---- Bad clips


def damage(path, start, stop):
    """Overwrites a part of a file, given as shares of its length, by others."""
    data = bytearray(path.read_bytes())
    at = slice(int(len(data) * start), int(len(data) * stop))
    data[at] = bytes(byte ^ 0x55 for byte in data[at])
    path.write_bytes(data)


def bad_tree(root):
    """A folder with one good clip and one of each kind of bad ones; returns their reasons."""
    good = write_video(root / "a/good.mp4", numbered(100))
    (root / "a/empty.mp4").write_bytes(b"")
    (root / "a/text.mp4").write_text("not a video" * 99)
    for name, options in {"mp4": {}, "mkv": {}, "avi": {"codec": "mpeg4"},
                          "webm": {"codec": "libvpx-vp9", "cpu-used": "8"}}.items():  # fmt: skip
        path = write_video(root / f"b/cut.{name}", numbered(100), **options)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 96, 3), np.uint8)
    damage(write_video(root / "c/middle.mp4", noise, codec="mpeg4"), 0.5, 0.501)
    damage(write_video(root / "c/middle.webm", numbered(100), codec="libvpx-vp9"), 0.4, 0.6)
    for name in ("c/codec.avi", "d/frames.avi"):
        path = write_video(root / name, numbered(30), codec="mpeg4")
        if name == "c/codec.avi":
            path.write_bytes(path.read_bytes().replace(b"FMP4", b"ZZZZ"))
        else:
            at = path.read_bytes().find(b"movi") / path.stat().st_size
            damage(path, at, 1)
    write_sound(root / "d/sound.mp4")
    write_video(root / "d/huge.avi", np.zeros((1, 4400, 8200, 3), np.uint8), "mjpeg",
                pix_fmt="yuvj420p")  # fmt: skip
    assert good.exists()
    return {
        "a/empty.mp4": "empty file (0 bytes)",
        "a/text.mp4": "not a video, or damaged",
        "b/cut.avi": "truncated or damaged",
        "b/cut.mkv": "truncated or damaged",
        "b/cut.mp4": "not a video, or damaged",
        "b/cut.webm": "truncated",
        "c/codec.avi": "damaged, or in a codec that FFmpeg cannot decode",
        "c/middle.mp4": "damaged at frame ",
        "c/middle.webm": "truncated or damaged",
        "d/frames.avi": "",
        "d/huge.avi": "frames of 8200 x 4400 pixels: scale it down",
        "d/sound.mp4": "no video stream (audio only)",
    }


def test_all_bad_clips_are_named_at_once_and_good_ones_prepared(tmp_path):
    expected = bad_tree(tmp_path / "clips")
    code, out, err = run(tmp_path / "clips", tmp_path / "out")
    assert code == 1 and "1 clips prepared, 0 already there, 12 bad" in out
    bad = json.loads((tmp_path / "out/bad_clips.json").read_text())
    assert list(bad) == sorted(expected)
    for name, reason in expected.items():
        assert reason in bad[name] and bad[name] and "\n" not in bad[name]
        assert f"  {name}: {bad[name]}\n" in err
    assert err.count("\n") == 13 and "Traceback" not in err  # the report and nothing else
    videos = [f.name for f in (tmp_path / "out").rglob("*") if f.is_file()]
    assert sorted(videos) == ["bad_clips.json", "good.mp4"]

    code, out, err = run(tmp_path / "clips", tmp_path / "out", "--on_bad_clip", "skip")
    assert code == 0 and "0 clips prepared, 1 already there, 12 bad" in out
    assert err.count("\n") == 13

    for name in expected:
        (tmp_path / "clips" / name).unlink()
    assert run(tmp_path / "clips", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out/bad_clips.json").exists()


def test_processes_that_still_start_when_all_is_done_print_nothing(tmp_path):
    script = tmp_path / "quick.py"
    script.write_text(
        "import prepare_clips\n"
        'if __name__ == "__main__":\n'
        "    jobs = {number: (-number,) for number in range(12)}\n"
        '    done, failed = prepare_clips.in_processes(abs, jobs, 12, 60, "quick")\n'
        "    print(done == {number: number for number in range(12)}, failed)\n"
    )
    assert run(script=script) == (0, "True {}\n", "")


@pytest.mark.parametrize("workers", [0, -1])
def test_no_worker_is_an_error(workers, tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare_clips.main([str(tmp_path), str(tmp_path / "out"), f"--workers={workers}"])
    assert capsys.readouterr().err.endswith("error: --workers: clips at a time, 1 or more\n")


def test_what_is_out_of_date_is_made_anew_or_removed(tmp_path):
    source, target = write_video(tmp_path / "clip.mp4", numbered(20)), tmp_path / "out.mp4"
    assert clip_files.prepare_clip(source, target, 256, 12)["new"]
    assert not clip_files.prepare_clip(source, target, 256, 12)["new"]
    assert clip_files.prepare_clip(source, target, 32, 12)  # another flag
    later = time.time() + 10
    os.utime(source, (later, later))
    assert clip_files.prepare_clip(source, target, 32, 12)["new"]
    source.write_bytes(b"")
    os.utime(source, (later, later))
    with pytest.raises(ValueError, match="empty file"):
        clip_files.prepare_clip(source, target, 32, 12)
    assert not target.exists()


def test_a_hang_and_a_crash_cost_one_clip_each(tmp_path):
    for name in ("1", "2_hangs", "3_crashes", "4", "5"):
        write_video(tmp_path / f"clips/a/{name}.mp4", numbered(20))
    script = patched(
        tmp_path,
        "import clip_files\nright = clip_files.check\n"
        "def check(path, thumbnails):\n"
        "    if 'hangs' in path.name: time.sleep(100)\n"
        "    if 'crashes' in path.name: os.kill(os.getpid(), 11)\n"
        "    right(path, thumbnails)\n"
        "clip_files.check = check",
    )
    code, out, err = run(tmp_path / "clips", tmp_path / "out", "--timeout", 5, script=script)
    assert code == 1 and "3 clips prepared, 0 already there, 2 bad" in out
    bad = json.loads((tmp_path / "out/bad_clips.json").read_text())
    assert bad == {
        "a/2_hangs.mp4": "not done after 5 s (--timeout)",
        "a/3_crashes.mp4": "crashed the process that read it (exit code -11)",
    }
    assert sorted(os.listdir(tmp_path / "out/a")) == ["1.mp4", "4.mp4", "5.mp4"]


def test_each_of_several_truncated_files_is_noticed_and_no_sound_one_blamed(tmp_path):
    sound = write_video(tmp_path / "sound.mkv", numbered(100))
    for name in ("1.mkv", "2.mkv", "3.mkv"):  # FFmpeg logs a repeated message but once
        (tmp_path / name).write_bytes(sound.read_bytes()[: sound.stat().st_size * 6 // 10])
        with pytest.raises(ValueError, match=r"truncated or damaged \(File ended prematurely\)"):
            clip_files.prepare_clip(tmp_path / name, tmp_path / "out.mp4", 256, 12)
    make(sound)


# ---- Interruptions


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    for i in range(8):
        write_video(tmp_path / f"clips/a/{i}.mp4", numbered(20))
    script = patched(
        tmp_path,
        "import clip_files\nright = clip_files.check\n"
        "def check(path, thumbnails):\n"  # with the part file complete and not yet renamed
        "    time.sleep(60 if (path.parent / '2.mp4').exists() else 0)\n"
        "    right(path, thumbnails)\n"
        "clip_files.check = check",
    )
    folder = tmp_path / "out/a"
    command = [sys.executable, str(script), str(tmp_path / "clips"), str(tmp_path / "out")]
    env = with_scripts()
    process = subprocess.Popen([*command, "--workers", "1"], env=env, start_new_session=True)
    deadline = time.time() + 30
    while not ((folder / "2.mp4").exists() and list(folder.glob(".*.part"))):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.2)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("[0-9].mp4")}
    assert len(finished) == 3 and list(folder.glob(".*.part"))

    code, out, _ = run(tmp_path / "clips", tmp_path / "out")
    assert code == 0 and f"{len(finished)} already there, 0 bad" in out
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert sorted(os.listdir(folder)) == [f"{i}.mp4" for i in range(8)]
    for path in folder.iterdir():
        assert [number(frame) for frame in decoded(path)[0]] == list(range(20))


def test_a_full_disk_ends_the_run_and_keeps_what_is_finished(tmp_path):
    for i in range(9):
        write_video(tmp_path / f"clips/a/{i}.mp4", numbered(20))
    script = patched(
        tmp_path,
        "import errno\n"
        "right = os.replace\n"
        "def replace(part, target):\n"
        "    if target.name == '4.mp4': raise OSError(errno.ENOSPC, 'No space left')\n"
        "    if target.name > '4.mp4': time.sleep(60)\n"
        "    right(part, target)\n"
        "prepare_clips.os.replace = replace",
    )
    args = (tmp_path / "clips", tmp_path / "out")
    code, out, err = run(*args, "--workers", 1, "--on_bad_clip", "skip", script=script)
    assert code == 1 and out == ""
    message = "out: the disk is full. Free some space and run the same command again.\n"
    assert err.count("\n") == 1 and err.endswith(message)
    assert sorted(os.listdir(tmp_path / "out/a")) == [f"{i}.mp4" for i in range(4)]
    assert "5 clips prepared, 4 already there" in run(*args)[1]


def test_a_disk_full_while_a_clip_is_written_is_told_apart_from_a_bad_clip(tmp_path):
    source = write_video(tmp_path / "clip.mp4", numbered(20))
    (tmp_path / f".full.mp4.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="disk full"):
        clip_files.prepare_clip(source, tmp_path / "full.mp4", 256, 12)
    assert os.listdir(tmp_path) == ["clip.mp4"]
