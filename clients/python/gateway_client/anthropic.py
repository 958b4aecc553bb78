"""The Messages API's own client in a tenant: tools for its `tool_runner`.

    shop = client.tenant("shop")
    async with anthropic.bash(shop) as bash:
        runner = AsyncAnthropic().beta.messages.tool_runner(
            model=…, max_tokens=…, messages=…, tools=[anthropic.text_editor(shop), bash], thread=False
        )
        answer = await runner.until_done()

`tools` are the gateway's eight, `text_editor` and `bash` the API's own `text_editor_20250728` and
`bash_20250124`, which a model knows without a description. Needs the extra `anthropic`. Without
`thread=False` that package keeps the conversation in the API's threads.
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from gateway_client.errors import Conflict, GatewayError, NotFound
from gateway_client.execution import Exec
from gateway_client.extras import needed
from gateway_client.results import ToolResult
from gateway_client.tenant import Tenant

with needed("anthropic"):
    from anthropic.lib.tools import BetaAsyncBuiltinFunctionTool, ToolError

__all__ = ["Bash", "TextEditor", "Tool", "bash", "text_editor", "tools"]

TIMEOUT: Final = 120.0
# characters of a bash result; of a longer one both ends are shown
OUTPUT_MAX: Final = 30_000
# bytes of a command's output that are kept; beyond that the middle is dropped as it arrives
KEPT: Final = 1 << 20
CONTEXT: Final = 4  # lines shown around an edit


async def tools(tenant: Tenant) -> list[Tool]:
    """Return the tenant's eight tools, with the descriptions that the gateway gives them."""
    return [Tool(tenant, described) for described in await tenant.tools()]


def text_editor(tenant: Tenant, *, max_characters: int | None = None) -> TextEditor:
    """Return the API's `text_editor_20250728` on the tenant's files.

    `max_characters` limits what `view` shows of a file, like the API's parameter of that name.
    """
    return TextEditor(tenant, max_characters)


def bash(tenant: Tenant, *, timeout: float = TIMEOUT) -> Bash:
    """Return the API's `bash_20250124`: one shell that keeps its state between calls. `async with` ends it.

    A command that takes longer than `timeout` seconds is ended with its shell and all that it started.
    """
    return Bash(tenant, timeout)


class Tool(BetaAsyncBuiltinFunctionTool):
    """One of the gateway's tools."""

    def __init__(self, tenant: Tenant, described: Mapping[str, Any]) -> None:
        self._tenant, self._described = tenant, described

    def to_dict(self) -> Any:
        return {
            "name": self._described["name"],
            "description": self._described["description"],
            "input_schema": self._described["inputSchema"],
        }

    async def call(self, input: Any) -> Any:
        try:
            result = await self._tenant.tool(self._described["name"], input)
        except GatewayError as error:
            raise ToolError(error.message) from None
        if result.is_error:
            raise ToolError(_blocks(result))
        return _blocks(result)


def _blocks(result: ToolResult) -> list[Any]:
    """Convert a result's content to the API's form."""
    found: list[Any] = []
    for part in result.content:
        match part["type"]:
            case "image":
                source = {"type": "base64", "media_type": part["mimeType"], "data": part["data"]}
                found.append({"type": "image", "source": source})
            case "resource":  # a whole PDF, from a gateway without a renderer
                file = part["resource"]
                source = {"type": "base64", "media_type": file["mimeType"], "data": file["blob"]}
                found.append({"type": "document", "source": source})
            case _:
                found.append({"type": "text", "text": part["text"]})
    return found


# --- files --------------------------------------------------------------------------------------------


class TextEditor(BetaAsyncBuiltinFunctionTool):
    """`view`, `create`, `str_replace` and `insert`, exact to the character; see `text_editor`."""

    def __init__(self, tenant: Tenant, max_characters: int | None) -> None:
        self._files, self._max_characters = tenant.files, max_characters

    def to_dict(self) -> Any:
        described: dict[str, Any] = {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"}
        if self._max_characters is not None:
            described["max_characters"] = self._max_characters
        return described

    async def call(self, input: Any) -> Any:
        path = input.get("path")
        if not isinstance(path, str) or not path:
            raise ToolError("Parameter `path` is required")
        try:
            match input.get("command"):
                case "view":
                    return await self._view(path, input.get("view_range"))
                case "create":
                    await self._files.write(path, _text(input, "file_text"), create_dirs=True)
                    return f"File created successfully at: {path}"
                case "str_replace":
                    return await self._replace(path, _text(input, "old_str"), input.get("new_str") or "")
                case "insert":
                    return await self._insert(path, input.get("insert_line"), _text(input, "insert_text"))
                case other:
                    known = "view, create, str_replace, insert"
                    raise ToolError(f"Unrecognized command {other}. The allowed commands are: {known}")
        except NotFound as error:
            words = f"The path {path} does not exist. Please provide a valid path. ({error.message})"
            raise ToolError(words) from None
        except Conflict:
            raise ToolError(f"{path} has been changed by others: view it and try again.") from None
        except GatewayError as error:
            raise ToolError(error.message) from None

    async def _view(self, path: str, view_range: Any) -> str:
        if (await self._files.stat(path)).type == "directory":
            if view_range is not None:
                raise ToolError("`view_range` is not allowed when `path` points to a directory.")
            return await self._listed(path)
        lines = (await self._read(path))[0].split("\n")
        first, last = _range(view_range, len(lines))
        shown = "\n".join(f"{number:6}\t{lines[number - 1]}" for number in range(first, last + 1))
        if self._max_characters is not None and len(shown) > self._max_characters:
            shown = shown[: self._max_characters] + "\n... [truncated: use view_range]"
        return f"Here's the result of running `cat -n` on {path}:\n{shown}\n"

    async def _listed(self, path: str) -> str:
        base = (await self._files.stat(path)).path
        entries, truncated = await self._files.list(path, depth=2)
        lines = [path]
        for entry in entries:
            inner = entry.path if base == "." else entry.path.removeprefix(f"{base}/")
            if not any(part.startswith(".") or part == "node_modules" for part in inner.split("/")):
                lines.append(f"{path.rstrip('/')}/{inner}{'/' * (entry.type == 'directory')}")
        if truncated:
            lines.append("... (there are more)")
        head = (
            f"Here're the files and directories up to 2 levels deep in {path}, "
            "excluding hidden items and node_modules:\n"
        )
        return head + "\n".join(lines) + "\n"

    async def _replace(self, path: str, old: str, new: str) -> str:
        text, etag = await self._read(path)
        found = text.count(old) if old else 0
        if found == 0:
            words = f"No replacement was performed, old_str `{old}` did not appear verbatim in {path}."
            raise ToolError(words)
        if found > 1:
            starts, place = list[int](), -1
            while len(starts) < found and (place := text.find(old, place + 1)) >= 0:
                starts.append(text.count("\n", 0, place) + 1)
            raise ToolError(
                f"No replacement was performed. Multiple occurrences of old_str `{old}` in lines {starts}. "
                "Please ensure it is unique"
            )
        before, _, after = text.partition(old)
        await self._files.write(path, before + new + after, if_match=etag)
        return _edited(path, before + new + after, before.count("\n"), new.count("\n"))

    async def _insert(self, path: str, line: Any, inserted: str) -> str:
        text, etag = await self._read(path)
        lines = text.split("\n")
        most = len(lines) - text.endswith("\n")
        if not isinstance(line, int) or not 0 <= line <= most:
            raise ToolError(
                f"Invalid `insert_line` parameter: {line}. It should be within the range of lines of the "
                f"file: {[0, most]}"
            )
        given = inserted.removesuffix("\n").split("\n")
        whole = "\n".join([*lines[:line], *given, *lines[line:]])
        await self._files.write(path, whole, if_match=etag)
        return _edited(path, whole, line, len(given) - 1)

    async def _read(self, path: str) -> tuple[str, str]:
        content = await self._files.read(path)
        try:
            return content.text, content.etag
        except UnicodeDecodeError:
            raise ToolError(f"{path} is not a text file") from None


def _text(input: Mapping[str, Any], name: str) -> str:
    value = input.get(name)
    if not isinstance(value, str):
        raise ToolError(f"Parameter `{name}` is required for command: {input.get('command')}")
    return value


def _range(view_range: Any, lines: int) -> tuple[int, int]:
    if view_range is None:
        return 1, lines
    numbers = isinstance(view_range, Sequence) and all(isinstance(number, int) for number in view_range)
    if not numbers or len(view_range) != 2:
        raise ToolError("Invalid `view_range`. It should be a list of two integers.")
    first, last = view_range
    if not 1 <= first <= lines:
        raise ToolError(
            f"Invalid `view_range`: {list(view_range)}. Its first element `{first}` should be within the "
            f"range of lines of the file: {[1, lines]}"
        )
    if last != -1 and last < first:
        raise ToolError(
            f"Invalid `view_range`: {list(view_range)}. Its second element `{last}` should be larger or "
            f"equal than its first `{first}`"
        )
    return first, lines if last == -1 else min(last, lines)


def _edited(path: str, text: str, line: int, more: int) -> str:
    """Show the lines around an edit; `line` counts from 0."""
    lines = text.split("\n")
    start, end = max(0, line - CONTEXT), min(len(lines), line + more + CONTEXT + 1)
    shown = "\n".join(f"{number + 1:6}\t{lines[number]}" for number in range(start, end))
    return (
        f"The file {path} has been edited. Here's the result of running `cat -n` on a snippet of {path}:\n"
        f"{shown}\nReview the changes and make sure they are as expected. Edit the file again if necessary."
    )


# --- a shell ------------------------------------------------------------------------------------------


class Bash(BetaAsyncBuiltinFunctionTool):
    """A shell that keeps its variables and working directory between calls; see `bash`."""

    def __init__(self, tenant: Tenant, timeout: float) -> None:
        self._tenant, self._timeout = tenant, timeout
        self._shell: Exec | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Bash:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the shell and all that it started. The next call starts another."""
        shell, self._shell = self._shell, None
        if shell is not None:
            await shell.__aexit__(None, None, None)

    def to_dict(self) -> Any:
        return {"type": "bash_20250124", "name": "bash"}

    async def call(self, input: Any) -> Any:
        async with self._turn:
            if input.get("restart"):
                await self.close()
                return "tool has been restarted."
            command = input.get("command")
            if not isinstance(command, str):
                raise ToolError("no command provided.")
            try:
                return await self._run(command)
            except GatewayError as error:
                await self.close()
                raise ToolError(error.message) from None
            except BaseException as error:
                await self.close()  # given up: end everything of it
                if isinstance(error, TimeoutError):
                    raise ToolError(
                        f"timed out: bash has not returned in {self._timeout:g} seconds and was ended with "
                        "all that it started. The next command runs in a new shell."
                    ) from None
                raise

    async def _run(self, command: str) -> str:
        async with asyncio.timeout(self._timeout):
            if self._shell is None:
                self._shell = await self._tenant.exec(["/bin/bash"], stdin=True).__aenter__()
                await self._shell.write(b"exec 2>&1\n")
            # its output cannot end a call: the mark is not known before the command ends
            mark = secrets.token_hex(16)
            line = f"eval {shlex.quote(command)} </dev/null\nprintf '\\n%s %d\\n' {mark} $?\n"
            await self._shell.write(line.encode())
            output, status = await self._until(mark.encode())
            if status is not None:
                return f"{output}\n(exit code {status})".lstrip("\n") if status else output
            ended = await self._shell.wait()
            await self.close()
            note = f"(the shell ended with exit code {ended.code}; the next command runs in a new one)"
            return f"{output}\n{note}"

    async def _until(self, mark: bytes) -> tuple[str, int | None]:
        """Return the output before the mark, and the number after it; None if the shell ended."""
        assert self._shell is not None
        data, dropped, searched = bytearray(), 0, 0
        async for chunk in self._shell.stdout:
            data += chunk
            place = data.find(b"\n" + mark, searched)
            if place >= 0 and (end := data.find(b"\n", place + 1)) >= 0:
                return _shown(bytes(data[:place]), dropped), int(data[place + 1 : end].split()[1])
            searched = max(0, len(data) - len(mark) - 1)
            if place >= 0:
                searched = place
            elif len(data) > 2 * KEPT:
                dropped += len(data) - KEPT
                del data[KEPT // 2 : len(data) - KEPT // 2]
                searched = max(0, len(data) - len(mark) - 1)
        return _shown(bytes(data), dropped), None


def _shown(data: bytes, dropped: int) -> str:
    text = data.decode("utf-8", "replace").rstrip()
    if len(text) <= OUTPUT_MAX and not dropped:
        return text
    half = OUTPUT_MAX // 2
    cut = len(text) + dropped - 2 * half
    return f"{text[:half]}\n\n... [{cut} characters truncated] ...\n\n{text[-half:]}"
