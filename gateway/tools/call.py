"""A tool's answer: content blocks, an error flag, and the same facts as data.

A worker encodes the answer once, and the gateway splices the bytes into its reply. The part that the gateway
needs comes first: a u32 length (big-endian), then a JSON object with `is_error`, `code` and `seen`.
"""

from __future__ import annotations

import binascii
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import orjson

from gateway.errors import GatewayError, InvalidParams, TooLarge
from gateway.rootfs.paths import show
from gateway.rootfs.root import NO_SPACE, etag, read_all
from gateway.rootfs.worker import Workspace

_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Seen:
    """The state in which a session last saw a file.

    `etag` as in `rootfs.root`, `checksum` the CRC-32 of its bytes (it only spares needless "modified since
    read" answers after a touch), `whole` whether the session has seen all of it.
    """

    etag: str
    checksum: int
    whole: bool

    def wire(self) -> list[Any]:
        return [self.etag, self.checksum, self.whole]


@dataclass(frozen=True, slots=True)
class ToolAnswer:
    """A finished tool result. `code` is a wire code if the tool failed; `seen` updates the session."""

    content: list[dict[str, Any]]
    structured: dict[str, Any] = field(default_factory=dict)
    is_error: bool = False
    code: str | None = None
    seen: Seen | None = None

    def encode(self) -> bytes:
        """Return the worker's reply: what the gateway needs, then the MCP tool result."""
        head = orjson.dumps(
            {"is_error": self.is_error, "code": self.code, "seen": self.seen.wire() if self.seen else None}
        )
        body = orjson.dumps(
            {"content": self.content, "isError": self.is_error, "structuredContent": self.structured}
        )
        return b"".join((_LENGTH.pack(len(head)), head, body))


def decode(reply: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a worker's reply into its head and the encoded result."""
    (length,) = _LENGTH.unpack_from(reply)
    head: dict[str, Any] = orjson.loads(reply[4 : 4 + length])
    return head, reply[4 + length :]


def text(words: str, structured: dict[str, Any] | None = None, *, seen: Seen | None = None) -> ToolAnswer:
    return ToolAnswer([{"type": "text", "text": words}], structured or {}, seen=seen)


class ToolFailure(Exception):
    """The tool itself refused or failed; `words` are for the model.

    `tagged` adds the tag that Claude Code puts around errors caused by the model. Where it does so is an
    accident of that program, kept because models are used to it.
    """

    def __init__(self, code: str, words: str, *, tagged: bool = True, **facts: Any) -> None:
        super().__init__(words)
        self.code = code
        self.words = f"<tool_use_error>{words}</tool_use_error>" if tagged else words
        self.facts = facts

    def answer(self) -> ToolAnswer:
        return ToolAnswer(
            [{"type": "text", "text": self.words}], {"code": self.code, **self.facts}, True, self.code
        )


def base64(data: bytes) -> str:
    """Encode bytes for a content block."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def size_words(size: int) -> str:
    """Return a size as Claude Code writes it: 256KB, 574.2KB."""
    for unit, factor in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.1f}".removesuffix(".0") + unit
    return f"{size} bytes"


_NAMES_MAX = 5000  # names in a folder that are compared for a "Did you mean"


class Call:
    """One call. `cwd` is absolute inside the tenant, `seen` what the session has seen of the named file.

    A `brief` call blocks others, so it ends with `Timeout` if it would take long. `named` are the names that
    `gateway.tools.grep` found, in Latin-1 (a character for each byte), each followed by a NUL.
    """

    def __init__(
        self,
        tool: str,
        workspace: Workspace,
        given: dict[str, Any],
        cwd: str,
        seen: list[Any] | None,
        read_first: bool,
        *,
        brief: bool = False,
        named: str | None = None,
    ) -> None:
        self.tool = tool
        self.root = workspace.root
        self.limits = workspace.limits
        self.brief = brief
        self.named = named
        self.given = given
        self.cwd = cwd
        self.seen = Seen(*seen) if seen else None
        self.read_first = read_first
        self.deadline = time.monotonic() + self.limits.tool_timeout

    def locate(self, path: str) -> str:
        """Return the relative path for a `path` of the input."""
        return self.root.locate(meant(path), self.cwd)

    def absolute(self, path: str) -> str:
        """Return a relative path as text, absolute."""
        return show(self.root.absolute(path))

    def display(self, path: str) -> str:
        """Return a relative path as results list it: relative to the working directory if it is below it."""
        if self.cwd == self.root.workspace:
            return show(path or self.cwd)
        absolute = self.root.absolute(path)
        cwd = self.cwd.rstrip("/") + "/"
        return show(absolute[len(cwd) :] if absolute.startswith(cwd) else absolute)

    def display_all(self, paths: list[str]) -> list[str]:
        """Return each as `display` does."""
        if self.cwd == self.root.workspace and "".join(paths).isprintable():  # the usual case
            return paths
        return [self.display(path) for path in paths]

    @property
    def where(self) -> str:
        return f"Note: your current working directory is {show(self.cwd)}."


@dataclass(frozen=True, slots=True)
class OpenFile:
    """The file that a Read has opened, and its `facts` for the result."""

    call: Call
    descriptor: int
    status: os.stat_result
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, call: Call, path: str, descriptor: int, status: os.stat_result) -> OpenFile:
        facts = {"path": call.absolute(path), "size": status.st_size, "etag": etag(status)}
        return cls(call, descriptor, status, facts)

    def read(self, most: int, kind: str) -> bytes:
        """Return the whole content. Raises `ToolFailure` if it has over `most` bytes."""
        size = self.status.st_size
        if size > most:
            raise failure("Read", TooLarge(f"the {kind} is too large", size=size, limit=most))
        return read_all(self.descriptor, size, most)

    def seen(self, content: bytes, *, whole: bool) -> Seen:
        return Seen(self.facts["etag"], crc32(content), whole)


def meant(path: str) -> str:
    """Return the path of a call's input: stripped of white space; if empty, the working directory."""
    return path.strip() or "."


def failure(tool: str, error: GatewayError) -> ToolFailure:
    """Return the generic failure for an error that the tool has no text for."""
    words = f"Error calling tool ({tool}): {error.message}"
    facts = {key: value for key, value in error.facts.items() if key != "reason" or value == NO_SPACE}
    return ToolFailure(error.code, words, **facts)


def timed_out(seconds: float) -> ToolFailure:
    """Return the failure of a search that did not finish."""
    words = f"Search timed out after {seconds:g} seconds. Try a more specific path or pattern."
    return ToolFailure("timeout", words, tagged=False)


def outside(call: Call, verb: str, path: str, error: GatewayError) -> ToolFailure:
    """Return the failure for a refused path: it leads outside, its links do not resolve, or it is invalid."""
    if error.facts.get("reason") == "too_long":
        absolute = path if path.startswith("/") else f"{call.cwd}/{path}"
        words = f"ENAMETOOLONG: name too long, {'open' if call.tool == 'Read' else 'stat'} '{show(absolute)}'"
        if call.tool in ("Write", "Edit"):
            return ToolFailure(error.code, f"Error calling tool ({call.tool}): {words}")
        return ToolFailure(error.code, words, tagged=False)
    if isinstance(error, InvalidParams):
        return ToolFailure(error.code, f"Error calling tool ({call.tool}): {error.message}")
    if error.facts.get("reason") == "loop":
        why = (
            "where it leads on disk could not be determined (a link on the way could not be examined, "
            "or the links do not resolve)."
        )
    else:
        why = f"it is outside the workspace {call.root.workspace}, which is all that the file tools serve."
    return ToolFailure(error.code, f"Refusing to {verb} {show(path[:1000])}: {why}", tagged=False)


def missing(call: Call, path: str) -> str:
    """Return the text for a missing file, with a guess at what was meant."""
    words = f"File does not exist. {call.where}"
    guess = below_cwd(call, path) or _similar(call, path)
    return f"{words} Did you mean {guess}?" if guess else words


def _similar(call: Call, path: str) -> str | None:
    """Return the name of a file in the same folder that differs in its extension only."""
    folder, _, name = path.rpartition("/")
    stem = name.rpartition(".")[0] or name
    try:
        names = call.root.names(folder, _NAMES_MAX)
    except GatewayError:
        return None
    found = [other for other in names if other != name and (other.rpartition(".")[0] or other) == stem]
    return show(min(found)) if found else None


def below_cwd(call: Call, path: str) -> str | None:
    """Return the file at that path below the working directory, if that part of the path was left out."""
    absolute = call.root.absolute(path)
    above = call.cwd.rpartition("/")[0] + "/"
    if not absolute.startswith(above) or absolute.startswith(call.cwd + "/"):
        return None
    candidate = f"{call.cwd}/{absolute[len(above) :]}"
    try:
        call.root.status(call.locate(candidate))
    except GatewayError:
        return None
    return show(candidate)
