"""The guide bring_your_own_clips: clips from S3, both ways to a training set, what run.json has."""

import json
import subprocess
import sys
from pathlib import Path

import boto3
import pandas as pd
import prepare_clips
import pytest
from cells import notebook_cells, run_cell
from conftest import ROOT
from embedded import own_aws
from local_mode import clips as drawn
from tutorial import account

GUIDE, BUCKET = "how_to/bring_your_own_clips", "clips-of-mine"


@pytest.fixture(autouse=True)
def in_notebooks(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")


@pytest.fixture
def here(tmp_path):
    """The account of an embedded AWS, with a bucket, as notebook 1 leaves it in run.json."""
    with own_aws() as port:
        here = account.read_run(tmp_path)
        here.remember(endpoint_url=f"http://127.0.0.1:{port}", region="us-east-1")
        here.remember(account="123456789012")
        here.remember(bucket=BUCKET, role_arn="role", dataset="clips of notebook 2")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=BUCKET)
        yield here


def test_clips_come_from_s3_and_the_tutorial_keeps_its_own(here):
    s3 = boto3.client("s3", region_name="us-east-1")
    for clip in ("train/a/1.mp4", "train/b/2.mp4"):
        s3.put_object(Bucket=BUCKET, Key=f"theirs/{clip}", Body=b"clip")
        s3.put_object(Bucket=BUCKET, Key=f"theirs2/{clip}", Body=b"other")
    known = {"account": account, "here": here, "output_dir": str(here.output)}
    made = run_cell(GUIDE, "s3-clips", dataset=f"s3://{BUCKET}/theirs", **known)
    files = {p.relative_to(made["dataset"]).as_posix() for p in made["dataset"].rglob("*.*")}
    assert files == {"train/a/1.mp4", "train/b/2.mp4"}
    assert {path.read_bytes() for path in made["dataset"].rglob("*.mp4")} == {b"clip"}
    assert account.read_run(here.output).run["dataset"] == "clips of notebook 2"
    with pytest.raises(FileNotFoundError, match=f"nothing lies below s3://{BUCKET}/no/"):
        run_cell(GUIDE, "s3-clips", dataset=f"s3://{BUCKET}/no", **known)


def prepare(tmp_path, **given) -> dict:
    """What the cell that makes the training set leaves: its clips, and the folder `own`."""
    modules = {"subprocess": subprocess, "sys": sys, "prepare_clips": prepare_clips}
    return run_cell(GUIDE, "prepare", here=account.read_run(tmp_path), **modules, **given)


def counted(made) -> dict[str, int]:
    """Clips of each split, as the table of the guide has them."""
    cell = next(cell for cell in notebook_cells(GUIDE) if cell.id == "counts")
    shown = {"json": json, "pd": pd, "own": made["own"]}
    first, last = cell.source.rstrip().rsplit("\n", 1)
    exec(first, shown)
    return eval(last, shown).groupby("split")["clips"].sum().to_dict()


def test_recordings_are_cut_by_the_table_and_clips_are_taken_as_they_are(tmp_path, clips_folder):
    recordings, table, rows = tmp_path / "recordings", tmp_path / "table.csv", []
    recordings.mkdir()
    for number in range(3):
        file, size = f"{number}.mp4", {"width": 64, "height": 64, "rate": 12}
        drawn.draw_long_video(recordings / file, seed=number, seconds=12, **size)
        rows += [(file, start, start + 2, "raising_hand") for start in (1, 6)]
    pd.DataFrame(rows, columns=["file", "start", "end", "label"]).to_csv(table, index=False)
    from_table = {"recordings": recordings, "table": table, "background": 2}
    # clips in all three splits, in a new folder
    made = prepare(tmp_path, dataset=str(clips_folder), **from_table)
    counts = {split: len(part) for split, part in made["clips"].items()}
    assert counts == {"train": 16, "validation": 8, "test": 12}
    assert counted(made) == counts
    # then recordings, into the same folder: nothing of those clips is left in it
    made = prepare(tmp_path, dataset=None, **from_table)
    listed = pd.read_csv(made["own"] / "metadata.csv")
    assert listed["label"].value_counts().to_dict() == {"raising_hand": 6, "background": 6}
    assert (listed.groupby("group")["split"].nunique() == 1).all()  # no recording in two splits
    assert sum(len(part) for part in made["clips"].values()) == 12
    assert sum(counted(made).values()) == 12


def test_the_clips_are_for_training_only_if_asked(tmp_path):
    here = account.read_run(tmp_path)
    here.remember(dataset="clips of notebook 2")
    given = {"here": here, "own": Path("own_clips"), "clips": {"train": "1234", "test": "12"}}
    run_cell(GUIDE, "use", use_for_training=False, **given)
    assert account.read_run(tmp_path).run == {"dataset": "clips of notebook 2"}
    run_cell(GUIDE, "use", use_for_training=True, **given)
    counts = {"train": 4, "test": 2}
    assert account.read_run(tmp_path).run == {"dataset": "own_clips", "clip_counts": counts}
