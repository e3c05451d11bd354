"""How good is the embedded default, and does it need the motion? Prints a table.

    python tests/benchmarks/accuracy.py            # about 15 minutes on two cores

Trains `scripts/train.py` on more drawn clips and for longer than the tutorial does: with three
seeds on the clips, then on stills: the same clips, in which all frames are copies of one of them
(the first, the middle one, the last). Training and test are alike, so the comparison is fair.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "notebooks"))
from local_mode import clips as drawn  # noqa: E402

MODEL = ROOT / "notebooks/local_mode/tiny_videomae_v2"
COUNTS, HEIGHT = {"train": 320, "validation": 120, "test": 200}, 112
RECIPE = {
    "epochs": 10, "train_batch_size": 16, "eval_batch_size": 32, "learning_rate": 4e-4,
    "horizontal_flip": True,
}  # fmt: skip


def write_stills(source, target, place):
    """The clips of `source`, each frame replaced by the one at `place` in [0, 1]."""
    for path in tqdm(sorted(source.glob("*/*/*.mp4")), f"stills at {place}", disable=None):
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        still = frames[round(place * (len(frames) - 1))]
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        drawn.write_video(copy, np.stack([still] * 17), rate=12)


def accuracy_of(dataset, seed, folder):
    """Runs scripts/train.py and returns its accuracy on the test clips."""
    flags = [f"--{name}={value}" for name, value in RECIPE.items()]
    flags += [f"--dataset={dataset}", f"--seed={seed}"]
    flags += [f"--model_name={MODEL}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SM_")}
    subprocess.run(
        [sys.executable, ROOT / "scripts/train.py", *flags],
        cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return json.loads((folder / "outputs/data/metrics.json").read_text())["test_accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--places", type=float, nargs="*", default=[0.0, 0.5, 1.0])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        height, counts = HEIGHT, COUNTS
        clips = drawn.write_clips(root / "clips", counts, height=height)

        def run(name, dataset, seed):
            folder = root / name.replace(" ", "_")
            folder.mkdir()
            accuracy = accuracy_of(dataset, seed, folder)
            print(f"{name:24} {accuracy:.3f}", flush=True)
            return accuracy

        video = [run(f"video, seed {seed}", clips, seed) for seed in args.seeds]
        print(f"{'video, mean':24} {statistics.mean(video):.3f}", flush=True)
        stills = []
        for place in args.places:
            write_stills(clips, root / f"stills_{place}", place)
            stills.append(run(f"stills at {place}, seed 0", root / f"stills_{place}", 0))
    good = statistics.mean(video) >= 0.92 and min(video) >= 0.88 and max(stills, default=0) <= 0.8
    print("as it should be" if good else "NOT as it should be: video >= 0.92, stills <= 0.80")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
