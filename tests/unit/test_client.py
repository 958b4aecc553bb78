"""The client against a scripted gateway: one websocket per command, pressure, typed failures."""

from __future__ import annotations

import asyncio
import contextlib
import http
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from gateway import protocol
from gateway.errors import WIRE_CODES, Conflict, StaleRead
from gateway.protocol import StreamId
from gateway_client import Change, Client, Disconnected, Exit, Killed, Tenant, errors
from gateway_client.attachment import WINDOW
from gateway_client.connection import Address
from gateway_client.output import BUFFER
from gateway_client.retry import Patience, Retry
from tests.waits import until


class Peer:
    """The gateway's end of one websocket, spoken by hand."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket

    async def expect(self, method: str) -> tuple[int, dict[str, Any]]:
        """Return id and parameters of the next message, which must be a call of `method`."""
        text = await self.socket.recv()
        message = orjson.loads(text)
        assert message["method"] == method
        return message.get("id", 0), message["params"]

    async def reply(self, number: int, result: dict[str, Any]) -> None:
        await self.socket.send(protocol.result(number, result))

    async def initialize(self) -> dict[str, Any]:
        number, params = await self.expect("initialize")
        await self.reply(number, {"protocol": 1})
        return params

    async def start(self, channel: int = 1) -> dict[str, Any]:
        number, params = await self.expect("exec/start")
        answer = {"exec": params["execId"], "channel": channel, "pid": 42, "startedAt": "now"}
        await self.reply(number, answer)
        return params

    async def output(self, data: bytes, stream: StreamId = StreamId.STDOUT, channel: int = 1) -> None:
        await self.socket.send(protocol.pack_frame(stream, channel, data))

    async def exited(self, exec: str, code: int | None = 0, reason: str = "exited", **more: Any) -> None:
        body = {"exec": exec, "exitCode": code, "signal": None, "reason": reason, "durationMs": 5, **more}
        await self.socket.send(protocol.notification("exec/exited", body))


Script = Callable[[Peer], Awaitable[None]]


@contextlib.asynccontextmanager
async def gateway(
    *scripts: Script, refuse: Response | None = None, retry: Retry | None = None, **more: Any
) -> AsyncIterator[Tenant]:
    """Serve one script per connection, in order; give a tenant of a client. Scripts must end well."""
    left = iter(scripts)
    done: list[asyncio.Future[None]] = []

    async def handle(socket: ServerConnection) -> None:
        finished = asyncio.get_running_loop().create_future()
        done.append(finished)
        try:
            await next(left)(Peer(socket))
            finished.set_result(None)
        except BaseException as error:
            finished.set_exception(error)

    async def check(socket: ServerConnection, request: Request) -> Response | None:
        assert request.path == "/v1/tenants/shop/ws"
        assert request.headers["Authorization"] == "Bearer t0ken"
        return refuse

    async with asyncio.timeout(30):
        async with serve(
            handle,
            "127.0.0.1",
            0,
            process_request=check,
            subprotocols=[Subprotocol(protocol.SUBPROTOCOL)],
            max_size=None,
            compression=None,
            close_timeout=1,
        ) as server:
            port = server.sockets[0].getsockname()[1]
            async with Client(f"http://127.0.0.1:{port}", token="t0ken", retry=retry, **more) as client:
                yield client.tenant("shop")
            await asyncio.gather(*done)
    assert len(done) == len(scripts)


# --- calls -------------------------------------------------------------------------------------------


async def test_a_tool_call_has_the_contracts_shape() -> None:
    async def script(peer: Peer) -> None:
        params = await peer.initialize()
        protocol.validate(protocol.Initialize, params)
        # named, so that it outlasts a broken connection
        assert params.pop("session").startswith("client-")
        assert params == {"client": {"name": "gateway_client", "version": "1"}, "readBeforeWrite": False}
        number, params = await peer.expect("tools/call")
        assert params == {"name": "Read", "arguments": {"file_path": "a"}, "callId": "c1"}
        content = [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}]
        await peer.reply(number, {"content": content, "isError": False, "structuredContent": {"n": 1}})

    async with gateway(script) as shop:
        result = await shop.tool("Read", {"file_path": "a"}, call_id="c1")
    assert (result.text, result.is_error, result.structured) == ("one\ntwo", False, {"n": 1})


@pytest.mark.parametrize(
    ("call", "name", "arguments"),
    [
        (lambda t: t.read("a", offset=2), "Read", {"file_path": "a", "offset": 2}),
        (lambda t: t.write("a", "x"), "Write", {"file_path": "a", "content": "x"}),
        (lambda t: t.edit("a", "x", "y"), "Edit", {"file_path": "a", "old_string": "x", "new_string": "y"}),
        (lambda t: t.glob("*.py"), "Glob", {"pattern": "*.py"}),
        (
            lambda t: t.grep("x", ignore_case=True, line_numbers=False, before=1, type="py"),
            "Grep",
            {"pattern": "x", "-i": True, "-n": False, "-B": 1, "type": "py"},
        ),
        (lambda t: t.kill_shell("s1"), "KillShell", {"shell_id": "s1"}),
    ],
)
async def test_typed_tools_use_claudes_inputs(
    call: Callable[[Tenant], Awaitable[object]], name: str, arguments: dict[str, Any]
) -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        number, params = await peer.expect("tools/call")
        assert params.pop("callId")
        assert params == {"name": name, "arguments": arguments}
        await peer.reply(number, {"content": [{"type": "text", "text": "ok"}], "isError": False})

    async with gateway(script) as shop:
        await call(shop)


async def test_a_typed_tool_that_fails_raises_its_own_class() -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("tools/call")
        content = [{"type": "text", "text": "read it first"}]
        structured = {"code": "stale_read", "etag": "e"}
        await peer.reply(number, {"content": content, "isError": True, "structuredContent": structured})

    async with gateway(script) as shop:
        with pytest.raises(StaleRead, match="read it first") as caught:
            await shop.edit("a", "x", "y")
    assert caught.value.facts == {"etag": "e"}


async def test_calls_run_at_once_and_answers_find_their_call() -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        calls = [await peer.expect("tools/call") for _ in range(3)]
        for number, params in reversed(calls):
            text = params["arguments"]["file_path"]
            await peer.reply(number, {"content": [{"type": "text", "text": text}], "isError": False})

    async with gateway(script) as shop:
        results = await asyncio.gather(*(shop.read(name) for name in "abc"))
    assert [result.text for result in results] == ["a", "b", "c"]


async def test_an_error_answer_is_the_typed_error() -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("ping")
        facts = {"etag": "e1", "message": "odd", "self": "odder"}
        await peer.socket.send(protocol.error_reply(number, -32004, "no", "conflict", facts))

    async with gateway(script) as shop:
        with pytest.raises(Conflict, match="no") as caught:
            await shop.ping()
    assert caught.value.facts["etag"] == "e1"


@pytest.mark.parametrize("code", WIRE_CODES)
def test_every_wire_code_has_its_class(code: str) -> None:
    error = errors.from_wire(code, "m", {"fact": 1})
    assert (error.code, error.message, error.facts) == (code, "m", {"fact": 1})
    assert type(error) is not Disconnected


def test_an_unknown_code_is_still_a_gateway_error() -> None:
    assert type(errors.from_wire("brand_new", "m")) is errors.GatewayError


async def test_a_cancelled_call_is_cancelled_in_the_gateway() -> None:
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("tools/call")
        asked.set()
        _, params = await peer.expect("$/cancelRequest")
        assert params == {"id": number}
        number, _ = await peer.expect("ping")  # and the connection serves on
        await peer.reply(number, {})

    async with gateway(script) as shop:
        call = asyncio.ensure_future(shop.tool("Bash", {"command": "sleep 9"}))
        await asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await shop.ping()


# --- refusals and breaks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (4401, errors.Unauthorized),
        (4403, errors.Forbidden),
        (4404, errors.NotFound),
        (4429, errors.RateLimited),
        (1012, errors.Unavailable),
        (1009, errors.TooLarge),
        (1011, Disconnected),
    ],
)
async def test_a_close_code_is_its_error(code: int, kind: type[errors.GatewayError]) -> None:
    async def script(peer: Peer) -> None:
        await peer.expect("initialize")
        await peer.socket.close(code, "the reason")

    async with gateway(script) as shop:
        with pytest.raises(kind, match="the reason") as caught:
            await shop.ping()
    assert type(caught.value) is kind


async def test_a_refused_handshake_is_the_problem_in_its_body() -> None:
    body = orjson.dumps({"title": "Not Found", "detail": "no tenant shop", "code": "not_found", "x": 1})
    refuse = Response(http.HTTPStatus.NOT_FOUND, "Not Found", Headers(), body)
    async with gateway(refuse=refuse) as shop:
        with pytest.raises(errors.NotFound, match="no tenant shop") as caught:
            await shop.ping()
    assert caught.value.facts == {"x": 1}


async def test_nobody_there_is_disconnected() -> None:
    async with Client("http://127.0.0.1:9", token="t") as client:
        with pytest.raises(Disconnected):
            await client.tenant("shop").ping()
        with pytest.raises(Disconnected):
            await client.tenants()


async def test_a_broken_connection_fails_what_waits_and_the_next_call_opens_another() -> None:
    async def broken(peer: Peer) -> None:
        await peer.initialize()
        await peer.expect("tools/call")
        peer.socket.transport.abort()

    async def good(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("ping")
        await peer.reply(number, {})

    async with gateway(broken, good) as shop:
        with pytest.raises(Disconnected):
            await shop.tool("Read", {})
        await shop.ping()


async def test_a_server_that_speaks_something_else_is_left() -> None:
    async def script(peer: Peer) -> None:
        await peer.expect("initialize")
        await peer.socket.send("hello")
        await peer.socket.wait_closed()

    async with gateway(script) as shop:
        with pytest.raises(errors.InvalidParams, match=r"not gateway\.v1"):
            await shop.ping()


# --- coming back -------------------------------------------------------------------------------------

READING = {"acks": True, "window": WINDOW}
SOON = Retry(first=0.01, most=0.05, patience=5)


def test_pauses_double_up_to_a_limit_and_end() -> None:
    patience = Patience(Retry(first=1, most=8, patience=0.05))
    assert patience.pause() == 0
    assert 0 < (patience.pause() or 0) <= 0.05
    patience = Patience(Retry(first=1, most=8, patience=1000))
    pauses = [patience.pause() or 0 for _ in range(9)]
    for pause, longest in zip(pauses, (0, 1, 2, 4, 8, 8, 8, 8, 8), strict=True):
        assert longest / 2 <= pause <= longest
    patience.restore()
    assert patience.pause() == 0
    assert Patience(None).pause() is None
    over = Patience(Retry(patience=-1))
    assert (over.pause(), over.pause()) == (0, None)


async def test_a_tool_call_is_asked_again_under_its_id_and_in_its_session() -> None:
    seen: list[tuple[str, str]] = []

    async def broken(peer: Peer) -> None:
        params = await peer.initialize()
        _, call = await peer.expect("tools/call")
        seen.append((params["session"], call["callId"]))
        peer.socket.transport.abort()

    async def good(peer: Peer) -> None:
        params = await peer.initialize()
        number, call = await peer.expect("tools/call")
        seen.append((params["session"], call["callId"]))
        await peer.reply(number, {"content": [{"type": "text", "text": "once"}], "isError": False})

    async with gateway(broken, broken, good, retry=SOON) as shop:
        assert (await shop.read("a")).text == "once"
    assert len(set(seen)) == 1 and len(seen) == 3


async def test_what_must_not_be_asked_twice_is_not() -> None:
    async def broken(peer: Peer) -> None:
        await peer.initialize()
        await peer.expect("files/write")
        peer.socket.transport.abort()

    async with gateway(broken, retry=SOON) as shop:
        with pytest.raises(Disconnected):
            await shop.files.write("a", "b")


async def test_an_answer_that_says_unavailable_is_an_answer() -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("tools/call")
        await peer.socket.send(protocol.failure(number, errors.Unavailable("Incus is away")))

    async with gateway(script, retry=SOON) as shop:
        with pytest.raises(errors.Unavailable, match="Incus is away"):
            await shop.read("a")


async def test_the_state_is_told_while_it_changes_and_at_last_it_gives_up() -> None:
    told: list[tuple[str | None, str]] = []

    def on_change(change: Change) -> None:
        told.append((change.tenant, change.state))

    async def draining(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("ping")
        await peer.reply(number, {})
        await peer.expect("ping")
        await peer.socket.close(1012, "draining")

    async def drained(peer: Peer) -> None:
        await peer.socket.close(1012, "draining")

    async def again(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("ping")
        await peer.reply(number, {})
        await peer.expect("ping")
        assert shop.state == "connected"
        peer.socket.transport.abort()

    async def refusing(peer: Peer) -> None:
        await peer.socket.close(1013, "Incus does not answer")

    few = Retry(first=0.01, most=0.02, patience=0)
    async with gateway(draining, drained, again, refusing, retry=SOON, on_change=on_change) as shop:
        assert shop.state == "idle"
        await shop.ping()
        await shop.ping()  # asked again after the gateway has come back
        shop._http.retry = few
        with pytest.raises(Disconnected, match="Incus does not answer"):
            await shop.ping()
        assert shop.state == "idle"
    states = [state for tenant, state in told if tenant == "shop"]
    assert states[:4] == ["connected", "reconnecting", "reconnecting", "connected"]
    assert states[-2:] == ["idle", "closed"] and "reconnecting" in states[4:]


async def test_a_command_of_text_stays_so_over_a_break() -> None:
    async def first(peer: Peer) -> None:
        await peer.initialize()
        number, params = await peer.expect("exec/start")
        assert protocol.validate(protocol.ExecStart, params).encoding == "utf-8"
        answer = {"exec": params["execId"], "channel": 1, "pid": 1, "startedAt": "", "attachment": "a-1"}
        await peer.reply(number, answer)
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.initialize()
        number, params = await peer.expect("exec/attach")
        assert protocol.validate(protocol.ExecAttach, params).encoding == "utf-8"
        answer = {"channel": 1, "from": params["from"], "lost": {"stdout": 0, "stderr": 0}}
        await peer.reply(number, {**answer, "state": "running", "attachment": "a-2", "stdin": 0})
        await peer.exited("e1")

    async with gateway(first, second, retry=SOON) as shop:
        async with shop.exec("x", exec_id="e1", encoding="utf-8") as run:
            assert (await run.wait()).code == 0


async def test_a_command_goes_on_where_it_stood_in_output_and_input() -> None:
    async def first(peer: Peer) -> None:
        await peer.initialize()
        number, params = await peer.expect("exec/start")
        answer = {"exec": params["execId"], "channel": 1, "pid": 1, "startedAt": "", "attachment": "a-1"}
        await peer.reply(number, answer)
        await peer.output(b"abc")
        await peer.output(b"e", StreamId.STDERR)
        frame = protocol.unpack_frame(bytes(await peer.socket.recv(decode=False)))
        assert frame.data == b"input"
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.initialize()
        number, params = await peer.expect("exec/attach")
        protocol.validate(protocol.ExecAttach, params)
        assert params == {"exec": "e1", "from": {"stdout": 3, "stderr": 1}, "resume": "a-1", **READING}
        answer = {"channel": 7, "from": {"stdout": 5, "stderr": 1}, "lost": {"stdout": 2, "stderr": 0}}
        await peer.reply(number, {**answer, "state": "running", "attachment": "a-2", "stdin": 2})
        frame = protocol.unpack_frame(bytes(await peer.socket.recv(decode=False)))
        assert (frame.channel, frame.data) == (7, b"put")  # what had not arrived
        peer.socket.transport.abort()

    async def third(peer: Peer) -> None:
        await peer.initialize()
        number, params = await peer.expect("exec/attach")
        assert params == {"exec": "e1", "from": {"stdout": 5, "stderr": 1}, "resume": "a-2", **READING}
        answer = {"channel": 1, "from": params["from"], "lost": {"stdout": 0, "stderr": 0}}
        await peer.reply(number, {**answer, "state": "running", "attachment": "a-3", "stdin": 5})
        await peer.output(b"fgh")
        frame = protocol.unpack_frame(bytes(await peer.socket.recv(decode=False)))
        assert frame.data == b"more"
        await peer.expect("exec/closeStdin")
        await peer.exited("e1", offsets={"stdout": 8, "stderr": 1})

    async with gateway(first, second, third, retry=SOON) as shop:
        async with shop.exec("cat", stdin=True, exec_id="e1") as run:
            await run.write(b"input")
            assert await anext(run.stdout) == b"abc"
            assert await anext(run.stdout) == b"fgh"
            await run.write(b"more")
            await run.close_stdin()
            assert (await run.wait()).code == 0
            assert await run.stderr.read() == b"e"
            assert (run.stdout.offset, run.stdout.lost) == (8, 2)


async def test_input_that_may_be_lost_is_refused_and_output_goes_on() -> None:
    async def first(peer: Peer) -> None:
        await peer.initialize()
        await peer.start()
        await peer.socket.recv(decode=False)
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.initialize()
        number, params = await peer.expect("exec/attach")
        answer = {"channel": 1, "from": params["from"], "lost": {"stdout": 0, "stderr": 0}}
        await peer.reply(number, {**answer, "state": "running"})
        await peer.output(b"on")
        await peer.socket.wait_closed()

    async with gateway(first, second, retry=SOON) as shop:
        async with shop.exec("cat", stdin=True, exec_id="e1") as run:
            await run.write(b"input")
            assert await anext(run.stdout) == b"on"
            with pytest.raises(Disconnected, match="is not known"):
                await run.write(b"more")
            # the scripted gateway tells none
            run._attachment.exit.set_result(Exit(None, None, "cancelled", 0))


async def test_a_command_that_is_gone_is_told() -> None:
    async def first(peer: Peer) -> None:
        await peer.initialize()
        await peer.start()
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("exec/attach")
        await peer.socket.send(protocol.failure(number, errors.NotFound("no exec e1")))

    async def main(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("exec/cancel")
        await peer.socket.send(protocol.failure(number, errors.NotFound("no exec e1")))

    async with gateway(first, second, main, retry=SOON) as shop:
        async with shop.exec("x", exec_id="e1") as run:
            with pytest.raises(errors.NotFound):
                await anext(run.stdout)
            with pytest.raises(errors.NotFound):
                await run.wait()


async def test_a_watch_that_broke_says_that_changes_were_missed() -> None:
    async def first(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("files/watch")
        await peer.reply(number, {"watch": 1, "unwatched": 0})
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.initialize()
        number, params = await peer.expect("files/watch")
        assert params == {"paths": ["src"]}
        await peer.reply(number, {"watch": 4, "unwatched": 0})
        told = {"watch": 4, "changes": [{"path": "src/a", "change": "changed"}], "overflow": False}
        await peer.socket.send(protocol.notification("files/changed", told))
        await peer.socket.wait_closed()

    async with gateway(first, second, retry=SOON) as shop:
        async with shop.files.watch("src") as watch:
            changes = [await anext(watch), await anext(watch)]
    missed, told = sorted(changes, key=lambda changed: len(changed.changes))
    assert (missed.overflow, missed.changes) == (True, [])
    assert told.changes == [("src/a", "changed")]


# --- commands ----------------------------------------------------------------------------------------


async def test_a_command_streams_and_exits() -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        params = await peer.start()
        protocol.validate(protocol.ExecStart, params)
        assert {key: params[key] for key in ("argv", "cwd", "env", "stdin", "timeoutMs", "lingerMs")} == {
            "argv": ["ls", "-l"],
            "cwd": "/tmp",
            "env": {"A": "b"},
            "stdin": False,
            "timeoutMs": 1500,
            "lingerMs": -1,
        }
        await peer.output(b"out1")
        await peer.output(b"err", StreamId.STDERR)
        await peer.output(b"out2")
        await peer.exited(params["execId"], 3, offsets={"stdout": 8, "stderr": 3})

    async with gateway(script) as shop:
        async with shop.exec(["ls", "-l"], cwd="/tmp", env={"A": "b"}, timeout=1.5, linger=-1) as run:
            assert (run.pid, run.started_at) == (42, "now")
            assert [chunk async for chunk in run.stdout] == [b"out1", b"out2"]
            assert await run.stderr.read() == b"err"
            assert await run.wait() == Exit(3, None, "exited", 5)
            assert (run.stdout.offset, run.stdout.lost) == (8, 0)


async def test_a_terminal_has_a_size_and_input() -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        params = await peer.start()
        assert (params["command"], params["pty"], params["stdin"]) == ("top", {"cols": 120, "rows": 40}, True)
        frame = protocol.unpack_frame(bytes(await peer.socket.recv(decode=False)))
        assert (frame.stream, frame.channel, frame.data) == (StreamId.STDIN, 1, b"q")
        _, closing = await peer.expect("exec/closeStdin")
        assert closing == {"exec": params["execId"]}
        await peer.exited(params["execId"])

    async with gateway(script) as shop:
        async with shop.exec("top", pty=(120, 40)) as run:
            await run.write(b"q")
            await run.close_stdin()
            assert (await run.wait()).code == 0


async def test_both_streams_at_once_keep_their_names() -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        params = await peer.start()
        await peer.output(b"a")
        await peer.output(b"b", StreamId.STDERR)
        await peer.exited(params["execId"])

    async with gateway(script) as shop:
        async with shop.exec("x") as run:
            assert sorted([part async for part in run.output()]) == [("stderr", b"b"), ("stdout", b"a")]


async def test_a_reader_that_lags_stops_the_gateway_and_loses_nothing() -> None:
    """The scripted gateway cannot send more than the buffers hold until the reader goes on."""
    total, chunk = 64, b"x" * (1 << 20)
    sent = 0
    stalled = asyncio.Event()

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.initialize()
        params = await peer.start()
        for _ in range(total):
            sending = asyncio.ensure_future(peer.output(chunk))
            if not (await asyncio.wait([sending], timeout=0.5))[0]:
                stalled.set()
            await sending
            sent += 1
        await peer.exited(params["execId"])

    async with gateway(script) as shop:
        async with shop.exec("x") as run:
            await stalled.wait()
            held = sent
            assert run.stdout.offset <= BUFFER + 2 * len(chunk)
            assert held < total // 2
            assert sum([len(data) async for data in run.stdout]) == total * len(chunk)
            assert run.stdout.lost == 0


async def test_a_lagging_command_holds_up_no_other_call() -> None:
    async def main(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("ping")
        await peer.reply(number, {})

    async def command(peer: Peer) -> None:
        await peer.initialize()
        params = await peer.start()
        for _ in range(40):
            await peer.output(b"x" * 100_000)
        await peer.exited(params["execId"])

    async with gateway(command, main) as shop:
        async with shop.exec("x") as run:
            await anext(run.stdout)
            await until(lambda: run.stdout.offset > BUFFER, every=0)
            await shop.ping()
            assert len(await run.stdout.read()) == 39 * 100_000


async def test_waiting_for_what_nobody_reads_keeps_the_end_and_counts_the_rest() -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        params = await peer.start()
        for number in range(50):
            await peer.output(bytes([number]) * 1000)
        await peer.exited(params["execId"])

    async with gateway(script) as shop:
        async with shop.exec("x", buffer=10_000) as run:
            assert (await run.wait()).code == 0
            kept = b"".join([chunk async for chunk in run.stdout])
            assert (len(kept), kept[-1], run.stdout.lost) == (10_000, 49, 40_000)
            with pytest.raises(errors.TooLarge, match=r"40000 bytes .* read it before"):
                await run.stdout.read()  # which is whole, or an error


async def test_a_stream_that_was_begun_is_waited_for_unless_discarded() -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        params = await peer.start()
        for _ in range(50):
            await peer.output(b"x" * 1000)
        await peer.exited(params["execId"])

    async with gateway(script) as shop:
        async with shop.exec("x", buffer=5000) as run:
            await anext(run.stdout)
            waiting = asyncio.ensure_future(run.wait())
            await until(lambda: run.stdout.offset >= 6000, every=0)
            assert not waiting.done()
            assert (await run.wait(discard=True)).code == 0
            await waiting
            assert run.stdout.lost > 0


async def test_loss_is_counted() -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        params = await peer.start()
        await peer.output(b"ab")
        lost = {"exec": params["execId"], "stream": "stdout", "bytes": 10}
        await peer.socket.send(protocol.notification("exec/lost", lost))
        await peer.output(b"cd")
        await peer.exited(params["execId"], None, "lost", offsets={"stdout": 20, "stderr": 1})

    async with gateway(script) as shop:
        async with shop.exec("x") as run:
            assert b"".join([chunk async for chunk in run.stdout]) == b"abcd"
            assert await run.wait() == Exit(None, None, "lost", 5)
            assert (run.stdout.lost, run.stderr.lost) == (16, 1)


async def test_leaving_the_block_ends_the_command_by_the_other_connection() -> None:
    cancelled = asyncio.Event()

    async def command(peer: Peer) -> None:
        await peer.initialize()
        params = await peer.start()
        for _ in range(100):  # much more than is read, and yet the end is seen
            await peer.output(b"x" * 100_000)
        await cancelled.wait()
        await peer.exited(params["execId"], None, "cancelled")

    async def main(peer: Peer) -> None:
        await peer.initialize()
        number, params = await peer.expect("exec/cancel")
        assert params.keys() == {"exec"}
        cancelled.set()
        await peer.reply(number, {"killed": 6, "escalated": False, "survivors": 0})

    async with gateway(command, main) as shop:
        with pytest.raises(ZeroDivisionError):
            async with shop.exec("x"):
                raise ZeroDivisionError


async def test_cancel_tells_what_it_did() -> None:
    cancelled = asyncio.Event()

    async def command(peer: Peer) -> None:
        await peer.initialize()
        params = await peer.start()
        await cancelled.wait()
        await peer.exited(params["execId"], 143, "cancelled")

    async def main(peer: Peer) -> None:
        await peer.initialize()
        number, params = await peer.expect("exec/cancel")
        assert params["graceMs"] == 500
        cancelled.set()
        await peer.reply(number, {"killed": 6, "escalated": True, "survivors": 0, "method": "cgroup"})

    async with gateway(command, main) as shop:
        async with shop.exec("x") as run:
            assert await run.cancel(0.5) == Killed(6, True, 0)
            assert (await run.wait()).reason == "cancelled"


async def test_a_connection_serves_the_next_command_and_leftovers_are_not_its_output() -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        for channel in (1, 2):
            params = await peer.start(channel)
            await peer.output(b"old", channel=1) if channel == 2 else None
            await peer.output(b"new", channel=channel)
            await peer.exited(params["execId"])

    async with gateway(script) as shop:
        for _ in range(2):
            async with shop.exec("x") as run:
                assert await run.stdout.read() == b"new"
                await run.wait()


async def test_an_idle_connection_that_died_is_replaced_and_the_id_stays() -> None:
    ids = []

    async def first(peer: Peer) -> None:
        await peer.initialize()
        params = await peer.start()
        await peer.exited(params["execId"])
        _, params = await peer.expect("exec/start")
        ids.append(params["execId"])
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.initialize()
        number, params = await peer.expect("exec/attach")  # the first request may have come through
        ids.append(params["exec"])
        await peer.socket.send(protocol.failure(number, errors.NotFound("no exec")))
        params = await peer.start()
        ids.append(params["execId"])
        await peer.output(b"here")
        await peer.exited(params["execId"])

    async with gateway(first, second) as shop:
        async with shop.exec("x") as run:
            await run.wait()
        async with shop.exec("x") as run:
            assert await run.stdout.read() == b"here"
            assert (await run.wait()).code == 0
    assert ids[0] == ids[1] == ids[2]


async def test_a_command_that_cannot_start_raises_and_gives_its_connection_back() -> None:
    async def script(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("exec/start")
        await peer.socket.send(protocol.failure(number, errors.ExecFailed("no such file")))
        params = await peer.start()
        await peer.exited(params["execId"])

    async with gateway(script) as shop:
        with pytest.raises(errors.ExecFailed):
            async with shop.exec(["/nothing"]):
                pytest.fail("never entered")
        async with shop.exec("true") as run:
            await run.wait()


async def test_a_break_in_mid_command_is_never_taken_for_its_end() -> None:
    async def command(peer: Peer) -> None:
        await peer.initialize()
        await peer.start()
        await peer.output(b"half")
        await peer.socket.close(1011, "oops")

    async def main(peer: Peer) -> None:
        await peer.initialize()
        number, _ = await peer.expect("exec/cancel")
        await peer.reply(number, {"killed": 1, "escalated": False, "survivors": 0})

    async with gateway(command, main) as shop:
        async with shop.exec("x") as run:
            assert await anext(run.stdout) == b"half"
            with pytest.raises(Disconnected):
                await anext(run.stdout)
            with pytest.raises(Disconnected):
                await run.wait()


async def test_detach_leaves_the_command_and_attach_finds_it() -> None:
    async def first(peer: Peer) -> None:
        await peer.initialize()
        await peer.start()
        await peer.output(b"abc")
        await peer.socket.wait_closed()

    async def second(peer: Peer) -> None:
        await peer.initialize()
        number, params = await peer.expect("exec/attach")
        protocol.validate(protocol.ExecAttach, params)
        assert params == {"exec": "e1", "from": {"stdout": 3, "stderr": 0}, **READING}
        offsets = {"stdout": 5, "stderr": 0}
        answer = {"channel": 1, "from": offsets, "lost": {"stdout": 2, "stderr": 0}, "state": "running"}
        await peer.reply(number, answer)
        await peer.output(b"fgh")
        await peer.exited("e1", offsets={"stdout": 8, "stderr": 0})

    async with gateway(first, second) as shop:
        async with shop.exec("x", exec_id="e1") as run:
            assert await anext(run.stdout) == b"abc"
            await run.detach()
            with pytest.raises(Disconnected):
                await anext(run.stdout)
        async with shop.attach(run.id, stdout=run.stdout.offset) as again:
            assert b"".join([chunk async for chunk in again.stdout]) == b"fgh"
            assert (again.stdout.lost, again.stdout.offset) == (2, 8)
            assert (await again.wait()).code == 0


def test_addresses() -> None:
    assert Address.parse("http://h:1/").websocket("/x") == "ws://h:1/x"
    assert Address.parse("https://h").websocket("/x") == "wss://h/x"
    assert Address.parse("unix:/run/g.sock") == Address("http://localhost", "/run/g.sock")
    with pytest.raises(ValueError, match="http://"):
        Address.parse("ftp://h")
