"""scripts/inference.py: that windows see what training saw, and that times are right."""

import json
import subprocess
import sys
from types import SimpleNamespace

import inference
import numpy as np
import pytest
import torch
import train
from conftest import ROOT, TINY
from local_mode import clips as drawn
from tutorial import results, watching
from videos import noise, numbered, turn, write_sound, write_video

COUNT, SIZE = 16, 32


class Bright(torch.nn.Module):
    """A "model" that knows: a clip is "on" as far as its pixels are bright."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, pixel_values):
        self.batches.append(len(pixel_values))
        level = pixel_values.mean((1, 2, 3, 4)) - 0.06  # about -1 black, 1 white; half is black
        return SimpleNamespace(logits=torch.stack([-8 * level, 8 * level], 1))


def bright_classifier(sampling_rate=0):
    processor = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return inference.Classifier(Bright(), processor, ["off", "on"], COUNT, SIZE, sampling_rate)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The tiny model with a head that was never trained, as a job's artefact holds it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model, processor = train.load_model(str(TINY), ["a", "b"])
    model.classifier.weight.data.normal_()  # else all probabilities are near 0.5
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "run_record.json").write_text(json.dumps({"arguments": {"sampling": "uniform"}}))
    return inference.load_classifier(folder, "cpu")


def lights(seconds, on, rate=25):
    """uint8 [frames, 32, 32, 3]: white while `on`, a list of (start, end), else black."""
    times = np.arange(round(seconds * rate)) / rate
    level = np.zeros(len(times), np.uint8)
    for start, end in on:
        level[(start <= times + 1e-6) & (times + 1e-6 < end)] = 255
    return np.broadcast_to(level[:, None, None, None], (len(times), 32, 32, 3)).copy()


def found(result, label="on"):
    return [(i["start"], i["end"]) for i in result["intervals"] if i["label"] == label]


# ---- Windows


@pytest.mark.parametrize(
    "rate, frames", [(12, 18), (25, 64), (25, 61), (30, 100), (50, 75), (60, 99)]
)
def test_a_window_is_what_the_training_script_reads(classifier, tmp_path, rate, frames):
    path = write_video(tmp_path / "clip.mp4", noise(frames, 48, 64), rate=rate)
    clip = train.read_clip(str(path), classifier.num_frames, classifier.image_size)
    expected = inference.clip_probabilities(clip[None], classifier)[0].tolist()
    for window in (frames / rate, 60):  # exactly one window; much shorter than one
        result = inference.classify_video(path, classifier, window_seconds=window)
        assert result["probabilities"] == [pytest.approx(expected, abs=1e-4)]
        assert result["duration"] == pytest.approx(frames / rate, abs=1e-3)
        assert result["window_seconds"] == pytest.approx(result["duration"])
        assert result["times"] == [pytest.approx(frames / rate / 2, abs=1e-3)]


@pytest.mark.parametrize("frames", [1, 30, 64])  # 64: the window of 16 frames, 4/30 s apart
def test_dense_sampling_has_the_windows_of_training(classifier, tmp_path, frames):
    path = write_video(tmp_path / "clip.mp4", noise(frames, 48, 64), rate=30)
    dense = classifier._replace(sampling_rate=4)
    clip = train.read_clip(str(path), dense.num_frames, dense.image_size, 4)
    expected = inference.clip_probabilities(clip[None], dense)[0].tolist()
    result = inference.classify_video(path, dense, window_seconds=99)
    assert result["probabilities"] == [pytest.approx(expected, abs=1e-4)]
    assert result["window_seconds"] == pytest.approx(64 / 30)


def test_a_window_in_the_middle_is_the_clip_cut_out_there(classifier, tmp_path):
    frames = noise(200, 48, 64)
    path = write_video(tmp_path / "long.mp4", frames, rate=25, crf="0", pix_fmt="yuv444p")
    cut = write_video(tmp_path / "cut.mp4", frames[40:104], rate=25, crf="0", pix_fmt="yuv444p")
    tick = 64 / 25 / COUNT
    firsts, probabilities, duration = inference.judged_windows(path, classifier, tick, 5, 3)
    assert (firsts, duration) == ([0, 5, 10, 15, 20, 25, 30, 34], pytest.approx(8))
    clip = train.read_clip(str(cut), classifier.num_frames, classifier.image_size)
    expected = inference.clip_probabilities(clip[None], classifier)[0]
    torch.testing.assert_close(probabilities[firsts.index(10)], expected, atol=1e-4, rtol=0)


def test_a_video_from_a_telephone_is_upright(tmp_path):
    write_video(tmp_path / "lying.mp4", numbered(30))
    turn(tmp_path / "lying.mp4", tmp_path / "turned.mp4")
    (_, shown), *_ = inference.ticking_frames(tmp_path / "turned.mp4", 1 / 12, SIZE)
    expected = train.read_clip(str(tmp_path / "turned.mp4"), 30, SIZE)[0]
    assert (shown[0].int() - expected.int()).abs().max() <= 2


def test_windows_go_through_the_model_in_batches(tmp_path):
    path = write_video(tmp_path / "clip.mp4", lights(20, []), rate=25)
    classifier = bright_classifier()
    inference.classify_video(path, classifier, window_seconds=2, hop_seconds=0.5, batch_size=8)
    assert classifier.model.batches == [8, 8, 8, 8, 5]  # (20 - 2) / 0.5 + 1 windows


# ---- Times


def test_times_are_right_to_a_hop_of_two_frames(tmp_path):
    """A window is "on" if most of it is bright, so that edges of the light are edges found."""
    on = [(3.0, 6.24), (9.4, 14.84), (18.04, 20.0)]
    path = write_video(tmp_path / "clip.mp4", lights(20, on), rate=25)
    settings = {"window_seconds": 1.28, "hop_seconds": 0.08, "smooth": 1}  # 0.08: two frames
    result = inference.classify_video(path, bright_classifier(), **settings)
    assert np.abs(np.array(found(result)) - on).max() <= 0.08 + 1e-6
    assert found(result, "off") == [(0, found(result)[0][0]), *zip(
        [end for _, end in found(result)], [start for start, _ in found(result)[1:]], strict=False
    )]  # fmt: skip
    assert json.loads(json.dumps(result)) == result
    smoothed = inference.classify_video(path, bright_classifier(), **settings | {"smooth": 5})
    assert np.abs(np.array(found(smoothed)) - on).max() <= 0.08 + 1e-6
    assert np.ptp(smoothed["smoothed"], axis=0).max() <= 1


def test_time_is_that_of_the_frames_where_the_rate_varies(tmp_path):
    frames = lights(8, [(2, 4)])  # 200 frames: the bright ones are 50 to 99
    pace = np.repeat([20, 100, 40], [50, 50, 100])  # ms: 1 s, then 5 s of light, then 4 s
    ms = np.cumsum(pace) - pace
    path = write_video(tmp_path / "vfr.mp4", frames, ms=ms)
    settings = {"window_seconds": 0.8, "hop_seconds": 0.05, "smooth": 1}
    result = inference.classify_video(path, bright_classifier(), **settings)
    assert result["duration"] == pytest.approx(10, abs=0.1)
    assert found(result) == [pytest.approx((1, 6), abs=0.06)]


@pytest.mark.parametrize("name", ["raw.h264", "old.avi"])
def test_without_times_the_rate_counts(tmp_path, name):
    """No times at all in a bare stream; in AVI with B-frames, times of another order."""
    codec = {"codec": "mpeg4", "bf": "2"} if name == "old.avi" else {}
    path = write_video(tmp_path / name, lights(8, [(3, 5)]), rate=25, **codec)
    settings = {"window_seconds": 0.64, "hop_seconds": 0.04, "smooth": 1}
    result = inference.classify_video(path, bright_classifier(), **settings)
    assert result["duration"] == pytest.approx(8, abs=0.05)
    assert found(result) == [pytest.approx((3, 5), abs=0.09)]


class Rising(torch.nn.Module):
    """A "model" that knows, where only raised arms are drawn: a clip is "on" if one appears."""

    device = torch.device("cpu")

    def forward(self, pixel_values):
        white = (pixel_values.mean((2, 3, 4)) + 1) / 2  # [clips, frames], shares of the picture
        early, late = (half.mean(1) for half in white.chunk(2, dim=1))
        rise = (late - early) / (white.amax(1) + 0.003)
        return SimpleNamespace(logits=torch.stack([0 * rise, 20 * (rise - 0.5)], 1))


def test_raised_hands_are_found_in_drawn_videos(tmp_path, monkeypatch):
    """F1 as the guide computes it; half a second of shift is enough to lose it."""
    draw_scene, right = drawn.draw_scene, results.right_intervals

    def arms_only(*arguments):
        for _, mask in draw_scene(*arguments):
            yield np.repeat(np.uint8(255) * (mask == 2)[..., None], 3, axis=2), mask

    monkeypatch.setattr(drawn, "draw_scene", arms_only)
    classifier, shifts = bright_classifier()._replace(model=Rising()), (0, -0.6, 0.6)
    hits, count = np.zeros(3), 0
    for seed in (0, 2, 5):
        path = tmp_path / f"{seed}.mp4"
        true = drawn.draw_long_video(path, seed, seconds=60, width=64, height=48)
        result = inference.classify_video(path, classifier)
        on = [i for i in result["intervals"] if i["label"] == "on"]
        moved = [[i | {"start": i["start"] + s, "end": i["end"] + s} for i in on] for s in shifts]
        hits += [right(some, true) for some in moved]
        count += len(on) + len(true)
    f1, *shifted = 2 * hits / count
    assert f1 > 0.9 and max(shifted) < 0.3, (f1, shifted)


def test_one_frame_is_a_video(tmp_path):
    path = write_video(tmp_path / "one.mp4", lights(0.04, [(0, 1)]), rate=25)
    result = inference.classify_video(path, bright_classifier())
    assert len(result["times"]) == 1 and result["duration"] == pytest.approx(1 / 25)
    assert found(result) == [(0, result["duration"])]


def test_intervals_of_given_probabilities():
    times, high = [1, 2, 3, 4, 5], np.array([0.1, 0.7, 0.9, 0.2, 0.8])
    columns = np.stack([1 - high, high], 1)
    expected = [("a", 0, 1.5, 0.9), ("b", 1.5, 3.5, 0.9), ("a", 3.5, 4.5, 0.8), ("b", 4.5, 6, 0.8)]
    result = inference.intervals(times, columns, ["a", "b"], 6.0)
    assert [tuple(i.values()) for i in result] == [
        (label, start, end, pytest.approx(score)) for label, start, end, score in expected
    ]
    assert [i["label"] for i in inference.intervals(times, columns, ["a", "b"], 6.0, 0.85)] == [
        "a", "b"
    ]  # fmt: skip
    assert inference.intervals(times, columns, ["a", "b"], 6.0, 0.95) == []


def test_moving_average_takes_what_there_is_at_the_ends():
    values = np.array([[0.0], [3.0], [6.0], [0.0]])
    assert inference.moving_average(values, 3).ravel().tolist() == [1.5, 3, 3, 3]
    assert (inference.moving_average(values, 1) == values).all()


# ---- What is no video, and what is long


def test_bad_files_are_named_in_one_line(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", noise(60)).read_bytes()
    hole = bytearray(whole)
    for i in range(len(whole) // 2, len(whole) // 2 + 20_000, 997):
        hole[i] ^= 0x55  # FFmpeg patches it up, and only notes it
    bad = {"hole.mp4": bytes(hole), "half.mp4": whole[: len(whole) // 2], "text.mp4": b"hello" * 99}
    bad |= {"empty.mp4": b""}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    write_sound(tmp_path / "sound.mp4")
    for name in [*bad, "sound.mp4", "missing.mp4"]:
        with pytest.raises(ValueError, match=f"^.*{name}: [^\n]+$"):
            inference.classify_video(tmp_path / name, bright_classifier())
    with pytest.raises(ValueError, match="nowhere: no config.json"):
        inference.load_classifier(tmp_path / "nowhere")


def test_a_time_that_jumps_is_an_error_and_a_long_still_is_none(tmp_path):
    """Else an hour-long hole is filled with copies of a frame, and a longer one fills memory."""
    frames, hour = noise(4), 3_600_000  # ms
    slides = write_video(tmp_path / "slides.mkv", frames, ms=[0, 300_000, 600_000, 600_040])
    *_, (end, _) = inference.shown_frames(slides)
    assert end == pytest.approx(800, abs=1)  # the last one stays as long as the mean
    for name, hours in {"jump.mkv": 500, "jump.mp4": 1}.items():
        path = write_video(tmp_path / name, frames, ms=[0, 40, 80, hours * hour])
        line = f"^.*{name}: time jumps from 0.1 to {3600 * hours}.0 s$"
        with pytest.raises(ValueError, match=line):
            inference.classify_video(path, bright_classifier())


def test_a_video_that_is_longer_than_allowed_costs_no_more(tmp_path):
    """By its frames' times, whatever its header says."""
    path = write_video(tmp_path / "long.mkv", noise(4), ms=[0, 500_000, 1_000_000, 1_500_000])
    with pytest.raises(ValueError, match="long.mkv: longer than 600 s"):
        inference.classify_video(path, bright_classifier(), max_seconds=600)
    inference.classify_video(path, bright_classifier(), max_seconds=3600, hop_seconds=60)


def test_a_thin_frame_is_refused_before_it_is_resized(tmp_path):
    """Its short side would become the model's, its long one thousands of times that."""
    path = write_video(tmp_path / "thin.mkv", noise(2, 16, 512), codec="ffv1")
    with pytest.raises(ValueError, match="thin.mkv: frames of 512 x 16 pixels"):
        inference.classify_video(path, bright_classifier())


def test_a_stream_that_begins_in_the_middle_is_an_error(tmp_path):
    """One damaged byte, the number of a packet's stream, is enough; PyAV raises IndexError."""
    path = write_video(tmp_path / "cast.ts", noise(60), rate=25)
    data = bytearray(path.read_bytes())
    frames = [i for i in range(0, len(data), 188) if data[i + 1 : i + 3] == b"\x41\x00"]
    data[frames[-5] + 2] = 9
    path.write_bytes(data)
    with pytest.raises(ValueError, match="^.*cast.ts: a stream begins after [^\n]+$"):
        inference.classify_video(path, bright_classifier())


MEMORY = """
import sys, psutil, torch
sys.path[:0] = ["tests", "tests/scripts", "scripts"]
import inference
from test_inference import bright_classifier
torch.set_num_threads(1)
seen = []
frames = inference.shown_frames
def watched(path, progress=False):
    for count, pair in enumerate(frames(path, progress)):
        if count % 500 == 0:
            seen.append(psutil.Process().memory_info().rss / 2**20)
        yield pair
inference.shown_frames = watched
result = inference.classify_video(
    sys.argv[1], bright_classifier(), window_seconds=5, hop_seconds=1.25
)
print(result["duration"], len(result["times"]), max(seen[2:]) - seen[2])
"""


@pytest.mark.long
def test_half_an_hour_takes_no_more_memory_than_its_first_minutes(tmp_path):
    frames = np.repeat(noise(5, 128, 160), 10, axis=0)
    write_video(tmp_path / "piece.mp4", frames, rate=5, bf="0")
    watching.repeat(tmp_path / "piece.mp4", tmp_path / "long.mkv", 180)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "long.mkv")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    duration, windows, growth = map(float, done.stdout.split())
    assert duration == pytest.approx(1800, abs=1) and windows > 1400
    assert growth < 20, f"{growth:.0f} MiB"  # all frames: 26 MiB as seen, 527 as decoded


def test_the_command_line_prints_json(classifier, tmp_path, monkeypatch, capsys):
    path = write_video(tmp_path / "clip.mp4", lights(2, []), rate=25)
    monkeypatch.setattr(inference, "load_classifier", lambda folder: bright_classifier())
    inference.main(["MODEL", str(path), "--window_seconds", "1", "--hop_seconds", "0.5"])
    (interval,) = json.loads(capsys.readouterr().out)
    assert interval["label"] == "off" and interval["end"] == pytest.approx(2)
    with pytest.raises(SystemExit, match="gone.mp4: not a video"):
        inference.main(["MODEL", str(tmp_path / "gone.mp4")])
