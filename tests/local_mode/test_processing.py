"""Processing jobs really run, end and fail as on SageMaker."""

import textwrap

import boto3
import numpy as np
import prepare_clips
import pytest
from account import BUCKET, FINAL, ROLE, account_port, get, keys, log, put, wait_until  # noqa: F401
from botocore.exceptions import ClientError
from conftest import ROOT
from videos import every_frame, numbered, write_video


def process(name, code, count=1, inputs=(), outputs=(), **request):
    """Create a processing job that is one Python text: the request without the SDK."""
    request = {
        "ProcessingJobName": name,
        "RoleArn": ROLE,
        "AppSpecification": {
            "ImageUri": "none",
            "ContainerEntrypoint": ["python3", "-u", "-c", textwrap.dedent(code)],
        },
        "ProcessingResources": {
            "ClusterConfig": {
                "InstanceType": "ml.m5.large",
                "InstanceCount": count,
                "VolumeSizeInGB": 1,
            }
        },
        "ProcessingInputs": [{"InputName": str(i), "S3Input": x} for i, x in enumerate(inputs)],
        "ProcessingOutputConfig": {
            "Outputs": [{"OutputName": str(i), "S3Output": x} for i, x in enumerate(outputs)]
        },
    } | request
    boto3.client("sagemaker").create_processing_job(**request)


def into(uri, path, **more):
    return {"S3Uri": uri, "LocalPath": path, "S3DataType": "S3Prefix", "S3InputMode": "File"} | more


def out_of(path, uri, mode="EndOfJob"):
    return {"S3Uri": uri, "LocalPath": path, "S3UploadMode": mode}


def describe_processing(name):
    return boto3.client("sagemaker").describe_processing_job(ProcessingJobName=name)


def finish_processing(name):
    wait_until(lambda: describe_processing(name)["ProcessingJobStatus"] in FINAL)
    return describe_processing(name)


def test_a_processing_job(port):
    """Inputs whole and in shares, environment, both outputs, logs, last words."""
    code = """
        import json, os, pathlib, sys
        config = json.load(open("config/resourceconfig.json"))
        job = json.load(open("config/processingjobconfig.json"))
        whole, share = (pathlib.Path("processing", name) for name in ("whole", "share"))
        names = [sorted(p.name for p in folder.rglob("*.*")) for folder in (whole, share)]
        print(config["current_host"], config["hosts"], *names, os.environ["WHERE"])
        out = pathlib.Path(os.environ["WHERE"])
        (out / config["current_host"]).write_text(job["ProcessingJobName"])
        pathlib.Path("output/message").write_text("all is well ")
    """
    clips, out = f"s3://{BUCKET}/clips/train/", f"s3://{BUCKET}/processed"
    process(
        "processor",
        code,
        2,
        inputs=[
            into(clips, "/opt/ml/processing/whole"),
            into(clips, "/opt/ml/processing/share", S3DataDistributionType="ShardedByS3Key"),
        ],
        outputs=[
            out_of("/opt/ml/processing/out", f"{out}/end"),
            out_of("/opt/ml/processing/out", f"{out}/continuous/", "Continuous"),
        ],
        Environment={"WHERE": "/opt/ml/processing/out"},
    )
    answer = finish_processing("processor")
    assert answer["ProcessingJobStatus"] == "Completed", answer
    assert answer["ExitMessage"] == "all is well all is well "
    assert answer["ProcessingStartTime"] <= answer["ProcessingEndTime"]
    both = "['1.mp4', '2.mp4']"
    for number, share in ((1, "['1.mp4']"), (2, "['2.mp4']")):
        (line,) = log("processor", number, "Processing")
        assert line.startswith(f"127.0.0.{number} ['127.0.0.1', '127.0.0.2'] {both} {share} /")
    assert keys("processed/") == [
        *("processed/continuous/127.0.0.1", "processed/continuous/127.0.0.2"),
        *("processed/end/127.0.0.1", "processed/end/127.0.0.2"),
    ]
    assert get("processed/end/127.0.0.2") == b"processor"
    client = boto3.client("sagemaker")
    listed = client.list_processing_jobs(NameContains="processor")["ProcessingJobSummaries"]
    assert [job["ProcessingJobStatus"] for job in listed] == ["Completed"]
    client.delete_processing_job(ProcessingJobName="processor")
    with pytest.raises(ClientError, match="Could not find requested job"):
        describe_processing("processor")


def test_a_failing_processing_job(port):
    """It has a reason and last words, and the other host ends with it; nothing is uploaded."""
    code = """
        import json, pathlib, time
        pathlib.Path("processing/out/half").write_text("done")
        if json.load(open("config/resourceconfig.json"))["current_host"] == "127.0.0.1":
            time.sleep(600)
        pathlib.Path("output/message").write_text("2 bad clips")
        raise SystemExit(1)
    """
    output = out_of("/opt/ml/processing/out", f"s3://{BUCKET}/half")
    process("failing", code, 2, outputs=[output])
    answer = finish_processing("failing")
    assert answer["ProcessingJobStatus"] == "Failed"
    assert answer["FailureReason"] == "AlgorithmError: , exit code: 1"
    assert answer["ExitMessage"] == "2 bad clips"
    assert not keys("half")


def test_processing_jobs_stop(port):
    """By the API, with time to save; and at the limit of their time."""
    code = """
        import pathlib, signal, sys, time
        def leave(*_):
            pathlib.Path("processing/out/marker").write_text("saved")
            sys.exit(0)
        signal.signal(signal.SIGTERM, leave)
        print("started")
        time.sleep(600)
    """
    output = out_of("/opt/ml/processing/out", f"s3://{BUCKET}/stopped")
    process("stopped", code, outputs=[output])
    wait_until(lambda: log("stopped", 1, "Processing"))
    boto3.client("sagemaker").stop_processing_job(ProcessingJobName="stopped")
    assert finish_processing("stopped")["ProcessingJobStatus"] == "Stopped"
    assert get("stopped/marker") == b"saved"
    process("overdue", code, StoppingCondition={"MaxRuntimeInSeconds": 2})
    assert finish_processing("overdue")["ProcessingJobStatus"] == "Stopped"


def test_wrong_processing_requests(port):
    nothing = into(f"s3://{BUCKET}/nothing", "/opt/ml/processing/in")
    with pytest.raises(ClientError, match="No S3 objects found"):
        process("wrong", "", inputs=[nothing])
    with pytest.raises(ClientError, match="LocalPath /opt/ml/out: .* /opt/ml/processing/"):
        process("wrong", "", outputs=[out_of("/opt/ml/out", f"s3://{BUCKET}/out")])
    cluster = {"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 3, "VolumeSizeInGB": 1}
    with pytest.raises(ClientError, match="for processing job usage' is 2 Instances"):
        process("wrong", "", ProcessingResources={"ClusterConfig": cluster})


@pytest.mark.long
def test_clips_are_prepared_on_two_instances(port, tmp_path):
    """By the SDK: every clip once, and all together what one machine makes of them."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.processing import FrameworkProcessor
    from sagemaker.core.shapes import (
        ProcessingInput,
        ProcessingOutput,
        ProcessingS3Input,
        ProcessingS3Output,
    )

    names = ["train/wave/1.mp4", "train/wave/1.avi", "train/sit/2.mp4", "val/sit/3.mkv"]
    for place, name in enumerate(names):
        options = {"codec": "mpeg4"} if name.endswith("avi") else {}
        write_video(tmp_path / "clips" / name, numbered(12 + place), **options)
    (tmp_path / "clips/val/sit/bad.mp4").write_bytes(b"no video")
    (tmp_path / "clips/train/metadata.csv").write_text("file_name,label\nwave/1.avi,wave\n")
    flags = ["--on_bad_clip", "skip"]
    prepare_clips.main([str(tmp_path / "clips"), str(tmp_path / "prepared"), *flags])
    for path in (tmp_path / "clips").rglob("*.*"):
        put(f"raw/{path.relative_to(tmp_path / 'clips').as_posix()}", path.read_bytes())

    processor = FrameworkProcessor(
        sagemaker_session=Session(boto_session=boto3.Session(), default_bucket=BUCKET),
        role=ROLE,
        image_uri="image:1",
        base_job_name="prepare",
        command=["python3"],
        instance_type="ml.m5.xlarge",
        instance_count=2,
        max_runtime_in_seconds=300,
        env={"PIP_NO_INDEX": "1"},
    )
    processor.run(
        code="prepare_clips.py",
        source_dir=str(ROOT / "scripts"),
        inputs=[
            ProcessingInput(
                input_name="clips",
                s3_input=ProcessingS3Input(
                    s3_uri=f"s3://{BUCKET}/raw/",
                    s3_data_type="S3Prefix",
                    s3_input_mode="File",
                    s3_data_distribution_type="ShardedByS3Key",
                    local_path="/opt/ml/processing/input/clips",
                ),
            )
        ],
        outputs=[
            ProcessingOutput(
                output_name="prepared",
                s3_output=ProcessingS3Output(
                    s3_uri=f"s3://{BUCKET}/prepared/",
                    s3_upload_mode="EndOfJob",
                    local_path="/opt/ml/processing/output",
                ),
            )
        ],
        arguments=[
            *("/opt/ml/processing/input/clips", "/opt/ml/processing/output"),
            *("--resource_config", "/opt/ml/config/resourceconfig.json", *flags),
        ],
        wait=False,
        logs=False,
    )
    job = processor.latest_job
    job.wait(poll=1)
    name = job.processing_job_name
    logs = [log(name, number, "Processing") for number in (1, 2)]
    assert job.processing_job_status == "Completed", logs
    counts = [line.split()[0] for lines in logs for line in lines if "clips prepared" in line]
    assert len(counts) == 2 and sum(map(int, counts)) == len(names), logs
    made = {key.removeprefix("prepared/"): get(key) for key in keys("prepared/")}
    (report,) = (name for name in made if name.startswith("bad_clips_127.0.0."))
    made["bad_clips.json"] = made.pop(report)
    files = [path for path in (tmp_path / "prepared").rglob("*") if path.is_file()]
    one_machine = {p.relative_to(tmp_path / "prepared").as_posix(): p.read_bytes() for p in files}
    del one_machine["clips_report.json"]  # of several machines, none sees the whole
    assert made.keys() == one_machine.keys()
    for name, data in made.items():
        if not name.endswith(".mp4"):
            assert data == one_machine[name]
            continue
        clips = [tmp_path / "two.mp4", tmp_path / "prepared" / name]
        clips[0].write_bytes(data)
        ours, theirs = (every_frame(clip).astype(int) for clip in clips)
        # x264 does not write the same bits each time: seen in one of some dozens of encodings.
        assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 2, name
