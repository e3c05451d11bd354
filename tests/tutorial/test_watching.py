"""What the guide watch_long_videos measures, on intervals and videos whose answer is known."""

import math
import time
from types import SimpleNamespace

import av
import inference
import numpy as np
import pytest
import torch
from tutorial import watching
from videos import noise, write_video

TRUE = [(10.0, 12.0), (20.0, 22.0)]


class Bright(torch.nn.Module):
    """A "model" that knows: a clip is "on" as far as its pixels are bright."""

    device = torch.device("cpu")

    def forward(self, pixel_values):
        level = pixel_values.mean((1, 2, 3, 4))
        return SimpleNamespace(logits=torch.stack([-8 * level, 8 * level], 1))


PROCESSOR = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
CLASSIFIER = inference.Classifier(Bright(), PROCESSOR, ["off", "on"], 16, 32, 0)


def result(probabilities, labels=("off", "on")):
    """As inference.classify_video: one window a second, of a probability of the last label."""
    high = np.array(probabilities)
    return {
        "labels": list(labels), "duration": float(len(high)),
        "times": [i + 0.5 for i in range(len(high))],
        "probabilities": np.stack([1 - high, high], 1).tolist(),
    }  # fmt: skip


def spans(intervals):
    return [(interval["start"], interval["end"]) for interval in intervals]


def found(*intervals):
    return [{"start": start, "end": end, "score": 0.9} for start, end in intervals]


def test_another_setting_gives_what_judging_again_would_give(tmp_path):
    lights = np.zeros((300, 32, 32, 3), np.uint8)  # 12 seconds
    lights[50:100], lights[125:225] = 255, 255
    path = write_video(tmp_path / "clip.mp4", lights, rate=25)
    how = {"window_seconds": 1.28, "hop_seconds": 0.24}
    judged = inference.classify_video(path, CLASSIFIER, **how)
    for smooth, threshold in ((1, 0.3), (3, 0.5), (9, 0.8)):
        again = inference.classify_video(
            path, CLASSIFIER, smooth=smooth, threshold=threshold, **how
        )
        expected = spans(i for i in again["intervals"] if i["label"] == "on")
        assert spans(watching.found_intervals(judged, "on", threshold, smooth)) == expected


@pytest.mark.parametrize("rate, wanted", [(0, 0.15), (0, 1), (0, 0.01), (4, 0.15), (4, 0.5)])
def test_the_hop_that_is_printed_is_the_hop_of_the_windows(tmp_path, rate, wanted):
    clip = write_video(tmp_path / "clip.mp4", np.zeros((250, 32, 32, 3), np.uint8), rate=25)
    classifier = CLASSIFIER._replace(sampling_rate=rate)
    judged = inference.classify_video(clip, classifier, window_seconds=2.8, hop_seconds=wanted)
    hops = np.diff(judged["times"])[:-1]  # the last window ends with the video
    np.testing.assert_allclose(hops, watching.real_hop(classifier, 2.8, wanted))


def test_the_first_window_is_the_first_that_is_judged(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", noise(100, 32, 32), rate=25)
    window = watching.first_window(clip, 2.0, CLASSIFIER)
    assert window.shape == (16, 3, 32, 32) and window.dtype == torch.uint8
    expected = inference.classify_video(clip, CLASSIFIER, window_seconds=2)["probabilities"][0]
    found = inference.clip_probabilities(window[None], CLASSIFIER)[0]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    short = write_video(tmp_path / "short.mp4", noise(10, 32, 32), rate=25)
    assert len(watching.first_window(short, 2.0, CLASSIFIER)) == 16  # its last frame is repeated


def test_the_threshold_is_printed_with_its_source(tmp_path, capsys):
    here = SimpleNamespace(output=tmp_path)
    assert watching.choose_threshold(here) == 0.8
    (tmp_path / "results.json").write_text('{"threshold": 0.72}')
    assert watching.choose_threshold(here) == 0.72 and watching.choose_threshold(here, 0.6) == 0.6
    assert capsys.readouterr().out.splitlines() == [
        "threshold 0.8, a default", "threshold 0.72, from notebook 4",
        "threshold 0.6, your parameter",
    ]  # fmt: skip


def test_scores_of_two_videos_are_counted_together():
    """2 of 3 found are right, of 4 true; the interval of one video is no answer for the other."""
    scores = watching.scores([found((10, 12), (50, 52)), found((20, 22))], [TRUE, TRUE])
    assert scores == {
        "found": 3, "true": 4, "right": 2, "false alarms": 1,
        "precision": pytest.approx(2 / 3), "recall": 1 / 2, "F1": pytest.approx(4 / 7),
    }  # fmt: skip


def test_what_is_not_known_is_not_scored():
    scores = watching.scores([found((10, 12))], [None])
    assert scores.pop("found") == 1 and all(map(math.isnan, scores.values()))
    empty = watching.scores([[]], [TRUE])
    assert empty["recall"] == empty["F1"] == 0 and math.isnan(empty["precision"])


def test_smoothing_and_threshold_are_compared_row_by_row():
    """A flicker of one second is a false alarm unless smoothed; 0.95 is above every window."""
    high = np.full(30, 0.1)
    high[10:13], high[20:23], high[26] = 0.9, 0.9, 0.9
    table = watching.compare(
        [result(high)], [[(10, 13), (20, 23)]], "on", (1, 3), (0.5, 0.95), (3, 0.5)
    )
    assert table.index.names == ["smooth", "threshold"]
    assert table.found.to_dict() == {(1, 0.5): 3, (1, 0.95): 0, (3, 0.5): 2, (3, 0.95): 0}
    assert table["in use"].to_dict() == {
        (1, 0.5): "",
        (1, 0.95): "",
        (3, 0.5): "<--",
        (3, 0.95): "",
    }
    assert table.F1.to_dict() == {(1, 0.5): 0.8, (1, 0.95): 0, (3, 0.5): 1, (3, 0.95): 0}


def test_the_table_of_what_is_found_is_read_as_truth(tmp_path):
    """So that a reader can correct it, and prepare_clips.py --cut can cut by it."""
    high = np.full(30, 0.1)
    high[[4, 5, 6, 20, 21]] = 0.9
    judged = {tmp_path / "a.mp4": result(high), tmp_path / "b.mp4": result(high[::-1])}
    table = watching.as_table(judged, "on", 0.5, smooth=1)
    table.to_csv(tmp_path / "found.csv", index=False)
    assert list(table.columns) == ["file", "start", "end", "label", "score"]
    for path, expected in {"a.mp4": [(4, 7), (20, 22)], "b.mp4": [(8, 10), (23, 26)]}.items():
        assert watching.read_truth(tmp_path / "found.csv", tmp_path / path, "on") == expected
    assert watching.as_table(judged, "on", 0.99).empty


def test_the_true_table_of_a_reader(tmp_path):
    table = tmp_path / "true.csv"
    table.write_text(
        "file;start;end;label\nlesson.mp4;1:05;1:07.5;raise\nlesson.mp4;3;4,5;raise\n"
        "lesson.mp4;8;9;point\nother.mp4;10;11;raise\n"
    )
    assert watching.read_truth(table, "videos/lesson.mp4", "raise") == [(3, 4.5), (65, 67.5)]
    assert watching.read_truth(None, "lesson.mp4", "raise") is None


@pytest.mark.parametrize(
    "text, line",
    [
        ("start,end\n1,2\n", "no column file, label"),
        ("file,start,end,label\na.mp4,x,2,raise\n", "row 2: "),
        ("file,start,end,label\na.mp4,3,2,raise\n", "row 2: .*start must be before the end"),
        ("file,start,end,label\na.mp4,1,3,raise\na.mp4,2,4,raise\n", "row 3: .*overlaps row 2"),
        ("file,start,end,label\na.mp4,1,2,rise\n", "no row has the file a.mp4 and the label raise"),
        ("file,start,end,label\nb.mp4,1,2,raise\n", "no row has the file a.mp4"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_in_one_line(tmp_path, text, line):
    (tmp_path / "true.csv").write_text(text)
    with pytest.raises(ValueError, match=f"^[^\n]*true.csv: {line}[^\n]*$"):
        watching.read_truth(tmp_path / "true.csv", "a.mp4", "raise")
    with pytest.raises(ValueError, match="true_table gone.csv: there is no such file"):
        watching.read_truth("gone.csv", "a.mp4", "raise")


@pytest.mark.parametrize("between", ["0", "2"], ids=["no B-frames", "B-frames"])
def test_a_repeated_video_is_the_same_frames_again(tmp_path, between):
    clip = write_video(tmp_path / "clip.mp4", noise(20, 48, 64), rate=25, bf=between)
    path = watching.repeat(clip, tmp_path / "long.mkv", 3)
    with av.open(str(clip)) as once, av.open(str(path)) as long:
        frames = [frame.to_ndarray(format="rgb24") for frame in once.decode(video=0)]
        again = [frame.to_ndarray(format="rgb24") for frame in long.decode(video=0)]
    assert len(again) == 60 and all((a == b).all() for a, b in zip(again, frames * 3, strict=True))
    times = [end for end, _ in inference.shown_frames(path)]
    assert times == pytest.approx([(i + 1) / 25 for i in range(60)], abs=2e-3)


def test_the_peak_is_seen_also_after_it_is_given_back():
    def large(size):
        block = bytearray(size)
        block[:: 2**12] = b"1" * len(block[:: 2**12])  # so that each page is really there
        time.sleep(0.2)  # ten looks long
        return len(block)

    answer, small = watching.peak_memory(lambda: 7)
    size, peak = watching.peak_memory(large, 200 * 2**20)
    assert (answer, size) == (7, 200 * 2**20) and peak > small + 100
    with pytest.raises(ZeroDivisionError):
        watching.peak_memory(lambda: 1 / 0)


def test_the_table_of_memory(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", noise(50, 48, 64), rate=25)
    table = watching.memory(clip, tmp_path, CLASSIFIER, (0.1, 0.2), hop_seconds=1)
    assert list(table.index) == [0.1, 0.2] and list(table.windows) == [5, 12]
    assert table["all frames MiB"].tolist() == pytest.approx([1.3, 2.6], abs=0.1)
    assert (table["peak MiB"] > 50).all() and not (tmp_path / "repeated.mkv").exists()
