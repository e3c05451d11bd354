"""The figures of the notebooks. Plain values go in, a matplotlib figure comes out."""

from pathlib import Path
from textwrap import wrap

import av
import numpy as np
from matplotlib.figure import Figure

# Three colours that colour-blind readers can tell apart.
RIGHT, WRONG, TRUE = "#0072B2", "#D55E00", "#009E73"
GREY = "0.4"


def save(here, figure: Figure, name: str) -> Figure:
    """Saves the figure as output/pictures/<name>.png and returns the figure.

    here: an account.Account, or the output folder itself.
    """
    folder = Path(getattr(here, "output", here)) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=80)
    return figure


def read_frames(path, count: int) -> list[tuple[float, np.ndarray]]:
    """`count` evenly spaced frames of a video: (seconds, uint8 [height, width, 3]) of each.

    Decodes the video from start to end, so the frames are right in every format. Fewer if the video
    has fewer frames. Raises ValueError, with the path, if the file cannot be decoded.
    """
    try:
        with av.open(str(path)) as container:
            total = sum(packet.pts is not None for packet in container.demux(video=0))
        wanted = set(((np.arange(count) + 0.5) * total / count).astype(int).tolist())
        with av.open(str(path)) as container:  # again from the start: some formats cannot seek
            frames = enumerate(container.decode(video=0))
            return [(f.time or 0, upright(f)) for i, f in frames if i in wanted]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"cannot decode {path}: {error}") from error


def upright(frame: av.VideoFrame) -> np.ndarray:
    """The pixels of a frame, turned as a player turns them: uint8 [height, width, 3]."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def frames_at(path, seconds) -> list[np.ndarray]:
    """The frame shown at each of `seconds` since the start of a video, uint8 [height, width, 3].

    Jumps to each of them, so a long video costs no more than a short one. ValueError if it cannot.
    """
    found = []
    try:
        with av.open(str(path)) as container:
            start = (container.start_time or 0) / av.time_base
            for second in seconds:
                container.seek(int((start + second) * av.time_base))  # the key frame before it
                for frame in container.decode(video=0):
                    if (frame.time or 0) - start >= second - 0.02:
                        break
                found.append(upright(frame))
    except (av.FFmpegError, IndexError, UnboundLocalError) as error:
        raise ValueError(f"cannot decode {path}: {error}") from error
    return found


def rows_of_frames(rows: list[list], width: float) -> tuple[Figure, np.ndarray]:
    """A figure with a row of axes for each list of frames [height, width, 3], and its axes.

    width: of one frame, in inches. The rows may have frames of different shapes.
    """
    heights = [frames[0].shape[0] / frames[0].shape[1] for frames in rows]
    columns = max(len(frames) for frames in rows)
    size = width * columns, sum(width * height + 0.45 for height in heights)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axis in grid.flat:
        axis.axis("off")
    for axes, frames in zip(grid, rows, strict=True):
        for axis, frame in zip(axes, frames, strict=False):
            axis.imshow(frame)
    return figure, grid


def above(axes, title: str, **style) -> None:
    """A title above a row of axes, from the left; it may be longer than the first one is wide."""
    axes[0].set_title(" ", fontsize=style["fontsize"])  # keeps the height free
    axes[0].set_title(title, loc="left", **style).set_in_layout(False)


def contact_sheet(
    clips, clips_per_label: int = 3, frames_per_clip: int = 6, labels: int = 4, seed: int = 0
) -> Figure:
    """Some clips of each label: one row for each clip, the time of each frame below it.

    clips: rows of one split, as prepare_clips.load_clips returns them. labels: how many labels are
    shown, from the first. The clips are chosen at random, by `seed`. Raises ValueError if there is
    no clip, or a clip cannot be decoded.
    """
    if not len(clips):
        raise ValueError("no clips to show")
    names, rng = clips.features["label"].names, np.random.default_rng(seed)
    numbers, shown = np.array(clips["label"]), []
    for label in sorted({*numbers.tolist()})[:labels]:
        picked = rng.permutation(np.flatnonzero(numbers == label))[:clips_per_label]
        shown += [(names[label], clips[int(i)]["video"]["path"]) for i in picked]
    timed = [read_frames(path, frames_per_clip) for _, path in shown]
    figure, grid = rows_of_frames([[image for _, image in frames] for frames in timed], width=1.7)
    for axes, (label, path), frames in zip(grid, shown, timed, strict=True):
        for axis, (seconds, _) in zip(axes, frames, strict=False):
            axis.text(0.5, -0.03, f"{seconds:.2f} s", ha="center", va="top", fontsize=9,
                      transform=axis.transAxes)  # fmt: skip
        above(axes, label, fontsize=11, fontweight="bold")
        axes[-1].set_title(Path(path).name, loc="right", fontsize=9, color=GREY).set_in_layout(
            False
        )
    return figure


def strips(clips, titles, colours=None, columns: int = 8) -> Figure:
    """One row of `columns` evenly spaced frames for each clip, with a title above the row.

    clips: of each, uint8 [frames, 3, height, width], as train.read_clip returns it, or
    [frames, height, width, 3]. colours: of the titles, black if not given.
    """
    rows = []
    for clip in map(np.asarray, clips):
        clip = clip if clip.shape[-1] == 3 else clip.transpose(0, 2, 3, 1)
        shown = ((np.arange(columns) + 0.5) * len(clip) / columns).astype(int)
        rows.append(clip[np.unique(shown)])
    figure, grid = rows_of_frames(rows, width=9.6 / columns)
    for axes, title, colour in zip(grid, titles, colours or ["black"] * len(rows), strict=True):
        above(axes, title, fontsize=10, color=colour)
    figure.set_layout_engine(None)  # the other would push the frames apart for a long title
    height, room = figure.get_figheight(), 0.3  # inches; room: for a title
    row = height / len(rows) - room - 0.1
    figure.subplots_adjust(0.005, 0.05 / height, 0.995, 1 - room / height, 0.05, room / row)
    return figure


def predictions(clips, true, probabilities, labels) -> Figure:
    """Clips with what the model says of each: blue titles are right, orange titles are wrong.

    clips: see strips. true [clips]: numbers of the right labels. probabilities [clips, labels].
    """
    titles, colours = [], []
    for right, row in zip(true, np.asarray(probabilities), strict=True):
        said = int(row.argmax())
        verdict = "right" if said == right else f"wrong, it is {labels[right]}"
        titles.append(f"{labels[said]}  {row[said]:.0%}  ({verdict})")
        colours.append(RIGHT if said == right else WRONG)
    return strips(clips, titles, colours)


def moments_of_video(path, answer: dict, columns: int = 8) -> Figure:
    """Moments of one video, with the label that the model finds most probable at each of them.

    answer: what inference.classify_video returns for the video at `path`.
    """
    seconds = (np.arange(columns) + 0.5) * answer["duration"] / columns
    figure, (axes,) = rows_of_frames([frames_at(path, seconds)], width=9.6 / columns)
    for axis, second in zip(axes, seconds, strict=True):
        window = int(np.abs(np.array(answer["times"]) - second).argmin())
        row = np.array(answer["smoothed"][window])
        said = "\n".join(wrap(answer["labels"][row.argmax()].replace("_", " "), 14))
        text = f"{second:.1f} s\n{row.max():.0%}\n{said}"
        axis.text(0.5, -0.04, text, ha="center", va="top", fontsize=8, transform=axis.transAxes)
    figure.suptitle(f"{Path(path).name}: the most probable label at {columns} moments", fontsize=10)
    return figure


def moments(paths, choose) -> Figure:
    """When the frames of some clips are shown, and which of them are chosen: a line for each clip.

    choose: takes the frames' times in seconds [total], returns numbers of the chosen ones.
    """
    names = []
    figure = Figure(figsize=(9, 0.6 + 0.55 * len(paths)), layout="constrained")
    axis = figure.subplots()
    for line, path in enumerate(paths):
        with av.open(str(path)) as container:
            times = np.array([frame.time for frame in container.decode(video=0)])
        chosen = times[choose(times)]
        rate = (len(times) - 1) / max(1e-9, np.ptp(times))
        names.append(f"{len(times) / max(1e-9, rate):.1f} s, {rate:.0f} frames a second")
        for moments, colour, size in ((times, "0.75", 12), (chosen, RIGHT, 16)):
            part = 100 * (moments - times[0]) / max(1e-9, np.ptp(times))
            axis.plot(
                part, np.full(len(part), line), "|", color=colour, markersize=size, mew=size / 6
            )
    axis.set_yticks(range(len(names)), names)
    axis.set(ylim=(len(names) - 0.5, -0.5), xlabel="part of the clip (%)")
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


def learning_rates(groups) -> Figure:
    """The learning rate of each part of the model, on a logarithmic axis, the head at the top.

    groups: of the optimiser, as train.parameter_groups makes them.
    """
    rates = sorted({group["lr"] for group in groups}, reverse=True)
    blocks = [f"block {number}" for number in range(len(rates) - 2, 0, -1)]
    labels = ["head", *blocks, "patches"] if len(rates) > 1 else ["all"]
    figure = Figure(figsize=(7, 0.9 + 0.25 * len(rates)), layout="constrained")
    axis = figure.subplots()
    axis.plot(rates, range(len(rates)), "o", color=RIGHT)
    axis.set_yticks(range(len(rates)), labels)
    axis.set(ylim=(len(rates) - 0.5, -0.5), xscale="log", xlim=(rates[-1] / 2, rates[0] * 1.5))
    axis.set(xlabel="learning rate at its peak")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def curves(history: list[dict]) -> Figure:
    """Loss on the left, accuracy of the validation clips on the right, over epochs.

    history: of the Trainer, as in trainer.state.log_history and trainer_state.json.
    """
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, name, label, colour in (
        (left, "loss", "training", "0.6"),
        (left, "eval_loss", "validation", RIGHT),
        (right, "eval_accuracy", "validation", RIGHT),
    ):
        found = [(entry["epoch"], entry[name]) for entry in history if name in entry]
        if found:
            axis.plot(*zip(*found, strict=True), color=colour, label=label, marker="o", ms=3)
    left.set(title="Loss", xlabel="epoch", ylabel="cross-entropy")
    if left.lines:
        left.legend()
    right.set(title="Accuracy", xlabel="epoch", ylabel="share of clips", ylim=(0, 1.02))
    for axis in (left, right):
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def confusion(truth, predicted, labels) -> Figure:
    """How many clips of each label (rows) are called what (columns); off the diagonal: errors.

    truth, predicted [clips]: numbers of labels.
    """
    count = len(labels)
    counts = np.bincount(np.asarray(truth) * count + np.asarray(predicted), minlength=count**2)
    counts = counts.reshape(count, count)
    side = 2.2 + 0.7 * count  # inches
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(counts, cmap="Blues", vmin=0)
    for row, column in np.ndindex(counts.shape):
        dark = counts[row, column] > counts.max() / 2
        axis.text(column, row, counts[row, column], ha="center", va="center", fontsize=12,
                  color="white" if dark else "black")  # fmt: skip
    axis.set_xticks(range(count), labels, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(count), labels)
    right = counts.trace() / max(1, counts.sum())
    axis.set(xlabel="predicted label", ylabel="true label")
    axis.set_title(f"{right:.1%} of {counts.sum()} clips are right")
    return figure


def timeline(path, result: dict, label: str, threshold: float, true=()) -> Figure:
    """Frames of a video, and below them the probability of a label, with bars for what was found.

    result: of inference.classify_video. true: (start, end) in seconds of the true intervals, if
    they are known.
    """
    frames = frames_at(path, (np.arange(10) + 0.5) * result["duration"] / 10)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    top, axis = figure.subplots(2, 1, height_ratios=[1, 2.4])
    top.imshow(np.concatenate(frames, axis=1), aspect="auto")
    top.axis("off")
    column = result["labels"].index(label)
    axis.plot(result["times"], [row[column] for row in result["smoothed"]], color=RIGHT)
    axis.axhline(threshold, linestyle=":", color=GREY)
    axis.text(1.005, threshold, "threshold", va="center", color=GREY,
              transform=axis.get_yaxis_transform())  # fmt: skip
    found = [(i["start"], i["end"]) for i in result["intervals"] if i["label"] == label]
    rows = [("found", found, WRONG), *([("true", true, TRUE)] if len(true) else [])]
    for line, (name, spans, colour) in enumerate(rows):
        low = -0.16 - 0.15 * line
        axis.broken_barh([(start, end - start) for start, end in spans], (low, 0.1), color=colour)
        axis.text(-0.01, low + 0.05, name, color=colour, fontweight="bold", ha="right", va="center",
                  transform=axis.get_yaxis_transform())  # fmt: skip
    axis.set(xlim=(0, result["duration"]), ylim=(-0.35, 1.05), xlabel="time in seconds")
    axis.set(yticks=[0, 0.25, 0.5, 0.75, 1])
    axis.set_ylabel("probability", loc="top")  # above the names of the bars
    axis.set_title(f"When is it {label}?", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def player(path, width: int = 320):
    """A video that plays in the notebook. A file above 3 MB is not put into it: its name is shown.

    Browsers play H.264 in MP4; prepare_clips.py writes this format.
    """
    from IPython.display import Markdown, Video

    if Path(path).stat().st_size > 3e6:
        return Markdown(f"`{path}` is large: open the file in a video player.")
    return Video(str(path), embed=True, width=width)


def overlay(frames, masks, strength: float = 0.6) -> np.ndarray:
    """The frames with a colour over each label but 0: uint8 [frames, height, width, 3].

    frames: uint8 [frames, height, width, 3], or [frames, 3, height, width] as a tensor. masks:
    uint8 [frames, height, width]; 255, which is void, gets no colour. Label 1 is orange, 2 blue.
    """
    frames, masks = np.asarray(frames), np.asarray(masks)
    frames = frames if frames.shape[-1] == 3 else frames.transpose(0, 2, 3, 1)
    colours = np.random.default_rng(1).integers(60, 230, (256, 3))  # of more labels than four
    colours[1:5] = (230, 159, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167)  # for any eyes
    share = np.where((masks > 0) & (masks != 255), strength, 0)[..., None]
    return (frames * (1 - share) + colours[masks] * share).astype(np.uint8)


def iou_curves(history: list[dict]) -> Figure:
    """The IoU of the labels, and its mean, on the validation clips, over epochs.

    history: of the Trainer. Labels after the eighth are left out.
    """
    entries = [entry for entry in history if "eval_miou" in entry]
    names = [name for name in entries[-1] if name.startswith(("eval_miou", "eval_iou_"))][:9]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    colours = ["0.6", "#E69F00", RIGHT, TRUE, "#CC79A7", WRONG, "#56B4E9", "#F0E442"]
    for name in names:  # the labels' colours are those of overlay
        label = name.removeprefix("eval_").replace("iou_", "IoU ").replace("miou", "mIoU")
        points = [(entry["epoch"], entry.get(name, np.nan)) for entry in entries]
        mean = name == "eval_miou"
        line = {"color": "black" if mean else colours.pop(0), "lw": 2.5 if mean else 1.3}
        axis.plot(*zip(*points, strict=True), marker="o", ms=3, label=label, **line)
    axis.set(xlabel="epoch", ylabel="IoU, validation clips", ylim=(0, 1.02))
    axis.set_title("Learning the labels")
    axis.legend(fontsize=8)
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def padded(clips) -> np.ndarray:
    """Clips of several sizes one after the other, with black margins: uint8 [frames, h, w, 3].

    clips: of each, uint8 [frames, height, width, 3]. The size is even, as H.264 needs it.
    """
    height, width = (max(clip.shape[i] + clip.shape[i] % 2 for clip in clips) for i in (1, 2))
    film = []
    for clip in clips:
        down, right = height - clip.shape[1], width - clip.shape[2]
        margins = (0, 0), (down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0)
        film.append(np.pad(clip, margins))
    return np.concatenate(film)
