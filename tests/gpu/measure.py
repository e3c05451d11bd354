"""What a GPU does with a ViT-B and a ViT-L: clips a second, memory, share of its data sheet.

    python tests/gpu/measure.py [--only training] [--seconds 180] > table.md

The parts share the seconds; what found no time is named in the table. Without a GPU it measures
the CPU, which only shows that it runs (test_measure.py).

Weights are random, clips are 16 frames of 224 x 224 pixels. A training step is the script's own:
uint8 clips, autocast, GradScaler for fp16, AdamW. `largest batch` is the largest of 4, 8, 16, 32
that fits. `share` is 3 x the operations of a forward pass (tutorial/model_size.py) over the
card's dense speed in that precision, where PEAK knows the card.
"""

import argparse
import contextlib
import gc
import os
import subprocess
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
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCHES = (32, 16, 8, 4)
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Dense TFLOP/s without and with tensor cores of 16 bit, as the data sheets have them.
PEAK = {"H100": (67, 989), "H200": (67, 989), "A100": (19.5, 312), "A10G": (31, 70),
        "L4": (30, 121), "T4": (8.1, 65)}  # fmt: skip
PROCESSOR = SimpleNamespace(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


def device_name():
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"


def wait():
    """Until the GPU has done all that it was asked to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def speed_of(precision):
    name = device_name()
    known = [speeds for card, speeds in PEAK.items() if card in name.replace("-", " ").split()]
    return known[0][precision != "fp32"] if known else None


def timed(step, least=5, seconds=1.5):
    """Seconds of a step (the mean of at least `least`), after two that do not count."""
    for _ in range(2):
        step()
    wait()
    count, start = 0, time.perf_counter()
    while count < least or time.perf_counter() - start < seconds:
        step()
        count += 1
        if count % least == 0:
            wait()
    wait()
    return (time.perf_counter() - start) / count


def shape(config, batch):
    """Of a batch of clips."""
    return batch, config.num_frames, 3, config.image_size, config.image_size


def classifier_step(size, batch, precision, checkpointing, compiled):
    """A training step of the classifier on a batch that lies on the GPU, as a function."""
    config = VideoMAEConfig(num_labels=2, **SIZES[size])
    model = VideoMAEForVideoClassification(config).to(DEVICE).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    clips = torch.randint(256, shape(config, batch), dtype=torch.uint8, device=DEVICE)
    labels = torch.randint(2, (batch,), device=DEVICE)
    forward = torch.compile(model) if compiled else model

    def loss():
        logits = forward(train.normalised(clips, PROCESSOR)).logits
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    return step_of(model, loss, precision)


def segmentation_step(batch, precision, checkpointing):
    """Likewise of the segmentation model: 16 frames of 224 x 224, three labels."""
    config = VideoMAEConfig(num_labels=3, decoder_width=128, **SIZES["ViT-B"])
    model = seg.VideoMAEForVideoSegmentation(config)
    model.to(DEVICE).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    clips = torch.rand(shape(config, batch), device=DEVICE)
    labels = torch.randint(3, clips[:, :, 0].shape, device=DEVICE)
    return step_of(model, lambda: seg.segmentation_loss(model(clips), labels), precision)


def step_of(model, loss, precision):
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scaler = torch.amp.GradScaler(DEVICE, enabled=precision == "fp16")

    def step():
        optimiser.zero_grad()
        with torch.autocast(DEVICE, HALF.get(precision), enabled=precision in HALF):
            value = loss()
        scaler.scale(value).backward()
        scaler.step(optimiser)
        scaler.update()

    return step


def largest(make):
    """(batch, clips per second, GB) of the largest batch that fits, or None."""
    for batch in BATCHES:
        gc.collect()
        if DEVICE == "cuda":
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
    precisions = ("bf16", "fp16", "fp32")
    ways = [(s, p, c, False) for s in SIZES for p in precisions for c in (False, True)]
    ways[2:2] = [(size, "bf16", False, True) for size in SIZES]  # compiled: before time runs out
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
            if time.monotonic() > deadline:
                row(precision, checkpointing, "not measured: no time left", "", "")
                continue
            found = largest(lambda n, p=precision, c=checkpointing: segmentation_step(n, p, c))
            batch, rate, memory = found or (0, 0, 0)
            row(precision, checkpointing, batch or "none", f"{rate:.1f}", f"{memory:.1f}")


def inference(deadline):
    header("forward, ViT", "precision", "clips/s, 8 at once", "ms, one window")
    for size in SIZES:
        config = VideoMAEConfig(**SIZES[size])
        model = VideoMAEForVideoClassification(config).to(DEVICE).eval()
        for precision in ("fp32", "fp16", "bf16"):
            if time.monotonic() > deadline:
                row(size, precision, "not measured: no time left", "")
                continue

            def judge(count, config=config, model=model, precision=precision):
                clips = torch.randint(256, shape(config, count), dtype=torch.uint8)
                half = torch.autocast(DEVICE, HALF.get(precision), enabled=precision in HALF)

                def step():
                    with torch.no_grad(), half:
                        pixels = train.normalised(clips.to(DEVICE), PROCESSOR)
                        model(pixels).logits.softmax(-1).cpu()

                return timed(step)

            row(size, precision, f"{8 / judge(8):.1f}", f"{1000 * judge(1):.1f}")


def reading(deadline, workers=None, batch=32, batches=24, height=256):
    """Clips per second of ViT-B in bf16 on clips that are read from files, and of reading alone.

    It draws few clips, since drawing one takes longer than reading it a hundred times.
    """
    workers = workers or min(16, os.cpu_count())
    config = VideoMAEConfig(num_labels=2, **SIZES["ViT-B"])
    model = VideoMAEForVideoClassification(config).to(DEVICE).train()
    labels, held = torch.zeros(batch, dtype=torch.long, device=DEVICE), []

    def loss():
        logits = model(train.normalised(held[0], PROCESSOR)).logits
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    step, rates = step_of(model, loss, "bf16"), {}
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, whose helpers would else load torch and this file too.
        draw = f"clips.write_clips('clips', {{'train': 16, 'validation': 2}}, height={height})"
        draw = [sys.executable, "-c", f"from local_mode import clips; {draw}"]
        paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(draw, cwd=folder, env=paths, check=True, stdout=sys.__stderr__)
        with contextlib.redirect_stdout(sys.stderr):  # the table has stdout
            rows = train.load_clips(f"{folder}/clips")["train"]
        args = SimpleNamespace(num_frames=config.num_frames, image_size=config.image_size, rate=0)
        args.zoom, args.seed, args.horizontal_flip = 0.15, 0, True
        chosen = [i % len(rows) for i in range(batch * (batches + workers))]
        clips = torch.utils.data.Subset(train.Clips(rows, args, training=True), chosen)
        for name in ("reading alone", "training"):
            loader = torch.utils.data.DataLoader(
                clips, batch, num_workers=workers, pin_memory=DEVICE == "cuda"
            )
            counted = 0
            for number, read in enumerate(loader):
                if name == "training":
                    held[:] = [read["pixel_values"].to(DEVICE, non_blocking=True)]
                    step()
                if number < workers:  # the first ones wait for the workers to start
                    wait()
                    start = time.perf_counter()
                elif time.monotonic() > deadline:
                    break
                else:
                    counted += batch
            wait()
            rates[name] = counted / (time.perf_counter() - start)
    header(f"ViT-B, bf16, drawn clips of {height} lines; workers", *rates)
    rates = [f"{rate:.1f} clips/s" if rate else "no time left" for rate in rates.values()]
    row(workers, *rates)


PARTS = {
    "training": training,
    "reading": reading,
    "inference": inference,
    "segmentation": segmentation,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seconds", type=float, default=180, help="for all parts (180)")
    args = parser.parse_args(argv)
    print(f"{device_name()}, torch {torch.__version__}, {os.cpu_count()} CPU cores")
    end = time.monotonic() + args.seconds
    for done, part in enumerate(args.only):
        print(flush=True)
        now = time.monotonic()
        most = 0.6 if part == "training" else 1  # of what is left, where others come after it
        last = done == len(args.only) - 1
        PARTS[part](end if last else now + most * (end - now))


if __name__ == "__main__":
    main()
