"""The sizes that a tenant may have: names for limits of CPU, memory and disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from gateway.errors import InvalidParams

MiB: Final = 1 << 20

SIZES: Final[Mapping[str, Mapping[str, str]]] = {
    "small": {},  # what the tenants' profile says
    "medium": {"cpu": "2", "memory": "1GiB", "disk": "8GiB"},
    "large": {"cpu": "4", "memory": "2GiB", "disk": "16GiB"},
}
"""What each has of its own; all else is as the tenants' profile says."""

SITE_SHARE: Final = 85
"""Per cent of a tenant's memory and processes that its site may have; the rest is for commands."""

# https://linuxcontainers.org/incus/docs/main/reference/instance_units/
_UNITS: Final = {
    **{unit: 1000**power for power, unit in enumerate(("B", "kB", "MB", "GB", "TB", "PB", "EB"))},
    **{unit: 1024**power for power, unit in enumerate(("", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))},
}


def known(name: str) -> str:
    """Return the name of a size. Raises `InvalidParams` for what is none."""
    if name not in SIZES:
        raise InvalidParams(f"size must be one of {', '.join(SIZES)}", field="size")
    return name


def size_of(text: str) -> int:
    """Return the bytes of a size as Incus takes it, such as 4GiB; 0 for what is none."""
    found = re.fullmatch(r"([0-9]+) ?([a-zA-Z]*)", text.strip())
    return 0 if found is None else int(found[1]) * _UNITS.get(found[2], 0)
