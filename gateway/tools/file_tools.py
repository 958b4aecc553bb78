"""The gateway's side of the file tools: calls a worker, and updates what the session has seen."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import GatewayError, NotFound, Timeout
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.paths import locate
from gateway.rootfs.root import NO_SPACE, Spare, nothing_to_spare
from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from gateway.tools.answer import Answer, Seen, decode
from gateway.tools.call import meant, timed_out
from gateway.tools.schemas import FILE_TOOLS
from gateway.tools.session import ToolSession

_SEARCHES = frozenset({"Glob", "Grep"})
_WRITES = frozenset({"Write", "Edit"})
_CORES = os.cpu_count() or 1
_PROCESSES_MAX = 4  # of one search


@dataclass(frozen=True, slots=True)
class ToolResult:
    """One finished tool call.

    `encoded` is the JSON of `{content, isError, structuredContent}`, which is spliced into a reply unchanged.
    `code` is a wire code if the tool failed.
    """

    encoded: bytes
    is_error: bool
    code: str | None = None

    @classmethod
    def of(cls, answer: Answer) -> ToolResult:
        head, body = decode(answer.encode())
        return cls(body, head["is_error"], head["code"])

    def packed(self) -> bytes:
        """Return the result as one value for storage; `unpacked` reverses it."""
        return orjson.dumps([self.is_error, self.code]) + b"\n" + self.encoded

    @classmethod
    def unpacked(cls, packed: bytes) -> ToolResult:
        head, _, encoded = packed.partition(b"\n")
        is_error, code = orjson.loads(head)
        return cls(encoded, is_error, code)

    def data(self) -> dict[str, Any]:
        """Decode the result, for the few callers that read it."""
        found: dict[str, Any] = orjson.loads(self.encoded)
        return found


class FileTools:
    """Read, Write, Edit, Glob and Grep on a tenant's workspace. None of it runs in the container."""

    def __init__(self, workers: Workers, settings: Settings, spare: Spare = nothing_to_spare) -> None:
        self._workers = workers
        self._settings = settings
        self._spare = spare

    async def call(
        self, root: FilesystemRoot, session: ToolSession, name: str, arguments: object
    ) -> ToolResult:
        """Run one tool. A refusal by the tool itself is a result.

        Raises `NotFound` for an unknown tool, `InvalidParams` for input that is not JSON, and `Unavailable`,
        `RateLimited` or `Timeout` of the worker.
        """
        if name not in FILE_TOOLS:
            raise NotFound(f"no such tool: {str(name)[:100]}")
        session.last_used = time.monotonic()
        cwd = session.cwd or root.workspace
        path = named_file(arguments, cwd, root.workspace)
        seen = session.seen(path) if path is not None else None
        given = {
            "input": arguments,
            "cwd": cwd,
            "seen": seen.wire() if seen else None,
            "read_first": session.read_before_write,
            "brief": name in _SEARCHES,
            "named": None,
        }
        if name in _SEARCHES:
            return await self._search(root, name, given)
        # rendering a document takes long, and must not block other reads
        apart = name == "Read" and (path or "").lower().endswith(".pdf")
        head, body = decode(await self._workers.call(root, name, given, search=apart))
        while head["is_error"] and _had_no_room(name, body) and await self._spare(root.tenant):
            head, body = decode(await self._workers.call(root, name, given))
        if path is not None and head["seen"] is not None:
            session.remember(path, Seen(*head["seen"]))
        return ToolResult(body, head["is_error"], head["code"])

    async def _search(self, root: FilesystemRoot, name: str, given: dict[str, Any]) -> ToolResult:
        # Most searches end quickly, so the worker for single files tries first: it is awake and warm.
        # A longer one goes to a worker where it blocks no other call.
        apart = not self._workers.rests(root.tenant)
        head, body = decode(await self._workers.call(root, name, given, search=apart))
        if head["code"] == "timeout":
            given["brief"] = False
            if name == "Grep":
                try:
                    named = await self._named(root, {"input": given["input"], "cwd": given["cwd"]})
                except Timeout:
                    return ToolResult.of(timed_out(self._settings.tool_timeout).answer())
                given["named"] = None if named is None else named.decode("latin-1")
            head, body = decode(await self._workers.call(root, name, given, search=True))
        return ToolResult(body, head["is_error"], head["code"])

    async def _named(self, root: FilesystemRoot, asked: dict[str, Any]) -> bytes | None:
        """Return the names of the matching files in a large tree; None if one worker must walk it instead."""
        # a core for each process if no other tenant needs one: a second one on two cores left none to
        # the neighbours, the p99 of their reads tripled
        cores = min(_CORES if self._workers.alone(root.tenant) else max(1, _CORES // 2), _PROCESSES_MAX)
        return await self._workers.scan(root, asked, cores)


def _had_no_room(name: str, body: bytes) -> bool:
    """Say whether a tool failed since the disk was full."""
    return name in _WRITES and orjson.loads(body)["structuredContent"].get("reason") == NO_SPACE


def named_file(arguments: object, cwd: str, workspace: str) -> str | None:
    """Return the relative path of the file that a call names, None if it names none in the workspace."""
    given = arguments.get("file_path") if isinstance(arguments, dict) else None
    if not isinstance(given, str):
        return None
    try:
        return locate(meant(given), cwd, workspace)
    except GatewayError:
        return None
