"""The end of a command's input, when input before it may have to be sent again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class Place(Protocol):
    """A sender's place, as far as it counts here."""

    slot: int
    taken: int
    consumed: int
    closed: bool


class Owed:
    """Whether the input is to end, and how many bytes each slot of its accounts must have before that."""

    def __init__(self) -> None:
        self._closing = False
        self._sizes: dict[int, int] = {}

    def close(self) -> None:
        """Have the input end after what was taken over."""
        self._closing, self._sizes = True, {}

    def facts(self, places: Iterable[Place]) -> list[list[int]] | None:
        """Return what another process needs: waiting input may have to be sent again. None without an end."""
        if not self._closing:
            return None
        waits = {place.slot: place.taken for place in places if place.taken > place.consumed}
        return [list(one) for one in (waits | self._sizes).items()]

    def take_over(self, owed: Iterable[Sequence[int]], passed: Sequence[int]) -> None:
        """Continue from an earlier process's facts; `passed` is how far each slot has come."""
        self._closing = True
        self._sizes = {slot: size for slot, size in owed if passed[slot] < size}

    def due(self, places: Iterable[Place]) -> bool:
        """Return whether the input is to end now."""
        if not self._closing:
            return False
        taken = {place.slot: place.taken for place in places if not place.closed}
        self._sizes = {slot: size for slot, size in self._sizes.items() if taken.get(slot, size) < size}
        return not self._sizes
