"""The public contract over a live gateway. A subclass gives `gateway`, `tenant` and `quick`.

`quick` is a gateway like it with short time limits, which may be stopped by a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import signal
import sys
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import aiohttp
import orjson
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from gateway import protocol
from gateway.api.editor import STATIC
from gateway.auth import issuing, tokens
from tests.constants import constants
from tests.contracts.processes import Tree, alive, mark
from tests.live import SECRET, LiveGateway, RpcFailure, Wire
from tests.waits import pause, standstill, until

EIGHT_MIB = 8 << 20


async def sse(response: aiohttp.ClientResponse, wanted: int, deadline: float = 20.0) -> list[dict[str, Any]]:
    """Return the next events of an SSE response, each as `{id, event, data}`."""
    found: list[dict[str, Any]] = []
    fields: dict[str, str] = {}
    async with asyncio.timeout(deadline):
        while len(found) < wanted:
            text = await response.content.readline()
            assert text, f"the stream has ended after {found}"
            line = text.decode().rstrip("\r\n")
            if line.startswith(":"):
                continue
            if line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
            elif "data" in fields:
                found.append({**fields, "data": orjson.loads(fields["data"])})
                fields = {}
    return found


class ConnectionContract:
    async def test_initialize_tells_where_one_is(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.raw(tenant) as wire:
            assert wire.socket.subprotocol == protocol.SUBPROTOCOL
            token = gateway.token(tenant, scopes=("exec",))
            said = await wire.call("initialize", client={"name": "t", "version": "1"}, token=token)
            assert said["tenant"] == tenant
            assert said["protocol"] == 1
            assert said["workspace"] == "/srv/site"
            assert said["user"] == "site"
            assert said["scopes"] == ["exec"]
            assert said["server"]["name"] == "incus-gateway"
            assert said["limits"]["maxFrame"] > 0
            assert await wire.call("ping") == {}

    async def test_a_token_may_come_by_header_or_cookie(self, gateway: LiveGateway, tenant: str) -> None:
        token = gateway.token(tenant)
        for headers in (
            {"Authorization": f"Bearer {token}"},
            {"Cookie": f"other=1; {tokens.COOKIE}={token}"},
        ):
            async with gateway.raw(tenant, Wire, **headers) as wire:
                assert (await wire.call("initialize", client={}))["tenant"] == tenant

    @pytest.mark.parametrize("where", ["header", "initialize"])
    @pytest.mark.parametrize("flaw", ["wrong", "expired", "foreign key"])
    async def test_a_bad_token_closes_with_4401(
        self, gateway: LiveGateway, tenant: str, where: str, flaw: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        match flaw:
            case "wrong":
                token = "not a token"
            case "expired":
                with monkeypatch.context() as patched:
                    patched.setattr(issuing, "time", SimpleNamespace(time=lambda: time.time() - 2))
                    token = gateway.token(tenant, ttl=1)
            case _:
                token = tokens.issue(SECRET[::-1], "x", [tenant], ["exec"], 60)
        headers = {"Authorization": f"Bearer {token}"} if where == "header" else {}
        async with gateway.raw(tenant, Wire, **headers) as wire:
            if where == "initialize":
                with pytest.raises(RpcFailure) as caught:
                    await wire.call("initialize", token=token)
                assert caught.value.code == "unauthorized"
            assert await wire.closed() == 4401

    async def test_no_token_at_all_is_unauthorized(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.raw(tenant) as wire:
            with pytest.raises(RpcFailure):
                await wire.call("initialize", client={})
            assert await wire.closed() == 4401

    @pytest.mark.parametrize("name", ["t-none", "NOT-A-NAME", "x" * 64])
    async def test_an_unknown_tenant_closes_with_4404(self, gateway: LiveGateway, name: str) -> None:
        token = gateway.token("*")
        async with gateway.raw(name, Authorization=f"Bearer {token}") as wire:
            assert await wire.closed() == 4404

    async def test_a_foreign_tenant_looks_like_an_unknown_one(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """By websocket and by HTTP: same code, same words but for the name."""
        seen = []
        for name in (tenant, "t-none"):
            async with gateway.raw(name) as wire:
                with pytest.raises(RpcFailure) as caught:
                    await wire.call("initialize", token=gateway.token("t-other"))
                assert await wire.closed() == 4404
            async with gateway.http("t-other") as http, http.get(f"/v1/tenants/{name}") as response:
                body = await response.text()
                seen.append(
                    (caught.value.code, str(caught.value).replace(name, "?"), body.replace(name, "?"))
                )
        assert seen[0] == seen[1]

    @pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
    async def test_a_foreign_origin_gets_403(self, gateway: LiveGateway, tenant: str, origin: str) -> None:
        with pytest.raises(InvalidStatus) as caught:
            async with gateway.raw(tenant, Origin=origin, Authorization=f"Bearer {gateway.token(tenant)}"):
                pass
        assert caught.value.response.status_code == 403
        async with gateway.http(tenant) as http:
            async with http.get("/v1/tenants", headers={"Origin": origin}) as response:
                assert (response.status, (await response.json())["code"]) == (403, "forbidden")

    async def test_the_own_origin_is_served(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.raw(tenant, Origin=gateway.url) as wire:
            await wire.call("initialize", token=gateway.token(tenant))

    async def test_a_second_initialize_is_refused_and_the_first_stays(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        async with gateway.wire(tenant) as wire:
            with pytest.raises(RpcFailure) as caught:
                await wire.call("initialize", token=gateway.token(tenant))
            assert caught.value.number == -32600
            await wire.call("ping")

    async def test_without_initialize_the_socket_closes(self, quick: LiveGateway, tenant: str) -> None:
        async with quick.raw(tenant) as wire:
            assert await wire.closed() == 4401

    async def test_anything_before_initialize_is_a_protocol_error(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        for frame in ('{"jsonrpc":"2.0","id":1,"method":"ping"}', "{", b"\0\0\0\0\1x"):
            async with gateway.raw(tenant) as wire:
                await wire.send(frame)
                assert await wire.closed() == 4400

    async def test_malformed_messages_are_answered_and_survived(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        async with gateway.wire(tenant) as wire:
            for text in ("{", "[]", "7", '{"jsonrpc":"2.0","id":5,"method":"nope"}'):
                await wire.send(text)
            with pytest.raises(RpcFailure) as caught:
                await wire.call("exec/start", argv="ls")
            assert caught.value.code == "invalid_params"
            assert await wire.call("ping") == {}

    async def test_a_frame_for_an_unknown_channel_closes_with_4400(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        async with gateway.wire(tenant) as wire:
            await wire.stdin(77, b"x")
            assert await wire.closed() == 4400

    async def test_a_frame_for_an_ended_channel_is_ignored(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            started = await wire.call("exec/start", argv=["true"])
            await wire.exited(started["exec"])
            await wire.stdin(started["channel"], b"late")
            assert await wire.call("ping") == {}

    async def test_a_frame_over_the_limit_closes_with_1009(self, quick: LiveGateway, tenant: str) -> None:
        async with quick.wire(tenant) as wire:
            # the gateway may hang up while the rest of the frame is on its way
            with contextlib.suppress(ConnectionClosed):
                await wire.send("x" * (2 << 20))
            assert await wire.closed() == 1009

    async def test_a_scope_is_needed(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant, token=gateway.token(tenant, scopes=("files:read",))) as wire:
            calls: tuple[tuple[str, Mapping[str, Any]], ...] = (
                ("exec/start", {"argv": ["true"]}),
                ("exec/list", {}),
                ("tools/call", {"name": "Write", "arguments": {}}),
                ("events/subscribe", {}),
            )
            for method, params in calls:
                with pytest.raises(RpcFailure) as caught:
                    await wire.call(method, **params)
                assert caught.value.code == "forbidden"

    async def test_a_request_id_in_flight_cannot_be_used_again(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        async with gateway.wire(tenant) as wire:
            started = await wire.call("exec/start", argv=["sleep", "60"])
            number, waiting = await wire.start_call("exec/wait", exec=started["exec"])
            await wire.send({"jsonrpc": "2.0", "id": number, "method": "ping"})
            with pytest.raises(RpcFailure) as caught:
                await waiting
            assert caught.value.code == "invalid_params"
            await wire.call("exec/cancel", exec=started["exec"], graceMs=0)


class ToolsContract:
    async def test_the_file_tools_work_on_the_workspace(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:

            async def call(name: str, **arguments: Any) -> tuple[bool, str]:
                said = await wire.call("tools/call", name=name, arguments=arguments)
                return said["isError"], said["content"][0]["text"]

            listed = {tool["name"] for tool in (await wire.call("tools/list"))["tools"]}
            assert listed >= {"Read", "Write", "Edit", "Glob", "Grep"}
            path = "/srv/site/src/App.tsx"
            assert not (await call("Write", file_path=path, content="one\ntwo\n"))[0]
            assert await call("Read", file_path=path) == (False, "1\tone\n2\ttwo\n3\t")
            assert not (await call("Edit", file_path=path, old_string="two", new_string="zwei"))[0]
            assert await call("Glob", pattern="**/*.tsx") == (False, "src/App.tsx")
            assert await call("Grep", pattern="zw.i") == (False, "Found 1 file\nsrc/App.tsx")
            assert (await call("Read", file_path="nope.txt"))[0]
            seen, _, _ = await wire.run(command="cat src/App.tsx; stat -c %U src/App.tsx")
            assert seen["exitCode"] == 0

    async def test_a_path_outside_is_refused(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            for path in ("/etc/passwd", "../../../etc/passwd", "/srv/site-evil/x"):
                said = await wire.call("tools/call", name="Read", arguments={"file_path": path})
                assert said["isError"] and said["structuredContent"]["code"] == "outside_workspace"

    async def test_an_unknown_tool_is_an_error_of_the_call(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            with pytest.raises(RpcFailure) as caught:
                await wire.call("tools/call", name="Nope", arguments={})
            assert caught.value.code == "not_found"

    async def test_a_call_id_makes_a_call_exactly_once(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            await wire.call("tools/call", name="Write", arguments={"file_path": "o.txt", "content": "a a"})
            edit = {"file_path": "o.txt", "old_string": "a ", "new_string": ""}
            first = await wire.call("tools/call", name="Edit", arguments=edit, callId="once")
            async with gateway.wire(tenant) as other:
                assert first == await other.call("tools/call", name="Edit", arguments=edit, callId="once")
            with pytest.raises(RpcFailure) as caught:
                await wire.call("tools/call", name="Read", arguments={"file_path": "o.txt"}, callId="once")
            assert caught.value.code == "conflict"

    async def test_a_call_with_an_id_outlives_its_socket(self, gateway: LiveGateway, tenant: str) -> None:
        """Who asks again on another socket joins it, even after several breaks: the command runs once."""
        given = {"command": "echo x >>survived; until [ -e now ]; do sleep 0.05; done; wc -l <survived"}
        asked = {"name": "Bash", "arguments": given, "callId": mark()}
        async with gateway.wire(tenant) as other:
            for _ in range(3):
                async with gateway.wire(tenant) as wire:
                    await wire.start_call("tools/call", **asked)
                    await other.run(command="until [ -e survived ]; do sleep 0.05; done")
            await other.run(command="touch now")
            said = await other.call("tools/call", **asked)
            assert said["content"][0]["text"] == "1"
            assert await other.call("tools/call", **asked) == said
            await other.run(command="rm survived now")

    async def test_a_call_that_nobody_asks_for_again_ends(self, quick: LiveGateway, tenant: str) -> None:
        tree = Tree()
        async with quick.wire(tenant) as wire:
            given = {"command": tree.script}
            await wire.start_call("tools/call", name="Bash", arguments=given, callId=mark())
            await tree.grown()
        await until(lambda: tree.alive() == 0)

    async def test_a_cancelled_call_with_an_id_is_ended_for_everybody(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """And stays so: how much of it happened nobody can know."""
        tree = Tree()
        asked = {"name": "Bash", "arguments": {"command": tree.script}, "callId": mark()}
        async with gateway.wire(tenant) as wire, gateway.wire(tenant) as other:
            number, reply = await wire.start_call("tools/call", **asked)
            await tree.grown()
            _, same = await other.start_call("tools/call", **asked)
            await other.call("ping")
            await wire.send({"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": number}})
            for waiting in (reply, same):
                with pytest.raises(RpcFailure) as caught:
                    await asyncio.wait_for(waiting, 10)
                assert caught.value.code == "cancelled"
            assert tree.alive() == 0
            with pytest.raises(RpcFailure) as caught:
                await wire.call("tools/call", **asked)
            assert caught.value.code == "cancelled"

    async def test_http_gives_the_same_answer(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire, gateway.http(tenant) as http:
            await wire.call("tools/call", name="Write", arguments={"file_path": "h.txt", "content": "x"})
            by_socket = await wire.call("tools/call", name="Read", arguments={"file_path": "h.txt"})
            url = f"/v1/tenants/{tenant}/tools/Read"
            async with http.post(url, json={"file_path": "h.txt"}) as response:
                assert await response.json() == by_socket

    async def test_read_before_write_holds_in_a_named_session(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        headers = {"X-Tool-Session": "rbw", "X-Read-Before-Write": "1"}
        base = f"/v1/tenants/{tenant}/tools"
        async with gateway.http(tenant) as http:
            await http.post(f"{base}/Write", json={"file_path": "r.txt", "content": "x"})

            async def write() -> bool:
                body = {"file_path": "r.txt", "content": "y"}
                async with http.post(f"{base}/Write", json=body, headers=headers) as response:
                    return bool((await response.json())["isError"])

            assert await write()
            await http.post(f"{base}/Read", json={"file_path": "r.txt"}, headers=headers)
            assert not await write()
            headers = {"X-Tool-Session": "rbw-true", "X-Read-Before-Write": "true"}
            assert await write()
            # what is neither on nor off is refused, not taken for off
            headers["X-Read-Before-Write"] = "on, please"
            async with http.post(f"{base}/Read", json={"file_path": "r.txt"}, headers=headers) as response:
                assert (response.status, (await response.json())["code"]) == (400, "invalid_params")


class ExecContract:
    async def test_a_command_streams_and_its_exit_comes_last(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            exit_, out, err = await wire.run(command="echo out; echo err >&2; exit 3")
            assert (out, err) == (b"out\n", b"err\n")
            assert (exit_["exitCode"], exit_["signal"], exit_["reason"]) == (3, None, "exited")
            assert exit_["offsets"] == {"stdout": 4, "stderr": 4}

    async def test_binary_output_arrives_whole(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            script = f"head -c {EIGHT_MIB} /dev/urandom > random; cat random & cat random >&2; wait"
            exit_, out, err = await wire.run(command=script)
            assert exit_["offsets"] == {"stdout": EIGHT_MIB, "stderr": EIGHT_MIB}
            assert len(out) == EIGHT_MIB and hashlib.sha256(out).digest() == hashlib.sha256(err).digest()

    async def test_input_of_any_size_arrives_whole(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            started = await wire.call("exec/start", argv=["sha256sum"], stdin=True)
            piece, digest = bytes(range(256)) * 1024, hashlib.sha256()
            for _ in range(64):
                await wire.stdin(started["channel"], piece)
                digest.update(piece)
            await wire.call("exec/closeStdin", exec=started["exec"])
            await wire.exited(started["exec"])
            assert wire.output[started["channel"], 1].startswith(digest.hexdigest().encode())

    async def test_a_terminal_is_one(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            pty = {"cols": 90, "rows": 20}
            started = await wire.call(
                "exec/start", argv=["sh", "-c", "tty; stty size; read x; stty size"], pty=pty
            )
            key = started["channel"], 1
            await wire.until(lambda: b"20 90" in wire.output[key])
            await wire.call("exec/resize", exec=started["exec"], cols=100, rows=30)
            await wire.stdin(started["channel"], b"\n")
            exit_ = await wire.exited(started["exec"])
            assert exit_["exitCode"] == 0
            assert b"/dev/pts/" in wire.output[key] and b"30 100" in wire.output[key]
            with pytest.raises(RpcFailure):
                await wire.call("exec/resize", exec="none", cols=1, rows=1)

    @pytest.mark.parametrize(
        ("params", "code", "reason"),
        [
            ({"argv": ["no-such-program"]}, "exec_failed", "not_found"),
            ({"argv": ["/etc/passwd"]}, "exec_failed", "not_executable"),
            ({"argv": ["pwd"], "cwd": "/none"}, "exec_failed", "cwd"),
            ({"argv": ["id"], "user": 4294967295}, "invalid_params", None),
            ({"argv": ["true", "x" * 140_000]}, "too_large", None),
            ({"argv": [""]}, "invalid_params", None),
            ({"argv": ["a\0b"]}, "invalid_params", None),
        ],
    )
    async def test_what_cannot_start_is_an_error(
        self, gateway: LiveGateway, tenant: str, params: dict[str, Any], code: str, reason: str | None
    ) -> None:
        async with gateway.wire(tenant) as wire:
            with pytest.raises(RpcFailure) as caught:
                await wire.call("exec/start", **params)
            assert caught.value.code == code
            assert caught.value.data.get("reason") == reason

    @pytest.mark.parametrize("code", [126, 127])
    async def test_a_programs_own_126_and_127_are_exits(
        self, gateway: LiveGateway, tenant: str, code: int
    ) -> None:
        async with gateway.wire(tenant) as wire:
            exit_, _, _ = await wire.run(argv=["sh", "-c", f"exit {code}"])
            assert (exit_["exitCode"], exit_["reason"]) == (code, "exited")

    async def test_a_signal_reaches_the_command(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            started = await wire.call("exec/start", argv=["sleep", "60"])
            await wire.call("exec/signal", exec=started["exec"], signal="INT")
            exit_ = await wire.exited(started["exec"])
            assert (exit_["exitCode"], exit_["signal"], exit_["reason"]) == (130, "INT", "exited")
            for wrong in ("NOPE", "", 0, 999, None, True, 1.5):
                with pytest.raises(RpcFailure) as caught:
                    await wire.call("exec/signal", exec=started["exec"], signal=wrong)
                assert (caught.value.code, caught.value.data["field"]) == ("invalid_params", "signal")
                assert "no such signal" in caught.value.message

    async def test_a_cancel_behind_the_commands_own_end_does_not_claim_it(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """What it left behind, and holds its output open, is ended; the exit is the command's own."""
        async with gateway.wire(tenant) as wire:
            started = await wire.call("exec/start", command="sleep 60 & exit 5")
            await wire.run(command=f"while kill -0 {started['pid']} 2>/dev/null; do sleep 0.01; done")
            assert (await wire.call("exec/cancel", exec=started["exec"]))["survivors"] == 0
            exit_ = await wire.exited(started["exec"])
            assert (exit_["reason"], exit_["exitCode"], exit_["left"]) == ("exited", 5, 0)

    async def test_a_tree_that_just_grows_is_asked_to_end_as_a_whole(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """None that is born meanwhile makes the cancel wait for the end of its patience.

        So many that it still grows; their ends alone take seconds where others have the CPU.
        """
        async with gateway.wire(tenant) as wire:
            for _ in range(5):
                command = "for i in $(seq 80); do sleep 600 & echo $i; done; wait"
                started = await wire.call("exec/start", command=command)
                await wire.until(lambda at=started["channel"]: b"\n20\n" in wire.output[at, 1])
                done = await wire.call("exec/cancel", exec=started["exec"], graceMs=50_000)
                assert done["survivors"] == 0 and not done["escalated"]
                await wire.exited(started["exec"])

    async def test_a_second_cancel_may_have_less_patience(self, gateway: LiveGateway, tenant: str) -> None:
        """Both are told what was done in the end, long before the first one's grace is over."""
        async with gateway.wire(tenant) as wire:
            command = "trap '' TERM; echo on; while :; do sleep 0.1; done"
            started = await wire.call("exec/start", command=command)
            await wire.until(lambda: wire.output[started["channel"], 1])
            cancel = {"exec": started["exec"], "graceMs": 60_000}
            _, first = await wire.start_call("exec/cancel", **cancel)
            second = await wire.call("exec/cancel", **cancel | {"graceMs": 0})
            assert second["escalated"] and second["survivors"] == 0
            assert await asyncio.wait_for(first, 30) == second
            assert (await wire.exited(started["exec"]))["reason"] == "cancelled"

    async def test_what_was_cancelled_counts_no_longer(self, gateway: LiveGateway, tenant: str) -> None:
        """From the answer on, so that who cancels one of too many can start another."""
        async with gateway.wire(tenant) as wire:
            for _ in range(10):
                started = await wire.call("exec/start", argv=["sleep", "60"])
                await wire.call("exec/cancel", exec=started["exec"])
                listed = (await wire.call("exec/list"))["execs"]
                states = [entry["state"] for entry in listed if entry["exec"] == started["exec"]]
                assert states == ["ended"]
                await wire.exited(started["exec"])

    async def test_cancel_leaves_nothing_running(self, gateway: LiveGateway, tenant: str) -> None:
        """A child, a group of its own, setsid, nohup, two daemons: 0 of 6 alive when it answers."""
        tree = Tree()
        async with gateway.wire(tenant) as wire:
            started = await wire.call("exec/start", argv=["bash", "-c", tree.script])
            await tree.grown()
            killed = await wire.call("exec/cancel", exec=started["exec"])
            assert tree.alive() == 0
            assert killed["survivors"] == 0 and killed["killed"] >= Tree.SIZE
            assert (await wire.exited(started["exec"]))["reason"] == "cancelled"
            again = await wire.call("exec/cancel", exec=started["exec"])
            assert again == {"killed": 0, "escalated": False, "survivors": 0, "method": "cgroup"}

    async def test_cancel_twice_at_once_answers_both(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            started = await wire.call("exec/start", argv=["sh", "-c", "trap '' TERM; echo r; sleep 60"])
            await wire.until(lambda: wire.output[started["channel"], 1])
            both = await asyncio.gather(
                *(wire.call("exec/cancel", exec=started["exec"], graceMs=200) for _ in range(2))
            )
            assert both[0] == both[1] and both[0]["escalated"]

    async def test_a_cancelled_request_ends_with_cancelled(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            started = await wire.call("exec/start", argv=["sleep", "60"])
            number, waiting = await wire.start_call("exec/wait", exec=started["exec"])
            await wire.send(protocol.cancel_request(number))
            with pytest.raises(RpcFailure) as caught:
                await asyncio.wait_for(waiting, 10)
            assert caught.value.code == "cancelled"
            await wire.call("exec/cancel", exec=started["exec"], graceMs=0)

    async def test_a_cancelled_start_leaves_nothing_running(self, gateway: LiveGateway, tenant: str) -> None:
        """Whenever the cancel comes: before the command runs, while it starts, after it has started."""
        seconds = mark()
        async with gateway.wire(tenant) as wire:
            for moment in (0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03):
                argv = ["sh", "-c", f"setsid sleep {seconds} & sleep {seconds}"]
                number, starting = await wire.start_call("exec/start", argv=argv)
                await pause(moment)
                await wire.send(protocol.cancel_request(number))
                try:
                    started = await asyncio.wait_for(starting, 20)
                except RpcFailure as error:
                    assert error.code == "cancelled"
                else:
                    await wire.call("exec/cancel", exec=started["exec"], graceMs=0)
                assert alive(seconds) == 0

    async def test_a_timeout_ends_the_tree_and_says_so(self, gateway: LiveGateway, tenant: str) -> None:
        seconds = mark()
        async with gateway.wire(tenant) as wire:
            exit_, _, _ = await wire.run(command=f"setsid sleep {seconds} & sleep {seconds}", timeoutMs=300)
            assert exit_["reason"] == "timeout"
            await until(lambda: alive(seconds) == 0)

    async def test_what_holds_the_output_open_holds_nobody_up(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """By websocket, HTTP and Bash; what is left is counted, listed, kept, and ended by a cancel."""
        marks = [mark() for _ in range(4)]
        lines = [f"setsid sleep {seconds} & sleep {seconds} & echo hi; exit 3" for seconds in marks]
        url, body = f"/v1/tenants/{tenant}/exec", {"command": lines[1]}
        async with gateway.wire(tenant) as wire, gateway.http(tenant) as http:

            async def by_http() -> Mapping[str, Any]:
                async with http.post(url, json=body) as response:
                    said: Mapping[str, Any] = await response.json()
                return said

            pty = {"cols": 80, "rows": 24}
            async with asyncio.timeout(20):
                (exit_, out, _), posted, bash, (terminal, shown, _) = await asyncio.gather(
                    wire.run(command=lines[0]),
                    by_http(),
                    wire.call("tools/call", name="Bash", arguments={"command": lines[2]}),
                    wire.run(command=f"trap '' HUP; {lines[3]}", pty=pty),
                )
            assert (exit_["exitCode"], exit_["reason"], exit_["left"], out) == (3, "exited", 2, b"hi\n")
            assert (posted["exit_code"], posted["left"], posted["stdout"]) == (3, 2, "hi\n")
            facts = bash["structuredContent"]
            assert (facts["exitCode"], facts["left"]) == (3, 2) and "hi" in bash["content"][0]["text"]
            assert (terminal["exitCode"], terminal["left"], shown) == (3, 2, b"hi\r\n")
            execs = [exit_["exec"], posted["exec"], facts["exec"], terminal["exec"]]
            for seconds, exec_id in zip(marks, execs, strict=True):
                listed = {entry["exec"]: entry for entry in (await wire.call("exec/list"))["execs"]}
                assert [member["name"] for member in listed[exec_id]["left"]] == ["sleep", "sleep"]
                pids = " ".join(str(member["pid"]) for member in listed[exec_id]["left"])
                _, seen, _ = await wire.run(command=f"ps -o args= -p {pids}")
                assert seen.decode().splitlines() == [f"sleep {seconds}"] * 2
                killed = await wire.call("exec/cancel", exec=exec_id)
                assert (killed["killed"], killed["survivors"], alive(seconds)) == (2, 0, 0)
                listed = {entry["exec"]: entry for entry in (await wire.call("exec/list"))["execs"]}
                assert (listed[exec_id]["exit"]["exitCode"], listed[exec_id]["left"]) == (3, [])

    async def test_what_is_left_can_be_set_to_end_with_its_command(
        self, quick: LiveGateway, tenant: str
    ) -> None:
        seconds = mark()
        async with quick.wire(tenant) as wire:
            exit_, out, _ = await wire.run(command=f"setsid sleep {seconds} & echo hi")
            assert (exit_["reason"], exit_["exitCode"], exit_["left"], out) == ("exited", 0, 0, b"hi\n")
            assert alive(seconds) == 0

    async def test_attach_gives_every_byte_once(self, gateway: LiveGateway, tenant: str) -> None:
        """From any offset, on another socket, while output goes on."""
        async with gateway.wire(tenant) as wire, gateway.wire(tenant) as other:
            script = "for i in $(seq 1 2000); do echo line $i; done; read x; echo end"
            started = await wire.call("exec/start", command=script, stdin=True)
            whole = "".join(f"line {i}\n" for i in range(1, 2001)).encode()
            key = started["channel"], 1
            await wire.until(lambda: len(wire.output[key]) >= 1000)
            attached = await other.call("exec/attach", exec=started["exec"], **{"from": {"stdout": 1000}})
            assert attached["from"]["stdout"] == 1000
            assert attached["lost"] == {"stdout": 0, "stderr": 0}
            assert attached["state"] == "running"
            await wire.until(lambda: len(wire.output[key]) == len(whole))
            await wire.stdin(started["channel"], b"\n")
            await wire.exited(started["exec"])
            await other.exited(started["exec"])
            assert wire.output[key] == whole + b"end\n"
            assert other.output[attached["channel"], 1] == whole[1000:] + b"end\n"
            late = await other.call("exec/attach", exec=started["exec"], **{"from": {"stdout": len(whole)}})
            assert late["state"] == "ended"
            await other.until(lambda: other.output[late["channel"], 1] == b"end\n")

    @pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
    async def test_characters_are_never_split_for_who_asks_for_text(
        self, gateway: LiveGateway, tenant: str, size: int
    ) -> None:
        """However the command cuts them; bytes and offsets stay, and what is not UTF-8 too."""
        text, rest = "aé€😀𝄞\N{CHECK MARK}z😀".encode() * 2, b"\xff\xe2\x82"
        async with gateway.wire(tenant) as wire, gateway.wire(tenant) as raw:
            started = await wire.call("exec/start", argv=["cat"], stdin=True, encoding="utf-8")
            attached = await raw.call("exec/attach", exec=started["exec"])
            shown, bare = (started["channel"], 1), (attached["channel"], 1)
            for end in range(size, len(text) + size, size):
                await wire.stdin(started["channel"], text[end - size : end])
                sent = text[:end]
                await raw.until(lambda sent=sent: raw.output[bare] == sent)
                characters = sent.decode(errors="ignore")

                def complete(characters: str = characters) -> bool:
                    return wire.output[shown].decode() == characters  # raises for a split one

                await wire.until(complete)
            await wire.stdin(started["channel"], rest)
            await raw.until(lambda: raw.output[bare] == text + rest)
            await wire.until(lambda: wire.output[shown] == text + rest[:1])
            late = await raw.call("exec/attach", exec=started["exec"], encoding="utf-8")
            await raw.until(lambda: raw.output[late["channel"], 1] == text + rest[:1])
            await wire.call("exec/closeStdin", exec=started["exec"])
            exit_ = await wire.exited(started["exec"])
            await raw.exited(started["exec"])
            assert wire.output[shown] == raw.output[late["channel"], 1] == text + rest
            assert exit_["offsets"] == {"stdout": len(text + rest), "stderr": 0}

    async def test_what_fell_out_of_the_tail_is_counted(self, quick: LiveGateway, tenant: str) -> None:
        async with quick.wire(tenant) as wire:
            total = 4 << 20
            script = f"read x; head -c {total} /dev/zero; echo done >&2; sleep 60"
            started = await wire.call("exec/start", command=script, stdin=True, lingerMs=-1)
            await wire.stdin(started["channel"], b"\n")
            await wire.call("exec/detach", exec=started["exec"])
            before = len(wire.output[started["channel"], 1])

            async def ended() -> bool:
                listed = (await wire.call("exec/list"))["execs"]
                found = next(entry for entry in listed if entry["exec"] == started["exec"])
                return bool(found["offsets"]["stdout"] == total)

            while not await ended():
                pass
            attached = await wire.call("exec/attach", exec=started["exec"], **{"from": {"stdout": before}})
            lost = attached["lost"]["stdout"]
            assert 0 < lost < total
            assert attached["from"]["stdout"] == before + lost
            await wire.until(lambda: len(wire.output[attached["channel"], 1]) == total - before - lost)
            await wire.call("exec/cancel", exec=started["exec"], graceMs=0)

    async def test_a_known_exec_id_starts_nothing_twice(self, gateway: LiveGateway, tenant: str) -> None:
        name = f"mine-{mark()}"
        async with gateway.wire(tenant) as wire, gateway.wire(tenant) as other:
            params = {"argv": ["sh", "-c", "echo $$; read x"], "stdin": True, "execId": name}
            both = await asyncio.gather(wire.call("exec/start", **params), other.call("exec/start", **params))
            assert both[0]["exec"] == both[1]["exec"] == name
            assert both[0]["pid"] == both[1]["pid"]
            with pytest.raises(RpcFailure) as caught:
                await wire.call("exec/start", argv=["true"], execId=name)
            assert caught.value.code == "conflict"
            await wire.stdin(both[0]["channel"], b"\n")
            await wire.exited(name)
            await other.exited(name)
            key = both[0]["channel"], 1
            assert wire.output[key] == other.output[both[1]["channel"], 1] != b""

    async def test_a_command_outlives_its_socket_and_ends_with_its_linger(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        seconds = mark()
        async with gateway.wire(tenant) as wire:
            kept = await wire.call("exec/start", argv=["sleep", seconds], lingerMs=60_000)
            short = mark()
            await wire.call("exec/start", argv=["sleep", short], lingerMs=200)
        await until(lambda: alive(short) == 0)
        assert alive(seconds) == 1
        async with gateway.wire(tenant) as wire:
            assert (await wire.call("exec/attach", exec=kept["exec"]))["state"] == "running"
            await wire.call("exec/cancel", exec=kept["exec"], graceMs=0)

    async def test_a_client_that_vanishes_leaves_nothing_after_the_linger(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        seconds = mark()
        async with gateway.wire(tenant) as wire:
            await wire.call("exec/start", argv=["sleep", seconds], lingerMs=0)
            await until(lambda: alive(seconds) == 1)
            wire.socket.transport.abort()
        await until(lambda: alive(seconds) == 0)

    async def test_nothing_is_left_of_a_killed_client_that_asks_for_a_short_linger(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """A real process is killed during a call, by websocket and by HTTP; another call goes on."""
        short, long, http = mark(), mark(), mark()
        token = gateway.token(tenant)
        python = f"""
import asyncio
from gateway_client import Client
async def main():
    async with Client({gateway.url!r}, token={token!r}) as client:
        calls = [client.tenant({tenant!r}, linger=linger).tool("Bash", {{"command": f"sleep {{seconds}}"}})
                 for linger, seconds in ((0.2, {short!r}), (None, {long!r}))]
        await asyncio.gather(*calls)
asyncio.run(main())
"""
        curl = (
            *("curl", "-sS", "-H", f"Authorization: Bearer {token}", "-H", f"Idempotency-Key: {http}"),
            *("-H", "X-Call-Linger: 200", "-H", "Content-Type: application/json"),
            *("-d", f'{{"command": "sleep {http}"}}', f"{gateway.url}/v1/tenants/{tenant}/tools/Bash"),
        )
        clients = [
            await asyncio.create_subprocess_exec(*command)
            for command in ((sys.executable, "-c", python), curl)
        ]
        try:
            await until(lambda: (alive(short), alive(long), alive(http)) == (1, 1, 1))
        finally:
            for client in clients:
                client.kill()
                await client.wait()
        await until(lambda: alive(short) == alive(http) == 0)
        assert alive(long) == 1, "it lingers for as long as the gateway's setting says"
        async with gateway.wire(tenant) as wire:
            for entry in (await wire.call("exec/list"))["execs"]:
                if f"sleep {long}" in " ".join(entry["argv"]):
                    await wire.call("exec/cancel", exec=entry["exec"], graceMs=0)
        await until(lambda: alive(long) == 0)

    async def test_a_linger_is_a_number(self, gateway: LiveGateway, tenant: str) -> None:
        asked = {"name": "Glob", "arguments": {"pattern": "*"}, "callId": mark()}
        async with gateway.wire(tenant) as wire, gateway.http(tenant) as http:
            for bad in (-1, "soon"):
                with pytest.raises(RpcFailure) as caught:
                    await wire.call("tools/call", **asked, lingerMs=bad)
                assert caught.value.code == "invalid_params"
            for text in ("-1", "soon", "1e3", "9" * 40):
                headers = {"Idempotency-Key": mark(), "X-Call-Linger": text}
                async with http.post(
                    f"/v1/tenants/{tenant}/tools/Glob", json={"pattern": "*"}, headers=headers
                ) as response:
                    assert (response.status, (await response.json())["code"]) == (400, "invalid_params")

    async def test_a_tenant_takes_its_share_of_subscriptions(self, quick: LiveGateway, tenant: str) -> None:
        """On however many sockets; one that ends makes place."""
        share = 20  # of `QUICK`
        async with quick.wire(tenant) as one, quick.wire(tenant) as two:
            numbers = [(await one.call("events/subscribe"))["subscription"] for _ in range(16)]
            for _ in range(share - 16):
                await two.call("events/subscribe")
            with pytest.raises(RpcFailure) as caught:
                await two.call("events/subscribe")
            assert (caught.value.code, caught.value.data["limit"]) == ("rate_limited", share)
            await one.call("events/unsubscribe", subscription=numbers[0])
            await two.call("events/subscribe")

    async def test_a_tenant_takes_its_share_of_tool_sessions(self, quick: LiveGateway, tenant: str) -> None:
        """Its own idle ones make place; those of open websockets do not, and are told so."""
        url, share = f"/v1/tenants/{tenant}/tools/Glob", _TENANT_SESSIONS
        async with contextlib.AsyncExitStack() as stack:
            http = await stack.enter_async_context(quick.http(tenant))
            for number in range(3 * share):
                headers = {"X-Tool-Session": f"{mark()}-{number}"}
                async with http.post(url, json={"pattern": "*"}, headers=headers) as response:
                    assert response.status == 200
            wires = [
                await stack.enter_async_context(quick.wire(tenant, session=mark())) for _ in range(share)
            ]
            with pytest.raises(RpcFailure) as caught:
                async with quick.wire(tenant, session=mark()):
                    pass
            assert caught.value.code == "rate_limited"
            assert caught.value.data["retry_after"] > 0
            async with http.post(url, json={"pattern": "*"}, headers={"X-Tool-Session": mark()}) as response:
                assert (response.status, (await response.json())["code"]) == (429, "rate_limited")
            for wire in wires:
                assert await wire.call("ping") == {}

    async def test_a_slow_reader_slows_its_command_and_loses_nothing(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """While one client does not read, its command stops; another's goes on; then all bytes come."""
        total = 32 << 20
        script = f"head -c {total} /dev/zero"
        async with gateway.wire(tenant) as slow, gateway.wire(tenant) as other:
            slow.socket.transport.pause_reading()
            _, reply = await slow.start_call("exec/start", command=script)
            exit_, out, _ = await other.run(command="echo quick")
            assert out == b"quick\n"
            listed = await other.call("exec/list")

            def held() -> Any:
                return [entry for entry in listed["execs"] if script in entry["argv"]]

            async def printed() -> int:
                nonlocal listed
                listed = await other.call("exec/list")
                return held()[0]["offsets"]["stdout"] if held() else 0

            assert await standstill(printed) < total
            assert held()[0]["state"] == "running"
            slow.socket.transport.resume_reading()
            started = await asyncio.wait_for(reply, 20)
            exit_ = await slow.exited(started["exec"])
            assert exit_["offsets"]["stdout"] == total == len(slow.output[started["channel"], 1])

    async def test_too_many_commands_are_refused(self, quick: LiveGateway, tenant: str) -> None:
        async with quick.wire(tenant) as wire:
            started = [await wire.call("exec/start", argv=["sleep", "60"]) for _ in range(4)]
            with pytest.raises(RpcFailure) as caught:
                await wire.call("exec/start", argv=["sleep", "60"])
            assert caught.value.code == "rate_limited"
            for entry in started:
                await wire.call("exec/cancel", exec=entry["exec"], graceMs=0)
            assert (await wire.run(argv=["true"]))[0]["exitCode"] == 0

    async def test_an_unknown_exec_is_not_found(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            for method in ("exec/attach", "exec/wait", "exec/cancel", "exec/detach", "exec/closeStdin"):
                with pytest.raises(RpcFailure) as caught:
                    await wire.call(method, exec="x-none")
                assert caught.value.code == "not_found"


class ResumeContract:
    async def test_an_attachment_takes_the_place_of_one_that_broke(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """What had not arrived is sent again and nothing twice, though the old socket still stands."""
        async with gateway.wire(tenant) as old, gateway.wire(tenant) as new:
            started = await old.call("exec/start", argv=["cat"], stdin=True)
            exec_id, channel = started["exec"], started["channel"]
            await old.stdin(channel, b"one ")
            await old.until(lambda: old.output[channel, 1] == b"one ")
            seen = {"stdout": 4, "stderr": 0}
            asked = {"exec": exec_id, "from": seen, "resume": started["attachment"]}
            resumed = await new.call("exec/attach", **asked)
            assert (resumed["stdin"], resumed["from"], resumed["lost"]["stdout"]) == (4, seen, 0)
            await old.stdin(channel, b"late ")
            await old.call("ping")
            await new.stdin(resumed["channel"], b"two ")
            await new.until(lambda: new.output[resumed["channel"], 1] == b"two ")
            with pytest.raises(RpcFailure) as caught:
                await old.call("exec/attach", exec=exec_id, resume=started["attachment"])
            assert caught.value.code == "not_found"
            again = await old.call("exec/attach", exec=exec_id, resume=resumed["attachment"])
            assert again["stdin"] == 8
            await old.call("exec/closeStdin", exec=exec_id)
            assert (await old.exited(exec_id))["offsets"]["stdout"] == 8
            assert old.output[again["channel"], 1] == b"one two "

    async def test_a_stale_attachment_holds_nothing_back(self, gateway: LiveGateway, tenant: str) -> None:
        """A socket that takes nothing any more slows its command only until another takes its place."""
        size = 24 << 20
        async with gateway.wire(tenant) as new:
            async with gateway.wire(tenant) as old:
                started = await old.call("exec/start", argv=["head", "-c", str(size), "/dev/zero"])
                old.socket.transport.pause_reading()
                asked = {"exec": started["exec"], "resume": started["attachment"]}
                resumed = await new.call("exec/attach", **asked)
                exit_ = await new.exited(started["exec"])
                assert exit_["offsets"]["stdout"] == size
                got = len(new.output[resumed["channel"], 1])
                assert got + resumed["lost"]["stdout"] == size
                old.socket.transport.resume_reading()


class HttpContract:
    async def test_health_needs_no_token(self, gateway: LiveGateway) -> None:
        async with aiohttp.ClientSession(gateway.url) as http:
            for path in ("/healthz", "/readyz", "/metrics"):
                async with http.get(path) as response:
                    assert response.status == 200
            async with http.get("/") as response:  # says so where this checkout's editor is not built
                assert response.status == (200 if (STATIC / "index.html").is_file() else 503)

    async def test_problems_have_their_form_and_code(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.http(tenant, scopes=("files:read",)) as http:
            base = f"/v1/tenants/{tenant}"
            cases: tuple[tuple[str, str, bytes | None, int, str], ...] = (
                ("GET", "/nope", None, 404, "not_found"),
                ("PUT", "/healthz", None, 405, "invalid_params"),
                ("GET", "/v1/tenants/t-none", None, 404, "not_found"),
                ("POST", f"{base}/tools/Nope", b"{}", 404, "not_found"),
                ("POST", f"{base}/tools/Read", b"{", 400, "invalid_params"),
                ("POST", f"{base}/tools/Read", b"[]", 400, "invalid_params"),
                ("POST", f"{base}/tools/Write", b"{}", 403, "forbidden"),
                ("POST", f"{base}/exec", b"{}", 403, "forbidden"),
                ("POST", f"{base}/stop", None, 403, "forbidden"),
                ("GET", "/v1/events", None, 403, "forbidden"),
            )
            for method, path, body, status, code in cases:
                async with http.request(method, path, data=body) as response:
                    assert (response.status, path) == (status, path)
                    assert response.content_type == "application/problem+json"
                    problem = await response.json()
                    assert (problem["code"], problem["status"], path) == (code, status, path)
                    assert problem["detail"]

    async def test_no_token_gets_401(self, gateway: LiveGateway, tenant: str) -> None:
        async with aiohttp.ClientSession(gateway.url) as http, http.get(f"/v1/tenants/{tenant}") as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"

    async def test_a_body_over_the_limit_gets_413(self, quick: LiveGateway, tenant: str) -> None:
        async with quick.http(tenant) as http:
            url = f"/v1/tenants/{tenant}/tools/Read"

            async def chunked() -> Any:
                for _ in range(40):
                    yield b"x" * 65536

            for body in (io.BytesIO(b"x" * (2 << 20)), chunked()):
                try:
                    async with http.post(url, data=body) as response:
                        assert response.status == 413
                except aiohttp.ClientOSError:
                    pass  # the answer may be overtaken by the reset: the gateway did not read on

    async def test_a_request_id_is_echoed_or_made(self, gateway: LiveGateway) -> None:
        async with aiohttp.ClientSession(gateway.url) as http:
            async with http.get("/healthz", headers={"X-Request-Id": "mine"}) as response:
                assert response.headers["X-Request-Id"] == "mine"
            async with http.get("/healthz") as response:
                assert response.headers["X-Request-Id"]

    async def test_a_session_cookie_opens_and_closes(self, gateway: LiveGateway, tenant: str) -> None:
        jar = aiohttp.CookieJar(unsafe=True)  # cookies of an IP address
        async with aiohttp.ClientSession(gateway.url, cookie_jar=jar) as http:
            async with http.post("/v1/session", json={"token": gateway.token(tenant)}) as response:
                assert response.status == 200
                cookie = response.headers["Set-Cookie"]
                assert "HttpOnly" in cookie and "SameSite=strict" in cookie
            async with http.get(f"/v1/tenants/{tenant}") as response:
                assert response.status == 200
            async with http.get("/v1/session") as response:
                said = await response.json()
                assert said["tenants"] == [tenant]
                assert "exec" in said["scopes"] and said["expires"] > 0
            await http.delete("/v1/session")
            async with http.get("/v1/session") as response:
                assert response.status == 401
            async with http.get(f"/v1/tenants/{tenant}") as response:
                assert response.status == 401
            async with http.post("/v1/session", json={"token": "x"}) as response:
                assert response.status == 401

    async def test_tenants_are_listed_as_far_as_the_token_covers(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        async with gateway.http(tenant) as http, http.get("/v1/tenants") as response:
            listed = (await response.json())["tenants"]
            assert [entry["name"] for entry in listed] == [tenant]
        async with gateway.http("t-none") as http, http.get("/v1/tenants") as response:
            assert (await response.json())["tenants"] == []
        async with gateway.http(tenant) as http, http.get(f"/v1/tenants/{tenant}") as response:
            one = await response.json()
            assert one["status"] == "running"
            assert set(one) >= {"name", "domain", "address", "url", "port", "created", "limits", "usage"}

    async def test_exec_waits_and_returns_all(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.http(tenant) as http:
            body = {"command": "cat; echo $FOO >&2; exit 4", "stdin": "in", "env": {"FOO": "bar"}}
            async with http.post(f"/v1/tenants/{tenant}/exec", json=body) as response:
                said = await response.json()
            assert (said["exit_code"], said["stdout"], said["stderr"]) == (4, "in", "bar\n")
            assert (said["truncated"], said["reason"]) == (False, "exited")
            async with http.post(f"/v1/tenants/{tenant}/exec", json={"argv": ["nope-none"]}) as response:
                problem = await response.json()
                assert (response.status, problem["code"]) == (422, "exec_failed")
            slow = {"command": "sleep 60", "timeout_ms": 200}
            async with http.post(f"/v1/tenants/{tenant}/exec", json=slow) as response:
                assert (await response.json())["reason"] == "timeout"

    async def test_output_over_the_limit_is_cut_and_said_so(self, quick: LiveGateway, tenant: str) -> None:
        async with quick.http(tenant) as http:
            body = {"command": "head -c 3000000 /dev/zero | tr '\\0' x; echo end >&2"}
            async with http.post(f"/v1/tenants/{tenant}/exec", json=body) as response:
                said = await response.json()
            assert said["truncated"] and len(said["stdout"]) == 1 << 20
            assert (said["stderr"], said["exit_code"]) == ("end\n", 0)

    async def test_a_caller_that_hangs_up_takes_the_tree_with_it(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        seconds = mark()
        async with gateway.http(tenant) as http:
            body = {"command": f"setsid sleep {seconds} & sleep {seconds}"}
            asking = asyncio.ensure_future(http.post(f"/v1/tenants/{tenant}/exec", json=body))
            await until(lambda: alive(seconds) == 2)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: alive(seconds) == 0)


class EventsContract:
    async def test_events_are_cloudevents_with_growing_ids(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire, gateway.http(tenant) as http:
            query: dict[str, str] = {"tenant": tenant, "type": "exec.*,tool.*,file.*"}
            async with http.get("/v1/events", params=query) as response:
                assert response.content_type == "text/event-stream"
                await wire.run(argv=["true"])
                await wire.call("tools/call", name="Write", arguments={"file_path": "e", "content": "secret"})
                found = await sse(response, 5)
            assert [event["event"] for event in found] == [
                "exec.started",
                "exec.exited",
                "tool.started",
                "tool.finished",
                "file.written",
            ]
            ids = [int(event["data"]["id"]) for event in found]
            assert ids == sorted(set(ids))
            for event in found:
                body = event["data"]
                # in a cluster the stream's own id names the member too
                assert body["specversion"] == "1.0" and body["id"] == event["id"].rpartition(":")[2]
                assert (body["type"], body["subject"]) == (event["event"], tenant)
                assert b"secret" not in orjson.dumps(body)
            assert found[3]["data"]["data"]["name"] == "Write"
            headers = {"Last-Event-ID": str(found[1]["id"])}
            async with http.get("/v1/events", params=query, headers=headers) as response:
                assert [event["id"] for event in await sse(response, 3)] == [e["id"] for e in found[2:]]
            async with http.get("/v1/events", params={**query, "lastEventId": "1"}) as response:
                assert (await sse(response, 1))[0]["event"] == "gap"

    async def test_the_socket_carries_the_same_stream(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            said = await wire.call("events/subscribe", types=["exec.*"])
            await wire.run(argv=["true"])
            exited = await wire.until(lambda: wire.notified("event", type="exec.exited"))
            assert exited["subject"] == tenant and int(exited["id"]) > said["lastEventId"]
            await wire.call("events/unsubscribe", subscription=said["subscription"])
            told = len(wire.notifications)
            again = await wire.call("events/subscribe", types=["exec.*"], lastEventId=said["position"])
            assert again["position"] == said["position"]

            def replayed() -> list[str]:
                found = [one.params for one in wire.notifications[told:] if one.method == "event"]
                return [one["type"] for one in found if one["data"]["exec"] == exited["data"]["exec"]]

            await wire.until(lambda: replayed() == ["exec.started", "exec.exited"])
            await wire.call("events/unsubscribe", subscription=again["subscription"])
            with pytest.raises(RpcFailure):
                await wire.call("events/unsubscribe", subscription=said["subscription"])

    async def test_foreign_tenants_events_are_not_seen(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.http("t-other") as other, gateway.wire(tenant) as wire:
            async with other.get("/v1/events", params={"type": "exec.*"}) as response:
                await wire.run(argv=["true"])
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(sse(response, 1), 0.5)


class ShutdownContract:
    async def test_sigterm_ends_everything_in_order(self, disposable: LiveGateway, tenant: str) -> None:
        """Clients are told, commands end, sockets close with 1012, SSE ends, the process exits with 0."""
        tree = Tree()
        async with disposable.wire(tenant) as wire, disposable.http(tenant) as http:
            await wire.call("events/subscribe", types=["gateway.draining"])
            async with http.get("/v1/events") as response:
                started = await wire.call("exec/start", argv=["bash", "-c", tree.script])
                await tree.grown()
                waiting = asyncio.create_task(response.content.read())
                code = await disposable.stop(signal.SIGTERM)
                text = (await asyncio.wait_for(waiting, 30)).decode()
            assert code == 0, disposable.log.read_text()
            assert tree.alive() == 0
            assert await wire.closed() == 1012
            assert wire.notified("server/draining") is not None
            ended = wire.notified("exec/exited", exec=started["exec"])
            assert ended is not None and ended["reason"] == "cancelled"
            assert "gateway.draining" in text
        assert "Traceback" not in disposable.log.read_text()


class GatewayContract(
    ConnectionContract,
    ToolsContract,
    ExecContract,
    ResumeContract,
    HttpContract,
    EventsContract,
    ShutdownContract,
):
    """All of it."""


AGENT: Mapping[str, str] = {"GATEWAY_AGENT_URL": "https://agents.example.com/run"}
_TENANT_SESSIONS = 8
QUICK: Mapping[str, str] = {
    "GATEWAY_MAX_EXECS": "4",
    "GATEWAY_EXEC_TAIL": str(1 << 20),
    "GATEWAY_UPLOAD_MAX": str(2 << 20),
    "GATEWAY_MAX_TRANSFERS": "4",
    "GATEWAY_WATCH_FOLDERS": "50",
    "GATEWAY_EXEC_LEFT": "kill",
    **constants(
        {
            "gateway.api.connection.connection.INITIALIZE_TIMEOUT": 2.0,
            "gateway.protocol.maxima.FRAME_MAX": 1 << 20,
            "gateway.protocol.maxima.BODY_MAX": 1 << 20,
            "gateway.api.oneshot.OUTPUT_MAX": 1 << 20,
            "gateway.limits.budget.WATCHES": 3,
            "gateway.limits.budget.TENANT_WATCHES": 4,
            "gateway.api.mcp.PROGRESS_INTERVAL": 0.2,
            "gateway.limits.budget.TENANT_SUBSCRIPTIONS": 20,
            "gateway.tools.toolbox.CALL_LINGER": 0.5,
            "gateway.tools.session.TENANT_SESSIONS": _TENANT_SESSIONS,
        }
    ),
}


async def no_traceback(gateway: LiveGateway) -> None:
    """Whatever the tests did to it, the gateway never failed, and logged no token."""
    said = gateway.log.read_text()
    assert "Traceback" not in said, said
    assert not [signature for signature in gateway.signatures if signature in said]


__all__ = ["QUICK", "GatewayContract", "Wire", "no_traceback"]
