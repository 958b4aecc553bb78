"""A live gateway holds no more for anybody than their share, and nothing for who has shown no token."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway import protocol
from tests.constants import constants
from tests.live import LiveGateway, RpcFailure, Wire, local_gateway
from tests.waits import pause, standstill, until

MiB = 1 << 20
SLACK = 24 * MiB  # what an allocator keeps of what is free
CLIENTS = {"client": {"name": "t", "version": "1"}}

SMALL = {
    "GATEWAY_BYTES_IN_FLIGHT": str(48 * MiB),
    "GATEWAY_TENANT_BYTES": str(24 * MiB),
    "GATEWAY_MAX_CONNECTIONS": "24",
    "GATEWAY_MAX_TENANT_CONNECTIONS": "12",
    **constants(
        {
            "gateway.api.connection.connection.SOCKET_BYTES": 16 * MiB,
            "gateway.limits.budget.ANONYMOUS": 8,
            "gateway.limits.budget.ANONYMOUS_PER_ADDRESS": 4,
            "gateway.transport.http1.HEAD_TIMEOUT": 2.0,
            "gateway.api.http.BODY_TIMEOUT": 2.0,
        }
    ),
}


@contextlib.asynccontextmanager
async def live(folder: Path) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(folder, "a", "b", **SMALL)
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0
    log = gateway.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") :]


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveGateway]:
    async with live(tmp_path_factory.mktemp("budget")) as gateway:
        yield gateway


@pytest.fixture
async def gateway(shared: LiveGateway) -> AsyncIterator[LiveGateway]:
    """A gateway that holds nothing for anybody any more when the test is over."""
    yield shared
    for name in ("connections", "connections_anonymous", "bytes_in_flight"):
        await reaches(shared, name, 0)  # nobody tells when a socket's end was noticed


@pytest.fixture
async def fresh(tmp_path: Path) -> AsyncIterator[LiveGateway]:
    """A gateway whose memory no other test has made larger."""
    async with live(tmp_path) as gateway:
        yield gateway


@contextlib.contextmanager
def growth(gateway: LiveGateway) -> Iterator[Callable[[], int]]:
    """Give what returns the most bytes that the gateway has grown by meanwhile."""
    gateway.reset_peak()
    before = gateway.memory("VmRSS")
    yield lambda: gateway.memory("VmHWM") - before


async def gauge(gateway: LiveGateway, name: str) -> float:
    async with gateway.http("a") as http, http.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return float(next(line for line in lines if line.startswith(f"gateway_{name} ")).split()[1])


async def reaches(gateway: LiveGateway, name: str, most: float = float("inf"), least: float = 0) -> None:
    async def reached() -> bool:
        return least <= await gauge(gateway, name) <= most

    await until(reached, every=0.05)


class Raw:
    """A connection that says byte for byte what a test wants."""

    def __init__(self, gateway: LiveGateway) -> None:
        self.socket = socket.create_connection(("127.0.0.1", gateway.port))
        self.socket.setblocking(False)

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def until_closed(self, deadline: float) -> bytes:
        """Return all that comes until the gateway hangs up."""
        said = b""
        async with asyncio.timeout(deadline):
            with contextlib.suppress(ConnectionError):
                while data := await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16):
                    said += data
        return said

    async def head(self, deadline: float = 10) -> bytes:
        said = b""
        async with asyncio.timeout(deadline):
            while b"\r\n\r\n" not in said and (
                data := await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16)
            ):
                said += data
        return said


async def waiting(*transports: asyncio.WriteTransport) -> int:
    """Return how many bytes the kernel has not taken of what was written."""
    return sum(transport.get_write_buffer_size() for transport in transports)


async def in_flight(gateway: LiveGateway) -> int:
    return int(await gauge(gateway, "bytes_in_flight"))


@contextlib.contextmanager
def connections(gateway: LiveGateway, count: int) -> Iterator[list[Raw]]:
    opened = [Raw(gateway) for _ in range(count)]
    try:
        yield opened
    finally:
        for one in opened:
            one.socket.close()


def post(path: str, length: int, token: str = "") -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Length: {length}",
        "Content-Type: application/json",
    ]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    return "\r\n".join([*lines, "", ""]).encode()


# --- bytes -----------------------------------------------------------------------------------------------


async def test_large_writes_on_one_socket_come_in_as_others_are_done(fresh: LiveGateway) -> None:
    """Sixty of 8 MB at once: all are done, the gateway stays small, and another tenant's calls go on."""
    text = "x" * (8 * MiB - 1)
    async with fresh.wire("a") as wire, fresh.wire("b") as other:
        await other.call("files/write", path="small", text="1")
        with growth(fresh) as grown:
            replies = list[asyncio.Future[Any]]()
            writing = asyncio.create_task(_write(wire, text, 60, replies))
            overtaken = 0  # the most writes that were done while one read of the neighbour's was
            while not writing.done():
                before = sum(map(asyncio.Future.done, replies))
                await other.call("files/read", path="small")
                overtaken = max(overtaken, sum(map(asyncio.Future.done, replies)) - before)
            assert await writing == 60
            # the share, once as text and once parsed, and of one what it is made into for its worker
            assert grown() < 16 * MiB * 3 + 4 * 8 * MiB + SLACK
        assert overtaken < 10
    assert await gauge(fresh, "bytes_in_flight") < MiB


async def _write(wire: Wire, text: str, count: int, replies: list[asyncio.Future[Any]]) -> int:
    for number in range(count):
        _, reply = await wire.start_call("files/write", path=f"f{number % 3}", text=text)
        replies.append(reply)
    return len(await asyncio.gather(*replies))


async def test_a_cancel_comes_through_where_the_share_is_full(gateway: LiveGateway) -> None:
    token = gateway.token("a")
    async with gateway.wire("a") as wire:
        with connections(gateway, 2) as owing:
            for one in owing:
                await one.send(post("/v1/tenants/a/tools/Read", 10 * MiB, token) + b"{")
            await reaches(gateway, "bytes_in_flight", least=20 * MiB)
            slow = [
                await wire.start_call(
                    "tools/call", name="Bash", arguments={"command": f"sleep 60 #{'p' * size}"}
                )
                for size in (1, 60 << 10)
            ]
            for number, reply in slow:
                await wire.send(protocol.cancel_request(number))
                with pytest.raises(RpcFailure):
                    await asyncio.wait_for(reply, 20)


async def test_unfinished_messages_hold_their_tenants_share_and_end(fresh: LiveGateway) -> None:
    """Of ten sockets that announce 15 MiB one is let in, the others are not read; all end in time."""
    async with contextlib.AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(fresh.wire("a")) for _ in range(10)]
        other = await stack.enter_async_context(fresh.wire("b"))
        with growth(fresh) as grown:
            for wire in wires:
                head = bytes([0x81, 0xFF]) + (15 * MiB).to_bytes(8, "big") + b"mask"
                transport = wire.socket.transport
                transport.write(head + b"x" * (14 * MiB))
            # until as much is sent as is read
            await standstill(lambda: waiting(*(wire.socket.transport for wire in wires)))
            assert await other.call("ping") == {}
            await other.call("files/write", path="large", text="y" * (7 * MiB))
            assert grown() < 2 * 16 * MiB + 3 * 7 * MiB + 10 * MiB + SLACK
        ended = wires[0].socket.protocol
        await until(lambda: ended.close_code == 4429)
        for wire in wires:  # of whom nobody reads on
            wire.socket.transport.abort()


async def test_answers_that_nobody_takes_are_bounded(fresh: LiveGateway) -> None:
    """A client that asks for 7 MiB a hundred times and reads nothing is served no further."""

    async with fresh.wire("b") as other:
        await other.call("files/write", path="small", text="1")
        async with fresh.wire("a") as wire:
            await wire.call("files/write", path="large", text="z" * (7 * MiB))
        async with fresh.wire("a") as deaf:
            deaf.socket.transport.pause_reading()
            with growth(fresh) as grown:
                for number in range(2, 102):
                    await deaf.send(protocol.request(number, "files/read", {"path": "large"}))
                await standstill(lambda: in_flight(fresh))
                assert (await other.call("files/read", path="small"))["text"] == "1"
                assert grown() < 24 * MiB * 3 + SLACK
            deaf.socket.transport.abort()


async def test_a_request_that_finds_its_share_full_is_told_when_to_ask_again(gateway: LiveGateway) -> None:
    path, token = "/v1/tenants/a/tools/Read", gateway.token("a")
    with connections(gateway, 2) as (first, second):
        await first.send(post(path, 15 * MiB, token) + b"{")
        await reaches(gateway, "bytes_in_flight", least=15 * MiB)
        await second.send(post(path, 15 * MiB, token) + b"{")
        said = await second.head()
        assert said.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in said.lower()
        async with (
            gateway.http("b") as http,
            http.post("/v1/tenants/b/tools/Glob", data=io.BytesIO(b" " * 9 * MiB)) as other,
        ):
            assert other.status == 400  # it was read
        async with gateway.http("a") as http, http.get("/v1/tenants/a") as other:
            assert other.status == 200


async def test_bodies_without_a_token_are_not_taken(fresh: LiveGateway) -> None:
    """Two dozen that announce 16 MiB, with a length or in chunks, to every route that takes a body."""
    routes = [
        *("/v1/session", "/v1/deployments", "/v1/revocations", "/v1/tenants/a/exec", "/v1/tenants/a/mcp"),
        *("/v1/tenants/a/tools/Read", "/v1/tenants/a/clone", "/v1/tenants/a/start"),
    ]
    with connections(fresh, 3 * len(routes)) as opened, growth(fresh) as grown:
        for number, one in enumerate(opened):
            path = routes[number % len(routes)]
            if number // len(routes) % 2:
                head = post(path, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
                await one.send(head + b"100000\r\n" + b'"' * 300_000)
            else:
                await one.send(post(path, 16 * MiB) + b'"' * 300_000)
        codes = {(await one.head())[9:12] for one in opened}
        assert codes <= {b"413", b"401"}
        assert grown() < 5 * MiB


async def test_deeply_nested_input_is_refused(gateway: LiveGateway) -> None:
    """What takes far more memory than its text is not kept for as long as a call."""
    nested = "[" + ",".join(["[]"] * 1000) + "]"
    async with gateway.wire("a") as wire:
        params = '{"name":"Bash","arguments":{"command":"sleep 60","x":' + nested + "}}"
        number, reply = wire.begin("tools/call", {})
        text = '{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":%s}'
        await wire.send(text % (number, params))
        with pytest.raises(RpcFailure) as caught:
            await asyncio.wait_for(reply, 20)
        assert caught.value.code == "invalid_params"


# --- time ------------------------------------------------------------------------------------------------


async def test_head_that_does_not_come_in_time_is_given_up(gateway: LiveGateway) -> None:
    """Not even where a byte comes now and then; a second request's is no better than a first's."""
    with connections(gateway, 4) as (silent, slow, second, kept):
        await slow.send(b"GET /healthz HTTP/1.1\r\n")
        await second.send(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await second.head()
        await second.send(b"GET /healthz HTTP/1.1\r\n")
        began = time.monotonic()

        async def drip() -> None:
            while True:
                await slow.send(b"X")
                await pause(0.2)

        dripping = asyncio.create_task(drip())
        await asyncio.gather(*(one.until_closed(15) for one in (silent, slow, second)))
        assert 1.5 < time.monotonic() - began < 10
        dripping.cancel()
        await kept.send(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await kept.until_closed(15)


async def test_body_that_does_not_come_is_given_up(gateway: LiveGateway) -> None:
    """Without a token it must be whole within that time; with one it must come at a kilobyte a second."""
    token = gateway.token("a")
    with connections(gateway, 3) as (anonymous, known, slow):
        await anonymous.send(post("/v1/session", 1000))
        body = orjson.dumps({"file_path": "x" * 40}) + b" " * 8000
        await known.send(post("/v1/tenants/a/tools/Read", len(body), token))
        await slow.send(post("/v1/tenants/a/tools/Read", len(body), token))

        async def drip(one: Raw) -> None:
            while True:
                await one.send(b" ")
                await pause(0.2)

        dripping = [asyncio.create_task(drip(one)) for one in (anonymous, slow)]
        for position in range(0, len(body), 1500):
            await known.send(body[position : position + 1500])
            await pause(0.6)
        assert (await known.head()).startswith(b"HTTP/1.1 200")
        for one in (anonymous, slow):
            assert (await one.head()).startswith(b"HTTP/1.1 504"), one
            await one.until_closed(15)
        for task in dripping:
            task.cancel()


async def test_answer_that_nobody_takes_is_cut(gateway: LiveGateway) -> None:
    async with gateway.wire("a") as wire:
        await wire.call("exec/start", command="head -c 6000000 /dev/zero | tr '\\\\0' a > big")
        ask = orjson.dumps({"command": "head -c 6000000 /dev/zero | tr '\\0' a"})
        with connections(gateway, 8) as opened:
            for one in opened:
                one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                await one.send(post("/v1/tenants/a/exec", len(ask), gateway.token("a")) + ask)
            await reaches(gateway, "bytes_in_flight", least=5 * MiB)
            await reaches(gateway, "bytes_in_flight", most=MiB)


# --- sockets ---------------------------------------------------------------------------------------------


async def test_strangers_never_take_a_customers_place(gateway: LiveGateway) -> None:
    """From one address and from many, more than all sockets there are."""
    async with contextlib.AsyncExitStack() as stack:
        strangers = [
            await stack.enter_async_context(gateway.raw("a", X_Forwarded_For=f"10.0.0.{number % 20}"))
            for number in range(60)
        ]
        assert await gauge(gateway, "connections_anonymous") <= 8
        for _ in range(12):
            wire = await stack.enter_async_context(
                gateway.raw("a", Authorization=f"Bearer {gateway.token('a')}")
            )
            await wire.call("initialize", **CLIENTS)
        async with gateway.wire("b") as wire:  # its token comes by initialize: it displaces one of them
            assert await wire.call("ping") == {}
        codes = [one.socket.close_code for one in strangers]
        assert codes.count(4429) >= 60 - 8


async def test_one_address_has_few_strangers(gateway: LiveGateway) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(gateway.raw("a", X_Forwarded_For="1.2.3.4, 10.0.0.1"))
        async with gateway.raw("a", X_Forwarded_For="9.9.9.9, 10.0.0.1") as wire:
            assert await wire.closed() == 4429
        async with gateway.raw("a", X_Forwarded_For="10.0.0.2") as wire:
            await wire.call("initialize", **CLIENTS, token=gateway.token("a"))
        async with gateway.raw("a", X_Forwarded_For="2001:db8::1") as wire:
            await wire.call("initialize", **CLIENTS, token=gateway.token("a"))


async def test_a_tenant_has_a_share_of_all_sockets(gateway: LiveGateway) -> None:
    """Websockets and event streams, whatever tokens they have."""
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(gateway.http("a"))
        for _ in range(2):
            stream = await stack.enter_async_context(http.get("/v1/events"))
            assert stream.status == 200
        for _ in range(10):
            await stack.enter_async_context(gateway.wire("a"))
        async with gateway.raw("a", Authorization=f"Bearer {gateway.token('*')}") as wire:
            assert await wire.closed() == 4429
        async with gateway.raw("a") as wire:
            with pytest.raises(RpcFailure) as caught:
                await wire.call("initialize", **CLIENTS, token=gateway.token("a"))
            assert caught.value.code == "rate_limited" and caught.value.data["retry_after"] > 0
            assert await wire.closed() == 4429
        async with http.get("/v1/events") as refused:
            assert refused.status == 429
        async with gateway.wire("b") as wire:
            assert await wire.call("ping") == {}
    async with gateway.wire("a") as wire:  # they are given back
        assert await wire.call("ping") == {}


async def test_first_message_is_small(gateway: LiveGateway) -> None:
    async with gateway.raw("a") as wire:
        with contextlib.suppress(ConnectionError):
            await wire.send(protocol.request(1, "initialize", {"token": "x" * 100_000}))
        assert await wire.closed() == 1009


# --- descriptors -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def scarce(folder: Path) -> AsyncIterator[LiveGateway]:
    """Give a gateway that may have 400 descriptors."""
    gateway = await local_gateway(folder, "a", "b")
    try:
        await gateway.start("prlimit", "--nofile=400:400")
        yield gateway
    finally:
        assert await gateway.stop() == 0


@pytest.mark.parametrize("said", [b"", post("/v1/session", 1000), post("/v1/tenants/a/tools/Read", 1000)])
async def test_connections_without_a_token_leave_descriptors_to_others(tmp_path: Path, said: bytes) -> None:
    """Three times as many as there are descriptors, silent or with a body that never comes."""
    async with scarce(tmp_path) as gateway:
        with connections(gateway, 2) as (first, second):
            await first.send(said)
            await second.send(said)
            with connections(gateway, 600) as many:
                for one in many:
                    await one.send(said)
                await first.until_closed(5)  # the oldest makes room
                for _ in range(3):
                    async with gateway.wire("a") as wire:
                        ran = await wire.call("exec/start", command="true")
                        await wire.call("exec/wait", exec=ran["exec"])
                many += [Raw(gateway) for _ in range(600)]
                async with gateway.http("a") as http, http.get("/v1/tenants/a") as answer:
                    assert answer.status == 200
                assert gateway.process is not None
                opened = len(list(Path(f"/proc/{gateway.process.pid}/fd").iterdir()))
                assert opened < 400 - 400 // 8


async def test_requests_at_once_are_a_share_of_the_descriptors(tmp_path: Path) -> None:
    """Whoever owes bodies under a token leaves descriptors to other tenants, however slow each is."""
    async with scarce(tmp_path) as gateway:
        token = gateway.token("a")
        with connections(gateway, 80) as many:
            for one in many:
                await one.send(post("/v1/tenants/a/tools/Read", 1000, token))
            refused = await many[-1].head()
            assert refused.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in refused.lower()
            async with gateway.http("b") as http, http.get("/v1/tenants/b") as answer:
                assert answer.status == 200


# --- which bytes are a request ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "framing",
    [
        ("HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked"),
        ("HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 5"),
        ("HTTP/1.1", "Content-Length: 5", "Content-Length: 6"),
        ("HTTP/1.1", "Content-Length: 5, 6"),
        ("HTTP/1.1", "Content-Length: +5"),
        ("HTTP/1.1", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("HTTP/1.1", "Transfer-Encoding: gzip, chunked"),
        ("HTTP/1.1", "Transfer-Encoding : chunked"),
        ("HTTP/1.0", "Transfer-Encoding: chunked"),
    ],
)
async def test_a_length_in_doubt_is_refused_and_ends_the_connection(
    gateway: LiveGateway, framing: tuple[str, ...]
) -> None:
    """Nothing that follows it is taken for a request (RFC 9112 §6.1, §6.3)."""
    version, *lines = framing
    head = "\r\n".join([f"POST /v1/session {version}", "Host: 127.0.0.1", *lines, "", ""])
    with connections(gateway, 1) as (one,):
        await one.send(head.encode() + b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        said = await one.until_closed(10)
    assert said.startswith(b"HTTP/1.1 400 ") and said.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("first", ["", "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", "trailers"])
async def test_a_head_over_64_kib_is_not_parsed_however_it_comes(gateway: LiveGateway, first: str) -> None:
    """Alone, behind another request in one piece, or as the trailers of a body."""
    many = "a: b\r\n" * (120_000 // 6)
    if first == "trailers":
        head = "POST /v1/session HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        attack = f"{head}0\r\n{many}\r\n"
    else:
        attack = f"{first}GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n{many}\r\n"
    with connections(gateway, 1) as (one,):
        await one.send(attack.encode() + b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        said = await one.until_closed(10)
    statuses = re.findall(rb"HTTP/1.1 (\d+) ", said)
    assert statuses == [b"200", b"400"][not first.startswith("GET") :], said


async def test_a_head_of_almost_64_kib_is_taken_in_whatever_pieces_it_comes(gateway: LiveGateway) -> None:
    head = b"GET /healthz?" + b"a" * 30_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: a="
    head += b"b" * 30_000 + b"\r\n\r\n"
    with connections(gateway, 2) as (whole, pieces):
        await whole.send(head + head)
        await pieces.send(head[:50_000])
        await pause(0.2)  # until it was read, which nothing shows
        await pieces.send(head[50_000:])
        for one in (whole, pieces):
            assert (await one.head()).startswith(b"HTTP/1.1 200 ")
