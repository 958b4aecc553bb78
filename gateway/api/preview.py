"""Serves a site's page to the editor's preview, with a script that reports the page's errors.

Only the editor gets such a page, and only on request: the page's address has a key, which the gateway makes
for a token that covers the tenant. Caddy passes requests with that parameter to `/v1/preview`; all others go
to the site as usual. The key opens nothing but the site's own page, so a tenant gains nothing by reading it.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final
from urllib.parse import urljoin, urlsplit

import aiohttp
import orjson
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from yarl import URL

from gateway.admission import Admission
from gateway.caddy import Caddy
from gateway.errors import InvalidParams, NotFound, Unavailable
from gateway.hostnames import plain

PARAMETER: Final = "__gateway_preview"
PATH: Final = "/v1/preview"
_MOST: Final = 32  # pages being served, of one site a quarter: each holds two connections
TTL: Final = 12 * 3600

_SCRIPT: Final = Path(__file__).with_name("preview.js").read_text("ascii")
_ORIGIN: Final = re.compile(
    r"https?://[a-z0-9.-]{1,253}(:[0-9]{1,5})?|https?://\[[0-9a-f:.]{2,45}\](:[0-9]{1,5})?"
)
_GIVEN: Final = re.compile(rf"([?&]){PARAMETER}=([A-Za-z0-9._~-]{{1,600}})(&?)")
_HEAD: Final = re.compile(rb"<head(?=[\s>])", re.IGNORECASE)
_HEAD_MAX: Final = 2000  # bytes of the tag
_DOCTYPE: Final = re.compile(rb"\s*<!doctype[^>]{0,200}>", re.IGNORECASE)
_LOOKED_AT: Final = 64 << 10  # bytes in which to find the place for the script
_PIECE: Final = 64 << 10
_CONNECT: Final = 5.0
_SILENCE: Final = 30.0  # seconds without a byte from the site
# RFC 9110 §7.6.1, and headers that would make the answer other than the whole page
_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_NOT_ASKED: Final = _HOP | {
    "accept-encoding",
    "content-length",
    "host",
    "if-modified-since",
    "if-none-match",
    "range",
    "x-gateway-uri",
}
_NOT_ANSWERED: Final = _HOP | {"cache-control", "content-length", "date", "etag", "last-modified", "server"}


def key(secret: str, domain: str, origin: str, ends: int) -> str:
    """Return a key that adds the script to a domain's pages, for the editor at `origin`, until `ends`."""
    said = base64.urlsafe_b64encode(origin.encode()).rstrip(b"=").decode()
    return f"{ends}.{said}.{_signed(secret, domain, origin, ends)}"


def opened(secret: str, domain: str, given: str) -> str | None:
    """Return the editor's origin named in a key of this domain; None if the key is not valid."""
    ends, _, rest = given.partition(".")
    said, _, signature = rest.partition(".")
    if not (ends.isascii() and ends.isdecimal() and len(ends) < 12) or int(ends) < time.time():
        return None
    try:
        origin = base64.urlsafe_b64decode(said + "=" * (-len(said) % 4)).decode("ascii")
    except ValueError:
        return None
    signed = _signed(secret, domain, origin, int(ends))
    fits = hmac.compare_digest(signature.encode(), signed.encode())
    return origin if fits and _ORIGIN.fullmatch(origin) else None


def _signed(secret: str, domain: str, origin: str, ends: int) -> str:
    text = orjson.dumps(["preview", domain, origin, ends])
    return base64.urlsafe_b64encode(hmac.digest(secret.encode(), text, "sha256")[:16]).rstrip(b"=").decode()


def origin_of(given: str | None) -> str:
    """Return the origin of the requesting page. Raises `InvalidParams` if there is none."""
    origin = (given or "").lower()
    if not _ORIGIN.fullmatch(origin):
        raise InvalidParams("only a web page can open a preview: this request has no Origin header")
    return origin


def without(uri: str) -> tuple[str, str]:
    """Return a request's target without the parameter, and the parameter's value."""
    match = _GIVEN.search(uri)
    if match is None:
        return uri, ""
    return uri[: match.start()] + (match[1] if match[3] else "") + uri[match.end() :], match[2]


def with_script(page: bytes, origin: str) -> bytes:
    """Return a page's beginning with the script inserted before any of the page's own."""
    script = _SCRIPT.replace("EDITOR", orjson.dumps(origin).decode()).encode()
    at, _ = _head(page[:_LOOKED_AT], 0)
    if not at and (doctype := _DOCTYPE.match(page)) is not None:
        at = doctype.end()
    return page[:at] + b"<script>" + script + b"</script>" + page[at:]


def _head(page: bytes, start: int) -> tuple[int, int]:
    """Return where the head's tag ends, 0 if there is none, and from where to search once there is more.

    The last bytes before each `>` are looked at once, however often a site begins a tag.
    """
    while (end := page.find(b">", start) + 1) > 0:
        if _HEAD.search(page, max(start, end - _HEAD_MAX), end) is not None:
            return end, end
        start = end
    return 0, start


class Previews:
    """The pages being served to previews. Their number is limited, for one site to a quarter of that."""

    def __init__(self, caddy: Caddy, secret: str) -> None:
        self._caddy, self._secret = caddy, secret
        self._opening = Admission[str](
            "previews being opened",
            each=_MOST // 4,
            total=_MOST,
            name="this site",
            hint="try again soon",
        )

    def key(self, domain: str | None, origin: str) -> tuple[str, int]:
        """Return a key for a domain, and when it ends. Raises `NotFound` if Caddy serves no such site."""
        if domain is None or self._caddy.get(domain) is None:
            raise NotFound("this tenant has no domain, so it has no preview", reason="no_domain")
        ends = int(time.time()) + TTL
        return key(self._secret, domain, origin, ends), ends

    async def answer(self, request: Request) -> Response:
        """Answer a request passed on by Caddy. Raises `NotFound`, `RateLimited` or `Unavailable`."""
        host = re.sub(r":[0-9]{1,5}$", "", request.headers.get("host", ""))
        domain = plain(host) if host.isascii() else None  # a browser sends no other
        uri, given = without(request.headers.get("x-gateway-uri", ""))
        target = None if domain is None else self._caddy.get(domain)
        if domain is None or target is None or not uri.startswith("/") or uri.startswith("//"):
            raise NotFound("there is no site at this address")
        origin = opened(self._secret, domain, given)
        if origin is None:
            return RedirectResponse(uri, 307, headers={"Cache-Control": "no-store"})
        stack = contextlib.AsyncExitStack()
        stack.enter_context(self._opening.reserve(domain))
        try:
            return await self._fetched(request, stack, target, uri, given, origin)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            await stack.aclose()
            raise Unavailable(f"the site does not answer: {type(error).__name__}") from None
        except BaseException:
            await stack.aclose()
            raise

    async def _fetched(
        self,
        request: Request,
        stack: contextlib.AsyncExitStack,
        target: str,
        uri: str,
        given: str,
        origin: str,
    ) -> Response:
        host = request.headers["host"]
        where = target.removeprefix("asleep_")
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_SILENCE),
            )
        )
        headers = [(name, value) for name, value in request.headers.items() if name not in _NOT_ASKED]
        headers += [("host", host), ("accept-encoding", "identity")]
        answer = await stack.enter_async_context(
            session.get(URL(f"http://{where}{uri}", encoded=True), headers=headers, allow_redirects=False)
        )
        response = _PreviewPage(answer, origin, stack)
        response.raw_headers = [
            (name.lower(), value)
            for name, value in answer.raw_headers
            if name.lower().decode("latin-1") not in _NOT_ANSWERED
        ]
        response.headers["Cache-Control"] = "no-store"
        if (location := answer.headers.get("Location")) is not None:
            response.headers["Location"] = _kept(location, host, uri, given)
        return response


class _PreviewPage(StreamingResponse):
    """A page as it arrives, with the script; anything else unchanged. Closes `stack` at its end."""

    def __init__(self, answer: aiohttp.ClientResponse, origin: str, stack: contextlib.AsyncExitStack) -> None:
        super().__init__(_body(answer, origin), answer.status)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def _body(answer: aiohttp.ClientResponse, origin: str) -> AsyncIterator[bytes]:
    plainly = answer.headers.get("Content-Encoding", "identity").lower() == "identity"
    if answer.content_type == "text/html" and plainly and "utf-16" not in (answer.charset or "").lower():
        begun, at, found = b"", 0, 0
        while len(begun) < _LOOKED_AT and not found:
            piece = await answer.content.read(_PIECE)
            if not piece:
                break
            begun += piece
            found, at = _head(begun, at)
        yield with_script(begun, origin)
    async for piece in answer.content.iter_chunked(_PIECE):
        yield piece


def _kept(location: str, host: str, uri: str, given: str) -> str:
    """Return a redirect's target, with the parameter if it stays on the site."""
    try:
        parts = urlsplit(urljoin(f"http://{host}{uri}", location))
    except ValueError:
        return location
    if parts.netloc != host or parts.scheme not in ("http", "https"):
        return location
    whole, mark, fragment = location.partition("#")
    return f"{whole}{'&' if '?' in whole else '?'}{PARAMETER}={given}{mark}{fragment}"
