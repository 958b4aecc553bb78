"""The result of an incusd operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Operation:
    """A finished operation: whether it succeeded, incusd's error text if not, and its metadata."""

    ok: bool
    error: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
