"""Clips, and short runs of the script on a GPU: fixtures. Nothing here needs tests/conftest.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av  # noqa: F401  before decord, as in tests/conftest.py
import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "notebooks" / "local_mode" / "tiny_videomae_v2"
# As notebook 3 launches it in local mode, without what is drawn at random for a clip's pixels.
FLAGS = """--epochs 8 --train_batch_size 16 --eval_batch_size 32 --learning_rate 4e-4
    --horizontal_flip true --logging_steps 5 --dataloader_num_workers 4""".split()


@pytest.fixture(scope="session")
def drawn_clips(tmp_path_factory):
    """Drawn clips: 320 to train on, 80 for validation, 400 to test."""
    from local_mode import clips

    counts = {"train": 320, "validation": 80, "test": 400}
    return clips.write_clips(tmp_path_factory.mktemp("clips") / "drawn", counts, height=120)


class Run:
    """train.py in a process of its own, with a folder of its own."""

    def __init__(self, folder, clips, *flags):
        self.folder = folder
        self.flags = ["--dataset", str(clips), "--model_name", str(TINY), *FLAGS, *flags]
        self.start()

    def start(self, *more):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SM_")}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "4"}
        self.log = (self.folder / "log").open("a")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "train.py"), *self.flags, *more],
            cwd=self.folder, env=environment, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def text(self):
        return (self.folder / "log").read_text()

    def kill_after(self, checkpoints, how=signal.SIGKILL):
        """Kills the run as soon as it has written that many checkpoints."""
        while len([*self.folder.glob("outputs/**/checkpoint-*/trainer_state.json")]) < checkpoints:
            assert self.process.poll() is None, self.text()
            time.sleep(0.05)
        self.process.send_signal(how)
        self.process.wait()

    def metrics(self):
        """metrics.json, and the loss of each logged step, once the run has ended."""
        assert self.process.wait() == 0, self.text()
        state = json.loads((self.folder / "outputs/model/trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        return json.loads((self.folder / "outputs/data/metrics.json").read_text()), losses


@pytest.fixture(scope="session")
def runs(drawn_clips, tmp_path_factory):
    """The same run in each precision, and a fourth in fp16 that is killed: side by side."""
    started = {
        name: Run(tmp_path_factory.mktemp(name), drawn_clips, "--precision", name[:4])
        for name in ("fp32", "fp16", "bf16", "fp16 killed")
    }
    yield started
    for run in started.values():
        run.process.kill()


@pytest.fixture(scope="session")
def segmented(tmp_path_factory):
    """Segmentation in each precision, side by side: {precision: (its folder, its process)}."""
    from local_mode import clips

    folder = tmp_path_factory.mktemp("segmentation")
    videos = clips.write_davis(folder / "videos", {"train": 64, "val": 8}, height=80, frames=6)
    flags = """--epochs 4 --train_batch_size 8 --clip_length 4 --crop_size 80 --decoder_width 64
        --learning_rate 3e-3 --logging_steps 8 --dataloader_num_workers 4""".split()
    script, started = ROOT / "scripts" / "train_segmentation.py", {}
    for precision in ("fp32", "fp16", "bf16"):
        own = folder / precision
        own.mkdir()
        process = subprocess.Popen(
            [sys.executable, script, "--dataset", videos, "--model_name", TINY, *flags,
             "--precision", precision],
            cwd=own, stdout=(own / "log").open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        started[precision] = own, process
    yield started
    for _, process in started.values():
        process.kill()
