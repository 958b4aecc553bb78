"""Routes of the process itself: alive, ready, its own numbers."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.api.http import as_json
from gateway.api.metrics import Metrics
from gateway.api.services import services
from gateway.errors import Unavailable


async def alive(request: Request) -> Response:
    return as_json({"status": "alive"})


async def ready(request: Request) -> Response:
    gateway = services(request)
    if gateway.draining:
        raise Unavailable("the gateway is draining", reason="draining")
    await gateway.runtime.ready()
    failed = gateway.journal.failed
    if failed is not None:
        raise Unavailable(f"events cannot be recorded: {failed.message}", **failed.facts)
    return as_json({"status": "ready"})


async def metrics(request: Request) -> Response:
    return Response(services(request).metrics.render(), media_type=Metrics.CONTENT_TYPE)


ROUTES: Final = (
    Route("/healthz", alive),
    Route("/readyz", ready),
    Route("/metrics", metrics),
)
