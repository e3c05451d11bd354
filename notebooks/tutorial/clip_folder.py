"""Folders of clips: a reader's own, prepared for training; and a small sample for a quick run."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from tutorial import SCRIPTS

REPORT = "clips_report.json"  # prepare_clips.py writes it into each folder that it has made


def prepared(dataset, output) -> Path:
    """Checks and re-encodes the clips of `dataset` below `output`; returns the folder to train on.

    dataset: a folder, an archive, or owner/name of a data set on the Hugging Face Hub; what
    prepare_clips.py has made before is returned as it is. Each data set has a folder of its own.
    Clips that lie there already are not made again; those that `dataset` has no more, or under
    another label, are deleted there. Raises ValueError for an S3 address, or with what the script
    has to say.
    """
    if str(dataset).startswith("s3:"):
        raise ValueError(
            f"{dataset}: this notebook works with clips on this computer. "
            "how_to/bring_your_own_clips.ipynb fetches clips from S3, and says how notebook 3 "
            "trains on the S3 address itself."
        )
    folder = Path(dataset).expanduser().resolve()
    if (folder / REPORT).is_file():
        return folder
    known = hashlib.sha256(str(folder if folder.exists() else dataset).encode()).hexdigest()[:8]
    output = Path(output) / f"{folder.name.partition('.')[0]}-{known}"
    command = [sys.executable, f"{SCRIPTS}/prepare_clips.py", str(dataset), str(output)]
    command += ["--mirror"]
    said = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:  # each step of a progress bar is a line
            bar = "%|" in line
            print(line.rstrip(), end="\r" if bar else "\n", flush=True)
            said += [] if bar else [line]
    if process.returncode:
        raise ValueError(f"{dataset}: {''.join(said).strip()[-2000:]}")
    return output.resolve()


def sample(clips, folder, clips_per_label: int) -> Path:
    """Copies the first clips of each split and label to <folder>/<split>/<label>/.

    clips: a DatasetDict of prepare_clips.load_clips. Deletes what was in `folder` before. Two clips
    of one label may have the same name: the second one gets its number in front.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for split, rows in clips.items():
        names, taken = rows.features["label"].names, {}
        for video, label in zip(rows["video"], rows["label"], strict=True):
            number = taken[label] = taken.get(label, 0) + 1
            if number <= clips_per_label:
                place = folder / split / names[label]
                place.mkdir(parents=True, exist_ok=True)
                name = Path(video["path"]).name
                there = (place / name).exists()
                shutil.copy(video["path"], place / (f"{number}_{name}" if there else name))
    return folder


def of_run(here):
    """The clips that notebook 2 wrote into run.json, as prepare_clips.load_clips returns them.

    Raises RuntimeError, with the notebook to run, if run.json names none on this computer.
    """
    import prepare_clips

    dataset = here.run.get("dataset")
    if not dataset or not Path(dataset).exists():
        raise RuntimeError(
            f"run.json names no clips on this computer ({dataset}): "
            "run 02_local_smoke_train.ipynb first, with the same output_dir"
        )
    return prepare_clips.load_clips(dataset)
