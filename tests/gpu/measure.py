"""What a GPU does with a ViT-B and a ViT-L: clips a second, memory, share of its data sheet.

    python tests/gpu/measure.py [--only training] > table.md

Weights are random, clips are 16 frames of 224 x 224 pixels. A training step is the script's own:
uint8 clips, autocast, GradScaler for fp16, AdamW. `largest batch` is the largest of 4, 8, 16, 32
that fits. `share` is 3 x the operations of a forward pass (tutorial/model_size.py) over the
card's dense speed in that precision, where PEAK knows the card.
"""

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "notebooks")]
os.environ |= {"HF_HUB_OFFLINE": "1"}

import av  # noqa: E402, F401  before decord
import torch  # noqa: E402
import train  # noqa: E402
import train_segmentation as seg  # noqa: E402
from transformers import VideoMAEConfig, VideoMAEForVideoClassification  # noqa: E402
from tutorial import model_size  # noqa: E402

SIZES = {
    "ViT-B": {},
    "ViT-L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
              "intermediate_size": 4096},
}  # fmt: skip
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Dense TFLOP/s without and with tensor cores of 16 bit, as the data sheets have them.
PEAK = {"H100": (67, 989), "H200": (67, 989), "A100": (19.5, 312), "A10G": (31, 70),
        "L4": (30, 121), "T4": (8.1, 65)}  # fmt: skip
PROCESSOR = SimpleNamespace(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


def speed_of(precision):
    name = torch.cuda.get_device_name()
    known = [speeds for card, speeds in PEAK.items() if card in name.replace("-", " ").split()]
    return known[0][precision != "fp32"] if known else None


def timed(step, least=5, seconds=1.5):
    """Seconds of a step (the mean of at least `least`), after two that do not count."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    count, start = 0, time.perf_counter()
    while count < least or time.perf_counter() - start < seconds:
        step()
        count += 1
        if count % least == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def classifier_step(size, batch, precision, checkpointing, compiled):
    """A training step of the classifier on a batch that lies on the GPU, as a function."""
    model = (
        VideoMAEForVideoClassification(VideoMAEConfig(num_labels=2, **SIZES[size])).cuda().train()
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    clips = torch.randint(256, (batch, 16, 3, 224, 224), dtype=torch.uint8, device="cuda")
    labels = torch.randint(2, (batch,), device="cuda")
    forward = torch.compile(model) if compiled else model

    def loss():
        logits = forward(train.normalised(clips, PROCESSOR)).logits
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    return step_of(model, loss, precision)


def segmentation_step(batch, precision, checkpointing):
    """Likewise of the segmentation model: 16 frames of 224 x 224, three labels."""
    model = seg.VideoMAEForVideoSegmentation(VideoMAEConfig(num_labels=3, decoder_width=128))
    model.cuda().train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    clips = torch.rand(batch, 16, 3, 224, 224, device="cuda")
    labels = torch.randint(3, (batch, 16, 224, 224), device="cuda")
    return step_of(model, lambda: seg.segmentation_loss(model(clips), labels), precision)


def step_of(model, loss, precision):
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scaler = torch.amp.GradScaler(enabled=precision == "fp16")

    def step():
        optimiser.zero_grad()
        with torch.autocast("cuda", HALF.get(precision), enabled=precision in HALF):
            value = loss()
        scaler.scale(value).backward()
        scaler.step(optimiser)
        scaler.update()

    return step


def largest(make, batches=(32, 16, 8, 4)):
    """(batch, clips per second, GB) of the largest batch that fits, or None."""
    for batch in batches:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(torch.OutOfMemoryError):
            seconds = timed(make(batch))
            return batch, batch / seconds, torch.cuda.max_memory_allocated() / 1e9
    return None


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells):
    row(*cells)
    row(*["---"] * len(cells))


def training(deadline):
    header(
        "model", "precision", "checkpointing", "compiled", "largest batch", "clips/s", "GB", "share"
    )
    ways = [
        (s, p, c, False) for s in SIZES for p in ("bf16", "fp16", "fp32") for c in (False, True)
    ]
    ways += [("ViT-B", "bf16", False, True), ("ViT-L", "bf16", False, True)]
    for size, precision, checkpointing, compiled in ways:
        if time.monotonic() > deadline:
            row(size, precision, checkpointing, compiled, "not measured: no time left", "", "", "")
            continue
        found = largest(
            lambda n, w=(size, precision, checkpointing, compiled): classifier_step(w[0], n, *w[1:])
        )
        if found is None:
            row(size, precision, checkpointing, compiled, "none", "", "", "")
            continue
        batch, rate, memory = found
        work = 3 * model_size.gflop(VideoMAEConfig(**SIZES[size])) * rate / 1000  # TFLOP/s
        peak = speed_of(precision)
        share = f"{work / peak:.0%}" if peak else "not known"
        row(size, precision, checkpointing, compiled, batch, f"{rate:.1f}", f"{memory:.1f}", share)


def segmentation(deadline):
    header("segmentation, ViT-B", "checkpointing", "largest batch", "clips/s", "GB")
    for precision in ("bf16", "fp16", "fp32"):
        for checkpointing in (False, True):
            if time.monotonic() < deadline:
                found = largest(lambda n, p=precision, c=checkpointing: segmentation_step(n, p, c))
                batch, rate, memory = found or (0, 0, 0)
                row(precision, checkpointing, batch or "none", f"{rate:.1f}", f"{memory:.1f}")


def inference_rates():
    header("forward, ViT", "precision", "clips/s, 8 at once", "ms, one window")
    for size in SIZES:
        model = VideoMAEForVideoClassification(VideoMAEConfig(**SIZES[size])).cuda().eval()
        for precision in ("fp32", "fp16", "bf16"):

            def judge(count, model=model, precision=precision):
                clips = torch.randint(256, (count, 16, 3, 224, 224), dtype=torch.uint8)
                half = torch.autocast("cuda", HALF.get(precision), enabled=precision in HALF)

                def step():
                    with torch.no_grad(), half:
                        model(train.normalised(clips.cuda(), PROCESSOR)).logits.softmax(-1).cpu()

                return timed(step)

            row(size, precision, f"{8 / judge(8):.1f}", f"{1000 * judge(1):.1f}")


def decoded(workers, batch=32, batches=48):
    """Clips per second of ViT-B in bf16 on clips that are read from files, and of reading alone."""
    from local_mode import clips as drawn

    model = VideoMAEForVideoClassification(VideoMAEConfig(num_labels=2)).cuda().train()
    labels, held = torch.zeros(batch, dtype=torch.long, device="cuda"), []

    def loss():
        logits = model(train.normalised(held[0], PROCESSOR)).logits
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    step, rates = step_of(model, loss, "bf16"), {}
    with tempfile.TemporaryDirectory() as folder:
        drawn.write_clips(Path(folder) / "clips", {"train": 96, "validation": 8}, height=256)
        rows = train.load_clips(f"{folder}/clips")["train"]
        args = SimpleNamespace(num_frames=16, image_size=224, rate=0, zoom=0.15, seed=0)
        args.horizontal_flip = True
        chosen = [i % len(rows) for i in range(batch * batches)]
        clips = torch.utils.data.Subset(train.Clips(rows, args, training=True), chosen)
        for name in ("reading alone", "training"):
            loader = torch.utils.data.DataLoader(
                clips, batch, num_workers=workers, pin_memory=True, prefetch_factor=2
            )
            for number, read in enumerate(loader):
                if number == workers:  # the first ones wait for the workers to start
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                if name == "training":
                    held[:] = [read["pixel_values"].cuda(non_blocking=True)]
                    step()
            torch.cuda.synchronize()
            rates[name] = batch * (batches - workers) / (time.perf_counter() - start)
    header("ViT-B, bf16, drawn clips of 256 lines; workers", *rates)
    row(workers, *(f"{rate:.1f} clips/s" for rate in rates.values()))


PARTS = {
    "training": training,
    "segmentation": segmentation,
    "inference": lambda deadline: inference_rates(),
    "reading": lambda deadline: decoded(min(16, os.cpu_count())),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seconds", type=int, default=150, help="at most for each part (150)")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} CPU cores")
    for part in args.only:
        print(flush=True)
        PARTS[part](time.monotonic() + args.seconds)


if __name__ == "__main__":
    main()
