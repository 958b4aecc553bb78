"""Events: the journal that stores them, the bus that delivers them, Server-Sent Events.

Other packages use `Bus`, `Filter`, `Event`, `StoredJournal` and `sse.response`. Publishers just call
`Bus.publish`; a subscriber consists of a cursor on the journal and nothing else.
"""

from gateway.events.bus import Bus, Spans, Subscription
from gateway.events.event import GAP, Draft, Event, Filter, Span
from gateway.events.journal import Journal, MemoryJournal, StoredJournal, Stretch

__all__ = [
    "GAP",
    "Bus",
    "Draft",
    "Event",
    "Filter",
    "Journal",
    "MemoryJournal",
    "Span",
    "Spans",
    "StoredJournal",
    "Stretch",
    "Subscription",
]
