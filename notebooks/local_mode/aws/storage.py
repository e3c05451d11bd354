"""S3, as jobs use it: addresses, listings, folders that a prefix follows, checkpoints."""

import contextlib
import os
import sys
from pathlib import Path

from botocore.exceptions import ClientError as RequestError

MARKERS = (".sagemaker-uploading", ".sagemaker-uploaded")  # what the service leaves beside a file


def split_uri(uri):
    """s3://bucket/some/prefix -> bucket, some/prefix"""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def list_keys(s3, bucket, prefix):
    """Every key that begins with the prefix (text, not a folder), without folder markers."""
    try:
        pages = list(s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix))
    except s3.exceptions.ClientError as error:
        if error.response["Error"]["Code"] not in ("NoSuchBucket", "AccessDenied"):
            raise
        return []
    keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    return [key for key in keys if not key.endswith("/")]


def local_name(key, prefix):
    """Where an object lies in the folder that its prefix fills.

    Below the prefix if that is a folder; otherwise under the name of its own.
    """
    return key[len(prefix) + 1 if key.startswith(f"{prefix}/") else prefix.rfind("/") + 1 :]


class SyncedFolder:
    """A folder that an S3 prefix follows, but for deletions."""

    def __init__(self, job, uri, folder):
        self.job, self.folder, self.sent = job, Path(folder), {}
        self.bucket, self.prefix = split_uri(f"{uri.rstrip('/')}/")
        self.folder.mkdir(parents=True, exist_ok=True)

    def files(self):
        """Each file that is no marker, with what tells one version of it from the next."""
        # The script rotates its checkpoints: os.walk passes over a folder that has just gone.
        for place, _, names in os.walk(self.folder):
            for path in (Path(place, name) for name in names if not name.endswith(MARKERS)):
                with contextlib.suppress(FileNotFoundError):
                    yield path, (path.stat().st_mtime_ns, path.stat().st_size)

    def key(self, path):
        return f"{self.prefix}{path.relative_to(self.folder).as_posix()}"

    def upload(self, path):
        self.job.s3.upload_file(str(path), self.bucket, self.key(path))

    def sync(self):
        """Upload what is new or has changed, and tell if anything was."""
        uploaded = False
        for path, version in self.files():
            if self.sent.get(path) != version:
                with contextlib.suppress(FileNotFoundError):
                    self.upload(path)
                    self.sent[path], uploaded = version, True
        return uploaded


class MarkedFolder(SyncedFolder):
    """A synced folder of a training job: a marker tells how far each file's upload is."""

    def upload(self, path):
        uploading, uploaded = (path.with_name(path.name + marker) for marker in MARKERS)
        uploaded.unlink(missing_ok=True)
        uploading.touch()
        super().upload(path)
        uploading.rename(uploaded)


class Checkpoints(MarkedFolder):
    """A folder that begins as a copy of its prefix, and whose deletions reach S3.

    It knows if it has got a new file.
    """

    def __init__(self, job, uri, folder):
        super().__init__(job, uri, folder)
        prefix = split_uri(uri)[1]  # text: without a slash at its end, neighbours come as well
        for key in list_keys(job.s3, self.bucket, prefix):
            job.download(self.bucket, key, self.folder / local_name(key, prefix))
        self.sent, self.has_new = dict(self.files()), False

    def sync(self):
        self.has_new |= super().sync()
        for path in [path for path in self.sent if not path.exists()]:
            del self.sent[path]
            self.delete(self.key(path))

    def delete(self, key):
        """Delete an object. No document says what follows if the role may not: here, it stays."""
        try:
            self.job.s3.delete_object(Bucket=self.bucket, Key=key)
        except RequestError as error:
            if error.response["Error"]["Code"] != "AccessDenied":
                raise
            print(f"{self.job.name}: {key} stays in S3: {error}", file=sys.stderr)
