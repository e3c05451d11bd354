"""Training jobs: the request, channels, the SDK's drivers, checkpoints, the model, the answer."""

import json
import re
import tarfile

from .basics import ClientError, mapped
from .jobs import Job
from .storage import Checkpoints, MarkedFolder, split_uri


class TrainingJob(Job):
    """A job that CreateTrainingJob asks for."""

    kind, folder_name = "Training", "jobs"
    training_job_name = property(lambda job: job.name)  # these three are what moto's lists read
    training_job_status = property(lambda job: job.status)
    training_end_time = property(lambda job: job.end_time)

    def read_request(self):
        request = self.request
        self.specification = request.get("AlgorithmSpecification") or {}
        self.resources = request.get("ResourceConfig") or {}
        self.variables = {"TRAINING_JOB_NAME": self.name, "TRAINING_JOB_ARN": self.arn}
        definitions = self.specification.get("MetricDefinitions") or []
        self.patterns = {item["Name"]: re.compile(item["Regex"]) for item in definitions}
        self.checkpoints = request.get("CheckpointConfig") or {}
        self.tensorboard = request.get("TensorBoardOutputConfig") or {}
        self.checkpoint_path = self.checkpoints.get("LocalPath", "/opt/ml/checkpoints")
        self.tensorboard_path = self.tensorboard.get("LocalPath", "/opt/ml/output/tensorboard")
        for path in (self.checkpoint_path, self.tensorboard_path):
            if not path.startswith("/opt/ml/"):
                raise ClientError(f"LocalPath {path}: the embedded AWS needs one in /opt/ml.")
        if request.get("EnableManagedSpotTraining"):
            limits = request.get("StoppingCondition") or {}
            if limits.get("MaxWaitTimeInSeconds", 0) < limits.get("MaxRuntimeInSeconds", 1):
                raise ClientError(
                    "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal "
                    "to MaxRuntimeInSeconds"
                )
            self.uses = ["spot training job usage"]
            if self.checkpoints:
                self.interruptions_to_come = self.server.spot_interruptions
        else:
            self.uses = ["training job usage"]
        if self.resources.get("KeepAlivePeriodInSeconds"):
            if request.get("EnableManagedSpotTraining"):
                raise ClientError("KeepAlivePeriodInSeconds excludes EnableManagedSpotTraining.")
            self.uses.append("training warm pool usage")
        for channel in request.get("InputDataConfig") or []:
            source = channel["DataSource"].get("S3DataSource") or {}
            mode = channel.get("InputMode") or self.specification["TrainingInputMode"]
            if source.get("S3DataType") != "S3Prefix" or mode not in ("File", "FastFile"):
                raise ClientError(
                    f"Channel {channel['ChannelName']}: the embedded AWS reads an S3Prefix, in File"
                    " or FastFile mode."
                )
            self.list_input(source["S3Uri"])
        folder = request["OutputDataConfig"]["S3OutputPath"].rstrip("/")
        self.output = f"{folder}/{self.name}/output"

    @property
    def response_object(self):
        """DescribeTrainingJob's answer: the request, and what became of it."""
        state = {
            "TrainingJobArn": self.arn,
            "TrainingJobStatus": self.status,
            "SecondaryStatus": self.transitions[-1]["Status"],
            "SecondaryStatusTransitions": self.transitions,
            "FailureReason": self.failure_reason,
            "ResourceConfig": self.described_resources,
            "WarmPoolStatus": self.warm_pool and self.warm_pool.describe(),
            "CreationTime": self.creation_time,
            "LastModifiedTime": self.last_modified_time,
            "TrainingStartTime": self.start_time,
            "TrainingEndTime": self.end_time,
            "ModelArtifacts": {"S3ModelArtifacts": f"{self.output}/model.tar.gz"},
            "FinalMetricDataList": list(self.metrics.values()),
        }
        if self.start_time and self.end_time:
            trained = self.end_time - self.start_time
            seconds = state["TrainingTimeInSeconds"] = int(trained.total_seconds()) + 1
            spot = self.request.get("EnableManagedSpotTraining")
            state["BillableTimeInSeconds"] = max(1, int(seconds * 0.3)) if spot else seconds
        return {name: value for name, value in (self.request | state).items() if value is not None}

    def stage(self, host, hosts, master_port):
        """Make the folder that the host's container would see as /opt/ml."""
        root, channels = self.folder / host, {}
        for folder in ("input/config", "input/data", "model", "output/data"):
            (root / folder).mkdir(parents=True)
        for channel in self.request.get("InputDataConfig") or []:
            name, source = channel["ChannelName"], channel["DataSource"]["S3DataSource"]
            self.download_input(source, root / "input/data" / name, host, hosts)
            channels[name] = {
                "TrainingInputMode": "File",
                "S3DistributionType": source.get("S3DataDistributionType") or "FullyReplicated",
                "RecordWrapperType": "None",
            }
        adapt_drivers(root, master_port)
        parameters = self.request.get("HyperParameters") or {}
        configs = {
            "inputdataconfig": channels,
            "hyperparameters": {key: mapped(text, root) for key, text in parameters.items()},
            "resourceconfig": self.resource_config(host, hosts),
        }
        for name, content in configs.items():
            (root / f"input/config/{name}.json").write_text(json.dumps(content))
        return root

    def synced(self, root):
        """The folders of a host that S3 follows while the job runs."""
        folders = []
        if self.checkpoints:
            path = mapped(self.checkpoint_path, root)
            folders.append(Checkpoints(self, self.checkpoints["S3Uri"], path))
        if self.tensorboard:
            uri = f"{self.tensorboard['S3OutputPath'].rstrip('/')}/{self.name}/tensorboard-output"
            folders.append(MarkedFolder(self, uri, mapped(self.tensorboard_path, root)))
        return folders

    def upload(self, roots, failed):
        """Upload output.tar.gz, and model.tar.gz unless the job has failed."""
        for folder, name in [("output/data", "output"), ("model", "model")][: 1 if failed else 2]:
            archive = self.folder / f"{name}.tar.gz"
            with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
                for path in sorted((roots[0] / folder).iterdir()):
                    tar.add(path, arcname=path.name)
            self.s3.upload_file(str(archive), *split_uri(f"{self.output}/{archive.name}"))


def adapt_drivers(root, master_port):
    """Fit the job's copy of the SDK's driver scripts to its folder, and to one port on loopback.

    A namespace of processes gives neither /opt/ml nor the name algo-1; all else is as the SDK's.
    """
    for path in (root / "input/data/sm_drivers").rglob("*.*"):
        text = mapped(path.read_text(), root)
        text = text.replace('SM_MASTER_ADDR = "algo-1"', 'SM_MASTER_ADDR = "127.0.0.1"')
        text = text.replace("SM_MASTER_PORT = 7777", f"SM_MASTER_PORT = {master_port}")
        path.write_text(text)
