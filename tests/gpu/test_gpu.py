"""What only a GPU shows: precisions, resuming a GradScaler, the same numbers as on a CPU."""

import json

import av  # noqa: F401  before decord, as in tests/conftest.py
import inference
import numpy as np
import pytest
import torch
import train
from runs_on_gpu import TINY, drawn_clips, runs, segmented  # noqa: F401  three are fixtures
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)
LABELS = ["not_raising_hand", "raising_hand"]


# ---- Training, by the script
def test_a_killed_fp16_run_goes_on_with_its_scaler(runs, segmented):  # noqa: F811
    """First here, because it must be killed while it runs; all others run meanwhile."""
    run = runs["fp16 killed"]
    run.kill_after(2)
    (checkpoint,) = sorted(run.folder.glob("outputs/**/checkpoint-*/scaler.pt"))[-1:]
    scale = torch.load(checkpoint, weights_only=True)["scale"]
    assert scale > 1  # it was on
    run.start("--resume_from_checkpoint", "auto")
    (metrics, losses), (whole, expected) = run.metrics(), runs["fp16"].metrics()
    assert f"going on from outputs/checkpoints/{checkpoint.parent.name}" in run.text()
    assert len(losses) == len(expected)
    assert losses[-4:] == pytest.approx(expected[-4:], rel=0.05)
    assert metrics["test_loss"] == pytest.approx(whole["test_loss"], rel=0.05)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_as_much(runs, precision):  # noqa: F811
    """Within two points of accuracy of 400 clips, and 2 % of the loss."""
    (half, losses), (full, expected) = runs[precision].metrics(), runs["fp32"].metrics()
    assert half["test_accuracy"] == pytest.approx(full["test_accuracy"], abs=0.02)
    assert half["test_loss"] == pytest.approx(full["test_loss"], rel=0.02)
    assert losses == pytest.approx(expected, rel=0.02)


def test_auto_takes_bf16_from_ampere_on_and_fp16_before():
    args = train.parse_arguments(["--output_dir", "unused"])
    new = torch.cuda.get_device_capability()[0] >= 8
    assert args.precision == ("bf16" if new else "fp16") and args.dataloader_pin_memory


# ---- The same numbers as on a CPU
@pytest.fixture(scope="module")
def vit_b():
    """A ViT-B with random weights: 16 frames of 224 x 224 pixels, as the published ones."""
    torch.manual_seed(0)
    return VideoMAEForVideoClassification(VideoMAEConfig(num_labels=2)).eval()


@pytest.fixture(scope="module")
def batch():
    shape = (2, 16, 3, 224, 224)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.manual_seed(0))


def test_clips_are_normalised_on_the_device(batch):
    _, processor = train.load_model(str(TINY), LABELS)
    there = train.normalised(batch.pin_memory().to("cuda", non_blocking=True), processor)
    assert there.is_cuda and there.dtype == torch.float32
    torch.testing.assert_close(there.cpu(), train.normalised(batch, processor))


@pytest.mark.parametrize("precision, error", [(None, 1e-3), (torch.float16, 5e-3),
                                              (torch.bfloat16, 3e-2)])  # fmt: skip
def test_logits_are_those_of_a_cpu(vit_b, batch, precision, error):
    clips = batch.float() / 127.5 - 1
    with torch.no_grad():
        expected = vit_b.cpu()(clips).logits
        with torch.autocast("cuda", precision, enabled=precision is not None):
            logits = vit_b.cuda()(clips.cuda()).logits.float().cpu()
    torch.testing.assert_close(logits, expected, atol=error, rtol=0)


def gradients(model, clips, **autocast):
    model.zero_grad()
    with torch.autocast("cuda", **autocast):
        loss = model(clips).logits.float().square().sum()
    loss.backward()
    return loss.item(), model.videomae.encoder.layer[0].attention.output.dense.weight.grad.clone()


def test_checkpointing_computes_the_same_and_keeps_less(vit_b, batch):
    model, clips = vit_b.cuda().train(), (batch.float() / 127.5 - 1).cuda()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.cuda.reset_peak_memory_stats()
        found.append((*gradients(model, clips, enabled=False), torch.cuda.max_memory_allocated()))
    model.gradient_checkpointing_disable()
    (loss, gradient, memory), (same, again, less) = found
    assert same == pytest.approx(loss, rel=1e-5) and less < 0.8 * memory
    torch.testing.assert_close(again, gradient, rtol=1e-3, atol=1e-6)


def test_a_compiled_model_computes_the_same(vit_b, batch):
    model, clips = vit_b.cuda().train(), (batch.float() / 127.5 - 1).cuda()
    loss, gradient = gradients(model, clips, dtype=torch.bfloat16)
    same, again = gradients(torch.compile(model), clips, dtype=torch.bfloat16)
    assert same == pytest.approx(loss, rel=0.05)
    assert torch.nn.functional.cosine_similarity(again.ravel(), gradient.ravel(), 0) > 0.99


def test_a_long_video_is_judged_alike(tmp_path):
    from local_mode import clips as drawn

    torch.manual_seed(0)
    model, processor = train.load_model(str(TINY), LABELS)
    model.classifier.weight.data.normal_()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    drawn.draw_long_video(tmp_path / "lesson.mp4", seed=1, seconds=20)
    curves = [
        inference.classify_video(
            tmp_path / "lesson.mp4", inference.load_classifier(tmp_path / "model", device),
            window_seconds=2.5, hop_seconds=0.5,
        )["smoothed"]
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    assert np.abs(np.subtract(*curves)).max() < 1e-3


# ---- Segmentation, by its script
def test_segmentation_learns_as_much_in_half_precision(segmented):  # noqa: F811
    losses = {}
    for precision, (folder, process) in segmented.items():
        assert process.wait() == 0, (folder / "log").read_text()
        metrics = next(folder.glob("outputs/**/metrics.json")).read_text()
        losses[precision] = json.loads(metrics)["eval_loss"]
    for precision in ("fp16", "bf16"):
        assert losses[precision] == pytest.approx(losses["fp32"], rel=0.1)  # 32 steps: 6 % was seen
