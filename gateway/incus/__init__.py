"""Talks to incusd over its unix socket, with aiohttp.

`Incus` does requests and operations, `Incus.exec` opens the sockets of one command, `Incus.events`
yields the daemon's events. Failures are `IncusError` with incusd's own words, which may name host paths:
the runtime translates them before a client sees them.
"""

from gateway.incus.client import Incus, IncusError
from gateway.incus.exec_sockets import RELIEF, ExecSockets, outputs
from gateway.incus.memory import Memory, Record
from gateway.incus.operation import Operation
from gateway.incus.socket import Lost

__all__ = ["RELIEF", "ExecSockets", "Incus", "IncusError", "Lost", "Memory", "Operation", "Record", "outputs"]
