"""Read for images: the image, scaled down if Pillow is installed."""

from __future__ import annotations

import os
from collections.abc import Callable

from gateway.errors import TooLarge
from gateway.rootfs.root import etag, read_all
from gateway.tools.answer import Answer, ToolFailure, base64
from gateway.tools.call import Call, failure

IMAGE_MAX = 3_750_000  # bytes of an image; the Messages API takes at most 5 MB of base64
IMAGE_SIDE_MAX = 2000  # pixels; larger ones are scaled down if Pillow is installed


def _scaler() -> Callable[[bytes, str, int, int], tuple[bytes, str, bool]] | None:
    try:
        from gateway.tools.reading.pillow import scale
    except ImportError:  # Pillow is an extra
        return None
    return scale


SCALE = _scaler()


def image(call: Call, path: str, descriptor: int, status: os.stat_result) -> Answer:
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
        raise _not_an_image(absolute, _looks_like(data))
    try:
        data, kind, scaled = _fitting(data, kind)
    except TooLarge as error:
        raise failure("Read", error) from None
    except ValueError:
        raise _not_an_image(absolute, f"{kind}, broken or cut off") from None
    if len(data) > IMAGE_MAX:
        raise failure("Read", TooLarge("the image is too large", size=len(data), limit=IMAGE_MAX))
    facts = {
        "path": absolute,
        "size": status.st_size,
        "etag": etag(status),
        "mimeType": kind,
        "scaled": scaled,
    }
    block = {"type": "image", "data": base64(data), "mimeType": kind}
    return Answer([block], facts)


def _not_an_image(absolute: str, detected: str) -> ToolFailure:
    return ToolFailure(
        "binary_file",
        "File has an image extension but its content is not a valid PNG/JPEG/GIF/WebP. Detected: "
        f"{detected}. This usually means a download saved an error/login page instead of the image. Use "
        f'`file "{absolute}"` to confirm, or read it as text with Bash (e.g. `head -c 500`).',
        tagged=False,
    )


def image_type(data: bytes) -> str | None:
    """Return the MIME type by the first bytes, if it is one of the four that models take."""
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
    """Scale an image down to what models take, if Pillow is installed; otherwise return it unchanged.

    Raises what `images.scale` does.
    """
    if SCALE is None:
        return data, kind, False
    return SCALE(data, kind, IMAGE_SIDE_MAX, IMAGE_MAX)


def _looks_like(data: bytes) -> str:
    """Describe a file that is not an image, by its first bytes."""
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
