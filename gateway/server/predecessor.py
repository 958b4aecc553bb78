"""The gateway that this process takes over from."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

from gateway.errors import Unavailable
from gateway.notify import notify, settled, status
from gateway.server.handover import VERSION, heard, path_in, received, say
from gateway.settings import Settings

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
        while (answer := await heard(self._connection)) is not None:
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
