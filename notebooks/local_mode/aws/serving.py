"""AWS's Ray Serve image, played: the container of one endpoint or transform job.

    SM_MODEL_DIR=FOLDER python serving.py PORT RAY_FOLDER

It does what the image's entry point does: pip installs FOLDER/code/requirements.txt, starts a Ray
of its own, runs FOLDER/config.yaml with Ray Serve, and answers on 127.0.0.1:PORT. GET /ping is
Ray's health check, and POST /invocations goes to the application; a path that the image does not
have, such as /execution-parameters, is 404. No code of AWS is here. Ray also listens on this
computer's address in the network; it obeys only who knows a token, which is new for each container.
Its files lie in RAY_FOLDER, whose name must be short (a socket lies in it).
"""

import http.client
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_COLOR_PREFIX": "0",
    "RAY_prestart_worker_first_driver": "0",  # one for each of CPUS, which nobody needs
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill for the memory that other programs take
    "RAY_USAGE_STATS_ENABLED": "0",
}
STORE_BYTES = 200_000_000  # Ray's object store; by default 30 % of this computer's memory
CPUS = 16  # of the machine, for Ray's book-keeping: more than this computer has
SENT = ("Content-Type", "Accept")  # and X-Amzn-SageMaker-*


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Proxy(BaseHTTPRequestHandler):
    """The paths that SageMaker asks a container for, passed on to Ray Serve."""

    protocol_version = "HTTP/1.1"

    def __init__(self, backend, seconds, *request):
        self.backend, self.seconds = backend, seconds  # Ray's port; the time for an answer
        super().__init__(*request)

    def do_GET(self):
        if self.path != "/ping":
            return self.answer(404)
        try:
            status, _, _ = self.pass_on("GET", "/-/healthz", None, {}, 5)
        except OSError:
            status = 503
        self.answer(200 if status == 200 else 503)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/invocations":
            return self.answer(404)
        own = "x-amzn-sagemaker-"
        sent = {n: v for n, v in self.headers.items() if n in SENT or n.lower().startswith(own)}
        try:
            self.answer(*self.pass_on("POST", "/", body, sent, self.seconds))
        except TimeoutError:
            self.answer(504, "text/plain", b"no answer within RAYSERVE_BACKEND_TIMEOUT")
        except OSError as error:
            self.answer(502, "text/plain", str(error).encode())

    def pass_on(self, method, path, body, headers, seconds):
        """Ray Serve's answer: status, content type, body (bytes). OSError if there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.backend, timeout=seconds)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers.get("Content-Type", ""), answer.read()
        except http.client.HTTPException as error:  # it went away in the middle
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def answer(self, status, content_type="text/plain", body=b""):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, form, *values):
        if self.path != "/ping":
            print(f"{self.command} {self.path}:", form % values)


def start_ray(folder):
    """A Ray of its own for this process, which ends with it; returns the port of Ray Serve.

    Not by `ray start`: two of them on one computer share their ports without an error.
    """
    import ray
    from ray import serve

    for tries_left in range(5, -1, -1):
        try:
            ray.init(
                address="local",
                namespace="serve",
                num_cpus=CPUS,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                logging_level="warning",
                _temp_dir=folder,
            )
            break
        except Exception:  # its own processes have 15 seconds (ray-project/ray/issues/65983)
            if not tries_left:
                raise
            ray.shutdown()
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    return port


def run_config(file):
    """`serve run config.yaml`; returns when all runs. Raises RuntimeError if it does not.

    Ray is healthy before that: as soon as it has read the application, whose model still loads.
    """
    from ray import serve
    from ray.serve.scripts import run

    run.main(["--non-blocking", str(file)], standalone_mode=False)
    while True:
        found = serve.status().applications.values()
        for app in found:
            if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise RuntimeError(app.message)
        if found and all(app.status == "RUNNING" for app in found):
            return
        time.sleep(0.2)


def main(port, ray_folder):
    model = Path(os.environ["SM_MODEL_DIR"])
    if (requirements := model / "code" / "requirements.txt").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "-r", str(requirements)]
        subprocess.run(install, check=True)
    os.environ["PYTHONPATH"] = f"{model}:{model / 'code'}"  # of Ray's workers
    backend = start_ray(ray_folder)
    seconds = float(os.environ.get("RAYSERVE_BACKEND_TIMEOUT", 300))
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(Proxy, backend, seconds))
    threading.Thread(target=server.serve_forever).start()
    try:
        run_config(model / "config.yaml")
    except RuntimeError as error:
        print(str(error).strip(), flush=True)
        os._exit(1)  # at once: the reason stays the last line of the log


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
