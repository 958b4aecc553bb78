"""A command in a container that is held while the gateway is restarted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, Final

from gateway.holder.holder import Holder
from gateway.incus import ExecSockets, Memory, outputs
from gateway.runtime import StreamName

FORMAT: Final = 1  # of the facts; another process takes over none but its own


class Held:
    """See `gateway.runtime.Holding`. `own` are the runtime's facts, beside those of the command's registry.

    `sockets` is None once the command has ended. Some bytes in front of one output are none of the command's.
    """

    def __init__(
        self,
        holder: Holder,
        name: str,
        memory: Memory,
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

    @property
    def position(self) -> int:
        return 0 if self._sockets is None else self._sockets.position

    @property
    def safe(self) -> bool:
        return self._holder.there

    def note(self, facts: Mapping[str, Any]) -> None:
        if self._memory.closed:
            return
        self._memory.write_facts({"format": FORMAT, "own": dict(self._own), "facts": dict(facts)})
        if not self._put and self._sockets is not None:
            self._put = True
            self._holder.put(self._name, self._sockets.descriptors)

    def end(self, facts: Mapping[str, Any]) -> None:
        if self._memory.closed:
            return
        if self._sockets is not None:
            self._sockets.ended()
        self._sockets = None
        self.note(facts)
        self._holder.put(self._name, [self._memory.descriptor])

    def keep(self, stream: StreamName, offset: int) -> int:
        if self._sockets is None:
            return 0
        fd, skip = socket_of(stream, self._own)
        return self._sockets.keep(fd, offset + skip)

    def accounts(self) -> bytes:
        return self._accounts.read()

    def account(self, accounts: bytes) -> None:
        if not self._memory.closed:
            self._accounts.write(accounts)

    def drop(self) -> None:
        if not self._memory.closed:
            self._holder.drop(self._name)
            self._memory.close()


def socket_of(stream: StreamName, own: Mapping[str, Any]) -> tuple[str, int]:
    """Return the socket of an output, and how many bytes of it came before the command's own."""
    fd = "0" if own["terminal"] else ("1" if stream == "stdout" else "2")
    return fd, int(own["skip"]) if fd in ("0", "2") else 0


def cut(start: int, data: bytes, skip: int) -> tuple[int, bytes]:
    """Return an output by the command's own offset, without the `skip` bytes that came before it."""
    return max(0, start - skip), data[max(0, skip - start) :]


def kept(memory: Memory, own: Mapping[str, Any]) -> dict[StreamName, tuple[int, bytes]]:
    """Return the outputs that are kept of an ended command. Raises `ValueError`."""
    found = outputs(memory, terminal=bool(own["terminal"]))
    streams: tuple[StreamName, ...] = ("stdout",) if own["terminal"] else ("stdout", "stderr")
    told: dict[StreamName, tuple[int, bytes]] = {}
    for stream in streams:
        fd, skip = socket_of(stream, own)
        told[stream] = cut(*found[fd], skip)
    return told


def close(descriptors: list[int]) -> None:
    """Let go of descriptors that were held."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
