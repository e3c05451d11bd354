"""scripts/train.py under torchrun, on CPU with gloo: the same curve, metrics and files as alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT
from embedded import free_port
from safetensors.torch import load_file

SCRIPT = ROOT / "scripts" / "train.py"
FLAGS = """--epochs 3 --learning_rate 1e-3 --dataloader_num_workers 1 --logging_steps 1
    --eval_batch_size 3""".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def start(folder, command, clips_folder, checkpoint, *flags, **more):
    folder.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
    data = ["--dataset", str(clips_folder), "--model_name", str(checkpoint)]
    return subprocess.Popen(
        [*command, *data, *FLAGS, *flags], cwd=folder, env=clean | {"OMP_NUM_THREADS": "1"} | more,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def pair(folder, clips_folder, checkpoint, *flags, **code):
    """Two ranks that have ended, with the variables that torchrun gives them."""
    folder.mkdir(exist_ok=True)
    flags = ["--dataset", clips_folder, "--model_name", checkpoint, *FLAGS, *flags]
    given = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        forked.Run(folder, flags, **code, **given, RANK=rank, LOCAL_RANK=rank) for rank in "01"
    ]
    return [rank.wait() for rank in ranks]


def outcome(folder):
    state = json.loads((folder / "outputs/model/trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    metrics = json.loads((folder / "outputs/data/metrics.json").read_text())
    weights = load_file(folder / "outputs/model/model.safetensors")
    return losses, metrics, torch.cat([tensor.flatten() for tensor in weights.values()])


@pytest.fixture(scope="module")
def alone(clips_folder, native_checkpoint, tmp_path_factory):
    """One process with twice the batch."""
    folder = tmp_path_factory.mktemp("alone")
    flags = ["--dataset", clips_folder, "--model_name", native_checkpoint, *FLAGS]
    run = forked.Run(folder, [*flags, "--train_batch_size", "8"]).wait()
    assert run.returncode == 0, run.stderr
    return outcome(folder)


def assert_equivalent(folder, alone):
    """Within 2e-5: the gradients are added up in another order, and AdamW divides by their size."""
    losses, metrics, weights = outcome(folder)
    assert losses == pytest.approx(alone[0], abs=2e-5) and len(losses) == 6
    for name in ("eval_accuracy", "eval_f1", "test_accuracy", "test_f1"):
        assert metrics[name] == alone[1][name]
    # 8 and 12 clips in batches of three on two processes: padded, and yet each clip counts once.
    for name in ("eval_loss", "test_loss"):
        assert metrics[name] == pytest.approx(alone[1][name], abs=2e-5)
    torch.testing.assert_close(weights, alone[2], atol=2e-4, rtol=0)


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_two_processes_equal_one_with_twice_the_batch(
    alone, clips_folder, native_checkpoint, tmp_path
):
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", SCRIPT]
    output = finished(
        start(tmp_path, command, clips_folder, native_checkpoint, "--train_batch_size", "4")
    )
    assert_equivalent(tmp_path, alone)
    assert (
        output.count("'eval_loss'") == 4 and output.count("weights learn, in fp32 on 2 x cpu") == 1
    )
    names = {Path(name).name for name in files(tmp_path / "outputs")}
    assert {"rng_state_0.pth", "rng_state_1.pth", "metrics.json"} <= names


@pytest.mark.long
def test_two_nodes_equal_one_and_only_the_first_writes(
    alone, clips_folder, native_checkpoint, tmp_path
):
    port = 29_000 + os.getpid() % 1000
    nodes = []
    for rank in (0, 1):
        command = f"--nnodes 2 --node_rank {rank} --nproc_per_node 1 --master_port {port}"
        command = [*TORCHRUN, *command.split(), "--master_addr", "127.0.0.1", SCRIPT]
        flags = ["--train_batch_size", "4"]
        folder = tmp_path / str(rank)
        nodes.append(start(folder, command, clips_folder, native_checkpoint, *flags))
    for process in nodes:
        finished(process)
    assert_equivalent(tmp_path / "0", alone)
    # Of the second node come only its random states, which belong to its checkpoints.
    written = files(tmp_path / "1")
    assert written and all(re.search(r"checkpoint-\d+/rng_state_1.pth$", f) for f in written)


@pytest.mark.long
def test_an_interrupted_pair_goes_on(alone, clips_folder, native_checkpoint, tmp_path):
    """One of them gets the signal, and both save after the same step."""
    blow = """
import os, signal
import train
step = train.ClipTrainer.training_step
def told(self, *args, **kwargs):
    if self.state.global_step == 2 and self.args.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # to one of them: the other must hear of it
    return step(self, *args, **kwargs)
train.ClipTrainer.training_step = told
train.main()
"""
    batch = ["--train_batch_size", "4", "--save_strategy", "epoch"]
    told, _ = pair(tmp_path, clips_folder, native_checkpoint, *batch, code=blow)
    assert "SIGTERM: saved at step 3" in told.stdout  # in the middle of an epoch of two
    flags = [*batch, "--resume_from_checkpoint", "auto"]
    for rank in pair(tmp_path, clips_folder, native_checkpoint, *flags):
        assert rank.returncode == 0, rank.stderr
    assert_equivalent(tmp_path, alone)


@pytest.mark.long
def test_one_failing_process_ends_the_job_with_its_message(
    clips_folder, native_checkpoint, tmp_path
):
    fail = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import train
step = train.ClipTrainer.training_step
def failing(self, *args, **kwargs):
    if self.state.global_step == 2 and self.args.process_index == 1:
        raise ValueError("clips/train/a/7.mp4: damaged on this machine only")
    return step(self, *args, **kwargs)
train.ClipTrainer.training_step = failing
train.main()
"""
    (tmp_path / "fail.py").write_text(fail)
    (tmp_path / "output").mkdir()
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", str(tmp_path / "fail.py")]
    more = {"SM_OUTPUT_DIR": str(tmp_path / "output")}
    output = finished(start(tmp_path, command, clips_folder, native_checkpoint, **more), code=1)
    reason = "rank 1: ValueError: clips/train/a/7.mp4: damaged on this machine only"
    assert (tmp_path / "output" / "failure").read_text().startswith(reason)
    assert "damaged on this machine only" in output
    assert not list((tmp_path / "outputs/model").iterdir())


@pytest.mark.long
def test_bad_clips_are_found_by_all_processes_together(clips_folder, native_checkpoint, tmp_path):
    copy = tmp_path / "copy"
    for path in clips_folder.glob("*/*/*.mp4"):
        target = copy / path.relative_to(clips_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    broken = sorted(copy.glob("train/*/*.mp4"))[:3]
    for path in broken:
        path.unlink()
        path.write_bytes(b"no video")
    flags = ["--on_bad_clip", "skip", "--train_batch_size", "4", "--epochs", "1"]
    ranks = pair(tmp_path / "job", copy, native_checkpoint, *flags)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    assert [rank.stdout.count("3 of 36 clips cannot be read") for rank in ranks] == [1, 0]
    metrics = json.loads((tmp_path / "job/outputs/data/metrics.json").read_text())
    assert sorted(metrics["skipped_clips"]) == sorted(map(str, broken))
