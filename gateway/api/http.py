"""HTTP requests and answers: bodies, JSON, problems, request ids, and the share each counts towards."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import orjson
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from gateway import protocol
from gateway.auth import tokens
from gateway.bounds import LEAST_RATE, paced, run_in_thread
from gateway.errors import (
    Cancelled,
    GatewayError,
    InvalidParams,
    NotFound,
    RateLimited,
    Timeout,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from gateway.files.http import UnsatisfiableRange
from gateway.hostnames import Misdirected, gateway_hosts, host_allowed
from gateway.limits.budget import REQUEST, SMALL, ClientLimits
from gateway.protocol import maxima
from gateway.settings import Settings
from gateway.transport import http1

log = logging.getLogger(__name__)

RETRY_AFTER_MS: Final = 2000
# in an ASGI scope: the uses of tenants, which end with the answer
USES: Final = "gateway.uses"
# likewise: the client's share, once it is known
SHARE: Final = "gateway.share"
# likewise: the request's id
REQUEST_ID: Final = "gateway.request_id"
BODY_TIMEOUT: Final = 30.0  # seconds without progress of a body or an answer: a slow network has less
_SLICE: Final = 256 << 10  # bytes of an answer sent at a time
_WEIGHING: Final = 30.0  # seconds to check the contents of a large body; the largest takes a moment
_BY_CADDY: Final = ("/v1/wake", "/v1/preview")
_OURS: Final = b"x-gateway-"  # of headers that gateways send each other
_CADDYS: Final = b"x-gateway-uri"
_ID_HEADER: Final = "x-request-id"
_SHORT_HEADERS: Final = frozenset(
    name.encode() for name, limit in maxima.HEADERS.items() if limit < maxima.HEADER_MAX
)


async def unless_gone(request: Request, work: Any) -> Any:
    """Return what `work` returns; cancel it if the client hangs up first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the client went away")
        return working.result()
    finally:
        await end(working)
        await end(leaving)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def end(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end, whatever its outcome."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def read_json(request: Request, limit: int) -> Any:
    """Return the JSON body. Raises what `read_body` raises, and `InvalidParams`."""
    body = await read_body(request, limit)
    await weighed(request, body)
    try:
        return orjson.loads(body)
    except ValueError:
        raise InvalidParams("the body is not JSON") from None


async def weighed(request: Request, body: bytes) -> None:
    """Raise `TooLarge` unless a JSON body is small enough to parse."""
    if len(body) > protocol.LIGHT:
        await run_in_thread(request.path_params.get("tenant", ""), _WEIGHING, protocol.weigh, body)


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body, which counts as in flight until the request is answered.

    Raises `TooLarge` before more than `limit` bytes are read, `RateLimited` before more than the client's
    share has room for, `Timeout` if nothing or too little arrives for `BODY_TIMEOUT` (see `paced`).
    Without a token the whole body must arrive within that time.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise TooLarge(f"the body exceeds {limit} bytes", limit=limit)
    known = SHARE in request.scope
    held = int(declared) if declared.isdigit() else 0
    if known:
        hold(request.scope, held)
    body = bytearray()
    try:
        async with asyncio.timeout(None if known else BODY_TIMEOUT):
            async for piece in paced(request.stream(), BODY_TIMEOUT):
                body += piece
                if len(body) > limit:
                    raise TooLarge(f"the body exceeds {limit} bytes", limit=limit)
                if known and len(body) > held:
                    hold(request.scope, step := max(SMALL, len(body) - held))
                    held += step
    except TimeoutError:
        raise Timeout(f"the body is too slow: under {LEAST_RATE} bytes a second") from None
    return bytes(body)


def ask(scope: Scope, limits: ClientLimits, owner: str) -> None:
    """Count a request, and its bytes, as its owner's until it is answered. Raises `RateLimited`."""
    if SHARE not in scope:
        scope[USES].enter_context(limits.requests.reserve(owner))
        http1.identify(scope)
        scope[SHARE] = limits.bytes.tenant(owner)
        hold(scope, REQUEST)


def hold(scope: Scope, size: int) -> None:
    """Count bytes of a request or its answer until it is answered. Raises `RateLimited`."""
    scope[USES].enter_context(scope[SHARE].reserve(size))


def address(connection: HTTPConnection) -> str:
    """Return the client's address. Only our own proxy may name another one."""
    told = http1.forwarded(connection.scope)
    return told if told is not None else http1.block(connection.client.host if connection.client else "")


class _AnyPath(PathConvertor):
    """A path of any bytes: names may contain line breaks, which the router's own pattern does not match."""

    regex = "(?s:.*)"


register_url_convertor("any", _AnyPath())


def file_path(request: Request) -> str:
    """Return the path after `/files/`, unescaped; it must be UTF-8."""
    raw: bytes = request.scope["raw_path"]
    parts = raw.split(b"/", 5)  # "", v1, tenants, the tenant, files: escaped or not
    if len(parts) < 6:
        raise NotFound("no such route")
    try:
        path = unquote_to_bytes(parts[5]).decode() or "."
    except UnicodeDecodeError:
        raise InvalidParams("the path is not UTF-8", field="path") from None
    if len(path) > maxima.PATH_MAX:
        raise InvalidParams(f"the path exceeds {maxima.PATH_MAX} characters", field="path")
    return path


def as_json(value: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


class InParts(Response):
    """A JSON answer that is made in parts as its client takes them; a small one is sent whole.

    If the client takes nothing for `BODY_TIMEOUT`, the connection is cut.
    """

    media_type = "application/json"

    def __init__(self, parts: Iterator[bytes]) -> None:
        begun, size = list[bytes](), 0
        for part in parts:
            begun.append(part)
            if (size := size + len(part)) > _SLICE:
                break
        self._rest: Iterator[bytes] | None = parts if size > _SLICE else None
        super().__init__(b"".join(begun))
        if self._rest is not None:
            del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._rest is None:
            await super().__call__(scope, receive, send)
            return
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        for part in itertools.chain((bytes(self.body),), self._rest):
            try:
                async with asyncio.timeout(BODY_TIMEOUT):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except TimeoutError:
                log.info("an answer timed out: the client read nothing for %.0f s", BODY_TIMEOUT)
                return  # without the rest of the body the server cuts the connection
            await asyncio.sleep(0)  # others have their turn, even if this never waits
        await send({"type": "http.response.body", "body": b""})


def problem(error: GatewayError, status: int | None = None) -> Response:
    """Return `error` as `application/problem+json` (RFC 9457) with our `code` and its facts."""
    status = error.http_status if status is None else status
    body = {**error.facts, "type": "about:blank", "title": error.code, "status": status}
    body |= {"detail": error.message, "code": error.code}
    headers = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UnsatisfiableRange):
        headers["Content-Range"] = f"bytes */{error.facts['size']}"
    if isinstance(error, Unavailable | RateLimited):
        headers["Retry-After"] = str(math.ceil(error.facts.get("retry_after", RETRY_AFTER_MS / 1000)))
    return Response(orjson.dumps(body), status, headers=headers, media_type="application/problem+json")


async def problem_handler(request: Request, error: Exception) -> Response:
    match error:
        case GatewayError():
            return problem(error)
        case HTTPException():
            told: GatewayError = InvalidParams(error.detail)
            headers = dict(error.headers or {})
            if error.status_code == 404:
                told = NotFound("no such route")
            elif error.status_code == 405:
                headers["Allow"] = _allowed(request)
                told = InvalidParams(f"{request.method} is not allowed here; allowed: {headers['Allow']}")
            response = problem(told, error.status_code)
            response.headers.update(headers)
            return response
        case ClientDisconnect():
            return problem(Cancelled("the client went away"))
        case _:
            log.error("%s %s failed", request.method, request.url.path, exc_info=error)
            return problem(Unavailable("the gateway failed; its log says why"), 500)


def _allowed(request: Request) -> str:
    """Return the methods of a request's path; the router only knows those of the first matching route."""
    methods: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


class HeadTooLarge(TooLarge):
    http_status = 431


def check_head(scope: Scope) -> None:
    """Raise `HeadTooLarge` for a request whose head has a part that is longer than any needs (`maxima`)."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    query: bytes = scope["query_string"]
    parts = (
        ("path", len(scope.get("raw_path") or scope["path"]), maxima.TARGET_MAX, "bytes"),
        ("query", len(query), maxima.QUERY_MAX, "bytes"),
        ("query", query.count(b"&") + 1, maxima.QUERY_MEMBERS, "members"),
        ("headers", len(headers), maxima.HEADERS_MAX, "headers"),
    )
    for field, size, limit, what in parts:
        if size > limit:
            raise HeadTooLarge(f"the request's {field} exceeds {limit} {what}", field=field, limit=limit)
    for name, value in headers:
        if len(value) > maxima.HEADER_MAX or name in _SHORT_HEADERS:
            limit = maxima.HEADERS.get(name.decode("latin-1"), maxima.HEADER_MAX)
            if len(value) > limit:
                field = name[:64].decode("latin-1")
                raise HeadTooLarge(f"the header {field} exceeds {limit} bytes", field=field, limit=limit)


def at_the_edge(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Refuse heads that are too large, and requests for hosts that are not ours with 421.

    Websockets are refused before their upgrade. Caddy calls some routes with the `Host` of the visited site.
    Headers that only gateways and Caddy may send are dropped: gateways use a listener of their own.
    """
    own = gateway_hosts(settings)

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                check_head(scope)
                host, near = Headers(scope=scope).get("host"), http1.from_this_machine(scope)
                by_caddy = near and scope["path"] in _BY_CADDY
                if by_caddy and scope["type"] == "http":
                    http1.identify(scope)  # visitors that wait for a site have limits of their own
                if any(name.startswith(_OURS) for name, _ in scope["headers"]):
                    kept = _CADDYS if by_caddy else b""
                    scope["headers"] = [
                        (name, value)
                        for name, value in scope["headers"]
                        if not name.startswith(_OURS) or name == kept
                    ]
                if not by_caddy and not host_allowed(host, own, near=near):
                    raise Misdirected(
                        f"this gateway is not {(host or '')[:100]!r}: use its address, or list the name in "
                        "GATEWAY_HOSTS"
                    )
            except (HeadTooLarge, Misdirected) as error:
                if scope["type"] == "http":
                    await problem(error)(scope, receive, send)
                else:
                    await WebSocket(scope, receive, send).send_denial_response(problem(error))
                return
        await app(scope, receive, send)

    return wrapped


def with_request_id(app: ASGIApp) -> ASGIApp:
    """Add `X-Request-Id` to every HTTP answer: the request's, or a new one.

    Large answers are sent in parts: what the client has not taken counts as in flight, and if it takes
    nothing for `BODY_TIMEOUT`, the connection is cut. A request that takes longer than the server has for
    its end is answered 503.
    """

    async def send_parts(scope: Scope, message: Message, send: Send) -> None:
        body = message["body"]
        with contextlib.ExitStack() as held:
            if SHARE in scope:
                held.enter_context(scope[SHARE].reserve()).hold(len(body))
            for start in range(0, len(body), _SLICE):
                part = {**message, "body": body[start : start + _SLICE], "more_body": True}
                try:
                    async with asyncio.timeout(BODY_TIMEOUT):
                        await send(part)
                except TimeoutError:
                    # without the rest of the body the server cuts the connection
                    log.info("an answer timed out: the client read nothing for %.0f s", BODY_TIMEOUT)
                    return
        await send({**message, "body": b""})

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        asked = Headers(scope=scope).get(_ID_HEADER, "")
        request_id = asked if 0 < len(asked) <= 128 and asked.isprintable() else secrets.token_hex(8)
        scope[REQUEST_ID] = request_id
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_ID_HEADER] = request_id
            elif len(message.get("body", b"")) > _SLICE and not message.get("more_body"):
                await send_parts(scope, message, send)
                return
            await send(message)

        try:
            with contextlib.ExitStack() as scope[USES]:
                await app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # by the server, which ends and would answer 500 as if there were a fault
            if begun:
                raise
            await problem(shutting_down())(scope, receive, send_with_id)

    return wrapped


def shutting_down() -> Unavailable:
    """Return what is said to a client whose request the next process has to answer."""
    return Unavailable("the gateway is shutting down; try again soon", retryAfterMs=RETRY_AFTER_MS)


# --- pages of other origins ----------------------------------------------------------------------------


_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_SENT: Final = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-Match",
    "If-None-Match",
    "Last-Event-ID",
    "Mcp-Protocol-Version",
    "Mcp-Session-Id",
    "Range",
    "X-Call-Linger",
    "X-Request-Id",
    "X-Session-Slot",
    "X-Tool-Session",
)
_READ: Final = ("Content-Range", "ETag", "Location", "Retry-After", "X-Request-Id")
_KEPT: Final = 600  # seconds for which a browser does not ask again


class _ListedOrigins(CORSMiddleware):
    """Allows an origin in any spelling, as the check of requests does."""

    def is_allowed_origin(self, origin: str) -> bool:
        return tokens.origin_allowed(origin, None, "", self.allow_origins)


def for_listed_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Answer browsers' preflight requests, and let pages of the listed origins read the answers."""
    listed = [origin for origin in origins if origin != "*"]  # that would be every origin, and is none here
    if not listed:
        return app
    return _ListedOrigins(
        app,
        allow_origins=listed,
        allow_methods=_METHODS,
        allow_headers=_SENT,
        expose_headers=_READ,
        max_age=_KEPT,
    )
