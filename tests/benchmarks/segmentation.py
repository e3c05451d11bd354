"""What a training step of train_segmentation.py takes, as ratios to the plain step of one run.

    python tests/benchmarks/segmentation.py                # the tiny encoder, several sizes
    python tests/benchmarks/segmentation.py --vit_b        # a ViT-B of 16 frames of 224 x 224

Clips per second, the highest memory of a process that does nothing else, and the memory that a
step keeps for its backward pass: that part is the same on a GPU.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "scripts")]
import train  # noqa: E402
import train_segmentation as seg  # noqa: E402
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vit_b", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own measures
    args = parser.parse_args()
    if args.one:
        print(json.dumps(step(**json.loads(args.one))))
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
