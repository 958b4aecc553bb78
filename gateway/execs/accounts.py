"""Whose input a command was given, noted so that another process of the gateway can go on from there."""

from __future__ import annotations

import struct
from typing import Final

from gateway.runtime import Holding

SLOTS: Final = 64  # senders whose place is kept
# who gives now, how many bytes are accounted for, and how many each sender is rid of
_ACCOUNTS: Final = struct.Struct(f"<QQ{SLOTS}Q")


class Accounts:
    """The accounts of one command's input; without a `holding` they last as long as this process.

    The runtime counts what the command was given. What is more than is accounted for, the last sender gave.
    """

    def __init__(self, holding: Holding | None) -> None:
        self._holding = holding
        self._giver = 0
        self._settled = 0 if holding is None else holding.position
        self.passed = [0] * SLOTS

    def take_over(self) -> None:
        """Go on from what an earlier process noted."""
        assert self._holding is not None
        self._giver, settled, *self.passed = _ACCOUNTS.unpack_from(self._holding.accounts())
        self.passed[self._giver] += max(0, self._holding.position - settled)
        self.settle()

    def open(self, slot: int) -> None:
        """Have a slot count for a new sender."""
        self.passed[slot] = 0
        self._note()

    def gives(self, slot: int) -> None:
        """Take note of who gives the next bytes."""
        if slot != self._giver:
            self._giver = slot
            self._note()

    def gave(self, slot: int, size: int) -> None:
        """So many bytes of a sender were given."""
        self.passed[slot] += size
        self._settled += size
        self._note()

    def dropped(self, slot: int, size: int) -> None:
        """So many bytes of a sender are not given any more."""
        self.passed[slot] += size
        self._note()

    def other(self, size: int) -> None:
        """So many bytes were given that are no sender's."""
        self._settled += size
        self._note()

    def settle(self) -> None:
        """All that the command was given by now is accounted for."""
        if self._holding is not None:
            self._settled = self._holding.position
        self._note()

    def _note(self) -> None:
        if self._holding is not None:
            self._holding.account(_ACCOUNTS.pack(self._giver, self._settled, *self.passed))
