"""The server: moto's, with a door of its own that tells its state and what its account holds."""

import json
import logging
import os
import shutil
import sys

from . import _state_folder, processes

os.environ["MOTO_DISABLE_GLOBAL_CORS"] = "true"  # read when moto is imported
os.environ["MOTO_IAM_LOAD_MANAGED_POLICIES"] = "true"  # AmazonSageMakerFullAccess, ...


class Server:
    """moto's server, with a door of its own and the operations that moto lacks."""

    def __init__(
        self, port, grace_seconds, spot_interruptions, enforce, no_capacity=(), namespaces=True
    ):
        self.port, self.grace_seconds, self.enforce = port, grace_seconds, enforce
        self.spot_interruptions, self.no_capacity = spot_interruptions, no_capacity
        self.namespace = processes.namespace() if namespaces else []
        self.jobs, self.quota_requests = {}, []  # jobs by ARN
        self.url, self.state = f"http://127.0.0.1:{port}", _state_folder(port)

    def serve(self):
        os.chdir(self.state)  # aws.stop knows the server by it
        from moto.moto_server import werkzeug_app as app
        from werkzeug.serving import make_server

        from . import buckets, capacity, endpoints, permissions, pipelines, quotas, transform, words
        from .jobs import add_operations
        from .processing import ProcessingJob
        from .training import TrainingJob

        add_operations(self, TrainingJob)
        add_operations(self, ProcessingJob)
        services = (buckets, quotas, capacity, endpoints, transform, permissions, pipelines, words)
        for service in services:
            service.extend_moto(self)
        self.moto = app.DomainDispatcherApplication(app.create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        handler = app.MotoRequestHandler
        server = make_server("127.0.0.1", self.port, self.answer, True, request_handler=handler)
        for name in ("jobs", "processing_jobs", "transform_jobs", "endpoints"):
            shutil.rmtree(self.state / name, ignore_errors=True)
        server.serve_forever()

    def session(self, role_arn, region):
        """The boto3 session of a job: its role's, where policies count."""
        import boto3

        if not self.enforce:
            return boto3.Session(region_name=region)
        from . import permissions

        return permissions.role_session(role_arn, region)

    def answer(self, environ, start_response):
        """Answer a request (WSGI): our own paths here, everything else in moto."""
        path, code, body = environ["PATH_INFO"], "200 OK", {}
        host = environ.get("HTTP_HOST", "").rpartition(":")[0]
        if "HTTP_ORIGIN" in environ or host not in ("127.0.0.1", "localhost"):
            code = "403 Forbidden"  # a page in a browser, which shall start no training job here
        elif environ.get("HTTP_X_AMZ_TARGET") == "AWSPriceListService.GetProducts":
            body = {
                "FormatVersion": "aws_v1",
                "PriceList": [],
            }  # moto answers 500: ten s of retries
        elif path == "/_embedded_aws":
            jobs = sorted(job.name for job in self.jobs.values() if job.is_running)
            body = {"url": self.url, "user": os.getuid(), "pid": os.getpid(), "python": sys.prefix}
            body |= {"folder": str(self.state), "running_jobs": jobs, "enforce": self.enforce}
            body["namespaces"] = bool(self.namespace)
        elif path == "/_embedded_aws/account":
            body = self.account()
        elif path == "/_embedded_aws/interrupt":
            length = int(environ["CONTENT_LENGTH"])
            name = json.loads(environ["wsgi.input"].read(length))["job"]
            jobs = [job for job in self.jobs.values() if job.name == name and job.is_running]
            jobs = [job for job in jobs if job.request.get("EnableManagedSpotTraining")]
            for job in jobs:
                job.interrupted.set()
            body = {} if jobs else {"error": f"{name} is not a running spot job."}
        else:
            return self.moto(environ, start_response)
        start_response(code, [("Content-Type", "application/json")])
        return [json.dumps(body).encode()]

    def account(self):
        """What the account holds, in every Region, as a list of names.

        Records of transform jobs and metrics do not count: nobody can delete them, as on AWS.
        """
        from moto.backends import get_backend

        def each(service):  # moto keeps a backend for each account and Region
            return [one for regions in get_backend(service).values() for one in regions.values()]

        names = [f"bucket/{name}" for s3 in each("s3") for name in s3.buckets]
        names += [f"role/{role.name}" for iam in each("iam") for role in iam.roles.values()]
        for sagemaker in each("sagemaker"):
            kinds = {"training-job": sagemaker.training_jobs, "endpoint": sagemaker.endpoints}
            kinds |= {"processing-job": sagemaker.processing_jobs, "model": sagemaker._models}
            kinds |= {"endpoint-config": sagemaker.endpoint_configs}
            kinds |= {"pipeline": sagemaker.pipelines, "model-package": sagemaker.model_packages}
            kinds |= {"model-package-group": sagemaker.model_package_groups}
            names += [f"{kind}/{name}" for kind, known in kinds.items() for name in known]
        for scaling in each("application-autoscaling"):
            names += [f"scaling of {one}" for known in scaling.targets.values() for one in known]
        names += [f"alarm/{name}" for watch in each("cloudwatch") for name in watch.alarms]
        groups = [group for logs in each("logs") for group in logs.groups.values()]
        return names + [f"log stream {name}" for group in groups for name in group.streams]
