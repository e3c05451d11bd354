"""The guide bring_your_own_clips: clips from S3, and what the tutorial keeps of them."""

import json
import os

import boto3
import pytest
from cells import run_cells
from conftest import ROOT
from embedded import own_aws
from tutorial import account

GUIDE, BUCKET = "how_to/bring_your_own_clips", "clips-of-mine"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The account of an embedded AWS, with a bucket, as notebook 1 leaves it in run.json."""
    monkeypatch.chdir(ROOT / "notebooks")
    with own_aws() as port:
        os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        here = account.read_run(tmp_path)
        here.remember(endpoint_url=f"http://127.0.0.1:{port}", dataset="clips of notebook 2")
        yield here


def test_clips_come_from_s3_and_the_tutorial_keeps_its_own(here):
    for clip in ("train/a/1.mp4", "train/b/2.mp4"):
        boto3.client("s3").put_object(Bucket=BUCKET, Key=f"theirs/{clip}", Body=b"clip")
        boto3.client("s3").put_object(Bucket=BUCKET, Key=f"theirs2/{clip}", Body=b"other")
    parameters = {"output_dir": str(here.output), "dataset": f"s3://{BUCKET}/theirs"}
    made = run_cells(GUIDE, parameters, stop="try-dataset")
    files = {p.relative_to(made["dataset"]).as_posix() for p in made["dataset"].rglob("*.*")}
    assert files == {"train/a/1.mp4", "train/b/2.mp4"}
    assert json.loads((here.output / "run.json").read_text())["dataset"] == "clips of notebook 2"
    with pytest.raises(FileNotFoundError, match="nothing lies below"):
        run_cells(GUIDE, parameters | {"dataset": f"s3://{BUCKET}/no"}, stop="try-dataset")


def test_the_prepared_clips_are_for_training_only_if_asked(tmp_path, clips_folder, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    account.read_run(tmp_path).remember(dataset=str(clips_folder))
    for use, name in ((False, clips_folder.name), (True, "own_clips_prepared")):
        run_cells(GUIDE, {"output_dir": str(tmp_path), "use_for_training": use})
        run = account.read_run(tmp_path).run
        assert run["dataset"].endswith(name)
    assert run["clip_counts"] == {"train": 16, "validation": 8, "test": 12}
