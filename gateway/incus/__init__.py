"""Client of incusd over its unix socket.

`Incus` makes requests and runs operations, `Incus.exec` opens the sockets of one command, and `Incus.events`
yields the daemon's events. Failures raise `IncusError` with incusd's own message, which may name host paths;
the runtime translates it before a client sees it.
"""

from gateway.incus.client import Elsewhere, Incus, IncusError, member_of
from gateway.incus.exec_sockets import RELIEF, ExecSockets, outputs
from gateway.incus.memory import ExecMemory, MemoryRecord
from gateway.incus.rest import NoQuorum, NotAwaited, Operation
from gateway.incus.stream_socket import Lost

__all__ = [
    "RELIEF",
    "Elsewhere",
    "ExecMemory",
    "ExecSockets",
    "Incus",
    "IncusError",
    "Lost",
    "MemoryRecord",
    "NoQuorum",
    "NotAwaited",
    "Operation",
    "member_of",
    "outputs",
]
