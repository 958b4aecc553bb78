"""The interface of a journal of events, and what a read of it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from gateway.events.event import EVERYTHING, Draft, Event, Filter

# events that one read looks at: bounds how long it holds up others when few of them match
SCAN: Final = 512


@dataclass(frozen=True, slots=True)
class Stretch:
    """The result of a read after an id: the matching events with `start < id <= end`.

    The journal keeps no event between the given id and `start`. `lost` is the number of the latest loss
    after that id which may concern the reader, or 0.
    """

    start: int
    end: int
    events: Sequence[Event]
    lost: int = 0


class Journal(Protocol):
    """Events in the order of their ids. Used from the event loop only.

    A journal on disk gives out ids at once, and makes events readable when they are written: a crash then
    never loses what a subscriber has seen. So `newest` is the last readable id.

    The tenants share its room: when it is full, the tenant with most events loses its oldest.
    """

    @property
    def oldest(self) -> int:
        """The id of the oldest readable event; `newest + 1` if there is none."""
        ...

    @property
    def newest(self) -> int:
        """The id of the newest readable event; before the first event, the id before it."""
        ...

    @property
    def last(self) -> int:
        """The last id given out, readable or not."""
        ...

    @property
    def losses(self) -> int:
        """How often events were lost; counts on across restarts."""
        ...

    @property
    def settled(self) -> bool:
        """Whether every appended event is readable, or cannot be written for now."""
        ...

    def append(self, drafts: Sequence[Draft]) -> list[Event]:
        """Give each draft the next id and keep it, without waiting; calls `grown` once they are readable."""
        ...

    async def read(self, after: int, limit: int, wanted: Filter = EVERYTHING) -> Stretch:
        """Return the next stretch after an id, with at most `limit` events; empty if there are none yet."""
        ...

    def watch(self, grown: Callable[[], None]) -> None:
        """Call `grown` in the loop when `newest` rises or `settled` becomes true. One watcher: the bus."""
        ...
