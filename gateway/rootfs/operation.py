"""An operation of a worker: its type, the values that it is given, and their limits.

The room that owns the semantics (`gateway.tools`) fills a module with `OPERATIONS`; a broker is started with
that module's name, so this room imports nothing of it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gateway.rootfs.root import DEPTH_MAX, Root

SCAN: Final = "scan"  # the operation that names what holds a pattern, for a share of the folders
SCANNED: Final = b"+"  # what its reply begins with, unless that is to be found out in another way
NAMED_MAX: Final = 8 << 20  # bytes of names that a search of a large tree goes on with


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one call, as in the settings of the same names: bytes, entries, seconds."""

    read_max: int = 256 << 10
    write_max: int = 8 << 20
    result_max: int = 1 << 20
    visit_max: int = 300_000
    tool_timeout: float = 10.0
    list_max: int = 10_000
    watch_folders: int = 8192
    watch_changes: int = 1000
    pdf_max: int = 32 << 20
    pdf_pages: int = 20
    matches_max: int = 10_000
    depth_max: int = DEPTH_MAX
    pattern_max: int = 4000


@dataclass(frozen=True, slots=True)
class Workspace:
    """What an operation works on."""

    root: Root
    limits: Limits


@dataclass(frozen=True, slots=True)
class Passing:
    """A reply that takes an open descriptor along; the worker closes its own once it was passed."""

    reply: bytes
    descriptor: int


# Takes the arguments of one call and returns the whole reply. May raise GatewayError.
Operation = Callable[[Workspace, dict[str, Any]], bytes | Passing]
# What a worker does instead of answering calls until the gateway closes the socket.
Loop = Callable[[socket.socket, Workspace], None]
