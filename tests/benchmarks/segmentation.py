"""What train_segmentation.py reaches, and what a training step takes.

    python tests/benchmarks/segmentation.py                # a step: the tiny encoder, several sizes
    python tests/benchmarks/segmentation.py --vit_b        # a ViT-B of 16 frames of 224 x 224
    python tests/benchmarks/segmentation.py --train        # the full drawn training: mIoU, J&F
    python tests/benchmarks/segmentation.py --losses       # 150 steps of it with each of two losses

Steps are ratios to the plain step of one run: clips per second, the highest memory of a process
that does nothing else, and the memory that a step keeps for its backward pass: that part is the
same on a GPU.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "notebooks")]
import train  # noqa: E402
import train_segmentation as seg  # noqa: E402
from local_mode import clips as drawn  # noqa: E402
from transformers import VideoMAEConfig  # noqa: E402

TINY = {"image_size": 64, "patch_size": 8, "hidden_size": 64, "intermediate_size": 256,
        "num_hidden_layers": 3, "num_attention_heads": 4, "decoder_width": 64}  # fmt: skip
VIT_B = {"image_size": 224, "decoder_width": 128}  # the rest is VideoMAEConfig's default
KINDS = {
    "all learns": {},
    "gradient checkpointing": {"checkpointing": True},
    "frozen encoder": {"frozen": True},
    "channels last": {"channels_last": True},
}
# The full drawn training: small videos, the tiny encoder, 1,050 steps.
DRAWING = {"videos": {"train": 600, "val": 32, "test": 24}, "height": 96,
           "frames": {"train": 6, "val": 6, "test": 18}}  # fmt: skip
FLAGS = {"epochs": 7, "train_batch_size": 4, "clip_length": 4, "crop_size": 96,
         "clips_per_video": 1, "decoder_width": 64, "horizontal_flip": True, "zoom": 0.15,
         "learning_rate": 0.003, "layer_decay": 0.4, "dataloader_num_workers": 1}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":  # a CPU may need minutes for a step
    KINDS["bf16"] = {"bf16": True}


def step(shape, side, frames, repeats, checkpointing=False, frozen=False, bf16=False,
         channels_last=False):  # fmt: skip
    """Seconds of a step on one clip (median), peak memory and kept memory in bytes."""
    torch.manual_seed(0)
    model = seg.VideoMAEForVideoSegmentation(VideoMAEConfig(num_labels=3, **shape))
    model.train().to(DEVICE)
    train.trainable(model, "backbone" if frozen else "none")
    if channels_last:
        model.to(memory_format=torch.channels_last_3d)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    clip = torch.rand(1, frames, 3, side, side, device=DEVICE)
    labels = torch.randint(0, 3, (1, frames, side, side), device=DEVICE)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def run():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            logits = model(pixel_values=clip)
        return seg.segmentation_loss(logits, labels)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run().backward()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run().backward()
        model.head.bias.grad.sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak
    return statistics.median(seconds), peak, sum(kept.values())


def trained(folder: Path, videos: Path, **more) -> dict:
    """The metrics of a run of the script on the videos, with FLAGS and `more` flags."""
    places = {"output_dir": "checkpoints", "model_dir": "model", "output_data_dir": "data"}
    flags = FLAGS | {name: folder / place for name, place in places.items()} | more
    flags |= {"dataset": videos, "model_name": ROOT / "notebooks/local_mode/tiny_videomae_v2"}
    script = [sys.executable, str(ROOT / "scripts" / "train_segmentation.py")]
    command = script + [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    subprocess.run(command, check=True)
    return json.loads((folder / "data" / "metrics.json").read_text())


def train_in_full(losses: bool) -> None:
    """Prints the metrics of the full drawn training, or of 150 steps with each of two losses."""
    runs = {"1,050 steps": {}}
    if losses:
        steps = {"max_steps": 150, "eval_strategy": "no", "save_strategy": "no"}
        steps |= {"load_best_model_at_end": False}
        runs = {f"150 steps, {loss}": steps | {"loss": loss} for loss in ("ce", "ce+dice")}
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        videos = drawn.write_davis(Path(folder) / "videos", **DRAWING)
        for number, (name, more) in enumerate(runs.items()):
            start = time.perf_counter()
            metrics = trained(Path(folder) / str(number), videos, **more)
            names = ["eval_iou_raised_arm", "test_miou", "test_iou_raised_arm", "test_J&F"]
            seconds = {"seconds": time.perf_counter() - start}
            rows[name] = {key: metrics[key] for key in names} | seconds
    print(pd.DataFrame(rows).T.round(3).to_string())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vit_b", action="store_true")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--losses", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own measures
    args = parser.parse_args()
    if args.one:
        print(json.dumps(step(**json.loads(args.one))))
        return
    if args.train or args.losses:
        train_in_full(args.losses)
        return
    shape, frames = (VIT_B, 16) if args.vit_b else (TINY, 8)
    sides, repeats = ([224], 2) if args.vit_b else ([64, 96, 128, 192], 5)
    rows, first = [], None
    for side in sides:
        for kind, options in KINDS.items():
            given = {"shape": shape, "side": side, "frames": frames, "repeats": repeats, **options}
            command = [sys.executable, __file__, "--one", json.dumps(given)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, peak, kept = json.loads(done.stdout.splitlines()[-1])
            first = first or seconds
            row = {"side": side, "step": kind, "clips/s": 1 / seconds, "speed": first / seconds}
            rows.append(row | {"kept MB": kept / 1e6, "peak MB": peak / 1e6})
            print(rows[-1], flush=True)
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
