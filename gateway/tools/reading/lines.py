"""Read for text: numbered lines, the whole file or a range."""

from __future__ import annotations

import errno
import os
import time
from typing import Any
from zlib import crc32

from gateway.rootfs.root import etag, read_all
from gateway.tools.answer import Answer, Seen, ToolFailure, text
from gateway.tools.call import Call
from gateway.tools.texts import Text, decode

TOKENS_MAX = 25_000  # tokens of one answer, as in Claude Code
PAGE_SHARE = 0.85  # share of those tokens for the first page of a larger file, to stay clear of the limit
BYTES_PER_TOKEN = 4  # our estimate; the real count needs the model's tokeniser
_CHUNK = 1 << 18
NARROWER = (
    "Use offset and limit parameters to read specific portions of the file, or search for specific content "
    "instead of reading the whole file. To read it anyway, up to what still fits in your context, call Read "
    "again with allow_large: true — only if you genuinely need all of it or the user asked for the whole "
    "file."
)


def near(
    call: Call, path: str, descriptor: int, status: os.stat_result, offset: int, limit: int, most: int
) -> Answer:
    """Answer from a file that was read completely."""
    data = read_all(descriptor, status.st_size, most)
    facts: dict[str, Any] = {"path": call.absolute(path), "size": status.st_size, "etag": etag(status)}
    form = decode(data)
    body = form.text.removesuffix("\r")  # as if it were half of a final CRLF
    lines = body.split("\n")
    total = len(lines)
    first = max(offset - 1, 0)
    if first >= total:
        facts |= {"lines": 0, "totalLines": total}
        seen = Seen(etag(status), crc32(data), False)
        return text(_shorter(offset, total) + _refused_forms(form), facts, seen=seen)
    if not body:
        facts |= {"lines": 0, "totalLines": 0}
        words = "Warning: the file exists but the contents are empty."
        seen = Seen(etag(status), crc32(data), True)
        return text(f"<system-reminder>{words}</system-reminder>", facts, seen=seen)
    facts["totalLines"] = total
    taken = lines[first : first + limit] if limit > 0 else lines[first:] if first else lines
    number = offset if offset >= 0 else 1  # an offset of 0 counts from 0: Claude Code's own quirk
    seen = Seen(etag(status), crc32(data), len(taken) == total)
    shown = "\n".join([f"{i}\t{line}" for i, line in enumerate(taken, number)])
    if "\r" in shown:
        shown = _bare(shown)
    tokens = _tokens(taken) if len(shown) > TOKENS_MAX * BYTES_PER_TOKEN else 0
    if tokens > TOKENS_MAX and not call.given.get("allow_large"):
        if limit > 0 or first:
            raise _too_many_tokens(tokens)
        shown, count = _first_page(call, path, taken, tokens)
        taken = taken[:count]
        # a cut file counts as not read
        return text(shown + _refused_forms(form), {**facts, "startLine": 1, "lines": count})
    facts |= {"startLine": number, "lines": len(taken)}
    return text(shown + _refused_forms(form), facts, seen=seen)


def _tokens(lines: list[str]) -> int:
    return (sum(map(len, lines)) + len(lines) - 1) // BYTES_PER_TOKEN


def _bare(shown: str) -> str:
    """Remove the carriage return at the end of each line."""
    return shown.replace("\r\n", "\n").removesuffix("\r")


def _shorter(offset: int, total: int) -> str:
    words = (
        f"Warning: the file exists but is shorter than the provided offset ({offset}). "
        f"The file has {total} lines."
    )
    return f"<system-reminder>{words}</system-reminder>"


def _refused_forms(form: Text) -> str:
    """Return the note for a file that Edit and Write refuse; empty for others."""
    flaw = form.flaw
    if not flaw:
        return ""
    seen_as = "" if form.has_nul or form.mark else " Its undecodable bytes show above as U+FFFD."
    return (
        f"\n\n[This {flaw[0].lower()}{flaw[1:]}.{seen_as} Edit and Write will refuse it: change it with a "
        "shell command that keeps its encoding, or ask the user whether to convert it to UTF-8.]"
    )


def _first_page(call: Call, path: str, lines: list[str], tokens: int) -> tuple[str, int]:
    """Return a first page of whole lines that fits, with a note, and the number of lines.

    If the first line alone is too long, its beginning is shown.
    """
    share = TOKENS_MAX / tokens * PAGE_SHARE
    count = int(len(lines) * share)
    page = lines[:count]
    if not count or _tokens(page) > TOKENS_MAX:
        count, page = 1, [lines[0][: int(TOKENS_MAX * BYTES_PER_TOKEN * PAGE_SHARE)]]
    note = (
        f"[Truncated: PARTIAL view — {call.absolute(path)}: showing lines 1-{count} of {len(lines)} total "
        f"({tokens} tokens, cap {TOKENS_MAX}). Call Read with offset={count + 1} limit={count} for the next "
        "page, or Grep to find a specific section.]"
    )
    shown = _bare("\n".join([f"{number}\t{line}" for number, line in enumerate(page, 1)]))
    return f"{shown}\n\n<system-reminder>{note}</system-reminder>", count


def _too_many_tokens(tokens: int) -> ToolFailure:
    return ToolFailure(
        "too_large",
        f"File content ({tokens} tokens) exceeds maximum allowed tokens ({TOKENS_MAX}). {NARROWER}",
        tagged=False,
        tokens=tokens,
        limit=TOKENS_MAX,
    )


def far(call: Call, path: str, descriptor: int, status: os.stat_result, offset: int, limit: int) -> Answer:
    """Answer a range of a file that is too large to be read whole.

    Lines before the range are only counted. Holes of a sparse file contain none and are skipped.
    """
    line = 1  # the number of the line at `position`
    position = 0
    while line < offset:
        if time.monotonic() > call.deadline:
            raise ToolFailure("timeout", f"Reading up to line {offset} took too long.")
        position = _data_from(descriptor, position)
        chunk = os.pread(descriptor, _CHUNK, position)
        if not chunk:
            facts = {"path": call.absolute(path), "size": status.st_size, "etag": etag(status), "lines": 0}
            facts["totalLines"] = line
            return text(_shorter(offset, line), facts, seen=Seen(etag(status), 0, False))
        count = chunk.count(b"\n")
        if line + count < offset:
            line += count
            position += len(chunk)
            continue
        at = -1
        for _ in range(offset - line):
            at = chunk.index(b"\n", at + 1)
        position += at + 1
        line = offset
    room = call.limits.result_max
    rows: list[bytes] = []
    carry = b""
    ended = False
    while (limit <= 0 or len(rows) < limit) and not ended:
        chunk = os.pread(descriptor, _CHUNK, position)
        position += len(chunk)
        ended = not chunk
        parts = (carry + chunk).split(b"\n")
        carry = b"" if ended else parts.pop()
        rows += parts
        if sum(map(len, parts)) + len(carry) > room:
            raise _too_many_tokens((call.limits.result_max + len(chunk)) // BYTES_PER_TOKEN)
        room -= sum(map(len, parts))
    if limit > 0:
        rows = rows[:limit]
    form = decode(b"\n".join(rows))
    lines = form.text.split("\n")
    number = offset if offset >= 0 else 1
    shown = _bare("\n".join(f"{i}\t{line}" for i, line in enumerate(lines, number)))
    tokens = _tokens(lines)
    if tokens > TOKENS_MAX and not call.given.get("allow_large"):
        raise _too_many_tokens(tokens)
    facts = {
        "path": call.absolute(path),
        "size": status.st_size,
        "etag": etag(status),
        "startLine": number,
        "lines": len(rows),
        "totalLines": None,
    }
    return text(shown, facts, seen=Seen(etag(status), 0, False))


def _data_from(descriptor: int, position: int) -> int:
    """Return the next position at or after `position` that is not a hole."""
    try:
        return os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # only a hole is left
            return os.fstat(descriptor).st_size
        return position
