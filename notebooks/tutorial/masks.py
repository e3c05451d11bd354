"""Videos with a label for each pixel: what notebook 5 counts, fetches and compares.

Notebook 5 writes scripts/train_segmentation.py, so only functions of the guide import it.
"""

import json
import shutil
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sagemaker.core.training.configs import MetricDefinition
from segmentation_data import (
    Video,
    Videos,
    load_videos,
    mask_problem,
    read_frame,
    read_frames,
    read_mask,
)
from torch.utils.flop_counter import FlopCounterMode

from tutorial import account, launch, results

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
    pixels = _pixels(videos, most)
    table = (pixels / pixels.sum()).rename("share of the pixels")
    return table.sort_values(ascending=False).head(10).map("{:.2%}".format).to_frame()


def rarest(videos: Videos, most: int = 40) -> str:
    """The label with the fewest pixels, but some, in a few masks of `most` training videos."""
    pixels = _pixels(videos, most)[videos.labels]
    return pixels[pixels > 0].idxmin()


def _pixels(videos: Videos, most: int) -> pd.Series:
    """The number of pixels by label; void comes last."""
    count = len(videos.labels)
    pixels = np.zeros(count + 1)
    for video in videos.splits["train"][:most]:
        for path in video.masks[:: max(1, len(video.masks) // 4)]:
            mask = np.minimum(read_mask(path, count, videos.meaning), count)
            pixels += np.bincount(mask.ravel(), minlength=count + 1)
    return pd.Series(pixels, [*videos.labels, "void"])


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


# ---- On this computer: the guide -----------------------------------------------------------------


def problems(videos: Videos, frame, folder) -> pd.Series:
    """What the script says of each mask in `folder`, as masks of the picture `frame`; by file name.

    A mask without a problem has an empty text.
    """
    meaning = {"num_labels": len(videos.labels), "meaning": videos.meaning}
    found = {}
    for path in sorted(Path(folder).glob("*.png")):
        problem, _ = mask_problem(str(frame), str(path), **meaning)
        found[path.name] = (problem or "").replace(f"{folder}/", "")
    return pd.Series(found, name="what is wrong", dtype=object)


def short_run(videos: str, model_name: str, flags: dict, folder) -> SimpleNamespace:
    """Trains on this computer, as train_segmentation.py does; saves nothing.

    flags: of the script, such as {"loss": "ce", "max_steps": 80}. Returns model (in evaluation
    mode), processor and iou: a DataFrame with the IoU of each label on the validation clips, by
    training step. Five evaluations, the last one at the end. Raises ValueError for a wrong flag.
    """
    import train_segmentation as seg

    own = {"dataset": videos, "model_name": model_name, "output_dir": folder}
    own |= {"lr_scheduler_type": "constant_with_warmup"}  # else a longer run begins otherwise
    own |= {"save_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": False}
    own |= {"eval_strategy": "steps", "eval_steps": max(1, flags["max_steps"] // 5)}
    words = [text for name, value in (own | flags).items() for text in (f"--{name}", str(value))]
    args = seg.train.parse_arguments(words, seg.Arguments)
    data = load_videos(videos)
    seg.set_seed(args.seed)  # the same decoder, and the same clips in the same order, in each run
    model, processor = seg.make_model(args, data.labels)
    trainer = seg.make_trainer(args, data, model, processor)
    trainer.train()
    rows = {entry["step"]: entry for entry in trainer.state.log_history if "eval_miou" in entry}
    iou = (
        pd.DataFrame(rows)
        .T.filter(like="eval_iou_")
        .rename(columns=lambda n: n[len("eval_iou_") :])
    )
    return SimpleNamespace(model=trainer.model.eval(), processor=processor, iou=iou)


def of_job(here) -> SimpleNamespace:
    """What `fetch` brought of the job: model (in evaluation mode), processor and folder.

    Raises RuntimeError, with the notebook to run, if nothing was fetched.
    """
    import train_segmentation as seg

    folder = here.output / "segmentation"
    if not (folder / "model" / "config.json").is_file():
        raise RuntimeError(f"{folder} has no model: run 05_video_segmentation.ipynb to its end")
    model = seg.VideoMAEForVideoSegmentation.from_pretrained(folder / "model").eval()
    processor = seg.train.clip_processor(folder / "model", model.config.image_size)
    return SimpleNamespace(model=model, processor=processor, folder=folder)


def frames_in(folder) -> Video:
    """The JPEG frames in a folder, in the order of their names, as a video without masks.

    Raises FileNotFoundError if there are none.
    """
    folder = Path(folder)
    frames = sorted(str(path) for path in folder.glob("*.jpg"))
    if not frames:
        raise FileNotFoundError(f"{folder}: no *.jpg; make frames with ffmpeg, as in section 1")
    return Video(folder.name, frames, [])


def segmented(trained, video: Video) -> np.ndarray:
    """The masks that a model makes of a whole video, uint8 [frames, height, width].

    trained: of short_run or of_job. It computes on a GPU if there is one.
    """
    from train_segmentation import segment_video

    model = trained.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return np.stack(list(segment_video(model, read_frames(video), trained.processor)))


def iou(videos: Videos, judged: list[Video], found: list[np.ndarray]) -> dict[str, float]:
    """The IoU of each label, and their mean as "miou", over whole videos.

    found: of each video of `judged`, the masks uint8 [frames, height, width].
    """
    import train_segmentation as seg

    metric = seg.pixel_metric(len(videos.labels))
    for video, ours in zip(judged, found, strict=True):
        metric.update(*(torch.from_numpy(part).long() for part in (ours, read(videos, video)[1])))
    scores = seg.pixel_scores(metric, videos.labels)
    kept = {name: value for name, value in scores.items() if name.startswith(("miou", "iou_"))}
    return {name.removeprefix("iou_"): value for name, value in kept.items()}


def step_cost(config, side: int, checkpointing=False, frozen=False, bf16=False) -> dict:
    """What a training step on one clip takes: {"clips/s": ..., "MB kept": ...}.

    config: of a VideoMAEForVideoSegmentation; side: of the square, in pixels. "MB kept" is what
    torch keeps for the backward pass, weights included: on a GPU, most of the memory of a step.
    checkpointing: --activation_checkpointing; frozen: --freeze backbone; bf16: --precision bf16.
    The speed is that of the fastest of three steps.
    """
    import train_segmentation as seg

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = seg.VideoMAEForVideoSegmentation(config).to(device).train()
    seg.train.trainable(net, "backbone" if frozen else "none")
    if checkpointing:
        net.activation_checkpointing_enable({"use_reentrant": False})
    clip = torch.rand(1, config.clip_length, 3, side, side, device=device)
    labels = torch.zeros(clip.shape[:2] + clip.shape[3:], dtype=torch.long, device=device)
    seconds, kept = [], {}  # by address, because one tensor may be kept twice

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    half = torch.autocast(device, torch.bfloat16, enabled=bf16)
    for _ in range(3):
        kept.clear()
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
            loss = seg.segmentation_loss(net(pixel_values=clip), labels)
        loss.backward()
        net.head.bias.grad.sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return {"clips/s": 1 / min(seconds), "MB kept": sum(kept.values()) / 1e6}
