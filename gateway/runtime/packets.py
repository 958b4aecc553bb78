"""Counts the packets that this host's interfaces received, which show the sites that answer visitors.

One small file of the kernel has them all, however many visitors there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

_TABLE: Final = Path("/proc/net/dev")  # proc(5): two lines of titles, then an interface a line
_PACKETS: Final = 1


def packets(table: Path = _TABLE) -> Mapping[str, int]:
    """Return how many packets each interface has received; nothing if the kernel does not say."""
    try:
        lines = table.read_text().splitlines()[2:]
    except OSError:
        return {}
    counts = {}
    for line in lines:
        name, _, numbers = line.partition(":")
        counts[name.strip()] = int(numbers.split(None, _PACKETS + 1)[_PACKETS])
    return counts
