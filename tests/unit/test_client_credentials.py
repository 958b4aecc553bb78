"""The client's token from a function: when it is asked, what comes of a failure, how connections go on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import mcp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway import protocol
from gateway.auth import tokens
from gateway_client import Change, Client, Disconnected, TokenUnavailable, claude, credentials, errors, sync
from gateway_client.credentials import Credentials
from tests.live import EVERY_SCOPE, SECRET, LiveGateway, local_gateway
from tests.unit.test_client import Peer
from tests.unit.test_client import gateway as scripted
from tests.waits import until

DEADLINE = 20.0


def made(life: float, name: str = "") -> str:
    """Return what looks like a token that ends in so many seconds."""
    claims = base64.urlsafe_b64encode(json.dumps({"exp": time.time() + life, "n": name}).encode())
    return f"h.{claims.decode().rstrip('=')}.s"


def nothing() -> None:
    pass


class Supply:
    """A function that gives these, one after another, and the last again; errors are raised."""

    def __init__(self, *given: str | Exception) -> None:
        self.given = list(given)
        self.asked = 0
        self.threads: set[int] = set()

    def __call__(self) -> str:
        self.threads.add(threading.get_ident())
        found = self.given[min(self.asked, len(self.given) - 1)]
        self.asked += 1
        if isinstance(found, Exception):
            raise found
        return found


class Clock:
    """Both clocks of the credentials, which stand still."""

    def __init__(self) -> None:
        self.now = time.time()

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


# --- when it is asked --------------------------------------------------------------------------------


async def test_a_fixed_token_stays() -> None:
    fixed = Credentials("t0ken", nothing)
    assert (await fixed.current(), fixed.renewable, await fixed.after("t0ken")) == ("t0ken", False, None)


async def test_a_function_is_asked_once_for_all_and_not_in_the_loops_thread() -> None:
    supply = Supply(made(600))
    given = Credentials(supply, nothing)
    assert set(await asyncio.gather(*(given.current() for _ in range(5)))) == {supply.given[0]}
    assert supply.asked == 1 and threading.get_ident() not in supply.threads


async def test_an_asynchronous_function_is_asked_in_the_loop() -> None:
    async def supply() -> str:
        assert asyncio.get_running_loop() is loop
        return " t0ken\n"

    class Callable_:
        async def __call__(self) -> str:
            return await supply()

    loop = asyncio.get_running_loop()
    for way in (supply, Callable_(), lambda: supply()):
        assert await Credentials(way, nothing).current() == "t0ken"


@pytest.mark.parametrize(("life", "margin"), [(36000, 60), (300, 30), (3, 0.3)])
async def test_the_next_is_due_some_time_before_the_end(life: float, margin: float) -> None:
    """A tenth of its life, a minute at most, and up to twice that, so that clients do not come as one."""
    given = Credentials(Supply(made(life)), nothing)
    await given.current()
    assert life - 2 * margin - 1 < given.pause < life - margin
    assert len({round(one, 6) for one in [await _pause(life) for _ in range(5)]}) > 1


async def _pause(life: float) -> float:
    given = Credentials(Supply(made(life)), nothing)
    await given.current()
    return given.pause / life


async def test_while_the_next_is_asked_for_the_present_one_is_used() -> None:
    renewed = asyncio.Event()
    supply = Supply(made(600, "a"), made(600, "b"))
    given = Credentials(supply, renewed.set)
    first = await given.current()
    renewed.clear()
    given._due = time.time()
    assert await given.current() == first
    await asyncio.wait_for(renewed.wait(), DEADLINE)
    assert (await given.current(), supply.asked) == (supply.given[1], 2)


async def test_one_that_has_ended_is_not_given() -> None:
    supply = Supply(made(-1, "a"), made(600, "b"))
    given = Credentials(supply, nothing)
    assert [await given.current(), await given.current()] == supply.given


async def test_after_a_refusal_it_is_asked_once() -> None:
    supply = Supply("a", "b")
    given = Credentials(supply, nothing)
    assert await given.current() == "a"
    assert await given.after("a") == "b"
    assert (await given.after("a"), supply.asked) == ("b", 2)  # renewed meanwhile
    assert (await given.after("b"), supply.asked) == (None, 3)


async def test_the_gateways_clock_counts() -> None:
    """A client whose clock is an hour ahead does not take each token for one that has ended."""
    ahead = 3600
    supply = Supply(made(600 - ahead))
    given = Credentials(supply, nothing)
    token = await given.current()
    expires = time.time() + 600 - ahead
    given.learn(token, expires, formatdate(time.time() - ahead, usegmt=True))
    assert 600 - 2 * 60 - 2 < given.pause < 600 - 60 + 2
    assert [await given.current() for _ in range(3)] == [token] * 3 and supply.asked == 1


async def test_the_end_that_the_gateway_tells_counts_for_a_token_that_cannot_be_read() -> None:
    given = Credentials(Supply("opaque"), nothing)
    token = await given.current()
    assert given.pause == float("inf")
    given.learn("another", time.time() + 1, None)
    assert given.pause == float("inf")
    given.learn(token, time.time() + 100, None)
    assert 70 < given.pause < 95


# --- what fails --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (KeyError("TOKEN"), r"failed: KeyError: 'TOKEN'"),
        ("", "returned no token"),
        ("a\nb", "returned no token"),
        (None, "returned no token, but NoneType"),
        (b"t", "returned no token, but bytes"),
    ],
)
async def test_a_failure_says_what_it_was(given: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TokenUnavailable, match=said) as caught:
        await Credentials(Supply(given), nothing).current()
    assert isinstance(caught.value, errors.Unavailable)
    assert said.replace("\\", "") in caplog.text


async def test_one_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "TIMEOUT", 0.05)

    async def supply() -> str:
        await asyncio.Event().wait()
        return ""

    with pytest.raises(TokenUnavailable, match="took more than"):
        await Credentials(supply, nothing).current()


async def test_a_failure_ahead_of_the_end_is_tried_again_after_a_pause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    monkeypatch.setattr(credentials, "time", clock)
    last = made(600, "b")
    supply = Supply(made(60, "a"), *(OSError(n) for n in range(3)), last)
    given = Credentials(supply, nothing)
    await given.current()
    clock.now += given.pause
    pauses = []
    while given.token != last:
        assert given.pause == 0.0
        with contextlib.suppress(TokenUnavailable):
            await given.next()
        pauses.append(given.pause)
        clock.now += given.pause
    first = credentials.FIRST
    assert len(pauses) == 4
    assert all(0 < pause <= first * 2**n for n, pause in enumerate(pauses[:-1]))
    assert caplog.text.count("OSError") == 3


# --- over HTTP ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], supply: Any
) -> AsyncIterator[Client]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    async with asyncio.timeout(30), TestServer(app) as server:
        async with Client(str(server.make_url("/")), token=supply) as client:
            yield client


def answer(request: web.Request, good: str) -> web.Response | None:
    if request.headers["Authorization"] == f"Bearer {good}":
        return None
    return web.json_response({"code": "unauthorized", "detail": "this token has expired"}, status=401)


async def test_a_request_that_is_refused_is_asked_again_by_the_next_token() -> None:
    """Once; a body is sent again, too."""
    bodies = []

    async def handler(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.read())
        return answer(request, "b") or web.json_response({"tenants": []}, headers={"ETag": '"e"'})

    supply = Supply("a", "b")
    async with serving(handler, supply) as client:
        assert await client.tenants() == []
        client.credentials.token = "a"
        assert await client.tenant("shop").files.upload("x", b"body") == "e"
        assert bodies == [b"", b"", b"body", b"body"]
    async with serving(handler, Supply("a", "c", "b")) as client:
        with pytest.raises(errors.Unauthorized):
            await client.tenants()


async def test_over_http_the_gateways_clock_counts_too() -> None:
    ahead = 3600

    async def handler(request: web.Request) -> web.StreamResponse:
        date = formatdate(time.time() - ahead, usegmt=True)
        return web.json_response({"tenants": []}, headers={"Date": date})

    supply = Supply(*(made(600 - ahead, str(n)) for n in range(9)))
    async with serving(handler, supply) as client:
        for _ in range(4):
            assert await client.tenants() == []
    assert supply.asked == 1


async def test_what_is_read_but_once_is_not_sent_again() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        refused = answer(request, "b")
        assert refused is not None
        return refused

    async def body() -> AsyncIterator[bytes]:
        yield b"x"

    supply = Supply("a", "b")
    async with serving(handler, supply) as client:
        with pytest.raises(errors.Unauthorized):
            await client.tenant("shop").files.upload("x", body())
    assert supply.asked == 1


async def test_a_first_failure_is_told_at_once() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        raise AssertionError

    async with serving(handler, Supply(KeyError("TOKEN"))) as client:
        for work in (client.tenants(), client.tenant("shop").ping(), anext(client.events())):
            with pytest.raises(TokenUnavailable, match="TOKEN"):
                await work


# --- against a gateway -------------------------------------------------------------------------------

LIFE = 3


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of `LIFE` seconds are renewed a second before they end, so in time on a busy machine too."""
    monkeypatch.setattr(credentials, "SHARE", 0.4)


class Tokens:
    """Gives real tokens of a short life, and keeps them."""

    def __init__(self, life: int = LIFE, scopes: tuple[str, ...] = EVERY_SCOPE) -> None:
        self.life, self.scopes = life, scopes
        self.given: list[str] = []
        self.failing = False

    def __call__(self) -> str:
        if self.failing:
            raise ConnectionError("the tokens' service is away")
        self.given.append(tokens.issue(SECRET, "test", ["shop"], self.scopes, self.life))
        return self.given[-1]


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path_factory.mktemp("tokens"), "shop")
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0


def counting(seconds: int) -> str:
    """A command that prints a number each second; after so many it ends."""
    return f"for n in $(seq {seconds}); do echo $n; sleep 1; done"


@pytest.mark.usefixtures("early")
async def test_a_command_goes_on_through_the_ends_of_three_tokens(gateway: LiveGateway) -> None:
    """No byte is lost and no connection breaks; events, a watch and an idle connection go on too."""
    tokens, changes = Tokens(), list[Change]()
    seconds = 3 * LIFE + 1
    async with (
        asyncio.timeout(seconds + 40),
        Client(gateway.url, token=tokens, on_change=changes.append) as client,
    ):
        shop = client.tenant("shop")
        async with shop.exec("true") as short:  # its connection stays, idle
            await short.wait()
        async with (
            shop.files.watch() as watch,
            shop.events(types="file.written") as events,
            shop.exec(counting(seconds)) as run,
            shop.exec("cat", pty=(80, 24)) as terminal,
        ):
            connections = set(shop._connections._open)
            printed = await run.stdout.read()
            assert printed.split() == [b"%d" % (n + 1) for n in range(seconds)]
            assert ((await run.wait()).code, run.stdout.lost) == (0, 0)
            await terminal.write(b"still here\n")
            assert b"still here" in await anext(terminal.stdout)
            await shop.write("renewed.txt", "x")
            told = await anext(watch)
            assert any(path == "renewed.txt" for path, _ in told.changes) and not told.overflow
            assert (await anext(events)).data["path"] == "renewed.txt"
            assert connections <= shop._connections._open
        assert len(tokens.given) >= 4
    # an event stream has no other way than to come back, after its last event
    assert {change.state for change in changes if change.tenant == "shop"} <= {"connected", "closed"}
    assert all(change.error is None for change in changes if change.tenant == "shop")


@pytest.mark.usefixtures("early")
async def test_a_command_whose_output_waits_is_renewed_too(gateway: LiveGateway) -> None:
    """The gateway's answers stand behind output that nobody reads; the renewal itself does not."""
    tokens, changes, size = Tokens(), list[Change](), 32 << 20
    async with asyncio.timeout(60), Client(gateway.url, token=tokens, on_change=changes.append) as client:
        async with client.tenant("shop").exec(f"head -c {size} /dev/zero") as run:
            got = len(await anext(run.stdout))
            ends = time.time() + LIFE + 1  # tokens end by the wall clock
            await until(lambda: time.time() > ends and len(tokens.given) >= 3)
            got += len(await run.stdout.read())
            assert (got, run.stdout.lost, (await run.wait()).code) == (size, 0, 0)
    assert "reconnecting" not in {change.state for change in changes}


@pytest.mark.usefixtures("early")
async def test_without_asyncio_it_is_the_same(gateway: LiveGateway) -> None:
    tokens, changes = Tokens(), list[Change]()

    def work() -> bytes:
        with sync.Client(gateway.url, token=tokens, on_change=changes.append) as client:
            with client.tenant("shop").exec(counting(LIFE + 1)) as run:
                return b"".join(run.stdout)

    printed = await asyncio.to_thread(work)
    assert printed.split() == [b"%d" % (n + 1) for n in range(LIFE + 1)]
    assert len(tokens.given) >= 2
    assert "reconnecting" not in {change.state for change in changes}


@pytest.mark.usefixtures("early")
async def test_an_agents_calls_outlast_their_tokens(gateway: LiveGateway) -> None:
    """By the adapter for Claude's Agent SDK: results, and what is printed while they run."""
    tokens, heard = Tokens(), dict[str, bytes]()

    def on_output(printed: claude.Printed) -> None:
        heard[printed.call] = heard.get(printed.call, b"") + printed.data

    async with asyncio.timeout(60), Client(gateway.url, token=tokens) as client:
        async with mcp.Client(claude.server(client.tenant("shop"), on_output=on_output)) as host:
            for call, seconds in (("toolu_1", LIFE + 1), ("toolu_2", 1)):
                meta: Any = {"claudecode/toolUseId": call}
                said = await host.call_tool("Bash", {"command": counting(seconds)}, meta=meta)
                assert isinstance(said.content[0], mcp.types.TextContent)
                numbers = [str(n + 1) for n in range(seconds)]
                assert said.content[0].text.split() == heard[call].decode().split() == numbers
    assert len(tokens.given) >= 3


@pytest.mark.usefixtures("early")
async def test_a_failing_function_is_told_and_the_connection_stands_until_the_end(
    gateway: LiveGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """Then it is a break like any other: what ran goes on once there is a token again."""
    tokens, changes = Tokens(), list[Change]()
    failed, broken = asyncio.Event(), asyncio.Event()
    command = "echo begun; until [ -e go-on ]; do sleep 0.05; done; echo went on"

    def changed(change: Change) -> None:
        changes.append(change)
        if isinstance(change.error, TokenUnavailable):
            (failed if change.state == "connected" else broken).set()

    async with asyncio.timeout(60), Client(gateway.url, token=tokens, on_change=changed) as client:
        shop = client.tenant("shop")
        async with shop.exec(command) as run:
            printed = await anext(run.stdout)
            tokens.failing = True
            await failed.wait()
            await shop.ping()
            await broken.wait()
            tokens.failing = False
            await shop.write("go-on", "")
            printed += await run.stdout.read()
        assert printed == b"begun\nwent on\n"
    assert "the tokens' service is away" in caplog.text
    assert SECRET not in caplog.text and not any(token in caplog.text for token in tokens.given)


async def test_a_renewal_for_which_there_is_no_room_is_asked_again() -> None:
    """Unless there is a newer token by then: an older one must not take its place."""
    said: list[str] = []
    over = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("ping")
        await peer.reply(number, {})
        for token in ("b", "b", "c"):
            number, params = await peer.expect("session/renew")
            said.append(params["token"])
            assert params == {"token": token}
            if len(said) < 3:
                full = protocol.error_reply(number, -32018, "full", "rate_limited", {"retry_after": 0.01})
                await peer.socket.send(full)
            else:
                await peer.reply(number, {"expires": 0, "scopes": []})
        over.set()
        number, _ = await peer.expect("session/end")
        await peer.reply(number, {})
        await peer.socket.wait_closed()

    async with scripted(script) as shop:
        await shop.ping()
        (connection,) = shop._connections._open
        connection.renew("b", lambda error: None)
        await until(lambda: len(said) == 2, every=0)
        connection.renew("c", lambda error: None)
        await over.wait()


async def test_a_revoked_token_is_replaced_once(gateway: LiveGateway) -> None:
    source = Tokens(600)
    async with (
        asyncio.timeout(60),
        Client(gateway.url, token=gateway.token("*", scopes=("admin",))) as admin,
        Client(gateway.url, token=source) as client,
    ):
        shop = client.tenant("shop")
        async with shop.exec("read line; echo $line", stdin=True) as run:
            await admin.revoke(tokens.verify(SECRET, source.given[0]).id)
            await shop.ping()
            await run.write(b"goes on\n")
            assert await run.stdout.read() == b"goes on\n"
        assert len(source.given) == 2


async def test_a_token_that_is_revoked_and_given_again_is_refused(gateway: LiveGateway) -> None:
    token = tokens.issue(SECRET, "test", ["shop"], EVERY_SCOPE, 600)
    async with (
        asyncio.timeout(60),
        Client(gateway.url, token=gateway.token("*", scopes=("admin",))) as admin,
        Client(gateway.url, token=lambda: token) as client,
    ):
        shop = client.tenant("shop")
        async with shop.exec("sleep 60") as run:
            await admin.revoke(tokens.verify(SECRET, token).id)
            with pytest.raises(errors.Unauthorized):
                await run.wait()
            with pytest.raises(errors.Unauthorized):
                await shop.ping()


@pytest.mark.usefixtures("early")
async def test_without_retry_a_tokens_end_is_seamless_too(gateway: LiveGateway) -> None:
    """What is renewed in time needs no coming back."""
    async with asyncio.timeout(60), Client(gateway.url, token=Tokens(), retry=None) as client:
        async with client.tenant("shop").exec(counting(LIFE + 1)) as run:
            assert (await run.stdout.read()).split()[-1] == b"%d" % (LIFE + 1)


async def test_a_fixed_tokens_end_is_told(gateway: LiveGateway) -> None:
    async with asyncio.timeout(60), Client(gateway.url, token=Tokens(2)()) as client:
        shop = client.tenant("shop")
        async with shop.events() as events, shop.exec("sleep 60") as run:
            with pytest.raises(errors.Unauthorized, match="expired"):
                await run.wait()
            with pytest.raises(errors.Unauthorized, match="expired"):
                while True:
                    await anext(events)


@pytest.mark.usefixtures("early")
async def test_fewer_scopes_end_a_command_with_the_reason(gateway: LiveGateway) -> None:
    tokens = Tokens()
    async with asyncio.timeout(60), Client(gateway.url, token=tokens) as client:
        async with client.tenant("shop").exec("sleep 60") as run:
            tokens.scopes = ("files:read",)
            with pytest.raises(errors.Forbidden, match="does not allow"):
                await run.wait()


async def test_an_earlier_gateway_is_served_without_a_word(
    gateway: LiveGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that does not know `session/renew` says `not_found`, and closes no socket for its token's end."""
    old = await local_gateway(tmp_path, "shop")
    strip = "from gateway import protocol as p; p.METHODS.pop('session/renew')"
    (tmp_path / "sitecustomize.py").write_text(strip)
    old.environment["PYTHONPATH"] = str(tmp_path)
    await old.start()
    tokens = Tokens(600)
    try:
        async with asyncio.timeout(60), Client(old.url, token=tokens) as client:
            shop = client.tenant("shop")
            await shop.ping()
            with caplog.at_level(logging.WARNING):
                await client.credentials.next()
                await shop.ping()
                assert len(tokens.given) == 2 and "renewed" not in caplog.text
    finally:
        assert await old.stop() == 0


def test_the_failure_is_one_that_may_pass() -> None:
    assert issubclass(TokenUnavailable, errors.Unavailable) and not issubclass(TokenUnavailable, Disconnected)


async def test_a_token_may_come_with_the_line_end_of_its_file() -> None:
    assert await Credentials(" abc.def\r\n", lambda: None).current() == "abc.def"
    with pytest.raises(ValueError, match="no token"):
        Credentials("abc\ndef", lambda: None)
