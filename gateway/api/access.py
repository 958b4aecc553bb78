"""Who may make a request: its origin, token, slot and tenant; its body; and its end when its token ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import orjson
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request

from gateway.api.http import USES, read_body, read_json, shutting_down, weighed
from gateway.api.services import services
from gateway.auth import tokens
from gateway.auth.tokens import Token
from gateway.errors import Forbidden, InvalidParams, NotFound, Unauthorized
from gateway.protocol import maxima
from gateway.runtime import TENANT_NAME
from gateway.transport.http1 import ABORT

_LINGER: Final = 5.0  # seconds for a client to read an answer that must end


def check_origin(asked: HTTPConnection) -> None:
    """Raise `Forbidden` unless requests from the page's origin are allowed."""
    headers = Headers(scope=asked.scope)
    if not tokens.origin_allowed(
        headers.get("origin"),
        headers.get("host"),
        asked.scope["scheme"],
        services(asked).settings.origins,
        headers.get("x-forwarded-proto"),
    ):
        raise Forbidden("requests from this origin are refused; list it in GATEWAY_ORIGINS")


def secure(asked: HTTPConnection) -> bool:
    """Return whether the browser uses https, according to the proxy that terminates TLS."""
    scheme = asked.headers.get("x-forwarded-proto", asked.scope.get("scheme", "http"))
    return scheme.partition(",")[0].strip().lower() in ("https", "wss")


def slot(asked: HTTPConnection) -> str | None:
    """Return the requested session slot; websockets, links and EventSource cannot send a header."""
    return asked.headers.get("x-session-slot") or asked.query_params.get("slot") or None


def raw_token(asked: HTTPConnection) -> str | None:
    """Return the unverified token of the header or else of the cookie, or None."""
    headers = asked.headers
    return tokens.raw_token(
        headers.get("authorization"), headers.get("cookie"), slot(asked), secure=secure(asked)
    )


def sharer(token: Token) -> str:
    """Return the share for a request without a tenant: of the token's only tenant, or of its subject."""
    coverage = token.coverage
    return next(iter(coverage)) if coverage is not None and len(coverage) == 1 else f"sub {token.subject}"


async def keep_awake(request: Request, tenant: str) -> None:
    """Wake a tenant that sleeps, and keep it awake until the answer has been sent."""
    idle = services(request).idle
    request.scope[USES].enter_context(idle.using(tenant))
    await idle.awake(tenant)


def check_covered(token: Token | None, tenant: str) -> None:
    """Raise `NotFound` if `token` does not cover the tenant, exactly as if the tenant did not exist."""
    if not TENANT_NAME.fullmatch(tenant) or (token is not None and not token.covers(tenant)):
        raise NotFound(f"no tenant {tenant[:63]}")


def check_serving(request: Request) -> None:
    """Raise `Unavailable` while the gateway drains and takes no new work."""
    if services(request).draining:
        raise shutting_down()


def check_live(request: Request, token: Token) -> None:
    """Raise `Unauthorized` if a token has ended since it was verified."""
    if ended := services(request).grants.ended(token):
        raise Unauthorized(ended)


async def json_body(request: Request, token: Token) -> Any:
    """Return the JSON body. Raises `Unauthorized` if the token ended while it arrived."""
    body = await read_json(request, maxima.BODY_MAX)
    check_live(request, token)
    return body


async def raw_body(request: Request, token: Token) -> bytes:
    """Return a body that is safe to parse as JSON. Raises `Unauthorized` if the token ended meanwhile."""
    body = await read_body(request, maxima.BODY_MAX)
    await weighed(request, body)
    check_live(request, token)
    return body


async def optional_json(request: Request, token: Token) -> Any:
    """Return the JSON body, `{}` if there is none. Raises `InvalidParams`."""
    text = await raw_body(request, token)
    return parsed(text) if text else {}


def parsed(text: bytes) -> Any:
    """Return JSON that was weighed. Raises `InvalidParams`."""
    try:
        return orjson.loads(text)
    except ValueError:
        raise InvalidParams("the body is not JSON") from None


def idempotency_key(request: Request) -> str | None:
    """Return the caller's id for this call, or None. Raises `InvalidParams`."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= 200:
        raise InvalidParams("an Idempotency-Key has 1 to 200 characters")
    return key


def end_with(request: Request, token: Token, end: Callable[[], None]) -> None:
    """End this request's endless answer when its token ends."""
    uses = request.scope[USES]

    def over(why: str) -> None:
        end()
        # a client that reads nothing would keep the connection forever
        cut = request.scope.get("state", {}).get(ABORT, lambda: None)
        uses.callback(asyncio.get_running_loop().call_later(_LINGER, cut).cancel)

    uses.enter_context(services(request).grants.hold(token, over))
