"""Gateways of one cluster: whoever is asked, the tenant's home answers. Without Incus, on loopback."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import signal
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import pytest

from gateway.auth import tokens
from gateway.cluster.identity import Identity
from gateway.protocol import CloseCode
from tests.clusters import clustered
from tests.contracts.gateway import no_traceback, sse
from tests.live import LiveGateway, RpcFailure
from tests.waits import until

HOMES = {"m1": ("one",), "m2": ("two", "other"), "m3": ()}


@pytest.fixture(scope="module")
async def members(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, LiveGateway]]:
    async with clustered(tmp_path_factory.mktemp("cluster"), HOMES) as members:
        yield members
    for gateway in members.values():
        await no_traceback(gateway)


@pytest.fixture
async def mortal(tmp_path: Path) -> AsyncIterator[dict[str, LiveGateway]]:
    """Two that a test may end."""
    async with clustered(tmp_path, {"m1": ("one",), "m2": ("two",)}) as members:
        yield members


async def answer(http: aiohttp.ClientSession, path: str, method: str = "GET", **given: Any) -> Any:
    async with http.request(method, path, **given) as response:
        return response.status, await response.json()


def peer_of(gateway: LiveGateway) -> tuple[str, str]:
    """Return where a gateway listens for peers, and its certificate."""
    said = orjson.loads(Path(gateway.environment["GATEWAY_LOCAL_MEMBER"]).read_bytes())
    told = orjson.loads(said["user.gateway.peer"])
    return f"https://{told['address']}", told["certificate"]


async def test_each_gateway_lists_the_tenants_of_all(members: dict[str, LiveGateway]) -> None:
    for gateway in members.values():
        async with gateway.http("*") as http:
            status, said = await answer(http, "/v1/tenants")
            assert (status, said["unanswered"]) == (200, [])
            found = [(one["name"], one["location"]) for one in said["tenants"]]
            assert found == [("one", "m1"), ("other", "m2"), ("two", "m2")]
            pages, after = [], ""
            while after is not None:
                _, page = await answer(http, f"/v1/tenants?limit=1&after={after}")
                pages += [one["name"] for one in page["tenants"]]
                after = page.get("next")
            assert pages == ["one", "other", "two"]
        async with gateway.http("two") as http:
            _, said = await answer(http, "/v1/tenants")
            assert [one["name"] for one in said["tenants"]] == ["two"]


async def test_a_websocket_tells_its_tenants_home(members: dict[str, LiveGateway]) -> None:
    for gateway, (home, tenants) in itertools.product(members.values(), HOMES.items()):
        for tenant in tenants:
            async with gateway.raw(tenant) as wire:
                said = await wire.call("initialize", client={}, token=gateway.token(tenant))
                assert (said["tenant"], said["home"]) == (tenant, {"member": home, "url": None})


async def test_a_token_is_told_no_more_by_another_gateway(members: dict[str, LiveGateway]) -> None:
    """Of a tenant that it does not cover, wherever that is: the same answer as of none."""
    said = set()
    for gateway, tenant in itertools.product(members.values(), ("two", "nobody")):
        async with gateway.http("one") as http:
            status, problem = await answer(http, f"/v1/tenants/{tenant}")
            said.add((status, problem["code"], problem["detail"].replace(tenant, "")))
        async with gateway.raw(tenant) as wire:
            with pytest.raises(RpcFailure) as refused:
                await wire.call("initialize", client={}, token=gateway.token("one"))
            assert refused.value.code == "not_found" and await wire.closed() == 4404
    assert said == {(404, "not_found", "no tenant ")}


async def test_events_of_one_tenant_come_from_its_home(members: dict[str, LiveGateway]) -> None:
    async with members["m1"].http("two") as http, http.get("/v1/events?tenant=two") as events:
        async with members["m3"].wire("two") as wire:
            await wire.run(command="true")
        found = await sse(events, 2)
        assert [one["event"] for one in found] == ["exec.started", "exec.exited"]


async def test_events_of_all_members_come_in_one_stream_that_resumes_anywhere(
    members: dict[str, LiveGateway],
) -> None:
    async def run_in_each() -> set[str]:
        found = set()
        for tenant in ("one", "two"):
            async with members["m2"].wire(tenant) as wire:
                exit_, _, _ = await wire.run(command="true")
                found.add(str(exit_["exec"]))
        return found

    def told(events: list[dict[str, Any]]) -> set[str]:
        return {one["data"]["data"]["exec"] for one in events}

    url = "/v1/events?type=exec.exited"
    async with members["m1"].http("one", "two") as http, http.get(url) as events:
        assert {part.partition(":")[0] for part in events.headers["Last-Event-ID"].split(",")} == set(HOMES)
        ran = await run_in_each()
        found = await sse(events, 2)
        assert told(found) == ran
        assert {one["data"]["source"] for one in found} == {"/gateway/m1", "/gateway/m2"}
    missed = await run_in_each()
    for gateway in members.values():
        async with gateway.http("one", "two") as http:
            async with http.get(url, headers={"Last-Event-ID": found[-1]["id"]}) as events:
                again = await sse(events, len(missed))
                assert told(again) == missed
                latest = await run_in_each()
                assert told(await sse(events, 2)) == latest
                missed |= latest
            # from between two members' events
            async with http.get(url, headers={"Last-Event-ID": again[0]["id"]}) as events:
                rest = await sse(events, len(missed) - 1)
                assert told(rest) == missed - told(again[:1])
    async with members["m3"].http("*") as http:
        async with http.get("/v1/events", headers={"Last-Event-ID": "17"}) as events:
            assert (await sse(events, 1))[0]["event"] == "gap"


async def test_a_call_with_one_key_runs_once_whoever_is_asked(
    members: dict[str, LiveGateway], tmp_path: Path
) -> None:
    async def call(gateway: LiveGateway, number: int) -> Any:
        async with gateway.http("two") as http:
            given = {"headers": {"Idempotency-Key": f"k{number}"}, "json": {"command": f"echo {number} >> k"}}
            return await answer(http, "/v1/tenants/two/tools/Bash", "POST", **given)

    pairs = list(itertools.product(members.values(), range(8)))
    answers = await asyncio.gather(*(call(gateway, number) for gateway, number in pairs))
    assert {status for status, _ in answers} == {200}
    async with members["m3"].http("two") as http, http.get("/v1/tenants/two/files/k") as file:
        assert sorted(map(int, (await file.text()).split())) == list(range(8))


async def test_the_audit_is_of_all_members(members: dict[str, LiveGateway]) -> None:
    for tenant in ("one", "two"):
        async with members["m3"].wire(tenant) as wire:
            await wire.run(command="true")
    async with members["m3"].http("*", scopes=("admin",)) as http:

        async def recorded() -> bool:
            _, said = await answer(http, "/v1/audit?limit=1000")
            found = {(one["member"], one["tenant"]) for one in said["entries"]}
            return found >= {("m1", "one"), ("m2", "two")}

        await until(recorded, 10)
        _, said = await answer(http, "/v1/audit?limit=1000")
        times = [one["time"] for one in said["entries"]]
        assert times == sorted(times, reverse=True) and said["unanswered"] == []
        mine = [one for one in said["entries"] if one["member"] == "m2"]
        _, older = await answer(http, f"/v1/audit?member=m2&before={mine[0]['id']}&limit=1")
        assert older["entries"] == mine[1:2]
        status, problem = await answer(http, "/v1/audit?before=5")
        assert (status, problem["field"]) == (400, "member")


# --- where something new is made ------------------------------------------------------------------------


async def holders(members: dict[str, LiveGateway], **what: str) -> list[str]:
    """Return the members that say to a peer that they have something."""
    found = []
    async with aiohttp.ClientSession() as http:
        for name, gateway in members.items():
            url, certificate = peer_of(gateway)
            peer = members["m2" if name == "m1" else "m1"]
            ours = Identity(Path(peer.environment["GATEWAY_STATE_DIR"])).calling(certificate)
            async with http.get(f"{url}/peer/ask/find", params=what, ssl=ours) as said:
                found += [name] if said.status == 200 else []
    return found


async def test_a_new_tenant_goes_to_the_member_with_the_fewest_that_run(
    members: dict[str, LiveGateway],
) -> None:
    for number, gateway in enumerate(members.values()):
        async with gateway.http("*") as http:
            body = {"domain": f"new{number}.test", "template": "static", "tenant": f"new{number}"}
            status, begun = await answer(http, "/v1/deployments", "POST", json=body)
            assert status == 202, begun
            assert await holders(members, deployment=begun["id"]) == ["m3"]
            assert (await answer(http, f"/v1/deployments/{begun['id']}"))[1]["id"] == begun["id"]
            _, ended = await answer(http, f"/v1/deployments/{begun['id']}", "DELETE")
            assert ended["state"] == "rolledback"


async def test_one_key_makes_one_new_tenant_whoever_is_asked(members: dict[str, LiveGateway]) -> None:
    """At the same time: all of them choose the same home for it, which knows the key."""

    async def deploy(gateway: LiveGateway) -> Any:
        async with gateway.http("*") as http:
            body = {"domain": "once.test", "template": "static"}
            given = {"headers": {"Idempotency-Key": "one key"}, "json": body}
            return await answer(http, "/v1/deployments", "POST", **given)

    answers = await asyncio.gather(*(deploy(gateway) for gateway in [*members.values()] * 5))
    assert {status for status, _ in answers} <= {200, 202}, answers
    (identity,) = {said["id"] for _, said in answers}
    async with members["m1"].http("*") as http:
        await answer(http, f"/v1/deployments/{identity}", "DELETE")


async def test_what_is_deployed_to_a_tenant_goes_to_its_home(members: dict[str, LiveGateway]) -> None:
    """Also what another tenant's site is published to."""
    async with members["m3"].http("*") as http:
        for path, body in (
            ("/v1/deployments", {"domain": "one.test", "template": "static", "tenant": "one"}),
            ("/v1/tenants/two/publish", {"domain": "published.test", "tenant": "one"}),
        ):
            status, begun = await answer(http, path, "POST", json=body)
            assert status == 202, begun
            assert await holders(members, deployment=begun["id"]) == ["m1"]
            await answer(http, f"/v1/deployments/{begun['id']}", "DELETE")


# --- peers ----------------------------------------------------------------------------------------------


async def test_only_a_peer_is_heard(members: dict[str, LiveGateway], tmp_path: Path) -> None:
    """Somebody without a certificate, or with another one, gets no answer at all."""
    url, certificate = peer_of(members["m2"])
    unknown = Identity(tmp_path).calling(certificate)
    bare = ssl.create_default_context(cadata=certificate)
    bare.check_hostname = False
    async with aiohttp.ClientSession() as http:
        for context in (unknown, bare):
            with pytest.raises(aiohttp.ClientError):
                await http.get(f"{url}/peer/watch", ssl=context)
        ours = Identity(Path(members["m1"].environment["GATEWAY_STATE_DIR"])).calling(certificate)
        async with http.get(f"{url}/peer/ask/find?tenant=two", ssl=ours) as found:
            assert found.status == 200
        with pytest.raises(aiohttp.ClientError):  # another than the one that was published
            await http.get(f"{peer_of(members['m3'])[0]}/peer/watch", ssl=ours)


async def test_of_a_peer_too_a_length_in_doubt_is_refused(members: dict[str, LiveGateway]) -> None:
    """And the connection ends, with nothing that follows being taken for a request."""
    url, certificate = peer_of(members["m2"])
    ours = Identity(Path(members["m1"].environment["GATEWAY_STATE_DIR"])).calling(certificate)
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port, ssl=ours)
    ask = b"POST /peer/ask/find HTTP/1.1\r\nHost: m2\r\n"
    both = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    writer.write(ask + both + ask + b"Content-Length: 2\r\n\r\n{}")
    async with asyncio.timeout(30):
        said = await reader.read()
    assert said.startswith(b"HTTP/1.1 400 ") and said.count(b"HTTP/1.1") == 1
    writer.close()


async def test_a_request_is_passed_on_once(members: dict[str, LiveGateway]) -> None:
    """A gateway that does not have the tenant says so to its peer, and asks nobody else."""
    url, certificate = peer_of(members["m3"])
    ours = Identity(Path(members["m1"].environment["GATEWAY_STATE_DIR"])).calling(certificate)
    headers = {"X-Gateway-Relayed": "http 192.0.2.1", "Authorization": f"Bearer {members['m1'].token('*')}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        for tenant in ("two", "nobody"):
            async with http.get(f"{url}/v1/tenants/{tenant}", ssl=ours) as refused:
                assert (refused.status, refused.headers["X-Gateway-Not-Home"]) == (421, "1")
        _, said = await answer(http, f"{url}/v1/tenants", ssl=ours)
        assert said == {"tenants": []}


async def test_nobody_else_can_say_that_a_request_was_passed_on(members: dict[str, LiveGateway]) -> None:
    async with members["m3"].http("two") as http:
        headers = {"X-Gateway-Relayed": "http 192.0.2.1"}
        status, _ = await answer(http, "/v1/tenants/two", headers=headers)
        assert status == 200


# --- a member that is away ------------------------------------------------------------------------------


async def test_a_member_that_is_away_is_told_at_once(mortal: dict[str, LiveGateway]) -> None:
    """Also by a gateway that was started since, and until it is back."""
    one, two = mortal["m1"], mortal["m2"]
    async with one.http("*") as http, one.wire("two") as wire:
        await wire.call("ping")
        await two.stop(signal.SIGKILL)
        died = time.monotonic()
        # before anybody can tell that it is away
        _, said = await answer(http, "/v1/tenants")
        assert said["unanswered"] == ["m2"]
        assert [(entry["name"], entry["location"]) for entry in said["tenants"]] == [
            ("one", "m1"),
            ("two", "m2"),
        ]

        async def away() -> bool:
            status, said = await answer(http, "/v1/tenants/two")
            return bool(status == 503 and said.get("reason") == "member_away")

        await until(away, 10)
        assert time.monotonic() - died < 4
        assert await wire.closed() == 1013
    await one.stop()
    await one.start()
    async with one.http("*") as http:
        began = time.monotonic()
        status, said = await answer(http, "/v1/tenants/two")
        assert (status, said["reason"], said["location"]) == (503, "member_away", "m2")
        _, said = await answer(http, "/v1/tenants")
        assert said["unanswered"] == ["m2"]
        async with http.get("/metrics") as metrics:
            assert 'gateway_peer_up{member="m2"} 0.0' in await metrics.text()
        found = {entry["name"]: (entry["status"], entry.get("reason")) for entry in said["tenants"]}
        assert found == {"one": ("running", None), "two": ("error", "member_away")}
        assert time.monotonic() - began < 3  # nothing waits for a member that is known to be away
        async with one.raw("two") as wire:
            with pytest.raises(RpcFailure) as refused:
                await wire.call("initialize", client={}, token=one.token("two"))
            assert refused.value.data["reason"] == "member_away" and await wire.closed() == 1013
        async with one.raw("two", Authorization=f"Bearer {one.token('two')}") as wire:
            assert await wire.closed() == 1013
        async with one.http("one") as other:  # who may not know of it is told nothing
            assert (await answer(other, "/v1/tenants/two"))[0] == 404
        await two.start()

        async def back() -> bool:
            return bool((await answer(http, "/v1/tenants/two"))[0] == 200)

        await until(back, 10)


async def test_a_gateway_that_was_away_refuses_a_revoked_token_from_its_first_answer(
    mortal: dict[str, LiveGateway],
) -> None:
    one, two = mortal["m1"], mortal["m2"]
    raw = one.token("two")
    headers = {"Authorization": f"Bearer {raw}"}
    await two.stop()
    async with one.http("*", scopes=("admin",)) as http:
        body = {"id": tokens.token_id(raw), "expires": time.time() + 600}
        status, said = await answer(http, "/v1/revocations", "POST", json=body)
        assert (status, said["recorded"], said["unheard"]) == (200, True, ["m2"])
    await two.start()
    for gateway in (two, one):
        async with aiohttp.ClientSession(gateway.url, headers=headers) as http:
            assert (await answer(http, "/v1/tenants/two"))[0] == 401


async def test_a_restart_of_the_home_is_no_more_than_a_pause(mortal: dict[str, LiveGateway]) -> None:
    """A request that comes meanwhile waits, as long as the home is not taken for away."""
    one, two = mortal["m1"], mortal["m2"]
    async with one.http("two") as http:
        answers: list[Any] = []

        async def ask() -> None:
            while True:
                answers.append(await answer(http, "/v1/tenants/two"))

        asking = asyncio.create_task(ask())
        await until(lambda: answers, 10)
        await two.stop()
        await two.start()
        await until(lambda: answers[-1][0] == 200, 10)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        refused = [said for status, said in answers if status != 200]
        assert all(said["reason"] == "member_away" for said in refused)


async def test_a_gateway_that_ends_tells_the_clients_of_others_tenants(
    mortal: dict[str, LiveGateway],
) -> None:
    one = mortal["m1"]
    async with one.wire("two") as wire:
        started = await wire.call("exec/start", argv=["sleep", "30"], execId="kept", lingerMs=20_000)
        assert await one.stop() == 0
        assert await wire.closed() == 1012
        assert wire.notified("server/draining") is not None
    async with mortal["m2"].wire("two") as wire:
        (kept,) = (await wire.call("exec/list"))["execs"]
        assert (kept["exec"], kept["state"], started["exec"]) == ("kept", "running", "kept")


async def test_an_upgrade_of_the_home_is_noticed_by_no_request(mortal: dict[str, LiveGateway]) -> None:
    """The next process takes its port over, too; a websocket is told to come again, and finds that one."""
    one, two = mortal["m1"], mortal["m2"]
    successor = LiveGateway(two.environment, two.log)
    successor.port, successor.url, successor.serve = two.port, two.url, ("serve", "--take-over")
    async with one.http("two") as http, one.wire("two") as wire:
        answers: list[Any] = []

        async def ask() -> None:
            while True:
                answers.append(await answer(http, "/v1/tenants/two"))

        asking = asyncio.create_task(ask())
        await until(lambda: answers, 10)
        assert two.process is not None
        await successor.start()
        try:
            assert await asyncio.wait_for(two.process.wait(), 30) == 0
            seen = len(answers)
            await until(lambda: len(answers) > seen + 5, 20)
            assert await wire.closed() == 1012 and wire.notified("server/draining") is not None
            async with one.wire("two") as again:
                assert await again.call("ping") == {}
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert [said for status, said in answers if status != 200] == []
        finally:
            asking.cancel()
            assert await successor.stop() == 0


async def says(gateway: LiveGateway, path: str, method: str = "GET", **given: Any) -> tuple[int, str]:
    """Return status and detail of an answer; 0 while nobody listens."""
    try:
        async with gateway.http("*") as http:
            status, said = await answer(http, path, method, **given)
    except aiohttp.ClientError:
        return 0, ""
    return status, said.get("detail", "")


async def test_a_removed_member_that_starts_again_serves_nothing(
    mortal: dict[str, LiveGateway], tmp_path: Path
) -> None:
    """Its own database still has it as a member: its peer tells it. One that joins again is a member."""
    m1, m2 = mortal["m1"], mortal["m2"]
    await m2.stop(signal.SIGKILL)
    file, database = tmp_path / "members" / "m2", tmp_path / "its-own"
    shutil.copytree(file.parent, database)
    kept = file.read_bytes()
    file.unlink()

    async def knows() -> bool:
        async with m1.http("*") as http:
            return not (await answer(http, "/v1/tenants"))[1]["unanswered"]

    await until(knows, 30, every=0.1)
    m2.environment["GATEWAY_LOCAL_MEMBER"] = str(database / "m2")
    starting = asyncio.create_task(m2.start())

    async def refuses() -> bool:
        status, said = await says(m2, "/readyz")
        assert status != 200, said
        return status == 503 and "was removed from the cluster" in said

    await until(refuses, 30, every=0.05)
    write = {"file_path": "a.txt", "content": "by the removed one"}
    assert (await says(m2, "/v1/tenants/two/tools/Write", "POST", json=write))[0] == 503
    assert not [*(tmp_path / "m2").rglob("a.txt")]
    assert (await says(m1, "/v1/tenants/one"))[0] == 200
    starting.cancel()
    await m2.stop()
    file.write_bytes(kept)
    m2.environment["GATEWAY_LOCAL_MEMBER"] = str(file)
    await m2.start()
    assert (await says(m2, "/v1/tenants/two"))[0] == 200


async def test_a_member_that_is_removed_while_it_runs_ends_what_clients_have_open(
    mortal: dict[str, LiveGateway], tmp_path: Path
) -> None:
    m2 = mortal["m2"]
    async with m2.wire("two") as wire:
        (tmp_path / "members" / "m2").unlink()  # of the folder of all: what its own says of it, it never asks
        with pytest.raises(ConnectionError):
            await wire.until(lambda: False, 40)
        assert wire.socket.close_code == CloseCode.TRY_LATER
    assert (await says(m2, "/v1/tenants/two"))[0] == 503
