"""Route of the event stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.api.access import end_with, sharer, with_token
from gateway.api.http import USES
from gateway.api.services import services
from gateway.events import Filter, sse


async def stream(request: Request) -> Response:
    gateway, token = services(request), with_token(request, "events")
    query = request.query_params
    filter = Filter.parse(token.coverage, query.get("tenant"), query.get("deployment"), query.get("type"))
    filter = replace(filter, since=token.issued)
    last = request.headers.get("last-event-id") or query.get("lastEventId")
    request.scope[USES].callback(gateway.places.customer(sharer(token)))
    answer = sse.response(gateway.bus, filter, last, gateway.settings)
    end_with(request, token, answer.subscription.close)
    return answer


ROUTES: Final = (Route("/v1/events", stream),)
