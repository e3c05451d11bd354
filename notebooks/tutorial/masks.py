"""Videos with a label for each pixel: what notebook 5 counts, fetches and compares."""

import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sagemaker.core.training.configs import MetricDefinition
from torch.utils.flop_counter import FlopCounterMode

from tutorial import account, launch, results

sys.path.insert(0, str(account.HERE.parent / "scripts"))
from segmentation_data import Video, Videos, read_frame, read_mask

# Where SageMaker finds metrics in the log of train_segmentation.py.
METRICS = [
    *launch.METRICS,
    MetricDefinition(name="eval:miou", regex=r"'eval_miou': '?([0-9.e+-]+)"),
    MetricDefinition(name="test:miou", regex=r"'test_miou': '?([0-9.e+-]+)"),
]


def encoder(here, model_name=None) -> str:
    """`model_name`, or the model that notebook 2 chose. Raises RuntimeError if there is none."""
    found = model_name or (here.run.get("choices") or {}).get("model_name")
    if not found:
        raise RuntimeError(
            "run.json has no model: run 02_local_smoke_train.ipynb, or set model_name"
        )
    return found


# ---- Look at the videos --------------------------------------------------------------------------


def shares(videos: Videos, most: int = 40) -> pd.DataFrame:
    """The share of the pixels that each label has, in a few masks of `most` training videos."""
    count = len(videos.labels)
    pixels = np.zeros(count + 1)
    for video in videos.splits["train"][:most]:
        for path in video.masks[:: max(1, len(video.masks) // 4)]:
            mask = np.minimum(read_mask(path, count, videos.meaning), count)  # void comes last
            pixels += np.bincount(mask.ravel(), minlength=count + 1)
    table = pd.Series(pixels / pixels.sum(), [*videos.labels, "void"], name="share of the pixels")
    return table.sort_values(ascending=False).head(10).map("{:.2%}".format).to_frame()


def read(videos: Videos, video: Video) -> tuple[np.ndarray, np.ndarray]:
    """All frames uint8 [frames, height, width, 3] and masks uint8 [frames, height, width]."""
    frames = [read_frame(path).permute(1, 2, 0).numpy() for path in video.frames]
    masks = [read_mask(path, len(videos.labels), videos.meaning) for path in video.masks]
    return np.stack(frames), np.stack(masks)


def examples(videos: Videos, split: str) -> list[Video]:
    """Three videos of a split: with most of the last label in the last frame, with some, with none.

    Only the first 40 videos are looked at.
    """

    def last_label(video):
        mask = read_mask(video.masks[-1], len(videos.labels), videos.meaning)
        return (mask == len(videos.labels) - 1).sum()

    ordered = sorted(videos.splits[split][:40], key=last_label)
    return [ordered[-1], ordered[-(len(ordered) // 4 or 1)], ordered[0]]


# ---- Before the job ------------------------------------------------------------------------------


def gflop(model, clip_length: int, size: int) -> float:
    """Billions of operations of one forward pass of one clip: counted, nothing is computed."""
    with torch.device("meta"):
        clip = torch.empty(1, clip_length, 3, size, size)
        shape = type(model)(model.config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shape(pixel_values=clip)
    return counter.get_total_flops() / 1e9


def expected_minutes(model, videos: Videos, flags: dict, instance_type: str) -> float | None:
    """Minutes of a job of train_segmentation.py, its start included; None for an unknown instance.

    flags: of the script; what is missing has the script's default. To train on a clip takes the
    work of 3 forward passes, or about 1 if the encoder is frozen. Whole videos are judged in
    windows and squares that overlap by half, so each pixel goes through the model four times.
    """
    config = model.config
    length = flags.get("clip_length") or config.num_frames
    size = flags.get("crop_size") or config.image_size
    rate = account.clips_per_second(instance_type, gflop(model, length, size))
    if not rate:
        return None
    counts = {split: len(part) for split, part in videos.splits.items()}
    judged = videos.splits[judged_split(videos)]
    work = 1 if flags.get("freeze") == "backbone" else 3
    passes = work * counts["train"] * flags.get("clips_per_video", 4) + counts["validation"]
    passes = float(flags.get("epochs", 10)) * passes
    passes += 4 * sum(len(video.frames) for video in judged) / length
    return launch.START_MINUTES + passes / rate / 60


def judged_split(videos: Videos) -> str:
    """The split whose whole videos the job judges: test, or validation where test has no masks."""
    return "test" if "test" in videos.splits else "validation"


# ---- After the job -------------------------------------------------------------------------------


def fetch(here, job: str) -> Path:
    """Unpacks what a finished job has left in S3 to <output>/segmentation, and returns the folder.

    model/: for from_pretrained, and trainer_state.json. output/: metrics.json, and in results/ the
    masks of the judged videos. Raises RuntimeError if the job has not finished.
    """
    address = results.describe(here, job)["ModelArtifacts"]["S3ModelArtifacts"]
    folder = here.output / "segmentation"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier job
    folder.mkdir()
    for name in ("model", "output"):
        bucket, key = results.split_uri(address)
        key = key.replace("model.tar.gz", f"{name}.tar.gz")
        archive = folder / f"{name}.tar.gz"
        here.session.client("s3").download_file(bucket, key, str(archive))
        with tarfile.open(archive) as tar:  # the filter refuses links and paths out of the folder
            tar.extractall(folder / name, filter="data")
    return folder


def metrics(here, folder: Path) -> dict[str, float]:
    """The metrics of the job in `folder`; also written to <output>/segmentation.json."""
    (file,) = folder.glob("output/**/metrics.json")
    (here.output / "segmentation.json").write_text(file.read_text())
    return json.loads(file.read_text())


def table(found: dict[str, float], split: str) -> pd.DataFrame:
    """The metrics of whole videos of `split`, and beside them those of the validation clips."""
    names = [name.removeprefix(f"{split}_") for name in found if name.startswith(f"{split}_")]
    rows = {name: (found[f"{split}_{name}"], found.get(f"eval_{name}")) for name in names}
    columns = [f"whole {split} videos", "validation clips"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns).head(30).astype(float).round(3)


def history(folder: Path) -> list[dict]:
    """What Trainer logged, as in trainer.state.log_history."""
    return json.loads((folder / "model" / "trainer_state.json").read_text())["log_history"]


def predicted(folder: Path, video: Video) -> np.ndarray:
    """The masks that the job has made of a video, uint8 [frames, height, width]."""
    (place,) = folder.glob("output/**/results")
    files = [place / video.name / f"{Path(path).stem}.png" for path in video.frames]
    return np.stack([np.array(Image.open(file)) for file in files])
