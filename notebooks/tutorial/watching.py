"""Long videos: true intervals, the F1 of found ones, and memory. The guide watch_long_videos."""

import threading
from pathlib import Path

import av
import clip_tables
import inference
import numpy as np
import pandas as pd
import prepare_clips
import psutil
import torch

from tutorial import results


def read_truth(table, video, label: str) -> list[tuple[float, float]] | None:
    """When `label` really happens in a video: (start, end) in seconds; None without a table.

    table: a file with the columns file, start, end, label, as prepare_clips.py --cut reads it; or
    an export of ELAN or Label Studio. Rows of other files are left out. Raises ValueError, one
    line with the table, for rows that cannot be used, or if no row has the label.
    """
    if not table:
        return None
    if not Path(table).is_file():
        raise ValueError(f"true_table {table}: there is no such file")
    rows, problems = clip_tables.read_table(Path(table))
    if problems:
        raise ValueError(f"true_table {table}: {problems[0]}")
    name = Path(video).name
    rows = [row for row in rows if prepare_clips.recording_of(row, [name]) == name]
    if any("start" not in row for row in rows):
        raise ValueError(f"true_table {table}: it counts in frames; write the times in seconds")
    rows, problems = clip_tables.check_rows(rows, {row["file"]: float("inf") for row in rows})
    if problems:
        raise ValueError(f"true_table {table}: {problems[0]}")
    true = sorted((row["start"], row["end"]) for row in rows if row["label"] == label)
    if not true:
        raise ValueError(f"true_table {table}: no row has the file {name} and the label {label}")
    return true


def choose_threshold(here, given: float | None = None) -> float:
    """`given`; or else the threshold of notebook 4, in results.json; or else 0.8. Prints which."""
    saved = results.saved(here).get("threshold")
    value, source = (0.8, "a default") if saved is None else (saved, "from notebook 4")
    if given is not None:
        value, source = given, "your parameter"
    print(f"threshold {value:g}, {source}")
    return value


def real_hop(classifier, window_seconds: float, hop_seconds: float) -> float:
    """Seconds from one window to the next, rounded to ticks as inference.classify_video does."""
    rate = classifier.sampling_rate
    tick = rate / inference.RATE if rate else window_seconds / classifier.num_frames
    return max(1, round(hop_seconds / tick)) * tick


def first_window(path, seconds: float, classifier) -> torch.Tensor:
    """The frames of the first window of a video: uint8 [frames, channels, height, width].

    seconds: how long the window is. The video is decoded no further.
    """
    count, frames = classifier.num_frames, []
    ticking = inference.ticking_frames(path, seconds / count, classifier.image_size, count)
    for _, shown in ticking:
        frames += shown
        if len(frames) >= count:
            break
    return torch.stack(frames[:count])


def found_intervals(result: dict, label: str, threshold: float, smooth: int = 3) -> list[dict]:
    """The intervals of one label at another setting, from windows that are judged already.

    result: of inference.classify_video. smooth: windows in the moving average, odd; 1: none.
    """
    probabilities = np.array(result["probabilities"], np.float32)  # as they were: ties stay ties
    smoothed = inference.moving_average(probabilities, smooth)
    how = result["labels"], result["duration"], threshold
    found = inference.intervals(result["times"], smoothed, *how)
    return [interval for interval in found if interval["label"] == label]


def scores(found: list[list[dict]], true: list) -> dict:
    """found, true, right, false alarms, precision, recall and F1 of the intervals of some videos.

    found, true: of each video, its intervals. true is None for a video that nobody has labelled:
    then all but `found` is NaN. A found interval is right if its IoU with a true one (common time
    divided by the time that they cover together) is at least 0.5, one to one. The others are false
    alarms. F1 = 2 right / (found + true).
    """
    count, nan = sum(map(len, found)), float("nan")
    unknown = "true", "right", "false alarms", "precision", "recall", "F1"
    if any(intervals is None for intervals in true):
        return {"found": count} | dict.fromkeys(unknown, nan)
    right = sum(results.right_intervals(*pair) for pair in zip(found, true, strict=True))
    total = sum(map(len, true))
    return {
        "found": count,
        "true": total,
        "right": right,
        "false alarms": count - right,
        "precision": right / count if count else nan,
        "recall": right / total if total else nan,
        "F1": 2 * right / (count + total) if count + total else nan,
    }


def compare(
    judged: list[dict], true: list, label: str, smooths, thresholds, used=()
) -> pd.DataFrame:
    """The scores of each setting, one row each: no window is judged again.

    judged: of each video, what inference.classify_video returned. true: see scores. used: the
    (smooth, threshold) that is marked as in use.
    """
    rows = []
    for smooth in smooths:
        for threshold in thresholds:
            found = [found_intervals(result, label, threshold, smooth) for result in judged]
            row = {"smooth": smooth, "threshold": threshold} | scores(found, true)
            rows.append(row | {"in use": "<--" if (smooth, threshold) == tuple(used) else ""})
    return pd.DataFrame(rows).set_index(["smooth", "threshold"]).round(2)


def as_table(judged: dict, label: str, threshold: float, smooth: int = 3) -> pd.DataFrame:
    """file, start, end, label and score of what is found: a table for prepare_clips.py --cut.

    judged: {path: what inference.classify_video returned}.
    """
    rows = [
        {"file": Path(path).name} | interval
        for path, result in judged.items()
        for interval in found_intervals(result, label, threshold, smooth)
    ]
    return pd.DataFrame(rows, columns=["file", "start", "end", "label", "score"]).round(2)


def repeat(source, target, times: int) -> Path:
    """Writes a video `times` times, one after the other, to `target` (.mkv): nothing is encoded."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        packets = [p for p in old.demux(stream) if p.dts is not None]
        data = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in packets]
        span = max(pts for _, pts, *_ in data) - min(pts for _, pts, *_ in data)
        span += span // (len(data) - 1)  # the last frame stays as long as the mean
        for number in range(times):
            for content, pts, dts, key in data:
                packet = av.Packet(content)
                packet.stream, packet.time_base = copy, stream.time_base
                packet.pts, packet.dts = pts + number * span, dts + number * span
                packet.is_keyframe = key
                new.mux(packet)
    return Path(target)


def peak_memory(work, *arguments, **settings) -> tuple:
    """(what work(...) returns, the most memory that this process held meanwhile, in MiB).

    Looks every 20 ms at the resident set, which is what the process has in the machine's memory.
    """
    process, seen, done = psutil.Process(), [], threading.Event()

    def look():
        while not done.wait(0.02):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        result = work(*arguments, **settings)
    finally:
        done.set()
        watcher.join()
    seen.append(process.memory_info().rss)
    return result, max(seen) / 2**20


def memory(clip, folder, classifier, minutes, hop_seconds: float = 5.0) -> pd.DataFrame:
    """Judges a clip that is repeated for some minutes: seconds, windows and peak memory in MiB.

    minutes: of each video, in this order. The last column is what its decoded frames would take
    together. The videos lie in `folder` only meanwhile.
    """
    rows = []
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        seconds = float(container.duration / av.time_base)
        frame, rate = 3 * stream.width * stream.height / 2**20, float(stream.average_rate)
    for length in minutes:
        path = repeat(clip, Path(folder) / "repeated.mkv", round(60 * length / seconds))
        how = {"hop_seconds": hop_seconds}
        result, peak = peak_memory(inference.classify_video, path, classifier, **how)
        rows.append({
            "minutes": result["duration"] / 60, "windows": len(result["times"]),
            "peak MiB": peak, "all frames MiB": result["duration"] * rate * frame,
        })  # fmt: skip
        path.unlink()
    return pd.DataFrame(rows).set_index("minutes").round(1)
