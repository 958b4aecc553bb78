"""An HTTP response of Server-Sent Events that follows the bus."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse

from gateway.events.bus import Bus, Subscription
from gateway.events.event import Event, Filter
from gateway.settings import Settings

# LF only: the simplest parsers look for "\n\n"
_SEPARATOR = "\n"


class Streaming(EventSourceResponse):
    """A stream of events; it ends when its `subscription` does."""

    def __init__(self, subscription: Subscription, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.subscription = subscription


def response(bus: Bus, filter: Filter, last_event_id: str | int | None, settings: Settings) -> Streaming:
    """Return an endless response with the events that match `filter`.

    `last_event_id` is the text of the header or query. A comment is sent every `settings.events_keepalive`
    seconds. The subscription starts before the headers are sent, and ends when the client leaves or when it
    or the bus is closed. A client that does not read costs nothing but a position in the journal.
    """
    after = parse_last_event_id(last_event_id)
    subscription = bus.subscribe(filter, after)
    return Streaming(
        subscription,
        _stream(subscription, announced=after is None),
        # in the headers, so that it is known even if the body is cut off before its first byte
        headers={"Last-Event-ID": str(subscription.last_id)},
        ping=settings.events_keepalive,
        ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep=_SEPARATOR),
        sep=_SEPARATOR,
        # sse-starlette ends streams as soon as uvicorn gets SIGTERM. We want to send `gateway.draining`
        # first and then end them by `Bus.close`, so this is only the fallback.
        shutdown_grace_period=settings.shutdown_timeout,
    )


async def _stream(subscription: Subscription, announced: bool) -> AsyncIterator[bytes]:
    try:
        if announced:
            # an id without data is not an event, but clients remember it: one that is cut off before its
            # first event misses nothing either
            yield b"id: %d\n\n" % subscription.last_id
        # several at once: in a burst, separate sends would cost more than everything else
        while events := await subscription.batch():
            yield b"".join(map(sent, events))
    finally:
        subscription.close()


def sent(event: Event) -> bytes:
    """Format an event for SSE: id, type, and CloudEvents JSON on one data line."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.id, event.type.encode(), event.encoded)


def parse_last_event_id(text: str | int | None) -> int | None:
    """Parse the id to resume after, None if there is none.

    Anything that is not an id of ours counts as 0, before all events. The client then gets a `gap` and
    everything kept, instead of silence or an error, which would end a browser's retries.
    """
    if text is None or text == "":
        return None
    try:
        return min(max(int(text), 0), 2**63 - 1)
    except ValueError:
        return 0
