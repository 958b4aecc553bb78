"""The event stream: Server-Sent Events parsed without IO, and the stream over HTTP."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import orjson

from gateway_client.connection import refusal
from gateway_client.errors import Disconnected, GatewayError, TooLarge, Unavailable
from gateway_client.http_client import HttpClient
from gateway_client.retry import Change, Patience, State

if TYPE_CHECKING:
    import aiohttp

MiB = 1 << 20
MAX_EVENT: Final = 16 * MiB
# the gateway sends a comment every 15 s; four of them missing is a dead connection
SILENCE: Final = 60.0

_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class ServerSent:
    """One dispatched Server-Sent Event."""

    type: str
    data: str
    id: str


class Parser:
    """A parser of Server-Sent Events (WHATWG HTML §9.2.6), without IO and bounded by `MAX_EVENT`."""

    def __init__(self, last_id: str = "") -> None:
        self._rest = b""
        self._begun = False
        self._type, self._data, self._size = "", list[str](), 0
        self.last_id = last_id

    def feed(self, chunk: bytes) -> list[ServerSent]:
        """Return the events that `chunk` completes. Raises `TooLarge`."""
        buffer = self._rest + chunk
        # a CR at the end may be the first half of a CRLF
        whole = len(buffer) - buffer.endswith(b"\r")
        found, start = [], 0
        for match in _LINE_END.finditer(buffer, 0, whole):
            if event := self._line(buffer[start : match.start()].decode("utf-8", "replace")):
                found.append(event)
            start = match.end()
        self._rest = buffer[start:]
        if len(self._rest) + self._size > MAX_EVENT:
            raise TooLarge("an event of the gateway is larger than 16 MiB")
        return found

    def _line(self, line: str) -> ServerSent | None:
        if not self._begun:
            self._begun, line = True, line.removeprefix("\ufeff")
        if not line:
            event = (
                ServerSent(self._type or "message", "\n".join(self._data), self.last_id)
                if self._data
                else None
            )
            self._type, self._data, self._size = "", [], 0
            return event
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "data":
                self._data.append(value)
                self._size += len(value)
            case "event":
                self._type = value
            case "id" if "\0" not in value:
                self.last_id = value
        return None


@dataclass(frozen=True, slots=True)
class Event:
    """One event of the gateway. `tenant` is None for events of the gateway itself.

    `id` is unique together with `source`. To resume a stream take its `last_event_id`.
    A `gap` says that events before `data["oldest"]` are no longer stored: read the state again.
    """

    id: int
    type: str
    tenant: str | None
    time: str
    source: str
    data: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, sent: ServerSent) -> Event:
        body = orjson.loads(sent.data)
        return cls(
            int(body["id"]),
            str(body["type"]),
            body.get("subject"),
            str(body.get("time", "")),
            str(body.get("source", "")),
            body.get("data") or {},
        )


def event_query(
    *,
    tenant: str | Iterable[str] | None = None,
    deployment: str | Iterable[str] | None = None,
    types: str | Iterable[str] | None = None,
) -> dict[str, str]:
    """Return the query that filters `/v1/events`; None is no filter."""
    wishes = {"tenant": tenant, "deployment": deployment, "type": types}
    return {
        name: wish if isinstance(wish, str) else ",".join(wish)
        for name, wish in wishes.items()
        if wish is not None
    }


class EventStream:
    """Events as they happen: `async with` it, then `async for`. Iterating alone opens it too.

    Everything after the block is entered is in the stream: enter it first, then read the state. If the
    connection breaks, falls silent or the gateway ends, the stream is opened again, as the client's `Retry`
    says, and continues after the last event; `Disconnected` if that fails. Without a `Retry` it ends
    when the gateway ends it. `last_event_id` resumes after the last event that was handed out; it is opaque
    text, None before the first one. `state` says whether the stream is connected.
    """

    def __init__(self, http: HttpClient, query: Mapping[str, str], last_event_id: str | int | None) -> None:
        self._http, self._query = http, query
        self.last_event_id = None if last_event_id is None else str(last_event_id)
        self._parser = Parser()
        self._ready: deque[ServerSent] = deque()
        self._response: aiohttp.ClientResponse | None = None
        self._patience = Patience(http.retry)
        self.state: State = "idle"

    async def __aenter__(self) -> EventStream:
        if self._response is None:
            self._response = await self._open()
            self._tell("connected")
        return self

    async def _open(self) -> aiohttp.ClientResponse:
        import aiohttp

        headers = {"Accept": "text/event-stream"}
        last = self._parser.last_id if self.last_event_id is None else self.last_event_id
        if last:
            headers["Last-Event-ID"] = last
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=15, sock_read=SILENCE)
        try:
            url = self._http.address.url + "/v1/events"
            response = await self._http.ask("GET", url, params=self._query, headers=headers, timeout=timeout)
            if response.status != 200:
                raise refusal(response.status, await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Disconnected(f"the gateway's events cannot be reached: {error}") from error
        # the gateway says where a stream begins: one that breaks before its first event misses nothing
        self._parser = Parser(last or response.headers.get("Last-Event-ID", ""))
        return response

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the stream. Idempotent."""
        self._tell("closed")
        if self._response is not None:
            self._response.close()

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        import aiohttp

        await self.__aenter__()
        while not self._ready:
            error: GatewayError | None = None
            try:
                assert self._response is not None
                if chunk := await self._response.content.readany():
                    self._ready.extend(self._parser.feed(chunk))
                    continue
            except (aiohttp.ClientError, TimeoutError) as broken:
                error = Disconnected(f"the event stream broke: {broken}")
            if self.state == "closed" or (error is None and self._http.retry is None):
                await self.close()
                raise StopAsyncIteration
            await self._reopen(error or Disconnected("the gateway ended the event stream"))
        sent = self._ready.popleft()
        event = Event.parse(sent)
        self.last_event_id = sent.id
        self._patience.restore()
        return event

    async def _reopen(self, error: GatewayError) -> None:
        assert self._response is not None
        self._response.close()
        while True:
            pause = self._patience.pause()
            if pause is None:
                raise error
            self._tell("reconnecting", error)
            await asyncio.sleep(pause)
            try:
                self._response = await self._open()
            except Unavailable as again:
                error = again
            else:
                self._tell("connected")
                return

    def _tell(self, state: State, error: GatewayError | None = None) -> None:
        changed, self.state = state != self.state or error is not None, state
        if changed and self._http.on_change is not None:
            self._http.on_change(Change(None, state, error))
