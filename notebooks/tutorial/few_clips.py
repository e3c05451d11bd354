"""How many clips are enough: the curve of how_to/train_with_few_clips, and its pictures.

The training is that of scripts/train.py with the same flags, made quick for many short runs: the
clips are decoded once and stay in memory, and a frozen backbone is passed once. So there are no
random frames and crops; a mirrored copy of each clip stands for them, if mirrored clips are right.
"""

import copy
import itertools
import math
import time
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import train
import transformers
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from tqdm import tqdm

from tutorial import pictures


class Method(NamedTuple):
    """A way to fine-tune."""

    flags: tuple[str, ...]  # of train.py
    rate: float  # learning rate, relative to the one that is good for all weights
    colour: str


# The rates: of the factors 1, 3, 10, 30 and 100, three or four around the best one were tried with
# the tiny model and 40 steps. Each factor here has the highest accuracy on 120 validation clips,
# the mean over 10 and 100 clips per class and two draws (linear probe: 10, 50 and 100, four draws).
# Factors next to the best one are 0.01 to 0.03 worse, so for another model try the neighbours.
METHODS = {
    "linear probe": Method(("--freeze=backbone",), 30, "#E69F00"),
    "last block": Method(("--freeze=all_but_1",), 30, "#009E73"),
    "LoRA": Method(("--lora_rank=8",), 30, "#0072B2"),
    "all weights": Method((), 3, "#CC79A7"),
}

warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft asks for it
BAR = {"mininterval": 2}  # seconds between two steps of a progress bar: short pages
FLAGS = ("--output_dir=outputs/curve", "--per_device_train_batch_size=8")  # nothing is written


# ---- Clips and model ----------------------------------------------------------------------------


class Clips(NamedTuple):
    """Decoded clips. `views` is 2 if each clip comes with its mirror image, else 1."""

    pixels: torch.Tensor  # uint8 [clips, views, frames, 3, height, width], as evaluation sees them
    features: torch.Tensor  # float32 [clips, views, hidden size]: the mean token of the backbone
    truth: torch.Tensor  # int64 [clips], numbers of labels

    def some(self, chosen):
        """The clips with these numbers."""
        return Clips(*(values[chosen] for values in self))


def load(model_name: str, labels: list[str]) -> SimpleNamespace:
    """The model to start from and its image processor, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = train.load_model(model_name, labels)
    return SimpleNamespace(model=model.to(device).eval(), processor=processor, device=device)


def read(rows, start, mirror: bool = False, most: int | None = None) -> Clips:
    """Decodes the clips of a split at the size of the model, and passes them through its backbone.

    rows: see prepare_clips.load_clips. start: of load. mirror: with the mirror image of each clip.
    most: at most so many of each label, chosen at random. Raises ValueError with the path of a bad
    file.
    """
    if most:
        truth, labels = np.array(rows["label"]), start.model.config.num_labels
        counts = np.minimum(np.bincount(truth, minlength=labels), most)
        rows = rows.select(sorted(draw(truth, counts, seed=0)))
    config = start.model.config
    pixels, features = [], []
    for video in tqdm(rows["video"], "clips", **BAR):
        clip = train.read_clip(video["path"], config.num_frames, config.image_size)
        pixels.append(torch.stack([clip, clip.flip(-1)] if mirror else [clip]))
        with torch.no_grad():
            tokens = start.model.videomae(prepared(pixels[-1], start)).last_hidden_state
        features.append(tokens.mean(1).cpu())
    return Clips(torch.stack(pixels), torch.stack(features), torch.tensor(rows["label"]))


def prepared(pixels, start) -> torch.Tensor:
    """uint8 [..., 3, height, width] -> float32 on the device of the model, normalised."""
    return train.normalised(pixels.to(start.device), start.processor)


def possible(sizes: dict[int, int], truth) -> dict[int, int]:
    """Of {clips per class: steps}, what each label has enough clips for; prints what it leaves out.

    Raises ValueError if nothing is left.
    """
    least = int(np.bincount(truth).min())
    if left_out := [size for size in sizes if size > least]:
        print(f"The rarest label has {least} training clips. Left out: {left_out} clips per class.")
    kept = {size: steps for size, steps in sizes.items() if size <= least}
    if not kept:
        raise ValueError(f"sizes {sizes}: the rarest label has {least} clips; name a smaller size")
    return kept


def draw(truth, counts: list[int], seed: int) -> list[int]:
    """Numbers of clips, chosen at random: counts[label] of each label.

    Draws of one seed are nested: its 5 clips are among its 10 clips. Raises ValueError if a label
    has too few clips.
    """
    chosen = []
    for label, count in enumerate(counts):
        own = np.flatnonzero(np.asarray(truth) == label)
        if count > len(own):
            raise ValueError(f"label {label} has {len(own)} training clips, not {count}")
        chosen += np.random.default_rng([seed, label]).permutation(own)[:count].tolist()
    return chosen


# ---- Runs ---------------------------------------------------------------------------------------


def arguments(method: str, learning_rate: float, *flags: str) -> train.Arguments:
    """What train.py makes of the flags of a method and of `flags`.

    learning_rate: for all weights; the method multiplies it.
    """
    own, rate = METHODS[method].flags, learning_rate * METHODS[method].rate
    return train.parse_arguments([*own, f"--learning_rate={rate}", *FLAGS, *flags])


def fresh(start, args):
    """A copy of the model with a new head, and only those weights to learn that `args` says."""
    model = copy.deepcopy(start.model)
    torch.nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    return train.trainable(model, args.freeze, args.lora_rank)


def learning(model) -> int:
    """How many weights learn."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def logits_of(model, start, args, pixels, features) -> torch.Tensor:
    """Logits [clips, labels]; of the features, if only the head learns: the same, but quicker."""
    with torch.autocast(start.device, torch.bfloat16, enabled=args.bf16):
        if args.freeze == "backbone":
            logits = model.classifier(model.fc_norm(features.to(start.device)))
        else:
            logits = model(prepared(pixels, start)).logits
    return logits.float()


def fit(start, args, clips: Clips, steps: int, seed: int):
    """(model, losses): trained as train.py does with `args`, but for `steps` batches.

    start: of load; it stays as it is. The seed decides the new head and the order of the clips.
    """
    torch.manual_seed(seed)
    model = fresh(start, args).train()
    optimiser = torch.optim.AdamW(train.parameter_groups(model, args))
    warmup = math.ceil(args.warmup_steps * steps)
    schedule = transformers.get_cosine_schedule_with_warmup(optimiser, warmup, steps)
    weights, counts = None, torch.bincount(clips.truth)
    if args.class_weights == "balanced":
        weights = (counts.sum() / counts / len(counts)).float().to(start.device)
    views, losses = clips.pixels.shape[1], []
    truth = clips.truth.repeat_interleave(views).to(start.device)
    pixels, features = clips.pixels.flatten(0, 1), clips.features.flatten(0, 1)
    for some in batches(len(truth), args.per_device_train_batch_size, steps):
        logits = logits_of(model, start, args, pixels[some], features[some])
        smoothing = args.label_smoothing_factor
        loss = F.cross_entropy(logits, truth[some], weights, label_smoothing=smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


def batches(count: int, size: int, steps: int):
    """`steps` times at most `size` numbers below `count`; all are used before one comes again."""
    epochs = (torch.randperm(count).split(size) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)


@torch.no_grad()
def predict(model, start, args, clips: Clips) -> torch.Tensor:
    """The label that the model gives to each clip, without its mirror image: int64 [clips]."""
    parts = zip(clips.pixels[:, 0].split(32), clips.features[:, 0].split(32), strict=True)
    return torch.cat([logits_of(model, start, args, *part).argmax(-1).cpu() for part in parts])


def curve(start, learn, test, methods, sizes, draws, learning_rate, flags=()):
    """Trains with each method on each number of clips per class, `draws` times.

    learn, test: Clips. sizes: {clips per class: steps}. learning_rate: see arguments. flags: more
    flags of train.py. Returns a table with one row for each run: method, clips, draw, right (bool
    [test clips]). All methods learn the same clips.
    """
    args = {method: arguments(method, learning_rate, *flags) for method in methods}
    labels, runs = start.model.config.num_labels, []
    for size, number, method in tqdm([*itertools.product(sizes, range(draws), methods)], **BAR):
        clips = learn.some(draw(learn.truth, [size] * labels, number))
        model, _ = fit(start, args[method], clips, sizes[size], number)
        right = (predict(model, start, args[method], test) == test.truth).numpy()
        runs.append({"method": method, "clips": size, "draw": number, "right": right})
    return pd.DataFrame(runs)


def expect(start, learn, test, methods, sizes, draws) -> None:
    """Prints how long `curve` takes here, from two steps and a few predictions of each method."""
    total = 0
    for method in methods:
        args, few, times = arguments(method, 1e-9), learn.some(slice(8)), []
        for count in (1, 3):
            begin = time.perf_counter()
            model, _ = fit(start, args, few, count, seed=0)
            times.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        predict(model, start, args, test.some(slice(32)))
        clip = (time.perf_counter() - begin) / min(32, len(test.truth))
        step = max(0, times[1] - times[0]) / 2
        once = times[0] + len(test.truth) * clip
        seconds = draws * (len(sizes) * once + sum(sizes.values()) * step)
        print(f"{method:12} {step:7.3f} s a step, {seconds / 60:6.1f} minutes")
        total += seconds
    print(f"The curve takes about {total / 60:.1f} minutes on this machine ({start.device}).")


# ---- What the runs say --------------------------------------------------------------------------


def interval(right) -> tuple[float, float, float]:
    """(mean, low, high) of bool [draws, test clips], with a 95 % bootstrap interval.

    Both the draws and the test clips are drawn again (Owen, The pigeonhole bootstrap, 2007), so the
    interval says what other training clips and other test clips would give.
    """
    right, dice = np.asarray(right, float), np.random.default_rng(0)
    shares = [dice.multinomial(n, np.full(n, 1 / n), 4000) / n for n in right.shape]
    low, high = np.quantile(np.einsum("rd,dt,rt->r", shares[0], right, shares[1]), (0.025, 0.975))
    return float(right.mean()), float(low), float(high)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Accuracy with its interval of each method and number of clips per class; see interval."""
    rows = []
    for (method, clips), group in runs.groupby(["method", "clips"], sort=False):
        value, low, high = interval(np.stack([*group.right]))
        rows.append({"method": method, "clips": clips, "accuracy": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """The table of summary for reading: a row for each size, "accuracy (low to high)" each cell."""
    cells = [f"{row.accuracy:.2f} ({row.low:.2f} to {row.high:.2f})" for row in table.itertuples()]
    names = {"index": "clips", "columns": "method", "values": "cell"}
    return table.assign(cell=cells).pivot(**names)[[*table.method.unique()]]


def rare_class(start, learn: Clips, test: Clips, counts, draws, steps, learning_rate, flags=()):
    """Recall of each label if training has counts[label] clips of it, with and without weights.

    The method is the linear probe. Returns a table: a row for each value of --class_weights, with
    the mean and the interval (see interval) of each label.
    """
    labels, rows = [*start.model.config.id2label.values()], {}
    for weights in ("none", "balanced"):
        own = [*flags, f"--class_weights={weights}"]
        args, right = arguments("linear probe", learning_rate, *own), []
        for number in tqdm(range(draws), f"class_weights {weights}", **BAR):
            model, _ = fit(
                start, args, learn.some(draw(learn.truth, counts, number)), steps, number
            )
            right.append((predict(model, start, args, test) == test.truth).numpy())
        for label, name in enumerate(labels):
            recall = interval(np.stack(right)[:, test.truth == label])
            rows[weights, name] = (counts[label], *recall)
    table = pd.DataFrame.from_dict(
        rows, "index", columns=["training clips", "recall", "low", "high"]
    )
    table.index = pd.MultiIndex.from_tuples(table.index, names=["--class_weights", "label"])
    return table


# ---- Pictures -----------------------------------------------------------------------------------


def curve_figure(table: pd.DataFrame, chance: float) -> Figure:
    """Accuracy over clips per class: a line with its interval for each method. table: of summary.

    chance: the accuracy of always the most frequent label, as a dashed line.
    """
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis, sizes = figure.subplots(), sorted({*table.clips})
    for number, (method, group) in enumerate(table.groupby("method", sort=False)):
        style = {"color": METHODS[method].colour, "marker": "osD^"[number % 4]}
        axis.plot(group.clips, group.accuracy, label=method, lw=2, **style)
        axis.fill_between(group.clips, group.low, group.high, color=style["color"], alpha=0.12)
    axis.axhline(chance, color="0.4", ls="--", label="always one label")
    axis.set_xscale("log")
    axis.set_xticks(sizes, map(str, sizes))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="training clips per class", ylabel="accuracy, test clips")
    axis.set_ylim(min(chance, table.low.min()) - 0.03, 1.01)
    axis.set_title("How many clips are enough")
    axis.legend(fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.1))  # above the dashed line
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def loss_figure(runs: dict[str, list[float]], classes: int) -> Figure:
    """The training loss over steps, a line for each run; dashed: ln(classes), which is guessing."""
    figure = Figure(figsize=(7.5, 3), layout="constrained")
    axis = figure.subplots()
    colours = (pictures.WRONG, pictures.RIGHT, pictures.TRUE, "#CC79A7")
    for (name, losses), colour in zip(runs.items(), itertools.cycle(colours), strict=False):
        axis.plot(range(1, len(losses) + 1), losses, color=colour, lw=2, label=name)
    guess = f"ln {classes} = {math.log(classes):.2f}: guessing"
    axis.axhline(math.log(classes), color="0.4", ls="--", label=guess)
    axis.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title("Can it learn eight clips by heart?")
    axis.legend(fontsize=9)
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def varied(path: str, zoom: float, mirror: bool, size: int = 112, draws: int = 4) -> Figure:
    """A clip as evaluation sees it, and `draws` times as training sees it, one row each."""
    args = SimpleNamespace(num_frames=16, image_size=size, rate=0, zoom=zoom)
    args.horizontal_flip = mirror
    clips = [train.read_clip(path, 16, size)]
    clips += [train.read_train_clip(path, args, np.random.default_rng(n)) for n in range(draws)]
    names = [f"as training sees it, draw {n + 1}" for n in range(draws)]
    return pictures.strips(clips, ["as evaluation sees it", *names])


def blended(rows, size: int = 112) -> Figure:
    """A clip of each of the first two labels, and both mixed: by mixup, and by cutmix."""
    labels = rows["label"]
    paths = [rows[labels.index(label)]["video"]["path"] for label in (0, 1)]
    pair = torch.stack([train.read_clip(path, 16, size) for path in paths])
    clips, names = [*pair], [rows.features["label"].names[label] for label in (0, 1)]
    for name, alphas in (("mixup", (0.8, 0)), ("cutmix", (0, 1.0))):
        np.random.seed(25)  # train.mixed draws from it: both blends can be seen
        mixed, shares = train.mixed(pair.float(), torch.eye(2), *alphas)
        clips.append(mixed[0].byte())
        names.append(
            f"{name}: {shares[0, 0]:.0%} of the first and {shares[0, 1]:.0%} of the second"
        )
    return pictures.strips(clips, names)
