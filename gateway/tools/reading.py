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
from gateway.rootfs.root import etag, read_all, show
from gateway.tools.answer import Answer, Seen, ToolFailure, text
from gateway.tools.call import Call, failure, outside
from gateway.tools.texts import Text, decode

TOKENS_MAX = 25_000  # of one answer, as in Claude Code
PAGE_SHARE = 0.85  # of the tokens that fit; the first page of a larger file keeps clear of the bound
BYTES_PER_TOKEN = 4  # our estimate; the real count needs the model's tokeniser
IMAGE_MAX = 3_750_000  # bytes of an image; the Messages API takes 5 MB of base64
IMAGE_SIDE_MAX = 2000  # pixels; larger ones are scaled down where Pillow is there
PDF_WHOLE_MAX = 10  # pages of a PDF that is shown whole, as in Claude Code
PDF_RESULT_MAX = 10 << 20  # bytes of all pages of one answer; base64 and a frame's limit are above it
OUTPUTS_MAX = 10_000  # characters of the outputs of one notebook cell, as in Claude Code
NOTHING = "(Read completed with no output)"
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

_NARROWER = (
    "Use offset and limit parameters to read specific portions of the file, or search for specific content "
    "instead of reading the whole file. To read it anyway, up to what still fits in your context, call Read "
    "again with allow_large: true — only if you genuinely need all of it or the user asked for the whole "
    "file."
)

_PAGES = re.compile(r"(\d{1,6})(-(\d{1,6})?)?", re.ASCII)
_PAGE_MAX = 10**6

_IMAGES = {"png", "jpg", "jpeg", "gif", "webp"}
# What Claude Code refuses by name, without a look at the content.
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


def read(call: Call) -> Answer:
    given: str = call.given["file_path"]
    if given.startswith(("/dev/", "/proc/")):
        raise ToolFailure(
            "not_a_file",
            f"Cannot read '{show(given[:1000])}': this path names a device or process file that this tool "
            "does not read.",
        )
    wanted = call.given.get("pages")
    pages = _pages(wanted, call.limits.pdf_pages) if wanted else None
    try:
        path = call.locate(given)
    except GatewayError as error:
        raise outside(call, "read", given, error) from None
    name = path.rpartition("/")[2]
    stem, dot, extension = name.rpartition(".")
    extension = extension.lower() if dot else ""
    if extension in _BINARY:
        shown = f".{extension}" if stem else ""  # ".dat" is all name, as its words know
        raise ToolFailure(
            "binary_file",
            f"This tool cannot read binary files. The file appears to be a binary {shown} file. "
            "Use a skill for this file type if one is available, or a shell command or script that can read "
            "the format.",
        )
    try:
        descriptor, status = call.tree.open_file(path)
    except GatewayError as error:
        raise _refused(call, given, path, error) from None
    try:
        return _answer(call, path, extension, pages, descriptor, status)
    finally:
        os.close(descriptor)


def _answer(
    call: Call,
    path: str,
    extension: str,
    pages: tuple[int, int] | None,
    descriptor: int,
    status: os.stat_result,
) -> Answer:
    if extension in _IMAGES:
        return _image(call, path, descriptor, status)
    if extension == "pdf":
        return _pdf(call, path, pages, descriptor, status)
    if extension == "ipynb":
        return _notebook(call, path, descriptor, status)
    offset = call.given.get("offset", 1)
    limit = call.given.get("limit", 0)
    most = call.limits.result_max if call.given.get("allow_large") else call.limits.read_max
    if status.st_size <= most:
        return _near(call, path, descriptor, status, offset, limit, most)
    if limit > 0:
        return _far(call, path, descriptor, status, offset, limit)
    raise ToolFailure(
        "too_large",
        f"File content ({_size(status.st_size)}) exceeds maximum allowed size ({_size(most)}). {_NARROWER}",
        tagged=False,
        size=status.st_size,
        limit=most,
    )


def _near(
    call: Call, path: str, descriptor: int, status: os.stat_result, offset: int, limit: int, most: int
) -> Answer:
    """Answer from a file that is read whole."""
    data = read_all(descriptor, status.st_size, most)
    facts: dict[str, Any] = {"path": call.absolute(path), "size": status.st_size, "etag": etag(status)}
    form = decode(data)
    body = form.text.removesuffix("\r")  # as if it were the half of a last line end
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
        # what was cut short counts as not read
        return text(shown + _refused_forms(form), {**facts, "startLine": 1, "lines": count})
    facts |= {"startLine": number, "lines": len(taken)}
    return text(shown + _refused_forms(form), facts, seen=seen)


def _tokens(lines: list[str]) -> int:
    return (sum(map(len, lines)) + len(lines) - 1) // BYTES_PER_TOKEN


def _bare(shown: str) -> str:
    """Take the carriage return off the end of each line."""
    return shown.replace("\r\n", "\n").removesuffix("\r")


def _shorter(offset: int, total: int) -> str:
    words = (
        f"Warning: the file exists but is shorter than the provided offset ({offset}). "
        f"The file has {total} lines."
    )
    return f"<system-reminder>{words}</system-reminder>"


def _refused_forms(form: Text) -> str:
    """Return the note that goes with a file which Edit and Write refuse; nothing for others."""
    flaw = form.flaw
    if not flaw:
        return ""
    seen_as = "" if form.has_nul or form.mark else " Its undecodable bytes show above as U+FFFD."
    return (
        f"\n\n[This {flaw[0].lower()}{flaw[1:]}.{seen_as} Edit and Write will refuse it: change it with a "
        "shell command that keeps its encoding, or ask the user whether to convert it to UTF-8.]"
    )


def _first_page(call: Call, path: str, lines: list[str], tokens: int) -> tuple[str, int]:
    """Return the page of whole lines that surely fits, with the note that says so, and how many they are.

    Of a first line that alone is more its beginning is shown.
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
        f"File content ({tokens} tokens) exceeds maximum allowed tokens ({TOKENS_MAX}). {_NARROWER}",
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


def _image(call: Call, path: str, descriptor: int, status: os.stat_result) -> Answer:
    if status.st_size > call.limits.write_max:
        raise failure(
            "Read", TooLarge("the image is too large", size=status.st_size, limit=call.limits.write_max)
        )
    data = read_all(descriptor, status.st_size, call.limits.write_max)
    absolute = call.absolute(path)
    if not data:
        raise ToolFailure("binary_file", f"Image file is empty: {absolute}", tagged=False)
    kind = image_type(data)
    if kind is None:
        raise _no_image(absolute, _looks_like(data))
    try:
        data, kind, scaled = _fitting(data, kind)
    except TooLarge as error:
        raise failure("Read", error) from None
    except ValueError:
        raise _no_image(absolute, f"{kind}, broken or cut off") from None
    if len(data) > IMAGE_MAX:
        raise failure("Read", TooLarge("the image is too large", size=len(data), limit=IMAGE_MAX))
    facts = {
        "path": absolute,
        "size": status.st_size,
        "etag": etag(status),
        "mimeType": kind,
        "scaled": scaled,
    }
    block = {"type": "image", "data": _base64(data), "mimeType": kind}
    return Answer([block], facts)


def _no_image(absolute: str, detected: str) -> ToolFailure:
    return ToolFailure(
        "binary_file",
        "File has an image extension but its content is not a valid PNG/JPEG/GIF/WebP. Detected: "
        f"{detected}. This usually means a download saved an error/login page instead of the image. Use "
        f'`file "{absolute}"` to confirm, or read it as text with Bash (e.g. `head -c 500`).',
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
    """Say what lies in a file that is no image, from its first bytes."""
    head = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in data[:32])
    begins, lower = f'(starts with "{head[:24]}")', head.lower()
    if "<!doctype" in lower or "<html" in lower:
        return f"HTML document {begins}"
    if lower.startswith(("<?xml", "<svg")):
        return f"XML/SVG document {begins}"
    if lower.startswith(("{", "[")):
        return f"JSON/text {begins}"
    if lower.startswith("%pdf"):
        return "PDF document"
    if data.startswith(b"PK\x03\x04"):
        return "ZIP archive (Office documents such as .pptx/.docx/.xlsx are ZIPs)"
    return f"unrecognized bytes (hex: {data[:8].hex(' ')})"


def _pdf(
    call: Call, path: str, pages: tuple[int, int] | None, descriptor: int, status: os.stat_result
) -> Answer:
    """Answer with pages of the document as images; as a whole where there is nothing to show them with."""
    limit = call.limits.pdf_max
    if status.st_size > limit:
        raise failure("Read", TooLarge("the PDF is too large", size=status.st_size, limit=limit))
    data = read_all(descriptor, status.st_size, limit)
    absolute = call.absolute(path)
    if not data:
        raise ToolFailure("binary_file", f"PDF file is empty: {absolute}", tagged=False)
    if not data.startswith(b"%PDF-"):
        words = f"File is not a valid PDF (missing %PDF- header): {absolute}"
        raise ToolFailure("binary_file", words, tagged=False)
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
            shown = _shown_pages(pages, call.given.get("pages"), document.pages, call.limits.pdf_pages)
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
            f'Invalid pages parameter: "{show(text[:100])}". Give one page ("3") or one range ("1-5"), not a '
            "list. To read several pages or ranges, read each one separately. Pages are 1-indexed.",
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
    if size > call.limits.result_max:
        raise failure("Read", TooLarge("the notebook's cells are too large", size=size))
    facts = {"path": call.absolute(path), "size": status.st_size, "etag": etag(status), "cells": len(cells)}
    return Answer(blocks, facts, seen=Seen(etag(status), crc32(data), True))


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
    return blocks or [{"type": "text", "text": NOTHING}]


def _output(output: object) -> list[str | dict[str, Any]]:
    """Return what one output of a cell shows: texts, and images as blocks."""
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
    guess = below_cwd(call, path) or _similar(call, path)
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


def below_cwd(call: Call, path: str) -> str | None:
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
            return outside(call, "read", given, error)
        case "denied":
            words = f"EACCES: permission denied, open '{absolute}'"
            return ToolFailure("forbidden", words, tagged=False)
        case _:
            return failure("Read", error)
