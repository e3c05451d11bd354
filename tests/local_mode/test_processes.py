"""SIGTERM goes to a job's process 1 alone, as in a container: below a shell no script hears of it.

Each test runs twice: with a PID namespace, and with what stands in for it where none is allowed.
"""

import textwrap

import boto3
import psutil
import pytest
from account import (
    BUCKET,
    FINAL,
    ROLE,
    artefact,
    describe,
    finish,
    keys,
    log,
    run,
    wait_until,
)
from embedded import own_aws
from local_mode import aws

SCRIPT = """
    import argparse, os, pathlib, signal, subprocess, sys, time
    parser = argparse.ArgumentParser()
    parser.add_argument("--word")
    word = parser.parse_args().word

    def leave(*_):
        pathlib.Path(os.environ["SM_MODEL_DIR"], "marker").write_text(word)
        print("saved after SIGTERM")
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    # Somebody must end it as well. One that leaves the group is found only in a namespace.
    subprocess.Popen(["sleep", "600"], start_new_session=os.getpid() == 1)
    print("started")
    time.sleep(600)
"""
WITHOUT_EXEC = ["/bin/bash", "-c", 'python3 -u -c "$1"; true', "bash"]


@pytest.fixture(scope="module", params=[True, False], ids=["namespace", "no namespace"])
def port(request):
    with own_aws(grace_seconds=3, spot_interruptions=0, namespaces=request.param) as port:
        if request.param and not aws.status(port)["namespaces"]:
            pytest.skip("this machine allows no PID namespace")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield port


@pytest.fixture(scope="module")
def sdk(port, tmp_path_factory):
    """sdk(name, **source): a job of the SDK's ModelTrainer with this SourceCode."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training.configs import Compute, OutputDataConfig, SourceCode
    from sagemaker.train import ModelTrainer

    def start(name, script=SCRIPT, parameters=None, **source):
        folder = tmp_path_factory.mktemp("source")
        (folder / "train.py").write_text(textwrap.dedent(script))
        trainer = ModelTrainer(
            sagemaker_session=Session(boto_session=boto3.Session(), default_bucket=BUCKET),
            role=ROLE,
            training_image="image:1",
            base_job_name=name,
            source_code=SourceCode(source_dir=str(folder), **source),
            compute=Compute(instance_type="ml.m5.large", instance_count=1, volume_size_in_gb=30),
            hyperparameters=parameters or {},
            output_data_config=OutputDataConfig(s3_output_path=f"s3://{BUCKET}/out"),
        )
        trainer.train(wait=False)
        name = trainer._latest_training_job.training_job_name
        # Two processes of torch start slowly on a busy machine.
        running = lambda: describe(name)["TrainingJobStatus"] not in FINAL  # noqa: E731
        wait_until(lambda: "started" in log(name) or not running(), 240, lambda: log(name))
        return name

    return start


def stop(name):
    boto3.client("sagemaker").stop_training_job(TrainingJobName=name)
    return finish(name)


def running(port, kind, name):
    """The processes that work in a job's folder."""
    folder = f"{aws.status(port)['folder']}/{kind}/{name}/127.0.0.1"
    processes = psutil.process_iter(["cwd", "cmdline"])
    return [p.info["cmdline"] for p in processes if (p.info["cwd"] or "").startswith(folder)]


def test_a_script_that_the_shell_has_become_is_told(sdk, port):
    """With `exec` the SDK's shell turns into the script, which is process 1 then."""
    name = sdk("told", command="exec python3 train.py", args=["--word", "a b"])
    assert ["sleep", "600"] in running(port, "jobs", name)
    answer = stop(name)
    assert (answer["TrainingJobStatus"], answer["SecondaryStatus"]) == ("Stopped", "Stopped")
    assert artefact(name) == {"marker": "a b"}
    assert "saved after SIGTERM" in log(name)
    wait_until(lambda: not running(port, "jobs", name))  # a container takes everything with it


def test_a_script_below_a_shell_never_hears_of_it(sdk, port):
    """The SDK's own way to start a script: by its shell and its driver."""
    name = sdk("deaf", entry_script="train.py", parameters={"word": "x"})
    answer = stop(name)
    assert (answer["TrainingJobStatus"], answer["SecondaryStatus"]) == ("Stopped", "Stopped")
    stopping = next(x for x in answer["SecondaryStatusTransitions"] if x["Status"] == "Stopping")
    assert (stopping["EndTime"] - stopping["StartTime"]).total_seconds() >= 3  # the whole grace
    assert artefact(name) == {}
    assert log(name)[-1] == "started"
    wait_until(lambda: not running(port, "jobs", name))


@pytest.mark.parametrize("why", ["MaxRuntimeExceeded", "Interrupted"])
def test_nor_of_the_end_of_its_time_or_of_its_instance(why, port):
    """It has the status of an end by a limit or by a taken instance, and its log says nothing."""
    code = """
        import pathlib, signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("told")))
        checkpoints = pathlib.Path("checkpoints")
        print("started", [path.name for path in checkpoints.iterdir()])
        if not list(checkpoints.glob("?")):
            (checkpoints / "1").write_text("saved")
            time.sleep(600)
    """
    name = f"shell-{why.lower()}"
    request = {
        "AlgorithmSpecification": {
            "TrainingImage": "none",
            "TrainingInputMode": "File",
            "ContainerEntrypoint": [*WITHOUT_EXEC, textwrap.dedent(code)],
        },
        "CheckpointConfig": {"S3Uri": f"s3://{BUCKET}/{name}/"},
    }
    if why == "Interrupted":
        limits = {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 60}
        run(name, "", EnableManagedSpotTraining=True, StoppingCondition=limits, **request)
        wait_until(lambda: keys(f"{name}/"))
        aws.interrupt(name, port)
        expected = "Completed"
    else:
        run(name, "", StoppingCondition={"MaxRuntimeInSeconds": 2}, **request)
        expected = "Stopped"
    answer = finish(name)
    assert answer["TrainingJobStatus"] == expected
    assert why in [step["Status"] for step in answer["SecondaryStatusTransitions"]]
    restarted = ["started ['1']"] * (why == "Interrupted")
    assert log(name) == ["started []", *restarted]
    wait_until(lambda: not running(port, "jobs", name))


@pytest.mark.parametrize("told", [True, False])
def test_processing_jobs_too(told, port):
    code = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("told")))
        print("started")
        time.sleep(600)
    """
    name, code = f"processing-{told}", textwrap.dedent(code)
    entry = ["python3", "-u", "-c", code] if told else [*WITHOUT_EXEC, code]
    cluster = {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1}
    client = boto3.client("sagemaker")
    client.create_processing_job(
        ProcessingJobName=name,
        RoleArn=ROLE,
        AppSpecification={"ImageUri": "none", "ContainerEntrypoint": entry},
        ProcessingResources={"ClusterConfig": cluster},
    )
    wait_until(lambda: log(name, kind="Processing"))
    client.stop_processing_job(ProcessingJobName=name)
    described = {"ProcessingJobName": name}
    state = "ProcessingJobStatus"
    wait_until(lambda: client.describe_processing_job(**described)[state] == "Stopped")
    assert log(name, kind="Processing") == ["started", "told"][: 2 if told else 1]
    wait_until(lambda: not running(port, "processing_jobs", name))


@pytest.mark.long
def test_torchrun_its_workers_and_theirs_work_and_are_told(sdk, port):
    """Several processes of torch, each with workers that load and a pool that is watched."""
    script = """
        import os, pathlib, signal, sys, time
        import pebble, psutil, torch, torch.distributed as dist

        def leave(*_):
            (pathlib.Path(os.environ["SM_MODEL_DIR"]) / os.environ["RANK"]).write_text("told")
            os._exit(0)

        if __name__ == "__main__":
            signal.signal(signal.SIGTERM, leave)
            dist.init_process_group("gloo")
            total = torch.tensor(1.0)
            dist.all_reduce(total)
            loader = torch.utils.data.DataLoader(range(8), batch_size=4, num_workers=2)
            with pebble.ProcessPool(max_workers=1) as pool:
                there = pool.schedule(os.getpid, timeout=60).result()
            assert there != os.getpid() and psutil.Process().name().startswith("python")
            found = sum(len(batch) for batch in loader)
            # In one write each: print() writes its "\\n" apart, after what the other has to say.
            os.write(1, f"sum {total.item()} of {found}\\n".encode())
            dist.barrier()
            os.write(1, b"started\\n")
            time.sleep(600)
    """
    name = sdk("torchrun", script, command="exec torchrun --nproc_per_node 2 train.py")
    assert log(name).count("sum 2.0 of 8") == 2, log(name)
    assert stop(name)["TrainingJobStatus"] == "Stopped"
    assert artefact(name) == {"0": "told", "1": "told"}
    wait_until(lambda: not running(port, "jobs", name))
