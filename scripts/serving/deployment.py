"""The app that AWS's Ray Serve image runs: config.yaml names it."""

import asyncio

import worker
from ray import serve
from starlette.responses import Response


@serve.deployment(max_ongoing_requests=worker.COUNT)
class Videos:
    async def __init__(self):
        self.workers = worker.Workers()
        await asyncio.wrap_future(self.workers.first)

    async def __call__(self, request):
        status, text = await self.workers.answer(request)
        return Response(text, status, media_type="application/json")


def app(args):
    """Ray calls this first. Raises what the model raises when it is loaded.

    Ray calls a container healthy (/-/healthz, which AWS asks) before its replica is. So the model
    is loaded here once on trial: with one that cannot be loaded, no endpoint gets InService.
    """
    worker.check()
    return Videos.bind()
