"""The tools of one tenant, in one tool session."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Literal

from gateway_client.connections import Connections
from gateway_client.results import ShellResult, ToolResult, failure
from gateway_client.retry import State
from gateway_client.tenant_turns import TenantTurns


class ToolSession(TenantTurns):
    """The tools of a tenant. The files read, and Bash's folder, are remembered from call to call.

    All calls share one websocket, which is opened on the first call.
    """

    def __init__(self, connections: Connections, linger: float | None) -> None:
        self._connections = connections
        self._linger = linger

    @property
    def state(self) -> State:
        """Whether there is a connection to this tenant: `idle` if none was needed yet, or none is kept."""
        return self._connections.state

    async def request(self, method: str, params: Mapping[str, Any] | None = None) -> Any:
        """Call a method of `gateway.v1` and return its result. Raises the typed error of the answer.

        If the connection breaks, a request that may be sent twice is sent again.
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
        """Call a tool by its name. A failure of the tool itself is a result with `is_error`.

        A call with a `call_id` runs exactly once: a second call with the same id returns the same result. By
        default it gets a new id, so that a broken connection does not run it twice. Cancelling the task
        cancels the call and all that it runs. If this process is killed, or its connection stays broken, the
        call ends `linger` seconds later (by default the tenant's `linger`, or half a minute).
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
        """Replace `old` by `new`. `old` must occur exactly once, unless `replace_all`."""
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
        """Run a command line in this session's working directory; any exit code is a result.

        After `timeout` seconds (default 120, at most 600) it continues in the background: `status` is
        `running` then, and `bash_output` follows it.
        """
        return await self._shell(
            "Bash",
            command=command,
            timeout=None if timeout is None else round(timeout * 1000),
            run_in_background=background or None,
            description=description,
        )

    async def bash_output(self, shell_id: str, *, filter: str | None = None) -> ShellResult:
        """Return the output of a background command since the last call, and its end."""
        return await self._shell("BashOutput", bash_id=shell_id, filter=filter)

    async def kill_shell(self, shell_id: str) -> ToolResult:
        """End a background command and all that it started."""
        return await self._tool("KillShell", shell_id=shell_id)

    async def _shell(self, name: str, /, **arguments: Any) -> ShellResult:
        result = await self.tool(name, _given(arguments))
        if result.is_error and not {"exec", "status"} <= result.structured.keys():  # nothing ran
            raise failure(result)
        return ShellResult(result.content, result.is_error, result.structured)

    async def _tool(self, name: str, /, **arguments: Any) -> ToolResult:
        result = await self.tool(name, _given(arguments))
        if result.is_error:
            raise failure(result)
        return result


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}
