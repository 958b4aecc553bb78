"""A container command that is held across a restart of the gateway."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, Final

from gateway.holder.holder import HolderClient
from gateway.incus import ExecMemory, ExecSockets, outputs
from gateway.runtime import REPORT_MAX, StreamName

FORMAT: Final = 1  # version of the facts; other versions are not adopted


class HeldCommand:
    """Implements `gateway.runtime.Holding`. `own` are the runtime's facts; the registry adds its own.

    A shell that waits for its command has none yet. `sockets` is None once the command has ended. One output
    starts with bytes that are not the command's own.
    """

    def __init__(
        self,
        holder: HolderClient,
        name: str,
        memory: ExecMemory,
        sockets: ExecSockets | None,
        own: Mapping[str, Any],
    ) -> None:
        self._holder = holder
        self._name = name
        self._memory = memory
        self._accounts = memory.record("accounts")
        self._sockets = sockets
        self._own = own
        self._put = False
        self._left = False

    def leave(self) -> None:
        """Write nothing more into the memory, which another process continues with."""
        self._left = True

    @property
    def _over(self) -> bool:
        return self._left or self._memory.closed

    @property
    def position(self) -> int:
        return 0 if self._sockets is None else self._sockets.position

    @property
    def safe(self) -> bool:
        return self._holder.there

    def runs(self, own: Mapping[str, Any]) -> None:
        """Replace the runtime's facts, from the next `note` on."""
        self._own = own

    def prepare(self) -> None:
        """Do in advance what would delay a start."""
        self._memory.prepare()
        self._put_descriptors()

    def go_on(self) -> None:
        """Take over what an earlier process gave to the holder."""
        if self._sockets is not None:
            self._put = True
            self._holder.keep(self._name, self._sockets.descriptors)

    def _put_descriptors(self) -> None:
        """Give the descriptors to the holder, unless it has them."""
        if not self._put and self._sockets is not None:
            self._put = True
            self._holder.put(self._name, self._sockets.descriptors)

    def withdraw(self) -> None:
        """Take the descriptors back: what they belong to is not to outlive this process."""
        if self._put and not self._over:
            self._holder.drop(self._name, soon=True)

    def note(self, facts: Mapping[str, Any]) -> None:
        if self._over:
            return
        self._memory.write_facts({"format": FORMAT, "own": dict(self._own), "facts": dict(facts)})
        self._put_descriptors()

    def end(self, facts: Mapping[str, Any]) -> None:
        if self._over:
            return
        if self._sockets is not None:
            self._sockets.ended()
        self._sockets = None
        self.note(facts)
        self._holder.put(self._name, [self._memory.descriptor], soon=True)

    def keep(self, stream: StreamName, offset: int) -> int:
        if self._sockets is None or self._left:
            return 0
        fd, skip = socket_of(stream, self._own)
        return self._sockets.keep(fd, offset + skip)

    def accounts(self) -> bytes:
        return self._accounts.read()

    def account(self, accounts: bytes) -> None:
        if not self._over:
            self._accounts.write(accounts)

    def purpose(self) -> Mapping[str, Any]:
        try:
            return self._memory.read_facts("purpose")
        except ValueError:  # none was noted
            return {}

    def note_purpose(self, facts: Mapping[str, Any]) -> None:
        if not self._over:
            self._memory.write_facts(facts, "purpose")

    def begin_with(self, at: int, data: bytes) -> None:
        if not self._over:
            self._memory.beginning[at : at + len(data)] = data

    def beginning(self, size: int) -> bytes:
        return bytes(self._memory.beginning[:size])

    def drop(self) -> None:
        if not self._over:
            self._holder.drop(self._name)
            self._memory.close()


def socket_of(stream: StreamName, own: Mapping[str, Any]) -> tuple[str, int]:
    """Return the socket of an output, and how many bytes on it precede the command's own."""
    fd = "0" if own["terminal"] else ("1" if stream == "stdout" else "2")
    return fd, int(own["skip"]) if fd in ("0", "2") else 0


def cut(start: int, data: bytes, skip: int) -> tuple[int, bytes]:
    """Remove the first `skip` bytes of the stream from an output and from its start offset."""
    return max(0, start - skip), data[max(0, skip - start) :]


def streams_of(own: Mapping[str, Any]) -> tuple[StreamName, ...]:
    """Return which outputs a command has; a merged one's other socket brings its report."""
    return ("stdout",) if own["terminal"] or own.get("merged") else ("stdout", "stderr")


def kept(memory: ExecMemory, own: Mapping[str, Any]) -> tuple[dict[StreamName, tuple[int, bytes]], bytes]:
    """Return the outputs that are kept of an ended command, and its report. Raises `ValueError`."""
    found = outputs(memory, terminal=bool(own["terminal"]))
    told: dict[StreamName, tuple[int, bytes]] = {}
    for stream in streams_of(own):
        fd, skip = socket_of(stream, own)
        told[stream] = cut(*found[fd], skip)
    if not own.get("merged"):
        return told, b""
    fd, skip = socket_of("stderr", own)
    return told, reported(*cut(*found[fd], skip))


def reported(start: int, data: bytes) -> bytes:
    """Return a report by what is kept of it; one whose front is gone was too long to say anything."""
    return bytes(REPORT_MAX) if start else data[:REPORT_MAX]


def close(descriptors: list[int]) -> None:
    """Close descriptors, ignoring errors."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
