"""Routes about the process itself: liveness, readiness, metrics."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.api.answers import Alive, Ready
from gateway.api.http import as_json
from gateway.api.metrics import Metrics
from gateway.api.operation import OPEN, Media, Operation
from gateway.api.services import services
from gateway.errors import Unavailable


async def alive(request: Request) -> Response:
    """Answer while the process is alive."""
    return as_json({"status": "alive"})


async def ready(request: Request) -> Response:
    """Answer if tenants can be served; an error says why not."""
    gateway = services(request)
    if gateway.draining:
        raise Unavailable("the gateway is draining", reason="draining")
    await gateway.runtime.ready()
    failed = gateway.journal.failed
    if failed is not None:
        raise Unavailable(f"events cannot be recorded: {failed.message}", **failed.facts)
    return as_json({"status": "ready"})


async def metrics(request: Request) -> Response:
    """Return the gateway's metrics in Prometheus' format."""
    return Response(services(request).metrics.render(), media_type=Metrics.CONTENT_TYPE)


ROUTES: Final = (
    Operation("/healthz", alive, scope=OPEN, answers={200: Alive}),
    Operation("/readyz", ready, scope=OPEN, answers={200: Ready}),
    Operation("/metrics", metrics, scope=OPEN, answers={200: Media("text/plain", text=True)}),
)
