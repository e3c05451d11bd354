"""scripts/train.py: runs that are really killed, and go on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import forked
import pytest
import torch
import train
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import TrainerControl

# Nothing is left out that draws or remembers: workers, augmentation, mixup, schedule. An epoch has
# four steps; checkpoints and evaluations come at its end.
FLAGS = """--epochs 5 --train_batch_size 4 --learning_rate 1e-3 --dataloader_num_workers 2
    --mixup 0.8 --horizontal_flip true --zoom 0.3 --logging_steps 1""".split()
# The script, with a blow at a chosen moment: as a process of its own, so that it can be killed.
BLOW = """
import multiprocessing, os, signal, sys
import train
moment, step = sys.argv[1], int(sys.argv[2])
def at(trainer, point):
    return moment == point and trainer.state.global_step == step
save = train.Trainer._save_optimizer_and_scheduler
def killed_in_save(self, folder):
    if at(self, "SIGKILL in save"):
        open(os.path.join(folder, "optimizer.pt"), "wb").write(b"PK half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
train.Trainer._save_optimizer_and_scheduler = killed_in_save
training_step = train.ClipTrainer.training_step
def told_in_step(self, *args, **kwargs):
    if at(self, "SIGTERM in step"):
        os.kill(os.getpid(), signal.SIGTERM)
    if at(self, "SIGTERM to all"):
        workers = multiprocessing.active_children()
        assert len(workers) == 4, workers  # two for training, two that evaluated
        assert all(os.getpgid(worker.pid) != os.getpgrp() for worker in workers)
        os.killpg(0, signal.SIGTERM)  # the workers get it as well
    return training_step(self, *args, **kwargs)
train.ClipTrainer.training_step = told_in_step
train.main(sys.argv[3:])
"""


def start(folder, clips_folder, checkpoint, *flags, blow=None):
    """The script in a process of its own; its model lies in folder/outputs/model."""
    folder.mkdir(exist_ok=True)
    flags = ["--dataset", clips_folder, "--model_name", checkpoint, *FLAGS, *flags]
    return forked.Run(folder, flags) if blow is None else forked.Run(folder, [*blow, *flags], BLOW)


def run(*args, **more):
    """The same, when it has ended."""
    return start(*args, **more).wait()


def outcome(folder):
    """Weights of the finished model, the log of losses and rates, the metrics."""
    weights = load_file(folder / "outputs/model/model.safetensors")
    state = json.loads((folder / "outputs/model/trainer_state.json").read_text())
    timing = ("runtime", "second", "flos")
    log = [{k: v for k, v in entry.items() if not any(t in k for t in timing)}
           for entry in state["log_history"] if "train_loss" not in entry]  # fmt: skip
    metrics = json.loads((folder / "outputs/data/metrics.json").read_text())
    return weights, log, {k: v for k, v in metrics.items() if not any(t in k for t in timing)}


def assert_same_outcome(folder, expected):
    (weights, log, metrics), (other_weights, other_log, other_metrics) = outcome(folder), expected
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())
    assert log == other_log
    assert metrics == other_metrics


@pytest.fixture(scope="module")
def undisturbed(clips_folder, native_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run(folder, clips_folder, native_checkpoint)
    assert result.returncode == 0, result.stderr
    return outcome(folder)


# Saved after the step: within an epoch, at the end of one.
@pytest.mark.parametrize("blow, step", [("SIGTERM to all", 5), ("SIGTERM in step", 11)])
@pytest.mark.long
def test_sigterm_saves_at_the_next_step(
    blow, step, undisturbed, clips_folder, native_checkpoint, tmp_path
):
    told = run(tmp_path, clips_folder, native_checkpoint, blow=[blow, str(step)])
    assert told.returncode == 128 + signal.SIGTERM and told.stderr == ""
    assert f"SIGTERM: saved at step {step + 1}; resuming goes on from there" in told.stdout
    assert (tmp_path / f"outputs/checkpoints/checkpoint-{step + 1}").is_dir()
    assert not list((tmp_path / "outputs/model").iterdir())
    resumed = run(tmp_path, clips_folder, native_checkpoint, "--resume_from_checkpoint", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_outcome(tmp_path, undisturbed)


@pytest.mark.long
def test_sigkill_during_a_save(undisturbed, clips_folder, native_checkpoint, tmp_path):
    killed = run(tmp_path, clips_folder, native_checkpoint, blow=["SIGKILL in save", "8"])
    assert killed.returncode == -signal.SIGKILL
    half = tmp_path / "outputs/checkpoints/checkpoint-8"
    assert (half / "model.safetensors").exists()  # it looks like a checkpoint
    resumed = run(tmp_path, clips_folder, native_checkpoint, "--resume_from_checkpoint", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint-8 is not complete and is passed over" in resumed.stdout
    assert_same_outcome(tmp_path, undisturbed)


@pytest.mark.long
def test_sigkill_at_any_time(undisturbed, clips_folder, native_checkpoint, tmp_path):
    """From outside, as a machine that is taken away; wherever it hits."""
    process = start(tmp_path, clips_folder, native_checkpoint).process
    checkpoints = tmp_path / "outputs/checkpoints"
    for _ in range(1200):
        if list(checkpoints.glob("checkpoint-12/*")) or process.exitcode is not None:
            break
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = run(tmp_path, clips_folder, native_checkpoint, "--resume_from_checkpoint", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_outcome(tmp_path, undisturbed)


@pytest.mark.long
def test_adapters_resume_as_well(clips_folder, native_checkpoint, tmp_path):
    flags = ["--lora_rank", "2", "--epochs", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, clips_folder, native_checkpoint, *flags).returncode == 0
    blow = ["SIGTERM in step", "5"]
    told = run(parts, clips_folder, native_checkpoint, *flags, blow=blow)
    assert "saved at step 6" in told.stdout
    resume = ["--resume_from_checkpoint", "auto"]
    resumed = run(parts, clips_folder, native_checkpoint, *flags, *resume)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_outcome(parts, outcome(whole))


@pytest.mark.long
def test_save_minutes_bounds_what_a_sudden_end_costs(
    undisturbed, clips_folder, native_checkpoint, tmp_path
):
    """Nobody sends a signal: the checkpoint of the step before is there, in the middle of an epoch.

    A pause of three milliseconds is over at each step."""
    often = ["--save_minutes", "5e-5", "--save_total_limit", "9"]
    killed = run(tmp_path, clips_folder, native_checkpoint, *often, blow=["SIGKILL in save", "7"])
    assert killed.returncode == -signal.SIGKILL
    resumed = run(tmp_path, clips_folder, native_checkpoint, "--resume_from_checkpoint", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from outputs/checkpoints/checkpoint-6" in resumed.stdout
    assert_same_outcome(tmp_path, undisturbed)


@pytest.mark.long
def test_checkpoints_stay_out_of_the_model(undisturbed, clips_folder, native_checkpoint, tmp_path):
    result = run(tmp_path, clips_folder, native_checkpoint, "--max_steps", "3")
    assert result.returncode == 0, result.stderr
    files = {path.name for path in (tmp_path / "outputs/model").rglob("*")}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json",
                     "run_record.json", "trainer_state.json"}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(clips_folder, native_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    run(folder, clips_folder, native_checkpoint, "--max_steps", "3")
    return folder / "outputs/checkpoints/checkpoint-3"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
             "trainer_state.json"]
)  # fmt: skip
@pytest.mark.parametrize("how", ["missing", "cut off", "empty"])
def newest(folder, **plan):
    """What --resume_from_checkpoint auto takes there."""
    flags = ["--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    return train.checkpoint_to_resume(train.parse_arguments(flags), plan)


PARTS = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("how", ["missing", "cut off", "empty"])
@pytest.mark.long
def test_a_checkpoint_that_is_not_complete_is_passed_over(name, how, checkpoint, tmp_path, capsys):
    old, new = tmp_path / "checkpoint-3", tmp_path / "checkpoint-10"
    shutil.copytree(checkpoint, old)
    shutil.copytree(checkpoint, new)
    (tmp_path / "checkpoint-10.sagemaker-uploaded").touch()  # what S3's mirror leaves
    assert newest(tmp_path) == str(new)  # by number, not by letter
    assert capsys.readouterr().out == ""
    data = (new / name).read_bytes()
    (new / name).unlink()
    if how != "missing":
        (new / name).write_bytes(data[: len(data) // 2] if how == "cut off" else b"")
    assert newest(tmp_path) == str(old)
    assert f"{new} is not complete and is passed over" in capsys.readouterr().out


def test_a_damaged_optimiser_is_passed_over(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    data = bytearray((tmp_path / "checkpoint-3" / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1  # as long as before, but for one bit the same
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(data)
    assert newest(tmp_path) is None
    assert "optimizer.pt is damaged" in capsys.readouterr().out


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest(tmp_path / "none") is None
    (tmp_path / "checkpoint-best").mkdir()
    assert newest(tmp_path) is None


@pytest.mark.parametrize("how", ["old names", "pytorch_model.bin"])
def test_a_checkpoint_of_another_trainer_is_refused(how, checkpoint, tmp_path):
    """The reported value: one of transformers 4 went on with the biases of the base model, or was
    called incomplete, and the run began anew at step 0."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    weights = load_file(checkpoint / "model.safetensors")
    names = {name: name.replace("query.bias", "q_bias").replace("value.bias", "v_bias")
             for name in weights}  # fmt: skip
    old = {names[name]: tensor for name, tensor in weights.items()}
    (tmp_path / "checkpoint-3" / "plan.json").unlink()
    if how == "old names":
        save_file(old, tmp_path / "checkpoint-3" / "model.safetensors", metadata={"format": "pt"})
    else:
        (tmp_path / "checkpoint-3" / "model.safetensors").unlink()
        torch.save(old, tmp_path / "checkpoint-3" / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match="checkpoint-3 is of another run: no .*plan.json. .*--model_name"
    ):
        newest(tmp_path, seed=42)


# ---- Another run: what a step means


CLIPS, STEP = "training clips", "train_batch_size x processes x gradient_accumulation_steps"


def resumed(clips_folder, native_checkpoint, *flags):
    """How often each clip is read after resuming, by the name of its file."""
    seen, read = Counter(), train.read_train_clip

    def counted(path, args, draw):
        seen[os.path.relpath(path, clips_folder)] += 1
        return read(path, args, draw)

    base = ["--dataset", str(clips_folder), "--model_name", str(native_checkpoint)]
    base += ["--resume_from_checkpoint", "auto", "--dataloader_num_workers", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "read_train_clip", counted)
        train.train(train.parse_arguments([*base, *flags]))
    return seen


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--train_batch_size", "8"], f"{STEP} was 4 and is 8. Go back, or begin anew"),
        (["--train_batch_size", "2"], f"{STEP} was 4 and is 2. Go back, or begin anew"),
        (["--gradient_accumulation_steps", "2"], f"{STEP} was 4 and is 8. Go back, or begin anew"),
        (["--gradient_accumulation_steps", "8"], f"{STEP} was 4 and is 32"),
        (["--seed", "7"], "seed was 42 and is 7"),
        (["--sampling", "dense"], "rate was 0 and is 4"),
        (["--num_frames", "8"], "num_frames was 4 and is 8"),
        (["--freeze", "backbone"], "freeze was none and is backbone"),
        (["--lora_rank", "2"], "lora_rank was 0 and is 2"),
    ],
)
@pytest.mark.long
def test_a_step_that_means_something_else_is_refused(
    flags, message, clips_folder, native_checkpoint, checkpoint, tmp_path, monkeypatch
):
    """The reported values: three of four epochs at twice the batch, four and a half at half of it,
    a model of two epochs saved as the finished one at four times the batch."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "outputs/checkpoints/checkpoint-3")
    with pytest.raises(ValueError, match=message):
        resumed(clips_folder, native_checkpoint, "--seed", "42", *flags)
    assert not list((tmp_path / "outputs/model").iterdir())


def test_more_clips_or_others_are_refused(
    clips_folder, native_checkpoint, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "outputs/checkpoints/checkpoint-3")
    shutil.copytree(clips_folder, tmp_path / "more")
    one = sorted((tmp_path / "more").glob("train/*/*.mp4"))[0]
    shutil.copy(one, one.with_name("new.mp4"))
    with pytest.raises(ValueError, match=f"{CLIPS} was 16 .* and is 17 .*"):
        resumed(tmp_path / "more", native_checkpoint)
    one.unlink()  # as many as before, but not the same
    with pytest.raises(ValueError, match=f"{CLIPS} was 16 .* and is 16 .*"):
        resumed(tmp_path / "more", native_checkpoint)


@pytest.mark.long
def test_the_same_step_of_other_parts_goes_on(
    clips_folder, native_checkpoint, checkpoint, tmp_path, monkeypatch
):
    """Batch 2 twice is batch 4, and elsewhere the clips may lie in another folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "outputs/checkpoints/checkpoint-3")
    shutil.copytree(clips_folder, tmp_path / "elsewhere")
    flags = ["--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--epochs", "3"]
    seen = resumed(tmp_path / "elsewhere", native_checkpoint, *flags)
    assert len(seen) == 16 and sum(seen.values()) == 36  # 12 were seen before: three times each
    assert sorted(seen.values()) == [2] * 12 + [3] * 4


@pytest.mark.long
def test_a_batch_that_changed_is_not_hidden_by_a_muted_logger():
    code = "import logging, train; l = logging.getLogger('transformers.trainer_utils'); "
    code += "print(l.isEnabledFor(logging.WARNING)); l.warning('batch'); l.warning('mtime may not be reliable')"  # noqa: E501
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True
    )
    assert result.stdout == "True\n" and "batch" in result.stderr and "mtime" not in result.stderr


@pytest.mark.long
def test_the_checkpoint_is_told_and_other_labels_are_refused(
    clips_folder, native_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", str(clips_folder), "--model_name", str(native_checkpoint)]
    flags += ["--resume_from_checkpoint", "auto", "--epochs", "1", "--dataloader_num_workers", "0"]
    train.train(train.parse_arguments(flags))
    assert "going on" not in capsys.readouterr().out
    train.train(train.parse_arguments(flags))
    assert "going on from outputs/checkpoints/checkpoint-4" in capsys.readouterr().out
    for path in clips_folder.glob("*/*/*.mp4"):  # other labels, as many
        copy = tmp_path / "other" / path.parts[-3] / f"my_{path.parts[-2]}" / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    with pytest.raises(ValueError, match="is of another run.* another --output_dir"):
        train.train(train.parse_arguments([*flags, "--dataset", "other"]))


# ---- The callback by itself


@pytest.fixture
def watch():
    """(callback, step): `step` is the end of a step for it, and returns Trainer's control."""
    callback = train.Interruption()
    before = signal.getsignal(signal.SIGTERM)

    def step(epoch, world_size=1, save_minutes=0):
        args = SimpleNamespace(world_size=world_size, save_minutes=save_minutes, device="cpu")
        control = TrainerControl()
        callback.on_step_end(args, SimpleNamespace(epoch=epoch), control)
        return control

    callback.on_train_begin(None, None, None)
    yield callback, step
    signal.signal(signal.SIGTERM, before)


def test_a_signal_that_comes_while_processes_agree_is_heard_at_the_next_step(watch, monkeypatch):
    callback, step = watch

    def all_reduce(news, op):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert not step(0.25, world_size=2).should_training_stop
    control = step(0.5)
    assert control.should_training_stop and control.should_save


def test_the_stop_of_another_callback_is_no_sigterm(watch):
    callback, step = watch
    step(0.5)
    control = TrainerControl(should_training_stop=True)  # as early stopping sets it
    callback.on_train_end(None, SimpleNamespace(global_step=3, max_steps=9), control)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # what follows can be ended


def test_save_minutes_waits_for_the_evaluation_at_the_end_of_an_epoch(watch):
    """A checkpoint before it would be taken for one of an epoch that was evaluated."""
    callback, step = watch
    assert step(0.75, save_minutes=1e-9).should_save
    assert not step(1.0, save_minutes=1e-9).should_save
    callback.on_save(None, SimpleNamespace(epoch=1.0), None)
    assert not step(1.25, save_minutes=60).should_save


def test_a_signal_after_a_timed_checkpoint_is_heard(watch):
    callback, step = watch
    assert step(0.25, save_minutes=1e-9).should_save
    callback.on_save(None, SimpleNamespace(epoch=0.25), None)
    os.kill(os.getpid(), signal.SIGTERM)
    control = step(0.5)
    assert control.should_training_stop and control.should_save
