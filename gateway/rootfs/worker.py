"""Knows the loop of a worker: one request, one reply, over one stream socket, until its end.

A request is a u32 length (big-endian) and the JSON `[operation, arguments]`. A reply is a u32 length, a
status byte and a payload: DONE and the operation's bytes, REFUSED and `{code, message, facts}` of a
`GatewayError`, BROKEN and text for the log. The first reply, READY, is unasked for and lists as JSON what
confines the worker. PASSED is DONE with a descriptor (SCM_RIGHTS), TOLD a frame that answers nothing: only
those who read the socket by `gateway.rootfs.links` get either.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import traceback
from collections.abc import Callable, Mapping

import orjson

from gateway.errors import GatewayError
from gateway.rootfs import kernel
from gateway.rootfs.operations import Operation, Passing, Workspace

DONE, REFUSED, BROKEN, READY, PASSED, TOLD = range(6)
HEAD = struct.Struct(">IB")  # length of status byte and payload, status
LENGTH = struct.Struct(">I")
REQUEST_MAX = 64 << 20  # bytes; the gateway's own frame limits are below it
IDLE = 5  # seconds without a request after which kept memory is let go


def frame(status: int, payload: bytes) -> bytes:
    return HEAD.pack(len(payload) + 1, status) + payload


def open_pair() -> tuple[socket.socket, socket.socket]:
    """Return the gateway's and the worker's end of a new connection."""
    ours, theirs = socket.socketpair()
    # A receive timeout in the kernel costs no extra system call per request, unlike poll or settimeout.
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", IDLE, 0))
    return ours, theirs


def serve(
    connection: socket.socket,
    workspace: Workspace,
    operations: Mapping[str, Operation],
    idle: Callable[[], None],
) -> None:
    """Answer requests until the gateway closes the socket, which was made by `open_pair`."""
    rested = False
    while True:
        try:
            head = connection.recv(4)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                raise
            if not rested:
                idle()
                kernel.trim_memory()
                rested = True
            continue
        if not head:
            return
        rested = False
        request = _receive(connection, LENGTH.unpack(head + _rest(connection, 4 - len(head)))[0])
        reply = answer(request, workspace, operations)
        if isinstance(reply, bytes):
            connection.sendall(reply)
            continue
        try:
            socket.send_fds(connection, [frame(PASSED, reply.reply)], [reply.descriptor])
        finally:
            os.close(reply.descriptor)


def receive_request(connection: socket.socket) -> bytearray | None:
    """Return the next request, which has begun to come, or None where the gateway closed the socket."""
    head = connection.recv(4)
    if not head:
        return None
    return _receive(connection, LENGTH.unpack(head + _rest(connection, 4 - len(head)))[0])


def _rest(connection: socket.socket, count: int) -> bytes:
    return bytes(_receive(connection, count)) if count else b""


def _receive(connection: socket.socket, count: int) -> bytearray:
    if count > REQUEST_MAX:
        raise EOFError("request too large")
    data = bytearray(count)
    view = memoryview(data)
    while view:
        try:
            received = connection.recv_into(view)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EINTR):
                continue
            raise
        if not received:
            raise EOFError("the gateway is gone")
        view = view[received:]
    return data


def answer(request: bytearray, workspace: Workspace, operations: Mapping[str, Operation]) -> bytes | Passing:
    """Run the operation of a request; return the whole frame of its reply, or what is to be passed."""
    try:
        name, arguments = orjson.loads(request)
        done = operations[name](workspace, arguments)
        return frame(DONE, done) if isinstance(done, bytes) else done
    except GatewayError as error:
        told = {"code": error.code, "message": error.message, "facts": error.facts}
        return frame(REFUSED, orjson.dumps(told))
    except Exception as error:
        # The kind and the place, not the words: those may quote what a tenant wrote.
        places = traceback.extract_tb(error.__traceback__)[-6:]
        at = " < ".join(f"{place.name}:{place.lineno}" for place in reversed(places))
        return frame(BROKEN, f"{type(error).__name__} at {at}".encode())
