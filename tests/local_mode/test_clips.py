"""The drawn clips: what a model is trained on in local mode."""

import json
from collections import Counter
from pathlib import Path

import av
import clip_files
import datasets
import numpy as np
import pytest
from local_mode import clips

COUNTS = {"train": 12, "validation": 6, "test": 8}
HEIGHT = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clips.write_clips(tmp_path_factory.mktemp("drawn") / "clips", COUNTS, HEIGHT, seed=3)


def bytes_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.mp4"))}


@pytest.mark.parametrize("size", [(64, 48), (48, 48), (36, 48), (86, 48)])
def test_any_aspect_ratio_has_the_documented_shapes(size):
    video, mask = clips.draw_clip("raising_hand", 1, *size, 20)
    assert video.shape == (20, size[1], size[0], 3) and video.dtype == np.uint8
    assert mask.shape == video.shape[:3] and mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1, 2}


def test_the_seed_decides_every_pixel():
    first, again, other = (clips.draw_clip("wave_high", s, 64, 48, 9)[0] for s in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()


def test_the_movement_fills_the_clip_at_any_frame_rate():
    slow, fast = (clips.draw_clip("raising_hand", 4, 128, 96, n)[1] for n in (13, 61))
    # Frame i of 13 and frame 5 i of 61 are the same moment: the masks are the same.
    assert (slow == fast[::5]).mean() > 0.999
    step = [np.mean((m[1:] == 2) != (m[:-1] == 2), axis=(1, 2)).mean() for m in (slow, fast)]
    assert step[1] < 0.5 * step[0]  # smaller steps of the arm at the higher frame rate


def test_the_raised_arm_appears_where_the_action_says():
    def raised(action):  # share of the clips in which the arm is raised at the start, at the end
        masks = [clips.draw_clip(action, s, 48, 48, 12)[1] for s in range(12)]
        return [np.mean([(m[i] == 2).any() for m in masks]) for i in (0, -1)]

    assert raised("raising_hand") == [0, 1]
    assert raised("lowering") == [1, 0]
    assert raised("held_up") == raised("wave_high") == [1, 1]
    assert raised("idle") == raised("walk") == raised("wave_low") == [0, 0]


def test_the_whole_arm_stays_in_the_central_square():
    for seed in range(20):
        _, mask = clips.draw_clip("raising_hand", seed, 192, 96, 12)
        outside = np.delete(mask, np.s_[48:144], axis=2)
        assert (outside == 2).sum() <= 0.02 * (mask == 2).sum(), seed


def test_no_end_of_a_clip_gives_the_answer():
    """Whether the arm is up in the first or last frame (from the masks) says little."""
    hits = {"down at first": 0, "up at last": 0}
    rows = clips.plan({"train": 300}, height=64, seed=3)
    for row in rows:
        mask = clips.draw_clip(row["action"], row["seed"], 64, 64, 2)[1]
        first, last = (mask == 2).any((1, 2))
        positive = row["action"] == clips.POSITIVE
        hits["down at first"] += positive == (not first)
        hits["up at last"] += positive == last
    for rule, count in hits.items():
        assert 0.65 < count / len(rows) < 0.82, rule


def test_layout_balance_and_variety(folder):
    for split, count in COUNTS.items():
        found = Counter(p.parent.name for p in folder.glob(f"{split}/*/*.mp4"))
        assert found == {label: count // 2 for label in clips.LABELS}
    sizes, rates, lengths = set(), set(), set()
    for path in folder.rglob("*.mp4"):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(stream))
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert stream.height == HEIGHT and stream.width % 2 == 0
        assert frames > 16 and 1.4 < frames / stream.average_rate < 4.1
        sizes.add(stream.width)
        rates.add(stream.average_rate)
        lengths.add(frames)
    assert len(sizes) >= 3 and len(rates) >= 3 and len(lengths) >= 5


def test_decord_reads_every_size(folder, tmp_path):
    decord = pytest.importorskip("decord")
    assert {r["width"] for r in clips.plan({"train": 40}, HEIGHT, 3)} == {36, 50, 64, 86}
    wide = clips.write_clips(tmp_path / "wide", {"train": 8}, 96)
    for path in [*folder.rglob("*.mp4"), *wide.rglob("*.mp4")]:  # 50 wide where 48 would fail
        frames = decord.VideoReader(str(path), num_threads=1).get_batch([0, 5]).asnumpy()
        with av.open(str(path)) as container:
            first = next(container.decode(video=0)).to_ndarray(format="rgb24")
        assert np.abs(frames[0].astype(int) - first).max() <= 3, path
    with_96 = {r["width"] for r in clips.plan({"train": 40}, 96, 0)}
    assert with_96 == {74, 98, 128, 170}  # decord cannot read 72, and decord2 cannot read 96


def test_no_width_that_a_decoder_cannot_read_is_drawn():
    for height in range(32, 400, 2):
        widths = {row["width"] for row in clips.plan({"train": 20}, height, 0)}
        assert not any(clip_files.unreadable_width(width) for width in widths)


def test_names_do_not_tell_the_label(folder):
    labels = [p.parent.name for p in sorted(folder.glob("train/*/*"), key=lambda p: p.name)]
    assert len({p.name for p in folder.glob("train/*/*")}) == COUNTS["train"]
    changes = sum(a != b for a, b in zip(labels, labels[1:], strict=False))
    assert changes > 2  # sorted by name, the labels are mixed


@pytest.mark.parametrize(
    "counts",
    [{"train": 320, "validation": 80, "test": 120}, {"train": 160, "val": 40, "test": 40}],
    ids=["write_clips", "write_davis"],
)
def test_the_default_plan_keeps_persons_in_one_split(counts):
    rows, total = clips.plan(counts, 96, seed=0), sum(counts.values())
    people = {split: {clips.appearance(*r["person"]) for r in rows if r["person"][1] == split}
              for split in counts}  # fmt: skip
    assert {s: len(p) for s, p in people.items()} == {s: n // 4 for s, n in counts.items()}
    assert len(set.union(*people.values())) == total // 4
    labels = Counter((tuple(r["person"]), r["action"] == "raising_hand") for r in rows)
    assert len(labels) > 1.5 * total / 4  # most persons do both: who it is does not tell what it is
    actions = Counter(r["action"] for r in rows if r["action"] != "raising_hand")
    for action, share in clips.NEGATIVE_ACTIONS.items():
        assert abs(actions[action] - total / 2 * share) <= 3


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    again = clips.write_clips(tmp_path / "again", COUNTS, HEIGHT, seed=3)
    assert bytes_of(again) == bytes_of(folder)
    other = clips.write_clips(tmp_path / "other", {"train": 2}, HEIGHT, seed=4)
    assert not set(bytes_of(other).values()) & set(bytes_of(folder).values())


def test_a_complete_folder_is_kept_and_an_incomplete_one_redrawn(tmp_path):
    folder = clips.write_clips(tmp_path / "c", {"train": 4}, HEIGHT)
    before, paths = bytes_of(folder), sorted(folder.rglob("*.mp4"))
    stamps = [p.stat().st_mtime_ns for p in paths]
    clips.write_clips(folder, {"train": 4}, HEIGHT)
    assert [p.stat().st_mtime_ns for p in paths] == stamps
    paths[0].unlink()
    clips.write_clips(folder, {"train": 4}, HEIGHT)
    assert bytes_of(folder) == before
    record = json.loads((folder / "clips.json").read_text())
    (folder / "clips.json").write_text(json.dumps(record | {"complete": False}))
    paths[0].write_bytes(b"half a clip")  # as an interrupted run leaves it
    clips.write_clips(folder, {"train": 4}, HEIGHT)
    assert bytes_of(folder) == before
    clips.write_clips(folder, {"train": 2}, HEIGHT)  # other arguments
    assert len(bytes_of(folder)) == 2


def test_files_of_the_reader_are_never_deleted(tmp_path):
    mine = tmp_path / "c" / "train" / "dancing" / "party.mp4"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="party.mp4.*another folder"):
        clips.write_clips(tmp_path / "c", {"train": 2}, HEIGHT)
    assert mine.read_bytes() == b"precious"
    assert not (tmp_path / "c" / "clips.json").exists()
    folder = clips.write_clips(tmp_path / "d", {"train": 2}, HEIGHT)
    (folder / "train" / "raising_hand" / "party.mp4").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="party.mp4"):  # other arguments, one strange file
        clips.write_clips(folder, {"train": 4}, HEIGHT)
    assert len(bytes_of(folder)) == 3


def test_datasets_reads_it_as_a_videofolder(folder, tmp_path):
    assert (folder / "clips.json").is_file()  # and does not disturb
    loaded = datasets.load_dataset("videofolder", data_dir=str(folder), cache_dir=str(tmp_path))
    assert {split: len(part) for split, part in loaded.items()} == COUNTS
    assert loaded["train"].features["label"].names == sorted(clips.LABELS)
    assert loaded["train"].column_names == ["video", "label"]
    row = loaded["train"].cast_column("video", datasets.Video(decode=False))[0]
    assert Path(row["video"]["path"]).parent.name == sorted(clips.LABELS)[row["label"]]


# ---- A long video

SMALL = {"seconds": 40, "width": 64, "height": 48}


@pytest.mark.parametrize("seed", [0, 2])
def test_the_truth_about_a_long_video_is_what_was_drawn(tmp_path, monkeypatch, seed):
    """By the shoulder's angle, frame by frame, as it came to the function that draws a person."""
    angles, draw_person = [], clips.draw_person

    def watched(draw, waist, k, arms, *rest):
        angles.append([*arms.values()][-1][0])  # the acting arm is drawn last
        draw_person(draw, waist, k, arms, *rest)

    monkeypatch.setattr(clips, "draw_person", watched)
    truth = clips.draw_long_video(tmp_path / "v.mp4", seed, **SMALL)
    angles, times = np.array(angles), np.arange(40 * 25) / 25
    assert len(angles) == len(times)
    # Only a hand that is raised goes so high, one time in each interval.
    up = times[1:][(angles[:-1] <= 110) & (110 < angles[1:])]
    assert len(truth) == len(up) >= 3
    assert all(start < moment < end for (start, end), moment in zip(truth, up, strict=True))
    for start, end in truth:
        low, high = np.interp([start, end], times, angles)
        assert low < 25 and high > 120
        inside = (start <= times) & (times <= end)
        half = times[inside][angles[inside] > (low + high) / 2][0]
        assert abs((half - start) / (end - start) - 0.5) < 0.06  # else the interval is shifted


def test_the_truth_is_in_order_and_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "write_video", lambda *_: None)
    cut = 0
    for seed, seconds in [(seed, seconds) for seed in range(12) for seconds in (31.7, 300)]:
        truth = clips.draw_long_video(tmp_path / "v.mp4", seed, seconds)
        ends = [0, *np.ravel(truth), seconds]
        assert ends == sorted(ends) and len(truth) > seconds / 50
        assert all(0.4 < end - start < 2.5 for start, end in truth[:-1])
        cut += truth[-1][1] == seconds
    assert cut  # of these videos, some end while a hand is on its way


def test_a_long_video_is_one_scene_that_its_seed_decides(tmp_path):
    paths = [tmp_path / f"{i}.mp4" for i in range(3)]
    truths = [clips.draw_long_video(p, s, **SMALL) for p, s in zip(paths, (1, 1, 2), strict=True)]
    assert paths[0].read_bytes() == paths[1].read_bytes() and truths[0] == truths[1]
    assert paths[0].read_bytes() != paths[2].read_bytes() and truths[0] != truths[2]
    with av.open(str(paths[0])) as one, av.open(str(paths[2])) as two:
        frames, others = (
            np.stack([f.to_ndarray(format="rgb24") for f in c.decode(video=0)]).astype(np.int16)
            for c in (one, two)
        )
        assert one.streams.video[0].average_rate == 25
    assert frames.shape == (40 * 25, 48, 64, 3)
    steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    assert steps.max() < 0.3 * np.abs(frames - others).mean((1, 2, 3)).min()  # no cut


def test_wrong_arguments_of_a_long_video_are_named(tmp_path):
    for bad in ({"seconds": 0}, {"rate": 0}, {"width": 65}, {"height": 47}, {"height": 8}):
        (value,) = bad.values()
        with pytest.raises(ValueError, match=f"^a video of .*{value}[^\n]*even sides"):
            clips.draw_long_video(tmp_path / "v.mp4", 0, **bad)
    assert not [*tmp_path.iterdir()]


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="juggling.*raising_hand"):
        clips.draw_clip("juggling", 0, 64, 48, 9)
    with pytest.raises(ValueError, match="0 frames"):
        clips.draw_clip("idle", 0, 64, 48, 0)
    with pytest.raises(ValueError, match="height 97"):
        clips.write_clips(tmp_path / "c", height=97)
    assert not (tmp_path / "c").exists()
