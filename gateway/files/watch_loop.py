"""Serve the watches of one tenant in a worker: requests, inotify events, messages."""

from __future__ import annotations

import select
import socket
import time
from typing import Any

import orjson

from gateway.errors import GatewayError
from gateway.files.watcher import Watcher
from gateway.rootfs.messages import TOLD, frame
from gateway.rootfs.root import refusal
from gateway.rootfs.worker import Operation, Workspace, answer, receive_request


def serve(connection: socket.socket, workspace: Workspace) -> None:
    """Serve `watch` and `unwatch` and send changes until the gateway closes the socket."""
    watcher: Watcher | None = None
    failed: GatewayError | None = None
    try:
        watcher = Watcher(workspace)
    except GatewayError as error:
        failed = error

    def refuse(workspace: Workspace, given: dict[str, Any]) -> bytes:
        assert failed is not None
        raise failed

    operations: dict[str, Operation] = (
        {"watch": refuse, "unwatch": refuse}
        if watcher is None
        else {"watch": _mapped(watcher.watch), "unwatch": _mapped(watcher.unwatch)}
    )
    rest = 0.0
    while True:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        wait = watcher.due() if watcher is not None else None
        resting = rest - time.monotonic()
        if watcher is not None:
            if resting > 0:
                wait = resting if wait is None else min(wait, resting)
            else:
                poll.register(watcher.descriptor, select.POLLIN)
        ready = dict(poll.poll(None if wait is None else int(wait * 1000) + 1))
        if connection.fileno() in ready:
            request = receive_request(connection)
            if request is None:
                return
            reply = answer(request, workspace, operations)
            assert isinstance(reply, bytes)
            connection.sendall(reply)
        if watcher is None:
            continue
        if watcher.descriptor in ready:
            began = time.monotonic()
            watcher.read()
            # A tenant that changes files as fast as it can gets at most half of the time. If the kernel's
            # queue overflows meanwhile, that costs less than reading all events.
            ended = time.monotonic()
            rest = ended + (ended - began)
        if watcher.gone:
            connection.sendall(frame(TOLD, orjson.dumps({"gone": True})))
            return
        watcher.tell(connection)


def _mapped(method: Operation) -> Operation:
    def run(workspace: Workspace, given: dict[str, Any]) -> Any:
        try:
            return method(workspace, given)
        except OSError as error:
            raise refusal(error) from None

    return run


LOOPS = {"watch": serve}

__all__ = ["LOOPS", "serve"]
