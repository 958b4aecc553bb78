"""Files over HTTP: conditions and ranges of RFC 9110, and bodies sent from disk.

The tenant's bytes are served from the gateway's own origin, so they must never run there: every answer is an
octet stream that a browser does not sniff, in a sandbox.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.errors import Conflict, GatewayError, InvalidParams, Timeout, TooLarge
from gateway.files.transfers import CHUNK, Source

log = logging.getLogger(__name__)

_TAG: Final = re.compile(r'\s*(W/)?(?:"([^"]*)"|([^\s",]+))\s*(?:,|$)')
_RANGE: Final = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.IGNORECASE)

SAFE: Final = {
    "Accept-Ranges": "bytes",
    "Cache-Control": "private, no-cache",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
}


class StalePrecondition(Conflict):
    """`Conflict` in HTTP's own words for a condition that failed."""

    http_status = 412


def failed_condition(error: Conflict) -> Conflict:
    """Return the error as HTTP has it: 412 where a condition of the request failed, else 409."""
    failed = error.facts.get("reason") in ("stale", "exists")
    return StalePrecondition(error.message, **error.facts) if failed else error


class UnsatisfiableRange(InvalidParams):
    http_status = 416


def tags(header: str | None, *, weak: bool) -> list[str] | None:
    """Return the etags of a condition, "*" among them; None without one.

    A weak tag counts only where the comparison is `weak`: for If-None-Match (RFC 9110, 13.1). A tag without
    quotes is taken as one, as people write them. Raises `InvalidParams`.
    """
    if header is None:
        return None
    found, position = [], 0
    while position < len(header):
        match = _TAG.match(header, position)
        if match is None:
            raise InvalidParams("the condition is not a list of etags")
        if weak or not match[1]:
            found.append(match[2] if match[2] is not None else match[3])
        position = match.end()
    if position == 0:
        raise InvalidParams("the condition is empty; leave it out, or give an etag")
    return found


def conditions(headers: Headers) -> dict[str, Any]:
    """Return what PUT and DELETE ask for, as `operations.check` takes it."""
    if_match, if_none_match = (_joined(headers, name) for name in ("if-match", "if-none-match"))
    return {"ifMatch": tags(if_match, weak=False), "ifNoneMatch": tags(if_none_match, weak=True)}


def _joined(headers: Headers, name: str) -> str | None:
    values = headers.getlist(name)
    return ", ".join(values) if values else None


def span(headers: Headers, etag: str, size: int) -> tuple[int, int] | None:
    """Return the first and the last byte that a GET asks for, None for all of them.

    Several ranges, other units and an If-Range of another file are answered whole, as RFC 9110, 14.2 allows.
    Raises `UnsatisfiableRange`.
    """
    match = _RANGE.fullmatch(headers.get("range", ""))
    if match is None or (not match[1] and not match[2]):
        return None
    wanted = headers.get("if-range")
    if wanted is not None and wanted.strip().strip('"') != etag:
        return None
    if not match[1]:
        count = min(int(match[2]), size)
        first, last = size - count, size - 1
    else:
        first, last = int(match[1]), min(int(match[2]) if match[2] else size - 1, size - 1)
        if match[2] and int(match[2]) < first:
            return None  # no range at all
    if first > last:
        raise UnsatisfiableRange("the range lies behind the end of the file", size=size)
    return first, last


class Sending(Response):
    """The answer to GET and HEAD. Takes over `opened`, in which the file is open, and ends it with itself.

    Raises `StalePrecondition` and `UnsatisfiableRange`; `opened` is the caller's then.
    """

    def __init__(self, request: Request, source: Source, opened: AsyncExitStack, stall: float) -> None:
        self.background = None
        self.body = b""
        self._source = source
        self._stall = stall
        self._send_body = request.method != "HEAD"
        found = request.headers
        headers = {**SAFE, "ETag": f'"{source.etag}"'}
        if_match = tags(_joined(found, "if-match"), weak=False)
        if if_match is not None and source.etag not in if_match and "*" not in if_match:
            words = "the file is another than the client knows"
            raise StalePrecondition(words, reason="stale", etag=source.etag)
        if_none_match = tags(_joined(found, "if-none-match"), weak=True)
        if if_none_match is not None and (source.etag in if_none_match or "*" in if_none_match):
            self.status_code, self._span, self._send_body = 304, (0, -1), False
        else:
            part = span(found, source.etag, source.size)
            self.status_code = 200 if part is None else 206
            self._span = part or (0, source.size - 1)
            if part is not None:
                headers["Content-Range"] = f"bytes {part[0]}-{part[1]}/{source.size}"
            headers["Content-Length"] = str(self._span[1] - self._span[0] + 1)
            headers["Content-Type"] = "application/octet-stream"
        self.init_headers(headers)
        self._opened = opened.pop_all()

    def init_headers(self, headers: Any = None) -> None:
        # not the base's, which would add the length of an empty body
        self.raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._opened:
                await self._answer(receive, send)
        except (GatewayError, TimeoutError) as error:
            # Too late for a problem. Without the rest of the body the server cuts the connection, which is
            # what tells the client.
            log.info("a download broke off: %s", error or "the client took nothing")

    async def _answer(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if not self._send_body:
            await send({"type": "http.response.body", "body": b""})
            return
        # nothing tells a sender that its client is gone but the other direction
        leaving = asyncio.ensure_future(_gone(receive))
        sending = asyncio.ensure_future(self._copy(send))
        try:
            await asyncio.wait([leaving, sending], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (leaving, sending):
                task.cancel()
            await asyncio.gather(leaving, sending, return_exceptions=True)

    async def _copy(self, send: Send) -> None:
        offset, last = self._span
        while offset <= last:
            data = await self._source.read(offset, min(CHUNK, last - offset + 1))
            if not data:
                raise Conflict("the file became shorter")
            offset += len(data)
            async with asyncio.timeout(self._stall):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def received(
    request: Request, limit: int, stall: float, still: Callable[[], None]
) -> AsyncIterator[bytes]:
    """Yield the body of an upload. Raises `TooLarge` before it is read where it says so itself, `Timeout`.

    `still` raises where the caller may no longer write: it is asked at each piece, and at the end.
    """
    headers = request.headers
    if "content-range" in headers:
        raise InvalidParams("a part of a file cannot be PUT")
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise TooLarge(f"the file has over {limit} bytes", reason="too_large", limit=limit)
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(stall):
                data = await anext(stream)
        except StopAsyncIteration:
            still()
            return
        except TimeoutError:
            raise Timeout(f"nothing came for {stall:.0f} s") from None
        if data:
            still()
            yield data
