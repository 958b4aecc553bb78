"""Sizes in the notation of Incus."""

from __future__ import annotations

import re
from typing import Final

# https://linuxcontainers.org/incus/docs/main/reference/instance_units/
_UNITS: Final = {
    **{unit: 1000**power for power, unit in enumerate(("B", "kB", "MB", "GB", "TB", "PB", "EB"))},
    **{unit: 1024**power for power, unit in enumerate(("", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))},
}


def size_of(text: str) -> int:
    """Parse a size in Incus's notation, such as 4GiB, into bytes; 0 if it is not one."""
    found = re.fullmatch(r"([0-9]+) ?([a-zA-Z]*)", text.strip())
    return 0 if found is None else int(found[1]) * _UNITS.get(found[2], 0)
