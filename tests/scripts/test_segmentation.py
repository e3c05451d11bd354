"""train_segmentation.py: the model, whole videos, and a run with its interruptions."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import segmentation_data as sd
import torch
import train
import train_segmentation as seg
from conftest import ROOT, TINY
from PIL import Image
from safetensors.torch import load_file, save_file

LABELS = ["background", "body", "raised_arm"]


@pytest.fixture(scope="module")
def videos_folder(tmp_path_factory):
    """Drawn videos in the layout of DAVIS: 6 for training, 2 for validation, 2 for testing."""
    from local_mode import clips

    folder = tmp_path_factory.mktemp("videos") / "drawn videos"
    return clips.write_davis(folder, {"train": 6, "val": 2, "test": 2}, height=64, frames=11)


@pytest.fixture(scope="module")
def tiny():
    """(model, processor) from the tiny checkpoint, with a small decoder."""
    torch.manual_seed(0)
    model, processor = seg.load_model(str(TINY), LABELS, decoder_width=16)
    model.config.clip_length, model.config.crop_size, model.config.short_side = 8, 32, 48
    return model.eval(), processor


def flags(videos_folder, folder, *more):
    return [
        "--dataset", str(videos_folder), "--model_name", str(TINY), "--decoder_width", "16",
        "--clip_length", "4", "--crop_size", "32", "--clips_per_video", "2", "--epochs", "2",
        "--train_batch_size", "2", "--dataloader_num_workers", "0",
        "--output_dir", f"{folder}/checkpoints", "--model_dir", f"{folder}/model",
        "--output_data_dir", f"{folder}/data", *more,
    ]  # fmt: skip


def run(*args):
    return seg.run(train.parse_arguments(flags(*args), seg.Arguments))


# ---- The model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames, height, width", [(16, 64, 64), (8, 64, 64), (2, 8, 8), (4, 40, 104)]
)
def test_logits_have_the_size_of_the_clip(tiny, frames, height, width):
    with torch.no_grad():
        logits = tiny[0](pixel_values=torch.rand(2, frames, 3, height, width))
    assert logits.shape == (2, frames, 3, height, width) and logits.isfinite().all()


def test_a_size_that_has_no_tokens_is_refused(tiny):
    for shape in (1, 8, 3, 60, 64), (1, 7, 3, 64, 64):
        with pytest.raises(ValueError, match=r"frames must divide by 2, height and width by 8"):
            tiny[0](pixel_values=torch.rand(shape))


def test_the_encoder_is_the_one_of_the_checkpoint(tiny):
    """Its hidden states at its own size equal those of transformers' own forward pass."""
    model = tiny[0]
    encoder = train.load_model(str(TINY), LABELS)[0].videomae.eval()
    clip = torch.rand(1, 16, 3, 64, 64)
    with torch.no_grad():
        theirs = encoder(pixel_values=clip, output_hidden_states=True).hidden_states
        ours = model.hidden_states(clip)
        for depth, norm, volume in zip(model.depths, model.norms, ours, strict=True):
            expected = norm(theirs[depth]).transpose(1, 2).unflatten(2, (8, 8, 8))
            torch.testing.assert_close(volume, expected, atol=1e-5, rtol=1e-5)


def test_positions_of_another_size_lie_between_those_of_the_checkpoint(tiny):
    model = tiny[0]
    own = model.positions((8, 8, 8)).unflatten(1, (8, 8, 8))
    doubled = model.positions((8, 8, 16)).unflatten(1, (8, 8, 16))
    torch.testing.assert_close(
        model.positions((8, 8, 8)), model.videomae.embeddings.position_embeddings
    )
    # Each new pair of columns is symmetric about an old one, but for the ends.
    middle = (doubled[..., 2:-2:2, :] + doubled[..., 3:-2:2, :]) / 2
    neighbours = own[..., :-2, :] / 8 + own[..., 1:-1, :] * 3 / 4 + own[..., 2:, :] / 8
    torch.testing.assert_close(middle, neighbours, atol=1e-5, rtol=1e-4)


def test_a_fine_tuned_classifier_and_a_native_checkpoint_can_be_the_start(
    native_checkpoint, tmp_path
):
    classifier, processor = train.load_model(str(native_checkpoint), ["a", "b"])
    torch.nn.init.constant_(classifier.classifier.weight, 3.0)
    classifier.save_pretrained(tmp_path)
    for start in native_checkpoint, tmp_path:
        model, _ = seg.load_model(str(start), LABELS, 16)
        theirs, ours = classifier.videomae.state_dict(), model.videomae.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
        assert model.config.num_labels == 3 and model.config.id2label[2] == "raised_arm"


def test_the_saved_model_gives_the_same_logits(tiny, tmp_path):
    """Under both of the names that transformers saves: biases were lost there before."""
    model, _ = tiny
    clip = torch.rand(1, 8, 3, 32, 32)
    for original in True, False:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / str(original), save_original_format=original)
        loaded = seg.VideoMAEForVideoSegmentation.from_pretrained(tmp_path / str(original)).eval()
        with torch.no_grad():
            assert torch.equal(loaded(pixel_values=clip), model(pixel_values=clip))


def test_gradient_checkpointing_changes_no_gradient(tiny):
    gradients = []
    for checkpointing in False, True:
        model = seg.VideoMAEForVideoSegmentation(tiny[0].config)
        model.load_state_dict(tiny[0].state_dict())
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(1)
        clip, labels = torch.rand(1, 4, 3, 32, 32), torch.randint(0, 3, (1, 4, 32, 32))
        seg.segmentation_loss(model(pixel_values=clip), labels).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(g is not None for g in gradients[0].values())  # every weight learns
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.long
def test_a_frozen_encoder_learns_nothing_and_the_decoder_does(videos_folder, tmp_path):
    run(videos_folder, tmp_path, "--freeze", "backbone", "--max_steps", "2")
    encoder = train.load_model(str(TINY), LABELS)[0].videomae.state_dict()
    model = seg.VideoMAEForVideoSegmentation.from_pretrained(tmp_path / "model")
    assert all(torch.equal(model.videomae.state_dict()[name], encoder[name]) for name in encoder)
    torch.manual_seed(42)  # as the run has it: the decoder as it was drawn
    drawn = seg.load_model(str(TINY), LABELS, 16)[0]
    assert not torch.equal(model.head.weight, drawn.head.weight)


def test_a_trained_model_can_be_the_start_of_another(tiny, tmp_path):
    model = tiny[0]
    model.save_pretrained(tmp_path)
    clip = torch.rand(1, 8, 3, 32, 32)
    same, _ = seg.load_model(str(tmp_path), LABELS)
    with torch.no_grad():
        assert torch.equal(same.eval()(pixel_values=clip), model(pixel_values=clip))
    other, _ = seg.load_model(str(tmp_path), ["a", "b"])
    assert other.head.out_channels == 2 and other.config.id2label == {0: "a", 1: "b"}
    assert torch.equal(other.bottom.weight, model.bottom.weight)


@pytest.mark.long
def test_it_learns_two_clips_by_heart(videos_folder):
    """What no decoder with a wrong axis can do; the small class included."""
    data = sd.load_videos(str(videos_folder))
    args = train.parse_arguments(flags(videos_folder, "x", "--crop_size", "64"), seg.Arguments)
    torch.manual_seed(0)
    model, processor = seg.make_model(args, data.labels)
    clips = seg.VideoClips(data, "train", None, args, 64, 4)
    rows = [clips[i] for i in range(len(clips))]
    rows = sorted(rows, key=lambda row: (row["labels"] == 2).sum())[-2:]
    pixels = train.normalised(torch.stack([row["pixel_values"] for row in rows]), processor)
    labels = torch.stack([row["labels"] for row in rows]).long()
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(80):
        loss = seg.segmentation_loss(model(pixel_values=pixels), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    metric = seg.pixel_metric(3)
    metric.update(model.eval()(pixel_values=pixels).argmax(2), labels)
    scores = seg.pixel_scores(metric, data.labels)
    assert scores["miou"] > 0.85 and scores["iou_raised_arm"] > 0.7, scores


# ---- Whole videos -------------------------------------------------------------------------------


@pytest.mark.parametrize("total, size", [(32, 32), (33, 32), (48, 32), (64, 32), (100, 32)])
def test_windows_cover_all_and_overlap_by_half(total, size):
    begins = seg.starts(total, size)
    assert begins[0] == 0 and begins[-1] == total - size
    assert all(0 < b - a <= size / 2 for a, b in zip(begins, begins[1:], strict=False))


class Local(torch.nn.Module):
    """A model whose answer for a pixel depends on that pixel only, in place and time."""

    def __init__(self, **sizes):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(9.0))
        self.seen = []
        self.config = type("Config", (), {"num_labels": 2} | sizes)

    def forward(self, pixel_values):
        self.seen.append(tuple(pixel_values.shape))
        light = self.scale * pixel_values.mean(2, keepdim=True)
        return torch.cat([-light, light], 2)


@pytest.mark.parametrize("frames", [1, 3, 8, 9, 12, 13, 30])
@pytest.mark.parametrize("size", [(48, 48), (48, 80), (70, 48)])
def test_a_video_is_stitched_without_a_seam(tiny, frames, size):
    processor = tiny[1]
    video = torch.randint(0, 256, (frames, 3, *size), dtype=torch.uint8)
    model = Local(clip_length=8, crop_size=32, short_side=48)
    found = np.stack(list(seg.segment_video(model, iter(video), processor, batch_size=3)))
    whole = train.normalised(video, processor).mean(1) > 0
    assert found.dtype == np.uint8 and np.array_equal(found, whole.numpy().astype(np.uint8))
    assert {shape[1:] for shape in model.seen} == {(8, 3, 32, 32)}  # always the size of training


def test_masks_have_the_size_of_the_frames(tiny):
    video = torch.randint(0, 256, (9, 3, 37, 61), dtype=torch.uint8)
    found = list(seg.segment_video(*tiny[:1], video, tiny[1]))
    assert [mask.shape for mask in found] == 9 * [(37, 61)]


def test_a_long_video_is_read_as_it_is_segmented(tiny):
    """Never more than a window and a half ahead: memory does not grow with the video."""
    read = 0

    def frames():
        nonlocal read
        for _ in range(60):
            read += 1
            yield torch.zeros(3, 48, 48, dtype=torch.uint8)

    ahead = []
    model = Local(clip_length=8, crop_size=32, short_side=48)
    for done, _ in enumerate(seg.segment_video(model, frames(), tiny[1]), 1):
        ahead.append(read - done)
    assert len(ahead) == 60 and max(ahead) <= 12


# ---- The run ------------------------------------------------------------------------------------


def test_a_run_leaves_model_metrics_and_masks(videos_folder, tmp_path):
    metrics = run(videos_folder, tmp_path)
    saved = json.loads((tmp_path / "data" / "metrics.json").read_text())
    assert saved == metrics and {"eval_miou", "test_miou", "test_J&F", "test_VC8"} <= saved.keys()
    assert saved["test_J&F"] == pytest.approx((saved["test_J"] + saved["test_F"]) / 2)
    data = sd.load_videos(str(videos_folder))
    model = seg.VideoMAEForVideoSegmentation.from_pretrained(tmp_path / "model").eval()
    processor = train.clip_processor(tmp_path / "model", model.config.image_size)
    metric = seg.pixel_metric(3)
    for video in data.splits["test"]:  # the masks are those of the saved model, frame by frame
        found = seg.segment_video(model, sd.read_frames(video), processor)
        for frame, mask, ours in zip(video.frames, video.masks, found, strict=True):
            with Image.open(
                tmp_path / "data/results" / video.name / f"{Path(frame).stem}.png"
            ) as i:
                assert i.mode == "P" and np.array_equal(np.array(i), ours)
            true = sd.read_mask(mask, 3, "classes")
            metric.update(torch.tensor(ours).long(), torch.tensor(true).long())
    scores = seg.pixel_scores(metric, data.labels)
    assert saved["test_miou"] == pytest.approx(scores["miou"], abs=1e-6)
    record = json.loads((tmp_path / "model" / "run_record.json").read_text())
    assert record["clips"] == {"train": 6, "validation": 2, "test": 2}


@pytest.mark.long
def test_an_interrupted_run_ends_as_one_that_was_left_alone(videos_folder, tmp_path):
    """SIGTERM after the first step; the second start ends with the same weights, bit for bit."""
    script = ROOT / "scripts" / "train_segmentation.py"

    def start(folder, *more):
        line = flags(videos_folder, tmp_path / folder, "--logging_steps", "1", *more)
        command = [sys.executable, "-u", str(script), *line]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    alone = start("alone")
    first = start("stopped")
    for line in first.stdout:
        if "'loss'" in line:
            first.send_signal(signal.SIGTERM)
            break
    log = first.stdout.read()
    assert first.wait() == 143 and "SIGTERM: saved at step" in log, log
    second = start("stopped", "--resume_from_checkpoint", "auto")
    log = second.communicate()[0]
    assert second.returncode == 0 and "going on from" in log, log
    log = alone.communicate()[0]
    assert alone.returncode == 0, log
    weights = [tmp_path / name / "model" / "model.safetensors" for name in ("alone", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_same_flags_give_the_same_metrics_with_any_number_of_workers(videos_folder, tmp_path):
    one = run(videos_folder, tmp_path / "a", "--epochs", "1")
    two = run(videos_folder, tmp_path / "b", "--epochs", "1", "--dataloader_num_workers", "2")
    for name in one:
        if not name.endswith(("runtime", "second")):
            assert one[name] == pytest.approx(two[name], nan_ok=True), name


@pytest.mark.parametrize(
    "more, message",
    [
        (["--loss", "bce"], "--loss is one of"),
        (["--clip_length", "5"], "--clip_length 5 must divide by 2"),
        (["--crop_size", "30"], "--crop_size 30 by 8"),
        (["--short_side", "16"], "--short_side 16: below --crop_size 32"),
        (["--decoder_width", "20"], "--decoder_width one of"),
        (["--mixup", "0.8"], "--mixup: only train.py has it"),
        (["--sampling", "dense"], "--sampling: only train.py has it"),
        (["--num_frames", "8"], "--num_frames: here it is --clip_length"),
        (["--metric_for_best_model", "accurracy"], "_model accurracy: one of .*'miou'"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor: these losses have none"),
    ],
)
def test_a_wrong_flag_is_named(videos_folder, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run(videos_folder, tmp_path, *more)


def test_a_gpu_that_torch_does_not_see_ends_the_job(videos_folder, tmp_path, monkeypatch):
    """Else the job trains on the CPUs, at the price of the GPU, until max_runtime."""
    monkeypatch.setenv("SM_NUM_GPUS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="this machine has GPUs, but torch sees none"):
        run(videos_folder, tmp_path)


def test_a_bad_mask_is_found_before_training(videos_folder, tmp_path):
    import shutil

    folder = tmp_path / "videos"
    shutil.copytree(videos_folder, folder)
    (mask, *_) = sorted(folder.glob("Annotations/480p/train*/*.png"))
    Image.new("RGB", (64, 64)).save(mask)
    with pytest.raises(ValueError, match="1 of 110 masks cannot be used") as error:
        run(folder, tmp_path)
    assert f"  {mask}: a mask in mode RGB" in str(error.value)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.long
def test_without_a_test_split_the_validation_videos_are_judged(videos_folder, tmp_path):
    """As of DAVIS, which has instance numbers, and no list of test videos."""
    import shutil

    folder = tmp_path / "DAVIS"
    shutil.copytree(videos_folder, folder)
    (folder / "labels.json").unlink()
    (folder / "ImageSets" / "2017" / "test.txt").unlink()
    metrics = run(folder, tmp_path, "--max_steps", "1")
    assert {"validation_miou", "validation_J&F", "eval_iou_foreground"} <= metrics.keys()
    assert not any(name.startswith("test_") for name in metrics)
    assert len([*(tmp_path / "data" / "results").glob("val_*/*.png")]) == 2 * 11


def test_masks_of_0_and_255_are_refused(videos_folder, tmp_path):
    """They would train a model on void: one that learns nothing and looks perfect."""
    import shutil

    folder = tmp_path / "videos"
    shutil.copytree(videos_folder, folder)
    for path in folder.glob("Annotations/480p/*/*.png"):
        with Image.open(path) as mask:
            grey = Image.fromarray(np.where(np.array(mask) > 0, 255, 0).astype(np.uint8))
        grey.save(path)
    with pytest.raises(ValueError, match=r"hold no label but \[0\]; 255 is void"):
        run(folder, tmp_path)


def test_a_checkpoint_of_another_size_is_named(videos_folder, tmp_path):
    run(videos_folder, tmp_path, "--epochs", "1")
    more = ["--resume_from_checkpoint", "auto", "--decoder_width", "32"]
    with pytest.raises(ValueError, match="is of another run: decoder_width was 16 and is 32"):
        run(videos_folder, tmp_path, *more)


@pytest.mark.parametrize(
    "more",
    [["--bf16", "true"], ["--channels_last", "true"], ["--activation_checkpointing", "true"]],
)
def test_the_faster_and_the_smaller_ways_train(videos_folder, tmp_path, more):
    metrics = run(videos_folder, tmp_path, "--max_steps", "2", *more)
    assert 0 < metrics["test_miou"] < 1


@pytest.mark.long
def test_two_processes_judge_each_video_once(videos_folder, tmp_path):
    """Counts of pixels and the figures of videos are those of one process."""
    alone = run(videos_folder, tmp_path / "one", "--max_steps", "1")
    more = flags(videos_folder, tmp_path / "two", "--model_name", str(TINY), "--max_steps", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    more += ["--train_batch_size", "1"]
    job = subprocess.run(
        [*command, str(ROOT / "scripts" / "train_segmentation.py"), *more],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-3000:]
    both = json.loads((tmp_path / "two" / "data" / "metrics.json").read_text())
    assert both.keys() >= {k for k in alone if k.startswith("test_")}
    for name in ("eval_miou", "test_miou", "test_J", "test_F", "test_VC8", "test_accuracy"):
        assert both[name] == pytest.approx(alone[name], abs=2e-3), name


# ---- Going on -----------------------------------------------------------------------------------


def test_another_batch_size_or_clip_is_refused(videos_folder, tmp_path):
    """Reported for train.py: a step that means something else, and other numbers of epochs."""
    run(videos_folder, tmp_path, "--epochs", "1")
    on = ["--resume_from_checkpoint", "auto"]
    for more, message in (
        (["--train_batch_size", "4"], "accumulation_steps was 2 and is 4"),
        (["--clips_per_video", "3"], "clips_per_video was 2 and is 3"),
        (["--crop_size", "40"], "crop_size was 32 and is 40"),
    ):
        with pytest.raises(ValueError, match=message):
            run(videos_folder, tmp_path, *on, *more)


def test_ones_own_head_goes_on_if_the_labels_are_the_same(videos_folder, tmp_path, capsys):
    import tarfile

    run(videos_folder, tmp_path, "--epochs", "1")
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:  # as SageMaker packs it
        archive.add(tmp_path / "model", ".")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("model", "model.tar.gz"):
        capsys.readouterr()
        model, _ = seg.load_model(str(tmp_path / name), LABELS)
        assert "the head has the same labels and is kept" in capsys.readouterr().out
        assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items() if "head" in k)
    other, _ = seg.load_model(str(tmp_path / "model"), ["floor", "wall", "roof"])
    assert "the head is new" in capsys.readouterr().out
    assert not torch.equal(other.head.weight, saved["head.weight"])
    kept = "stages.0.up.0.weight"
    assert torch.equal(other.state_dict()[kept], saved[kept])
    weights = {name: tensor for name, tensor in saved.items() if name != kept}
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing or unexpected.*{kept}"):
        seg.load_model(str(tmp_path / "model"), LABELS)
