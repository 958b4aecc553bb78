"""Read for PDFs: the pages as images, or the document itself if there is no renderer."""

from __future__ import annotations

import os
import re
from types import ModuleType
from typing import Any

from gateway.errors import TooLarge
from gateway.rootfs.paths import show
from gateway.rootfs.root import etag, read_all
from gateway.tools.answer import Answer, ToolFailure, base64, size_words
from gateway.tools.call import Call, failure
from gateway.tools.reading.image import IMAGE_SIDE_MAX

PDF_WHOLE_MAX = 10  # pages of a PDF that is shown whole, as in Claude Code
PDF_RESULT_MAX = 10 << 20  # bytes of all pages of one answer; it fits into a frame as base64
_PAGES = re.compile(r"(\d{1,6})(-(\d{1,6})?)?", re.ASCII)
_PAGE_MAX = 10**6

pdfium: ModuleType | None
try:
    from gateway.tools.reading import pdfium
except ImportError:  # an extra
    pdfium = None


def pdf(
    call: Call, path: str, pages: tuple[int, int] | None, descriptor: int, status: os.stat_result
) -> Answer:
    """Answer with pages of the document as images; without a renderer, with the document itself."""
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
    said = f"PDF file read: {absolute} ({size_words(len(data))})"
    if pdfium is None:
        if pages is not None:
            raise ToolFailure(
                "unavailable",
                "Reading pages of a PDF needs a renderer, which is not installed on this gateway: its "
                "operator can install the extra `pdf`.",
                tagged=False,
            )
        resource = {"uri": f"file://{absolute}", "mimeType": "application/pdf", "blob": base64(data)}
        return Answer([{"type": "text", "text": said}, {"type": "resource", "resource": resource}], facts)
    try:
        with pdfium.Document(data) as document:
            facts["totalPages"] = document.pages
            shown = _shown_pages(pages, call.given.get("pages"), document.pages, call.limits.pdf_pages)
            if pages is not None:
                said = f"PDF pages extracted: {len(shown)} page(s) from {absolute} ({size_words(len(data))})"
            blocks: list[dict[str, Any]] = [{"type": "text", "text": said}]
            room = PDF_RESULT_MAX
            for image in document.images(shown, IMAGE_SIDE_MAX, call.deadline):
                room -= len(image)
                if room < 0:
                    words = "the pages are too large in total; ask for fewer"
                    raise failure("Read", TooLarge(words, limit=PDF_RESULT_MAX))
                blocks.append({"type": "image", "data": base64(image), "mimeType": "image/jpeg"})
    except pdfium.Locked:
        words = "PDF is password-protected. Please provide an unprotected version."
        raise ToolFailure("binary_file", words, tagged=False) from None
    except pdfium.Broken:
        raise ToolFailure("binary_file", "PDF file is corrupted or invalid.", tagged=False) from None
    except TimeoutError:
        words = "Rendering the pages took too long; ask for fewer with the pages parameter."
        raise ToolFailure("timeout", words, tagged=False) from None
    return Answer(blocks, {**facts, "pages": [shown[0], shown[-1]]})


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


def _shown_pages(pages: tuple[int, int] | None, wanted: str | None, total: int, limit: int) -> range:
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
