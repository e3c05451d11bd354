"""A SageMaker Pipeline, prepare -> train -> condition -> register: its steps, checks and runs.

run.json has the pipeline and its group of models (deployed) before AWS has them, and the jobs of
each execution (jobs) as soon as AWS shows them, so 06_clean_up finds all.

Import this module after account.connect: sagemaker.mlops asks for a Region when it is imported.
"""

import json
import logging
import re
import time
import warnings

import pandas as pd
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator
from matplotlib.figure import Figure
from sagemaker.core import shapes
from sagemaker.core.processing import FrameworkProcessor
from sagemaker.core.workflow.execution_variables import ExecutionVariables
from sagemaker.core.workflow.functions import Join
from sagemaker.core.workflow.pipeline_context import PipelineSession
from sagemaker.mlops.workflow.model_step import ModelStep
from sagemaker.mlops.workflow.steps import ProcessingStep, TrainingStep
from sagemaker.serve.model_builder import ModelBuilder

from tutorial import SCRIPTS, endpoint, launch, pictures

TAGS = [{"Key": "project", "Value": "video-tutorial"}]
# The request that a type of step makes, and its field for the beginning of the job's name.
REQUESTS = {
    "Processing": ("CreateProcessingJob", "ProcessingJobName"),
    "Training": ("CreateTrainingJob", "TrainingJobName"),
    "RegisterModel": ("CreateModelPackage", None),
}
ENDED = ("Succeeded", "Failed", "Stopped", "CompletedWithFailures")
POLL_SECONDS = 3


# ---- Before: names, session ----------------------------------------------------------------------


def names(here) -> tuple[str, str]:
    """(pipeline, group of models): those of run.json, or new ones. Nothing is created."""
    known = dict(item.split("/") for item in here.run.get("deployed", []) if "pipeline/" in item)
    stamp = known["pipeline"][len("video-pipeline-") :] if known else time.strftime("%Y%m%d-%H%M%S")
    return f"video-pipeline-{stamp}", f"video-models-{stamp}"


def session(here, new_run) -> PipelineSession:
    """A session that writes requests down instead of sending them. new_run: of launch.new_run."""
    for handler in logging.getLogger().handlers:  # of the SDK, which tells each request it makes
        handler.setLevel(logging.ERROR)
    pd.set_option("display.max_colwidth", None)  # whole names
    warnings.filterwarnings("ignore", "Running within a PipelineSession")
    of_run = new_run.session
    return PipelineSession(
        here.session,
        default_bucket=here.run["bucket"],
        default_bucket_prefix=of_run.default_bucket_prefix,
        sagemaker_config=of_run.sagemaker_config,
    )


# ---- The steps -----------------------------------------------------------------------------------


class NamedTrainingStep(TrainingStep):
    """A TrainingStep that keeps the beginning of its job's name.

    ModelTrainer takes the name out of the request in a PipelineSession, although the pipeline asks
    for it (use_custom_job_prefix): https://github.com/aws/sagemaker-python-sdk/issues/5776
    """

    @property
    def arguments(self):
        trainer = self.step_args.func_args[0]
        return super().arguments | {"TrainingJobName": trainer.base_job_name}


def prepare_step(here, session, new_run, clips, instance_type="ml.m5.xlarge", max_minutes=60):
    """The step Prepare: prepare_clips.py on one machine; unreadable clips are left out.

    clips: the S3 address, or a parameter of the pipeline. The prepared clips of each execution lie
    in a folder of their own, below the output of `new_run`.
    """
    processor = FrameworkProcessor(
        sagemaker_session=session, role=here.run["role_arn"], command=["python3"],
        image_uri=launch.image(here, instance_type), base_job_name="video-prepare",
        instance_type=instance_type, instance_count=1, tags=TAGS,
        max_runtime_in_seconds=60 * max_minutes,
    )  # fmt: skip
    raw, ready = "/opt/ml/processing/input/clips", "/opt/ml/processing/output"
    source = shapes.ProcessingS3Input(
        s3_uri=clips, s3_data_type="S3Prefix", s3_input_mode="File", local_path=raw
    )
    folder = [new_run.output, ExecutionVariables.PIPELINE_EXECUTION_ID, "prepared/"]
    target = shapes.ProcessingS3Output(
        s3_uri=Join(on="/", values=folder), s3_upload_mode="EndOfJob", local_path=ready
    )
    arguments = processor.run(
        code="prepare_clips.py", source_dir=str(SCRIPTS), arguments=[raw, ready, "--on_bad_clip",
        "skip"], inputs=[shapes.ProcessingInput(input_name="clips", s3_input=source)],
        outputs=[shapes.ProcessingOutput(output_name="prepared", s3_output=target)],
    )  # fmt: skip
    return ProcessingStep("Prepare", step_args=arguments)


def train_step(trainer, prepare):
    """The step Train: the request of a ModelTrainer, on the clips that the step Prepare makes."""
    (clips,) = [c for c in trainer.input_data_config if c.channel_name == "train"]
    prepared = prepare.properties.ProcessingOutputConfig.Outputs["prepared"]
    clips.data_source.s3_uri = prepared.S3Output.S3Uri
    return NamedTrainingStep("Train", step_args=trainer.train())


def register_step(here, session, train, group: str, instance_type: str, **facts):
    """The step Register: a new version in the group of models, which waits for your approval.

    facts: what the version shall tell of itself, as name=property of a step.
    """
    model = ModelBuilder(
        s3_model_data_url=train.properties.ModelArtifacts.S3ModelArtifacts,
        image_uri=endpoint.image(here, instance_type),
        sagemaker_session=session,
        role_arn=here.run["role_arn"],
    )
    arguments = model.register(
        model_package_group_name=group,
        content_types=["video/mp4"],
        response_types=["application/json"],
        approval_status="PendingManualApproval",
        customer_metadata_properties={name: fact.to_string() for name, fact in facts.items()},
    )
    return ModelStep("Register", step_args=arguments)


# ---- The definition: check and show it -----------------------------------------------------------


def steps_of(definition: str) -> list[dict]:
    """All steps of a definition, those behind a condition too; each with what it `waits` for."""
    waiting, found = json.loads(definition)["Steps"], []
    while waiting:
        step = waiting.pop(0)
        behind = step["Arguments"].get("IfSteps", []) + step["Arguments"].get("ElseSteps", [])
        own = {k: v for k, v in step["Arguments"].items() if k not in ("IfSteps", "ElseSteps")}
        named = re.findall(r'"Steps\.(\w+)', json.dumps(own))
        before = {*named, *step.get("DependsOn", []), *step.get("waits", [])}
        found.append(step | {"waits": sorted(before)})
        waiting += [inner | {"waits": [step["Name"]]} for inner in behind]
    return found


def check(here, definition: str) -> pd.DataFrame:
    """A table of the steps: type, what each waits for, where it runs, the request that it makes.

    Each request is held against the shape that botocore knows of the operation. Raises ValueError
    with the step's name for a request that does not fit, or whose job is not called video-...
    """
    client, rows = here.session.client("sagemaker"), {}
    for step in steps_of(definition):
        operation, field = REQUESTS.get(step["Type"], (None, None))
        request = _filled(step["Arguments"])
        if field and not request.get(field, "").startswith("video-"):
            raise ValueError(
                f"step {step['Name']}: {field} is {request.get(field)!r}, and your permissions are "
                "for jobs called video-...: set base_job_name, and use_custom_job_prefix=True"
            )
        if operation:
            shape = client.meta.service_model.operation_model(operation).input_shape
            report = ParamValidator().validate(request, shape)
            if report.has_errors():
                raise ValueError(f"step {step['Name']}: {report.generate_report()}")
        compute = request.get("ResourceConfig") or request.get("ProcessingResources", {}).get(
            "ClusterConfig", {}
        )
        rows[step["Name"]] = {
            "type": step["Type"],
            "waits for": ", ".join(step["waits"]),
            "machine": compute.get("InstanceType", ""),
            "request": operation or "",
            "jobs are called": f"{request[field]}-..." if field else "",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("step")


def _filled(value):
    """A request with a word in place of each value that only an execution knows."""
    if isinstance(value, list):
        return [_filled(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() in ({"Get"}, {"Std:Join"}):
        return "s3://known/later"
    return {name: _filled(item) for name, item in value.items()}


def graph(definition: str, steps: pd.DataFrame | None = None) -> Figure:
    """The steps as boxes, each to the right of what it waits for; with `steps`, their status."""
    column, colours = {}, {"Succeeded": pictures.RIGHT, "Failed": pictures.WRONG}
    found = steps_of(definition)
    for step in found:
        column[step["Name"]] = 1 + max((column[name] for name in step["waits"]), default=-1)
    figure = Figure(figsize=(2.6 * (1 + max(column.values())), 1.3), layout="constrained")
    axis = figure.subplots()
    for step in found:
        status = steps["status"].get(step["Name"], "not run") if steps is not None else step["Type"]
        style = {"facecolor": "white", "edgecolor": colours.get(status, "0.5"), "linewidth": 2}
        text, place = f"{step['Name']}\n{status}", (column[step["Name"]], 0)
        box = {"boxstyle": "round,pad=0.6"} | style
        axis.text(*place, text, ha="center", va="center", fontsize=11, bbox=box)
        for name in step["waits"]:
            if column[name] == place[0] - 1:
                ends = {"xy": (place[0] - 0.32, 0), "xytext": (column[name] + 0.32, 0)}
                axis.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": "0.4"})
    axis.set(xlim=(-0.5, max(column.values()) + 0.5), ylim=(-1, 1))
    axis.axis("off")
    return figure


# ---- The pipeline and its executions -------------------------------------------------------------


def start(here, name: str, group: str, definition: str, **parameters) -> str:
    """Creates or renews pipeline and group, starts an execution, and returns its ARN.

    parameters: of the pipeline, for this execution; the others have their defaults.
    """
    sagemaker = here.session.client("sagemaker")
    here.add("deployed", f"model-package-group/{group}", f"pipeline/{name}")
    try:
        sagemaker.describe_model_package_group(ModelPackageGroupName=group)
    except ClientError as error:
        if "does not exist" not in str(error):
            raise
        sagemaker.create_model_package_group(ModelPackageGroupName=group, Tags=TAGS)
    request = {"PipelineName": name, "PipelineDefinition": definition}
    request["RoleArn"] = here.run["role_arn"]
    try:
        sagemaker.describe_pipeline(PipelineName=name)
    except sagemaker.exceptions.ResourceNotFound:
        sagemaker.create_pipeline(**request, Tags=TAGS)
    else:
        sagemaker.update_pipeline(**request)
    values = [{"Name": key, "Value": str(value)} for key, value in parameters.items()]
    started = sagemaker.start_pipeline_execution(PipelineName=name, PipelineParameters=values)
    print(f"{name} is started. To stop it: pipeline.stop(here)")
    return started["PipelineExecutionArn"]


def steps(here, execution: str) -> pd.DataFrame:
    """A row for each step of an execution so far: its status, its seconds, its job or its reason.

    The jobs are in run.json afterwards.
    """
    sagemaker, rows = here.session.client("sagemaker"), {}
    pages = sagemaker.get_paginator("list_pipeline_execution_steps")
    for page in pages.paginate(PipelineExecutionArn=execution, SortOrder="Ascending"):
        for step in page["PipelineExecutionSteps"]:
            facts = step.get("Metadata", {})
            made = [fact["Arn"].rpartition(":")[2] for fact in facts.values() if "Arn" in fact]
            here.add("jobs", *(item for item in made if re.match(r"[a-z]+-job/", item)))
            seconds = None
            if "EndTime" in step:
                seconds = round((step["EndTime"] - step["StartTime"]).total_seconds())
            outcome = facts.get("Condition", {}).get("Outcome", "")
            rows[step["StepName"]] = {
                "status": step["StepStatus"],
                "seconds": seconds,
                "made, or found": step.get("FailureReason") or "".join(made) or outcome,
            }
    columns = ["status", "seconds", "made, or found"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return table.astype({"seconds": "Int64"}).rename_axis("step")


def follow(here, execution: str) -> pd.DataFrame:
    """Prints each change of a step until the execution ends; returns the table of steps.

    Raises RuntimeError with the step's reason if it failed. An interrupt ends the waiting only.
    """
    sagemaker, shown = here.session.client("sagemaker"), {}
    try:
        while True:
            found = sagemaker.describe_pipeline_execution(PipelineExecutionArn=execution)
            table = steps(here, execution)
            for name, status in table["status"].items():
                if shown.get(name) != status:
                    print(f"{time.strftime('%H:%M:%S')} {name}: {status}", flush=True)
                shown[name] = status
            if found["PipelineExecutionStatus"] in ENDED:
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"The execution goes on, and is paid for. Come back: pipeline.follow(here, "
            f"{execution!r}). Stop it: pipeline.stop(here)"
        ) from None
    failed = table[table["status"] == "Failed"]
    if len(failed):
        raise RuntimeError(f"step {failed.index[0]}: {failed['made, or found'].iloc[0]}")
    return table


def stop(here) -> None:
    """Stops what runs of the pipelines in run.json, with its jobs."""
    sagemaker = here.session.client("sagemaker")
    for execution, status in executions(here).items():
        if status == "Executing":
            sagemaker.stop_pipeline_execution(PipelineExecutionArn=execution)
            print(execution.rpartition("/")[2], "is asked to stop")


def executions(here) -> dict[str, str]:
    """{ARN: status} of all executions of the pipelines in run.json."""
    sagemaker, found = here.session.client("sagemaker"), {}
    for item in here.run.get("deployed", []):
        if item.startswith("pipeline/"):
            pages = sagemaker.get_paginator("list_pipeline_executions")
            for page in pages.paginate(PipelineName=item.partition("/")[2]):
                for one in page["PipelineExecutionSummaries"]:
                    found[one["PipelineExecutionArn"]] = one["PipelineExecutionStatus"]
    return found


def versions(here, group: str) -> pd.DataFrame:
    """The versions in a group of models, the newest first: approval, facts, and the model in S3."""
    sagemaker, rows = here.session.client("sagemaker"), {}
    pages = sagemaker.get_paginator("list_model_packages")
    for page in pages.paginate(ModelPackageGroupName=group):
        for summary in page["ModelPackageSummaryList"]:
            found = sagemaker.describe_model_package(ModelPackageName=summary["ModelPackageArn"])
            (container,) = found["InferenceSpecification"]["Containers"]
            rows[found["ModelPackageVersion"]] = {
                "approval": found["ModelApprovalStatus"],
                **found.get("CustomerMetadataProperties", {}),
                "model": container["ModelDataUrl"].split("/", 3)[3],  # without the bucket
            }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("version")
    return table.sort_index(ascending=False)
