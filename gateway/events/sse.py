"""An HTTP response of Server-Sent Events that follows the bus."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Final

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from gateway.events import positions
from gateway.events.bus import Bus, Subscription
from gateway.events.event import Event, Filter
from gateway.settings import Settings

# LF only: the simplest parsers look for "\n\n"
_SEPARATOR: Final = "\n"
_BODY: Final = b"event: %s\ndata: %s\n\n"
_SENT: Final = b"id: %s\n" + _BODY

KEEPALIVE: Final = 15.0  # seconds between comment lines: proxies end silent connections after 30 or 60


class Streaming(EventSourceResponse):
    """An endless response with `parts`, each of whole events.

    `close` ends them at once, `finish` after everything recorded so far has been sent.
    `last_id` is where they begin. It is in the headers, so that a client knows it even if the body is cut off
    before its first byte; one that resumes nothing is told in the body too. A comment is sent every
    `KEEPALIVE` seconds.
    """

    def __init__(
        self,
        parts: AsyncIterator[bytes],
        close: Callable[[], None],
        last_id: str,
        settings: Settings,
        *,
        resumed: bool,
        finish: Callable[[], None] | None = None,
    ) -> None:
        self.close = close
        self.finish = close if finish is None else finish
        super().__init__(
            parts if resumed else _announced(last_id, parts),
            headers={"Last-Event-ID": last_id},
            ping=KEEPALIVE,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep=_SEPARATOR),
            sep=_SEPARATOR,
            # sse-starlette ends streams as soon as uvicorn gets SIGTERM. We want to send `gateway.draining`
            # first and then end them by `Bus.close`, so this is only the fallback.
            shutdown_grace_period=settings.shutdown_timeout,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()


def response(bus: Bus, filter: Filter, after: int | None, settings: Settings, member: str = "") -> Streaming:
    """Return an endless response with the events of the bus that match `filter`.

    It begins after the position `after` in this gateway's journal, None for now. `member` is this gateway's
    own in a cluster, and then part of each id. The subscription starts before the headers are sent, and ends
    when the client leaves or when it or the bus is closed. A client that does not read costs nothing but a
    position in the journal.
    """
    subscription = bus.subscribe(filter, after)
    last_id = positions.of(subscription.last_id, member)
    parts = _stream(subscription, member)
    resumed = after is not None
    return Streaming(
        parts, subscription.close, last_id, settings, resumed=resumed, finish=subscription.finish
    )


async def _announced(last_id: str, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    # an id without data is not an event, but clients remember it: one that is cut off before its first event
    # misses nothing either
    yield f"id: {last_id}\n\n".encode()
    async for part in parts:
        yield part


async def _stream(subscription: Subscription, member: str) -> AsyncIterator[bytes]:
    # several at once: in a burst, separate sends would cost more than everything else
    while events := await subscription.batch():
        yield b"".join(sent(event, member) for event in events)


def sent(event: Event, member: str = "") -> bytes:
    """Format an event for SSE: id, type, and CloudEvents JSON on one data line."""
    return _SENT % (positions.of(event.id, member).encode(), event.type.encode(), event.encoded)


def body(event: Event) -> bytes:
    """Format an event without its id, for a stream that has ids of its own."""
    return _BODY % (event.type.encode(), event.encoded)


def parsed(block: bytes) -> tuple[int, bytes] | None:
    """Return the id and the `body` of what `sent` formats, without its last line end; None for other lines.

    The id may have the member's name before it. Raises `ValueError` if it is not a number.
    """
    head, _, rest = block.partition(b"\n")
    number = head[4:].rpartition(b":")[2]
    return (int(number), rest + b"\n\n") if rest and head.startswith(b"id: ") else None
