"""A token's end, its renewal, and the sessions of browsers. A subclass gives `gateway` and `tenant`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest

from gateway.auth import tokens
from tests.contracts.lifecycle import ask
from tests.contracts.operator import operator
from tests.contracts.processes import Tree, mark
from tests.live import EVERY_SCOPE, SECRET, LiveGateway, RpcFailure, Wire
from tests.waits import until, until_time

# seconds of a token that ends in a test: long enough to begin something under it on a busy machine
SHORT = 4


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def ends(token: str) -> int:
    return int(jwt.decode(token, options={"verify_signature": False})["exp"])


async def initialized(wire: Wire, token: str, **more: Any) -> Any:
    return await wire.call("initialize", client={"name": "t", "version": "1"}, token=token, **more)


def connected(local: int, remote: int) -> bool:
    """Say whether this machine has a TCP connection between these ports, seen from the first."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    ends = {tuple(int(row[column].rpartition(":")[2], 16) for column in (1, 2)) for row in rows}
    return (local, remote) in ends


class TokensContract:
    async def test_a_tokens_end_ends_what_is_open_under_it(self, gateway: LiveGateway, tenant: str) -> None:
        """Sockets by header and by initialize, busy or idle, streams and followed logs: within a second."""
        token = gateway.token(tenant, ttl=SHORT)
        url, tree = f"/v1/tenants/{tenant}", Tree()
        async with (
            gateway.raw(tenant, Wire, **bearer(token)) as first,
            gateway.raw(tenant) as second,
            gateway.raw(tenant, Wire, **bearer(token)) as anonymous,
            gateway.wire(tenant) as other,
            aiohttp.ClientSession(gateway.url, headers=bearer(token)) as http,
            http.get("/v1/events") as events,
            http.get(f"{url}/logs?follow=1&lines=0") as log,
        ):
            said = await first.call("initialize", client={"name": "t", "version": "1"})
            assert said["expires"] == ends(token)
            await initialized(second, token)
            await second.call("events/subscribe")
            # a command that takes its time to end must not hold the socket
            await second.start_call("tools/call", name="Bash", arguments={"command": tree.script})
            await tree.grown()
            assert time.time() < ends(token), "the machine is too busy for this test"

            async def over(work: Any) -> float:
                await work
                return time.time() - ends(token)

            late = await asyncio.wait_for(
                asyncio.gather(
                    *(over(wire.socket.wait_closed()) for wire in (first, second, anonymous)),
                    over(events.read()),
                    over(log.read()),
                ),
                SHORT + 10,
            )
            assert all(0 <= one < 1 for one in late), late
            assert [wire.socket.close_code for wire in (first, second, anonymous)] == [4401] * 3
            assert "expired" in (first.socket.close_reason or "")
            assert (await ask(http, "GET", url, status=401))["code"] == "unauthorized"
            assert await other.call("ping") == {}

    async def test_who_reads_nothing_keeps_no_socket_beyond_the_end(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """What cannot be sent any more is not waited for."""
        token = gateway.token(tenant, ttl=SHORT)
        async with gateway.raw(tenant) as wire:
            await initialized(wire, token)
            transport = wire.socket.transport
            theirs, ours = gateway.port, transport.get_extra_info("sockname")[1]
            await wire.call("exec/start", argv=["yes"], lingerMs=0)
            transport.pause_reading()
            assert connected(theirs, ours)
            # nothing is told to who reads nothing
            await until(lambda: not connected(theirs, ours), SHORT + 30, every=0.1)
            transport.abort()

    async def test_an_upload_is_not_finished_by_a_token_that_ended(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """What would be written is said after the end: a slow body is no way to keep a right for ever."""
        token, name = gateway.token(tenant, ttl=2), mark()
        url = f"/v1/tenants/{tenant}/files/{name}"

        async def body() -> Any:
            yield b"begun"
            await until_time(ends(token))
            yield b"too late"

        async with aiohttp.ClientSession(gateway.url, headers=bearer(token)) as http:
            try:
                async with http.put(url, data=body()) as response:
                    assert response.status == 401
            except aiohttp.ClientOSError:
                pass  # the answer may be overtaken by the reset
        async with gateway.http(tenant) as other:
            await ask(other, "GET", url, status=404)

    async def test_a_request_that_is_long_in_coming_is_not_carried_out_after_the_end(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        token = gateway.token(tenant, ttl=2)

        async def body() -> Any:
            yield b'{"command": "ec'
            await until_time(ends(token))
            yield b'ho ran"}'

        async with aiohttp.ClientSession(gateway.url, headers=bearer(token)) as http:
            async with http.post(f"/v1/tenants/{tenant}/exec", data=body()) as response:
                assert (response.status, (await response.json())["code"]) == (401, "unauthorized")

    async def test_what_is_under_way_is_carried_out(self, gateway: LiveGateway, tenant: str) -> None:
        token = gateway.token(tenant, ttl=2)
        async with aiohttp.ClientSession(gateway.url, headers=bearer(token)) as http:
            body = {"command": f"while [ $(date +%s) -le {ends(token) + 1} ]; do sleep 0.1; done; echo done"}
            async with http.post(f"/v1/tenants/{tenant}/exec", json=body) as response:
                assert (await response.json())["stdout"] == "done\n"

    async def test_a_renewed_socket_outlives_its_token(self, gateway: LiveGateway, tenant: str) -> None:
        """Its command, subscription, watch, pending request and tool session go on."""
        first, second = gateway.token(tenant, ttl=SHORT), gateway.token(tenant)
        last, path = ends(first) + 1, f"{mark()}.txt"
        async with gateway.raw(tenant) as wire, gateway.wire(tenant) as other:
            await initialized(wire, first, session=mark())
            await wire.call("tools/call", name="Write", arguments={"file_path": "r/x", "content": ""})
            await wire.call("tools/call", name="Bash", arguments={"command": "cd r"})
            await wire.call("events/subscribe", types=["file.written"])
            watch = (await wire.call("files/watch", paths=["."]))["watch"]
            script = f"read a; while [ $(date +%s) -le {last} ]; do sleep 0.1; done; echo $a"
            started = await wire.call("exec/start", command=script, stdin=True)
            _, waiting = await wire.start_call("exec/wait", exec=started["exec"])
            said = await wire.call("session/renew", token=second)
            assert said == {"expires": ends(second), "scopes": sorted(EVERY_SCOPE)}
            await wire.stdin(started["channel"], b"renewed\n")
            assert (await wire.exited(started["exec"]))["exitCode"] == 0
            assert time.time() > ends(first)
            assert wire.output[started["channel"], 1] == b"renewed\n"
            assert (await waiting)["exitCode"] == 0
            write = {"file_path": f"/srv/site/{path}", "content": ""}
            await other.call("tools/call", name="Write", arguments=write)
            await wire.until(lambda: wire.notified("event", type="file.written"))
            await wire.until(lambda: wire.notified("files/changed", watch=watch))
            stands = await wire.call("tools/call", name="Bash", arguments={"command": "pwd"})
            assert stands["content"][0]["text"].endswith("/srv/site/r")

    async def test_a_renewed_socket_goes_by_the_new_token_alone(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        first, second = gateway.token(tenant), gateway.token(tenant)
        async with gateway.raw(tenant) as wire, operator(gateway) as admin:
            await initialized(wire, first)
            await wire.call("session/renew", token=second)

            async def revoke(token: str) -> int:
                body = {"id": tokens.verify(SECRET, token).id}
                closed: int = (await ask(admin, "POST", "/v1/revocations", body))["closed"]
                return closed

            assert await revoke(first) == 0
            assert await wire.call("ping") == {}
            with pytest.raises(RpcFailure) as caught:
                await wire.call("session/renew", token=first)
            assert caught.value.code == "unauthorized"
            assert await revoke(second) == 1
            assert await wire.closed() == 4401

    async def test_a_token_that_may_not_leaves_the_socket_as_it_is(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        cases: Iterable[tuple[str, str]] = (
            ("not a token", "unauthorized"),
            (tokens.issue(SECRET[::-1], "test", [tenant], ["exec"], 60), "unauthorized"),
            (tokens.issue(SECRET, "somebody", [tenant], EVERY_SCOPE, 60), "forbidden"),
            (tokens.issue(SECRET, "test", ["t-other"], EVERY_SCOPE, 60), "forbidden"),
        )
        async with gateway.wire(tenant) as wire:
            for token, code in cases:
                with pytest.raises(RpcFailure) as caught:
                    await wire.call("session/renew", token=token)
                assert caught.value.code == code
            exit_, out, _ = await wire.run(argv=["echo", "still"])
            assert (exit_["exitCode"], out) == (0, b"still\n")

    async def test_fewer_scopes_end_what_they_do_not_allow(self, gateway: LiveGateway, tenant: str) -> None:
        """The client is told of each; the command lives on for its linger time; more scopes open more."""
        async with gateway.wire(tenant) as wire:
            subscription = (await wire.call("events/subscribe"))["subscription"]
            watch = (await wire.call("files/watch", paths=["."]))["watch"]
            started = await wire.call("exec/start", argv=["cat"], stdin=True)
            said = await wire.call("session/renew", token=gateway.token(tenant, scopes=("deploy",)))
            assert said["scopes"] == ["deploy"]
            for method, facts in (
                ("exec/detached", {"exec": started["exec"], "channel": started["channel"]}),
                ("events/ended", {"subscription": subscription}),
                ("files/changed", {"watch": watch, "overflow": True}),
            ):
                told = await wire.until(lambda m=method, f=facts: wire.notified(m, **f))
                assert told.get("reason", told.get("ended")) == "forbidden"
            await wire.stdin(started["channel"], b"too late\n")
            for method in ("exec/list", "events/subscribe", "files/list"):
                with pytest.raises(RpcFailure) as caught:
                    await wire.call(method)
                assert caught.value.code == "forbidden"
            await wire.call("session/renew", token=gateway.token(tenant))
            again = await wire.call("exec/attach", exec=started["exec"])
            assert again["stdin"] == 0
            await wire.stdin(again["channel"], b"again\n")
            await wire.call("exec/closeStdin", exec=started["exec"])
            await wire.exited(started["exec"])
            assert wire.output[again["channel"], 1] == b"again\n"

    async def test_what_came_late_for_its_scope_ends_too(self, gateway: LiveGateway, tenant: str) -> None:
        """Asked for before the renewal, there only after it."""
        async with gateway.wire(tenant) as wire:
            _, watching = await wire.start_call("files/watch", paths=["."])
            _, starting = await wire.start_call("exec/start", argv=["sleep", "60"], lingerMs=0)
            await wire.call("session/renew", token=gateway.token(tenant, scopes=("deploy",)))
            watch, started = (await watching)["watch"], await starting
            await wire.until(lambda: wire.notified("files/changed", watch=watch, ended="forbidden"))
            await wire.until(lambda: wire.notified("exec/detached", exec=started["exec"]))

    async def test_sessions_in_slots_live_side_by_side(self, gateway: LiveGateway, tenant: str) -> None:
        """One browser, several tokens: each request says whose it is, and no other is taken in its place."""
        jar = aiohttp.CookieJar(unsafe=True)
        async with aiohttp.ClientSession(gateway.url, cookie_jar=jar) as http:
            for slot, name in (("a1", tenant), ("b2", "t-other"), (None, "t-third")):
                body = {"token": gateway.token(name)} | ({} if slot is None else {"slot": slot})
                assert (await ask(http, "POST", "/v1/session", body))["slot"] == slot
            for where, headers, slot, names in (
                ("", {"X-Session-Slot": "a1"}, "a1", [tenant]),
                ("?slot=a1", {}, "a1", [tenant]),
                ("?slot=b2", {}, "b2", ["t-other"]),
                ("?slot=a1", {"X-Session-Slot": "b2"}, "b2", ["t-other"]),
                ("", {}, None, ["t-third"]),
                ("?slot=a1", bearer(gateway.token("t-mine")), None, ["t-mine"]),
            ):
                async with http.get(f"/v1/session{where}", headers=headers) as response:
                    said = await response.json()
                    assert (said["slot"], said["tenants"]) == (slot, names)
            await ask(http, "GET", "/v1/session?slot=c3", status=401)
            await ask(http, "GET", "/v1/session?slot=A;1", status=401)
            await ask(http, "POST", "/v1/session", {"token": gateway.token(tenant), "slot": "A"}, 400)
            cookies = "; ".join(f"{cookie.key}={cookie.value}" for cookie in jar)
            for where, code in (("?slot=a1", None), ("?slot=b2", 4404), ("?slot=c3", 4401)):
                async with gateway.raw(f"{tenant}/ws{where}&path=", Cookie=cookies) as wire:
                    if code is None:
                        await wire.call("initialize", client={})
                    else:
                        if code == 4401:
                            with pytest.raises(RpcFailure):
                                await wire.call("initialize", client={})
                        assert await wire.closed() == code
            await ask(http, "DELETE", "/v1/session?slot=a1", status=204)
            await ask(http, "GET", "/v1/session?slot=a1", status=401)
            await ask(http, "GET", "/v1/session?slot=b2")

    async def test_a_person_gets_a_token_for_an_agent_that_ends_with_their_own(
        self, gateway: LiveGateway, quick: LiveGateway, tenant: str
    ) -> None:
        """By the cookie too; for a tenant that it covers, and where the gateway offers an agent."""
        mine = gateway.token(tenant, "t-other", ttl=600)
        path = f"/v1/tenants/{tenant}/agent-token"
        jar = aiohttp.CookieJar(unsafe=True)
        async with aiohttp.ClientSession(gateway.url, cookie_jar=jar) as http:
            await ask(http, "POST", path, status=401)
            await ask(http, "POST", "/v1/session", {"token": mine, "slot": "a1"})
            said = await ask(http, "POST", f"{path}?slot=a1")
            assert said["subject"].endswith(" (agent)") and said["expires"] <= ends(mine)
            assert said["scopes"] == ["events", "exec", "files:read", "files:write"]
            async with http.post(path, headers={**bearer(mine), "Origin": "https://evil.example"}) as answer:
                assert answer.status == 403
        async with aiohttp.ClientSession(gateway.url, headers=bearer(said["token"])) as http:
            assert (await ask(http, "GET", "/v1/session"))["tenants"] == [tenant]
            await ask(http, "GET", "/v1/tenants/t-other", status=404)
            await ask(http, "POST", f"/v1/tenants/{tenant}/stop", status=403)
            async with operator(gateway) as boss:
                await ask(boss, "POST", "/v1/revocations", {"id": tokens.token_id(mine)})
            await ask(http, "GET", "/v1/session", status=401)
        async with aiohttp.ClientSession(gateway.url, headers=bearer(gateway.token("t-other"))) as http:
            await ask(http, "POST", path, status=404)
        async with aiohttp.ClientSession(quick.url, headers=bearer(quick.token(tenant))) as http:
            assert (await ask(http, "POST", path, status=404))["reason"] == "off"

    async def test_slots_do_not_pile_up_in_a_browser(self, gateway: LiveGateway, tenant: str) -> None:
        """The oldest go; the one that was just opened stays."""
        jar = aiohttp.CookieJar(unsafe=True)
        async with aiohttp.ClientSession(gateway.url, cookie_jar=jar) as http:
            for number in range(12):
                body = {"token": gateway.token(tenant), "slot": f"s{number}"}
                await ask(http, "POST", "/v1/session", body)
                assert len(jar) <= tokens.MOST_SLOTS
            await ask(http, "GET", "/v1/session?slot=s11")
            assert len(jar) == tokens.MOST_SLOTS

    async def test_by_https_only_a_cookie_of_this_host_is_taken(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """A site on a sibling domain can set `gateway_session`, but nothing that begins with `__Host-`."""
        mine, theirs = gateway.token(tenant), gateway.token("t-other")
        secure = {"X-Forwarded-Proto": "https"}
        async with aiohttp.ClientSession(gateway.url, headers=secure) as http:
            for slot, suffix in ((None, ""), ("a1", "_a1")):
                body = {"token": mine} | ({} if slot is None else {"slot": slot})
                async with http.post("/v1/session", json=body) as response:
                    cookie = response.headers["Set-Cookie"]
                    assert cookie.startswith(f"__Host-gateway_session{suffix}=")
                    parts = {part.strip() for part in cookie.split(";")[1:]}
                    assert {"HttpOnly", "Path=/", "SameSite=strict", "Secure"} <= parts
                    assert not any(part.lower().startswith("domain") for part in parts)
                where = "/v1/session" + ("" if slot is None else f"?slot={slot}")
                tossed = f"gateway_session{suffix}={theirs}"
                await self._with(http, where, tossed, 401)
                said = await self._with(http, where, f"{tossed}; __Host-gateway_session{suffix}={mine}", 200)
                assert said["tenants"] == [tenant]

    async def test_two_cookies_of_one_name_are_refused_with_what_to_do(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        mine, theirs = gateway.token(tenant), gateway.token("t-other")
        async with aiohttp.ClientSession(gateway.url) as http:
            for name, where in (("gateway_session", ""), ("gateway_session_a1", "?slot=a1")):
                cookies = f"{name}={theirs}; {name}={mine}"
                said = await self._with(http, f"/v1/session{where}", cookies, 401)
                assert name in said["detail"] and "delete this site's cookies" in said["detail"]
            async with gateway.raw(tenant, Cookie=f"gateway_session={mine}; gateway_session={mine}") as wire:
                assert await wire.closed() == 4401

    @pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.nip.io", "0"])
    async def test_a_host_that_is_not_ours_is_refused(
        self, gateway: LiveGateway, tenant: str, host: str
    ) -> None:
        """How DNS rebinding comes: a page whose name leads here is same-origin with itself."""
        headers = {"Host": f"{host}:{gateway.port}"}
        own = {**headers, "Origin": f"http://{host}:{gateway.port}"}
        async with gateway.http(tenant) as http:
            for method, path in (
                *(
                    ("GET", path)
                    for path in ("/", "/healthz", "/metrics", "/v1/tenants", "/v1/events", "/no")
                ),
                *(("POST", path) for path in (f"/v1/tenants/{tenant}/mcp", "/v1/session")),
                ("PUT", f"/v1/tenants/{tenant}/files/rebound"),
            ):
                async with http.request(method, path, headers=own, data=b"{}") as response:
                    assert (response.status, path) == (421, path)
                    assert response.content_type == "application/problem+json"
                    problem = await response.json()
                    assert (problem["code"], problem["status"]) == ("forbidden", 421)
                    assert "GATEWAY_HOSTS" in problem["detail"]
        bare = aiohttp.ClientSession(gateway.url, headers={**own, **bearer(gateway.token(tenant))})
        async with bare as http:
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await http.ws_connect(f"/v1/tenants/{tenant}/ws", protocols=("gateway.v1",))
            assert caught.value.status == 421

    async def test_a_host_that_is_ours_is_served(self, gateway: LiveGateway, tenant: str) -> None:
        async with aiohttp.ClientSession(gateway.url) as http:
            for host in (
                "localhost",
                "Gateway.LOCALHOST.",
                f"localhost:{gateway.port}",
                "[::1]",
                "10.1.2.3:9",
            ):
                async with http.get("/metrics", headers={"Host": host}) as response:
                    assert response.status == 200, host
            # as Caddy asks for a visitor
            async with http.get("/v1/wake?domain=no.example", headers={"Host": "no.example"}) as response:
                assert response.status == 404

    async def test_a_foreign_page_gets_nothing_by_mcp(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.http(tenant) as http:
            headers = {"Origin": "https://evil.example", "Accept": "application/json, text/event-stream"}
            body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
            async with http.post(f"/v1/tenants/{tenant}/mcp", json=body, headers=headers) as response:
                assert (response.status, (await response.json())["code"]) == (403, "forbidden")

    @staticmethod
    async def _with(http: aiohttp.ClientSession, url: str, cookies: str, status: int) -> Any:
        async with http.get(url, headers={"Cookie": cookies}) as response:
            assert response.status == status
            return await response.json()
