"""Route of the event stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.api.access import end_with, queried, sharer, with_token
from gateway.api.answers import EventsQuery
from gateway.api.http import USES
from gateway.api.operation import Media, Operation
from gateway.api.services import services
from gateway.events import Filter, sse


async def stream(request: Request) -> Response:
    """Stream events as they happen, as Server-Sent Events with one CloudEvent each, until the token ends."""
    gateway, token = services(request), with_token(request, "events")
    query = queried(request, EventsQuery)
    filter = Filter.parse(token.coverage, query.tenant, query.deployment, query.type)
    filter = replace(filter, since=token.issued)
    last = request.headers.get("last-event-id") or query.lastEventId
    request.scope[USES].callback(gateway.places.customer(sharer(token)))
    answer = sse.response(gateway.bus, filter, last, gateway.settings)
    end_with(request, token, answer.subscription.close)
    return answer


ROUTES: Final = (
    Operation(
        "/v1/events",
        stream,
        scope="events",
        query=EventsQuery,
        headers=("Last-Event-ID",),
        answers={200: Media("text/event-stream", text=True)},
    ),
)
