"""Claude Code's Read: finds the file and its kind, and has the texts for what cannot be read."""

from __future__ import annotations

import os

from gateway.errors import GatewayError
from gateway.rootfs.paths import show
from gateway.tools.answer import Answer, ToolFailure, size_words
from gateway.tools.call import Call, failure, missing, outside
from gateway.tools.reading.image import image
from gateway.tools.reading.lines import NARROWER, far, near
from gateway.tools.reading.notebook import notebook
from gateway.tools.reading.pdf import page_range, pdf

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


def read(call: Call) -> Answer:
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
        return image(call, path, descriptor, status)
    if extension == "pdf":
        return pdf(call, path, pages, descriptor, status)
    if extension == "ipynb":
        return notebook(call, path, descriptor, status)
    offset = call.given.get("offset", 1)
    limit = call.given.get("limit", 0)
    most = call.limits.result_max if call.given.get("allow_large") else call.limits.read_max
    if status.st_size <= most:
        return near(call, path, descriptor, status, offset, limit, most)
    if limit > 0:
        return far(call, path, descriptor, status, offset, limit)
    raise ToolFailure(
        "too_large",
        f"File content ({size_words(status.st_size)}) exceeds maximum allowed size ({size_words(most)}). "
        f"{NARROWER}",
        tagged=False,
        size=status.st_size,
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
