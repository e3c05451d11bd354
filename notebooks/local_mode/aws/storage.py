"""S3, as jobs use it: addresses, listings, folders that a prefix follows, checkpoints."""

import contextlib
import os
from pathlib import Path


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


class SyncedFolder:
    """A folder that an S3 prefix follows, but for deletions."""

    def __init__(self, job, uri, folder):
        self.job, self.folder, self.sent = job, Path(folder), {}
        self.bucket, self.prefix = split_uri(f"{uri.rstrip('/')}/")
        self.folder.mkdir(parents=True, exist_ok=True)

    def files(self):
        """Each file, with what tells one version of it from the next."""
        # The script rotates its checkpoints: os.walk passes over a folder that has just gone.
        for place, _, names in os.walk(self.folder):
            for path in (Path(place, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    yield path, (path.stat().st_mtime_ns, path.stat().st_size)

    def sync(self):
        """Upload what is new or has changed, and tell if anything was."""
        uploaded = False
        for path, version in self.files():
            if self.sent.get(path) != version:
                key = f"{self.prefix}{path.relative_to(self.folder).as_posix()}"
                with contextlib.suppress(FileNotFoundError):
                    self.job.s3.upload_file(str(path), self.bucket, key)
                    self.sent[path], uploaded = version, True
        return uploaded


class Checkpoints(SyncedFolder):
    """A synced folder that begins as a copy of its prefix, and knows if it has got a new file."""

    def __init__(self, job, uri, folder):
        super().__init__(job, uri, folder)
        for key in list_keys(job.s3, self.bucket, self.prefix):
            job.download(self.bucket, key, self.folder / key[len(self.prefix) :])
        self.sent, self.has_new = dict(self.files()), False

    def sync(self):
        self.has_new |= super().sync()
