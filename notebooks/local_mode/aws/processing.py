"""Processing jobs: the request, inputs, outputs, last words, the answer."""

import json
from pathlib import Path

from .basics import ClientError, mapped
from .jobs import Job
from .storage import SyncedFolder


class ProcessingJob(Job):
    """A job that CreateProcessingJob asks for."""

    kind, folder_name, uses = "Processing", "processing_jobs", ["processing job usage"]
    processing_job_name = property(lambda job: job.name)  # these three are what moto's lists read
    processing_job_status = property(lambda job: job.status)
    processing_end_time = property(lambda job: job.end_time)

    def read_request(self):
        request = self.request
        self.specification = request["AppSpecification"]
        self.resources = request["ProcessingResources"]["ClusterConfig"]
        self.outputs = (request.get("ProcessingOutputConfig") or {}).get("Outputs") or []
        self.exit_message = None
        self.sources = [item.get("S3Input") or {} for item in request.get("ProcessingInputs", [])]
        usual = {"S3DataType": "S3Prefix", "S3InputMode": "File", "S3CompressionType": "None"}
        for end in [*self.sources, *(item.get("S3Output") or {} for item in self.outputs)]:
            path = end.get("LocalPath")
            if "S3Uri" not in end or any(end.get(x, usual[x]) != usual[x] for x in usual):
                raise ClientError("The embedded AWS copies files from and to an S3Prefix only.")
            if not f"{path}/".startswith("/opt/ml/processing/"):
                raise ClientError(f"LocalPath {path}: it must begin with /opt/ml/processing/.")
        for source in self.sources:
            self.list_input(source["S3Uri"])

    @property
    def response_object(self):
        """DescribeProcessingJob's answer: the request, and what became of it."""
        state = {
            "ProcessingJobArn": self.arn,
            "ProcessingJobStatus": self.status,
            "ProcessingResources": {"ClusterConfig": self.described_resources},
            "ExitMessage": self.exit_message,
            "FailureReason": self.failure_reason,
            "CreationTime": self.creation_time,
            "LastModifiedTime": self.last_modified_time,
            "ProcessingStartTime": self.start_time,
            "ProcessingEndTime": self.end_time,
        }
        return {name: value for name, value in (self.request | state).items() if value is not None}

    def stage(self, host, hosts, master_port):
        """Make the folder that the host's container would see as /opt/ml."""
        root = self.folder / host
        for folder in ("config", "output", "processing"):
            (root / folder).mkdir(parents=True)
        for source in self.sources:
            self.download_input(source, Path(mapped(source["LocalPath"], root)), host, hosts)
        for script in (root / "processing").rglob("runproc.sh"):  # of the SDK's FrameworkProcessor
            script.write_text(mapped(script.read_text(), root))
        for output in self.outputs:
            Path(mapped(output["S3Output"]["LocalPath"], root)).mkdir(parents=True, exist_ok=True)
        configs = {
            "resourceconfig": self.resource_config(host, hosts),
            "processingjobconfig": self.request | {"ProcessingJobArn": self.arn},
        }
        for name, content in configs.items():
            (root / f"config/{name}.json").write_text(json.dumps(content))
        return root

    def synced(self, root, mode="Continuous"):
        """The folders of a host that S3 follows: while the job runs, or (EndOfJob) afterwards."""
        outputs = [item["S3Output"] for item in self.outputs]
        outputs = [output for output in outputs if output["S3UploadMode"] == mode]
        return [SyncedFolder(self, o["S3Uri"], mapped(o["LocalPath"], root)) for o in outputs]

    def upload(self, roots, failed):
        """Upload every host's outputs, unless the job has failed, and keep its last words."""
        messages = [root / "output/message" for root in roots]
        text = "".join(m.read_text(errors="replace") for m in messages if m.exists())
        self.exit_message = text[:1024] or None
        for root in [] if failed else roots:
            for folder in self.synced(root, "EndOfJob"):
                folder.sync()
