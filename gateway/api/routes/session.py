"""Routes of a browser's session: its token in a cookie, one for each slot."""

from __future__ import annotations

import re
import time
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway import protocol
from gateway.api.access import check_origin, for_tenant, secure, slot, with_token
from gateway.api.answers import AgentToken, Session
from gateway.api.http import as_json, read_json
from gateway.api.operation import ANY, OPEN, Operation
from gateway.api.services import services
from gateway.auth import tokens
from gateway.errors import InvalidParams, NotFound
from gateway.protocol import types

AGENT_TOKEN_TTL: Final = 3600  # seconds; the editor asks again for each prompt
_MAX: Final = 32 << 10  # bytes of a body, which anybody may send


class SessionBody(protocol.Params):
    token: types.Token
    slot: types.Slot | None = None


async def show(request: Request) -> Response:
    """Return what the token or the cookie grants."""
    token = with_token(request, None)
    by_header = tokens.bearer_token(request.headers.get("authorization")) is not None
    return as_json(_granted(token, None if by_header else slot(request)))


async def open(request: Request) -> Response:
    """Store a token in its slot's cookie. If there are too many slots, the oldest are removed."""
    gateway = services(request)
    check_origin(request)
    body = protocol.validate(SessionBody, await read_json(request, _MAX))
    token = gateway.verify(body.token)
    response = as_json(_granted(token, body.slot))
    name = tokens.cookie_name(body.slot, secure=secure(request))
    _set_cookie(request, response, name, body.token, max(0, int(token.expires - time.time())))
    if body.slot is not None:
        others = [one for one in tokens.slots(request.headers.get("cookie")) if one != name]
        for one in others[: max(0, len(others) + 1 - tokens.MOST_SLOTS)]:
            _set_cookie(request, response, one, "", 0)
    return response


async def close(request: Request) -> Response:
    """Clear the cookie of the named slot, or the one without a slot."""
    check_origin(request)
    named = slot(request)
    if named is not None and not re.fullmatch(tokens.SLOT, named):
        raise InvalidParams("a slot must have 1 to 32 characters of a-z and 0-9", field="slot")
    response = Response(status_code=204)
    _set_cookie(request, response, tokens.cookie_name(named, secure=secure(request)), "", 0)
    return response


async def agent_token(request: Request) -> Response:
    """Return a token for the agents' server: for this tenant only, and no longer than the caller's."""
    gateway = services(request)
    name, token = for_tenant(request, None)
    if gateway.settings.agent_url is None:
        raise NotFound("this gateway offers no agent: GATEWAY_AGENT_URL is not set", reason="off")
    await gateway.runtime.tenants.get(name)  # raises if it does not exist
    raw, granted = tokens.for_agent(gateway.secret, token, name, AGENT_TOKEN_TTL)
    await gateway.audit.note(token.subject, "tenant.agent.token", name, operator=token.operates)
    said: AgentToken = {
        "token": raw,
        "subject": granted.subject,
        "scopes": sorted(granted.scopes),
        "expires": granted.expires,
    }
    return as_json(said)


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


def _set_cookie(request: Request, response: Response, name: str, value: str, age: int) -> None:
    response.set_cookie(
        name, value, max_age=age, httponly=True, samesite="strict", secure=secure(request), path="/"
    )


_SLOT: Final = ("X-Session-Slot",)

ROUTES: Final = (
    Operation("/v1/session", show, scope=ANY, headers=_SLOT, answers={200: Session}),
    Operation("/v1/session", open, "POST", scope=OPEN, takes=SessionBody, answers={200: Session}),
    Operation("/v1/session", close, "DELETE", scope=OPEN, headers=_SLOT, answers={204: None}),
    Operation(
        "/v1/tenants/{tenant}/agent-token",
        agent_token,
        "POST",
        scope=ANY,
        headers=_SLOT,
        answers={200: AgentToken},
    ),
)
