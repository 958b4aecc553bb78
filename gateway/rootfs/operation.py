"""Operations of workers: their type, arguments and limits.

The package that implements them (`gateway.tools`) has a module with `OPERATIONS`. A broker is started with
that module's name, so this package imports nothing from there.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gateway.rootfs.root import DEPTH_MAX, Root

SCAN: Final = "scan"  # the operation that lists files containing a pattern, for a share of the folders
SCANNED: Final = b"+"  # prefix of its reply, unless the search has to be done in another way
NAMED_MAX: Final = 8 << 20  # bytes of names with which a search of a large tree continues


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one call, as in the settings with the same names: bytes, entries, seconds."""

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
    """The workspace of an operation, and its limits."""

    root: Root
    limits: Limits


@dataclass(frozen=True, slots=True)
class Passing:
    """A reply with an open descriptor; the worker closes its own once it has been passed."""

    reply: bytes
    descriptor: int


# Receives the arguments of a call and returns the whole reply. May raise GatewayError.
Operation = Callable[[Workspace, dict[str, Any]], bytes | Passing]
# Runs instead of answering calls, until the gateway closes the socket.
Loop = Callable[[socket.socket, Workspace], None]
