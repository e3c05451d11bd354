"""How far a trained model can be trusted: what the guide judge_a_model calls."""

import base64
import json
import math
from pathlib import Path

import inference
import numpy as np
import pandas as pd
import torch
import train
from captum.attr import FeatureAblation
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm
from transformers import AutoModelForVideoClassification

from tutorial import pictures, results

GRID = (4, 4, 4)  # blocks of a clip that are hidden: in time, down, across
ORANGE, PURPLE = (240, 140, 0), (110, 50, 170)  # for the label, against it

# ---- Answers of two judges about the same clips -------------------------------------------------


def difference(ours, theirs) -> tuple[float, float, float]:
    """The mean of ours - theirs over clips, with its 95 % bootstrap interval: (value, low, high).

    ours, theirs [clips]: one number for each clip, and the same clips: 1 for right and 0 for wrong,
    or a probability. If the difference is the same for all clips, the interval is NaN.
    """
    apart = np.asarray(ours, float) - np.asarray(theirs, float)
    return results.bootstrap(np.mean, apart)


def same_clips(baselines: pd.DataFrame, hits) -> pd.DataFrame:
    """A table of results.beside_baselines with one more row: all frames, on the clips of `hits`.

    hits [clips]: whether the model is right, of the clips that it saw one frame of. If these are
    all clips, the table stays as it is.
    """
    count, first = len(hits), baselines.iloc[:1]
    if count == first.clips.iloc[0]:
        return baselines
    row = {f"all frames, the same {count} clips": (*results.share(hits.sum(), count), count)}
    return pd.concat([first, results.table(row, "accuracy"), baselines.iloc[1:]])


def judgement(differences: dict[str, tuple]) -> pd.DataFrame:
    """{question: (value, low, high)} as a table: answer, difference, low, high.

    yes: the whole interval is above 0. no, the reverse: it is below 0. not clear: it holds 0, or
    there is none.
    """
    rows = {}
    for question, (value, low, high) in differences.items():
        answer = "yes" if low > 0 else "no, the reverse" if high < 0 else "not clear"
        rows[question] = answer, value, low, high
    return pd.DataFrame.from_dict(
        rows, "index", columns=["answer", "difference", "low", "high"]
    ).rename_axis("question")


def judgement_figure(table: pd.DataFrame) -> Figure:
    """Each difference of a table of `judgement` with its interval, beside the line at 0."""
    figure = Figure(figsize=(9, 0.9 + 0.5 * len(table)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, linestyle="--", color=pictures.GREY)
    for line, (value, low, high) in enumerate(table[["difference", "low", "high"]].to_numpy()):
        axis.plot([low, high], [line, line], color=pictures.RIGHT, lw=3)
        axis.plot(value, line, "o", color=pictures.RIGHT)
    names = [f"{name}\n{answer}" for name, answer in table.answer.items()]
    axis.set_yticks(range(len(table)), names, fontsize=9)
    axis.set(ylim=(len(table) - 0.5, -0.5), xlabel="difference, with its 95 % interval")
    axis.grid(axis="x", color="0.92")
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


def page(here, title: str, table: pd.DataFrame, names) -> Path:
    """Writes judgement.html into the output folder, and returns its path.

    The file holds the table and output/pictures/<name>.png of `names`, so it can be sent alone.
    """
    style = "body {font-family: sans-serif; max-width: 60em; margin: auto} img {max-width: 100%}"
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style>"
    files = [here.output / "pictures" / f"{name}.png" for name in names]
    images = [base64.b64encode(file.read_bytes()).decode() for file in files]
    tags = "".join(f'<p><img src="data:image/png;base64,{image}"></p>' for image in images)
    shown = table.round(3).reset_index().to_html(index=False, border=0)
    file = here.output / "judgement.html"
    file.write_text(f"{head}<h1>{title}</h1>{shown}{tags}\n")
    return file


def save(here, **figures) -> dict:
    """Adds figures to results.json of notebook 4, or begins the file. Tables become dictionaries.

    Returns all figures that the file now holds.
    """
    for name, value in figures.items():
        figures[name] = results.plain(value) if isinstance(value, pd.DataFrame) else value
    figures = results.saved(here) | figures
    (here.output / "results.json").write_text(json.dumps(figures, indent=2))
    return figures


# ---- Several views of a clip, and honest probabilities -------------------------------------------


def views(clips, classifier, parts: int = 3, crops: int = 3) -> torch.Tensor:
    """Log-probabilities of each view: float32 [clips, parts, crops, labels].

    clips: results.Clip. parts: of a clip's time. crops: 1 (the central square) or 3 squares along
    the longer side. The mean over parts and crops is what train.py judges by with --eval_views
    (parts) and --eval_crops: log-probabilities are logits but for a constant.
    """
    how = classifier.num_frames, classifier.image_size, classifier.sampling_rate
    judged = []
    for clip in tqdm(clips, "views", **results.BAR):
        shown = train.read_clip(str(clip.file), *how, parts, crops)
        shown = shown.view(-1, *shown.shape[-4:])  # a single view has no dimension of its own
        judged.append(inference.clip_probabilities(shown, classifier).log())
    return torch.stack(judged).view(len(clips), parts, crops, -1)


def views_table(one, seen, truth) -> pd.DataFrame:
    """Accuracy with one view, with the parts of time of the central square, and with all views.

    one [clips]: whether the answer with one view is right. seen: see views. truth [clips]: numbers
    of labels. Columns: accuracy, low, high, clips; one view is one pass.
    """
    count, parts, crops, _ = seen.shape
    central, every = seen[:, :, crops // 2].mean(1), seen.mean((1, 2))
    hits = {
        "1 view": np.asarray(one),
        f"{parts} parts of time": (central.argmax(-1) == truth).numpy(),
        f"{parts} parts x {crops} squares": (every.argmax(-1) == truth).numpy(),
    }
    rows = {name: (*results.share(right.sum(), count), count) for name, right in hits.items()}
    return results.table(rows, "accuracy")


def calibration(confidence, hits, bins: int = 10) -> pd.DataFrame:
    """Clips in bins of equal width by their confidence: confidence, right, low, high, clips.

    confidence [clips]: the probability of the predicted label. hits [clips]: whether the prediction
    is right. right: the share of right predictions in the bin. Empty bins have no row.
    """
    clips = pd.DataFrame({"confidence": np.asarray(confidence, float), "right": np.asarray(hits)})
    rows = [
        (part.confidence.mean(), *results.share(part.right.sum(), len(part)), len(part))
        for _, part in clips.groupby(
            pd.cut(clips.confidence, np.linspace(0, 1, bins + 1)), observed=True
        )
    ]
    return pd.DataFrame(rows, columns=["confidence", "right", "low", "high", "clips"])


def chance_error(confidence, bins: int = 10, draws: int = 2000) -> tuple[float, float]:
    """The expected calibration error that an honest model gets by chance: (low, high).

    confidence [clips]: the probability of the predicted label. An honest model is right as often as
    its probabilities say; `draws` times, chance says for each clip whether it is. 95 of 100 errors
    lie between low and high.
    """
    sure = np.asarray(confidence, float)
    inside = np.eye(bins)[np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)]
    hits = np.random.default_rng(0).random((draws, len(sure))) < sure
    errors = np.abs((hits - sure) @ inside).sum(1) / len(sure)  # [draws]
    low, high = np.quantile(errors, [0.025, 0.975])
    return float(low), float(high)


def calibration_figure(table: pd.DataFrame, error: float, chance: tuple) -> Figure:
    """The points of a table of `calibration`, the line of honest ones, and the clips in each bin.

    error: the expected calibration error. chance: see chance_error. Both are for the title.
    """
    count = table.clips.sum()
    promised, right = (table[["confidence", "right"]].mul(table.clips, axis=0)).sum() / count
    title = f"{count} clips: mean probability {promised:.2f}, share of right ones {right:.2f}"
    title += f"\nCalibration error {error:.2f}, honest model: {chance[0]:.2f} to {chance[1]:.2f}"
    figure = Figure(figsize=(6, 5), layout="constrained")
    axis, counts = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    axis.plot([0, 1], [0, 1], linestyle="--", color="black", label="honest")
    reach = [table.right - table.low, table.high - table.right]
    style = {"fmt": "o", "capsize": 3, "color": pictures.RIGHT, "label": "clips, 95 % interval"}
    axis.errorbar(table.confidence, table.right, reach, **style)
    axis.set(ylim=(0, 1.05), ylabel="share of right predictions")
    axis.set_title(title, fontsize=11)
    axis.legend(loc="upper left")
    counts.bar(table.confidence, table.clips, width=0.05, color=pictures.GREY)
    counts.set(xlim=(0, 1.02), ylabel="clips", xlabel="probability of the predicted label")
    return figure


# ---- What the model looks at: hide a block, and see what changes ---------------------------------


def passes(clips: int, twice: int = 2, draws: int = 4, grid=GRID) -> int:
    """How often question 5 asks the model: the maps and the two tests.

    clips: with a map and in without_blocks, with its `draws`. twice: clips of ranks.
    """
    one_map = 1 + math.prod(grid)  # the whole clip, then without each block
    return clips * (one_map + 2 + draws) + twice * 2 * one_map


def blocks(shape, grid=GRID) -> torch.Tensor:
    """The number of the block that each pixel lies in: int64 [frames, 1, height, width].

    shape: of a clip, [frames, channels, height, width]. grid: how many blocks in time, down,
    across; they are numbered in this order.
    """
    sizes = shape[0], *shape[-2:]
    parts = [torch.arange(size) * count // size for size, count in zip(sizes, grid, strict=True)]
    time, down, across = torch.meshgrid(*parts, indexing="ij")
    return ((time * grid[1] + down) * grid[2] + across)[:, None]


def mean_colour(pixels: torch.Tensor) -> torch.Tensor:
    """A clip of one colour, the mean of `pixels`: float32 [frames, channels, height, width]."""
    return pixels.mean((0, 2, 3), keepdim=True).expand_as(pixels)


def blurred(pixels: torch.Tensor, grid=GRID) -> torch.Tensor:
    """The clip, each pixel replaced by the mean of a square that is as large as a block."""
    half = pixels.shape[-1] // grid[2] // 2
    return torch.nn.AvgPool2d(2 * half + 1, 1, half, count_include_pad=False)(pixels)


def log_odds(pixels, model, label: int) -> torch.Tensor:
    """The logit of `label` against all other labels together: float32 [clips]."""
    logits = model(pixel_values=pixels).logits.float()
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], 1)
    return logits[:, label] - others.logsumexp(-1)


def occlusion(model, pixels, label: int, filling, grid=GRID) -> torch.Tensor:
    """How far hiding each block of a clip lowers the log-odds of `label`: float32, of shape `grid`.

    pixels, and what is shown in place of a block, filling: float32 [frames, channels, height,
    width]. The method is occlusion (Zeiler and Fergus, 2014, arXiv:1311.2901), done by captum.
    """
    numbers = blocks(pixels.shape, grid).to(pixels.device)
    hide = FeatureAblation(log_odds)
    with torch.no_grad():
        fall = hide.attribute(
            pixels[None],
            baselines=filling[None],
            feature_mask=numbers[None],
            additional_forward_args=(model, label),
            perturbations_per_eval=8,
        )
    flat = torch.zeros(np.prod(grid), device=pixels.device)
    return flat.scatter(0, numbers.flatten(), fall[0, :, :1].flatten().float()).view(grid).cpu()


def saliency(clips, labels, classifier, grid=GRID) -> list[torch.Tensor]:
    """Which blocks of each clip speak for its label: see occlusion. The filling is its mean colour.

    clips: uint8 [frames, channels, height, width] of each. labels: numbers, one for each clip.
    """
    model, maps = classifier.model, []
    for clip, label in tqdm([*zip(clips, labels, strict=True)], "saliency", **results.BAR):
        pixels = train.normalised(clip.to(model.device), classifier.processor)
        maps.append(occlusion(model, pixels, label, mean_colour(pixels), grid))
    return maps


def painted(clip, saliency) -> np.ndarray:
    """The clip in grey below the colours of its saliency: uint8 [frames, height, width, 3].

    Orange speaks for the label, purple against it; the strongest block has the full colour.
    """
    heat = saliency.flatten()[blocks(clip.shape, saliency.shape)][:, 0]
    strength = heat / heat.abs().max().clamp(min=1e-9)
    strength = strength.numpy()[..., None]
    grey = clip.float().mean(1).numpy()[..., None]
    cover = 0.8 * np.abs(strength)
    return (grey * (1 - cover) + np.where(strength > 0, ORANGE, PURPLE) * cover).astype(np.uint8)


def saliency_figure(clips, maps, true, probabilities, labels) -> Figure:
    """Two rows for each clip: its frames, and the same frames below the colours of its saliency.

    clips, maps: see saliency. true, probabilities, labels: see pictures.predictions.
    """
    rows, titles = [], []
    for clip, fall, right, row in zip(clips, maps, true, probabilities, strict=True):
        said = int(row.argmax())
        verdict = "right" if said == right else f"wrong, it is {labels[right]}"
        rows += [clip, painted(clip, fall)]
        titles.append(f"{labels[said]}  {row[said]:.0%}  ({verdict})")
        titles.append(f"orange speaks for {labels[said]}, purple speaks against it")
    return pictures.strips(rows, titles)


def spread(probabilities, truth, label: int, most: int) -> list[int]:
    """Numbers of at most `most` right clips of a label, from the least sure to the surest one.

    Without a right clip of the label, those of all labels; without any, wrong clips.
    """
    wrong, right = results.ranked(probabilities, truth)
    found = [i for i in right if truth[i] == label] or right or wrong
    places = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[place] for place in places]


def hidden(pixels, filling, chosen, grid=GRID) -> torch.Tensor:
    """`pixels` with some blocks, `chosen` by number, replaced by `filling`."""
    inside = torch.isin(blocks(pixels.shape, grid), torch.as_tensor(chosen))
    return torch.where(inside.to(pixels.device), filling, pixels)


def without_blocks(clips, maps, labels, classifier, draws: int = 4) -> pd.DataFrame:
    """The probability of a label when blocks of a clip are hidden: one row for each clip.

    clips: uint8 [frames, channels, height, width] of each. maps: the saliency of each. labels:
    numbers of the labels that the maps are about. Columns: whole; top hidden, without the tenth of
    the blocks that rank highest; random hidden, without a random tenth (the mean of `draws`).
    """
    model, dice, rows = classifier.model, torch.Generator().manual_seed(0), []
    for clip, fall, label in zip(clips, maps, labels, strict=True):
        pixels, count = train.normalised(clip, classifier.processor), fall.numel()
        tenth = max(1, count // 10)
        chosen = [fall.flatten().topk(tenth).indices]
        chosen += [torch.randperm(count, generator=dice)[:tenth] for _ in range(draws)]
        filling = mean_colour(pixels)
        shown = [pixels, *(hidden(pixels, filling, some, fall.shape) for some in chosen)]
        with torch.no_grad():
            logits = model(pixel_values=torch.stack(shown).to(model.device)).logits
        whole, top, *random = logits.float().softmax(-1)[:, label].tolist()
        rows.append((whole, top, np.mean(random)))
    return pd.DataFrame(rows, columns=["whole", "top hidden", "random hidden"])


def ranks(clips, maps, labels, classifier) -> pd.DataFrame:
    """Rank correlation of each map with two others of the same clip: blurred, random weights.

    For `blurred`, the blocks are blurred and not painted in one colour: a sound map changes little.
    For `random weights`, an untrained model is asked: a map of what the model has learned changes
    much (Adebayo et al., 2018, arXiv:1810.03292). clips, maps, labels: see without_blocks.
    """
    model, rows = classifier.model, []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = AutoModelForVideoClassification.from_config(model.config)
    untrained = untrained.to(model.device).eval()
    for clip, ours, label in tqdm([*zip(clips, maps, labels, strict=True)], "ranks", **results.BAR):
        pixels = train.normalised(clip.to(model.device), classifier.processor)
        others = [
            occlusion(model, pixels, label, blurred(pixels, ours.shape), ours.shape),
            occlusion(untrained, pixels, label, mean_colour(pixels), ours.shape),
        ]
        rows.append([stats.spearmanr(ours.flatten(), other.flatten())[0] for other in others])
    return pd.DataFrame(rows, columns=["blurred", "random weights"])
