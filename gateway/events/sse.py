"""One HTTP response of Server-Sent Events that follows the bus."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse

from gateway.events.bus import Bus, Subscription
from gateway.events.event import Event, Filter
from gateway.settings import Settings

# one LF: the simplest parsers look for an empty line as "\n\n"
_SEPARATOR = "\n"


class Streaming(EventSourceResponse):
    """The answer to a follower of events; it ends when its `subscription` does."""

    def __init__(self, subscription: Subscription, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.subscription = subscription


def response(bus: Bus, filter: Filter, last_event_id: str | int | None, settings: Settings) -> Streaming:
    """Return the endless response that sends the events of `filter`.

    `last_event_id` is the header's or the query's text. A comment goes out every
    `settings.events_keepalive` seconds. The subscription is taken before the headers are sent, and freed
    when the client goes, when it is closed or when the bus is, whichever is first. A client that does not
    read is simply waited for: it holds a place in the journal, nothing more.
    """
    after = parse_last_event_id(last_event_id)
    subscription = bus.subscribe(filter, after)
    return Streaming(
        subscription,
        _stream(subscription, announced=after is None),
        # known with the headers, before the first byte of the body may be cut off
        headers={"Last-Event-ID": str(subscription.last_id)},
        ping=settings.events_keepalive,
        ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep=_SEPARATOR),
        sep=_SEPARATOR,
        # sse-starlette cuts streams as soon as uvicorn sees SIGTERM. We want `gateway.draining` to get
        # out first and end them by `Bus.close`, so its cut is only the fallback.
        shutdown_grace_period=settings.shutdown_timeout,
    )


async def _stream(subscription: Subscription, announced: bool) -> AsyncIterator[bytes]:
    try:
        if announced:
            # an id without data is no event, but every client comes back with it: one that is cut off before
            # its first event misses nothing either
            yield b"id: %d\n\n" % subscription.last_id
        # several at once: in a burst each send of its own would cost more than all else
        while events := await subscription.batch():
            yield b"".join(map(sent, events))
    finally:
        subscription.close()


def sent(event: Event) -> bytes:
    """Return `event` in its SSE form: id, type, and CloudEvents JSON on one data line."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.id, event.type.encode(), event.encoded)


def parse_last_event_id(text: str | int | None) -> int | None:
    """Return the id to resume after, None if there is none.

    What is no id of ours comes from somewhere else and is taken as 0, before everything: the client
    then gets a `gap` and all that is kept, not silence and not a refusal that ends a browser's retries.
    """
    if text is None or text == "":
        return None
    try:
        return min(max(int(text), 0), 2**63 - 1)
    except ValueError:
        return 0
