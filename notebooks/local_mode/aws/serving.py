"""The model server of one endpoint or transform job of the embedded AWS.

    SAGEMAKER_BASE_DIR=FOLDER python serving.py PORT

It loads FOLDER/model, and answers GET /ping and POST /invocations on 127.0.0.1:PORT. What lies in
between (model_fn, input_fn, predict_fn, output_fn of code/inference.py, and errors) is the library
that AWS's own images use, sagemaker-inference; TorchServe, which those put in front, needs Java.
The server answers only when the model is loaded, and one request at a time, as one worker does.
"""

import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sagemaker_inference import environment
from sagemaker_inference.transformer import Transformer


class Context:
    """The request as the library wants to see it, and the answer that it asks for.

    One for the life of the worker, as in TorchServe: the library keeps the first that it gets.
    """

    def __init__(self):
        self.system_properties = {"model_dir": environment.model_dir}
        self.model_name = "model"  # for the library's log
        self.request_processor = [self]
        self.begin({})

    def begin(self, headers):
        self.headers, self.status, self.content_type = dict(headers), 200, "text/plain"

    def get_request_properties(self):
        return self.headers

    def get_request_header(self, _, name):
        return self.headers.get(name)

    def set_response_status(self, code=200, phrase="", idx=0):
        self.status = int(code)

    def set_response_content_type(self, _, value):
        self.content_type = value


class Handler(BaseHTTPRequestHandler):
    """The two paths that SageMaker asks a container for."""

    protocol_version = "HTTP/1.1"

    def __init__(self, transformer, context, worker, *request):
        self.transformer, self.context, self.worker = transformer, context, worker
        super().__init__(*request)

    def do_GET(self):
        self.answer(200 if self.path == "/ping" else 404, "text/plain", b"")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/invocations":
            return self.answer(404, "text/plain", b"")
        with self.worker:
            self.context.begin(self.headers)
            (result,) = self.transformer.transform([{"body": body}], self.context)
            status, content_type = self.context.status, self.context.content_type
        result = result.encode() if isinstance(result, str) else bytes(result)
        self.answer(status, content_type, result)

    def answer(self, status, content_type, body):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, form, *values):
        print(f"{self.command} {self.path}:", form % values)


def main(port):
    code = Path(environment.code_dir)
    sys.path.insert(0, str(code))
    if (requirements := code / "requirements.txt").exists():  # as the images do at the start
        install = [sys.executable, "-m", "pip", "install", "--quiet", "-r", str(requirements)]
        subprocess.run(install, check=True)
    transformer, context = Transformer(), Context()
    transformer.validate_and_initialize(environment.model_dir, context)
    handler = partial(Handler, transformer, context, threading.Lock())
    ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
