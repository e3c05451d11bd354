"""Leakage, measured: a model is tested on recordings that it was trained on, and on other ones."""

from itertools import groupby
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import train
from matplotlib.figure import Figure
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from tutorial.pictures import GREY, RIGHT, WRONG

PEOPLE = 6  # of a trial, in training; as many others are only in the test
TRAIN, TEST = 4, 2  # clips of each person
ONE, BOTH = "each person shows one action", "each person shows both actions"
SAME, OTHER = "same people", "other people"


class Clip(NamedTuple):
    """One clip of a trial: whose recording it is cut from, what it shows, where it is used."""

    trial: int
    person: int
    label: int  # 1: raises the hand
    collection: str  # ONE or BOTH
    part: str  # "train", SAME or OTHER


def plan(trials: int) -> list[Clip]:
    """The clips of all trials. Each trial has people of its own, in two collections.

    In the collection ONE, every second person shows one label, and the others show the other label.
    In BOTH, each person shows both, equally often. The number of clips, of people and of clips of
    a label is the same in both collections.
    """
    clips = []
    for trial in range(trials):
        for person in range(2 * PEOPLE):
            parts = ["train"] * TRAIN + [SAME] * TEST if person < PEOPLE else [OTHER] * TEST
            for number, part in enumerate(parts):
                clips.append(Clip(trial, person, person % 2, ONE, part))
                clips.append(Clip(trial, person, number % 2, BOTH, part))
    return clips


def cut(drawn, seed: list[int], labels: list[int], frames: int = 16, side: int = 64) -> np.ndarray:
    """Clips of these labels out of one drawn recording: uint8 [clips, frames, side, side, 3].

    drawn: the module local_mode.clips, which draws as in its draw_long_video: person, room and
    camera stay the same, the actions are others. Only the frames of the clips are drawn. Each clip
    is one action, and no action is in two clips. Raises ValueError if there are too few actions.
    """
    rng = np.random.default_rng(seed)
    person = drawn.appearance(int(rng.integers(2**31)), "drawn", 0)
    scenes = drawn.script(300, rng)
    order, times = rng.permutation(len(scenes)).tolist(), []
    for label in labels:
        of_label = [i for i in order if (scenes[i][0] == drawn.POSITIVE) == label]
        if not of_label:
            raise ValueError(f"the recording has too few actions for the labels {labels}")
        order.remove(of_label[0])
        times.append(np.linspace(*scenes[of_label[0]][1:], frames))
    t = np.concatenate(times)
    movement = drawn.movements(scenes, t, rng)
    t = t / np.mean(drawn.SECONDS)  # in lengths of a clip
    still = False, np.zeros(len(t))  # nobody walks or crouches
    pictures = drawn.draw_scene(
        rng, person, side, side, t, lambda _: movement, 0.5 * np.sin(t), *still
    )
    return np.stack([picture for picture, _ in pictures]).reshape(-1, frames, side, side, 3)


def features(clips: list[Clip], drawn, model_name: str, seed: int = 0) -> np.ndarray:
    """What a frozen model says of each clip: float32 [clips, (blocks + 1) * width].

    clips: see plan; drawn: see cut. The features are the output of the patch embedding and of each
    block, averaged over all places and times.
    """
    model, processor = train.load_model(model_name, ["0", "1"])
    size = model.config.num_frames, model.config.image_size
    recordings = [
        (k, [*part]) for k, part in groupby(clips, lambda clip: (clip.trial, clip.person))
    ]
    found = []
    for (trial, person), part in tqdm(recordings, desc="recordings", mininterval=2):
        videos = cut(drawn, [seed, trial, person], [clip.label for clip in part], *size)
        pixels = train.normalised(torch.from_numpy(videos).permute(0, 1, 4, 2, 3), processor)
        with torch.inference_mode():
            states = model.videomae(pixels, output_hidden_states=True).hidden_states
        found.append(torch.cat([state.mean(1) for state in states], -1).numpy())
    return np.concatenate(found)


def accuracies(clips: list[Clip], found: np.ndarray) -> pd.DataFrame:
    """The accuracy of a linear probe in each trial: rows (collection, trial), columns SAME, OTHER.

    The probe is a logistic regression on standardised features. It learns from the clips of the
    part "train", and is tested on the two other parts.
    """
    table, labels = pd.DataFrame(clips), np.array([clip.label for clip in clips])
    rows = {}
    for key, part in table.groupby(["collection", "trial"], sort=False):
        place = {name: rows_of.index.to_numpy() for name, rows_of in part.groupby("part")}
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        probe.fit(found[place["train"]], labels[place["train"]])
        rows[key] = {n: probe.score(found[place[n]], labels[place[n]]) for n in (SAME, OTHER)}
    return pd.DataFrame.from_dict(rows, "index").rename_axis(["collection", "trial"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over the trials with its 95 % interval, of each accuracy and of the gap between the two.

    table: see accuracies. The interval is Student's t over the trials, whose people are others each
    time; columns: mean, low, high. NaN if there is one trial only.
    """
    table = table.assign(gap=table[SAME] - table[OTHER])
    rows = {}
    for collection, part in table.groupby("collection", sort=False):
        for name in (SAME, OTHER, "gap"):
            half = stats.sem(part[name]) * stats.t.ppf(0.975, len(part) - 1)
            mean = part[name].mean()
            least = -1 if name == "gap" else 0
            low, high = np.clip([mean - half, mean + half], least, 1)
            rows[collection, name] = {"mean": mean, "low": low, "high": high}
    return pd.DataFrame.from_dict(rows, "index").rename_axis(["collection", "tested on"])


def figure(table: pd.DataFrame) -> Figure:
    """Points: the trials. Lines: the means. Left: one action a person. Right: both actions."""
    drawing = Figure(figsize=(8, 3.4), layout="constrained")
    axes = drawing.subplots(1, 2, sharey=True)
    for axis, (collection, part) in zip(axes, table.groupby("collection", sort=False), strict=True):
        for place, (name, colour) in enumerate(((SAME, WRONG), (OTHER, RIGHT))):
            spread = place + np.linspace(-0.12, 0.12, len(part))
            axis.plot(spread, part[name], "o", color=colour, alpha=0.6)
            axis.hlines(part[name].mean(), place - 0.25, place + 0.25, color=colour, lw=3)
            axis.text(place + 0.28, part[name].mean(), f"{part[name].mean():.0%}", va="center")
        axis.axhline(0.5, linestyle=":", color=GREY)
        axis.set(title=collection, xlim=(-0.5, 1.6), ylim=(0, 1.05))
        axis.set_xticks([0, 1], [f"tested on\n{SAME}", f"tested on\n{OTHER}"])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy")
    axes[0].text(1.58, 0.51, "chance", color=GREY, ha="right", va="bottom")
    return drawing
