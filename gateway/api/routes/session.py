"""Routes of a browser's session: its token in a cookie, one for each slot."""

from __future__ import annotations

import re
import time
from typing import Final

from starlette.responses import Response

from gateway import protocol
from gateway.api.access import check_origin, secure, slot
from gateway.api.answers import AgentToken, Session
from gateway.api.http import as_json, read_json
from gateway.api.operation import ANY, OPEN, ApiCall, ApiRoutes
from gateway.auth import tokens
from gateway.errors import InvalidParams, NotFound
from gateway.protocol import types

AGENT_TOKEN_TTL: Final = 3600  # seconds; the editor asks again for each prompt
_MAX: Final = 32 << 10  # bytes of a body, which anybody may send

_SLOT: Final = ("X-Session-Slot",)

routes = ApiRoutes("session")


class SessionBody(protocol.Params):
    token: types.Token
    slot: types.Slot | None = None


@routes("GET", "/v1/session", scope=ANY, headers=_SLOT, answers={200: Session})
async def show(call: ApiCall) -> Session:
    """Return what the token or the cookie grants."""
    by_header = tokens.bearer_token(call.headers.get("authorization")) is not None
    return _granted(call.token, None if by_header else slot(call))


@routes("POST", "/v1/session", scope=OPEN, takes=SessionBody, answers={200: Session})
async def open(call: ApiCall) -> Response:
    """Store a token in its slot's cookie. If there are too many slots, the oldest are removed."""
    check_origin(call)
    body = protocol.validate(SessionBody, await read_json(call, _MAX))
    token = call.gateway.verify(body.token)
    response = as_json(_granted(token, body.slot))
    name = tokens.cookie_name(body.slot, secure=secure(call))
    _set_cookie(call, response, name, body.token, max(0, int(token.expires - time.time())))
    if body.slot is not None:
        others = [one for one in tokens.slots(call.headers.get("cookie")) if one != name]
        for one in others[: max(0, len(others) + 1 - tokens.MOST_SLOTS)]:
            _set_cookie(call, response, one, "", 0)
    return response


@routes("DELETE", "/v1/session", scope=OPEN, headers=_SLOT, answers={204: None})
async def close(call: ApiCall) -> Response:
    """Clear the cookie of the named slot, or the one without a slot."""
    check_origin(call)
    named = slot(call)
    if named is not None and not re.fullmatch(tokens.SLOT, named):
        raise InvalidParams("a slot must have 1 to 32 characters of a-z and 0-9", field="slot")
    response = Response(status_code=204)
    _set_cookie(call, response, tokens.cookie_name(named, secure=secure(call)), "", 0)
    return response


@routes("POST", "/v1/tenants/{tenant}/agent-token", scope=ANY, headers=_SLOT, answers={200: AgentToken})
async def agent_token(call: ApiCall) -> AgentToken:
    """Return a token for the agents' server: for this tenant only, and no longer than the caller's."""
    gateway, name, token = call.gateway, call.tenant, call.token
    if gateway.settings.agent_url is None:
        raise NotFound("this gateway offers no agent: GATEWAY_AGENT_URL is not set", reason="off")
    await gateway.runtime.tenants.get(name)  # raises if it does not exist
    raw, granted = tokens.for_agent(gateway.secret, token, name, AGENT_TOKEN_TTL)
    await gateway.audit.note(token.subject, "tenant.agent.token", name, operator=token.operates)
    return {
        "token": raw,
        "subject": granted.subject,
        "scopes": sorted(granted.scopes),
        "expires": granted.expires,
    }


def _granted(token: tokens.Token, slot: str | None) -> Session:
    return {
        "subject": token.subject,
        "scopes": sorted(token.scopes),
        "tenants": sorted(token.tenants),
        "expires": token.expires,
        "id": token.id,
        "slot": slot,
        "domains": None if token.domains is None else sorted(token.domains),
    }


def _set_cookie(call: ApiCall, response: Response, name: str, value: str, age: int) -> None:
    response.set_cookie(
        name, value, max_age=age, httponly=True, samesite="strict", secure=secure(call), path="/"
    )
