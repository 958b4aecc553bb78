"""Read shows the pages of a PDF, drawn in a worker; a hostile document costs one call and no more."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from gateway.tools.call import ToolFailure
from gateway.tools.media import PdfDocument
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import FileTools
from tests.unit.test_rootfs_workers import MAPPED, LaidRoot, folders, make_root
from tests.unit.test_tools_conformance import HereWorkers
from tests.waits import turn

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("pypdfium2")

SETTINGS = Settings(tool_timeout=3.0, worker_memory=256 << 20)
LIMITS = CallLimits(pdf_max=4 << 20)


def pdf(
    pages: int = 1, *, box: str = "0 0 200 100", content: bytes = b"", extra: str = "", stream: str = ""
) -> bytes:
    """Return a document with a black bar on each page; `content` is drawn after it."""
    drawn = b"0 0 0 rg 10 10 100 20 re f\n" + content
    if stream:
        drawn = zlib.compress(drawn, 9)
    kids = " ".join(f"{10 + number} 0 R" for number in range(pages))
    objects = {
        1: b"<</Type/Catalog/Pages 2 0 R>>",
        2: f"<</Type/Pages/Kids[{kids}]/Count {pages}>>".encode(),
        3: b"<<%s/Length %d>>stream\n%s\nendstream" % (stream.encode(), len(drawn), drawn),
    }
    for number in range(pages):
        page = f"<</Type/Page/Parent 2 0 R/MediaBox[{box}]/Contents 3 0 R{extra}>>"
        objects[10 + number] = page.encode()
    body = b"%PDF-1.7\n" + b"".join(b"%d 0 obj%s\nendobj\n" % item for item in objects.items())
    return body + b"trailer<</Root 1 0 R>>\n%%EOF\n"


class Site:
    def __init__(self, root: LaidRoot, tools: FileTools) -> None:
        self.root = root
        self.folder = root.path / "srv" / "site"
        self.tools = tools

    async def read(self, data: bytes | None = None, name: str = "doc.pdf", **given: Any) -> dict[str, Any]:
        if data is not None:
            (self.folder / name).write_bytes(data)
        result = await self.tools.call(self.root, ToolSession(), "Read", {"file_path": name, **given})
        return result.data()


def images(result: dict[str, Any]) -> list[Any]:
    """Return the pages of an answer that must be none of an error."""
    assert not result["isError"], result
    blocks = [block for block in result["content"] if block["type"] != "text"]
    assert all((block["type"], block["mimeType"]) == ("image", "image/jpeg") for block in blocks)
    return [Image.open(io.BytesIO(base64.b64decode(block["data"]))) for block in blocks]


@pytest.fixture(scope="module")
async def workers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Workers]:
    async with Workers(SETTINGS, folders(tmp_path_factory.getbasetemp(), "tenant"), limits=LIMITS) as running:
        yield running


@pytest.fixture
async def site(tmp_path: Path, workers: Workers) -> AsyncIterator[Site]:
    laid = make_root(tmp_path, "tenant")
    root = LaidRoot(tmp_path.name, laid.workspace, path=laid.path)
    yield Site(root, FileTools(workers, SETTINGS))
    await workers.forget(root.tenant)


async def test_whole(site: Site, workers: Workers) -> None:
    """A short document comes with all its pages, drawn at 100 dots an inch, by a confined worker."""
    data = pdf(3)
    result = await site.read(data)
    pages = images(result)
    assert [page.size for page in pages] == [(278, 139)] * 3
    dark = pages[0].convert("L").point(lambda value: 255 * (value < 100)).getbbox()
    assert dark is not None
    assert all(abs(found - wanted) <= 2 for found, wanted in zip(dark, (14, 97, 153, 125), strict=True))
    assert result["content"][0]["text"] == f"PDF file read: /srv/site/doc.pdf ({len(data)} bytes)"
    facts = result["structuredContent"]
    assert (facts["totalPages"], facts["pages"], facts["size"]) == (3, [1, 3], len(data))
    if MAPPED:
        assert "seccomp" in (workers.layers(site.root.tenant, search=True) or ())


@pytest.mark.parametrize(
    ("pages", "shown"),
    [("2", [2, 2]), ("2-3", [2, 3]), (" 1-1 ", [1, 1]), ("12-31", [12, 12]), ("1-12", [1, 12])],
)
async def test_pages(site: Site, pages: str, shown: list[int]) -> None:
    """A range shows what of it the document has."""
    result = await site.read(pdf(12), pages=pages)
    count = shown[1] - shown[0] + 1
    assert len(images(result)) == count
    assert result["structuredContent"]["pages"] == shown
    assert result["content"][0]["text"].startswith(
        f"PDF pages extracted: {count} page(s) from /srv/site/doc.pdf ("
    )


@pytest.mark.parametrize(
    ("pages", "code", "words"),
    [
        (
            "x",
            "invalid_params",
            'Invalid pages parameter: "x". Give one page ("3") or one range ("1-5"), not a list.',
        ),
        ("0", "invalid_params", "1-indexed"),
        ("3-1", "invalid_params", "Invalid pages parameter"),
        ("1,2", "invalid_params", "Invalid pages parameter"),
        ("-1", "invalid_params", "Invalid pages parameter"),
        ("٣", "invalid_params", "Invalid pages parameter"),
        ("1-21", "invalid_params", 'Page range "1-21" exceeds maximum of 20 pages per request.'),
        ("2-", "invalid_params", "exceeds maximum of 20"),
        ("13", "invalid_params", "the PDF has 12 pages"),
        (None, "too_large", "This PDF has 12 pages, which is too many to read at once."),
    ],
)
async def test_refused_pages(site: Site, pages: str | None, code: str, words: str) -> None:
    result = await site.read(pdf(12), **({} if pages is None else {"pages": pages}))
    assert result["isError"] and result["structuredContent"]["code"] == code
    assert words in result["content"][0]["text"]


# The usual password handler of revision 2, whose key no empty password gives.
PASSWORDS = b"/O<" + b"11" * 32 + b">/U<" + b"22" * 32 + b">"
ENCRYPTED = pdf().replace(
    b"trailer<<", b"trailer<</ID[<00><00>]/Encrypt<</Filter/Standard/V 1/R 2/P -4%s>>" % PASSWORDS
)


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"%PDF-1.7\nnothing of it", "binary_file", "PDF file is corrupted or invalid."),
        (b"no document", "binary_file", "File is not a valid PDF (missing %PDF- header)"),
        (b"", "binary_file", "PDF file is empty"),
        (ENCRYPTED, "binary_file", "PDF is password-protected."),
        (pdf() + bytes(4 << 20), "too_large", "the PDF is too large"),
    ],
)
async def test_refused_documents(site: Site, data: bytes, code: str, words: str) -> None:
    result = await site.read(data)
    assert result["isError"] and result["structuredContent"]["code"] == code, result
    assert words in result["content"][0]["text"]


async def test_size_of_a_page(site: Site) -> None:
    """A page of any size has at most 2000 pixels a side."""
    for box, size in (("0 0 14400 7200", (2000, 1000)), ("0 0 1e30 1e30", None), ("0 0 0.001 0.001", None)):
        result = await site.read(pdf(box=box))
        if size is not None:
            assert [page.size for page in images(result)] == [size]
        elif not result["isError"]:
            assert all(max(page.size) <= 2000 for page in images(result))


async def test_without_the_extra(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can draw it the document itself comes; its pages are refused with what to do."""
    monkeypatch.setattr("gateway.tools.media.pdfium", None)
    here = HereWorkers(site.folder)
    try:
        site.tools = FileTools(here, SETTINGS)  # type: ignore[arg-type]  # the stand-in
        whole = await site.read(pdf())
        assert base64.b64decode(whole["content"][1]["resource"]["blob"]) == pdf()
        refused = await site.read(pages="1")
        assert refused["structuredContent"]["code"] == "unavailable"
        assert "extra `pdf`" in refused["content"][0]["text"]
    finally:
        here.close()


def drawing(body: bytes) -> bytes:
    """Return a document that draws the object 4, which is `body`."""
    document = pdf(content=b"/I Do", extra="/Resources<</XObject<</I 4 0 R>>>>")
    return document.replace(b"trailer", b"4 0 obj" + body + b"endobj\ntrailer")


def bomb() -> bytes:
    """Return an image of a gigabyte, in half a megabyte."""
    pressed = zlib.compress(bytes(512 << 20), 9)
    size = b"/Width 20000/Height 20000/BitsPerComponent 8/ColorSpace/DeviceRGB"
    head = b"<</Type/XObject/Subtype/Image" + size + b"/Filter/FlateDecode/Length %d>>" % len(pressed)
    return drawing(head + b"stream\n" + pressed + b"\nendstream\n")


def form_of_itself() -> bytes:
    head = b"<</Type/XObject/Subtype/Form/BBox[0 0 9 9]/Resources<</XObject<</I 4 0 R>>>>/Length 11>>"
    return drawing(head + b"stream\n/I Do /I Do\nendstream\n")


# Documents that want memory, time or depth without end.
HOSTILE: dict[str, Callable[[], bytes]] = {
    "bomb": bomb,
    "bomb of drawing": lambda: pdf(content=b"1 0 0 1 0 0 cm " * 4_000_000, stream="/Filter/FlateDecode"),
    "form of itself": form_of_itself,
    "depth": lambda: pdf().replace(b"/Contents 3 0 R", b"/Contents " + b"[" * 100_000),
    "pages without end": lambda: pdf().replace(b"/Count 1>>", b"/Count 2000000000>>"),
    "pages of themselves": lambda: pdf().replace(b"/Kids[10 0 R]", b"/Kids[2 0 R 2 0 R 10 0 R]"),
    "curves": lambda: pdf(
        content=b"0 0 m " + b"9 9 200 100 3 3 c 200 0 0 100 5 5 c " * 20_000 + b"[1 1] 0 d S"
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile(site: Site, name: str) -> None:
    """What a document asks for is bounded, and costs one call at most; another read goes on meanwhile."""
    (site.folder / "doc.pdf").write_bytes(HOSTILE[name]())
    drawn = asyncio.ensure_future(site.read(pages="1"))
    await turn()
    async with asyncio.timeout(2):
        assert "alpha" in (await site.read(name="a.txt"))["content"][0]["text"]
    try:
        result = await drawn
        codes = ("binary_file", "timeout", "too_large")
        assert not result["isError"] or result["structuredContent"]["code"] in codes
        print(name, result["structuredContent"])
    except GatewayError as error:
        print(name, error.code)
        assert error.code in ("unavailable", "timeout")
    assert len(images(await site.read(pdf(2), "good.pdf"))) == 2


def test_time() -> None:
    """No further page is drawn after the call's deadline."""
    with PdfDocument(pdf(3)) as document:
        assert next(document.images(range(1, 4), time.monotonic() + 60)).startswith(b"\xff\xd8")
        with pytest.raises(ToolFailure, match="too long"):
            next(document.images(range(1, 4), time.monotonic() - 1))


async def test_mutations(site: Site) -> None:
    """Of documents with bytes changed at random each is answered, or costs one call."""
    chance = random.Random(5)
    good = bytearray(
        pdf(2, content=b"BT /F1 9 Tf (x) Tj ET", extra="/Resources<</Font<</F1<</Type/Font>>>>>>")
    )
    answered = 0
    for _ in range(150):
        data = bytearray(good)
        for _ in range(chance.randint(1, 12)):
            data[chance.randrange(9, len(data))] = chance.choice(
                (0, 32, 40, 47, 57, 60, 255, chance.randrange(256))
            )
        try:
            await site.read(bytes(data))
            answered += 1
        except GatewayError as error:
            assert error.code in ("unavailable", "timeout")
    assert answered > 100
    assert len(images(await site.read(bytes(good)))) == 2
