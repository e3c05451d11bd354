"""scripts/train.py: what learns and how fast, the loss, precision, and evaluation over views."""

import argparse
import json

import numpy as np
import pytest
import torch
import train
from conftest import TINY
from safetensors.torch import load_file
from test_train import LABELS, trainer_for
from transformers import AutoModelForVideoClassification


def arguments(tmp_path, *flags):
    return train.parse_arguments(["--output_dir", str(tmp_path), *flags])


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---- What learns


def test_rates_fall_from_the_head_down_and_vectors_do_not_decay(tmp_path):
    model, _ = train.load_model(str(TINY), LABELS)
    args = arguments(tmp_path, "--learning_rate", "1e-3", "--layer_decay", "0.5")
    groups = train.parameter_groups(model, args)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    rates = {name: found[id(p)]["lr"] for name, p in model.named_parameters()}
    assert rates["classifier.weight"] == rates["fc_norm.bias"] == groups[0]["lr"] == 1e-3
    block = "videomae.encoder.layer.{}.output.dense.bias"
    assert [rates[block.format(i)] for i in (2, 1, 0)] == pytest.approx([5e-4, 2.5e-4, 1.25e-4])
    patch = "videomae.embeddings.patch_embeddings.projection.weight"
    assert rates[patch] == pytest.approx(6.25e-5)
    for name, parameter in model.named_parameters():
        assert found[id(parameter)]["weight_decay"] == (0 if parameter.ndim == 1 else 0.05), name


def test_freeze():
    def names(freeze):
        model, _ = train.load_model(str(TINY), LABELS)
        return learning(train.trainable(model, freeze))

    head = {"classifier.weight", "classifier.bias", "fc_norm.weight", "fc_norm.bias"}
    assert names("backbone") == head == names("all_but_0")
    last = names("all_but_1") - head
    assert last and all(name.startswith("videomae.encoder.layer.2.") for name in last)
    assert len(names("none")) > len(names("all_but_2")) > len(names("all_but_1"))
    with pytest.raises(ValueError, match="--freeze half: none .* backbone or all_but_N"):
        names("half")
    model, _ = train.load_model(str(TINY), LABELS)
    with pytest.raises(ValueError, match="none .so with --lora_rank."):
        train.trainable(model, "backbone", lora_rank=2)


@pytest.mark.parametrize("flags", [["--lora_rank", "2"], ["--freeze", "backbone"], []])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_only_what_learns_changes(flags, checkpointing, clips_folder, native_checkpoint, tmp_path):
    flags = [*flags, "--activation_checkpointing", checkpointing, "--epochs", "1"]
    trainer = trainer_for(clips_folder, native_checkpoint, tmp_path, *flags)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == learning(trainer.model)


def test_lora_is_merged_into_a_model_that_transformers_loads(
    clips_folder, native_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = f"""--dataset {str(clips_folder).replace(" ", "_")} --model_name {native_checkpoint}
        --lora_rank 2 --epochs 2 --learning_rate 1e-2 --train_batch_size 4
        --dataloader_num_workers 0""".split()
    flags[1] = str(clips_folder)
    metrics = train.train(train.parse_arguments(flags))
    model = AutoModelForVideoClassification.from_pretrained("outputs/model").eval()
    processor = train.clip_processor(tmp_path / "outputs" / "model", 32)
    rows = train.load_clips(str(clips_folder))["test"]
    clips = torch.stack([train.read_clip(video["path"], 4, 32) for video in rows["video"]])
    with torch.no_grad():
        loss = model(
            pixel_values=train.normalised(clips, processor), labels=torch.tensor(rows["label"])
        ).loss
    assert metrics["test_loss"] == pytest.approx(loss.item(), abs=1e-5)
    start = load_file(native_checkpoint / "model.safetensors")
    name = "encoder.layer.0.attention.attention.query.weight"
    old = next(value for key, value in start.items() if key.endswith(name))
    assert not torch.equal(model.state_dict()[f"videomae.{name}"], old)


# ---- Loss


def test_trainers_optimiser_flags_count(clips_folder, native_checkpoint, tmp_path):
    flags = "--adam_beta2 0.5 --adam_epsilon 1e-4".split()
    trainer = trainer_for(clips_folder, native_checkpoint, tmp_path, *flags)
    assert type(trainer.optimizer).__name__ == "AdamW"
    assert trainer.optimizer.defaults["betas"] == (0.9, 0.5)
    assert trainer.optimizer.defaults["eps"] == 1e-4
    assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 4  # by depth, still
    other = trainer_for(clips_folder, native_checkpoint, tmp_path, "--optim", "adafactor")
    assert type(other.optimizer).__name__ == "Adafactor"


def test_a_diverged_run_ends_with_a_remedy(clips_folder, native_checkpoint, tmp_path):
    flags = ["--logging_steps", "1"]
    trainer = trainer_for(clips_folder, native_checkpoint, tmp_path, *flags)
    trainer.model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss nan: lower --learning_rate"):
        trainer.train()


def test_each_epoch_has_positions_of_its_own(clips_folder, native_checkpoint, tmp_path):
    """As Trainer really asks for them; else all epochs would see the same draws."""
    trainer = trainer_for(clips_folder, native_checkpoint, tmp_path)
    asked, read = [], train.Clips.__getitem__
    with pytest.MonkeyPatch.context() as patch:

        def getitem(clips, position):
            asked.extend([position] * clips.training)
            return read(clips, position)

        patch.setattr(train.Clips, "__getitem__", getitem)
        trainer.train()
    assert sorted(asked[:16]) == list(range(16)) and sorted(asked[16:]) == list(range(16, 32))
    assert [i - 16 for i in asked[16:]] != asked[:16]


@pytest.fixture
def trainer(clips_folder, native_checkpoint, tmp_path):
    return trainer_for(clips_folder, native_checkpoint, tmp_path)


def batch(trainer, count=8):
    examples = [trainer.train_dataset[i] for i in range(count)]
    return trainer.data_collator(examples)


def test_the_loss_by_hand_with_smoothing_and_class_weights(trainer):
    trainer.model.train()
    inputs = batch(trainer)
    inputs["labels"][0] = 1 - inputs["labels"][0]
    trainer.class_weights = torch.tensor([0.5, 3.0])
    trainer.args.label_smoothing_factor = 0.2
    clips = train.normalised(inputs["pixel_values"], trainer.processing_class)
    log = trainer.model(pixel_values=clips).logits.log_softmax(-1)
    expected = 0
    for label, row in zip(inputs["labels"].tolist(), log, strict=True):
        target = [0.1, 0.1]
        target[label] += 0.8
        expected -= 0.5 * target[0] * row[0] + 3 * target[1] * row[1]
    loss = trainer.compute_loss(trainer.model, inputs)
    assert loss.item() == pytest.approx(expected.item() / 8, rel=1e-5)


def test_mixup_keeps_cross_entropy(trainer):
    """Trap: soft labels turn the model's own loss into binary cross-entropy."""
    trainer.args.mixup = 0.8
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch(trainer))
    assert 0.3 < loss.item() < 2
    assert trainer.model.config.problem_type is None


def test_evaluation_has_neither_smoothing_nor_mixing_nor_weights(trainer):
    trainer.args.mixup, trainer.class_weights = 0.8, torch.tensor([0.1, 9.0])
    metrics = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval").metrics
    rows = [trainer.eval_dataset[i] for i in range(len(trainer.eval_dataset))]
    clips = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        clips = train.normalised(clips, trainer.processing_class)
        logits = trainer.model.eval()(pixel_values=clips).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([row["labels"] for row in rows]))
    assert metrics["eval_loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_accumulated_gradients_equal_those_of_one_large_batch(
    clips_folder, native_checkpoint, tmp_path
):
    weights, norms = [], []
    for flags in ("--train_batch_size 8", "--train_batch_size 4 --gradient_accumulation_steps 2"):
        flags = [*flags.split(), "--epochs", "1", "--load_best_model_at_end", "false"]
        flags += ["--logging_steps", "1"]
        trainer = trainer_for(clips_folder, native_checkpoint, tmp_path / flags[1], *flags)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        norms.append([number for entry in log for number in (entry["grad_norm"], entry["loss"])])
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*weights, atol=2e-5, rtol=0)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # AdamW would forgive a wrong scale


def test_balanced_weights_count_each_class_alike(clips_folder, native_checkpoint, tmp_path):
    clips = train.load_clips(str(clips_folder))
    labels = np.array(clips["train"]["label"])
    clips["train"] = clips["train"].select(
        [*np.flatnonzero(labels == 0)[:6], *np.flatnonzero(labels)[:2]]
    )
    model, processor = train.load_model(str(native_checkpoint), LABELS)
    args = arguments(tmp_path, "--class_weights", "balanced")
    weights = train.make_trainer(args, clips, model, processor).class_weights
    assert weights.tolist() == pytest.approx([8 / 12, 8 / 4])
    args.class_weights = "none"
    assert train.make_trainer(args, clips, model, processor).class_weights is None


def test_evaluation_without_predictions(clips_folder, native_checkpoint, tmp_path):
    flags = "--prediction_loss_only true --metric_for_best_model loss --epochs 1".split()
    trainer = trainer_for(clips_folder, native_checkpoint, tmp_path, *flags)
    trainer.train()
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


# ---- Evaluation over several views


def test_logits_are_averaged_over_views_and_crops(clips_folder, native_checkpoint, tmp_path):
    flags = "--eval_views 2 --eval_crops 3 --sampling dense".split()
    trainer = trainer_for(clips_folder, native_checkpoint, tmp_path, *flags)
    rows = train.load_clips(str(clips_folder))["validation"]
    logits = []
    for video in rows["video"]:
        views = train.read_clip(video["path"], 4, 32, sampling_rate=4, views=2, crops=3)
        assert len(views) == 6
        with torch.no_grad():
            clips = train.normalised(views, trainer.processing_class)
            logits.append(trainer.model.eval()(pixel_values=clips).logits.mean(0))
    predictions = trainer.predict(trainer.eval_dataset).predictions
    torch.testing.assert_close(torch.tensor(predictions), torch.stack(logits), atol=1e-5, rtol=0)
    single = trainer_for(clips_folder, native_checkpoint, tmp_path)
    assert np.abs(single.predict(single.eval_dataset).predictions - predictions).max() > 1e-3


# ---- Precision and flags


def test_help_shows_our_flags_and_trainers(capsys):
    with pytest.raises(SystemExit) as end:
        train.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "all_but_N" in text and "--gradient_accumulation_steps" in text


@pytest.mark.parametrize(
    "capability, expected", [(None, "fp32"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16")]
)
def test_precision_is_what_the_device_can_do(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # for the rest
    monkeypatch.setattr(train.transformers.TrainingArguments, "__post_init__", lambda self: None)
    assert train.parse_arguments([]).precision == expected


def test_precision_flags(tmp_path):
    assert arguments(tmp_path).precision == "fp32"  # a CPU
    args = arguments(tmp_path, "--bf16", "true")
    assert (args.precision, args.bf16, args.fp16) == ("bf16", True, False)
    args = arguments(tmp_path, "--precision", "bf16")
    assert (args.bf16, args.fp16) == (True, False)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sampling", "random"], "--sampling.*: invalid choice: 'random' .choose from .*dense"),
        (["--on_bad_clip", "ignore"], "--on_bad_clip.*: invalid choice: 'ignore' .*skip"),
        (["--class_weights", "1,2"], "--class_weights.*: invalid choice: '1,2' .*balanced"),
        (["--eval_crops", "2"], "--eval_crops.*: invalid choice"),
        (["--precision", "int8"], "--precision.*: invalid choice: 'int8'"),
        (["--eval_views", "0"], "--eval_views 0: must be above 0"),
        (["--sampling_rate", "0"], "--sampling_rate 0.0: must be above 0"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be above 0"),
        (["--precision", "fp32", "--fp16", "true"], "contradict each other"),
        (["--fp16", "true", "--bf16", "true"], "contradict each other"),
        (["--epochs", "0"], "--num_train_epochs 0.0: must be above 0"),
        (["--save_only_model", "true"], "--save_only_model .* would lose runs"),
        (["--learning_rate=-1e-3"], "--learning_rate -0.001: must be above 0"),
    ],
)
def test_wrong_values_are_named(flags, message, tmp_path):
    with pytest.raises((ValueError, argparse.ArgumentError), match=message):
        arguments(tmp_path, *flags)


# ---- What is saved


def test_the_run_is_recorded_with_the_model(clips_folder, native_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_COMMIT", "0123abc")
    flags = ["--dataset", str(clips_folder), "--model_name", str(native_checkpoint), "--seed", "7"]
    results = []
    for folder in "ab":
        files = ["--model_dir", folder, "--output_dir", f"{folder}/checkpoints"]
        workers = ["--dataloader_num_workers", "0" if folder == "a" else "2"]
        args = train.parse_arguments([*flags, *files, *workers, "--epochs", "1"])
        metrics = train.train(args)
        results.append({k: v for k, v in metrics.items() if not k.endswith(("time", "second"))})
    assert results[0] == results[1]  # the seed decides, not the number of workers
    record = json.loads((tmp_path / "a" / "run_record.json").read_text())
    assert record["arguments"]["seed"] == 7 and record["git_commit"] == "0123abc"
    assert torch.__version__.startswith(record["versions"]["torch"])  # "2.13.0", "2.13.0+cu130"
    assert {"decord", "peft", "transformers"} <= record["versions"].keys()
    assert record["clips"] == {"train": 16, "validation": 8, "test": 12}
