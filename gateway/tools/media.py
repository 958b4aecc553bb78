"""Read for images and PDFs, which models take as images.

Pillow (the extra `images`) scales images down, PDFium (the extra `pdf`) renders pages. PDFium is a large
parser of hostile input, so it runs only in the tenant's confined worker. The host's fonts are not available
there; PDFium's own replace those that a document does not embed.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, Final

from gateway.errors import TooLarge
from gateway.rootfs.paths import show
from gateway.tools.call import OpenFile, ToolAnswer, ToolFailure, base64, failure, size_words

_PIXELS_MAX: Final = 100_000_000  # of an image that is scaled: a hostile one may claim any size

# A confined worker can import nothing later, and `preinit` leaves WebP out. The other two plugins are for
# JPEGs with Exif or several pictures, such as those of phones.
pillow: ModuleType | None = None
pdfium: ModuleType | None = None
with suppress(ImportError):
    from PIL import Image, ImageFile, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin

    assert ImageFile and MpoImagePlugin and TiffImagePlugin and WebPImagePlugin
    Image.preinit()
    Image.MAX_IMAGE_PIXELS = _PIXELS_MAX // 2  # Pillow raises above twice this
    pillow = Image
with suppress(ImportError):
    import pypdfium2
    import pypdfium2.raw

    pdfium = pypdfium2

IMAGE_MAX: Final = 3_750_000  # bytes of an image; the Messages API takes at most 5 MB of base64
IMAGE_SIDE_MAX: Final = 2000  # pixels; larger ones are scaled down if Pillow is installed
_FORMATS: Final = {"image/png": "PNG", "image/jpeg": "JPEG", "image/gif": "GIF", "image/webp": "WEBP"}
PDF_WHOLE_MAX: Final = 10  # pages of a PDF that is shown whole, as in Claude Code
PDF_RESULT_MAX: Final = 10 << 20  # bytes of all pages of one answer; it fits into a frame as base64
_PAGES: Final = re.compile(r"(\d{1,6})(-(\d{1,6})?)?", re.ASCII)
_PAGE_MAX: Final = 10**6
_DPI: Final = 100  # as in Claude Code
_QUALITY: Final = 85  # JPEG quality


def image(file: OpenFile) -> ToolAnswer:
    """Answer with an image, scaled down to what models take if Pillow is installed."""
    absolute = file.facts["path"]
    data = file.read(file.call.limits.write_max, "image")
    if not data:
        raise ToolFailure("binary_file", f"Image file is empty: {absolute}", tagged=False)
    kind = image_type(data)
    if kind is None:
        raise _not_an_image(absolute, _looks_like(data))
    try:
        data, kind, scaled = _scaled(data, kind)
    except TooLarge as error:
        raise failure("Read", error) from None
    except ValueError:
        raise _not_an_image(absolute, f"{kind}, broken or cut off") from None
    if len(data) > IMAGE_MAX:
        raise failure("Read", TooLarge("the image is too large", size=len(data), limit=IMAGE_MAX))
    block = {"type": "image", "data": base64(data), "mimeType": kind}
    return ToolAnswer([block], {**file.facts, "mimeType": kind, "scaled": scaled})


def _not_an_image(absolute: str, detected: str) -> ToolFailure:
    return ToolFailure(
        "binary_file",
        "File has an image extension but its content is not a valid PNG/JPEG/GIF/WebP. Detected: "
        f"{detected}. This usually means a download saved an error/login page instead of the image. Use "
        f'`file "{absolute}"` to confirm, or read it as text with Bash (e.g. `head -c 500`).',
        tagged=False,
    )


def image_type(data: bytes) -> str | None:
    """Return the MIME type by the first bytes; None for types that models do not take."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def _scaled(data: bytes, kind: str) -> tuple[bytes, str, bool]:
    """Return an image's bytes, its MIME type, and whether it was scaled down to what models take.

    Raises `ValueError` if it does not decode: a model's API would refuse it, and the whole conversation with
    it. Raises `TooLarge` over `_PIXELS_MAX`.
    """
    if pillow is None:
        return data, kind, False
    try:
        with pillow.open(io.BytesIO(data), formats=[_FORMATS[kind]]) as image:
            if max(image.size) <= IMAGE_SIDE_MAX and len(data) <= IMAGE_MAX:
                image.load()
                return data, kind, False
            image.thumbnail((IMAGE_SIDE_MAX, IMAGE_SIDE_MAX))
            out = io.BytesIO()
            if kind == "image/jpeg" or "A" not in image.getbands():
                target = "image/jpeg" if kind == "image/jpeg" else "image/png"
                image.convert("RGB").save(out, _FORMATS[target], quality=_QUALITY)
            else:
                target = "image/png"
                image.save(out, "PNG")
            return out.getvalue(), target, True
    except pillow.DecompressionBombError:
        raise TooLarge("the image has too many pixels", limit=_PIXELS_MAX) from None
    except Exception as error:  # Pillow raises all kinds of errors for invalid images
        raise ValueError("the image does not decode") from error


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


def pdf(file: OpenFile, pages: tuple[int, int] | None) -> ToolAnswer:
    """Answer with pages of the document as images; without a renderer, with the document itself."""
    absolute, limits = file.facts["path"], file.call.limits
    data = file.read(limits.pdf_max, "PDF")
    if not data:
        raise ToolFailure("binary_file", f"PDF file is empty: {absolute}", tagged=False)
    if not data.startswith(b"%PDF-"):
        words = f"File is not a valid PDF (missing %PDF- header): {absolute}"
        raise ToolFailure("binary_file", words, tagged=False)
    facts: dict[str, Any] = {**file.facts, "mimeType": "application/pdf"}
    words = f"PDF file read: {absolute} ({size_words(len(data))})"
    if pdfium is None or pillow is None:
        if pages is not None:
            raise ToolFailure(
                "unavailable",
                "Reading pages of a PDF needs a renderer, which is not installed on this gateway: its "
                "operator can install the extra `pdf`.",
                tagged=False,
            )
        resource = {"uri": f"file://{absolute}", "mimeType": "application/pdf", "blob": base64(data)}
        return ToolAnswer(
            [{"type": "text", "text": words}, {"type": "resource", "resource": resource}], facts
        )
    with PdfDocument(data) as document:
        facts["totalPages"] = document.pages
        chosen = _chosen(pages, file.call.given.get("pages"), document.pages, limits.pdf_pages)
        if pages is not None:
            words = f"PDF pages extracted: {len(chosen)} page(s) from {absolute} ({size_words(len(data))})"
        blocks: list[dict[str, Any]] = [{"type": "text", "text": words}]
        room = PDF_RESULT_MAX
        for page in document.images(chosen, file.call.deadline):
            room -= len(page)
            if room < 0:
                words = "the pages are too large in total; ask for fewer"
                raise failure("Read", TooLarge(words, limit=PDF_RESULT_MAX))
            blocks.append({"type": "image", "data": base64(page), "mimeType": "image/jpeg"})
    return ToolAnswer(blocks, {**facts, "pages": [chosen[0], chosen[-1]]})


class PdfDocument:
    """An open PDF. Raises `ToolFailure` if it cannot be rendered. Use as a context manager."""

    def __init__(self, data: bytes) -> None:
        assert pdfium is not None
        try:
            self._document = pdfium.PdfDocument(data)
            self.pages = len(self._document)
        except pdfium.PdfiumError as error:
            if getattr(error, "err_code", None) == pdfium.raw.FPDF_ERR_PASSWORD:
                words = "PDF is password-protected. Please provide an unprotected version."
                raise ToolFailure("binary_file", words, tagged=False) from None
            raise _broken() from None

    def __enter__(self) -> PdfDocument:
        return self

    def __exit__(self, *_: object) -> None:
        self._document.close()

    def images(self, pages: Sequence[int], deadline: float) -> Iterator[bytes]:
        """Yield each of the pages, numbered from 1, as a JPEG with sides of at most `IMAGE_SIDE_MAX` pixels.

        Raises `ToolFailure` between two pages after `deadline` of `time.monotonic`.
        """
        assert pdfium is not None
        for number in pages:
            if time.monotonic() > deadline:
                words = "Rendering the pages took too long; ask for fewer with the pages parameter."
                raise ToolFailure("timeout", words, tagged=False)
            try:
                page = self._document[number - 1]
                # A page may claim any size; only the number of rendered pixels matters.
                scale = min(_DPI / 72, IMAGE_SIDE_MAX / max(*page.get_size(), 1.0))
                image = page.render(scale=scale, may_draw_forms=False).to_pil()
                page.close()
            except (pdfium.PdfiumError, ValueError, OverflowError):
                raise _broken() from None
            out = io.BytesIO()
            image.convert("RGB").save(out, "JPEG", quality=_QUALITY)
            yield out.getvalue()


def _broken() -> ToolFailure:
    return ToolFailure("binary_file", "PDF file is corrupted or invalid.", tagged=False)


def page_range(text: str, limit: int) -> tuple[int, int]:
    """Return the first and last page in the parameter `pages`."""
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


def _chosen(pages: tuple[int, int] | None, wanted: str | None, total: int, limit: int) -> range:
    """Return the numbers of the pages to show of a document with `total` pages."""
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
        words = f'Page range "{wanted}" is beyond the end: the PDF has {total} pages.'
        raise ToolFailure("invalid_params", words, tagged=False, pages=total)
    return range(first, min(last, total) + 1)
