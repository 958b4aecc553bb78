"""The sizes of tenants: named limits of CPU, memory and disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from gateway.errors import InvalidParams

MiB: Final = 1 << 20

SIZES: Final[Mapping[str, Mapping[str, str]]] = {
    "small": {},  # as in the tenants' profile
    "medium": {"cpu": "2", "memory": "1GiB", "disk": "8GiB"},
    "large": {"cpu": "4", "memory": "2GiB", "disk": "16GiB"},
}
"""The limits set by each size; all others come from the tenants' profile."""

SITE_SHARE: Final = 85
"""Percentage of a tenant's memory and processes for its site; the rest is for commands."""

# https://linuxcontainers.org/incus/docs/main/reference/instance_units/
_UNITS: Final = {
    **{unit: 1000**power for power, unit in enumerate(("B", "kB", "MB", "GB", "TB", "PB", "EB"))},
    **{unit: 1024**power for power, unit in enumerate(("", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))},
}


def known(name: str) -> str:
    """Return `name` if it is a size. Raises `InvalidParams` otherwise."""
    if name not in SIZES:
        raise InvalidParams(f"size must be one of {', '.join(SIZES)}", field="size")
    return name


def size_of(text: str) -> int:
    """Parse a size in Incus's notation, such as 4GiB, into bytes; 0 if it is not one."""
    found = re.fullmatch(r"([0-9]+) ?([a-zA-Z]*)", text.strip())
    return 0 if found is None else int(found[1]) * _UNITS.get(found[2], 0)
