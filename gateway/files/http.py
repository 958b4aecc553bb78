"""Files over HTTP: conditions and ranges as in RFC 9110, and bodies sent from disk.

Tenants' files are served from the gateway's own origin, where they must never be executed. So every answer is
an octet stream with sniffing disabled and a sandboxing policy.
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

from gateway.bounds import LEAST_RATE, paced
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
    """A `Conflict` as HTTP's status for a failed condition."""

    http_status = 412


def failed_condition(error: Conflict) -> Conflict:
    """Return the error for HTTP: 412 if a condition of the request failed, else 409."""
    failed = error.facts.get("reason") in ("stale", "exists")
    return StalePrecondition(error.message, **error.facts) if failed else error


class UnsatisfiableRange(InvalidParams):
    http_status = 416


def tags(header: str | None, *, weak: bool) -> list[str] | None:
    """Return the etags of a condition, including "*"; None if there is no condition.

    A weak tag counts only if the comparison is `weak`, as for If-None-Match (RFC 9110, 13.1). A tag without
    quotes is accepted, because people write them. Raises `InvalidParams`.
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
        raise InvalidParams("the condition is empty; omit it, or give an etag")
    return found


def conditions(headers: Headers) -> dict[str, Any]:
    """Return the conditions of a PUT or DELETE in the form that `conditions.check` expects."""
    if_match, if_none_match = (_joined(headers, name) for name in ("if-match", "if-none-match"))
    return {"ifMatch": tags(if_match, weak=False), "ifNoneMatch": tags(if_none_match, weak=True)}


def _joined(headers: Headers, name: str) -> str | None:
    values = headers.getlist(name)
    return ", ".join(values) if values else None


def span(headers: Headers, etag: str, size: int) -> tuple[int, int] | None:
    """Return the offsets of the first and last byte that a GET requests, None for the whole file.

    Multiple ranges, other units and an If-Range that does not match get the whole file, as RFC 9110, 14.2
    allows. Raises `UnsatisfiableRange`.
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
            return None  # not a valid range
    if first > last:
        raise UnsatisfiableRange("the range is beyond the end of the file", size=size)
    return first, last


class Sending(Response):
    """The answer to GET and HEAD. Takes ownership of `opened`, which holds the open file.

    Raises `StalePrecondition` and `UnsatisfiableRange`; then `opened` stays with the caller.
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
            words = "the file has changed since the client last read it"
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
            # Too late for an error response. The body is incomplete, so the server closes the connection,
            # by which the client notices.
            log.info("a download was aborted: %s", error or "the client stopped reading")

    async def _answer(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if not self._send_body:
            await send({"type": "http.response.body", "body": b""})
            return
        # only the receiving side reports that the client has gone
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
                raise Conflict("the file was truncated")
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
    """Yield the body of an upload.

    `still` is called for each piece and at the end; it raises if the caller may no longer write. Raises
    `TooLarge`, before reading if Content-Length says so, and `Timeout`.
    """
    headers = request.headers
    if "content-range" in headers:
        raise InvalidParams("PUT does not support Content-Range")
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise TooLarge(f"the file exceeds {limit} bytes", reason="too_large", limit=limit)
    try:
        async for data in paced(request.stream(), stall):
            still()
            if data:
                yield data
    except TimeoutError:
        raise Timeout(f"the body is too slow: under {LEAST_RATE} bytes a second") from None
    still()
