"""Where a stream stands in the journal of each member, as the one id by which a client resumes it.

Without a cluster that is a number; else it is text such as `m1:17,m2:4`, also for a stream of one tenant,
which may move to another member.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, unquote

_TEXT: Final = 32 << 10  # characters of an id that are looked at
_MEMBERS: Final = 512  # of one id
_HIGHEST: Final = 2**63 - 1


def after(last_event_id: str | int | None, member: str = "") -> int | None:
    """Return the id to resume after in a member's journal, None if the client resumes nothing.

    Anything that is not an id of ours, or not of this member, counts as 0, before all events. The client then
    gets a `gap` and everything kept, instead of silence or an error, which would end a browser's retries.
    """
    if last_event_id is None or last_event_id == "":
        return None
    if (found := vector(str(last_event_id))) is not None:
        return found.get(member, 0)
    try:
        return _number(last_event_id)
    except ValueError:
        return 0


def is_plain(last_event_id: str | int) -> bool:
    """Return whether an id names no member: a number alone, which several journals may have."""
    return isinstance(last_event_id, int) or vector(last_event_id) is None


def vector(last_event_id: str) -> Mapping[str, int] | None:
    """Return the position in each member's journal; None for what is no id of a stream over several."""
    if ":" not in last_event_id or len(last_event_id) > _TEXT:
        return None
    parts = last_event_id.split(",", _MEMBERS)
    if len(parts) > _MEMBERS:
        return None
    named = [part.rpartition(":") for part in parts]
    try:
        found = {unquote(name): _number(number) for name, _, number in named}
    except ValueError:
        return None
    return None if "" in found else found


def of(number: int, member: str) -> str:
    """Return the id of a position in one journal; `member` is empty without a cluster."""
    return text({member: number}) if member else str(number)


def text(positions: Mapping[str, int]) -> str:
    """Return the id that `vector` parses, the same for the same positions."""
    return ",".join(f"{quote(name, safe='')}:{number}" for name, number in sorted(positions.items()))


def _number(given: str | int) -> int:
    return min(max(int(given), 0), _HIGHEST)
