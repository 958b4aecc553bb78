"""What a confined worker does: its operations, and the loop that answers one request after the other.

The package that implements the operations (`gateway.tools`) has a module with a `SERVICE`. A broker is
started with that module's name, so neither it nor this package imports anything from there.
"""

from __future__ import annotations

import os
import select
import socket
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from gateway.errors import GatewayError
from gateway.rootfs import file_calls
from gateway.rootfs.messages import BROKEN, DONE, LENGTH, PASSED, REFUSED, CallLimits, Spawn, frame
from gateway.rootfs.root import Root

SCAN: Final = "scan"  # the operation that lists files containing a pattern, for a share of the folders
SCANNED: Final = b"+"  # prefix of its reply, unless the search has to be done in another way
NAMED_MAX: Final = 8 << 20  # bytes of names with which a search of a large tree continues

_USUAL = 16 << 10  # bytes; longer requests are assembled
REQUEST_MAX = 64 << 20  # bytes; the gateway's own frame limits are lower
IDLE = 5  # seconds without a request after which cached memory is freed


@dataclass(frozen=True, slots=True)
class Workspace:
    """The workspace of an operation, and its limits."""

    root: Root
    limits: CallLimits


@dataclass(frozen=True, slots=True)
class Passing:
    """A reply with an open descriptor; the worker closes its own once it has been passed."""

    reply: bytes
    descriptor: int


# Receives the arguments of a call and returns the whole reply. May raise GatewayError.
Operation = Callable[[Workspace, dict[str, Any]], bytes | Passing]
# Runs instead of answering calls, until the gateway closes the socket.
Loop = Callable[[socket.socket, Workspace], None]


@dataclass(frozen=True, slots=True)
class WorkerService:
    """What workers serve: `operations` and `loops`. `idle` drops caches after a while without calls."""

    operations: Mapping[str, Operation]
    idle: Callable[[], None]
    loops: Mapping[str, Loop] = field(default_factory=dict)

    def run(self, connection: socket.socket, folder: int, spawn: Spawn, *, nodev: bool) -> None:
        """Serve the workspace in `folder` as requested, until the gateway closes the socket.

        `nodev` means that the mount refuses device nodes.
        """
        root = Root(folder, spawn.workspace, nodev=nodev, depth=spawn.limits.depth_max)
        workspace = Workspace(root, spawn.limits)
        if spawn.loop:
            self.loops[spawn.loop](connection, workspace)
        else:
            serve(connection, workspace, self.operations, self.idle)


def serve(
    connection: socket.socket,
    workspace: Workspace,
    operations: Mapping[str, Operation],
    idle: Callable[[], None],
) -> None:
    """Answer requests until the gateway closes the socket."""
    # A process waiting in recv also wakes when the gateway reads a reply and frees buffer space; poll(2)
    # waits for requests only.
    ready = select.poll()
    ready.register(connection, select.POLLIN)
    usual = bytearray(_USUAL)
    view = memoryview(usual)
    begun = bytearray()  # received bytes of further requests
    while True:
        request: bytearray | memoryview
        if not begun:
            if not ready.poll(IDLE * 1000):
                idle()
                file_calls.trim_memory()
                ready.poll()
            count = connection.recv_into(usual)
            if not count:
                return
            if count >= 4 and count == 4 + LENGTH.unpack_from(usual)[0]:
                request = view[4:count]  # the usual case: exactly one request
            else:
                request, begun = _first(connection, usual[:count])
        else:
            request, begun = _first(connection, begun)
        reply = answer(request, workspace, operations)
        if isinstance(reply, bytes):
            connection.sendall(reply)
            continue
        try:
            socket.send_fds(connection, [frame(PASSED, reply.reply)], [reply.descriptor])
        finally:
            os.close(reply.descriptor)


def receive_request(connection: socket.socket) -> bytearray | None:
    """Return the next request, which has begun to arrive, or None if the gateway closed the socket."""
    head = connection.recv(4)
    return _first(connection, bytearray(head))[0] if head else None


def _first(connection: socket.socket, begun: bytearray) -> tuple[bytearray, bytearray]:
    """Complete the first request in the received bytes; return it and the bytes of later ones."""
    begun += _receive(connection, max(0, 4 - len(begun)))
    end = 4 + LENGTH.unpack_from(begun)[0]
    begun += _receive(connection, max(0, end - len(begun)))
    return begun[4:end], begun[end:]


def _receive(connection: socket.socket, count: int) -> bytearray:
    if count > REQUEST_MAX:
        raise EOFError("request too large")
    data = bytearray(count)
    view = memoryview(data)
    while view:
        received = connection.recv_into(view)
        if not received:
            raise EOFError("the gateway is gone")
        view = view[received:]
    return data


def answer(
    request: bytearray | memoryview, workspace: Workspace, operations: Mapping[str, Operation]
) -> bytes | Passing:
    """Run a request's operation; return the reply's whole frame, or a reply with a descriptor."""
    try:
        name, arguments = orjson.loads(request)
        done = operations[name](workspace, arguments)
        return frame(DONE, done) if isinstance(done, bytes) else done
    except GatewayError as error:
        told = {"code": error.code, "message": error.message, "facts": error.facts}
        return frame(REFUSED, orjson.dumps(told))
    except Exception as error:
        # The type and the place, but not the message, which may quote a tenant's data.
        places = traceback.extract_tb(error.__traceback__)[-6:]
        at = " < ".join(f"{place.name}:{place.lineno}" for place in reversed(places))
        return frame(BROKEN, f"{type(error).__name__} at {at}".encode())
