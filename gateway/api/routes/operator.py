"""Routes for operators only: revocation of tokens, and the audit log."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from gateway import protocol
from gateway.api.access import as_operator, queried, validated
from gateway.api.answers import Audit, AuditQuery, Revoked
from gateway.api.http import as_json
from gateway.api.operation import Operation
from gateway.api.services import services


class RevokeBody(protocol.Params):
    """`id` is the token's `jti`."""

    id: Annotated[str, Field(min_length=1, max_length=200)]


async def revoke(request: Request) -> Response:
    """Revoke a token and end everything open under it."""
    gateway, token = services(request), as_operator(request)
    body = await validated(request, token, RevokeBody)
    await gateway.revocations.add(body.id, token.subject)
    ended = [one for one in gateway.connections if one.token is not None and one.token.id == body.id]
    gateway.grants.revoke(body.id)
    await gateway.audit.note(token.subject, "token.revoked", None, operator=True, token=body.id)
    return as_json({"id": body.id, "closed": len(ended)})


async def audit(request: Request) -> Response:
    """Return who did what, newest first."""
    as_operator(request)
    query = queried(request, AuditQuery)
    last = None if query.before is None else min(query.before, 1 << 62)
    found = await services(request).audit.entries(query.limit, query.tenant, last)
    return as_json({"entries": found})


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
