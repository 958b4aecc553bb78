"""Serves the application on its listening socket by uvicorn, until a signal or a successor ends it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import sys
from types import FrameType
from typing import Final

import uvicorn
import uvloop

from gateway.api.app import Gateway
from gateway.caddy import Caddy
from gateway.errors import Unavailable
from gateway.notify import notify
from gateway.server.handover import Predecessor, Succession
from gateway.server.listening import inherited, listen, remove
from gateway.settings import Settings
from gateway.settings.settings import unknown_settings
from gateway.storage.state_dir import close
from gateway.tasks import log_failure
from gateway.terminal import log_to_stderr
from gateway.transport import http1

log = logging.getLogger(__name__)

# glibc's malloc.h: block size from which memory is mapped separately, free bytes kept at the top of the heap
_MMAP_THRESHOLD: Final = (-3, 1 << 20)
_TRIM_THRESHOLD: Final = (-1, 16 << 20)
# seconds a busy thread may keep the interpreter while the loop has work; Python's default of 5 ms is longer
# than a whole Read takes
_SWITCH_INTERVAL: Final = 0.0005
_DESCRIPTORS: Final = 65536  # as `LimitNOFILE=` in deploy/incus-gateway.service
# seconds that requests have for their answers when a successor takes over. Those received more than `_LONG`
# seconds before do not count; a connection on which nothing has arrived yet does
_LAST: Final = 0.1
_LONG: Final = 1.0
_FRESH: Final = 0.05
_LOOK: Final = 0.002


LEAVE: Final = signal.SIGUSR1
"""Signal that stops the gateway so that another can take its place: held commands keep running."""


class _GatewayServer(uvicorn.Server):
    """A uvicorn server that drains the gateway before it closes the sockets."""

    def __init__(
        self, config: uvicorn.Config, gateway: Gateway, settings: Settings, predecessor: Predecessor | None
    ) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._settings = settings
        self._predecessor = predecessor
        self.handed_over = False  # a successor serves on our address
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

    async def serve_on(self, listening: socket.socket) -> None:
        """Serve until shutdown, or until a successor serves. The records must be open and stay so."""
        succession = Succession(self._settings, self._gateway, listening, self._quiet, self._succeeded)
        async with succession:
            await self.serve(sockets=[listening])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._predecessor is None:
            # Objects created so far live forever. Otherwise each full collection would scan all of them and
            # block the loop for 70 ms whenever clients or tenants have allocated a lot.
            gc.collect()
            notify("READY=1")
        else:  # a successor has collected already, while its predecessor still served
            await asyncio.to_thread(self._predecessor.succeed, os.getpid())
        gc.freeze()

    async def _quiet(self) -> None:
        """Stop accepting clients, which then wait for the successor, and answer the requests received."""
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        until = loop.time() + _LAST
        while self._owes_answers() and loop.time() < until:  # noqa: ASYNC110 - uvicorn tells nobody
            await asyncio.sleep(_LOOK)
        for connection in self._http():
            connection.shutdown()  # one with a request in progress ends after its answer

    def _http(self) -> list[http1.HttpProtocol]:
        return [one for one in self.server_state.connections if isinstance(one, http1.HttpProtocol)]

    def _owes_answers(self) -> bool:
        return any(connection.owes_answer(_FRESH, _LONG) for connection in self._http())

    def _succeeded(self) -> None:
        self.handed_over = self.should_exit = True
        self._ending.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        with contextlib.suppress(Unavailable):  # it never started
            await self._gateway.drain()
        await super().shutdown(sockets)


def serve(settings: Settings, *, log_level: str = "info", take_over: bool = False) -> None:
    """Serve until SIGTERM or SIGINT, which end all commands, until `LEAVE`, or until a successor serves.

    With `take_over`, prepare everything and then take over from the gateway that serves this state dir.

    Raises `Unavailable` if the address, the records or the routes' folders cannot be used, or if incusd is in
    a cluster; with `take_over` also if there is no incusd, or no gateway that hands over. The old gateway
    then keeps running.
    """
    log_to_stderr(log_level)
    for warning in unknown_settings():
        log.warning(warning)
    # no access log: URLs contain no tokens, but names of tenants
    logging.getLogger("uvicorn.access").disabled = True
    for name in ("uvicorn.error", "uvicorn", "websockets", "mcp"):
        logging.getLogger(name).setLevel(logging.WARNING)
    share()
    raise_descriptors()
    close(settings)
    Caddy(settings).create_folders()
    given = inherited()
    with contextlib.ExitStack() as stack:
        predecessor = stack.enter_context(Predecessor(settings)) if take_over else None
        if predecessor is not None and predecessor.address == settings.listen:
            given = predecessor.listening
        listening = listen(settings.listen) if given is None else given
        stack.callback(listening.close)
        if not _serve(settings, listening, predecessor):
            remove(settings.listen)


def _serve(settings: Settings, listening: socket.socket, predecessor: Predecessor | None) -> bool:
    """Serve on a socket; return whether a successor has taken over."""
    gateway = Gateway(settings)
    config = http1.config(
        *(gateway.app, http1.protocol()),
        lifespan="on",
        timeout_graceful_shutdown=max(1, int(settings.shutdown_timeout / 4)),
    )

    async def run() -> bool:
        asyncio.get_running_loop().set_exception_handler(log_failure)
        async with contextlib.AsyncExitStack() as stack:
            if predecessor is not None:
                await stack.enter_async_context(gateway.prepared(predecessor.tenants))
                config.load()
                gc.collect()
                gateway.skip(await predecessor.release())
            await stack.enter_async_context(gateway.store)
            # uvicorn re-raises the signal that stopped it for the previous handler; an orderly end must not
            # look like death by signal
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
            server = _GatewayServer(config, gateway, settings, predecessor)
            await server.serve_on(listening)
            return server.handed_over

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def share() -> None:
    """Make the process return memory to the kernel early, and its threads yield to the loop early.

    By default glibc would keep 16 MiB for good after one message of that size.
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
