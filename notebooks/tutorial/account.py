"""Where the notebooks work, and as whom: the AWS account, and run.json, which connects them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from local_mode import aws

HERE = Path(__file__).resolve().parent.parent  # notebooks/
ABSENT = ("404", "NoSuchBucket", "NotFound")


@dataclass
class Account:
    """An AWS account in one Region, and what run.json knows of it. The notebooks call it `here`."""

    output: Path  # the folder of run.json, of pictures and models
    run: dict  # run.json, as it is on the disk
    session: boto3.Session | None = None  # of the Region

    def remember(self, **values) -> None:
        """Adds `values` to run.json, at once: what is not written down is never deleted."""
        self.run.update(values)
        (self.output / "run.json").write_text(json.dumps(self.run, indent=2))


def read_run(output_dir) -> Account:
    """run.json in `output_dir`, without a word to AWS; an empty one if there is none yet."""
    output = Path(output_dir).resolve()
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    file = output / "run.json"
    return Account(output, json.loads(file.read_text()) if file.exists() else {})


def connect(output_dir="outputs", check: bool = True) -> Account:
    """The account that notebook 1 wrote into run.json.

    `check`: whether the bucket must still be there. Raises RuntimeError with the notebook to run.
    """
    here = read_run(output_dir)
    if "role_arn" not in here.run:
        raise RuntimeError(
            f"{output_dir} has no run.json of notebook 1: run 01_setup.ipynb first, with the same "
            "output_dir. (All deleted by 06_clean_up? Then 01_setup is the way back.)"
        )
    aws.connect(here.run["endpoint_url"])
    os.environ["AWS_DEFAULT_REGION"] = here.run["region"]  # where the SDK reads the job's log
    here.session = boto3.Session(region_name=here.run["region"])
    if check and not bucket_exists(here.session, here.run["bucket"]):
        raise RuntimeError(
            "The bucket of run.json is gone. The embedded AWS lives until 06_clean_up or until this "
            "computer restarts, and its jobs end with it. Run 01_setup.ipynb again, then go on; "
            "clips and pictures in output_dir are still there."
        )
    return here


def bucket_exists(session: boto3.Session, bucket: str) -> bool:
    """Whether the bucket is there and may be used. Raises RuntimeError if it is not yours."""
    try:
        session.client("s3").head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] in ABSENT:
            return False
        raise RuntimeError(f"bucket {bucket!r} belongs to somebody else: name another") from error
    return True
