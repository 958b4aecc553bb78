"""The parts of a relay, each alone: bodies that are sent again, what peers tell, what is said in a tunnel."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from starlette.types import Receive, Scope, Send
from websockets.frames import Opcode
from websockets.protocol import Protocol, Side, State

from gateway.api.http import at_the_edge
from gateway.cluster.peers import MOST, Known, MemberAway, Peer, apply, lines
from gateway.cluster.relay import NOT_HOME, PART, RELAYED, Body, as_client, client_of, passed_on, relay
from gateway.settings import Settings
from gateway.transport.http1 import ABORT
from gateway.transport.tunnel import close_frame, text_frame
from gateway.transport.websocket import Lengths

# --- a request's body -----------------------------------------------------------------------------------


def asked(
    *parts: bytes, headers: Sequence[tuple[bytes, bytes]] = ((b"transfer-encoding", b"chunked"),)
) -> Body:
    """Return the body of a request that sends these parts, and then no more than it must."""
    left = list(parts)

    async def receive() -> Any:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
        return await asyncio.get_running_loop().create_future()

    return Body({"type": "http", "headers": headers}, receive)


async def read(body: Body, most: int = 1000) -> list[bytes]:
    found: list[bytes] = []
    parts = body.parts()
    if parts is not None:
        async for part in parts:
            found.append(part)
            if len(found) == most:
                break
    return found


async def test_a_body_comes_again_from_its_beginning() -> None:
    body = asked(b"one", b"two", b"three")
    assert await read(body, 2) == [b"one", b"two"]
    assert await read(body) == [b"one", b"two", b"three"] == await read(body)


async def test_of_two_readers_the_one_that_was_given_up_takes_nothing_away() -> None:
    coming: asyncio.Queue[Any] = asyncio.Queue()
    body = Body({"type": "http", "headers": [(b"content-length", b"2")]}, coming.get)
    first = asyncio.create_task(read(body))
    await asyncio.sleep(0)  # it waits for the first part
    second = asyncio.create_task(read(body))
    for part, more in ((b"a", True), (b"b", False)):
        coming.put_nowait({"type": "http.request", "body": part, "more_body": more})
    assert await first == await second == [b"a", b"b"]


async def test_a_body_of_which_more_came_than_is_kept_is_lost() -> None:
    body = asked(bytes(60_000), bytes(60_000), b"end")
    assert await read(body) == [bytes(60_000), bytes(60_000), b"end"]
    assert body.lost
    with pytest.raises(ConnectionResetError):
        await read(body)


async def test_a_client_that_goes_breaks_its_body_off() -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    body = Body({"type": "http", "headers": [(b"content-length", b"5")]}, receive)
    with pytest.raises(ConnectionResetError):
        await read(body)


async def test_a_request_without_a_body_has_none() -> None:
    for headers in ([], [(b"content-length", b"0")]):
        assert asked(headers=headers).parts() is None


# --- an answer ------------------------------------------------------------------------------------------


class Plain(Peer):
    """A peer without TLS."""

    @property
    def url(self) -> str:
        return f"http://{self.address}"


Serves = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def relayed(serves: Serves, method: str) -> tuple[list[Any], bool]:
    """Pass a request on to a peer; return what its client is sent, and whether it is cut off."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    gone = asyncio.Event()
    scope: dict[str, Any] = {
        "type": "http",
        "method": method,
        "raw_path": b"/",
        "query_string": b"",
        "headers": [],
    }
    scope["state"] = {ABORT: gone.set}
    peer = Plain("other")
    peer.tls = ssl.create_default_context()
    peer.hear()
    try:
        async with (
            asyncio.timeout(30),
            await asyncio.start_server(serves, "127.0.0.1", 0) as server,
            aiohttp.ClientSession() as session,
        ):
            peer.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            peers: Any = SimpleNamespace(session=session)
            body = Body(scope, receive)
            await relay(scope, receive, send, peers, peer, body=body, client="http 192.0.2.7", patience=10)
    finally:
        peer.end()
    return sent, gone.is_set()


@pytest.mark.parametrize(
    ("said", "bodies"),
    [
        (b"Content-Length: 5\r\n\r\nhello", [(b"hello", False)]),
        (b"Content-Length: 0\r\n\r\n", [(b"", False)]),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", [(b"hello", False)]),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", [(b"hello", True)]),
        (b"Content-Length: 9\r\n\r\nhello", [(b"hello", True)]),
    ],
)
async def test_a_short_answer_ends_with_its_only_part(said: bytes, bodies: list[tuple[bytes, bool]]) -> None:
    """And one that breaks off does not end."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + said)
        writer.close()

    sent, cut = await relayed(answer, "POST")
    assert [(message["body"], message["more_body"]) for message in sent[1:]] == bodies
    assert cut == bodies[-1][1]


@pytest.mark.parametrize(("method", "times"), [("GET", 5), ("HEAD", 5), ("GET", 1000), ("POST", 1)])
async def test_a_peer_that_hangs_up_is_asked_again_for_what_only_reads(
    monkeypatch: pytest.MonkeyPatch, method: str, times: int
) -> None:
    """As it does where it ends just then: who takes its place answers, and it is not told as away."""
    asked = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"\r\n\r\n")
        asked += 1
        if asked > times:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    if times == 1000:
        monkeypatch.setattr("gateway.cluster.relay._PATIENCE", 0.3)
        with pytest.raises(MemberAway):
            await relayed(answer, method)
        return
    sent, cut = await relayed(answer, method)
    if method == "POST":
        assert (sent, cut) == ([], True)
    else:
        assert (sent[0]["status"], cut) == (200, False)
    assert asked == times + (method != "POST")


# --- its head -------------------------------------------------------------------------------------------


def test_what_concerns_one_connection_is_not_passed_on() -> None:
    """Nor what a client says of itself that only a proxy or a peer may say."""
    scope = {
        "scheme": "http",
        "headers": [
            (b"host", b"gateway.example"),
            (b"connection", b"keep-alive"),
            (b"transfer-encoding", b"chunked"),
            (b"x-forwarded-for", b"192.0.2.9"),
            (b"x-gateway-relayed", b"https 192.0.2.9"),
            (b"authorization", b"Bearer x"),
        ],
    }
    told = client_of(scope, "2001:db8::1")
    found = list(passed_on(scope, told))
    assert [name for name, _ in found] == ["host", "authorization", "x-gateway-relayed"]
    assert found[-1][1] == "http 2001:db8::1"
    home = {"scheme": "https", "client": ("10.0.0.1", 5), "server": ("10.0.0.2", 6)}
    seen = as_client({**home, "headers": [(b"x-gateway-relayed", told.encode()), (b"host", b"h")]}, told)
    assert (seen["scheme"], seen["client"], seen["server"]) == ("http", ("2001:db8::1", 0), None)
    assert seen["headers"] == [(b"host", b"h")]


# --- what peers tell ------------------------------------------------------------------------------------


def test_what_is_told_leads_from_one_state_to_the_next() -> None:
    before = {f"t{number}": Known(f"t{number}") for number in range(250)}
    now = {name: known for name, known in before.items() if name not in ("t1", "t2")}
    now["t3"] = Known("t3", "shop.example.com", "running", False, "id", "2026-11-28T00:00:00Z")
    told = dict(before)
    for line in lines(before, now):
        assert len(line["tenants"]) <= 100 and len(line["gone"]) <= 100
        apply(line, told)
    assert told == now
    assert list(lines(now, now)) == []
    everything: dict[str, Known] = {}
    assert [apply(line, everything) for line in lines({}, now)] == [True, True, True]
    assert everything == now


@pytest.mark.parametrize(
    "line",
    [
        {"tenants": "x"},
        {"tenants": [{"name": 1, "status": "running", "asleep": False}]},
        {"tenants": [{"name": "x" * 1000, "status": "running", "asleep": False}]},
        {"tenants": [{"name": "x", "status": "running", "asleep": False, "domain": 7}]},
    ],
)
def test_what_is_no_tenant_is_refused(line: Any) -> None:
    with pytest.raises(ValueError, match="not"):
        apply(line, {})


def test_a_peer_cannot_tell_of_more_tenants_than_are_kept() -> None:
    found: dict[str, Known] = {}
    for start in range(0, MOST + 200, 100):
        names = range(start, start + 100)
        apply({"tenants": [Known(f"t{number}").to_dict() for number in names]}, found)
    assert len(found) == MOST


# --- what is said in a tunnel ---------------------------------------------------------------------------


def server_frames(*messages: bytes) -> bytes:
    wire = Protocol(Side.SERVER, state=State.OPEN)
    for message in messages:
        wire.send_binary(message)
    return b"".join(wire.data_to_send())


@pytest.mark.parametrize("size", [0, 1, 125, 126, 70_000])
@pytest.mark.parametrize("step", [1, 3, 1000, 1 << 20])
def test_where_a_frame_ends_is_found_however_it_comes(size: int, step: int) -> None:
    one, two = server_frames(bytes(size)), server_frames(b"next")
    frames, rest = Lengths(1 << 62), b""
    for start in range(0, len(one + two), step):
        part = (one + two)[start : start + step]
        if start < len(one):
            for _ in frames.feed(part[:1]):
                pass
            taken = 1 + frames.finish(part[1:])
            assert frames.between == (start + taken == len(one))
            rest += part[taken:]
            if frames.between:
                rest += (one + two)[start + step :]
                break
    assert frames.between and rest == two and not frames.closed


def test_what_the_gateway_says_are_frames_of_a_server() -> None:
    client = Protocol(Side.CLIENT, state=State.OPEN)
    client.receive_data(text_frame("x" * 300) + close_frame(1013, "later"))
    text, close = client.events_received()
    assert (text.opcode, text.data, close.opcode) == (Opcode.TEXT, b"x" * 300, Opcode.CLOSE)  # type: ignore[union-attr]
    assert client.close_rcvd is not None
    assert (client.close_rcvd.code, client.close_rcvd.reason) == (1013, "later")
    frames = Lengths(1 << 62)
    for _ in frames.feed(text_frame("x") + close_frame(1012, "")):
        pass
    assert frames.closed and frames.between


# --- headers of gateways ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [PART, RELAYED, NOT_HOME, "x-gateway-uri", "x-gateway-new"])
@pytest.mark.parametrize("path", ["/v1/events", "/v1/preview", "/v1/tenants/a/ws"])
async def test_headers_of_gateways_count_for_nothing_from_clients(name: str, path: str) -> None:
    """They come by the peers' own listener; Caddy alone may tell what it was asked for, from this machine."""
    seen = list[Scope]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def nothing(message: Any = None) -> Any:
        return {"type": "http.request"}

    public = at_the_edge(app, Settings(hosts=("gateway.test",)))
    for client in ("192.0.2.1", "127.0.0.1"):
        headers = [(b"host", b"gateway.test"), (name.encode(), b"1"), (b"x-other", b"1")]
        asked: Scope = {"type": "http", "path": path, "client": (client, 1), "headers": headers}
        await public({**asked, "raw_path": path.encode(), "query_string": b""}, nothing, nothing)
    for scope in seen:
        by_caddy = name == "x-gateway-uri" and path == "/v1/preview" and scope["client"][0] == "127.0.0.1"
        assert [key for key, _ in scope["headers"]] == [
            *(b"host", *([name.encode()] if by_caddy else []), b"x-other")
        ]
    assert len(seen) == 2
