"""Route of the event stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.api.access import end_with, queried, sharer, with_token
from gateway.api.answers import EventsQuery
from gateway.api.asked import Asked
from gateway.api.http import USES
from gateway.api.merged_events import MergedEvents, parse_vector
from gateway.api.operation import Media, Operation
from gateway.api.services import services
from gateway.auth.tokens import Token
from gateway.cluster.listener import FROM
from gateway.events import Filter, sse


async def stream(request: Request) -> Response:
    """Stream events as they happen, as Server-Sent Events with one CloudEvent each, until the token ends."""
    gateway, token = services(request), with_token(request, "events")
    query = queried(request, EventsQuery)
    filter = Filter.parse(token.coverage, query.tenant, query.deployment, query.type)
    filter = replace(filter, since=token.issued)
    last = request.headers.get("last-event-id") or query.lastEventId
    request.scope[USES].callback(gateway.places.customer(sharer(token)))
    if gateway.cluster is not None and FROM not in request.scope and _of_several(request, token):
        vector = parse_vector(last)
        after = vector.get(gateway.cluster.own, 0) if vector else None
        merged = MergedEvents(request, gateway, gateway.bus.subscribe(filter, after), vector)
        end_with(request, token, merged.subscription.close)
        return merged
    answer = sse.response(gateway.bus, filter, last, gateway.settings)
    end_with(request, token, answer.subscription.close)
    return answer


def _of_several(request: Request, token: Token) -> bool:
    """Say whether the events may be of several members; those of one tenant are its home's."""
    asked = Asked.of(request.scope)
    return asked is not None and asked.by(token).kind == "events"


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
