"""One tenant: its tools, commands and lifecycle."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from gateway_client.attachment import Encoding
from gateway_client.connections import Connections
from gateway_client.execution import Exec
from gateway_client.http_client import HttpClient
from gateway_client.output import BUFFER
from gateway_client.results import RunResult
from gateway_client.tool_session import ToolSession

if TYPE_CHECKING:
    from gateway_client.deployments import Deployment, History
    from gateway_client.events import EventStream
    from gateway_client.files import Files


class Tenant(ToolSession):
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

    @property
    def _path(self) -> str:
        return f"/v1/tenants/{self.name}"

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
        exec_id: str | None = None,
        buffer: int = BUFFER,
        encoding: Encoding = "binary",
    ) -> Exec:
        """Return a command to run in an `async with`: a line for the user's shell, or a list of arguments.

        `pty` is (columns, rows) and includes stdin; `timeout` and `linger` are in seconds, and a linger of -1
        has no end; `buffer` limits the bytes of each output stream that wait here. With the `encoding`
        "utf-8" no chunk of output ends inside a character, so that each can be decoded by itself.
        """
        params: dict[str, Any] = {
            **_command(command, cwd, env),
            "stdin": stdin or pty is not None,
            "execId": exec_id or secrets.token_hex(16),
        }
        if user is not None:
            params["user"] = user
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
        self, *, types: str | Iterable[str] | None = None, last_event_id: int | None = None
    ) -> EventStream:
        """Return the stream of this tenant's events; see `Client.events`."""
        from gateway_client.events import EventStream, event_query

        return EventStream(self._http, event_query(tenant=self.name, types=types), last_event_id)

    # --- its life -------------------------------------------------------------------------------------

    async def info(self) -> Mapping[str, Any]:
        """Return the tenant's state, address and limits."""
        answer: Mapping[str, Any] = await self._http.json("GET", self._path)
        return answer

    async def metrics(self) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = await self._http.json("GET", f"{self._path}/metrics")
        return answer

    async def site(self) -> Mapping[str, Any]:
        """Return whether the tenant's site answers now: `answers`, None if it has none or sleeps."""
        answer: Mapping[str, Any] = await self._http.json("GET", f"{self._path}/site")
        return answer

    async def start(self) -> None:
        await self._http.json("POST", f"{self._path}/start")

    async def stop(self) -> None:
        await self._http.json("POST", f"{self._path}/stop")

    async def sleep(self) -> None:
        """Stop the tenant until it is used again. Raises `Conflict` if it is in use."""
        await self._http.json("POST", f"{self._path}/sleep")

    async def restart(self) -> None:
        await self._http.json("POST", f"{self._path}/restart")

    async def rename(self, domain: str | None) -> None:
        """Change the tenant's domain, or remove it; its name stays."""
        await self._http.json("PATCH", self._path, {"domain": domain})

    async def resize(self, size: Literal["small", "medium", "large"]) -> Mapping[str, Any]:
        """Change the tenant's limits to those of another size while it runs, and return the tenant.

        Raises `Conflict` if it uses more disk or memory than that size has.
        """
        answer: Mapping[str, Any] = await self._http.json("PATCH", self._path, {"size": size})
        return answer

    async def deployments(self) -> History:
        """Return its deployments, which one is live, and those it can go back to."""
        from gateway_client.deployments import History

        return History.parse(await self._http.json("GET", f"{self._path}/deployments"))

    async def publish(
        self,
        domain: str,
        *,
        size: str = "small",
        env: Mapping[str, str] | None = None,
        tenant: str | None = None,
        key: str | None = None,
    ) -> Deployment:
        """Begin to build the site for production and serve it at another domain, in a separate tenant."""
        body: dict[str, Any] = {"domain": domain, "size": size}
        body |= {} if env is None else {"env": dict(env)}
        body |= {} if tenant is None else {"tenant": tenant}
        return await self._begun("POST", "publish", body, key)

    async def rollback(self, to: str | None = None, *, key: str | None = None) -> Deployment:
        """Begin to go back to a kept site: the one live before, or that of the deployment `to`."""
        body = {} if to is None else {"to": to}
        return await self._begun("POST", "rollback", body, key)

    async def variables(self) -> list[str]:
        """Return the names of the site's environment variables."""
        return list((await self._http.json("GET", f"{self._path}/env"))["names"])

    async def environment(self) -> dict[str, str]:
        """Return the site's environment with its values; needs the scope `exec` too."""
        return dict((await self._http.json("GET", f"{self._path}/env?values=1"))["env"])

    async def change_environment(
        self, changes: Mapping[str, str | None], *, key: str | None = None
    ) -> Deployment:
        """Begin to restart the site with changed variables; None removes one."""
        return await self._begun("PATCH", "env", {"env": dict(changes)}, key)

    async def _begun(self, method: str, what: str, body: Mapping[str, Any], key: str | None) -> Deployment:
        from gateway_client.deployments import Deployment

        headers = {} if key is None else {"Idempotency-Key": key}
        answer = await self._http.json(method, f"{self._path}/{what}", body, headers)
        return Deployment(self._http, answer["id"])

    async def clone(self, tenant: str, snapshot: str | None = None) -> Tenant:
        """Create another tenant from this one's disk, or from a snapshot of it; it has no domain yet."""
        body = {"tenant": tenant} if snapshot is None else {"tenant": tenant, "snapshot": snapshot}
        await self._http.json("POST", f"{self._path}/clone", body)
        return self._other(tenant)

    async def snapshots(self) -> list[Mapping[str, Any]]:
        """Return name, time and size of each, oldest first."""
        return list((await self._http.json("GET", f"{self._path}/snapshots"))["snapshots"])

    async def snapshot(self, name: str | None = None) -> Mapping[str, Any]:
        """Make a snapshot of the disk; without a name it is named after the time."""
        body = {} if name is None else {"name": name}
        answer: Mapping[str, Any] = await self._http.json("POST", f"{self._path}/snapshots", body)
        return answer

    async def restore(self, snapshot: str) -> None:
        """Restore the disk from a snapshot: stops the tenant, and starts it again if it ran."""
        await self._http.json("POST", f"{self._path}/snapshots/{snapshot}/restore")

    async def delete_snapshot(self, snapshot: str) -> None:
        await self._http.json("DELETE", f"{self._path}/snapshots/{snapshot}")

    # --- its site's log -------------------------------------------------------------------------------

    async def logs(self, lines: int = 100, follow: bool = False) -> AsyncIterator[bytes]:
        """Yield the last lines of the site's log in pieces, and with `follow` new ones until you leave."""
        path = f"{self._path}/logs?lines={lines}&follow={int(follow)}"
        async with contextlib.aclosing(self._http.stream(path)) as pieces:
            async for piece in pieces:
                yield piece

    async def delete(self) -> None:
        """Destroy the tenant with all its files and snapshots."""
        await self._http.json("DELETE", self._path)

    # --- connections ----------------------------------------------------------------------------------

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
