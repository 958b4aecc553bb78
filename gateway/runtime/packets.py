"""Counts of packets received by the host's interfaces, which show the sites that answer visitors.

They are all in one small kernel file, however many visitors there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

_TABLE: Final = Path("/proc/net/dev")  # proc(5): two lines of titles, then one interface per line
_PACKETS: Final = 1


def packets(table: Path = _TABLE) -> Mapping[str, int]:
    """Return how many packets each interface has received; empty if that cannot be read."""
    try:
        lines = table.read_text().splitlines()[2:]
    except OSError:
        return {}
    counts = {}
    for line in lines:
        name, _, numbers = line.partition(":")
        counts[name.strip()] = int(numbers.split(None, _PACKETS + 1)[_PACKETS])
    return counts
