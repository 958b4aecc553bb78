"""A tool's answer: content blocks, an error flag, and the same facts as data.

A worker encodes the answer once, and the gateway splices the bytes into its reply. The part that the gateway
needs comes first: a u32 length (big-endian), then a JSON object with `is_error`, `code` and `seen`.
"""

from __future__ import annotations

import binascii
import struct
from dataclasses import dataclass, field
from typing import Any

import orjson

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
class Answer:
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


def text(words: str, structured: dict[str, Any] | None = None, *, seen: Seen | None = None) -> Answer:
    return Answer([{"type": "text", "text": words}], structured or {}, seen=seen)


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

    def answer(self) -> Answer:
        return Answer(
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
