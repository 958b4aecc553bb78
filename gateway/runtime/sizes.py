"""The sizes of tenants: named limits of CPU, memory and disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gateway.errors import InvalidParams
from gateway.rootfs.locations import size_of as size_of

MiB: Final = 1 << 20

SIZES: Final[Mapping[str, Mapping[str, str]]] = {
    "small": {},  # as in the tenants' profile
    "medium": {"cpu": "2", "memory": "1GiB", "disk": "8GiB"},
    "large": {"cpu": "4", "memory": "2GiB", "disk": "16GiB"},
}
"""The limits set by each size; all others come from the tenants' profile."""

SITE_SHARE: Final = 85
"""Percentage of a tenant's memory and processes for its site; the rest is for commands."""


def known(name: str) -> str:
    """Return `name` if it is a size. Raises `InvalidParams` otherwise."""
    if name not in SIZES:
        raise InvalidParams(f"size must be one of {', '.join(SIZES)}", field="size")
    return name
