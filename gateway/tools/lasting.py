"""The seam to what runs Bash, BashOutput and KillShell, and the calls that outlive the gateway's process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.rootfs import FilesystemRoot
from gateway.tools.file_tools import ToolResult
from gateway.tools.session import Background, ToolSession


@dataclass(frozen=True, slots=True)
class LastingCall:
    """A call under its caller's id, as recorded with its command. Times are in seconds."""

    id: str
    digest: str  # of its input, in hexadecimal digits
    linger: float  # how long it continues without its caller
    event: str  # its id in events
    by: str
    began: float  # since the epoch


class AdoptedCall(Protocol):
    """A command of an earlier process. `in_front` means that its call has not been answered."""

    @property
    def tenant(self) -> str: ...

    @property
    def exec_id(self) -> str: ...

    @property
    def session(self) -> str | None:
        """The name of its session, if it has one."""
        ...

    @property
    def cwd(self) -> str | None:
        """The session's folder when it began."""
        ...

    @property
    def call(self) -> LastingCall | None: ...

    @property
    def in_front(self) -> bool: ...


class ShellTools(Background, Protocol):
    """Runs Bash, BashOutput and KillShell; `gateway.shells` implements it."""

    async def call(
        self,
        root: FilesystemRoot,
        session: ToolSession,
        name: str,
        arguments: object,
        *,
        exec_id: str,
        by: str,
        call_id: str | None = None,
        call: LastingCall | None = None,
        begin: Callable[[], Awaitable[None]] | None = None,
    ) -> ToolResult: ...

    def told(self, exec_id: str) -> None: ...

    async def leave(self) -> set[tuple[str, str]]:
        """Leave the held commands to the next process; return the tenants and ids of their calls."""
        ...

    def left_behind(self) -> Iterator[Any]:  # of `AdoptedCall`
        ...

    def discard(self, left: Any) -> None: ...

    def take_over(self, root: FilesystemRoot, session: ToolSession, left: Any) -> None: ...

    async def resume(self, root: FilesystemRoot, session: ToolSession, left: Any) -> ToolResult: ...
