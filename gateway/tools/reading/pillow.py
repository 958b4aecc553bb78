"""Scale an image down to what models take. Needs Pillow (the extra `images`)."""

from __future__ import annotations

import io

from PIL import Image, ImageFile, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin

from gateway.errors import TooLarge

# A hostile image may claim any size; Pillow raises above twice this many pixels.
_PIXELS_MAX = 100_000_000
Image.MAX_IMAGE_PIXELS = _PIXELS_MAX // 2
_FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/gif": "GIF", "image/webp": "WEBP"}

Image.preinit()
# A confined worker cannot import later. `preinit` leaves WebP out; the other two are for JPEGs with Exif or
# several pictures, such as those of phones.
assert ImageFile and MpoImagePlugin and TiffImagePlugin and WebPImagePlugin


def scale(data: bytes, kind: str, side: int, maximum: int) -> tuple[bytes, str, bool]:
    """Return the image with no side over `side` pixels and, if possible, at most `maximum` bytes.

    The result is bytes, MIME type and whether it was changed. Raises `ValueError` if it does not decode: a
    model's API would refuse it, and the whole conversation with it. Raises `TooLarge` over `_PIXELS_MAX`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=[_FORMATS[kind]]) as image:
            if max(image.size) <= side and len(data) <= maximum:
                image.load()
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
    except Image.DecompressionBombError:
        raise TooLarge("the image has too many pixels", limit=_PIXELS_MAX) from None
    except Exception as error:  # Pillow raises all kinds of errors for invalid images
        raise ValueError("the image does not decode") from error
