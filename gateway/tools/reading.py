"""Claude Code's Read: numbered text, notebooks (nbformat 4), images and PDFs; texts of version 2.1.331."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

import orjson

from gateway.errors import GatewayError, TooLarge
from gateway.rootfs.paths import show
from gateway.rootfs.root import read_all
from gateway.tools.call import (
    Call,
    OpenFile,
    Seen,
    ToolAnswer,
    ToolFailure,
    failure,
    missing,
    outside,
    size_words,
    text,
)
from gateway.tools.media import image, page_range, pdf
from gateway.tools.texts import FileText, decode

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
OUTPUTS_MAX = 10_000  # characters of the outputs of one notebook cell, as in Claude Code
_NOTHING = "(Read completed with no output)"
_IMAGES = {"png", "jpg", "jpeg", "gif", "webp"}
# What Claude Code refuses by name, without reading the content.
# fmt: off
_BINARY = frozenset(
    {
        "3ds", "7z", "a", "aac", "ai", "aiff", "apk", "app", "avi", "avif", "bin", "blend", "bmp", "bz2",
        "class", "dat", "data", "db", "deb", "dll", "dmg", "doc", "docm", "docx", "dotm", "dotx", "dylib",
        "ear", "eot", "eps", "epub", "exe", "feather", "fig", "fla", "flac", "flv", "gz", "heic", "heif",
        "ico", "idx", "iso", "jar", "lib", "lockb", "lz4", "m4a", "m4v", "max", "mdb", "mkv", "mov", "mp3",
        "mp4", "mpeg", "mpg", "msi", "node", "npy", "npz", "numbers", "o", "obj", "odp", "ods", "odt", "ogg",
        "opus", "otf", "parquet", "pickle", "potm", "potx", "ppsm", "ppsx", "ppt", "pptm", "pptx", "psd",
        "pyc", "pyo", "rar", "rlib", "rpm", "sketch", "so", "sqlite", "sqlite3", "swf", "tar", "tgz", "tif",
        "tiff", "ttf", "war", "wasm", "wav", "webm", "whl", "wma", "wmv", "woff", "woff2", "xd", "xls",
        "xlsb", "xlsm", "xlsx", "xltm", "xltx", "xz", "z", "zip", "zst",
    }
)
# fmt: on


def read(call: Call) -> ToolAnswer:
    """Answer a Read, by the extension of the name."""
    given: str = call.given["file_path"]
    if given.startswith(("/dev/", "/proc/")):
        raise ToolFailure(
            "not_a_file",
            f"Cannot read '{show(given[:1000])}': this path names a device or process file that this tool "
            "does not read.",
        )
    wanted = call.given.get("pages")
    pages = page_range(wanted, call.limits.pdf_pages) if wanted else None
    try:
        path = call.locate(given)
    except GatewayError as error:
        raise outside(call, "read", given, error) from None
    name = path.rpartition("/")[2]
    stem, dot, extension = name.rpartition(".")
    extension = extension.lower() if dot else ""
    if extension in _BINARY:
        shown = f".{extension}" if stem else ""  # ".dat" has no extension, in Claude Code's text too
        raise ToolFailure(
            "binary_file",
            f"This tool cannot read binary files. The file appears to be a binary {shown} file. "
            "Use a skill for this file type if one is available, or a shell command or script that can read "
            "the format.",
        )
    try:
        descriptor, status = call.root.open_file(path)
    except GatewayError as error:
        raise _refused(call, given, path, error) from None
    try:
        return _answer(OpenFile.of(call, path, descriptor, status), extension, pages)
    finally:
        os.close(descriptor)


def _answer(file: OpenFile, extension: str, pages: tuple[int, int] | None) -> ToolAnswer:
    if extension in _IMAGES:
        return image(file)
    if extension == "pdf":
        return pdf(file, pages)
    if extension == "ipynb":
        return _notebook(file)
    call, size = file.call, file.status.st_size
    offset = call.given.get("offset", 1)
    limit = call.given.get("limit", 0)
    most = call.limits.result_max if call.given.get("allow_large") else call.limits.read_max
    if size <= most:
        return _whole(file, offset, limit, most)
    if limit > 0:
        return _range(file, offset, limit)
    raise ToolFailure(
        "too_large",
        f"File content ({size_words(size)}) exceeds maximum allowed size ({size_words(most)}). {NARROWER}",
        tagged=False,
        size=size,
        limit=most,
    )


def _refused(call: Call, given: str, path: str, error: GatewayError) -> ToolFailure:
    absolute = call.absolute(path)
    match error.facts.get("reason"):
        case "missing":
            return ToolFailure("not_found", missing(call, path), tagged=False)
        case "directory":
            words = f"EISDIR: illegal operation on a directory, read '{absolute}'"
            return ToolFailure("is_a_directory", words, tagged=False)
        case "through_file":
            words = f"ENOTDIR: not a directory, open '{absolute}'"
            return ToolFailure("not_a_file", words, tagged=False)
        case "special":
            words = f"Cannot read '{show(given)}': this is a FIFO, socket or device, not a regular file."
            return ToolFailure("not_a_file", words)
        case "outside" | "loop":
            return outside(call, "read", given, error)
        case "denied":
            words = f"EACCES: permission denied, open '{absolute}'"
            return ToolFailure("forbidden", words, tagged=False)
        case _:
            return failure("Read", error)


def _whole(file: OpenFile, offset: int, limit: int, most: int) -> ToolAnswer:
    """Answer from a text file that is read completely."""
    data = read_all(file.descriptor, file.status.st_size, most)
    facts: dict[str, Any] = dict(file.facts)
    form = decode(data)
    body = form.text.removesuffix("\r")  # as if it were half of a final CRLF
    lines = body.split("\n")
    total = len(lines)
    first = max(offset - 1, 0)
    if first >= total:
        facts |= {"lines": 0, "totalLines": total}
        return text(_shorter(offset, total) + _refused_forms(form), facts, seen=file.seen(data, whole=False))
    if not body:
        facts |= {"lines": 0, "totalLines": 0}
        words = "Warning: the file exists but the contents are empty."
        return text(_reminder(words), facts, seen=file.seen(data, whole=True))
    facts["totalLines"] = total
    taken = lines[first : first + limit] if limit > 0 else lines[first:] if first else lines
    number = offset if offset >= 0 else 1  # an offset of 0 counts from 0: Claude Code's own quirk
    shown = "\n".join([f"{i}\t{line}" for i, line in enumerate(taken, number)])
    if "\r" in shown:
        shown = _bare(shown)
    tokens = _tokens(taken) if len(shown) > TOKENS_MAX * BYTES_PER_TOKEN else 0
    if tokens > TOKENS_MAX and not file.call.given.get("allow_large"):
        if limit > 0 or first:
            raise _too_many_tokens(tokens)
        shown, count = _first_page(file.facts["path"], taken, tokens)
        taken = taken[:count]
        # a cut file counts as not read
        return text(shown + _refused_forms(form), {**facts, "startLine": 1, "lines": count})
    facts |= {"startLine": number, "lines": len(taken)}
    return text(shown + _refused_forms(form), facts, seen=file.seen(data, whole=len(taken) == total))


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
    return _reminder(words)


def _reminder(words: str) -> str:
    return f"<system-reminder>{words}</system-reminder>"


def _refused_forms(form: FileText) -> str:
    """Return the note for a file that Edit and Write refuse; empty for others."""
    flaw = form.flaw
    if not flaw:
        return ""
    seen_as = "" if form.has_nul or form.mark else " Its undecodable bytes show above as U+FFFD."
    return (
        f"\n\n[This {flaw[0].lower()}{flaw[1:]}.{seen_as} Edit and Write will refuse it: change it with a "
        "shell command that keeps its encoding, or ask the user whether to convert it to UTF-8.]"
    )


def _first_page(path: str, lines: list[str], tokens: int) -> tuple[str, int]:
    """Return a first page of whole lines that fits, with a note, and the number of lines.

    If the first line alone is too long, its beginning is shown.
    """
    share = TOKENS_MAX / tokens * PAGE_SHARE
    count = int(len(lines) * share)
    page = lines[:count]
    if not count or _tokens(page) > TOKENS_MAX:
        count, page = 1, [lines[0][: int(TOKENS_MAX * BYTES_PER_TOKEN * PAGE_SHARE)]]
    note = (
        f"[Truncated: PARTIAL view — {path}: showing lines 1-{count} of {len(lines)} total "
        f"({tokens} tokens, cap {TOKENS_MAX}). Call Read with offset={count + 1} limit={count} for the next "
        "page, or Grep to find a specific section.]"
    )
    shown = _bare("\n".join([f"{number}\t{line}" for number, line in enumerate(page, 1)]))
    return f"{shown}\n\n{_reminder(note)}", count


def _too_many_tokens(tokens: int) -> ToolFailure:
    return ToolFailure(
        "too_large",
        f"File content ({tokens} tokens) exceeds maximum allowed tokens ({TOKENS_MAX}). {NARROWER}",
        tagged=False,
        tokens=tokens,
        limit=TOKENS_MAX,
    )


def _range(file: OpenFile, offset: int, limit: int) -> ToolAnswer:
    """Answer a range of a file that is too large to be read whole.

    Lines before the range are only counted. Holes of a sparse file contain none and are skipped.
    """
    call, descriptor = file.call, file.descriptor
    seen = Seen(file.facts["etag"], 0, False)
    line = 1  # the number of the line at `position`
    position = 0
    while line < offset:
        if time.monotonic() > call.deadline:
            raise ToolFailure("timeout", f"Reading up to line {offset} took too long.")
        position = _data_from(descriptor, position)
        chunk = os.pread(descriptor, _CHUNK, position)
        if not chunk:
            return text(_shorter(offset, line), {**file.facts, "lines": 0, "totalLines": line}, seen=seen)
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
    while len(rows) < limit and not ended:
        chunk = os.pread(descriptor, _CHUNK, position)
        position += len(chunk)
        ended = not chunk
        parts = (carry + chunk).split(b"\n")
        carry = b"" if ended else parts.pop()
        rows += parts
        if sum(map(len, parts)) + len(carry) > room:
            raise _too_many_tokens((call.limits.result_max + len(chunk)) // BYTES_PER_TOKEN)
        room -= sum(map(len, parts))
    rows = rows[:limit]
    form = decode(b"\n".join(rows))
    lines = form.text.split("\n")
    number = offset if offset >= 0 else 1
    shown = _bare("\n".join(f"{i}\t{line}" for i, line in enumerate(lines, number)))
    tokens = _tokens(lines)
    if tokens > TOKENS_MAX and not call.given.get("allow_large"):
        raise _too_many_tokens(tokens)
    facts = {**file.facts, "startLine": number, "lines": len(rows), "totalLines": None}
    return text(shown, facts, seen=seen)


def _data_from(descriptor: int, position: int) -> int:
    """Return the next position at or after `position` that is not a hole."""
    try:
        return os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # only a hole is left
            return os.fstat(descriptor).st_size
        return position


def _notebook(file: OpenFile) -> ToolAnswer:
    """Answer with the cells of a Jupyter notebook (nbformat 4) and their outputs."""
    data = file.read(file.call.limits.write_max, "notebook")
    try:
        notebook = orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        words = (
            "Notebook file is not valid JSON (it may be truncated, corrupted, or still being written): "
            f"JSON Parse error: {error.msg}"
        )
        raise ToolFailure("binary_file", words, tagged=False) from None
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list) or not all(map(_is_cell, cells)):
        words = (
            'Notebook file is not a valid Jupyter notebook (top-level "cells" must be an array of cell '
            'objects, each with a string or string-array "source").'
        )
        raise ToolFailure("binary_file", words, tagged=False)
    blocks = _blocks(cells, _language(notebook))
    size = sum(len(block.get("text", block.get("data", ""))) for block in blocks)
    if size > file.call.limits.result_max:
        raise failure("Read", TooLarge("the notebook's cells are too large", size=size))
    return ToolAnswer(blocks, {**file.facts, "cells": len(cells)}, seen=file.seen(data, whole=True))


def _is_cell(cell: object) -> bool:
    source = cell.get("source") if isinstance(cell, dict) else None
    return isinstance(source, str) or (
        isinstance(source, list) and all(isinstance(one, str) for one in source)
    )


def _language(notebook: dict[str, Any]) -> str:
    found: Any = notebook
    for key in ("metadata", "language_info", "name"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else "python"


def _blocks(cells: list[dict[str, Any]], language: str) -> list[dict[str, Any]]:
    """Return one block for each run of texts and one for each image, in order."""
    blocks: list[dict[str, Any]] = []

    def add(words: str) -> None:
        if blocks and blocks[-1]["type"] == "text":
            blocks[-1]["text"] += "\n" + words
        else:
            blocks.append({"type": "text", "text": words})

    for index, cell in enumerate(cells):
        kind = cell.get("cell_type", "code")
        name = show(str(cell.get("id", f"cell-{index}")))
        tags = ""
        if kind != "code":
            tags += f"<cell_type>{show(str(kind))}</cell_type>"
        elif language != "python":
            tags += f"<language>{show(str(language))}</language>"
        add(f'<cell id="{name}">{tags}{_joined(cell.get("source", ""))}</cell id="{name}">')
        outputs = cell.get("outputs") if kind == "code" else None
        shown = [one for output in outputs for one in _output(output)] if isinstance(outputs, list) else []
        if sum(len(one) for one in shown if isinstance(one, str)) > OUTPUTS_MAX:
            shown = [
                "Outputs are too large to include. Use Bash with: cat <notebook_path> | "
                f"jq '.cells[{index}].outputs'"
            ]
        for one in shown:
            if isinstance(one, str):
                add("\n" + one)
            else:
                blocks.append(one)
    return blocks or [{"type": "text", "text": _NOTHING}]


def _output(output: object) -> list[str | dict[str, Any]]:
    """Return one output of a cell: texts, and images as blocks."""
    if not isinstance(output, dict):
        return []
    match output.get("output_type"):
        case "stream":
            words = _joined(output.get("text", ""))
            return [words] if words else []
        case "error":
            trace = output.get("traceback")
            lines = "\n".join(map(str, trace)) if isinstance(trace, list) else ""
            return [f"{output.get('ename', '')}: {output.get('evalue', '')}\n{lines}"]
        case "execute_result" | "display_data":
            data = output.get("data")
            shown: dict[str, Any] = data if isinstance(data, dict) else {}
            found: list[str | dict[str, Any]] = (
                [_joined(shown["text/plain"])] if "text/plain" in shown else []
            )
            for mime in ("image/png", "image/jpeg"):
                if mime in shown:
                    image = "".join(_joined(shown[mime]).split())
                    found.append({"type": "image", "data": image, "mimeType": mime})
            return found
        case _:
            return []


def _joined(value: object) -> str:
    return "".join(map(str, value)) if isinstance(value, list) else str(value)
