"""The broker as a service: it listens on a unix socket and forks for each connection.

A fork's workers end with its connection.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import struct
import sys
import traceback
from typing import NoReturn

import orjson

from gateway.rootfs.broker import Broker
from gateway.rootfs.confine import end_with_parent
from gateway.rootfs.locations import Tenants, found_by
from gateway.rootfs.zygote import preload

GATEWAYS_MAX = 16  # connections: a gateway has four, or five in a cluster, its successor as many


def listening(arguments: list[str]) -> NoReturn:
    """Serve gateways on a unix socket until SIGTERM, but only processes of root and `uids`.

    The only argument is a JSON object: `path` of the socket, which gets the group `gid` and mode 0660, in a
    folder writable only by root; `operations`, `tenants`, `uids`. Connections above `GATEWAYS_MAX` are
    closed. Notifies systemd when ready. Raises `OSError`.
    """
    told = orjson.loads(arguments[0])
    path, operations, gid = str(told["path"]), str(told["operations"]), int(told["gid"])
    tenants = found_by(told["tenants"])
    served = {0, *told["uids"]}
    importlib.import_module(operations)
    preload()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # left by a killed broker
    mask = os.umask(0o177)
    listener.bind(path)
    os.umask(mask)
    os.chown(path, -1, gid)
    os.chmod(path, 0o660)
    listener.listen(GATEWAYS_MAX)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(0))
    children: set[int] = set()
    _notify_ready()
    try:
        while True:
            listener.settimeout(1.0)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                connection = None
            children -= {pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]}
            if connection is None:
                continue
            with connection:
                # struct ucred: pid, uid, gid at the time of connect(2), as the kernel reports them
                ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                _, uid, _ = struct.unpack("iII", ucred)
                if uid not in served or len(children) >= GATEWAYS_MAX:
                    continue
                pid = os.fork()
                if pid == 0:
                    _serve_one(connection, listener, operations, tenants)
                children.add(pid)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        for pid in children:
            os.kill(pid, signal.SIGTERM)


def _notify_ready() -> None:
    if address := os.environ.get("NOTIFY_SOCKET"):  # sd_notify(3), of Type=notify
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifying:
            notifying.connect("\0" + address[1:] if address.startswith("@") else address)
            notifying.send(b"READY=1")


def _serve_one(
    connection: socket.socket,
    listener: socket.socket,
    operations: str,
    tenants: Tenants,
) -> NoReturn:
    """Run the broker of one gateway in the forked child; never returns."""
    code = 1
    try:
        listener.close()
        connection.setblocking(True)
        end_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        Broker(connection, operations, tenants).run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
