"""Per-sender accounts of a command's input, from which the next gateway process can continue."""

from __future__ import annotations

import struct
from typing import Final

from gateway.runtime import Holding

SLOTS: Final = 64  # senders that are accounted for separately
# current sender, bytes accounted for in total, bytes settled per sender
_ACCOUNTS: Final = struct.Struct(f"<QQ{SLOTS}Q")


class Accounts:
    """The accounts of one command's input. Without a `holding` they are lost with this process.

    The runtime counts all bytes written to the command. Bytes not accounted for yet belong to the last
    sender.
    """

    def __init__(self, holding: Holding | None) -> None:
        self._holding = holding
        self._giver = 0
        self._settled = 0 if holding is None else holding.position
        self.passed = [0] * SLOTS

    def take_over(self) -> None:
        """Continue from the accounts of an earlier process."""
        assert self._holding is not None
        self._giver, settled, *self.passed = _ACCOUNTS.unpack_from(self._holding.accounts())
        self.passed[self._giver] += max(0, self._holding.position - settled)
        self.settle()

    def open(self, slot: int) -> None:
        """Reset a slot for a new sender."""
        self.passed[slot] = 0
        self._note()

    def gives(self, slot: int) -> None:
        """Record which sender the next bytes come from."""
        if slot != self._giver:
            self._giver = slot
            self._note()

    def gave(self, slot: int, size: int) -> None:
        """Record that `size` bytes of a sender were written."""
        self.passed[slot] += size
        self._settled += size
        self._note()

    def dropped(self, slot: int, size: int) -> None:
        """Record that `size` bytes of a sender were discarded."""
        self.passed[slot] += size
        self._note()

    def other(self, size: int) -> None:
        """Record that `size` bytes were written that came from no sender."""
        self._settled += size
        self._note()

    def settle(self) -> None:
        """Count everything written so far as accounted for."""
        if self._holding is not None:
            self._settled = self._holding.position
        self._note()

    def _note(self) -> None:
        if self._holding is not None:
            self._holding.account(_ACCOUNTS.pack(self._giver, self._settled, *self.passed))
