"""One stream of the events of all members, whoever is asked. Without Incus, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.events import positions
from tests.clusters import clustered, member_gateway
from tests.contracts.gateway import no_traceback, sse
from tests.live import LiveGateway

HOMES = {"m1": ("one",), "m2": ("two", "other"), "m3": ()}


@pytest.fixture(scope="module")
async def members(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, LiveGateway]]:
    async with clustered(tmp_path_factory.mktemp("cluster"), HOMES) as members:
        yield members
    for gateway in members.values():
        await no_traceback(gateway)


@pytest.fixture
async def mortal(tmp_path: Path) -> AsyncIterator[dict[str, LiveGateway]]:
    """Three that a test may end."""
    async with clustered(tmp_path, {"m1": ("one",), "m2": ("two",), "m3": ()}) as members:
        yield members
        for gateway in members.values():
            await no_traceback(gateway)


@contextlib.asynccontextmanager
async def events(
    gateway: LiveGateway, *covers: str, last: str | None = None, **query: str
) -> AsyncIterator[aiohttp.ClientResponse]:
    headers = {} if last is None else {"Last-Event-ID": last}
    async with (
        gateway.http(*covers or ("*",)) as http,
        http.get("/v1/events", params=query, headers=headers) as answer,
    ):
        assert answer.status == 200
        yield answer


async def work(gateway: LiveGateway, tenant: str, *marks: str) -> None:
    """Run a command for each mark, which stands in its events."""
    async with gateway.wire(tenant) as wire:
        for mark in marks:
            await wire.run(command=f": {mark}")


def home(event: Mapping[str, Any]) -> str:
    member: str = event["data"]["source"].removeprefix("/gateway/")
    return member


def marks(found: Collection[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the marks of the commands that were started, by member."""
    told = defaultdict(list)
    for event in found:
        if event["event"] == "exec.started":
            told[home(event)].append(event["data"]["data"]["command"].rpartition(": ")[2])
    return dict(told)


async def works(answer: aiohttp.ClientResponse, count: int) -> list[Any]:
    """Return all events until so many commands were started; a busy peer may be away meanwhile."""
    found: list[Any] = []
    while sum(event["event"] == "exec.started" for event in found) < count:
        found += await sse(answer, 1)
    return found


async def until_told(answer: aiohttp.ClientResponse, type: str, deadline: float = 20.0) -> list[Any]:
    """Return all events up to the first of a type."""
    found = await sse(answer, 1, deadline)
    while found[-1]["event"] != type:
        found += await sse(answer, 1, deadline)
    return found


# --- who is asked, and by whom --------------------------------------------------------------------------


async def test_each_event_of_each_member_comes_once_and_in_its_order(members: dict[str, LiveGateway]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        asked = [await stack.enter_async_context(events(one, type="exec.*")) for one in members.values()]
        for number in range(5):
            for tenant in ("one", "two", "other"):
                await work(members["m3"], tenant, f"{tenant}{number}")
        for answer in asked:
            found: list[Any] = []
            while len(found) < 30:  # a busy peer may be away meanwhile, which is told beside them
                found += [one for one in await sse(answer, 1) if one["event"].startswith("exec.")]
            told = marks(found)
            assert told["m1"] == [f"one{number}" for number in range(5)]
            assert told["m2"] == [f"{tenant}{number}" for number in range(5) for tenant in ("two", "other")]
            assert len({(one["data"]["source"], one["data"]["id"]) for one in found}) == 30


async def test_a_token_sees_only_what_it_covers_on_any_member(members: dict[str, LiveGateway]) -> None:
    async with events(members["m3"], "one", "two", type="exec.started") as answer:
        for tenant in ("other", "one", "two"):
            await work(members["m1"], tenant, tenant)
        assert marks(await sse(answer, 2)) == {"m1": ["one"], "m2": ["two"]}
    async with events(members["m1"], "*", tenant="one,other", type="exec.started") as answer:
        for tenant in ("two", "one", "other"):
            await work(members["m1"], tenant, tenant)
        assert marks(await sse(answer, 2)) == {"m1": ["one"], "m2": ["other"]}


async def test_the_id_says_where_the_stream_stands_on_each_member(members: dict[str, LiveGateway]) -> None:
    async with events(members["m1"], type="exec.started") as answer:
        begun = answer.headers["Last-Event-ID"]
        await work(members["m1"], "one", "a", "b")
        await work(members["m1"], "two", "c", "d")
        found = await sse(answer, 4)
    at = dict(positions.vector(begun) or {})
    assert set(at) == {"m1", "m2", "m3"}
    for event in found:
        at[home(event)] = int(event["data"]["id"])
        assert positions.vector(event["id"]) == at
    for gateway in members.values():
        async with events(gateway, last=begun, type="exec.started") as answer:
            assert marks(await works(answer, 4)) == {"m1": ["a", "b"], "m2": ["c", "d"]}
        async with events(gateway, last=found[2]["id"], type="exec.started") as answer:
            (rest,) = await sse(answer, 1)
            assert rest == found[3]


async def test_an_id_of_one_journal_is_answered_by_gaps(members: dict[str, LiveGateway]) -> None:
    """And everything that is kept, as what is new to the client cannot be known."""
    await work(members["m1"], "one", "kept")
    async with events(members["m2"], "two") as single:
        await work(members["m1"], "two", "kept")
        number = (await sse(single, 1))[0]["data"]["id"]
    assert number.isdecimal()
    async with events(members["m1"], last=number, type="exec.started") as answer:
        found = await sse(answer, 3)
        while {member: told[-1:] for member, told in marks(found).items()} != {
            "m1": ["kept"],
            "m2": ["kept"],
        }:
            found += await sse(answer, 1)
    for member in ("m1", "m2"):
        assert next(event for event in found if home(event) == member)["event"] == "gap"


async def test_a_stream_of_one_tenant_has_its_homes_ids(members: dict[str, LiveGateway]) -> None:
    """Also resumed by the id of a stream over all."""
    async with events(members["m3"]) as everything:
        begun = everything.headers["Last-Event-ID"]
    async with events(members["m1"], tenant="two", type="exec.*") as answer:
        await work(members["m1"], "two", "x", "y")
        found = await sse(answer, 4)
        assert all(event["id"] == f"m2:{event['data']['id']}" for event in found)
    async with events(members["m3"], "two", last=begun, type="exec.*") as answer:
        resumed = await sse(answer, 4)
        while resumed[-1] != found[-1]:  # the exit of an earlier test's command may come first
            resumed += await sse(answer, 1)
        assert resumed[-4:] == found
    async with events(members["m1"], "two", last=found[1]["id"], type="exec.*") as answer:
        assert await sse(answer, 2) == found[2:]


async def test_a_tenant_without_a_home_is_followed_wherever_it_comes(members: dict[str, LiveGateway]) -> None:
    """And only its home tells of it; a stream of its deployment comes from there, from the first event on."""
    async with events(members["m1"], "fresh") as its_own, events(members["m2"]) as everything:
        async with members["m1"].http("*") as http:
            body = {"domain": "fresh.test", "template": "static", "tenant": "fresh"}
            async with http.post("/v1/deployments", json=body) as answer:
                id_ = (await answer.json())["id"]
            (first,) = await sse(its_own, 1)
            assert (first["event"], home(first)) == ("deployment.started", "m3")
            async with http.delete(f"/v1/deployments/{id_}") as answer:
                assert answer.status == 200
        found = await until_told(everything, "deployment.rolledback")
        about = [event for event in found if event["data"].get("subject") == "fresh"]
        assert {home(event) for event in about} == {"m3"}
        told = [(event["data"]["source"], event["data"]["id"]) for event in found]
        assert len(set(told)) == len(told)
    async with events(members["m1"], last="0", deployment=id_) as answer:
        again = await until_told(answer, "deployment.rolledback")
    again = again[again[0]["event"] == "gap" :]
    assert all(event["id"] == f"m3:{event['data']['id']}" for event in again)
    kept = [event["data"] for event in about if event["event"].startswith("deployment.")]
    assert [event["data"] for event in again] == kept


async def test_the_stream_ends_with_the_token(members: dict[str, LiveGateway]) -> None:
    gateway = members["m1"]
    async with gateway.http("*", ttl=2) as http, http.get("/v1/events") as answer:
        async with asyncio.timeout(20):
            assert (await answer.content.read()).startswith(b"id: m1:")


# --- members that go and come ---------------------------------------------------------------------------


async def test_a_member_that_goes_is_told_once_and_goes_on_where_it_was(
    mortal: dict[str, LiveGateway],
) -> None:
    async with events(mortal["m1"], type="exec.started") as answer:
        await work(mortal["m1"], "two", "before")
        assert marks(await sse(answer, 1)) == {"m2": ["before"]}
        await mortal["m2"].stop(signal.SIGKILL)
        (away,) = await sse(answer, 1)
        assert (away["event"], away["data"]["data"]) == ("away", {"member": "m2"})
        await work(mortal["m1"], "one", "meanwhile")
        assert marks(await sse(answer, 1)) == {"m1": ["meanwhile"]}
        await mortal["m2"].start()
        await work(mortal["m2"], "two", "after")
        found = await until_told(answer, "exec.started")
        assert [event["event"] for event in found] == ["back", "exec.started"]
        assert marks(found) == {"m2": ["after"]}


async def test_a_member_that_falls_silent_is_cut_and_goes_on_where_it_was(
    mortal: dict[str, LiveGateway],
) -> None:
    """As where its cable is cut, so that no connection ends by itself."""
    process = mortal["m2"].process
    assert process is not None
    async with events(mortal["m1"], type="exec.started") as answer:
        await work(mortal["m2"], "two", "before")
        assert marks(await sse(answer, 1)) == {"m2": ["before"]}
        process.send_signal(signal.SIGSTOP)
        try:
            (away,) = await sse(answer, 1)
            assert (away["event"], away["data"]["data"]) == ("away", {"member": "m2"})
        finally:
            process.send_signal(signal.SIGCONT)
        await work(mortal["m2"], "two", "after")
        found = await until_told(answer, "exec.started")
        assert [event["event"] for event in found] == ["back", "exec.started"]
        assert marks(found) == {"m2": ["after"]}


async def test_a_restart_of_a_member_loses_nothing(mortal: dict[str, LiveGateway]) -> None:
    async with events(mortal["m1"], type="exec.started") as answer:
        for number in range(3):
            await work(mortal["m2"], "two", f"a{number}")
            await mortal["m2"].stop()
            await mortal["m2"].start()
            await work(mortal["m2"], "two", f"b{number}")
        found: list[Any] = []
        while len(marks(found).get("m2", ())) < 6:
            found += await sse(answer, 1)
    assert {event["event"] for event in found} <= {"exec.started", "away", "back"}  # where it takes long
    assert marks(found) == {"m2": ["a0", "b0", "a1", "b1", "a2", "b2"]}


async def test_whoever_is_asked_next_goes_on_where_the_stream_broke(mortal: dict[str, LiveGateway]) -> None:
    async with events(mortal["m1"], type="exec.started") as answer:
        await work(mortal["m1"], "one", "a")
        await work(mortal["m1"], "two", "b")
        found = await sse(answer, 2)
        await mortal["m1"].stop(signal.SIGKILL)
        with contextlib.suppress(aiohttp.ClientError):
            assert await answer.content.read() == b""
    await work(mortal["m2"], "two", "c")
    async with events(mortal["m3"], last=found[-1]["id"], type="exec.started") as answer:
        rest = await sse(answer, 2)
        assert sorted(event["event"] for event in rest) == ["away", "exec.started"]
        assert marks(rest) == {"m2": ["c"]}
        await mortal["m1"].start()
        await work(mortal["m1"], "one", "d")
        assert marks(await until_told(answer, "exec.started")) == {"m1": ["d"]}


async def test_a_member_that_was_away_from_the_beginning_begins_with_a_gap(
    mortal: dict[str, LiveGateway],
) -> None:
    await work(mortal["m2"], "two", "long ago")
    await mortal["m2"].stop(signal.SIGKILL)
    async with events(mortal["m1"], type="exec.started") as answer:
        (away,) = await sse(answer, 1)
        assert away["event"] == "away" and set(positions.vector(away["id"]) or ()) == {"m1", "m3"}
        await mortal["m2"].start()
        found = await until_told(answer, "gap")
        assert [event["event"] for event in found] == ["back", "gap"]
        gap = found[-1]["data"]
        assert (gap["source"], int(gap["id"])) == ("/gateway/m2", gap["data"]["oldest"] - 1)
        assert (positions.vector(found[-1]["id"]) or {})["m2"] == int(gap["id"])
        await work(mortal["m2"], "two", "new")
        assert marks(await sse(answer, 1)) == {"m2": ["new"]}


async def test_a_new_member_joins_the_stream(tmp_path: Path) -> None:
    async with clustered(tmp_path, {"m1": ("one",)}) as members:
        async with events(members["m1"], type="exec.started") as answer:
            fresh = await member_gateway(tmp_path, "m2", "two")
            await fresh.start()
            try:
                found = await until_told(answer, "gap")
                assert {home(event) for event in found} <= {"m2", "m1/members/m2"}
                await work(fresh, "two", "first")
                assert marks(await sse(answer, 1)) == {"m2": ["first"]}
            finally:
                await fresh.stop()
