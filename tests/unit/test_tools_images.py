"""Read shows images of every kind from a confined worker, and none that a model's API would refuse."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import FileTools
from tests.unit.test_rootfs_workers import LaidRoot, folders, make_root

KINDS = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "GIF": "image/gif",
    "WEBP": "image/webp",
    "MPO": "image/jpeg",
}


class Site:
    def __init__(self, root: LaidRoot, tools: FileTools) -> None:
        self.root = root
        self.folder = root.path / "srv" / "site"
        self.tools = tools

    async def read(self, data: bytes) -> dict[str, Any]:
        (self.folder / "a.png").write_bytes(data)
        result = await self.tools.call(self.root, ToolSession(), "Read", {"file_path": "a.png"})
        return result.data()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    settings = Settings()
    laid = make_root(tmp_path, "tenant")
    root = LaidRoot(tmp_path.name, laid.workspace, path=laid.path)
    async with Workers(settings, folders(tmp_path.parent, "tenant")) as workers:
        yield Site(root, FileTools(workers, settings))


def picture(kind: str, width: int) -> bytes:
    """Return an image with what those of phones bring: Exif, and with MPO a second picture."""
    image = Image.effect_noise((width, 30), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x0128] = 6, 72.0, 2
    out = io.BytesIO()
    options: dict[str, Any] = {} if kind == "GIF" else {"exif": exif}
    if kind == "MPO":
        options |= {"save_all": True, "append_images": [image]}
    image.save(out, kind, **options)
    return out.getvalue()


async def test_every_kind_is_shown_or_refused_in_words(site: Site) -> None:
    """Whole it is an image, scaled down where it is large; cut off it is none, wherever the cut is."""
    for kind, mime in KINDS.items():
        for width in (50, 2400):
            data = picture(kind, width)
            result = await site.read(data)
            assert not result["isError"], (kind, width, result)
            (block,) = result["content"]
            assert block["mimeType"] in (mime, "image/png")
            with Image.open(io.BytesIO(base64.b64decode(block["data"]))) as shown:
                assert max(shown.size) == min(width, 2000)
            for length in (16, 40, len(data) // 3):
                result = await site.read(data[:length])
                assert result["isError"], (kind, width, length)
                assert result["structuredContent"]["code"] == "binary_file"
                assert "broken or cut off" in result["content"][0]["text"]


async def test_more_pixels_than_can_be_held_are_too_large(site: Site) -> None:
    """The size that a file claims is refused by its header, before it costs memory."""
    image = bytearray(picture("GIF", 8))
    image[6:10] = b"\xff\xff\xff\xff"  # 65 535 pixels a side
    result = await site.read(bytes(image))
    assert result["structuredContent"]["code"] == "too_large"
    assert "too many pixels" in result["content"][0]["text"]
