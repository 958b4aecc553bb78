"""One tenant: its tools, commands, files and events."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gateway_client.attachment import Encoding
from gateway_client.connections import Connections
from gateway_client.execution import Exec
from gateway_client.http_client import HttpClient
from gateway_client.output import BUFFER
from gateway_client.results import RunResult
from gateway_client.tenant_site import TenantSite
from gateway_client.tool_session import ToolSession

if TYPE_CHECKING:
    from gateway_client.events import EventStream
    from gateway_client.files import Files


class Tenant(TenantSite, ToolSession):
    """A tenant: all that a client does with one. Cheap to create; it connects on the first request.

    Tools and control messages share one websocket, and so one tool session. Each running command has its own
    websocket: a client that does not read a command's output stops reading its socket, which slows down that
    command and no other. A few of these are kept open for the next commands.
    """

    def __init__(
        self,
        http: HttpClient,
        connections: Connections,
        name: str,
        linger: float | None,
        other: Callable[[str], Tenant],
    ) -> None:
        """Created by `Client.tenant`; `other` returns another tenant of the same client by name."""
        super().__init__(connections, linger)
        self.name = name
        self._http = http
        self._other = other

    @cached_property
    def files(self) -> Files:
        """Its files as an editor sees them."""
        from gateway_client.files import Files

        return Files(self._connections)

    # --- commands -------------------------------------------------------------------------------------

    def exec(
        self,
        command: str | Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | int | None = None,
        pty: tuple[int, int] | None = None,
        stdin: bool = False,
        timeout: float | None = None,
        linger: float | None = None,
        helper: bool = False,
        exec_id: str | None = None,
        buffer: int = BUFFER,
        encoding: Encoding = "binary",
    ) -> Exec:
        """Return a command to run in an `async with`: a line for the user's shell, or a list of arguments.

        `pty` is (columns, rows) and includes stdin; `timeout` and `linger` are in seconds, and a linger of -1
        has no end; `buffer` limits the bytes of each output stream that wait here. With the `encoding`
        "utf-8" no chunk of output ends inside a character, so that each can be decoded by itself. The
        history names no author for changes of a `helper`, such as a language server.
        """
        params: dict[str, Any] = {
            **_command(command, cwd, env),
            "stdin": stdin or pty is not None,
            "execId": exec_id or secrets.token_hex(16),
        }
        if user is not None:
            params["user"] = user
        if helper:
            params["helper"] = True
        if pty is not None:
            params["pty"] = {"cols": pty[0], "rows": pty[1]}
        if timeout is not None:
            params["timeoutMs"] = round(timeout * 1000)
        if linger is not None:
            params["lingerMs"] = -1 if linger < 0 else round(linger * 1000)
        return Exec(self._connections, "exec/start", params, buffer, encoding)

    def attach(
        self,
        exec_id: str,
        *,
        stdout: int = 0,
        stderr: int = 0,
        buffer: int = BUFFER,
        encoding: Encoding = "binary",
    ) -> Exec:
        """Return a running command for an `async with`, with its output from these byte offsets on."""
        params = {"exec": exec_id, "from": {"stdout": stdout, "stderr": stderr}}
        return Exec(self._connections, "exec/attach", params, buffer, encoding)

    async def execs(self) -> list[Mapping[str, Any]]:
        """Return the tenant's commands, including recently ended ones."""
        return list((await self.request("exec/list"))["execs"])

    async def run(
        self,
        command: str | Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        timeout: float | None = None,
    ) -> RunResult:
        """Run a command over HTTP and wait for it. Cancelling the task ends the command."""
        body = _command(command, cwd, env)
        if stdin is not None:
            body["stdin"] = stdin
        if timeout is not None:
            body["timeout_ms"] = round(timeout * 1000)
        answer = await self._http.json("POST", f"{self._path}/exec", body)
        return RunResult(**{name: answer[name] for name in RunResult.__slots__ if name in answer})

    def events(
        self, *, types: str | Iterable[str] | None = None, last_event_id: str | int | None = None
    ) -> EventStream:
        """Return the stream of this tenant's events; see `Client.events`."""
        from gateway_client.events import EventStream, event_query

        return EventStream(self._http, event_query(tenant=self.name, types=types), last_event_id)

    # --- copies and connections -----------------------------------------------------------------------

    async def clone(self, tenant: str, snapshot: str | None = None) -> Tenant:
        """Create another tenant from this one's disk, or from a snapshot of it; it has no domain yet."""
        body = {"tenant": tenant} if snapshot is None else {"tenant": tenant, "snapshot": snapshot}
        await self._http.json("POST", f"{self._path}/clone", body)
        return self._other(tenant)

    async def close(self) -> None:
        """Close all connections to this tenant; closing the client does so too.

        Ends background commands of Bash, unless you named the tool session; other commands continue for their
        linger time.
        """
        await self._connections.close()


def _command(command: str | Sequence[str], cwd: str | None, env: Mapping[str, str] | None) -> dict[str, Any]:
    body: dict[str, Any] = {"command": command} if isinstance(command, str) else {"argv": list(command)}
    if cwd is not None:
        body["cwd"] = cwd
    if env:
        body["env"] = dict(env)
    return body
