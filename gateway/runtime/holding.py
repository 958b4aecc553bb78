"""The parts of a command that survive this process of the gateway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

StreamName = Literal["stdout", "stderr"]


class Holding(Protocol):
    """The parts of a command that survive this process: sockets, latest output, facts for the next process.

    `position` counts the bytes of input written to the command, including by earlier processes.
    """

    @property
    def position(self) -> int: ...

    @property
    def safe(self) -> bool:
        """Whether a holder currently holds it."""
        ...

    def note(self, facts: Mapping[str, Any]) -> None:
        """Replace the stored facts. The first call makes the command held."""
        ...

    def end(self, facts: Mapping[str, Any]) -> None:
        """Store the final facts of an ended command; besides them only its outputs are still held."""
        ...

    def keep(self, stream: StreamName, offset: int) -> int:
        """Drop an output's bytes before an offset; return the memory used by the rest, in bytes."""
        ...

    def accounts(self) -> bytes:
        """Return what `account` last stored."""
        ...

    def account(self, accounts: bytes) -> None:
        """Store up to 1000 bytes of input accounts, which is much faster than storing facts."""
        ...

    def purpose(self) -> Mapping[str, Any]:
        """Return what `note_purpose` last stored, or nothing."""
        ...

    def note_purpose(self, facts: Mapping[str, Any]) -> None:
        """Store what the command is for: up to 4 KiB, faster than facts. First before the first `note`."""
        ...

    def begin_with(self, at: int, data: bytes) -> None:
        """Store a part of the first 128 KiB of an output, which stay as long as the command is held."""
        ...

    def beginning(self, size: int) -> bytes:
        """Return the first bytes that `begin_with` stored."""
        ...

    def drop(self) -> None:
        """Stop holding the command. Idempotent."""
        ...
