"""The app that AWS's Ray Serve image runs: config.yaml names it."""

import asyncio

import worker
from ray import serve
from starlette.responses import Response


@serve.deployment(max_ongoing_requests=worker.COUNT)
class Videos:
    async def __init__(self):
        self.workers = worker.Workers()
        await asyncio.wrap_future(self.workers.first)  # raises if the model cannot be loaded

    async def __call__(self, request):
        status, text = await self.workers.answer(request)
        return Response(text, status, media_type="application/json")


app = Videos.bind()
