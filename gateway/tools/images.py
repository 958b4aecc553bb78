"""Knows how to scale an image down to what models take. Needs Pillow (the extra `images`)."""

from __future__ import annotations

import io

from PIL import Image, ImageFile, UnidentifiedImageError

# A hostile image may claim any size; Pillow raises above twice this many pixels.
Image.MAX_IMAGE_PIXELS = 50_000_000
_FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/gif": "GIF", "image/webp": "WEBP"}

Image.preinit()
assert ImageFile  # the plugins need it, and a confined worker cannot import it later


def scale(data: bytes, kind: str, side: int, maximum: int) -> tuple[bytes, str, bool]:
    """Return the image with no side over `side` pixels and at most `maximum` bytes where it can be done.

    The result is bytes, MIME type and whether it was changed. What does not decode is returned as it is.
    """
    try:
        with Image.open(io.BytesIO(data), formats=[_FORMATS[kind]]) as image:
            if max(image.size) <= side and len(data) <= maximum:
                return data, kind, False
            image.thumbnail((side, side))
            out = io.BytesIO()
            if kind == "image/jpeg" or "A" not in image.getbands():
                flat = image.convert("RGB")
                target = "image/jpeg" if kind == "image/jpeg" else "image/png"
                flat.save(out, _FORMATS[target], quality=85)
            else:
                target = "image/png"
                image.save(out, "PNG")
            return out.getvalue(), target, True
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError, SyntaxError):
        return data, kind, False
