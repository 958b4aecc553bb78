"""Bodies and heads that pass through another member's gateway: bounded, cut where they are cut, unchanged."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.clusters import Relayed, relayed
from tests.contracts.gateway import no_traceback
from tests.live import LiveGateway
from tests.waits import pause, until

TENANT = "demo"
FILES = f"/v1/tenants/{TENANT}/files"
LARGE = 256 << 20  # bytes
HELD = 24 << 20  # bytes by which a gateway may grow meanwhile


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Relayed]:
    gateway = await relayed(tmp_path_factory.mktemp("state"), TENANT)
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0
    assert await gateway.entry.stop() == 0
    await no_traceback(gateway)
    await no_traceback(gateway.entry)


@pytest.fixture
async def mortal(tmp_path: Path) -> AsyncIterator[Relayed]:
    """Its home a test may kill."""
    gateway = await relayed(tmp_path, TENANT)
    await gateway.start()
    yield gateway
    assert await gateway.entry.stop() == 0
    await no_traceback(gateway.entry)


@contextlib.asynccontextmanager
async def asking(
    gateway: LiveGateway, line: str, *more: bytes, body: bytes = b""
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect, and send a request with a token, these lines and this body, as they are."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1 << 16)
    token = f"Authorization: Bearer {gateway.token(TENANT)}".encode()
    writer.write(b"\r\n".join([f"{line} HTTP/1.1".encode(), b"Host: 127.0.0.1", token, *more, b"", body]))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def told(gateway: LiveGateway, line: str, *more: bytes, body: bytes = b"") -> tuple[int, bytes]:
    """Return the status and the body of the answer to such a request."""
    async with (
        asyncio.timeout(60),
        asking(gateway, line, b"Connection: close", *more, body=body) as (reader, _),
    ):
        head, _, found = (await reader.read(-1)).partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), found


def read_of(gateway: LiveGateway) -> int:
    """Return how many bytes a gateway's process has read so far, of files, too."""
    assert gateway.process is not None
    return int(Path(f"/proc/{gateway.process.pid}/io").read_text().split()[1])


async def made(gateway: Relayed, name: str, size: int) -> None:
    async with gateway.wire(TENANT) as wire:
        await wire.run(argv=["truncate", "-s", str(size), name])


# --- bodies ---------------------------------------------------------------------------------------------


async def test_a_client_that_does_not_read_has_neither_gateway_hold_its_download(gateway: Relayed) -> None:
    """And it has lost nothing once it reads on."""
    await made(gateway, "large", LARGE)
    both = (gateway.entry, gateway.home)
    async with gateway.http(TENANT) as http, http.get(f"{FILES}/large") as once:  # whatever is built once is
        async for _ in once.content.iter_any():
            pass
    for one in both:
        one.reset_peak()
    before = [one.memory("VmRSS") for one in both]
    start = read_of(gateway.home)
    async with asyncio.timeout(60), asking(gateway, f"GET {FILES}/large") as (reader, _):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ") and b"content-length: %d\r\n" % LARGE in head
        seen = [start]

        async def stands() -> bool:
            seen.append(read_of(gateway.home))
            await pause(0.2)
            return len(seen) > 5 and seen[-5] == seen[-1]

        await until(stands, 30)
        assert 0 < seen[-1] - start < LARGE / 4
        left = LARGE
        while left and (part := await reader.read(1 << 20)):
            left -= len(part)
        assert left == 0
    grown = [one.memory("VmHWM") - had for one, had in zip(both, before, strict=True)]
    assert max(grown) < HELD, grown


async def test_a_large_download_is_whole_however_the_client_takes_it(gateway: Relayed) -> None:
    """In parts of any size, with a small buffer, and waiting meanwhile. The connection serves on then."""
    size, first = 48 << 20, 12_345
    sent = b"".join(number.to_bytes(8) for number in range(size // 8))
    async with gateway.http(TENANT) as http, http.put(f"{FILES}/counted", data=io.BytesIO(sent)) as answer:
        assert answer.status == 201
    small = f"GET {FILES}/none HTTP/1.1".encode()
    whole, part = f"GET {FILES}/counted", b"Range: bytes=%d-" % first
    for line, more, wanted in ((whole, (), sent), (whole, (part,), sent[first:])):
        async with asyncio.timeout(60), asking(gateway, line, *more) as (reader, writer):
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"content-length: %d\r\n" % len(wanted) in head
            came = bytearray()
            for number in range(1 << 20):
                came += await reader.read(min(1 + number * 997 % 300_000, len(wanted) - len(came)))
                if number % 7 == 0:
                    await pause(0.005)
                if len(came) == len(wanted):
                    break
            assert bytes(came) == wanted
            token = f"Authorization: Bearer {gateway.token(TENANT)}".encode()
            writer.write(b"\r\n".join([small, b"Host: 127.0.0.1", token, b"", b""]))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 404 ")


async def test_a_client_that_leaves_a_large_download_ends_it_at_the_home(gateway: Relayed) -> None:
    await made(gateway, "left", LARGE)
    start = read_of(gateway.home)
    async with asyncio.timeout(60), asking(gateway, f"GET {FILES}/left") as (reader, _):
        await reader.readexactly(1 << 20)
    assert gateway.home.process is not None
    opened = Path(f"/proc/{gateway.home.process.pid}/fd")
    await until(lambda: not any(os.path.realpath(one).endswith("/left") for one in opened.iterdir()), 30)
    assert read_of(gateway.home) - start < LARGE / 2


async def test_a_body_of_a_home_that_is_killed_is_cut_where_it_was(mortal: Relayed) -> None:
    """A download with a length as well as one without: neither looks whole."""
    await made(mortal, "large", LARGE)
    async with mortal.http(TENANT) as http:
        async with http.get(f"{FILES}/large") as download, http.get("/v1/events") as events:
            assert "Content-Length" not in events.headers
            await download.content.readexactly(1000)
            assert mortal.home.process is not None
            mortal.home.process.kill()
            await mortal.home.process.wait()
            with pytest.raises(aiohttp.ClientPayloadError):
                await download.read()
            with pytest.raises(aiohttp.ClientPayloadError):
                await events.read()


# --- heads ----------------------------------------------------------------------------------------------


NAMES = ("a#b", "a%23b?x#y", "a;b", "%2e%2e%2fa", "a%3Fb", "a//b", "./a", "..%2f..%2fa", "%C3%BC", "a%00b")


@pytest.mark.parametrize("name", NAMES)
async def test_a_path_gets_to_the_home_as_it_was_sent(gateway: Relayed, name: str) -> None:
    """Whatever library builds the request again: it is about the file that the home itself would take."""
    length, url = b"Content-Length: 4", f"{FILES}/{name}"
    here, _ = await told(gateway.home, f"PUT {url}", length, body=b"here")
    there, _ = await told(gateway, f"PUT {url}", length, body=b"away")
    assert (here, there) == (201, 200) or here == there >= 400
    for one in (gateway.home, gateway):
        status, said = await told(one, f"GET {url}")
        assert (status, said) == (200, b"away") if here == 201 else status >= 400
    if here == 201:
        assert (await told(gateway, f"DELETE {url}"))[0] == 204
        assert (await told(gateway.home, f"GET {url}"))[0] == 404


@pytest.mark.parametrize("value", [b"\xff\xfe", "ü".encode(), "ü".encode("latin-1"), b"a\tb"])
async def test_a_header_of_any_bytes_passes(gateway: Relayed, value: bytes) -> None:
    for line in (f"GET {FILES}/none", f"GET {FILES}/none?q=1"):
        assert (await told(gateway, line, b"X-Own: " + value))[0] == 404


@pytest.mark.parametrize(
    "more",
    [
        (b"Content-Length: 4", b"Content-Length: 5"),
        (b"Content-Length: 4, 5",),
        (b"Content-Length: +4",),
        (b"Transfer-Encoding: gzip, chunked",),
        (b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
        (b"Transfer-Encoding : chunked",),
        (b"X: 1\0",),
    ],
)
async def test_what_two_readers_may_take_for_two_requests_is_passed_to_nobody(
    gateway: Relayed, more: tuple[bytes, ...]
) -> None:
    status, _ = await told(gateway, f"PUT {FILES}/smuggled", *more, body=b"text")
    assert status in (400, 501)
    assert (await told(gateway.home, f"GET {FILES}/smuggled"))[0] == 404


async def test_a_chunked_body_with_a_length_is_one_request(gateway: Relayed) -> None:
    """The length counts for nothing (RFC 9112, 6.3), the body is no request, and trailers go nowhere."""
    inner = b"DELETE " + FILES.encode() + b"/kept HTTP/1.1\r\nHost: x\r\n\r\n"
    await told(gateway, f"PUT {FILES}/kept", b"Content-Length: 4", body=b"text")
    body = b"%x\r\n%s\r\n0\r\nX-Gateway-Relayed: http 1\r\nAuthorization: no\r\n\r\n" % (len(inner), inner)
    more = (b"Content-Length: 4", b"Transfer-Encoding: chunked")
    status, _ = await told(gateway, f"PUT {FILES}/both", *more, body=body)
    if status == 201:
        assert await told(gateway.home, f"GET {FILES}/both") == (200, inner)
    else:
        assert status == 400
    assert await told(gateway.home, f"GET {FILES}/kept") == (200, b"text")


@pytest.mark.parametrize("name", ["X-Gateway-Relayed", "X-Gateway-Part", "X-Gateway-Not-Home"])
async def test_what_gateways_tell_one_another_is_taken_from_no_client(gateway: Relayed, name: str) -> None:
    """Also where it is named as a header of this hop."""
    await told(gateway, f"PUT {FILES}/said", b"Content-Length: 4", body=b"text")
    for more in ((), (f"Connection: {name}".encode(),), (b"Connection: authorization",)):
        status, said = await told(gateway, f"GET {FILES}/said", f"{name}: http 192.0.2.7".encode(), *more)
        assert (status, said) == (200, b"text")


async def test_an_upgrade_on_a_path_that_has_none_is_refused_as_at_home(gateway: Relayed) -> None:
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    more = (b"Connection: upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", key)
    found = []
    for one in (gateway.home, gateway):
        async with asyncio.timeout(60), asking(one, f"GET {FILES}/x", *more) as (reader, _):
            found.append((await reader.readline()).split()[1])
    assert found[0] == found[1] and found[0] != b"101"
