"""How an operation of incusd ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Operation:
    """One ended operation: `ok`, incusd's error text where not, and its metadata."""

    ok: bool
    error: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
