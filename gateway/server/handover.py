"""Hands the gateway over to a successor, which connects to a socket in the state dir.

Both sides speak in packets:

| the successor sends | the gateway answers |
|---|---|
| `{"v": 1, "take": true}` | `{"v": 1, "listen": ADDRESS, "tenants": […]}`, its listening socket |
| `{"ready": true}` | `{"waiting": N}` while deployments are under way, then `{"go": true, "told": […]}` |
| `{"serving": true, "listen": ADDRESS}` | nothing |
| `{"known": true}` once whatever started it knows | nothing: it ends |

Any answer may be `{"refused": REASON}` instead; nothing has changed then. Until `go`, either side may hang up
without affecting the other. From `go` on the successor owns the records; if it hangs up before it serves, the
gateway restarts itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from gateway.api.app import Gateway
from gateway.errors import Unavailable
from gateway.notify import notify, settled, status
from gateway.server.listening import bequeath, remove
from gateway.settings import Settings
from gateway.tasks import log_failure

# --- packets -------------------------------------------------------------------------------------------


VERSION: Final = 1
_PACKET: Final = 64 << 10


def path_in(state_dir: Path) -> Path:
    """Return the path at which the gateway of a state dir listens for its successor."""
    return state_dir / "handover.sock"


def listening_at(path: Path) -> socket.socket:
    """Return a socket that listens for a successor; the state dir must be locked. Raises `OSError`."""
    path.unlink(missing_ok=True)  # left by a killed gateway
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(4)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def trusted(connection: socket.socket) -> bool:
    """Return whether our own user or root is at the other end."""
    # struct ucred: pid, uid, gid, as the kernel reports them
    _, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid in (0, os.geteuid())


def say(connection: socket.socket, said: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one packet. Raises `OSError`."""
    socket.send_fds(connection, [json.dumps(said).encode()], list(descriptors))


async def received_packet(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return a non-blocking socket's next packet; None at the end, or if it is not one of this protocol."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def came() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(connection, came)
    try:
        await readable
    finally:
        loop.remove_reader(connection)
    try:
        return received(connection)
    except (OSError, ValueError):
        return None


def received(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return a socket's next packet, None at the end. Raises `OSError`, or `ValueError` for a bad packet."""
    data, descriptors, flags, _ = socket.recv_fds(connection, _PACKET, 1)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if not data:
        return None
    try:
        said = json.loads(data)
        if not isinstance(said, dict) or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise ValueError("not a packet of a gateway or its successor")
    except ValueError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return said, list(descriptors)


# --- the successor's side ------------------------------------------------------------------------------


_PATIENCE: Final = 5.0  # seconds for the first answer
_BARRIER: Final = 5.0  # seconds until whatever started us knows that we serve


class Predecessor:
    """The gateway that serves the state dir now. A context manager; leaving it hangs up.

    `listening` is its listening socket, bound to `address`; `tenants` are those with connected clients.
    """

    def __init__(self, settings: Settings) -> None:
        """Ask it to hand over. Raises `Unavailable` if it refuses, or if there is none."""
        path = path_in(settings.state_dir)
        self._listen = settings.listen
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._connection.settimeout(_PATIENCE)
            self._connection.connect(str(path))
            say(self._connection, {"v": VERSION, "take": True})
            answer = received(self._connection)
        except (OSError, ValueError) as error:
            self._connection.close()
            raise Unavailable(f"no gateway at {path} can be replaced: {error}") from error
        said, descriptors = answer or ({}, [])
        if said.get("v") != VERSION or len(descriptors) != 1:
            self._connection.close()
            raise Unavailable(said.get("refused") or "the running gateway speaks another version")
        self._connection.setblocking(False)
        self.listening = socket.socket(fileno=descriptors[0])
        self.address = str(said["listen"])
        self.tenants: Sequence[str] = [str(name) for name in said["tenants"]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    async def release(self) -> Sequence[str]:
        """Have it release everything; return the marks of the runtime's events that it has published.

        If it dies, it has released everything too. Raises `Unavailable` if it keeps running instead.
        """
        with contextlib.suppress(OSError):
            say(self._connection, {"ready": True})
        while (answer := await received_packet(self._connection)) is not None:
            said: dict[str, Any] = answer[0]
            if "refused" in said:
                raise Unavailable(str(said["refused"]))
            if "go" in said:
                return [str(mark) for mark in said["told"]]
            status(f"ready; waits for {said.get('waiting')} deployments to end")
        return []

    def succeed(self, pid: int) -> None:
        """Report that we serve. The old gateway ends once whatever started us knows it too."""
        with contextlib.suppress(OSError):
            say(self._connection, {"serving": True, "listen": self._listen})
        notify(f"MAINPID={pid}", "READY=1", "STATUS=serves")
        settled(_BARRIER)
        with contextlib.suppress(OSError):
            say(self._connection, {"known": True})


# --- the gateway's side --------------------------------------------------------------------------------


log = logging.getLogger(__name__)

TAKE_OVER: Final = "--take-over"
_HELLO: Final = 5.0  # seconds for a successor's first packet
_STARTS: Final = 120.0  # seconds for a successor to serve after `go`, before it is given up
_KNOWN: Final = 30.0  # seconds until whatever started it knows; the successor has a limit of its own
_TENANTS: Final = 200  # tenants with clients that are named to a successor, at most


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
        gateway: Gateway,
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
            asked = await received_packet(connection)
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
        ready = await received_packet(connection)
        if ready is None or ready[0].get("ready") is not True:
            log.info("the successor ended before it was ready; this gateway keeps running")
            return
        if await self._rested(connection):
            await self._hand_over_to(connection)

    async def _rested(self, connection: socket.socket) -> bool:
        """Wait until nothing would be cut off any more; return whether the successor is still there."""

        def waiting(number: int) -> None:
            with contextlib.suppress(OSError):
                say(connection, {"waiting": number})

        resting = asyncio.create_task(self._gateway.rest(self._settings.upgrade_patience, waiting))
        hearing = asyncio.create_task(received_packet(connection))  # it sends nothing more, but may hang up
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

    async def _hand_over_to(self, connection: socket.socket) -> None:
        """Give everything to the successor; restart if it does not serve."""
        times = [time.monotonic()]
        try:
            await self._quiet()
            times.append(time.monotonic())
            told = await self._gateway.hand_over()
            times.append(time.monotonic())
            self._gone = True
            asyncio.get_running_loop().set_exception_handler(log_unless_handed_over)
            say(connection, {"go": True, "told": [*told]})
            async with asyncio.timeout(_STARTS):
                answer = await received_packet(connection)
            if answer is not None and answer[0].get("serving") is True:
                log.info("a successor serves; %s", _waited([*times, time.monotonic()]))
                if answer[0].get("listen") != self._settings.listen:
                    remove(self._settings.listen)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_KNOWN):
                        await received_packet(connection)
                self._ended()
                return
        except (OSError, TimeoutError):
            pass
        except Exception:
            log.exception("cannot hand over to a successor")
        log.error("the successor does not serve: this gateway starts again")
        self._restart()

    def _restart(self) -> NoReturn:
        """Execute this program again, with the same process id and listening socket."""
        words = [sys.executable, *(word for word in sys.orig_argv[1:] if word != TAKE_OVER)]
        os.execve(words[0], words, os.environ | bequeath(self._listening))  # noqa: S606 - as we were started


def log_unless_handed_over(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log a failure, unless its cause is that the records now belong to the successor."""
    if not isinstance(context.get("exception"), Unavailable):
        log_failure(loop, context)
