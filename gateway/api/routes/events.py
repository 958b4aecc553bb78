"""Route of the event stream."""

from __future__ import annotations

from dataclasses import replace

from starlette.responses import Response

from gateway.api.access import end_with, sharer
from gateway.api.answers import EventsQuery
from gateway.api.http import USES
from gateway.api.operation import ApiCall, ApiRoutes, Media
from gateway.events import Filter, positions, sse

routes = ApiRoutes("events")


@routes(
    "GET",
    "/v1/events",
    scope="events",
    headers=("Last-Event-ID",),
    answers={200: Media("text/event-stream", text=True)},
)
async def stream(call: ApiCall, query: EventsQuery) -> Response:
    """Stream events as they happen, as Server-Sent Events with one CloudEvent each, until the token ends."""
    gateway, token = call.gateway, call.token
    filter = Filter.parse(token.coverage, query.tenant, query.deployment, query.type)
    filter = replace(filter, since=token.issued)
    last = call.headers.get("last-event-id") or query.lastEventId
    call.scope[USES].enter_context(gateway.limits.sockets.reserve(sharer(token)))
    tenant = gateway.topology.tenant_of(call, token)
    answer = await gateway.topology.events(call, token, filter, last)
    if answer is None:
        member = gateway.topology.member
        after = positions.after(last, member) if tenant is None else gateway.resumed(tenant, last)
        answer = sse.response(gateway.bus, filter, after, gateway.settings, member)
    if tenant is not None:
        call.scope[USES].enter_context(gateway.doors.stream(tenant, answer.finish))
    end_with(call, token, answer.close)
    return answer
