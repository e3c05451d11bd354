"""The server of an image of your own (see Dockerfile): what SageMaker asks of a container.

GET /ping is 200 when the model is loaded, POST /invocations answers one request, on port 8080.
SIGTERM lets running requests end.
"""

import logging
import os
from contextlib import asynccontextmanager

import uvicorn
import worker
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route


@asynccontextmanager
async def lifespan(app):
    app.state.workers = worker.Workers()
    yield
    app.state.workers.stop()


async def ping(request):
    return Response(status_code=200 if request.app.state.workers.healthy() else 503)


async def invocations(request):
    status, text = await request.app.state.workers.answer(request)
    return Response(text, status, media_type="application/json")


routes = [Route("/ping", ping), Route("/invocations", invocations, methods=["POST"])]
app = Starlette(routes=routes, lifespan=lifespan)

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s: %(message)s")
    uvicorn.run(
        app,
        host=os.environ.get("HOST", "0.0.0.0"),  # noqa: S104
        port=int(os.environ.get("SAGEMAKER_BIND_TO_PORT", 8080)),
        access_log=False,
        timeout_keep_alive=65,
        timeout_graceful_shutdown=25,  # SageMaker kills 30 s after SIGTERM
    )
