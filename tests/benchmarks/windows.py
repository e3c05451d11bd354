"""What it saves that windows share frames: python tests/benchmarks/windows.py

One drawn video, judged by the embedded tiny model, in windows of 2.5 s. *Shared* is what
scripts/inference.py does: one decode from start to end, each frame resized once. *Apart*: each
window is read as train.read_clip reads a clip: its 16 frames by decord (one reader, opened once),
then resized. Both show a model the same windows, so the rows without a model ("none") tell what
reading alone costs. CPU seconds of one thread; the two take turns; medians of three rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import decord
import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "notebooks")]
import inference  # noqa: E402
import train  # noqa: E402
from local_mode import clips as drawn  # noqa: E402

WINDOW = 2.5  # seconds


def shared(path, classifier, hop):
    settings = {"window_seconds": WINDOW, "hop_seconds": hop}
    return torch.tensor(inference.classify_video(path, classifier, **settings)["probabilities"])


def apart(path, classifier, hop):
    """Probabilities of the same windows, each of which is read for itself."""
    count, size, tick = classifier.num_frames, classifier.image_size, WINDOW / classifier.num_frames
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    times = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    step, clips, judged = max(1, round(hop / tick)), [], []
    for first in range(0, int(times[-1] / tick) - count + 1, step):
        seconds = (first + np.arange(count) + 0.5) * tick
        wanted = np.searchsorted(times, seconds + inference.ROUNDING, side="right") - 1
        frames = from_dlpack(reader.get_batch(wanted.tolist()).to_dlpack()).permute(0, 3, 1, 2)
        clips.append(train.cropped(frames, size, size, 0.5, 0.5))
        if len(clips) == 8:
            judged.append(inference.clip_probabilities(torch.stack(clips), classifier))
            clips.clear()
    if clips:
        judged.append(inference.clip_probabilities(torch.stack(clips), classifier))
    return torch.cat(judged)


class NoModel:
    """Says nothing about any clip, and costs nothing."""

    device = torch.device("cpu")

    def __call__(self, pixel_values):
        return SimpleNamespace(logits=torch.zeros(len(pixel_values), 2))


def tiny_classifier(folder):
    torch.manual_seed(0)
    tiny = str(ROOT / "notebooks" / "local_mode" / "tiny_videomae_v2")
    model, processor = train.load_model(tiny, [*drawn.LABELS])
    model.classifier.weight.data.normal_()  # else all probabilities are near 0.5
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return inference.load_classifier(folder, "cpu")


def times_real(path, classifier, hop, seconds, rounds):
    """Seconds of video per CPU second, medians: (shared, apart)."""
    speeds = {shared: [], apart: []}
    for way in [*speeds] * rounds:
        start = time.process_time()
        way(path, classifier, hop)
        speeds[way].append(seconds / (time.process_time() - start))
    return [statistics.median(values) for values in speeds.values()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=12, help="of video")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("Seconds of video per CPU second (times real time)")
    print("| frames | hop | model | shared | apart | shared / apart |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        path, tiny = Path(folder, "long.mp4"), tiny_classifier(Path(folder, "model"))
        models = {"tiny": tiny, "none": tiny._replace(model=NoModel())}
        for width, height in ((150, 112), (640, 480)):
            drawn.draw_long_video(path, 0, args.seconds, width, height)
            for hop in (0.15, 0.6):
                both = shared(path, tiny, hop), apart(path, tiny, hop)
                if max(abs(a - b).max() for a, b in zip(*both, strict=False)) > 0.05:
                    sys.exit("the two ways do not judge the same windows")
                for name, classifier in models.items():
                    ours, naive = times_real(path, classifier, hop, args.seconds, args.rounds)
                    print(f"| {width}x{height} | {hop} s | {name} | {ours:.1f} | {naive:.1f} | "
                          f"{ours / naive:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
