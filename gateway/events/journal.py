"""The interface of an event journal, and the result of a read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from gateway.events.event import EVERYTHING, Draft, Event, Filter

# events examined per read, which bounds how long it delays others if few match
SCAN: Final = 512


@dataclass(frozen=True, slots=True)
class Stretch:
    """The result of a read after an id: the matching events with `start < id <= end`.

    The journal has no events between the given id and `start`. `lost` is the number of the latest loss after
    that id that may concern the reader, or 0.
    """

    start: int
    end: int
    events: Sequence[Event]
    lost: int = 0


class Journal(Protocol):
    """Events in the order of their ids. Use it from the event loop only.

    A journal on disk assigns ids at once but makes events readable only when they are written, so that a
    crash never loses events that a subscriber has seen. So `newest` is the last readable id.

    The tenants share its capacity: when it is full, the tenant with the most events loses its oldest.
    """

    @property
    def oldest(self) -> int:
        """The id of the oldest readable event; `newest + 1` if there is none."""
        ...

    @property
    def newest(self) -> int:
        """The id of the newest readable event; if there is none yet, the id before the first."""
        ...

    @property
    def last(self) -> int:
        """The last id assigned, readable or not."""
        ...

    @property
    def losses(self) -> int:
        """Number of losses of events, counted across restarts."""
        ...

    @property
    def settled(self) -> bool:
        """Whether every appended event is readable or currently cannot be written."""
        ...

    def append(self, drafts: Sequence[Draft]) -> list[Event]:
        """Assign ids to drafts and keep them, without waiting; `grown` is called once they are readable."""
        ...

    async def read(self, after: int, limit: int, wanted: Filter = EVERYTHING) -> Stretch:
        """Return the next stretch after an id, with at most `limit` events; empty if there are none."""
        ...

    def watch(self, grown: Callable[[], None], followed: Callable[[], bool]) -> None:
        """Call `grown` in the loop when `newest` increases or `settled` becomes true. Only for the bus.

        `followed` returns whether somebody follows who is not the gateway itself; else events of tool calls
        may become readable a little later.
        """
        ...

    def hurry(self) -> None:
        """Make readable what waits only because nobody followed: now somebody does, or waits for its end."""
        ...
