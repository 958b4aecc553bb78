"""Routes about the gateway itself: liveness, metrics, the description of its API, and those for operators."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from itertools import chain
from operator import itemgetter
from typing import Annotated, Any, Final

import orjson
from pydantic import Field
from starlette.responses import HTMLResponse, Response

from gateway import protocol
from gateway.api import openapi
from gateway.api.answers import Alive, Audit, AuditQuery, Ready, Revoked
from gateway.api.metrics import Metrics
from gateway.api.operation import OPEN, ApiCall, ApiRoutes, Media
from gateway.errors import InvalidParams, Unavailable
from gateway.protocol import types

process = ApiRoutes("process")


@process("GET", "/healthz", scope=OPEN, answers={200: Alive})
async def alive(call: ApiCall) -> Mapping[str, Any]:
    """Answer while the process is alive."""
    return {"status": "alive"}


@process("GET", "/readyz", scope=OPEN, answers={200: Ready})
async def ready(call: ApiCall) -> Mapping[str, Any]:
    """Answer if tenants can be served; an error says why not."""
    gateway = call.gateway
    if gateway.draining:
        raise Unavailable("the gateway is draining", reason="draining")
    await gateway.runtime.ready()
    failed = gateway.journal.failed
    if failed is not None:
        raise Unavailable(f"events cannot be recorded: {failed.message}", **failed.facts)
    return {"status": "ready"}


@process("GET", "/metrics", scope=OPEN, answers={200: Media("text/plain", text=True)})
async def metrics(call: ApiCall) -> Response:
    """Return the gateway's metrics in Prometheus' format."""
    return Response(call.gateway.metrics.render(), media_type=Metrics.CONTENT_TYPE)


# --- description --------------------------------------------------------------------------------------

reference = ApiRoutes("reference")

_HEADERS: Final = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


@reference("GET", "/openapi.json", scope=OPEN, answers={200: Media("application/json")})
async def document(call: ApiCall) -> Response:
    """Return this document: the HTTP API in OpenAPI 3.1."""
    return Response(orjson.dumps(await _document(call)), headers=_HEADERS, media_type="application/json")


@reference("GET", "/wire.json", scope=OPEN, answers={200: Media("application/schema+json")})
async def wire(call: ApiCall) -> Response:
    """Return the JSON Schema of the websocket's methods and notifications."""
    said = await asyncio.to_thread(protocol.wire_schema)
    return Response(orjson.dumps(said), headers=_HEADERS, media_type="application/schema+json")


@reference("GET", "/reference", scope=OPEN, answers={200: Media("text/html", text=True)})
async def page(call: ApiCall) -> Response:
    """Return the HTTP API as a page to read."""
    text = await asyncio.to_thread(openapi.page, await _document(call))
    return HTMLResponse(text, headers={**_HEADERS, "Content-Security-Policy": openapi.POLICY})


async def _document(call: ApiCall) -> dict[str, Any]:
    """Return the document of the application's routes, which is made only once, since that takes a while."""
    state = call.app.state
    if not hasattr(state, "openapi"):
        state.openapi = asyncio.ensure_future(asyncio.to_thread(openapi.document, call.app.routes))
    found: dict[str, Any] = await asyncio.shield(state.openapi)
    return found


# --- operators ----------------------------------------------------------------------------------------

operator = ApiRoutes("operator")


class RevokeBody(protocol.Params):
    """`id` is the token's `jti`, `expires` its `exp`, until which the revocation is kept; else for good."""

    id: types.TokenId
    expires: Annotated[float | None, Field(gt=0, lt=1e11)] = None


@operator("POST", "/v1/revocations", scope="admin", operator=True, answers={200: Revoked})
async def revoke(call: ApiCall, body: RevokeBody) -> Mapping[str, Any]:
    """Revoke a token and end everything open under it."""
    gateway, token = call.gateway, call.token
    expires = math.inf if body.expires is None else body.expires
    await gateway.revocations.add(body.id, token.subject, expires)
    answer: dict[str, Any] = {"id": body.id, "closed": gateway.end_token(body.id)}
    await gateway.audit.note(token.subject, "token.revoked", None, operator=True, token=body.id)
    others = await gateway.topology.revoke(body.id)
    return {**answer, **others, "closed": answer["closed"] + others.get("closed", 0)}


@operator("GET", "/v1/audit", scope="admin", operator=True, answers={200: Audit})
async def audit(call: ApiCall, query: AuditQuery) -> Mapping[str, Any]:
    """Return who did what, newest first."""
    gateway = call.gateway
    last = None if query.before is None else min(query.before, 1 << 62)
    own = gateway.topology.member
    if not own:
        return {"entries": await gateway.audit.entries(query.limit, query.tenant, last)}
    if last is not None and query.member is None:
        raise InvalidParams("each member has its own ids; give the entry's member too", field="member")
    others = await gateway.topology.ask_others(call)
    found = others.entries("entries")
    if query.member in (None, own):
        mine = await gateway.audit.entries(query.limit, query.tenant, last)
        found = chain(({**entry, "member": own} for entry in mine), found)
    newest = sorted(found, key=itemgetter("time"), reverse=True)
    return {"entries": newest[: query.limit], **others.unanswered}
