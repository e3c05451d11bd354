"""scripts/train.py: which frames of a clip are seen, that they are right, and how they vary."""

from types import SimpleNamespace

import av
import clip_files
import decord
import numpy as np
import pytest
import torch
import train
from local_mode import clips as drawn
from test_train import reading
from videos import cut_without_encoding, every_frame, noise, numbered, turn, write_video

B_FRAMES = {"bf": "3", "g": "30"}


def draw(seed=0):
    return np.random.default_rng(seed)


# ---- Sampling


@pytest.mark.parametrize("total", [1, 3, 15, 16, 17, 61, 3000])
@pytest.mark.parametrize("place", [0, 0.5, 0.999, np.linspace(0, 0.99, 16)], ids=str)
def test_uniform_takes_one_frame_of_each_segment(total, place):
    indices = train.frame_indices(np.arange(total) / 25, 16, 0, place)
    segment = np.arange(16) * total / 16
    assert indices.dtype == np.int64 and len(indices) == 16
    assert (indices >= np.floor(segment)).all() and (indices <= segment + total / 16).all()
    assert 0 <= indices.min() and indices.max() < total and (np.diff(indices) >= 0).all()


def test_uniform_centres():
    assert train.frame_indices(np.arange(64) / 9, 16, 0, 0.5).tolist() == list(range(2, 64, 4))


@pytest.mark.parametrize("fps, gap", [(30, 4), (15, 2), (60, 8), (29.97, 4), (7.5, 1)])
@pytest.mark.parametrize("place", [0, 0.37, 0.5, 0.99])
def test_dense_has_the_same_speed_at_any_frame_rate(fps, gap, place):
    """16 x 4 frames at 30 per second are 2.13 s; the gaps do not drift (4, 4, 4, 5)."""
    times = np.arange(round(10 * fps)).astype(np.float32) / np.float32(fps)
    indices = train.frame_indices(times, 16, 4, place)
    gaps = np.diff(indices).tolist()
    assert gaps.count(gap) >= (15 if fps != 29.97 else 14)  # there a tick is 3.996 frames
    assert abs(indices[-1] - indices[0] - 15 * 4 / 30 * fps) <= 1
    assert abs(times[indices[0]] - place * (10 - 64 / 30) - 2 / 30) <= 1 / fps + 2e-3


def test_dense_at_a_rate_between_the_frames_does_not_drift():
    indices = train.frame_indices(np.arange(300) / 25, 16, 4, 0)  # every 3.33 frames
    assert (abs(indices - (np.arange(16) + 0.5) * 10 / 3) <= 1).all() and indices[-1] == 51


def test_dense_follows_time_in_clips_of_variable_rate():
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.2, 200))
    indices = train.frame_indices(times, 16, 4, 0.5)
    ticks = times[indices[0]] + np.arange(16) * 4 / 30
    assert (abs(times[indices] - ticks) < 0.2).all()  # the frame on show, at each tick


def test_dense_in_a_short_clip_repeats_its_last_frame():
    indices = train.frame_indices(np.arange(30) / 30, 16, 4, 0.7)
    assert indices.tolist() == [*range(2, 30, 4), *[29] * 9]


def test_views_are_spread_over_the_clip(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(120), rate=30)
    every = every_frame(tmp_path / "clip.mp4")
    for rate, starts in ((0, (1.25, 3.75, 6.25)), (4, (9.3, 28, 46.7))):
        places = (np.arange(3) + 0.5) / 3
        frames = train.read_frames(str(tmp_path / "clip.mp4"), 16, rate, places)
        assert frames.shape == (3, 16, 3, 64, 100)
        for view, start in zip(frames, starts, strict=True):
            first = int(start + (2 if rate else 0))
            assert np.array_equal(view[0].permute(1, 2, 0).numpy(), every[first])


# ---- Decoding: the frames at the indices, and no others

X265 = {"codec": "libx265", "x265-params": "log-level=error:keyint=20:open-gop=0"}
if not decord.__version__.startswith("0.6."):  # decord2 refuses many such files with B-frames
    X265["x265-params"] += ":bframes=0"
VARIABLE = B_FRAMES | {"rate": 1000, "ms": [20 * i + i * i // 2 for i in range(100)]}
KINDS = {
    "b_frames.mp4": B_FRAMES,
    "hevc.mp4": X265,
    "hevc.mkv": X265,
    "vp9.webm": {"codec": "libvpx-vp9", "cpu-used": "8", "g": "20"},
    "variable_rate.mp4": VARIABLE,
    "variable_rate.mkv": VARIABLE,
    "xvid_without_b.avi": {"codec": "mpeg4"},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sampling_rate", [0, 2])
def test_decoded_frames_are_those_at_the_indices(name, sampling_rate, tmp_path):
    path = tmp_path / name
    write_video(path, numbered(100), **{"rate": 24} | KINDS[name])
    every = every_frame(path)
    with av.open(str(path)) as container:
        times = np.array([frame.time for frame in container.decode(video=0)])
    for place in (0.1, 0.5, 0.9):
        indices = train.frame_indices(times, 16, sampling_rate, place)
        frames = train.read_frames(str(path), 16, sampling_rate, [place])[0]
        assert np.array_equal(frames.permute(0, 2, 3, 1).numpy(), every[indices])
    assert clip_files.clip_problem(str(path), 16) == (100, None)


@pytest.mark.parametrize("size", [(65, 97), (90, 122), (64, 64)])
def test_odd_sizes(size, tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(40, *size), pix_fmt="yuv444p", **B_FRAMES)
    frames = train.read_frames(str(tmp_path / "clip.mp4"), 8)[0]
    expected = every_frame(tmp_path / "clip.mp4")[2::5]
    assert np.array_equal(frames.permute(0, 2, 3, 1).numpy(), expected)


def test_a_clip_of_one_frame(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(1))
    for rate in (0, 4):
        frames = train.read_frames(str(tmp_path / "clip.mp4"), 16, rate)[0]
        assert len(frames) == 16 and (frames == frames[0]).all()


def test_a_turned_video_is_upright(tmp_path):
    write_video(tmp_path / "lying.mp4", numbered(40))
    turn(tmp_path / "lying.mp4", tmp_path / "turned.mp4")
    frames = train.read_frames(str(tmp_path / "turned.mp4"), 8)[0].permute(0, 2, 3, 1).numpy()
    expected = np.rot90(every_frame(tmp_path / "lying.mp4")[2::5], -1, (1, 2))
    assert np.abs(frames.astype(int) - expected).mean() < 2
    assert clip_files.clip_problem(str(tmp_path / "turned.mp4"), 8) == (40, None)


RISKY = {
    "hevc.mp4": X265 | {"x265-params": "log-level=error:keyint=20"},  # x265's default: open GOPs
    "hevc.mkv": X265 | {"x265-params": "log-level=error:keyint=20"},
    "open.mp4": B_FRAMES | {"x264-params": "open-gop=1:scenecut=0"},
    "open.mkv": B_FRAMES | {"x264-params": "open-gop=1:scenecut=0"},
    "h264.avi": B_FRAMES,
    "xvid.avi": {"codec": "mpeg4", "bf": "2", "g": "60"},
    "xvid.mp4": {"codec": "mpeg4", "bf": "2", "g": "60"},
}


@pytest.mark.parametrize("name", [*RISKY, "cut.mp4"])
def test_files_whose_frames_decord_mixes_up_are_reported(name, tmp_path):
    path = tmp_path / name
    if name == "cut.mp4":
        write_video(tmp_path / "whole.mp4", numbered(100), sc_threshold="0", **B_FRAMES)
        cut_without_encoding(tmp_path / "whole.mp4", path, 4.0)
    else:
        write_video(path, numbered(100), **RISKY[name])
    frames = train.read_frames(str(path), 16)[0].permute(0, 2, 3, 1).numpy()
    every = every_frame(path)
    indices = train.frame_indices(np.arange(len(every)), 16, 0, 0.5)
    assert np.abs(frames.astype(int) - every[indices]).mean() > 1  # decord is wrong, silently
    total, why = clip_files.clip_problem(str(path), 16)
    assert total == 0 and "decord mixes up the frames" in why and "prepare_clips.py" in why


def test_a_still_scene_is_no_problem(tmp_path):
    """Its frames are so much alike that thumbnails cannot tell them apart."""
    for seed in range(30):
        noise = np.random.default_rng(seed).normal(128, 10, (112, 200, 3))
        still = np.stack([noise.clip(0, 255).astype(np.uint8)] * 17)
        drawn.write_video(tmp_path / "still.mp4", still, rate=12)
        assert clip_files.clip_problem(str(tmp_path / "still.mp4"), 16) == (17, None), seed


def test_a_risky_kind_with_the_right_frames_is_no_problem(tmp_path):
    write_video(tmp_path / "clip.avi", numbered(12), codec="mpeg4", bf="2", g="60")
    assert clip_files.clip_problem(str(tmp_path / "clip.avi"), 12) == (12, None)


# ---- Resize and crops


@pytest.mark.parametrize("height, width", [(96, 170), (120, 90), (64, 64)])
def test_resize_and_crop_equal_the_processor_within_one_level(tmp_path, height, width):
    pixels = np.kron(noise(8, height // 2, width // 2), np.ones((1, 2, 2, 1), np.uint8))
    path = str(write_video(tmp_path / "clip.mp4", pixels))
    frames = list(decord.VideoReader(path).get_batch([1, 3, 5, 7]).asnumpy())
    processor = train.clip_processor(tmp_path, 48)
    expected = processor(frames, do_rescale=False, do_normalize=False, return_tensors="pt")
    difference = train.read_clip(path, 4, 48) - expected["pixel_values"][0].float()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("height, width", [(64, 128), (128, 64)])
def test_three_crops_lie_along_the_longer_side(height, width, tmp_path):
    ramp = np.linspace(20, 230, max(height, width)).astype(np.uint8)
    ramp = ramp[None, :, None] if width > height else ramp[:, None, None]
    still = np.broadcast_to(ramp, (10, height, width, 3))
    write_video(tmp_path / "clip.mp4", np.ascontiguousarray(still))
    clips = train.read_clip(str(tmp_path / "clip.mp4"), 4, 64, views=2, crops=3)
    assert clips.shape == (6, 4, 3, 64, 64) and clips.dtype == torch.uint8
    means = clips.float().mean((1, 2, 3, 4)).tolist()
    assert means == pytest.approx([72, 125, 178] * 2, abs=3)
    assert torch.equal(clips[1], train.read_clip(str(tmp_path / "clip.mp4"), 4, 64, views=2)[0])


# ---- Augmentation


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A clip in which nothing moves: whatever differs between frames comes from us."""
    path = tmp_path_factory.mktemp("still") / "clip.mp4"
    patches = np.kron(noise(1, 16, 25), np.ones((1, 4, 4, 1), np.uint8))
    write_video(path, np.repeat(patches, 20, axis=0))
    return str(path)


VARIED = reading(image_size=48, zoom=0.3, horizontal_flip=True)


def test_all_frames_are_changed_alike_and_each_draw_differs(still):
    clips = [train.read_train_clip(still, VARIED, draw(i)).float() for i in range(8)]
    assert all((clip[0] - clip[-1]).abs().mean() < 3 for clip in clips)
    assert all((a[0] - b[0]).abs().mean() > 3 for a, b in zip(clips, clips[1:], strict=False))


def test_the_same_draw_gives_the_same_clip(still):
    first, again = (train.read_train_clip(still, VARIED, draw(3)) for _ in range(2))
    assert torch.equal(first, again) and first.is_contiguous()


def test_draws_follow_seed_epoch_and_clip(clips_folder):
    rows = train.load_clips(str(clips_folder))["train"]
    flags = {"image_size": 48, "zoom": 0.5}
    clips, other = (train.Clips(rows, reading(seed=seed, **flags), True) for seed in (0, 1))
    first = clips[3]["pixel_values"]
    assert torch.equal(first, clips[3]["pixel_values"])
    assert not torch.equal(first, clips[3 + len(rows)]["pixel_values"])  # the next epoch
    assert not torch.equal(first, other[3]["pixel_values"])
    orders = []
    for seed, epoch in ((0, 0), (0, 1.25), (1, 0)):  # 1.25: after an interruption
        state, args = SimpleNamespace(epoch=epoch), SimpleNamespace(seed=seed)
        trainer = SimpleNamespace(train_dataset=range(16), args=args, state=state)
        orders.append(list(train.EpochSampler(trainer)))
    assert len({tuple(i % 16 for i in order) for order in orders}) == 3
    assert [sorted(order) for order in orders[:2]] == [list(range(16)), list(range(16, 32))]


def test_without_augmentation_training_sees_evaluations_picture(still):
    clip = train.read_train_clip(still, reading(image_size=64, zoom=0), draw())
    wide = train.read_frames(still, 4)[0].float()  # 64 x 100 pixels as it is
    offsets = [(clip[0] - wide[0, ..., x : x + 64]).abs().mean() for x in range(37)]
    assert min(offsets) < 1


def test_flip_mirrors_half_of_the_clips_and_only_where_asked(still):
    asked = reading(image_size=48), reading(image_size=48, horizontal_flip=True)
    plain, flipped = ([train.read_train_clip(still, a, draw(i)) for i in range(20)] for a in asked)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(plain, flipped, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True)) and 4 < sum(mirrored) < 16


def test_mixup_and_cutmix_by_hand():
    clips = torch.stack([torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)])
    targets = torch.eye(2)
    for mixup, cutmix in ((0.8, 0), (0, 1.0), (0.8, 1.0)):
        for seed in range(10):
            np.random.seed(seed)
            mixed, shares = train.mixed(clips, targets, mixup, cutmix)
            # The clips are 0 and 1 all over, so a clip's mean is the share of the second.
            torch.testing.assert_close(mixed.mean((1, 2, 3, 4)), shares[:, 1])
            torch.testing.assert_close(shares.sum(1), torch.ones(2))
            assert (mixed == mixed[:, :1]).all()  # the same in all frames
            if not mixup:
                assert set(mixed.unique().tolist()) <= {0.0, 1.0}
