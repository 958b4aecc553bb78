"""Knows Claude Code's Read: numbered text, ranges, images, PDFs, notebooks; texts of version 2.1.331."""

from __future__ import annotations

import binascii
import errno
import os
import re
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any
from zlib import crc32

import orjson

from gateway.errors import GatewayError, TooLarge
from gateway.rootfs.tree import etag, read_all, show
from gateway.tools.answer import Answer, Seen, ToolFailure, text
from gateway.tools.call import Call, failure, outside
from gateway.tools.texts import decode

TOKENS_MAX = 25_000  # of one answer, as in Claude Code
BYTES_PER_TOKEN = 4  # our estimate; the real count needs the model's tokeniser
IMAGE_MAX = 3_750_000  # bytes of an image; the Messages API takes 5 MB of base64
IMAGE_SIDE_MAX = 2000  # pixels; larger ones are scaled down where Pillow is there
PDF_WHOLE_MAX = 10  # pages of a PDF that is shown whole, as in Claude Code
PDF_RESULT_MAX = 10 << 20  # bytes of all pages of one answer; base64 and a frame's limit are above it
_NAMES_MAX = 5000  # names of a folder looked at for a "Did you mean"
_CHUNK = 1 << 18


def _scaler() -> Callable[[bytes, str, int, int], tuple[bytes, str, bool]] | None:
    try:
        from gateway.tools.images import scale
    except ImportError:  # Pillow is an extra
        return None
    return scale


SCALE = _scaler()

pdf: ModuleType | None
try:
    from gateway.tools import pdf
except ImportError:  # an extra
    pdf = None

_PAGES = re.compile(r"(\d{1,6})(-(\d{1,6})?)?", re.ASCII)
_PAGE_MAX = 10**6

_IMAGES = {"png", "jpg", "jpeg", "gif", "webp"}
# What Claude Code refuses by name, without a look at the content.
# fmt: off
_BINARY = frozenset(
    {
        "7z", "a", "aac", "aiff", "apk", "app", "avi", "avif", "bin", "bmp", "bz2", "cab", "class", "com",
        "dat", "data", "db", "deb", "dll", "dmg", "doc", "docx", "dylib", "ear", "eot", "exe", "fla",
        "flac", "flv", "gz", "heic", "ico", "idx", "ipa", "iso", "jar", "lib", "lz", "lz4", "lzma", "m4a",
        "m4v", "mkv", "mov", "mp3", "mp4", "mpeg", "mpg", "msi", "node", "o", "obj", "odp", "ods", "odt",
        "ogg", "ogv", "otf", "pack", "pdb", "pkg", "ppt", "pptx", "psd", "pyc", "pyd", "pyo", "rar", "rlib",
        "rpm", "rtf", "sketch", "so", "sqlite", "sqlite3", "swf", "tar", "tgz", "tif", "tiff", "ttf", "war",
        "wasm", "wav", "webm", "wma", "wmv", "woff", "woff2", "xls", "xlsx", "xz", "z", "zip", "zst",
    }
)
# fmt: on


def read(call: Call) -> Answer:
    given: str = call.given["file_path"]
    if given.startswith(("/dev/", "/proc/")):
        raise ToolFailure(
            "not_a_file",
            f"Cannot read '{show(given[:1000])}': this path names a device or process file that this tool "
            "does not read.",
        )
    try:
        path = call.locate(given)
    except GatewayError as error:
        raise outside("Read", "read", given, error, call.tree.workspace) from None
    try:
        descriptor, status = call.tree.open_file(path)
    except GatewayError as error:
        raise _refused(call, given, path, error) from None
    try:
        return _answer(call, path, descriptor, status)
    finally:
        os.close(descriptor)


def _answer(call: Call, path: str, descriptor: int, status: os.stat_result) -> Answer:
    extension = path.rpartition("/")[2].rpartition(".")[2].lower() if "." in path else ""
    if extension in _IMAGES:
        return _image(call, path, descriptor, status)
    if extension == "pdf":
        return _pdf(call, path, descriptor, status)
    if extension in _BINARY:
        raise ToolFailure(
            "binary_file",
            f"This tool cannot read binary files. The file appears to be a binary .{show(extension)} file. "
            "Please use appropriate tools for binary file analysis.",
        )
    if extension == "ipynb":
        return _notebook(call, path, descriptor, status)
    offset = call.given.get("offset", 1)
    limit = call.given.get("limit", 0)
    ranged = offset > 1 or limit > 0
    if status.st_size > call.limits.read_max:
        if not ranged:
            raise ToolFailure(
                "too_large",
                f"File content ({_size(status.st_size)}) exceeds maximum allowed size "
                f"({_size(call.limits.read_max)}). Use offset and limit parameters to read specific portions "
                "of the file, or search for specific content instead of reading the whole file.",
                tagged=False,
                size=status.st_size,
                limit=call.limits.read_max,
            )
        return _far(call, path, descriptor, status, max(offset, 1), limit)
    return _near(call, path, descriptor, status, offset, limit)


def _near(call: Call, path: str, descriptor: int, status: os.stat_result, offset: int, limit: int) -> Answer:
    """Answer from a file that is read whole."""
    data = read_all(descriptor, status.st_size, call.limits.read_max)
    facts: dict[str, Any] = {"path": call.absolute(path), "size": status.st_size, "etag": etag(status)}
    if not data:
        seen = Seen(etag(status), 0, True)
        facts |= {"lines": 0, "totalLines": 0}
        words = "Warning: the file exists but the contents are empty."
        return text(f"<system-reminder>{words}</system-reminder>", facts, seen=seen)
    form = decode(data)
    lines = form.text.split("\n")
    total = len(lines)
    facts["totalLines"] = total
    first = max(offset - 1, 0)
    if first >= total:
        facts["lines"] = 0
        words = (
            f"Warning: the file exists but is shorter than the provided offset ({offset}). "
            f"The file has {total} lines."
        )
        return text(f"<system-reminder>{words}</system-reminder>", facts)
    taken = lines[first : first + limit] if limit > 0 else lines[first:] if first else lines
    number = offset if offset >= 0 else 1  # an offset of 0 counts from 0: Claude Code's own quirk
    whole = len(taken) == total
    shown = "\n".join([f"{i}\t{line}" for i, line in enumerate(taken, number)])
    tokens = len(shown) // BYTES_PER_TOKEN
    if tokens > TOKENS_MAX and not call.given.get("allow_large"):
        if limit > 0 or first:
            raise _too_many_tokens(tokens)
        shown, count = _first_page(call, path, taken, tokens)
        whole = False
        taken = taken[:count]
    if form.has_nul:
        shown += "\n\n[This file has NUL bytes in its first 8 KB; Edit and Write refuse it.]"
    elif not form.valid:
        shown += (
            "\n\n[This file is not valid UTF-8; the bytes that are not are shown as U+FFFD. "
            "Edit and Write refuse it.]"
        )
    facts |= {"startLine": number, "lines": len(taken)}
    return text(shown, facts, seen=Seen(etag(status), crc32(data), whole))


def _first_page(call: Call, path: str, lines: list[str], tokens: int) -> tuple[str, int]:
    """Return as many whole lines as fit, with the note that says so, and how many they are."""
    room = TOKENS_MAX * BYTES_PER_TOKEN
    page: list[str] = []
    for number, line in enumerate(lines, 1):
        row = f"{number}\t{line}"
        room -= len(row) + 1
        if room < 0:
            break
        page.append(row)
    count = len(page)
    if not count:
        raise _too_many_tokens(tokens)
    note = (
        f"[Truncated: PARTIAL view — {call.absolute(path)}: showing lines 1-{count} of {len(lines)} total "
        f"({tokens} tokens, cap {TOKENS_MAX}). Call Read with offset={count + 1} limit={count} for the next "
        "page, or Grep to find a specific section.]"
    )
    return "\n".join(page) + f"\n\n<system-reminder>{note}</system-reminder>", count


def _too_many_tokens(tokens: int) -> ToolFailure:
    return ToolFailure(
        "too_large",
        f"File content ({tokens} tokens) exceeds maximum allowed tokens ({TOKENS_MAX}). Use offset and limit "
        "parameters to read specific portions of the file, or search for specific content instead of reading "
        "the whole file.",
        tagged=False,
        tokens=tokens,
        limit=TOKENS_MAX,
    )


def _far(call: Call, path: str, descriptor: int, status: os.stat_result, offset: int, limit: int) -> Answer:
    """Answer a range of a file that is too large to be read whole.

    Lines before the range are only counted; what is a hole on disk has none and is skipped.
    """
    line = 1  # the number of the line that begins at, or goes on from, `position`
    position = 0
    while line < offset:
        if time.monotonic() > call.deadline:
            raise ToolFailure("timeout", f"Reading up to line {offset} took too long.")
        position = _data_from(descriptor, position)
        chunk = os.pread(descriptor, _CHUNK, position)
        if not chunk:
            words = (
                f"Warning: the file exists but is shorter than the provided offset ({offset}). "
                f"The file has {line} lines."
            )
            facts = {"path": call.absolute(path), "size": status.st_size, "etag": etag(status), "lines": 0}
            facts["totalLines"] = line
            return text(f"<system-reminder>{words}</system-reminder>", facts)
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
    shown = "\n".join(f"{i}\t{row}" for i, row in enumerate(form.text.split("\n"), offset))
    tokens = len(shown) // BYTES_PER_TOKEN
    if tokens > TOKENS_MAX and not call.given.get("allow_large"):
        raise _too_many_tokens(tokens)
    facts = {
        "path": call.absolute(path),
        "size": status.st_size,
        "etag": etag(status),
        "startLine": offset,
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


def _image(call: Call, path: str, descriptor: int, status: os.stat_result) -> Answer:
    if status.st_size > call.limits.write_max:
        raise failure(
            "Read", TooLarge("the image is too large", size=status.st_size, limit=call.limits.write_max)
        )
    data = read_all(descriptor, status.st_size, call.limits.write_max)
    kind = image_type(data)
    if kind is None:
        raise _no_image(data, _looks_like(data))
    try:
        data, kind, scaled = _fitting(data, kind)
    except TooLarge as error:
        raise failure("Read", error) from None
    except ValueError:
        raise _no_image(data, f"{kind}, broken or cut off") from None
    if len(data) > IMAGE_MAX:
        raise failure("Read", TooLarge("the image is too large", size=len(data), limit=IMAGE_MAX))
    facts = {
        "path": call.absolute(path),
        "size": status.st_size,
        "etag": etag(status),
        "mimeType": kind,
        "scaled": scaled,
    }
    block = {"type": "image", "data": _base64(data), "mimeType": kind}
    return Answer([block], facts)


def _no_image(data: bytes, detected: str) -> ToolFailure:
    return ToolFailure(
        "binary_file",
        "File has an image extension but its content is not a valid PNG/JPEG/GIF/WebP. Detected: "
        f"{detected} (hex: {data[:8].hex(' ')}). Check what the file really is, or read it "
        "under a name without an image extension.",
        tagged=False,
    )


def image_type(data: bytes) -> str | None:
    """Return the MIME type that the first bytes show, of the four that models take."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def _fitting(data: bytes, kind: str) -> tuple[bytes, str, bool]:
    """Scale an image down to what models take, where Pillow is installed; else return it as it is.

    Raises what `images.scale` does.
    """
    if SCALE is None:
        return data, kind, False
    return SCALE(data, kind, IMAGE_SIDE_MAX, IMAGE_MAX)


def _looks_like(data: bytes) -> str:
    if not data:
        return "an empty file"
    try:
        data[:512].decode("utf-8")
    except UnicodeDecodeError:
        return "unknown binary data"
    return "text"


def _pdf(call: Call, path: str, descriptor: int, status: os.stat_result) -> Answer:
    """Answer with pages of the document as images; as a whole where there is nothing to show them with."""
    wanted = call.given.get("pages")
    pages = _pages(wanted, call.limits.pdf_pages) if wanted else None
    limit = call.limits.pdf_max
    if status.st_size > limit:
        raise failure("Read", TooLarge("the PDF is too large", size=status.st_size, limit=limit))
    data = read_all(descriptor, status.st_size, limit)
    if not data.startswith(b"%PDF-"):
        raise ToolFailure("binary_file", "The file is named as a PDF, but its content is not one.")
    absolute = call.absolute(path)
    facts: dict[str, Any] = {
        "path": absolute,
        "size": status.st_size,
        "etag": etag(status),
        "mimeType": "application/pdf",
    }
    said = f"PDF file read: {absolute} ({_size(len(data))})"
    if pdf is None:
        if pages is not None:
            raise ToolFailure(
                "unavailable",
                "Reading pages of a PDF needs a renderer, which is not installed on this gateway: whoever "
                "runs it can install the extra `pdf`.",
                tagged=False,
            )
        resource = {"uri": f"file://{absolute}", "mimeType": "application/pdf", "blob": _base64(data)}
        return Answer([{"type": "text", "text": said}, {"type": "resource", "resource": resource}], facts)
    try:
        with pdf.Document(data) as document:
            facts["totalPages"] = document.pages
            shown = _shown_pages(pages, wanted, document.pages, call.limits.pdf_pages)
            if pages is not None:
                said = f"PDF pages extracted: {len(shown)} page(s) from {absolute} ({_size(len(data))})"
            blocks: list[dict[str, Any]] = [{"type": "text", "text": said}]
            room = PDF_RESULT_MAX
            for image in document.images(shown, IMAGE_SIDE_MAX, call.deadline):
                room -= len(image)
                if room < 0:
                    words = "the pages are too large together; ask for fewer"
                    raise failure("Read", TooLarge(words, limit=PDF_RESULT_MAX))
                blocks.append({"type": "image", "data": _base64(image), "mimeType": "image/jpeg"})
    except pdf.Locked:
        words = "PDF is password-protected. Please provide an unprotected version."
        raise ToolFailure("binary_file", words, tagged=False) from None
    except pdf.Broken:
        raise ToolFailure("binary_file", "PDF file is corrupted or invalid.", tagged=False) from None
    except TimeoutError:
        words = "Rendering the pages took too long; ask for fewer by the pages parameter."
        raise ToolFailure("timeout", words, tagged=False) from None
    return Answer(blocks, {**facts, "pages": [shown[0], shown[-1]]})


def _pages(text: str, limit: int) -> tuple[int, int]:
    """Return the first and last page of what the parameter `pages` asks for."""
    match = _PAGES.fullmatch(text.strip())
    first = int(match[1]) if match else 0
    last = int(match[3] or _PAGE_MAX) if match and match[2] else first
    if not first or last < first:
        raise ToolFailure(
            "invalid_params",
            f'Invalid pages parameter: "{show(text[:100])}". Use formats like "1-5", "3", or "10-20". '
            "Pages are 1-indexed.",
        )
    if last - first >= limit:
        raise ToolFailure(
            "invalid_params",
            f'Page range "{show(text[:100])}" exceeds maximum of {limit} pages per request. Please use a '
            "smaller range.",
        )
    return first, last


def _shown_pages(pages: tuple[int, int] | None, wanted: str | None, total: int, limit: int) -> range:
    """Return the numbers of the pages that are shown of a document that has `total`."""
    if pages is None:
        if total > min(PDF_WHOLE_MAX, limit):
            raise ToolFailure(
                "too_large",
                f"This PDF has {total} pages, which is too many to read at once. Use the pages parameter to "
                f'read specific page ranges (e.g., pages: "1-5"). Maximum {limit} pages per request.',
                tagged=False,
                pages=total,
                limit=limit,
            )
        pages = (1, total)
    first, last = pages
    if first > total:
        words = f'Page range "{wanted}" lies behind the end: the PDF has {total} pages.'
        raise ToolFailure("invalid_params", words, tagged=False, pages=total)
    return range(first, min(last, total) + 1)


def _notebook(call: Call, path: str, descriptor: int, status: os.stat_result) -> Answer:
    """Answer with the cells of a Jupyter notebook (nbformat 4) and their outputs."""
    if status.st_size > call.limits.write_max:
        raise failure("Read", TooLarge("the notebook is too large", size=status.st_size))
    data = read_all(descriptor, status.st_size, call.limits.write_max)
    try:
        notebook = orjson.loads(data)
        cells = [cell for cell in notebook["cells"] if isinstance(cell, dict)]
        language = notebook.get("metadata", {}).get("language_info", {}).get("name", "python")
        blocks = _blocks(cells, language)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ToolFailure(
            "binary_file", "The file is named as a notebook, but its content is not one."
        ) from None
    size = sum(len(block.get("text", block.get("data", ""))) for block in blocks)
    if size > call.limits.result_max:
        raise failure("Read", TooLarge("the notebook's cells are too large", size=size))
    facts = {"path": call.absolute(path), "size": status.st_size, "etag": etag(status), "cells": len(cells)}
    return Answer(blocks, facts, seen=Seen(etag(status), crc32(data), True))


def _blocks(cells: list[dict[str, Any]], language: str) -> list[dict[str, Any]]:
    """Return one text block for neighbouring texts and one block for each image, in their order."""
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
        for output in cell.get("outputs", ()) if kind == "code" else ():
            match output.get("output_type"):
                case "stream":
                    add("\n" + _joined(output.get("text", "")))
                case "error":
                    trace = "\n".join(map(str, output.get("traceback", ())))
                    add(f"\n{output.get('ename', '')}: {output.get('evalue', '')}\n{trace}")
                case "execute_result" | "display_data":
                    shown = output.get("data", {})
                    if "text/plain" in shown:
                        add("\n" + _joined(shown["text/plain"]))
                    for mime in ("image/png", "image/jpeg"):
                        if mime in shown:
                            image = "".join(_joined(shown[mime]).split())
                            blocks.append({"type": "image", "data": image, "mimeType": mime})
                case _:
                    pass
    return blocks or [{"type": "text", "text": ""}]


def _joined(value: object) -> str:
    return "".join(map(str, value)) if isinstance(value, list) else str(value)


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def _size(size: int) -> str:
    """Return a size as Claude Code writes it: 256KB, 574.2KB."""
    for unit, factor in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.1f}".removesuffix(".0") + unit
    return f"{size} bytes"


def missing(call: Call, path: str) -> str:
    """Return the words for a missing file, with a guess at what was meant."""
    words = f"File does not exist. {call.where}"
    guess = _below_cwd(call, path) or _similar(call, path)
    return f"{words} Did you mean {guess}?" if guess else words


def _similar(call: Call, path: str) -> str | None:
    """Return the name of a file beside it that differs in its extension alone."""
    folder, _, name = path.rpartition("/")
    stem = name.rpartition(".")[0] or name
    try:
        names = call.tree.names(folder, _NAMES_MAX)
    except GatewayError:
        return None
    found = [other for other in names if other != name and (other.rpartition(".")[0] or other) == stem]
    return show(min(found)) if found else None


def _below_cwd(call: Call, path: str) -> str | None:
    """Return the file of that path below the working directory, where its name was left out."""
    absolute = call.tree.absolute(path)
    above = call.cwd.rpartition("/")[0] + "/"
    if not absolute.startswith(above) or absolute.startswith(call.cwd + "/"):
        return None
    candidate = f"{call.cwd}/{absolute[len(above) :]}"
    try:
        call.tree.status(call.locate(candidate))
    except GatewayError:
        return None
    return show(candidate)


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
            return outside("Read", "read", given, error, call.tree.workspace)
        case "denied":
            words = f"EACCES: permission denied, open '{absolute}'"
            return ToolFailure("forbidden", words, tagged=False)
        case _:
            return failure("Read", error)
