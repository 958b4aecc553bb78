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
from gateway.events import Filter, positions, sse


async def stream(request: Request) -> Response:
    """Stream events as they happen, as Server-Sent Events with one CloudEvent each, until the token ends."""
    gateway, token = services(request), with_token(request, "events")
    query = queried(request, EventsQuery)
    filter = Filter.parse(token.coverage, query.tenant, query.deployment, query.type)
    filter = replace(filter, since=token.issued)
    last = request.headers.get("last-event-id") or query.lastEventId
    request.scope[USES].enter_context(gateway.limits.sockets.reserve(sharer(token)))
    tenant = gateway.topology.tenant_of(request, token)
    answer = await gateway.topology.events(request, token, filter, last)
    if answer is None:
        member = gateway.topology.member
        after = positions.after(last, member) if tenant is None else gateway.resumed(tenant, last)
        answer = sse.response(gateway.bus, filter, after, gateway.settings, member)
    if tenant is not None:
        request.scope[USES].enter_context(gateway.doors.stream(tenant, answer.finish))
    end_with(request, token, answer.close)
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
