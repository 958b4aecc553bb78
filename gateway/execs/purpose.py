"""What a command is for, kept beside it for the next process of the gateway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.runtime import Holding


class Purpose:
    """What the package that started a command needs to continue it; without a `holding` nothing is kept.

    `found` is what an earlier process recorded, empty for a command that only its own reader wants.
    """

    def __init__(self, holding: Holding | None) -> None:
        self._holding = holding
        self.found: Mapping[str, Any] = {}

    @property
    def held(self) -> bool:
        return self._holding is not None

    def take_over(self, holding: Holding) -> None:
        """Continue with what an earlier process recorded."""
        self._holding = holding
        self.found = holding.purpose()

    def note(self, facts: Mapping[str, Any]) -> None:
        """Keep facts in the place of those before: 4 KiB at most, as JSON."""
        if self._holding is not None:
            self._holding.note_purpose(facts)

    def begin_with(self, at: int, data: bytes) -> None:
        """Keep a part of the first 128 KiB of an output."""
        if self._holding is not None:
            self._holding.begin_with(at, data)

    def beginning(self, size: int) -> bytes:
        """Return so many of these first bytes."""
        return b"" if self._holding is None else self._holding.beginning(size)

    def leave(self) -> None:
        """Record nothing more: it belongs to another process now."""
        self._holding = None
