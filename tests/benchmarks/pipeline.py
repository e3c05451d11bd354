"""What a clip costs before it reaches the model. Prints tables of ratios, all from one run.

    python tests/benchmarks/pipeline.py                   # about an hour on two cores
    python tests/benchmarks/pipeline.py --only memory

Clips are synthetic (a drifting texture, moving discs, sensor noise), H.264 with x264's defaults, 2
to 10 s long. CPU seconds, user and system, of one process; paths take turns clip by clip, and the
table has the medians. The naive path is that of the well-known recipe: decode every frame, let the
image processor prepare every frame, then take 16.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import psutil
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import clip_files  # noqa: E402
import prepare_clips  # noqa: E402
import train  # noqa: E402

FRAMES, SIZE = 16, 224
TABLES = ["paths", "prepared", "preparing", "growth", "memory", "checking", "starting"]


# ---- Clips --------------------------------------------------------------------------------------


def write_clip(path, height, width, seconds, gop, seed, rate=30):
    """A synthetic H.264 clip of x264's default quality, with its usual three B-frames."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(20, 235, (1, 3, 24, 32)).astype(np.float32))
    fine = torch.from_numpy(rng.normal(0, 14, (1, 3, height // 2, width // 2)).astype(np.float32))
    large = (height + 64, width + 64)
    world = sum(torch.nn.functional.interpolate(x, large, mode="bilinear") for x in (coarse, fine))
    world = world[0].permute(1, 2, 0).numpy()
    y, x = np.mgrid[:height, :width]
    discs = rng.uniform(0.2, 0.8, (4, 4)) * [height, width, 1, 6]
    with av.open(str(path), "w") as container:
        options = {"g": str(gop), "keyint_min": str(gop)}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(round(seconds * rate)):
            top, left = (int(32 + 31 * np.sin(i / 40 + phase)) for phase in (0, 1))
            frame = world[top : top + height, left : left + width].copy()
            for cy, cx, shade, speed in discs:
                near = (y - cy - 40 * np.sin(i * speed / 20)) ** 2 + (x - cx - i * speed) ** 2
                frame[near < (height / 12) ** 2] = 255 * shade
            frame += rng.normal(0, 1, (height, width, 1))
            frame = av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_clips(folder, height, width, gop, count):
    folder.mkdir(parents=True)
    for i in tqdm(range(count), f"draw {height}p, GOP {gop}", disable=None):
        seconds = np.linspace(2, 10, count)[i]
        write_clip(folder / f"{i}.mp4", height, width, seconds, gop, seed=i)
    return sorted(map(str, folder.glob("*.mp4")))


# ---- Paths: file -> float32 [16, 3, 224, 224] ---------------------------------------------------


def naive(path, processor):
    with av.open(path) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    pixels = processor(list(frames), return_tensors="pt")["pixel_values"][0]
    return pixels[(torch.arange(FRAMES) + 0.5).mul(len(frames) / FRAMES).long()]


def ours(path, processor):
    return train.normalised(train.read_clip(path, FRAMES, SIZE), processor)


def bare(path, processor):
    """libavcodec alone: what must be decoded to have the same frames, and nothing done with it."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        packets = [p for p in container.demux(stream) if p.size]
        shown = sorted(p.pts for p in packets)
        keys = sorted(p.pts for p in packets if p.is_keyframe)
        wanted = ((np.arange(FRAMES) + 0.5) * len(shown) / FRAMES).astype(int)
        wanted = [shown[i] for i in wanted]
        position, key = None, None
        for pts in wanted:
            start = max(k for k in keys if k <= pts)
            if start != key and (position is None or start > position):
                container.seek(start, stream=stream)
                frames, key = container.decode(stream), start
            while position is None or position < pts:
                position = next(frames).pts


def cpu_seconds(function, *args):
    start = time.process_time()
    function(*args)
    return time.process_time() - start


# ---- Tables -------------------------------------------------------------------------------------


def paths_table(folder, clips, rounds):
    print(f"\nCPU seconds per clip, {FRAMES} frames to float32 {SIZE}x{SIZE}; median of {rounds}")
    print(f"{'clips':22} {'naive':>8} {'ours':>8} {'bare':>8} {'naive/ours':>11} {'bare/ours':>10}")
    processor = train.clip_processor(folder, SIZE)
    for height, width in ((240, 320), (720, 1280)):
        for gop in (12, 250):
            files = write_clips(folder / f"{height}_{gop}", height, width, gop, clips)
            spent = {path: [] for path in (naive, ours, bare)}
            for _ in range(rounds):
                total = dict.fromkeys(spent, 0.0)
                for file in files:
                    for path in spent:
                        total[path] += cpu_seconds(path, file, processor) / len(files)
                for path in spent:
                    spent[path].append(total[path])
            median = {path: statistics.median(values) for path, values in spent.items()}
            name = f"{width}x{height}, GOP {gop}"
            print(
                f"{name:22} {median[naive]:8.3f} {median[ours]:8.3f} {median[bare]:8.3f}"
                f" {median[naive] / median[ours]:10.1f}x {median[bare] / median[ours]:10.0%}"
            )


def prepared_table(folder, clips, rounds):
    files = write_clips(folder / "raw" / "train" / "a", 720, 1280, 250, clips)
    command = [sys.executable, ROOT / "scripts/prepare_clips.py", folder / "raw", folder / "ready"]
    before = os.times()
    subprocess.run([*command, "--workers", "1"], check=True, capture_output=True)
    after = os.times()
    once = after.children_user + after.children_system
    once = (once - before.children_user - before.children_system) / clips
    ready = [file.replace("/raw/", "/ready/") for file in files]
    processor = train.clip_processor(folder, SIZE)
    table = {"naive, as it came": (naive, files), "ours, as it came": (ours, files),
             "ours, prepared": (ours, ready)}  # fmt: skip
    spent = {name: [] for name in table}
    for _ in range(rounds):
        for name, (path, some) in table.items():
            spent[name].append(sum(cpu_seconds(path, f, processor) for f in some) / clips)
    cost = {name: statistics.median(values) for name, values in spent.items()}
    print("\nPreparing 1280x720 clips once: CPU seconds per clip and epoch")
    for name, seconds in cost.items():
        print(f"{name:22} {seconds:8.3f} {cost['naive, as it came'] / seconds:8.1f}x")
    gain = cost["ours, as it came"] - cost["ours, prepared"]
    print(f"{'preparing, once':22} {once:8.3f}   pays after {once / gain:.1f} epochs of ours")


def preparing_table(folder, rounds):
    """Where the CPU seconds of preparing go, of one process."""
    print("\nPreparing a clip of 5 s: CPU seconds of each part")
    print(f"{'clip':22} {'decode':>8} {'+ scale, write':>15} {'+ check':>8} {'sum':>8}")
    for height, width in ((240, 320), (720, 1280)):
        source, target, spent = folder / f"{height}.mp4", folder / "prepared.mp4", []
        write_clip(source, height, width, 5, 250, seed=0)
        for _ in range(rounds):
            marks = [time.process_time()]
            for _ in clip_files.decode(source):
                pass
            marks.append(time.process_time())
            thumbnails = clip_files.transcode(source, target, 256, 12)
            marks.append(time.process_time())
            clip_files.check(target, thumbnails)
            marks.append(time.process_time())
            decoded, written, checked = np.diff(marks)
            spent.append((decoded, written - decoded, checked, written + checked))
        row = np.median(spent, axis=0)
        print(f"{f'{width}x{height}':22} {row[0]:8.3f} {row[1]:15.3f} {row[2]:8.3f} {row[3]:8.3f}")


class Clips(torch.utils.data.Dataset):
    def __init__(self, files, frames, size):
        self.files, self.frames, self.size = files, frames, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return train.read_clip(self.files[i], self.frames, self.size)


def growth_table(folder, clips):
    print("\nClips per second through a DataLoader, batches of 4 (wall time)")
    print(f"{'clips':12} {'frames':>6} {'size':>5}" + "".join(f"{w:>4} workers" for w in (1, 2)))
    for height, width in ((240, 320), (720, 1280)):
        files = write_clips(folder / f"grow_{height}", height, width, 12, clips)
        for frames, size in ((8, 224), (16, 112), (16, 224), (32, 224)):
            speeds = []
            for workers in (1, 2):
                dataset = Clips(files * 4, frames, size)
                loader = torch.utils.data.DataLoader(dataset, 4, num_workers=workers)
                batches = iter(loader)
                next(batches)  # the workers have started
                start = time.monotonic()
                count = sum(len(batch) for batch in batches)
                speeds.append(count / (time.monotonic() - start))
            row = "".join(f"{speed:12.1f}" for speed in speeds)
            print(f"{width}x{height:<7} {frames:6} {size:5}{row}")


def memory_table(folder, count=2000):
    """Resident memory of a process that reads clips, as a DataLoader worker does."""
    files = write_clips(folder / "memory", 240, 320, 12, 8)
    process, sizes = psutil.Process(), {}
    flags = SimpleNamespace(num_frames=FRAMES, image_size=SIZE, rate=0, zoom=0.15)
    flags.horizontal_flip = False
    for i in tqdm(range(count + 1), "memory", disable=None):
        if i in (100, count // 2, count):
            sizes[i] = process.memory_info().rss / 2**20
        train.read_train_clip(files[i % 8], flags, np.random.default_rng(i))
    print("\nResident memory (MiB) after reading so many clips")
    print(" ".join(f"{i}: {size:.0f}" for i, size in sizes.items()), end="")
    print(f"   growth: {sizes[count] - sizes[100]:.1f} MiB")


def checking_table(folder, count):
    """A data set of many clips before its first step: found and listed, and each one opened.

    A clip as it came is compared frame by frame; of a prepared one, a sample is read.
    """
    raw = write_clips(folder / "few", 240, 320, 12, 8)
    ready = [folder / f"{number}.mp4" for number in range(8)]
    for source, target in zip(raw, ready, strict=True):
        clip_files.prepare_clip(Path(source), target, 256, 12)
    print(f"\n{count:,} clips of 320x240 on {os.cpu_count()} cores (wall time)")
    for name, files in (("prepared", ready), ("as they came", raw)):
        for i in range(count):
            split = "validation" if i % 10 == 0 else "train"
            link = folder / name / split / f"label_{i // 10 % 2}" / f"{i}.mp4"
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(files[i % 8], link)
        marks = [time.monotonic()]
        clips = train.load_clips(str(folder / name))
        marks.append(time.monotonic())
        prepare_clips.check_clips(clips, FRAMES)
        listed, checked = np.diff([*marks, time.monotonic()])
        print(f"{name:13} found and listed: {listed:.1f} s   each opened: {checked:.0f} s", end="")
        print(f" ({count / checked:.0f} clips/s)", flush=True)


def starting_table(folder, rounds=3):
    """From the command to the first training step of the tiny model: where the seconds go."""
    sys.path.insert(0, str(ROOT / "notebooks"))
    from local_mode import clips

    clips.write_clips(folder / "clips", {"train": 16, "validation": 4}, height=80)
    tiny = str(ROOT / "notebooks/local_mode/tiny_videomae_v2")
    flags = ["--dataset", str(folder / "clips"), "--model_name", tiny, "--max_steps", "1"]
    code = f"""if True:
        import os, sys, time
        sys.path.insert(0, {str(ROOT / "scripts")!r})
        def mark(name):
            print("MARK", name, time.time(), time.process_time(), flush=True)
        import torch
        mark("torch")
        from transformers import Trainer, VideoMAEForVideoClassification
        mark("transformers")
        import train
        mark("all else that train.py imports")
        step = train.ClipTrainer.training_step
        def first(*args, **kwargs):
            mark("clips listed and opened, model, workers")
            found = step(*args, **kwargs)
            mark("the first step")
            os._exit(0)
        train.ClipTrainer.training_step = first
        train.main({flags!r})
    """
    print("\nFrom the command to the first step, tiny model, files in memory: wall (CPU) seconds")
    found = {}
    for _ in range(rounds + 1):  # the first one warms up
        last, spent = time.time(), 0.0
        made = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder
        )
        for line in made.stdout.splitlines():
            if line.startswith("MARK "):
                name, now, cpu = line[5:].rsplit(" ", 2)
                found.setdefault(name, []).append((float(now) - last, float(cpu) - spent))
                last, spent = float(now), float(cpu)
    rows = {name: np.median(values[1:], axis=0) for name, values in found.items()}
    for name, (wall, cpu) in [*rows.items(), ("sum", np.sum(list(rows.values()), axis=0))]:
        print(f"{name:42} {wall:6.2f} ({cpu:.2f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=6, help="of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10_000, help="of the clips that are checked")
    parser.add_argument("--only", choices=TABLES)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a DataLoader worker
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tables = {
            "paths": lambda: paths_table(folder, args.clips, args.rounds),
            "prepared": lambda: prepared_table(folder, args.clips, args.rounds),
            "preparing": lambda: preparing_table(folder, args.rounds),
            "growth": lambda: growth_table(folder, args.clips),
            "memory": lambda: memory_table(folder),
            "checking": lambda: checking_table(folder, args.count),
            "starting": lambda: starting_table(folder),
        }
        for name, table in tables.items():
            if args.only in (None, name):
                table()


if __name__ == "__main__":
    main()
