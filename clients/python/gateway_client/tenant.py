"""One tenant: its tools, its commands, its life."""

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
from gateway_client.results import RunResult, ShellResult, ToolResult, failure
from gateway_client.retry import State

if TYPE_CHECKING:
    from gateway_client.deployments import Deployment, History
    from gateway_client.events import EventStream
    from gateway_client.files import Files


class Tenant:
    """One tenant as this client sees it. Cheap to make; connects when something is asked.

    Tools and control messages share one websocket, and so one tool session: what was read, where Bash
    stands. Each running command has a websocket of its own, because a client that does not read a
    command's output stops reading its socket: only so does the pressure reach that command and no
    other. A few of these are kept open for the commands to come.
    """

    def __init__(
        self,
        http: HttpClient,
        connections: Connections,
        name: str,
        linger: float | None,
        other: Callable[[str], Tenant],
    ) -> None:
        """Made by `Client.tenant`; `other` returns another tenant of the same client by its name."""
        self.name = name
        self._http = http
        self._connections = connections
        self._linger = linger
        self._other = other

    @cached_property
    def files(self) -> Files:
        """Its files as an editor sees them."""
        from gateway_client.files import Files

        return Files(self._connections)

    @property
    def _path(self) -> str:
        return f"/v1/tenants/{self.name}"

    @property
    def state(self) -> State:
        """Whether there is a connection to this tenant: `idle` if none was needed yet, or none is kept."""
        return self._connections.state

    async def request(self, method: str, params: Mapping[str, Any] | None = None) -> Any:
        """Call a method of `gateway.v1` and return its result. Raises the typed error of the answer.

        Where the connection breaks, what may be asked twice is asked again.
        """
        return await self._connections.request(method, params)

    async def ping(self) -> None:
        await self.request("ping")

    # --- tools ----------------------------------------------------------------------------------------

    async def tools(self) -> list[Mapping[str, Any]]:
        """Return name, description and input schema of every tool."""
        return list((await self.request("tools/list"))["tools"])

    async def tool(
        self,
        name: str,
        arguments: Mapping[str, Any],
        call_id: str | None = None,
        *,
        linger: float | None = None,
    ) -> ToolResult:
        """Call a tool by its name. A failure in the tool's own terms is a result with `is_error`.

        `call_id` makes the call exactly-once: asking again with the same one returns the same result. Without
        one it gets its own, so that a break of the connection does not make it twice. Cancelling the task
        cancels the call and what it runs; where this process is killed, or its connection stays broken, it
        ends `linger` seconds later (as the tenant's `linger` says, else half a minute).
        """
        params: dict[str, Any] = {"name": name, "arguments": arguments}
        params["callId"] = call_id or secrets.token_hex(16)
        linger = self._linger if linger is None else linger
        if linger is not None:
            params["lingerMs"] = round(linger * 1000)
        return ToolResult.parse(await self.request("tools/call", params))

    async def read(
        self,
        path: str,
        *,
        offset: int | None = None,
        limit: int | None = None,
        pages: str | None = None,
        allow_large: bool = False,
    ) -> ToolResult:
        """Read lines of a file, or `pages` of a PDF. This and the next raise the typed error of a failure."""
        return await self._tool(
            "Read", file_path=path, offset=offset, limit=limit, pages=pages, allow_large=allow_large or None
        )

    async def write(self, path: str, content: str) -> ToolResult:
        """Write a whole file, with the folders above it."""
        return await self._tool("Write", file_path=path, content=content)

    async def edit(self, path: str, old: str, new: str, *, replace_all: bool = False) -> ToolResult:
        """Replace `old`, which must be in the file once unless `replace_all`, by `new`."""
        return await self._tool(
            "Edit", file_path=path, old_string=old, new_string=new, replace_all=replace_all or None
        )

    async def glob(self, pattern: str, path: str | None = None) -> ToolResult:
        """Find files by name."""
        return await self._tool("Glob", pattern=pattern, path=path)

    async def grep(
        self,
        pattern: str,
        path: str | None = None,
        *,
        glob: str | None = None,
        type: str | None = None,
        output_mode: Literal["content", "files_with_matches", "count"] | None = None,
        ignore_case: bool = False,
        only_matching: bool = False,
        multiline: bool = False,
        line_numbers: bool = True,
        before: int | None = None,
        after: int | None = None,
        context: int | None = None,
        head_limit: int | None = None,
        offset: int | None = None,
    ) -> ToolResult:
        """Search in files. `before`, `after` and `context` count lines around a match, in content mode."""
        given = {"-i": ignore_case or None, "-o": only_matching or None, "-B": before, "-A": after}
        return await self._tool(
            "Grep",
            pattern=pattern,
            path=path,
            glob=glob,
            type=type,
            output_mode=output_mode,
            multiline=multiline or None,
            context=context,
            head_limit=head_limit,
            offset=offset,
            **given,
            **({} if line_numbers else {"-n": False}),
        )

    async def bash(
        self,
        command: str,
        *,
        timeout: float | None = None,
        background: bool = False,
        description: str | None = None,
    ) -> ShellResult:
        """Run a line in this session's working directory; an exit code is in the result, whatever it is.

        After `timeout` seconds (default 120, at most 600) it goes on in the background: `status` is `running`
        then, and `bash_output` follows it.
        """
        return await self._shell(
            "Bash",
            command=command,
            timeout=None if timeout is None else round(timeout * 1000),
            run_in_background=background or None,
            description=description,
        )

    async def bash_output(self, shell_id: str, *, filter: str | None = None) -> ShellResult:
        """Return what a command in the background has printed since the last call; its end too."""
        return await self._shell("BashOutput", bash_id=shell_id, filter=filter)

    async def kill_shell(self, shell_id: str) -> ToolResult:
        """End a command in the background with all that it started."""
        return await self._tool("KillShell", shell_id=shell_id)

    async def _shell(self, name: str, /, **arguments: Any) -> ShellResult:
        result = await self.tool(name, _given(arguments))
        if result.is_error and not {"exec", "status"} <= result.structured.keys():  # nothing has run
            raise failure(result)
        return ShellResult(result.content, result.is_error, result.structured)

    async def _tool(self, name: str, /, **arguments: Any) -> ToolResult:
        result = await self.tool(name, _given(arguments))
        if result.is_error:
            raise failure(result)
        return result

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

        `pty` is (columns, rows) and brings stdin with it; `timeout` and `linger` are in seconds, a linger
        of -1 is for ever; `buffer` bounds what waits here of each output stream, in bytes. With the
        `encoding` "utf-8" no chunk of the output ends inside a character, so that each can be decoded by
        itself; else it is cut anywhere.
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
        """Return a command that runs already, for an `async with`: its output from these byte offsets on."""
        params = {"exec": exec_id, "from": {"stdout": stdout, "stderr": stderr}}
        return Exec(self._connections, "exec/attach", params, buffer, encoding)

    async def execs(self) -> list[Mapping[str, Any]]:
        """Return the tenant's commands, those that ended a while ago included."""
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
        """Return what is known of the tenant."""
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

    async def restart(self) -> None:
        await self._http.json("POST", f"{self._path}/restart")

    async def rename(self, domain: str | None) -> None:
        """Give the tenant another domain, or none; its name stays."""
        await self._http.json("PATCH", self._path, {"domain": domain})

    async def resize(self, size: Literal["small", "medium", "large"]) -> Mapping[str, Any]:
        """Give the tenant the limits of another size while it runs, and return it as it is then.

        Raises `Conflict` if it uses more disk or memory than that size has.
        """
        answer: Mapping[str, Any] = await self._http.json("PATCH", self._path, {"size": size})
        return answer

    async def deployments(self) -> History:
        """Return what was deployed to it, which of it is live, and which it can go back to."""
        from gateway_client.deployments import History

        return History.parse(await self._http.json("GET", f"{self._path}/deployments"))

    async def rollback(self, to: str | None = None, *, key: str | None = None) -> Deployment:
        """Begin to serve a kept site again, the one that was live last or that of the deployment `to`."""
        body = {} if to is None else {"to": to}
        return await self._begun("POST", "rollback", body, key)

    async def variables(self) -> list[str]:
        """Return the names of the site's environment."""
        return list((await self._http.json("GET", f"{self._path}/env"))["names"])

    async def environment(self) -> dict[str, str]:
        """Return the site's environment with its values; needs the scope `exec`, too."""
        return dict((await self._http.json("GET", f"{self._path}/env?values=1"))["env"])

    async def change_environment(
        self, changes: Mapping[str, str | None], *, key: str | None = None
    ) -> Deployment:
        """Begin to start the site anew with other variables; None removes one."""
        return await self._begun("PATCH", "env", {"env": dict(changes)}, key)

    async def _begun(self, method: str, what: str, body: Mapping[str, Any], key: str | None) -> Deployment:
        from gateway_client.deployments import Deployment

        headers = {} if key is None else {"Idempotency-Key": key}
        answer = await self._http.json(method, f"{self._path}/{what}", body, headers)
        return Deployment(self._http, answer["id"])

    async def clone(self, tenant: str, snapshot: str | None = None) -> Tenant:
        """Make another tenant of this one's disk, or of a snapshot of it; it has no domain yet."""
        body = {"tenant": tenant} if snapshot is None else {"tenant": tenant, "snapshot": snapshot}
        await self._http.json("POST", f"{self._path}/clone", body)
        return self._other(tenant)

    async def snapshots(self) -> list[Mapping[str, Any]]:
        """Return name, time and size of each, oldest first."""
        return list((await self._http.json("GET", f"{self._path}/snapshots"))["snapshots"])

    async def snapshot(self, name: str | None = None) -> Mapping[str, Any]:
        """Keep the disk as it is now; without a name by the time."""
        body = {} if name is None else {"name": name}
        answer: Mapping[str, Any] = await self._http.json("POST", f"{self._path}/snapshots", body)
        return answer

    async def restore(self, snapshot: str) -> None:
        """Make the disk what it was: stops the tenant, and starts it again if it ran."""
        await self._http.json("POST", f"{self._path}/snapshots/{snapshot}/restore")

    async def delete_snapshot(self, snapshot: str) -> None:
        await self._http.json("DELETE", f"{self._path}/snapshots/{snapshot}")

    # --- history --------------------------------------------------------------------------------------

    async def begin_turn(self, title: str = "", agent: str | None = None) -> Mapping[str, Any] | None:
        """Begin a turn of this tool session; `title` is what the agent was asked, `agent` its name.

        Return the turn before, which ends, where it changed anything.
        """
        asked = {"title": title} if agent is None else {"title": title, "agent": agent}
        found: Mapping[str, Any] | None = (await self.request("turn/begin", asked))["before"]
        return found

    async def end_turn(self) -> Mapping[str, Any] | None:
        """End this tool session's turn; return it as recorded, None if nothing changed."""
        found: Mapping[str, Any] | None = (await self.request("turn/end"))["turn"]
        return found

    async def history(self, limit: int = 50, *, before: str | None = None) -> list[Mapping[str, Any]]:
        """Return the turns of the tenant, latest first; `before` is the id of one, for those before it."""
        asked: dict[str, Any] = {"limit": limit}
        if before is not None:
            asked["before"] = before
        return list((await self.request("history/list", asked))["turns"])

    async def turn(self, turn: str) -> Mapping[str, Any]:
        """Return a turn with the files that it `changed` and its `diff`."""
        found: Mapping[str, Any] = await self.request("history/diff", {"turn": turn})
        return found

    async def restore_turn(
        self, turn: str, to: Literal["after", "before"] = "after"
    ) -> Mapping[str, Any] | None:
        """Make the files what they were right after a turn, or before it; return that as a turn of its own.

        None if they are so already. Raises `Conflict` if something that is not recorded is in the way.
        """
        asked = {"turn": turn, "to": to}
        found: Mapping[str, Any] | None = (await self.request("history/restore", asked))["turn"]
        return found

    async def undo(self) -> Mapping[str, Any] | None:
        """Take back the last turn; return that as a turn of its own, None if there is none."""
        last = await self.history(1)
        return await self.restore_turn(last[0]["turn"], "before") if last else None

    # --- its site's log -------------------------------------------------------------------------------

    async def logs(self, lines: int = 100, follow: bool = False) -> AsyncIterator[bytes]:
        """Yield the last lines of the site's log in pieces, and with `follow` what comes, until left."""
        path = f"{self._path}/logs?lines={lines}&follow={int(follow)}"
        async with contextlib.aclosing(self._http.stream(path)) as pieces:
            async for piece in pieces:
                yield piece

    async def delete(self) -> None:
        """Destroy the tenant and everything of it."""
        await self._http.json("DELETE", self._path)

    # --- connections ----------------------------------------------------------------------------------

    async def close(self) -> None:
        """End all connections to this tenant; the client does it too.

        Ends what Bash runs in the background, unless the tool session has a name of yours; other commands
        are left to their linger.
        """
        await self._connections.close()


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _command(command: str | Sequence[str], cwd: str | None, env: Mapping[str, str] | None) -> dict[str, Any]:
    body: dict[str, Any] = {"command": command} if isinstance(command, str) else {"argv": list(command)}
    if cwd is not None:
        body["cwd"] = cwd
    if env:
        body["env"] = dict(env)
    return body
