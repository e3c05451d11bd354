"""What Trainer and our code add to a bare torch loop, and what a run waits for. Prints a table.

    python tests/benchmarks/training.py            # about two minutes on two cores

A random VideoMAE (width 192, 4 blocks, 16 frames of 112 x 112 pixels), batches of four clips that
lie in memory, the same ones for both loops, which take turns in one process. CPU seconds, user and
system, over all threads: they do not depend on what else the machine does.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import train  # noqa: E402

CONFIG = {
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768,
    "image_size": 112, "num_frames": 16, "use_mean_pooling": True, "num_labels": 2,
}  # fmt: skip
BATCH = 4


def random_model(**more):
    torch.manual_seed(0)
    return VideoMAEForVideoClassification(VideoMAEConfig(**CONFIG | more))


class InMemory(torch.utils.data.Dataset):
    """Stands for TrainClips: the same uint8 clips again and again."""

    def __init__(self, count):
        draw = torch.Generator().manual_seed(0)
        size = CONFIG["image_size"]
        self.clips = torch.randint(
            0, 256, (8, 16, 3, size, size), dtype=torch.uint8, generator=draw
        )
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {"pixel_values": self.clips[i % 8], "labels": i % 2}


def bare_loop(processor, steps, args):
    """CPU seconds per step, after the first, of the least that trains this model so."""
    model = random_model().train()
    optimiser = torch.optim.AdamW(train.parameter_groups(model, args))
    loader = torch.utils.data.DataLoader(InMemory((steps + 1) * BATCH), BATCH)
    start = None
    for batch in loader:
        logits = model(pixel_values=train.normalised(batch["pixel_values"], processor)).logits
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        start = start or time.process_time()
    return (time.process_time() - start) / steps


def trainer_loop(processor, steps, args):
    """CPU seconds per step of ClipTrainer, after the first."""
    trainer = train.ClipTrainer(
        model=random_model(),
        args=args,
        train_dataset=InMemory((steps + 1) * BATCH),
        processing_class=processor,
        callbacks=[train.Interruption(), clock := Clock()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.optimizer = torch.optim.AdamW(train.parameter_groups(trainer.model, args))
    trainer.train()
    return (clock.last - clock.first) / steps


class Clock(transformers.TrainerCallback):
    first = None

    def on_step_end(self, *args, **kwargs):
        self.last = time.process_time()
        self.first = self.first or self.last


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        processor = train.clip_processor(Path(folder), CONFIG["image_size"])
        flags = f"""--output_dir {folder} --train_batch_size {BATCH} --epochs 1 --save_strategy no
            --eval_strategy no --load_best_model_at_end false --dataloader_num_workers 0
            --logging_strategy no --disable_tqdm true""".split()
        loops = {"bare torch loop": bare_loop, "Trainer and train.py": trainer_loop}
        spent = {name: [] for name in loops}
        for _ in range(options.rounds):
            for name, loop in loops.items():
                args = train.parse_arguments(flags)
                spent[name].append(loop(processor, options.steps, args))
        median = {name: statistics.median(values) for name, values in spent.items()}
        base = median["bare torch loop"]
        print(f"CPU seconds per step of {BATCH} clips, median of {options.rounds} rounds")
        for name, seconds in median.items():
            print(f"{name:24} {seconds:8.4f} {seconds / base:8.3f}")
        clips = torch.randn(1, 16, 3, 224, 224)
        print("\nAttention over 1,568 tokens (224 x 224): CPU seconds of a forward pass, median")
        models = {
            kind: random_model(attn_implementation=kind, image_size=224).eval()
            for kind in ("eager", "sdpa")
        }
        logits, times = {}, {kind: [] for kind in models}
        with torch.no_grad():
            for _ in range(5 * options.rounds):
                for kind, model in models.items():
                    start = time.process_time()
                    logits[kind] = model(pixel_values=clips).logits
                    times[kind].append(time.process_time() - start)
        eager = statistics.median(times["eager"])
        for kind, values in times.items():
            seconds = statistics.median(values)
            print(f"{kind:24} {seconds:8.4f} {eager / seconds:8.2f}x")
        print(f"largest difference of logits {(logits['eager'] - logits['sdpa']).abs().max():.1e}")


if __name__ == "__main__":
    main()
