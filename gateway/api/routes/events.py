"""Route of the event stream."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.api.access import end_with, queried, sharer, with_token
from gateway.api.answers import EventsQuery
from gateway.api.asked import Asked, has
from gateway.api.http import USES, address, hold
from gateway.api.merged_events import MergedEvents
from gateway.api.operation import Media, Operation
from gateway.api.services import Services, services
from gateway.auth.tokens import Token
from gateway.cluster.cluster import Cluster
from gateway.cluster.listener import FROM
from gateway.cluster.relay import PART, client_of
from gateway.cluster.standing import Standing
from gateway.events import Filter, positions, sse


async def stream(request: Request) -> Response:
    """Stream events as they happen, as Server-Sent Events with one CloudEvent each, until the token ends."""
    gateway, token = services(request), with_token(request, "events")
    query = queried(request, EventsQuery)
    filter = Filter.parse(token.coverage, query.tenant, query.deployment, query.type)
    filter = replace(filter, since=token.issued)
    last = request.headers.get("last-event-id") or query.lastEventId
    request.scope[USES].enter_context(gateway.limits.sockets.reserve(sharer(token)))
    tenant = _of_one(request, token)
    if gateway.cluster is not None and await _of_several(request, token):
        answer = await _merged(request, gateway.cluster, filter, last)
    elif gateway.cluster is not None and tenant is not None and await _came(gateway, tenant, last):
        known = positions.vector(last or "") or {}
        begin = gateway.names.arrived(tenant) - 1
        answer = await _merged(request, gateway.cluster, filter, last, only=known, begin=begin)
    else:
        member = "" if gateway.cluster is None else gateway.cluster.own
        after = positions.after(last, member) if tenant is None else gateway.resumed(tenant, last)
        answer = sse.response(gateway.bus, filter, after, gateway.settings, member)
    if tenant is not None:
        request.scope[USES].enter_context(gateway.doors.stream(tenant, answer.finish))
    end_with(request, token, answer.close)
    return answer


def _of_one(request: Request, token: Token) -> str | None:
    """Return the tenant that the events are about, None if there may be several."""
    asked = Asked.of(request.scope)
    if asked is None or PART in request.headers:
        return None
    asked = asked.by(token)
    return asked.name if asked.kind == "tenant" else None


async def _of_several(request: Request, token: Token) -> bool:
    """Say whether the events may be any member's: what is asked for has no home, or none yet."""
    asked = Asked.of(request.scope)
    if asked is None or FROM in request.scope:
        return False
    asked = asked.by(token)
    return asked.kind == "events" or not await has(services(request), {asked.kind: asked.name})


async def _came(gateway: Services, tenant: str, last: str | None) -> bool:
    """Say whether a client goes on from the tenant's former home, which has the events until the move."""
    known, cluster = positions.vector(last or ""), gateway.cluster
    if known is None or gateway.departures is None or cluster is None:
        return False
    move = await gateway.departures.last(tenant)
    if move is None or move.state != "moved" or move.target != cluster.own:
        return False
    return move.source in known and move.source in cluster.peers.all


async def _merged(
    request: Request,
    cluster: Cluster,
    filter: Filter,
    last: str | None,
    *,
    only: Collection[str] | None = None,
    begin: int | None = None,
) -> sse.Streaming:
    """Return the events of all members, or of some."""
    gateway, peers = services(request), cluster.peers
    ahead = gateway.settings.cluster_events_ahead
    hold(request.scope, ahead * len(peers.all))
    standing = Standing(request.scope, client_of(request.scope, address(request)), peers, ahead)
    merged = MergedEvents(*(gateway.bus, filter, cluster.own, peers, standing, last), only=only, begin=begin)
    request.scope[USES].callback(merged.end)
    await merged.begin()
    return sse.Streaming(
        merged.parts(), merged.close, positions.text(merged.at), gateway.settings, resumed=merged.resumed
    )


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
