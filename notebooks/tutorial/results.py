"""A trained model, its test clips, and how good it is: what notebook 4 and its guides call."""

import json
import math
import shutil
import statistics
import tarfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import av
import inference
import numpy as np
import pandas as pd
import prepare_clips
import torch
import train
from botocore.exceptions import ClientError
from scipy import stats
from tqdm import tqdm

BAR = {"mininterval": 2}  # seconds between two steps of a progress bar: short pages

# ---- The model, and the clips that it is tested on ----------------------------------------------


class Trained(NamedTuple):
    """Where a trained model lies, and the job that made it."""

    folder: Path  # holds config.json, model.safetensors, trainer_state.json, run_record.json
    job: dict | None  # the answer of describe_training_job; None: trained on this machine


class Clip(NamedTuple):
    """A clip on this machine."""

    file: Path
    label: int  # number of its label in the model's list


def split_uri(uri: str) -> tuple[str, str]:
    """s3://bucket/key -> (bucket, key)."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def fetch(here, job_name: str | None = None, model_dir=None) -> Trained:
    """The model of a finished training job, or the one in `model_dir`, and a list of its files.

    job_name: None is the job that run.json names. The model is unpacked to <output>/model.
    model_dir: a folder that train.py has written; then nothing is asked of AWS. Raises RuntimeError
    or ValueError, with what to do, if there is no finished model.
    """
    if model_dir:
        trained = Trained(Path(model_dir).resolve(), None)
        check_folder(trained.folder, model_dir)
    else:
        job = describe(here, job_name or here.run.get("training_job_name"))
        trained = Trained(here.output / "model", job)
        archive = here.output / "model.tar.gz"
        where = split_uri(job["ModelArtifacts"]["S3ModelArtifacts"])
        here.session.client("s3").download_file(*where, str(archive))
        of_job = here.output / "model_of_job.txt"
        if trained.folder.exists() and not of_job.exists():
            raise RuntimeError(
                f"{trained.folder} holds a model that no job of notebook 3 left. To look at that "
                "model, set model_dir to this folder; else move the folder away."
            )
        of_job.write_text(job["TrainingJobName"])
        shutil.rmtree(trained.folder, ignore_errors=True)  # of an earlier job
        with tarfile.open(archive) as tar:  # the filter refuses links and paths out of the folder
            tar.extractall(trained.folder, filter="data")
    for path in sorted(trained.folder.iterdir()):
        print(f"{path.name:28} {path.stat().st_size / 1e6:8.2f} MB")
    return trained


def check_folder(folder: Path, named) -> None:
    """Raises ValueError, with what to do, if no model of train.py lies in the folder."""
    config = folder / "config.json"
    kinds = json.loads(config.read_text()).get("architectures") if config.is_file() else None
    if kinds != ["VideoMAEForVideoClassification"] or not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model_dir {named}: no trained classifier there. Name the folder that train.py wrote: "
            "its flag --model_dir; without the flag, outputs/model."
        )


def describe(here, job_name: str | None) -> dict:
    """What SageMaker says of a job that has finished. Raises RuntimeError if there is none."""
    if not job_name:
        raise RuntimeError(
            "run.json has no training_job_name: run 03_remote_launch.ipynb first, "
            "or set model_dir to a folder that train.py wrote."
        )
    try:
        job = here.session.client("sagemaker").describe_training_job(TrainingJobName=job_name)
    except ClientError as error:
        if "not found" not in str(error):
            raise
        raise RuntimeError(
            f"There is no job {job_name} in {here.run['region']}: see the list of jobs in the "
            "console, or run 03_remote_launch.ipynb."
        ) from error
    print(job_name, job["TrainingJobStatus"])
    if job["TrainingJobStatus"] != "Completed":
        reason = job.get("FailureReason", "no finished model: see the job in notebook 3")
        raise RuntimeError(
            f"{reason}\nThe job {job_name} is {job['TrainingJobStatus']}. 03_remote_launch.ipynb "
            "shows its log, and what helps when it fails. To clean up all the same, run "
            "06_clean_up.ipynb."
        )
    return job


def clips_of(here, trained: Trained, split: str) -> list[tuple[str, str]]:
    """(place, label) of each clip of a split: s3://... of the job's data, or a path.

    Clips of a job in another layout than <split>/<label>/ are read from the folder that was
    uploaded. Raises RuntimeError, with what to do, if there are none.
    """
    folder = here.run.get("dataset")
    if trained.job:
        channels = {c["ChannelName"]: c["DataSource"] for c in trained.job["InputDataConfig"]}
        uri = channels["train"]["S3DataSource"]["S3Uri"].rstrip("/")
        bucket, prefix = split_uri(f"{uri}/{split}/")
        pages = here.session.client("s3").get_paginator("list_objects_v2")
        keys = [
            entry["Key"].removeprefix(prefix)
            for page in pages.paginate(Bucket=bucket, Prefix=prefix)
            for entry in page.get("Contents", [])
            if entry["Key"].lower().endswith(prepare_clips.FORMATS)
            and "/." not in f"/{entry['Key'].removeprefix(prefix)}"
        ]
        if keys and all("/" in key for key in keys):
            return [(f"{uri}/{split}/{key}", key.split("/")[0]) for key in keys]
        sources = here.run.get("uploads", {}).items()
        folder = next((f for f, entry in sources if entry["uri"].rstrip("/") == uri), None)
        missing = f"{uri}/{split}/<label>/"
    else:
        record = run_record(trained).get("arguments", {})
        own = record.get("dataset") or ""
        folder = own if Path(own).is_dir() and own else folder
        missing = f"{folder}/{split}/<label>/"
    if not folder or not Path(folder).is_dir():
        raise RuntimeError(
            f"No clips in {missing}. The data set needs test clips; or judge other ones: "
            'results.test_clips(..., split="validation").'
        )
    rows = train.load_clips(str(folder))
    if split not in rows:
        raise RuntimeError(
            f"No clips in {missing}; the data set has {', '.join(rows)}. Add test clips, or judge "
            'other ones: results.test_clips(..., split="validation").'
        )
    names = rows[split].features["label"].names
    return [(row["video"]["path"], names[row["label"]]) for row in rows[split]]


def run_record(trained: Trained) -> dict:
    """What train.py wrote down of its run: arguments, versions, clips. {} if it did not."""
    file = trained.folder / "run_record.json"
    return json.loads(file.read_text()) if file.exists() else {}


def test_clips(here, trained: Trained, labels, split: str = "test", most: int | None = None):
    """The clips of a split, with their labels: a list of Clip. Those of a job come from S3.

    most: at most so many, chosen at random. Raises ValueError for labels that the model has not.
    """
    named = clips_of(here, trained, split)
    if unknown := sorted({label for _, label in named} - {*labels}):
        raise ValueError(f"{split}/ has clips of {unknown}; the model knows {list(labels)}: "
                         "rename or remove these folders, or take another model")  # fmt: skip
    if most and len(named) > most:
        print(f"{most} of the {len(named)} clips in {split}/, chosen at random")
        chosen = np.random.default_rng(0).choice(len(named), most, replace=False)
        named = [named[i] for i in sorted(chosen)]
    clips = []
    for place, label in tqdm(named, "clips", **BAR):
        if place.startswith("s3://"):
            bucket, key = split_uri(place)
            place = here.output / "judged" / label / place.partition(f"/{split}/{label}/")[2]
            place.parent.mkdir(parents=True, exist_ok=True)
            here.session.client("s3").download_file(bucket, key, str(place))
        clips.append(Clip(Path(place), labels.index(label)))
    return clips


def choose_label(label: str | None, labels: list[str]) -> str:
    """`label`, or raising_hand, or the last label. Raises ValueError if the model lacks `label`."""
    if label is None:
        return "raising_hand" if "raising_hand" in labels else labels[-1]
    if label not in labels:
        raise ValueError(f"label: the model has no {label!r}, it has {labels}")
    return label


def majority(here, trained: Trained) -> str:
    """The most frequent label of the training clips."""
    return Counter(label for _, label in clips_of(here, trained, "train")).most_common(1)[0][0]


def clip_seconds(clips: list[Clip], most: int = 50) -> float:
    """The median length of the clips in seconds, of at most `most` of them."""
    lengths = []
    for clip in clips[:: math.ceil(len(clips) / most)]:
        with av.open(str(clip.file)) as container:
            if container.duration:
                lengths.append(container.duration / av.time_base)
    return round(statistics.median(lengths), 1) if lengths else 2.5


# ---- Predictions --------------------------------------------------------------------------------


def expect(classifier, **passes) -> None:
    """Prints how long each piece of work takes here; the time of one pass is measured.

    passes: name=how often a clip goes through the model.
    """
    size, count, times = classifier.image_size, classifier.num_frames, []
    clips = torch.zeros(2, count, 3, size, size, dtype=torch.uint8)
    for _ in range(3):  # the first time takes longer
        start = time.perf_counter()
        inference.clip_probabilities(clips, classifier)
        times.append((time.perf_counter() - start) / len(clips))
    seconds = min(times)
    print(f"One pass takes {seconds:.2g} s on this machine ({classifier.model.device.type}).")
    for name, number in passes.items():
        minutes = number * seconds / 60
        print(f"{name.replace('_', ' '):20} {number:5} passes, {minutes:5.1f} minutes")


def read(clips: list[Clip], classifier) -> torch.Tensor:
    """The frames of the clips, chosen as in evaluation: uint8 [clips, frames, 3, height, width]."""
    how = classifier.num_frames, classifier.image_size, classifier.sampling_rate
    return torch.stack(
        [train.read_clip(str(clip.file), *how) for clip in tqdm(clips, "read", **BAR)]
    )


def predict(pixels: torch.Tensor, classifier, what: str = "predict") -> torch.Tensor:
    """uint8 [clips, frames, 3, height, width] -> float32 [clips, labels], probabilities."""
    judged = []
    with tqdm(total=len(pixels), desc=what, **BAR) as bar:
        for part in pixels.split(8):
            judged.append(inference.clip_probabilities(part, classifier))
            bar.update(len(part))
    return torch.cat(judged)


def one_frame(pixels, truth, classifier, most: int = 24) -> dict[int, np.ndarray]:
    """Which clips are right if the model sees one frame only, repeated: {frame: bool [clips]}.

    The frames are the first, the middle and the last one. `most`: see sample.
    """
    some = sample(truth, most)
    hits = {}
    for frame in (0, classifier.num_frames // 2, classifier.num_frames - 1):
        still = pixels[some][:, frame : frame + 1].expand(-1, classifier.num_frames, -1, -1, -1)
        answers = predict(still, classifier, f"frame {frame} only").argmax(-1)
        hits[frame] = (answers == truth[some]).numpy()
    return hits


def sample(truth, most: int) -> torch.Tensor:
    """Numbers of at most `most` clips, chosen at random, of each label its share. Always the same.

    truth [clips]: numbers of labels.
    """
    dice = torch.Generator().manual_seed(0)
    order = torch.randperm(len(truth), generator=dice)
    if most < len(truth):
        order = order[truth[order].argsort(stable=True)]  # label by label
        evenly = ((torch.arange(most) + 0.5) * len(truth) / most).long()
        order = order[evenly][torch.randperm(most, generator=dice)]
    return order


def ranked(probabilities, truth) -> tuple[list[int], list[int]]:
    """(wrong, right): numbers of the clips. The less probable the true label, the earlier."""
    order = probabilities[torch.arange(len(truth)), truth].argsort().tolist()
    wrong = (probabilities.argmax(-1) != truth).tolist()
    return [i for i in order if wrong[i]], [i for i in order if not wrong[i]]


def choose_threshold(probabilities, truth, label: int, more_false: float = 0.02) -> float:
    """The probability that at most `more_false` of the clips with other labels exceed, and >= 0.5.

    probabilities [clips, labels], truth [clips]; label: number of the label that is looked for.
    """
    others = np.asarray(probabilities)[np.asarray(truth) != label, label]
    if not len(others):
        return 0.5
    return max(0.5, math.ceil(100 * np.quantile(others, 1 - more_false)) / 100)


def judge(here, job_name=None, model_dir=None, split="test", most=None) -> SimpleNamespace:
    """All of the above at once, for the guides.

    Returns trained, classifier, clips, pixels, truth, probabilities, predicted.
    """
    trained = fetch(here, job_name, model_dir)
    classifier = inference.load_classifier(trained.folder)
    clips = test_clips(here, trained, classifier.labels, split, most)
    pixels = read(clips, classifier)
    probabilities = predict(pixels, classifier)
    return SimpleNamespace(
        trained=trained, classifier=classifier, clips=clips, pixels=pixels,
        truth=torch.tensor([clip.label for clip in clips]),
        probabilities=probabilities, predicted=probabilities.argmax(-1),
    )  # fmt: skip


# ---- Figures, with their intervals --------------------------------------------------------------


def share(hits, total) -> tuple[float, float, float]:
    """hits / total with Wilson's 95 % interval: (value, low, high), each NaN if total is 0."""
    if not total:
        return (math.nan,) * 3
    hits, total = int(hits), int(total)
    return hits / total, *stats.binomtest(hits, total).proportion_ci(method="wilson")


def bootstrap(statistic, *data) -> tuple[float, float, float]:
    """statistic(*data, axis) with its 95 % percentile interval: (value, low, high).

    `data` are arrays with one number for each clip; of one clip there is no interval: NaN.
    """
    value = float(statistic(*data, axis=-1))
    if len(data[0]) < 2:
        return value, math.nan, math.nan
    how = {"paired": True, "method": "percentile", "n_resamples": 2000, "rng": 0}
    low, high = stats.bootstrap(data, statistic, vectorized=True, **how).confidence_interval
    return (value, low, high) if low < high else (value, math.nan, math.nan)


def macro_f1(true, pred, classes, axis=-1):
    """Macro F1 along `axis`, for many samples of clips at once: the mean over the classes in it.

    true, pred: numbers of classes. classes: all that occur, as scikit-learn takes them.
    """
    pairs = [(true == c, pred == c) for c in classes]
    sizes = [t.sum(axis) + p.sum(axis) for t, p in pairs]
    each = [
        2 * (t & p).sum(axis) / np.maximum(1, n) for (t, p), n in zip(pairs, sizes, strict=True)
    ]
    return np.nanmean(np.where(np.array(sizes) > 0, each, np.nan), axis=0)


def scores(truth, predicted, labels) -> pd.DataFrame:
    """Accuracy, macro F1, recall and precision of each label: value, low, high, clips.

    truth, predicted [clips]: numbers of labels. A label without clips has no recall: NaN.
    """
    true, pred = np.asarray(truth), np.asarray(predicted)
    f1 = partial(macro_f1, classes=np.union1d(true, pred))
    rows = {"accuracy": (*share((true == pred).sum(), len(true)), len(true))}
    rows["macro F1"] = (*bootstrap(f1, true, pred), len(true))
    for number, label in enumerate(labels):
        hits = ((true == number) & (pred == number)).sum()
        rows[f"{label}: recall"] = (*share(hits, (true == number).sum()), (true == number).sum())
        rows[f"{label}: precision"] = (*share(hits, (pred == number).sum()), (pred == number).sum())
    return table(rows)


def beside_baselines(truth, predicted, stills, labels, always: str) -> pd.DataFrame:
    """Accuracy of the model, of its best single frame and of one label for all clips.

    stills: see one_frame. always: this label. Columns: accuracy, low, high, clips.
    """
    true, pred = np.asarray(truth), np.asarray(predicted)
    best = max(stills, key=lambda frame: stills[frame].mean())
    rows = {
        "all frames": true == pred,
        f"one frame only, number {best}": stills[best],
        f"always {always}": true == labels.index(always),
    }
    rows = {name: (*share(hits.sum(), len(hits)), len(hits)) for name, hits in rows.items()}
    return table(rows, "accuracy")


def table(rows: dict, first: str = "value") -> pd.DataFrame:
    """{row: (value, low, high, clips)} as a table."""
    return pd.DataFrame.from_dict(rows, "index", columns=[first, "low", "high", "clips"])


def saved(here) -> dict:
    """What save wrote, or {}: the guides run without notebook 4 too."""
    file = here.output / "results.json"
    return json.loads(file.read_text()) if file.exists() else {}


def plain(some: pd.DataFrame) -> dict:
    """A table as {row: {column: number}}, with None for what could not be measured."""
    return json.loads(some.to_json(orient="index"))


def save(here, truth, predicted, labels, baselines: pd.DataFrame, **more) -> dict:
    """Writes results.json into the output folder: accuracy, macro F1, scores, baselines, `more`."""
    each = scores(truth, predicted, labels)
    figures = {
        "accuracy": float(each.value["accuracy"]),
        "best_single_frame": float(baselines.accuracy.iloc[1]),
        "clips": len(truth),
        "macro_f1": float(each.value["macro F1"]),
        "scores": plain(each),
        "baselines": plain(baselines),
    } | more
    (here.output / "results.json").write_text(json.dumps(figures, indent=2))
    return figures


# ---- Intervals in a long video ------------------------------------------------------------------


def overlap(one, other) -> float:
    """Intersection over union of two intervals (start, end)."""
    shared = min(one[1], other[1]) - max(one[0], other[0])
    return max(0, shared) / (max(one[1], other[1]) - min(one[0], other[0]))


def right_intervals(found, true_intervals, least: float = 0.5) -> int:
    """How many of the found intervals match a true one: one to one, the best score first.

    found: dicts of start, end (seconds) and score. least: the overlap that is enough.
    """
    free = list(true_intervals)
    for interval in sorted(found, key=lambda interval: -interval["score"]):
        span = interval["start"], interval["end"]
        best = max(free, key=lambda other: overlap(span, other), default=None)
        if best and overlap(span, best) >= least:
            free.remove(best)
    return len(true_intervals) - len(free)
