"""The tutorial for whoever set up Studio and nothing else: AmazonSageMakerFullAccess alone.

Caller and job act with that managed policy (moto's copy of it). All cells run, and the clean-up
deletes what the policy allows, and names the rest.
"""

import json
import os

import boto3
import pytest
import test_permissions as policies
import yaml
from conftest import ROOT
from embedded import forget_sdk_clients, own_aws
from local_mode import aws

NOTEBOOKS = ROOT / "notebooks"
FULL_ACCESS = "arn:aws:iam::aws:policy/AmazonSageMakerFullAccess"
ROLE = "AmazonSageMaker-ExecutionRole-20260101T000000"  # so called, whoever made Studio's domain


@pytest.mark.long
def test_the_tutorial_runs_and_its_end_says_what_stays(clips_folder, tmp_path, monkeypatch, capsys):
    with own_aws(grace_seconds=5, enforce=True):
        admin = boto3.Session(region_name=policies.REGION)
        iam = admin.client("iam")
        trust = json.dumps(policies.policy("trust_policy", role_name=ROLE))
        arn = iam.create_role(RoleName=ROLE, AssumeRolePolicyDocument=trust)["Role"]["Arn"]
        iam.attach_role_policy(RoleName=ROLE, PolicyArn=FULL_ACCESS)
        iam.create_user(UserName="studio")
        iam.attach_user_policy(UserName="studio", PolicyArn=FULL_ACCESS)
        key = iam.create_access_key(UserName="studio")["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        forget_sdk_clients()
        monkeypatch.chdir(NOTEBOOKS)
        monkeypatch.setenv("MPLBACKEND", "agg")
        monkeypatch.setattr(aws, "connect", lambda endpoint_url: endpoint_url)  # stays signed in
        monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        parameters = yaml.safe_load((NOTEBOOKS / "local_mode/parameters.yaml").read_text())
        parameters |= {"endpoint_url": os.environ["AWS_ENDPOINT_URL"], "output_dir": str(tmp_path)}
        parameters |= {"role_name": arn, "create_role": False, "epochs": 1}

        policies.run("01_setup", parameters)
        run_file = tmp_path / "run.json"
        choices = {"model_name": "local_mode/tiny_videomae_v2", "learning_rate": 4e-4}
        made = json.loads(run_file.read_text()) | {"dataset": str(clips_folder), "choices": choices}
        run_file.write_text(json.dumps(made))
        job = policies.run("03_remote_launch", parameters)["described"]
        assert job["TrainingJobStatus"] == "Completed"
        capsys.readouterr()
        with pytest.raises(RuntimeError, match="caller_policy.json") as error:
            policies.run("06_clean_up", parameters)

        left, name = policies.belongings(admin), job["TrainingJobName"]
        assert left["training jobs"] == [] and left["roles"] == [ROLE]  # it was there before
        assert left["buckets"] == [made["bucket"]], "DeleteBucket is not in the policy"
        objects = admin.resource("s3").Bucket(made["bucket"]).object_versions.all()
        assert list(objects) == [], "no clip, code, checkpoint or model is left to pay for"
        assert [stream.split("/")[0] for stream in left["log streams"]] == [name]
        said = str(error.value)
        assert name in said and "bucket" in said and policies.ACCOUNT not in said
        assert f"bucket/{made['bucket']}" in json.loads(run_file.read_text())["created"]
