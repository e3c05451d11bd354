"""Pipelines: an execution makes a definition's steps true, as the role of the pipeline.

moto keeps pipelines and model packages. Here an execution runs: its steps become jobs and packages
by requests to this server, one step after the other, where the service runs steps side by side.
It knows steps of the types Processing, Training, Condition and RegisterModel, and the functions Get
and Std:Join.
"""

import json
import operator
import random
import re
import string
import threading
import time
import traceback

from botocore.exceptions import ClientError as Refused
from moto.core.responses import ActionResult, EmptyResult
from moto.sagemaker.exceptions import ConflictException, ResourceNotFound, ValidationError
from moto.sagemaker.responses import SageMakerResponse
from moto.sagemaker.utils import arn_formatter

from .basics import ClientError, answers, now

JOBS = {"Processing": "processing_job", "Training": "training_job"}
ENDED = ("Completed", "Failed", "Stopped")
COMPARISONS = {
    "Equals": operator.eq,
    "GreaterThan": operator.gt,
    "GreaterThanOrEqualTo": operator.ge,
    "LessThan": operator.lt,
    "LessThanOrEqualTo": operator.le,
}
SECONDS = 0.5  # between two looks at a step's job


class Execution:
    """One run of a pipeline: its steps, what they answered, and the thread that goes through them.

    `record` is moto's: it keeps status and reason where moto's lists read them.
    """

    def __init__(self, record, session, server):
        self.record, self.id = record, record.arn.rpartition("/")[2]
        self.client = session.client("sagemaker", endpoint_url=server.url)
        definition = json.loads(record.pipeline_definition_for_execution)
        given = {item["Name"]: item["Value"] for item in record.pipeline_parameters or []}
        self.parameters = {
            item["Name"]: typed(item["Type"], given.get(item["Name"], item.get("DefaultValue")))
            for item in definition.get("Parameters", [])
        }
        self.waiting, self.steps, self.outputs = definition["Steps"], [], {}
        self.wants_stop = threading.Event()
        record.pipeline_execution_status = "Executing"

    def run(self):
        """Go through the steps until none is left, one has failed, or somebody stops it."""
        try:
            while self.waiting and not self.wants_stop.is_set():
                ready = [step for step in self.waiting if self.needs(step) <= self.outputs.keys()]
                if not ready:
                    raise ClientError(f"steps wait for each other: {names(self.waiting)}")
                self.waiting.remove(ready[0])
                self.run_step(ready[0])
            self.end("Stopped" if self.wants_stop.is_set() else "Succeeded")
        except (ClientError, Refused) as error:
            if self.steps and self.steps[-1]["StepStatus"] == "Executing":
                self.end_step("Failed", f"ClientError: {error}")
            self.end("Failed", "Step failure: One or multiple steps failed.")
        except Exception as error:
            traceback.print_exc()  # into server.log
            self.end("Failed", f"InternalFailure: {error}")

    def needs(self, step):
        """The names of the steps that must have ended before this one."""
        arguments = step["Arguments"]
        if step["Type"] == "Condition":  # what its branches need is their own affair
            arguments = arguments["Conditions"]
        return {*step.get("DependsOn", []), *re.findall(r'"Steps\.([\w-]+)', json.dumps(arguments))}

    def run_step(self, step):
        self.steps.append({"StepName": step["Name"], "StartTime": now(), "StepStatus": "Executing"})
        kind, arguments = step["Type"], step["Arguments"]
        if kind in JOBS:
            self.run_job(kind, step["Name"], self.resolve(arguments))
        elif kind == "Condition":
            outcome = all(self.holds(condition) for condition in arguments["Conditions"])
            self.waiting += arguments["IfSteps" if outcome else "ElseSteps"]
            self.outputs[step["Name"]] = {"Outcome": outcome}
            self.steps[-1]["Metadata"] = {"Condition": {"Outcome": str(outcome)}}
        elif kind == "RegisterModel":
            arn = self.client.create_model_package(**self.resolve(arguments))["ModelPackageArn"]
            self.outputs[step["Name"]] = {"ModelPackageArn": arn}
            self.steps[-1]["Metadata"] = {"RegisterModel": {"Arn": arn}}
        else:
            raise ClientError(f"The embedded AWS does not know steps of the type {kind}.")
        if self.steps[-1]["StepStatus"] == "Executing":
            self.end_step("Succeeded")

    def run_job(self, kind, step_name, request):
        """Start a job, wait for it, and keep what its Describe operation answers."""
        operation, field = JOBS[kind], f"{kind}JobName"
        # A prefix of the definition takes the place of the service's own; the endings are ours.
        prefix = request.get(field, "pipelines")
        ending = "".join(random.choices(string.ascii_letters + string.digits, k=10))
        name = {field: f"{prefix}-{self.id}-{step_name if prefix == 'pipelines' else ''}{ending}"}
        arn = getattr(self.client, f"create_{operation}")(**request | name)[f"{kind}JobArn"]
        self.steps[-1]["Metadata"] = {f"{kind}Job": {"Arn": arn}}
        stopped = False
        while True:
            found = getattr(self.client, f"describe_{operation}")(**name)
            status = found[f"{kind}JobStatus"]
            if status in ENDED:
                break
            if self.wants_stop.is_set() and not stopped:
                getattr(self.client, f"stop_{operation}")(**name)
                stopped = True
            time.sleep(SECONDS)
        self.outputs[step_name] = found
        if status == "Stopped" and stopped:
            self.end_step("Stopped")
        elif status != "Completed":
            raise ClientError(found.get("FailureReason") or f"the job is {status}")

    def holds(self, condition):
        compare = COMPARISONS.get(condition["Type"])
        if compare is None:
            raise ClientError(f"The embedded AWS does not know the condition {condition['Type']}.")
        return compare(self.resolve(condition["LeftValue"]), self.resolve(condition["RightValue"]))

    def resolve(self, value):
        """The value with all that is known only now: parameters, answers of steps, joined texts."""
        if isinstance(value, list):
            return [self.resolve(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"Get"}:
            return self.get(value["Get"])
        if value.keys() == {"Std:Join"}:
            join = value["Std:Join"]
            return join["On"].join(str(self.resolve(item)) for item in join["Values"])
        if any(name.lower().startswith("std:") for name in value):
            raise ClientError(f"The embedded AWS does not know the function {list(value)[0]}.")
        return {name: self.resolve(item) for name, item in value.items()}

    def get(self, path):
        """What a path leads to: Parameters.X, Execution.X, Steps.<name>.<field>['<name>'].<...>."""
        root, _, rest = path.partition(".")
        if root == "Parameters":
            return self.parameters[rest]
        found = {
            "Steps": self.outputs,
            "Execution": {
                "PipelineExecutionId": self.id,
                "PipelineExecutionArn": self.record.arn,
                "PipelineName": self.record.arn.split("/")[1],
            },
        }[root]
        for name, key in re.findall(r"\.?([\w-]+)|\[['\"]?(.+?)['\"]?\]", rest):
            try:
                found = found[name] if name else element(found, key)
            except (KeyError, StopIteration) as error:
                raise ClientError(f"{path}: the step has no {name or key}") from error
        return found

    def end_step(self, status, reason=None):
        self.steps[-1] |= {"StepStatus": status, "EndTime": now()}
        if reason:
            self.steps[-1]["FailureReason"] = reason[:1024]

    def end(self, status, reason=None):
        self.record.last_modified_time = now()
        self.record.pipeline_execution_failure_reason = reason
        self.record.pipeline_execution_status = status


def element(items, key):
    """The element of a list by its index or by its name: OutputName, MetricName, ChannelName."""
    if key.isdigit():
        return items[int(key)]
    return next(
        item for item in items if key in (v for name, v in item.items() if name.endswith("Name"))
    )


def typed(kind, value):
    """A parameter's value, which comes as a text, in its type."""
    if kind == "Boolean":
        return str(value).lower() == "true"
    return {"Integer": int, "Float": float}.get(kind, str)(value)


def names(steps):
    return ", ".join(step["Name"] for step in steps)


def extend_moto(server):
    """Give moto executions that run, and the end of pipelines, model packages and their groups."""
    executions = {}  # by ARN

    def pipeline_of(response, name):
        pipelines, wanted = response.sagemaker_backend.pipelines, name.rpartition("/")[2]
        if wanted not in pipelines:
            raise ResourceNotFound(
                f"Pipeline '{arn_of(response, 'pipeline', wanted)}' does not exist."
            )
        return pipelines[wanted]

    def arn_of(response, kind, name):
        backend = response.sagemaker_backend
        return arn_formatter(kind, name, backend.account_id, backend.region_name)

    def execution_of(response):
        arn = response._get_param("PipelineExecutionArn")
        if arn not in executions:
            raise ResourceNotFound(f"Pipeline execution '{arn}' does not exist.")
        return executions[arn]

    start_of_moto = SageMakerResponse.start_pipeline_execution
    describe_of_moto = SageMakerResponse.describe_pipeline_execution

    @answers(SageMakerResponse)
    def describe_pipeline(self):
        pipeline_of(self, self._get_param("PipelineName"))
        found = self.sagemaker_backend.describe_pipeline(self._get_param("PipelineName"))
        return ActionResult({name: value for name, value in found.items() if value is not None})

    @answers(SageMakerResponse)
    def start_pipeline_execution(self):
        pipeline = pipeline_of(self, self._get_param("PipelineName"))
        try:
            session = server.session(pipeline.role_arn, self.sagemaker_backend.region_name)
        except PermissionError as error:  # nobody may act as this role
            raise ValidationError(str(error)) from error
        started = start_of_moto(self)
        record = pipeline.pipeline_executions[started.result["PipelineExecutionArn"]]
        execution = executions[record.arn] = Execution(record, session, server)
        threading.Thread(target=execution.run, daemon=True).start()
        return started

    @answers(SageMakerResponse)
    def describe_pipeline_execution(self):
        record = execution_of(self).record
        found = describe_of_moto(self).result
        found["FailureReason"] = record.pipeline_execution_failure_reason
        return ActionResult({name: value for name, value in found.items() if value})

    @answers(SageMakerResponse)
    def list_pipeline_execution_steps(self):
        steps = execution_of(self).steps
        newest_first = self._get_param("SortOrder") != "Ascending"
        return ActionResult({"PipelineExecutionSteps": steps[::-1] if newest_first else steps})

    @answers(SageMakerResponse)
    def stop_pipeline_execution(self):
        execution = execution_of(self)
        if execution.record.pipeline_execution_status != "Executing":
            raise ConflictException(
                f"Pipeline execution with ARN {execution.record.arn} is not running."
            )
        execution.record.pipeline_execution_status = "Stopping"
        execution.wants_stop.set()
        return ActionResult({"PipelineExecutionArn": execution.record.arn})

    @answers(SageMakerResponse)
    def delete_pipeline(self):
        pipeline = pipeline_of(self, self._get_param("PipelineName"))
        records = pipeline.pipeline_executions.values()
        if any(one.pipeline_execution_status in ("Executing", "Stopping") for one in records):
            raise ConflictException(f"Pipeline '{pipeline.arn}' has running executions.")
        for record in records:
            executions.pop(record.arn, None)
        del self.sagemaker_backend.pipelines[pipeline.pipeline_name]
        return ActionResult({"PipelineArn": pipeline.arn})

    describe_package_of_moto = SageMakerResponse.describe_model_package
    describe_group_of_moto = SageMakerResponse.describe_model_package_group

    @answers(SageMakerResponse)
    def describe_model_package_group(self):  # moto does not say who made it
        root = f"arn:aws:iam::{self.sagemaker_backend.account_id}:root"
        creator = {"CreatedBy": {"IamIdentity": {"Arn": root}}}
        return ActionResult(describe_group_of_moto(self).result | creator)

    @answers(SageMakerResponse)
    def describe_model_package(self):  # moto leaves out a name, and puts ARNs where names belong
        found = describe_package_of_moto(self).result
        found.setdefault("ModelPackageName", found.get("ModelPackageGroupName"))
        found["ModelPackageStatusDetails"] = {"ValidationStatuses": [], "ImageScanStatuses": []}
        return ActionResult(found)

    @answers(SageMakerResponse)
    def delete_model_package(self):
        backend, wanted = self.sagemaker_backend, self._get_param("ModelPackageName")
        arn = wanted if wanted.startswith("arn:") else arn_of(self, "model-package", wanted)
        if arn not in backend.model_packages:
            raise ValidationError(f"ModelPackage {arn} does not exist.")
        del backend.model_packages[arn]
        return EmptyResult()

    @answers(SageMakerResponse)
    def delete_model_package_group(self):
        backend = self.sagemaker_backend
        name = self._get_param("ModelPackageGroupName").rpartition("/")[2]
        group = backend.describe_model_package_group(name)  # raises if there is none
        members = [p for p in backend.model_packages.values() if p.model_package_group_name == name]
        if members:
            raise ConflictException(f"ModelPackageGroup {group.arn} has {len(members)} versions.")
        del backend.model_package_groups[name]
        return EmptyResult()
