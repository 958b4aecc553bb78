"""The gateway's client of its holder."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from gateway.holder.holding import VERSION, close, receive, send

log = logging.getLogger(__name__)

_PATIENCE: Final = 5.0  # seconds for an answer
_ATTEMPTS: Final = 4  # to list what is held: what is not listed ends
_FULL: Final = 0.01  # seconds before sending again to a holder whose queue is full
_AGAIN: Final = 0.2  # seconds until the second attempt to reconnect; then ever more
_RARELY: Final = 1.0  # seconds between attempts in the end
_SOON: Final = 0.05  # seconds after which the holder is told what can wait


class HolderClient:
    """The descriptors held for this gateway. An async context manager; leaving it drops nothing.

    If the holder dies, the client reconnects to the next one and sends everything again. `there` tells
    whether one is connected.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._held: dict[str, Sequence[int]] = {}
        self._waiting: OrderedDict[str, None] = OrderedDict()  # names not sent yet
        self._changed = asyncio.Event()
        self._telling: asyncio.TimerHandle | None = None
        self._attending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> HolderClient:
        with contextlib.suppress(OSError):
            self._socket = _connected(self._path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.leave()

    async def leave(self) -> None:
        """Leave what is held as it is to another process, and tell the holder nothing more. Idempotent."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        if self._attending is not None:
            self._attending.cancel()
            await asyncio.gather(self._attending, return_exceptions=True)
            self._attending = None
        if self._socket is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE):
                    await self._send_waiting()
            self._socket.close()
            self._socket = None

    @property
    def there(self) -> bool:
        return self._socket is not None

    async def taken_over(self) -> dict[str, list[int]]:
        """Return the held descriptors by name; the caller owns them. Call it once, before anything else.

        A name stays held until it is put again or dropped; with `keep` the next holder is given it too. From
        this call on, a lost connection is re-established.
        """
        found: dict[str, list[int]] = {}
        for attempt in range(_ATTEMPTS):  # on a busy host it may be slow
            if self._socket is None:
                break
            try:
                found = await asyncio.to_thread(_listed, self._socket)
                self._socket.setblocking(False)
                break
            except (OSError, ValueError) as error:
                log.warning("cannot list what the holder holds: %s", error)
                self._socket.close()
                self._socket = None
            if attempt + 1 < _ATTEMPTS:
                await asyncio.sleep(_AGAIN)
                with contextlib.suppress(OSError):
                    self._socket = await asyncio.to_thread(_connected, self._path)
        self._attending = asyncio.create_task(self._attend(), name="holder")
        return found

    def put(self, name: str, descriptors: Sequence[int], *, soon: bool = False) -> None:
        """Hold descriptors under a name, replacing any earlier ones. They must stay open until `drop`.

        With `soon` the holder is told a moment later, which saves its CPU time while a command starts.
        """
        self._held[name] = descriptors
        self._tell(name, soon)

    def keep(self, name: str, descriptors: Sequence[int]) -> None:
        """Keep holding what was taken over under a name; it is not sent, since the holder has it."""
        self._held[name] = descriptors

    def drop(self, name: str, *, soon: bool = False) -> None:
        """Stop holding a name, with `soon` a moment later. Idempotent."""
        self._held.pop(name, None)
        self._tell(name, soon)

    def _tell(self, name: str, soon: bool) -> None:
        if self._socket is None:
            return  # the next holder is sent everything
        if soon:
            self._waiting[name] = None
            if self._telling is None:
                self._telling = asyncio.get_running_loop().call_later(_SOON, self._tell_waiting)
        elif self._sent(name):
            self._waiting.pop(name, None)
        else:
            self._waiting[name] = None
            self._changed.set()

    def _tell_waiting(self) -> None:
        self._telling = None
        self._changed.set()

    def _sent(self, name: str) -> bool:
        """Send the state of one name; return False if the holder's queue is full."""
        assert self._socket is not None
        descriptors = self._held.get(name)
        try:
            if descriptors is None:
                send(self._socket, {"v": VERSION, "drop": name})
            else:
                send(self._socket, {"v": VERSION, "put": name}, list(descriptors))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ETOOMANYREFS):
                return False
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):  # `_attend` notices these
                log.error("cannot hold %s: %s", name, error)
        return True

    async def _send_waiting(self) -> None:
        """Send all waiting names, as fast as the holder accepts them."""
        while self._waiting:
            name = next(iter(self._waiting))
            if self._sent(name):
                del self._waiting[name]
            else:
                await asyncio.sleep(_FULL)

    async def _attend(self) -> None:
        """Send what could not be sent at once, and reconnect if the holder is gone."""
        while True:
            if self._socket is None:
                await self._found()
            assert self._socket is not None
            await self._followed(self._socket)
            self._socket.close()
            self._socket = None
            log.warning("the holder at %s is gone: until it is back, a restart ends all commands", self._path)

    async def _found(self) -> None:
        pause = _AGAIN
        while True:
            try:
                connection = _connected(self._path, patience=0)  # a thread for each attempt would cost more
                stale = await self._already_held(connection)
            except (OSError, ValueError):
                await asyncio.sleep(pause)
                pause = min(pause * 1.2, _RARELY)
                continue
            self._socket = connection
            self._waiting = OrderedDict.fromkeys([*self._held, *stale])
            log.info("connected to the holder at %s; sending %d names", self._path, len(self._held))
            return

    async def _already_held(self, connection: socket.socket) -> list[str]:
        listing = asyncio.get_running_loop().run_in_executor(None, _welcomed, connection)
        try:
            return await asyncio.shield(listing)
        except asyncio.CancelledError:

            def over(done: asyncio.Future[list[str]]) -> None:
                _ = done.cancelled() or done.exception()  # nobody waits for it any more
                connection.close()

            with contextlib.suppress(OSError):  # whoever reads it in the thread stops at once
                connection.shutdown(socket.SHUT_RDWR)
            listing.add_done_callback(over)
            raise

    async def _followed(self, connection: socket.socket) -> None:
        """Send the waiting names as fast as the holder accepts them, until the connection ends."""
        over = asyncio.Event()

        def heard() -> None:  # a refused name, and otherwise the end
            with contextlib.suppress(OSError, ValueError):
                received = receive(connection)
                if received is not None and (name := received[0].get("refused")) is not None:
                    log.warning("the holder has no room for %s: a restart of the gateway ends it", name)
                    return
            asyncio.get_running_loop().remove_reader(connection)
            over.set()
            self._changed.set()

        asyncio.get_running_loop().add_reader(connection, heard)
        try:
            while not over.is_set():
                await self._send_waiting()
                await self._changed.wait()
                self._changed.clear()
        finally:
            asyncio.get_running_loop().remove_reader(connection)


def held_at(path: Path) -> int:
    """Return how many names a holder holds.

    Raises `OSError` if none answers, and `ValueError` if it is of another version.
    """
    with _connected(path) as connection:
        send(connection, {"v": VERSION, "about": True})
        received = receive(connection)
    if received is None or received[0].get("v") != VERSION:
        raise ValueError("it speaks another version of the protocol")
    return int(received[0]["held"])


def _connected(path: Path, patience: float = _PATIENCE) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(patience)
        connection.connect(str(path))
        connection.settimeout(_PATIENCE)
    except BaseException:
        connection.close()
        raise
    return connection


def _listed(connection: socket.socket) -> dict[str, list[int]]:
    send(connection, {"v": VERSION, "list": True})
    found: dict[str, list[int]] = {}
    try:
        while (received := receive(connection)) is not None:
            said: dict[str, Any] = received[0]
            if "end" in said:
                return found
            found[str(said["name"])] = received[1]
        raise ConnectionResetError("it hung up")
    except BaseException:
        for descriptors in found.values():  # what they belong to would never end
            close(descriptors)
        raise


def _welcomed(connection: socket.socket) -> list[str]:
    """Return the names that a holder already holds."""
    try:
        found = _listed(connection)
        connection.setblocking(False)
    except BaseException:
        connection.close()
        raise
    for descriptors in found.values():
        close(descriptors)
    return list(found)
