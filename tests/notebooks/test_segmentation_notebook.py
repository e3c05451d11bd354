"""Notebook 5: what it launches, and tutorial/masks.py, which fetches and shows the masks."""

import copy
import io
import json
import os
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import segmentation_data as sd
import torch
import train_segmentation as seg
from cells import run_cell
from conftest import TINY
from PIL import Image
from tutorial import masks, model_size, pictures

NB = "05_video_segmentation"
LABELS = ["background", "body", "raised_arm"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Drawn videos: 8 for training, 2 for validation, 4 for testing."""
    from local_mode import clips

    folder = tmp_path_factory.mktemp("videos") / "drawn"
    counts = {"train": 8, "val": 2, "test": 4}
    return sd.load_videos(str(clips.write_davis(folder, counts, height=64, frames=6)))


@pytest.fixture(scope="module")
def model():
    return seg.load_model(str(TINY), LABELS, decoder_width=16)[0]


# ---- The launch ---------------------------------------------------------------------------------


class Launch:
    """Notes what a cell asks of tutorial.launch."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return ([], {}) if name == "upload" else f"made by {name}"

        return call


@pytest.mark.parametrize("job", [None, "video-segmentation-1"])
def test_a_folder_becomes_a_channel_and_a_name_on_the_hub_a_flag(tmp_path, job):
    given = {"os": os, "here": None, "videos": "v", "segmentation": {"epochs": 3}}
    for name, inputs, flags in (
        (str(tmp_path), {"train": "v", "model": str(tmp_path)}, {"epochs": 3}),
        ("owner/model", {"train": "v"}, {"epochs": 3, "model_name": "owner/model"}),
    ):
        launch = Launch()
        more = {"launch": launch, "model_name": name, "segmentation_job": job}
        made = run_cell(NB, "upload", **given, **more)["hyperparameters"]
        assert made == flags | {"save_minutes": 10}
        assert launch.calls[0] == ("new_run", (None, job), {})
        assert launch.calls[1] == ("upload", (None,), {"job_name": job} | inputs)


def test_the_job_is_noted_as_segmentation_and_an_old_one_is_followed():
    """Else notebook 4 would fetch it as its classifier; and a second job would be paid for."""
    launch = Launch()
    given = {"launch": launch, "here": "h", "trainer": "t", "segmentation_job": "earlier"}
    assert run_cell(NB, "launch", **given)["job"] == "made by start"
    assert launch.calls[0] == ("start", ("h", "t", "earlier"), {"kind": "segmentation"})
    assert launch.calls[1] == ("follow", ("h", "made by start"), {})


def test_miou_is_found_in_the_log():
    found = {definition.name: definition.regex for definition in masks.METRICS}
    line = "{'eval_loss': '0.14', 'eval_miou': '0.8765', 'eval_fwiou': '0.9', 'test_miou': '0.83'}"
    assert re.findall(found["eval:miou"], line) == ["0.8765"]
    assert re.findall(found["test:miou"], line) == ["0.83"]


def test_the_model_is_the_one_of_notebook_2_unless_named():
    here = SimpleNamespace(run={"choices": {"model_name": "of notebook 2"}})
    assert masks.encoder(here) == "of notebook 2"
    assert masks.encoder(here, "another") == "another"
    with pytest.raises(RuntimeError, match="run 02_local_smoke_train.ipynb"):
        masks.encoder(SimpleNamespace(run={}))


def test_operations_are_counted_without_computing(model):
    """The encoder's share is what model_size counts, and the decoder adds to it."""
    own = masks.gflop(model, 16, 64)
    assert own > model_size.gflop(model.config) > 0.1
    assert masks.gflop(model, 4, 96) == pytest.approx(own * 4 / 16 * (96 / 64) ** 2, rel=0.15)


def test_the_expected_minutes_grow_with_the_work(model, data):
    def minutes(**flags):
        found = masks.expected_minutes(model, data, flags, "ml.m5.large")
        return found - masks.launch.START_MINUTES

    assert minutes(epochs=20) == pytest.approx(2 * minutes(epochs=10), rel=0.1)
    assert minutes(clips_per_video=1) < minutes() < minutes(crop_size=128)
    assert masks.expected_minutes(model, data, {}, "ml.unknown.type") is None


# ---- Looking at the videos ----------------------------------------------------------------------


def test_shares_are_those_of_the_masks(data):
    found = masks.shares(data)["share of the pixels"]
    assert {*found.index} == {*LABELS, "void"} and found.index[0] == "background"
    assert found["void"] == "0.00%"
    assert sum(float(text.rstrip("%")) for text in found) == pytest.approx(100, abs=0.03)


def test_the_examples_have_most_and_least_of_the_last_label(data):
    def arm(video):
        return (masks.read(data, video)[1][-1] == 2).sum()

    most, some, least = masks.examples(data, "train")
    assert arm(most) == max(map(arm, data.splits["train"])) > 0
    assert arm(least) == min(map(arm, data.splits["train"])) and arm(most) >= arm(some)
    one = sd.Videos({"test": data.splits["test"][:1]}, LABELS, "classes")
    assert masks.examples(one, "test") == 3 * [one.splits["test"][0]]


def test_colours_lie_where_the_labels_are():
    frames = np.full((2, 4, 6, 3), 100, np.uint8)
    labels = np.zeros((2, 4, 6), np.uint8)
    labels[:, 0], labels[:, 1], labels[:, 2] = 1, 2, 255
    found = pictures.overlay(frames, labels, strength=1.0)
    assert (found[:, 0] == (230, 159, 0)).all() and (found[:, 1] == (0, 114, 178)).all()
    assert (found[:, 2:] == 100).all()  # void and background stay as they are
    tensors = torch.tensor(frames).permute(0, 3, 1, 2), torch.tensor(labels)
    assert (pictures.overlay(*tensors, strength=1.0) == found).all()


def test_curves_show_the_mean_and_each_label():
    history = [{"loss": 1.0, "epoch": 0.5}]
    for epoch in 1, 2:
        scores = {"eval_miou": 0.3 * epoch, "eval_iou_arm": 0.1 * epoch, "eval_loss": 1.0}
        history.append({"epoch": epoch} | scores)
    (axis,) = pictures.iou_curves(history).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axis.lines}
    assert lines == {"mIoU": [0.3, 0.6], "IoU arm": [0.1, 0.2]}


# ---- What came back -----------------------------------------------------------------------------


def packed(files):
    """A tar.gz with these files, {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def finished(tmp_path, data):
    """(account, metrics, masks) of a finished job, whose archives lie in an S3 made of a dict."""
    video = data.splits["test"][0]
    labels = np.random.default_rng(0).integers(0, 3, (6, 64, 80)).astype(np.uint8)
    for path, mask in zip(video.frames, labels, strict=True):
        sd.write_mask(tmp_path / f"{Path(path).stem}.png", mask)
    scores = {"eval_miou": 0.5, "eval_loss": 1.0, "test_miou": 0.4, "test_J&F": 0.6}
    state = {"log_history": [{"epoch": 1, "eval_miou": 0.5}]}
    output = {f"results/{video.name}/{p.name}": p.read_bytes() for p in tmp_path.glob("*.png")}
    output["metrics.json"] = json.dumps(scores).encode()
    model = {"trainer_state.json": json.dumps(state).encode()}
    store = {f"run/{name}.tar.gz": packed(f) for name, f in (("model", model), ("output", output))}
    s3 = SimpleNamespace(download_file=lambda _, key, path: Path(path).write_bytes(store[key]))
    answer = {"TrainingJobStatus": "Completed"}
    answer["ModelArtifacts"] = {"S3ModelArtifacts": "s3://bucket/run/model.tar.gz"}
    sagemaker = SimpleNamespace(describe_training_job=lambda TrainingJobName: answer)
    clients = {"s3": s3, "sagemaker": sagemaker}
    session = SimpleNamespace(client=clients.get)
    here = SimpleNamespace(output=tmp_path, run={"region": "us-east-1"}, session=session)
    return here, scores, labels


def test_what_the_job_left_is_fetched_and_read(finished, data):
    here, scores, labels = finished
    (here.output / "segmentation" / "model").mkdir(parents=True)
    (here.output / "segmentation" / "model" / "of an earlier job").touch()
    folder = masks.fetch(here, "job")
    assert not (folder / "model" / "of an earlier job").exists()
    assert (masks.predicted(folder, data.splits["test"][0]) == labels).all()
    assert masks.metrics(here, folder) == scores
    assert json.loads((here.output / "segmentation.json").read_text()) == scores
    assert masks.history(folder) == [{"epoch": 1, "eval_miou": 0.5}]


def test_the_table_sets_clips_beside_whole_videos(finished):
    found = masks.table(finished[1], "test")
    assert found.columns.tolist() == ["whole test videos", "validation clips"]
    assert found.loc["miou"].tolist() == [0.4, 0.5]
    assert found.loc["J&F"].iloc[0] == 0.6 and np.isnan(found.loc["J&F"].iloc[1])


def test_the_judged_split_is_the_one_with_masks(data):
    assert masks.judged_split(data) == "test"
    without = {split: part for split, part in data.splits.items() if split != "test"}
    assert masks.judged_split(sd.Videos(without, LABELS, "classes")) == "validation"


def test_clips_of_several_sizes_become_one_film():
    film = pictures.padded([np.full((2, 4, 9, 3), 5, np.uint8), np.full((3, 7, 6, 3), 7, np.uint8)])
    assert film.shape == (5, 8, 10, 3)
    assert (film.sum((1, 2, 3)) == [4 * 9 * 3 * 5] * 2 + [7 * 6 * 3 * 7] * 3).all()
    assert (film[0, 2:6, :9] == 5).all()  # in the middle


# ---- The guide segment_your_own_videos ----------------------------------------------------------


def test_the_rarest_label_is_one_that_occurs(data):
    assert masks.rarest(data) == "raised_arm"
    more = sd.Videos(data.splits, [*LABELS, "never drawn"], "classes")
    assert masks.rarest(more) == "raised_arm"


def test_each_spoilt_mask_is_named_with_what_is_wrong(data, tmp_path):
    video = data.splits["train"][0]
    with Image.open(video.masks[0]) as mask:
        mask.save(tmp_path / "a good one.png")
        mask.convert("RGB").save(tmp_path / "colours.png")
        mask.resize((10, 10)).save(tmp_path / "small.png")
        Image.new("L", mask.size, 200).save(tmp_path / "unknown.png")
    found = masks.problems(data, video.frames[0], tmp_path)
    assert found["a good one.png"] == ""
    for name in ("colours.png", "small.png", "unknown.png"):
        assert name in found[name] and str(tmp_path) not in found[name]
    assert len({*found}) == 4


def test_a_short_run_judges_each_label_by_step_and_saves_nothing(data, tmp_path):
    """And both losses begin at the same weights, with the same clips."""
    videos = str(Path(data.splits["train"][0].frames[0]).parents[3])
    flags = {"max_steps": 2, "train_batch_size": 1, "clip_length": 2, "crop_size": 32}
    flags |= {"decoder_width": 16, "learning_rate": 1e-12, "dataloader_num_workers": 0}
    runs = [
        masks.short_run(videos, str(TINY), flags | {"loss": loss}, tmp_path / "checkpoints")
        for loss in ("ce", "ce+dice")
    ]
    assert runs[0].iou.index.tolist() == [1, 2]
    assert {*runs[0].iou.columns} <= {*LABELS}
    assert runs[0].iou.equals(runs[1].iou) and not runs[0].model.training
    assert not list(tmp_path.glob("checkpoints/**/*.safetensors"))
    video = data.splits["test"][0]
    found = masks.segmented(runs[0], video)
    assert found.shape == masks.read(data, video)[1].shape and found.max() <= 2
    with pytest.raises(ValueError, match="--loss is one of"):
        masks.short_run(videos, str(TINY), flags | {"loss": "dise"}, tmp_path)


def test_the_model_of_the_job_is_the_one_that_was_fetched(model, data, tmp_path):
    here = SimpleNamespace(output=tmp_path)
    with pytest.raises(RuntimeError, match="has no model: run 05_video_segmentation.ipynb"):
        masks.of_job(here)
    own = copy.deepcopy(model)
    own.config.update({"clip_length": 4, "crop_size": 64, "short_side": 64})
    processor = seg.load_model(str(TINY), LABELS, decoder_width=16)[1]
    for part in (own, processor):
        part.save_pretrained(tmp_path / "segmentation" / "model")
    job, video = masks.of_job(here), data.splits["test"][0]
    expected = np.stack(list(seg.segment_video(own.eval(), sd.read_frames(video), processor)))
    assert (masks.segmented(job, video) == expected).all()
    assert not job.model.training and job.folder == tmp_path / "segmentation"


def test_a_folder_of_frames_is_a_video_without_masks(data, tmp_path):
    video = data.splits["test"][0]
    found = masks.frames_in(Path(video.frames[0]).parent)
    assert (found.name, found.frames, found.masks) == (video.name, list(video.frames), [])
    with pytest.raises(FileNotFoundError, match="no \\*.jpg; make frames with ffmpeg"):
        masks.frames_in(tmp_path)


def test_the_scores_of_whole_videos_are_those_of_their_masks(data):
    videos = data.splits["test"][:2]
    true = [masks.read(data, video)[1] for video in videos]
    assert masks.iou(data, videos, true) == {"miou": 1, "background": 1, "body": 1, "raised_arm": 1}
    no_arm = [np.where(part == 2, 1, part) for part in true]
    found = masks.iou(data, videos, no_arm)
    body, arm = (sum((part == label).sum() for part in true) for label in (1, 2))
    assert found["raised_arm"] == 0 and found["body"] == pytest.approx(body / (body + arm))


def test_a_step_keeps_less_with_checkpointing_and_with_a_frozen_encoder(model):
    config = copy.deepcopy(model.config)
    config.clip_length = 2
    plain, checkpointing, frozen = (
        masks.step_cost(config, 32, **way)["MB kept"]
        for way in ({}, {"checkpointing": True}, {"frozen": True})
    )
    assert plain > checkpointing and plain > frozen
    assert masks.step_cost(config, 96)["MB kept"] > 2 * plain
