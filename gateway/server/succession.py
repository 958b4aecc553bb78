"""Hands over to a successor, which connects to a socket in the state dir."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Any, Final, NoReturn, Protocol

from gateway.errors import Unavailable
from gateway.server.failures import report_of_predecessor
from gateway.server.handover import VERSION, heard, listening_at, path_in, say, trusted
from gateway.server.listening import bequeath, remove
from gateway.settings import Settings

log = logging.getLogger(__name__)

TAKE_OVER: Final = "--take-over"
_HELLO: Final = 5.0  # seconds for a successor's first packet
_STARTS: Final = 120.0  # seconds for a successor to serve after `go`, before it is given up
_KNOWN: Final = 30.0  # seconds until whatever started it knows; the successor has a limit of its own
_TENANTS: Final = 200  # tenants with clients that are named to a successor, at most


class Handed(Protocol):
    """What is handed over; implemented by `gateway.api.app.Gateway`."""

    @property
    def tenants(self) -> Sequence[str]: ...

    async def rest(self, seconds: float, waiting: Callable[[int], None]) -> None: ...

    def go_on(self) -> None: ...

    async def hand_over(self) -> Sequence[str]: ...


def _waited(times: Sequence[float]) -> str:
    """Return how long clients waited, and for what; `times` are when each part began, and the end."""
    whole, *parts = (round((end - begin) * 1000) for begin, end in [(times[0], times[-1]), *pairwise(times)])
    answers, old, new = parts
    return f"clients waited {whole} ms: {answers} for the last answers, {old} for this gateway, {new} for it"


class Succession:
    """Waits for a successor while the gateway serves. An async context manager; the state dir must be locked.

    `quiet` is called to stop accepting clients once a successor is ready, `ended` once it serves.
    """

    def __init__(
        self,
        settings: Settings,
        gateway: Handed,
        listening: socket.socket,
        quiet: Callable[[], Awaitable[None]],
        ended: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._gateway = gateway
        # a duplicate, since the server closes its own when it stops accepting
        self._listening = listening.dup()
        self._quiet, self._ended = quiet, ended
        self._path = path_in(settings.state_dir)
        self._attending: asyncio.Task[None] | None = None
        self._handing: asyncio.Task[None] | None = None
        self._gone = False  # whether the state dir belongs to the successor now

    async def __aenter__(self) -> Succession:
        try:
            listener = listening_at(self._path)
        except OSError as error:
            log.warning("no successor can take over, so an upgrade is a restart: %s", error)
        else:
            self._attending = asyncio.create_task(self._attend(listener), name="succession")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [task for task in (self._attending, self._handing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listening.close()
        if not self._gone:
            self._path.unlink(missing_ok=True)

    async def _attend(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                connection, _ = await loop.sock_accept(listener)
                if not trusted(connection):
                    connection.close()
                elif self._handing is not None and not self._handing.done():
                    with connection, contextlib.suppress(OSError):
                        say(connection, {"refused": "another upgrade is running; wait until it ends"})
                else:
                    self._handing = asyncio.create_task(self._hand_on(connection), name="hand over")

    async def _hand_on(self, connection: socket.socket) -> None:
        with connection:
            try:
                await self._converse(connection)
            except OSError:
                log.info("a successor ended before it was ready; this gateway keeps running")

    async def _converse(self, connection: socket.socket) -> None:
        """Talk to a successor. Raises `OSError` if it hangs up while nothing has changed."""
        async with asyncio.timeout(_HELLO):
            asked = await heard(connection)
        if asked is None:
            return
        said = asked[0]
        if said.get("v") != VERSION or said.get("take") is not True:
            say(connection, {"refused": "the running gateway speaks another version"})
            return
        told: dict[str, Any] = {"v": VERSION, "listen": self._settings.listen}
        told["tenants"] = [*self._gateway.tenants][:_TENANTS]
        say(connection, told, [self._listening.fileno()])
        log.info("a successor is starting")
        ready = await heard(connection)
        if ready is None or ready[0].get("ready") is not True:
            log.info("the successor ended before it was ready; this gateway keeps running")
            return
        if await self._rested(connection):
            await self._let_go(connection)

    async def _rested(self, connection: socket.socket) -> bool:
        """Wait until nothing would be cut off any more; return whether the successor is still there."""

        def waiting(number: int) -> None:
            with contextlib.suppress(OSError):
                say(connection, {"waiting": number})

        resting = asyncio.create_task(self._gateway.rest(self._settings.upgrade_patience, waiting))
        hearing = asyncio.create_task(heard(connection))  # it sends nothing more, but may hang up
        try:
            await asyncio.wait([resting, hearing], return_when=asyncio.FIRST_COMPLETED)
            if hearing.done():
                log.info("the successor ended while it waited; this gateway keeps running")
                self._gateway.go_on()
                return False
            resting.result()
            return True
        except Unavailable as busy:
            say(connection, {"refused": busy.message})
            return False
        finally:
            for task in (resting, hearing):
                task.cancel()
            await asyncio.gather(resting, hearing, return_exceptions=True)

    async def _let_go(self, connection: socket.socket) -> None:
        """Give everything to the successor; restart if it does not serve."""
        times = [time.monotonic()]
        try:
            await self._quiet()
            times.append(time.monotonic())
            told = await self._gateway.hand_over()
            times.append(time.monotonic())
            self._gone = True
            asyncio.get_running_loop().set_exception_handler(report_of_predecessor)
            say(connection, {"go": True, "told": [*told]})
            async with asyncio.timeout(_STARTS):
                answer = await heard(connection)
            if answer is not None and answer[0].get("serving") is True:
                log.info("a successor serves; %s", _waited([*times, time.monotonic()]))
                if answer[0].get("listen") != self._settings.listen:
                    remove(self._settings.listen)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_KNOWN):
                        await heard(connection)
                self._ended()
                return
        except (OSError, TimeoutError):
            pass
        except Exception:
            log.exception("cannot hand over to a successor")
        log.error("the successor does not serve: this gateway starts again")
        self._anew()

    def _anew(self) -> NoReturn:
        """Execute this program again, with the same process id and listening socket."""
        words = [sys.executable, *(word for word in sys.orig_argv[1:] if word != TAKE_OVER)]
        os.execve(words[0], words, os.environ | bequeath(self._listening))  # noqa: S606 - as we were started
