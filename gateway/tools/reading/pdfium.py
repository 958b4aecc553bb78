"""Render the pages of a PDF as images. Needs pypdfium2 and Pillow (the extra `pdf`).

PDFium is a large parser of hostile input, so it runs only in the tenant's confined worker. The host's fonts
are not available there; PDFium's own replace those that a document does not embed.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence

import pypdfium2
import pypdfium2.raw
from PIL import Image

_DPI = 100  # as in Claude Code
_QUALITY = 85  # JPEG quality

# A confined worker can import nothing later.
Image.preinit()


class Locked(Exception):
    """The document needs a password."""


class Broken(Exception):
    """The document cannot be rendered."""


class Document:
    """An open document. Use as a context manager."""

    def __init__(self, data: bytes) -> None:
        try:
            self._document = pypdfium2.PdfDocument(data)
            self.pages = len(self._document)
        except pypdfium2.PdfiumError as error:
            if getattr(error, "err_code", None) == pypdfium2.raw.FPDF_ERR_PASSWORD:
                raise Locked from None
            raise Broken from None

    def __enter__(self) -> Document:
        return self

    def __exit__(self, *_: object) -> None:
        self._document.close()

    def images(self, pages: Sequence[int], side: int, deadline: float) -> Iterator[bytes]:
        """Yield each of the pages, numbered from 1, as a JPEG no side of which is over `side` pixels.

        Raises `Broken`, and `TimeoutError` between two pages after `deadline` of `time.monotonic`.
        """
        for number in pages:
            if time.monotonic() > deadline:
                raise TimeoutError
            try:
                page = self._document[number - 1]
                # A page may claim any size; only the number of rendered pixels matters.
                scale = min(_DPI / 72, side / max(*page.get_size(), 1.0))
                image = page.render(scale=scale, may_draw_forms=False).to_pil()
                page.close()
            except (pypdfium2.PdfiumError, ValueError, OverflowError):
                raise Broken from None
            out = io.BytesIO()
            image.convert("RGB").save(out, "JPEG", quality=_QUALITY)
            yield out.getvalue()
