"""The process of a site of the `local` runtime, and the port that it gets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from gateway.bounds import run_in_thread
from gateway.errors import GatewayError, NotFound, Unavailable
from gateway.runtime import Commands, ExecSpec, Process
from gateway.runtime.listening import of_tree
from gateway.runtime.sites import Service

log = logging.getLogger(__name__)

_TAIL: Final = 4000  # bytes of its output that are kept
_LOOK: Final = 5.0  # seconds for a look at its processes
_PAUSE: Final = 0.3  # seconds before an ended site is restarted, as in its systemd unit
_PORTS: Final = range(20_000, 32_000)  # below net.ipv4.ip_local_port_range


class LocalService:
    """A site's process, restarted whenever it ends."""

    def __init__(self, commands: Commands, tenant: str, spec: ExecSpec, port: int) -> None:
        self.port = port
        self._restarts, self._started = 0, 0.0
        self._process: Process | None = None  # while it runs
        self._commands, self._tenant, self._spec = commands, tenant, spec
        self._said = b""
        self._task: asyncio.Task[None] | None = None

    @property
    def said(self) -> str:
        """The end of its output."""
        return self._said.decode("utf-8", "replace")

    def told(self, env: Mapping[str, str]) -> None:
        """Add variables for its next start."""
        self._spec = replace(self._spec, env={**self._spec.env, **env})

    async def start(self) -> None:
        """Start it. Raises `ExecFailed` if it cannot be started at all."""
        self._restarts = 0
        process = await self._begin()
        self._task = asyncio.create_task(self._keep(process), name=f"site of {self._tenant}")

    async def look(self) -> Service:
        """Return its state; see `Service`."""
        process = self._process
        if process is None:
            return Service("ended", self._restarts, self._started)
        try:
            listens = await run_in_thread(self, _LOOK, of_tree, process.pid)
        except TimeoutError:
            listens = frozenset()
        return Service("running", self._restarts, self._started, listens=listens)

    async def _begin(self) -> Process:
        process = self._process = await self._commands.exec(self._tenant, self._spec)
        self._started = time.monotonic()
        return process

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self, process: Process) -> None:
        while True:
            try:
                while piece := await process.read("stdout"):
                    self._said = (self._said + piece[-_TAIL:])[-_TAIL:]
                await process.wait()
                self._process = None
            except asyncio.CancelledError:
                await asyncio.shield(process.kill(1.0))
                raise
            while True:
                await asyncio.sleep(_PAUSE)
                try:
                    process = await self._begin()
                    self._restarts += 1
                    break
                except NotFound:
                    return
                except GatewayError as error:
                    log.info("the site of %s cannot be started: %s", self._tenant, error.message)


def free_port() -> int:
    """Return a free port outside of the kernel's range for outgoing connections.

    A site that finds its port taken would keep failing.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))  # noqa: S104 - as a site does
            return port
    raise Unavailable("this machine has no free port for a site")
