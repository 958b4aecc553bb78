"""Routes for operators alone: taking back tokens, and the audit."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway import protocol
from gateway.api.access import as_operator, json_body
from gateway.api.http import as_json
from gateway.api.services import services
from gateway.errors import InvalidParams


class RevokeBody(protocol.Params):
    """`id` is the token's `jti`."""

    id: Annotated[str, Field(min_length=1, max_length=200)]


async def revoke(request: Request) -> Response:
    gateway, token = services(request), as_operator(request)
    body = protocol.validate(RevokeBody, await json_body(request, token))
    await gateway.revocations.add(body.id, token.subject)
    ended = [one for one in gateway.connections if one.token is not None and one.token.id == body.id]
    gateway.grants.revoke(body.id)
    await gateway.audit.note(token.subject, "token.revoked", None, operator=True, token=body.id)
    return as_json({"id": body.id, "closed": len(ended)})


async def audit(request: Request) -> Response:
    as_operator(request)
    query = request.query_params
    limit, before = query.get("limit", "100"), query.get("before")
    if (
        not protocol.NUMBER.fullmatch(limit)
        or not 0 < int(limit) <= 1000
        or not protocol.NUMBER.fullmatch(before or "0")
    ):
        raise InvalidParams("limit must be a number up to 1000, and before the id of an entry")
    last = None if before is None else min(int(before), 1 << 62)
    found = await services(request).audit.entries(int(limit), query.get("tenant"), last)
    return as_json({"entries": found})


ROUTES: Final = (
    Route("/v1/revocations", revoke, methods=["POST"]),
    Route("/v1/audit", audit),
)
