"""Serve the application: listening socket, uvicorn, signals, log format."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import logging
import os
import resource
import signal
import socket
import stat
import sys
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn
import uvloop

from gateway.api.app import Gateway
from gateway.caddy import Caddy
from gateway.errors import Unavailable
from gateway.runtime.incus.clusters import refuse_cluster
from gateway.settings import Settings
from gateway.storage.state_dir import close
from gateway.terminal import log_to_stderr
from gateway.transport import http1
from gateway.transport.websocket import WebSocketProtocol

# The kernel detects a client that vanished silently: 30 s without traffic, then 3 probes. A peer that merely
# stalls still answers them, so a slow reader is never mistaken for a dead one. Websocket pings could not tell
# the two apart.
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


# glibc's malloc.h: block size from which memory is mapped separately, free bytes kept at the top of the heap
_MMAP_THRESHOLD: Final = (-3, 1 << 20)
_TRIM_THRESHOLD: Final = (-1, 16 << 20)
# seconds a busy thread may keep the interpreter while the loop has work; Python's default of 5 ms is longer
# than a whole Read takes
_SWITCH_INTERVAL: Final = 0.0005
_DESCRIPTORS: Final = 65536  # as `LimitNOFILE=` in deploy/incus-gateway.service


LEAVE: Final = signal.SIGUSR1
"""Signal that stops the gateway so that another can take its place: held commands keep running."""


class _Server(uvicorn.Server):
    """A uvicorn server that drains the gateway before it closes the sockets."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._ending = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(LEAVE, self._leave)
        # uvicorn's own loop wakes ten times a second to check for the end; its clock needs only one
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), 1.0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._ending.set)

    def _leave(self) -> None:
        self._gateway.leave()
        self.should_exit = True
        self._ending.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # Objects created so far live forever. Otherwise each full collection would scan all of them and block
        # the loop for 70 ms whenever clients or tenants have allocated a lot.
        gc.collect()
        gc.freeze()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        with contextlib.suppress(Unavailable):  # it never started
            await self._gateway.drain()
        await super().shutdown(sockets)


def serve(settings: Settings, *, log_level: str = "info") -> None:
    """Serve until SIGTERM or SIGINT, which end all commands, or until `LEAVE`.

    Raises `Unavailable` if the address, the database or Caddy's folders cannot be used, or if incusd is
    clustered.
    """
    log_to_stderr(log_level)
    # URLs contain no tokens, but tenants' names: no access log
    logging.getLogger("uvicorn.access").disabled = True
    for name in ("uvicorn.error", "uvicorn", "websockets", "mcp"):
        logging.getLogger(name).setLevel(logging.WARNING)
    share()
    raise_descriptors()
    close(settings)
    Caddy(settings).lay()
    listening = listen(settings.listen)
    gateway = Gateway(settings)
    config = uvicorn.Config(
        gateway.app,
        http=http1.protocol(settings),
        ws=WebSocketProtocol,
        ws_max_size=settings.max_frame,
        ws_ping_interval=None,
        ws_per_message_deflate=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, int(settings.shutdown_timeout / 4)),
    )

    async def run() -> None:
        if settings.runtime == "incus":
            await refuse_cluster(settings)
        async with gateway.store:
            # uvicorn re-raises the signal that stopped it for the previous handler; an orderly end must not
            # look like death by signal
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
            await _Server(config, gateway).serve(sockets=[listening])

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())
    finally:
        listening.close()
        if not _is_tcp(settings.listen):
            with contextlib.suppress(FileNotFoundError):
                Path(settings.listen).unlink()


def share() -> None:
    """Make the process return memory to the kernel early, and its threads yield to the loop early.

    By default glibc would keep 16 MiB forever after one message of that size.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL)
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for setting in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(*setting)


def raise_descriptors() -> None:
    """Raise the soft limit of open files as far as allowed, up to the value in our unit file.

    The usual 1024 exist for programs that use select(2); here each tenant needs some, each command four.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def listen(address: str) -> socket.socket:
    """Return a listening socket for HOST:PORT or a path. Raises `Unavailable`, saying what to change."""
    if not _is_tcp(address):
        return _listen_unix(Path(address))
    host, _, port = address.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise Unavailable(f"GATEWAY_LISTEN must be HOST:PORT or the path of a unix socket, not {address!r}")
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=1)[0]
        listening = socket.socket(found[0], socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # on Linux, accepted connections inherit these
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            listening.setsockopt(socket.IPPROTO_TCP, option, value)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.bind(found[4])
        listening.listen(2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Unavailable(f"{address} is in use; stop what uses it or set GATEWAY_LISTEN") from error
        raise Unavailable(f"cannot listen on {address}: {error.strerror}; set GATEWAY_LISTEN") from error
    return listening


def _listen_unix(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise Unavailable(f"{path} is in use; stop what uses it or set GATEWAY_LISTEN")
            path.unlink()  # left by a dead gateway
        old = os.umask(0o117)
        try:
            listening.bind(str(path))
        finally:
            os.umask(old)
        listening.listen(2048)
    except OSError as error:
        raise Unavailable(f"cannot listen on {path}: {error.strerror}; set GATEWAY_LISTEN") from error
    return listening


def _is_tcp(address: str) -> bool:
    return "/" not in address
