"""Routes for operators only: revocation of tokens, and the audit log."""

from __future__ import annotations

import math
from itertools import chain
from operator import itemgetter
from typing import Annotated, Any, Final

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from gateway import protocol
from gateway.api.access import as_operator, queried, validated
from gateway.api.answers import Audit, AuditQuery, Revoked
from gateway.api.http import as_json
from gateway.api.operation import Operation
from gateway.api.services import services
from gateway.errors import InvalidParams
from gateway.protocol import types


class RevokeBody(protocol.Params):
    """`id` is the token's `jti`, `expires` its `exp`, until which the revocation is kept; else for good."""

    id: types.TokenId
    expires: Annotated[float | None, Field(gt=0, lt=1e11)] = None


async def revoke(request: Request) -> Response:
    """Revoke a token and end everything open under it."""
    gateway, token = services(request), as_operator(request)
    body = await validated(request, token, RevokeBody)
    expires = math.inf if body.expires is None else body.expires
    await gateway.revocations.add(body.id, token.subject, expires)
    answer: dict[str, Any] = {"id": body.id, "closed": gateway.end_token(body.id)}
    await gateway.audit.note(token.subject, "token.revoked", None, operator=True, token=body.id)
    others = await gateway.topology.revoke(body.id)
    return as_json({**answer, **others, "closed": answer["closed"] + others.get("closed", 0)})


async def audit(request: Request) -> Response:
    """Return who did what, newest first."""
    as_operator(request)
    query, gateway = queried(request, AuditQuery), services(request)
    last = None if query.before is None else min(query.before, 1 << 62)
    own = gateway.topology.member
    if not own:
        return as_json({"entries": await gateway.audit.entries(query.limit, query.tenant, last)})
    if last is not None and query.member is None:
        raise InvalidParams("each member has its own ids; give the entry's member too", field="member")
    others = await gateway.topology.ask_others(request)
    found = others.entries("entries")
    if query.member in (None, own):
        mine = await gateway.audit.entries(query.limit, query.tenant, last)
        found = chain(({**entry, "member": own} for entry in mine), found)
    newest = sorted(found, key=itemgetter("time"), reverse=True)
    return as_json({"entries": newest[: query.limit], **others.unanswered})


ROUTES: Final = (
    Operation(
        "/v1/revocations",
        revoke,
        "POST",
        scope="admin",
        takes=RevokeBody,
        answers={200: Revoked},
    ),
    Operation("/v1/audit", audit, scope="admin", query=AuditQuery, answers={200: Audit}),
)
