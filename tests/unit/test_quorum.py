"""Without a quorum Incus answers nothing, and what it is needed for is refused instead of waiting for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.cluster.cluster import Quorum
from gateway.cluster.peers import Peers
from gateway.errors import Unavailable
from gateway.incus import Incus, NoQuorum
from gateway.incus.inventory import Inventory, States
from gateway.runtime.incus.errors import translated


@contextlib.asynccontextmanager
async def silent(socket: Path) -> AsyncIterator[asyncio.Event]:
    """Be an incusd that answers `/1.0` and its operations alone; yield what is set once another is asked."""
    asked = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split()[1].partition(b"?")[0]
                if path != b"/1.0" and not path.startswith(b"/1.0/operations"):
                    asked.set()
                    continue
                body = json.dumps({"type": "sync", "metadata": {}}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    async with await asyncio.start_unix_server(serve, socket):
        yield asked


async def test_what_waits_for_the_database_is_refused_once_it_has_no_quorum(tmp_path: Path) -> None:
    """And so is what comes later, but for what a member knows by itself."""
    at = tmp_path / "unix.socket"
    async with silent(at) as asked, Incus(at, timeout=60) as incus, asyncio.timeout(30):
        waiting = asyncio.create_task(incus.get("/1.0/instances"))
        await asked.wait()
        incus.has_quorum(False)
        with pytest.raises(NoQuorum):
            await waiting
        with pytest.raises(NoQuorum):
            await incus.get("/1.0/instances")
        await incus.get("/1.0")
        await incus.wait("of-mine", timeout=5)
        asked.clear()
        incus.has_quorum(True)
        waiting = asyncio.create_task(incus.get("/1.0/instances"))
        await asked.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_the_wait_for_an_operation_goes_on(tmp_path: Path) -> None:
    """Commands run on, and their ends are told by the member itself."""
    at = tmp_path / "unix.socket"
    async with silent(at), Incus(at, timeout=60) as incus:
        waiting = asyncio.create_task(incus.wait("of-mine", timeout=5))
        incus.has_quorum(False)
        assert not (await waiting).ok  # what this one says of it


def test_clients_are_told_why() -> None:
    with pytest.raises(Unavailable) as caught, translated("shop"):
        raise NoQuorum
    assert caught.value.facts["reason"] == "no_quorum"


async def test_instances_are_as_they_were() -> None:
    here = [{"name": "shop", "config": {}}]
    without: list[dict[str, Any]] = [{"name": "shop", "config": {}, "state": {}}]

    async def fetch_all() -> list[dict[str, Any]]:
        if not here:
            raise NoQuorum
        return list(here)

    async def fetch(name: str) -> dict[str, Any] | None:
        raise NoQuorum

    inventory, states = Inventory(fetch_all, fetch), States(fetch)
    inventory.listening(True)
    before = await inventory.all()
    here.clear()
    inventory.touched("shop")
    assert await inventory.all() == before
    assert await states.added(before, lambda instance: True) == without
    inventory.listening(False)
    with pytest.raises(NoQuorum):
        await inventory.all()


class World:
    """A cluster of which the gateways in `alive` are heard, and whose database answers or not."""

    def __init__(self, *alive: bool) -> None:
        self.peers = SimpleNamespace(all={})
        self.hear(*alive)
        self.answers = True
        self.told = list[bool]()
        self.quorum = Quorum(cast(Peers, self.peers), self.ask, self.told.append)

    def hear(self, *alive: bool) -> None:
        self.peers.all = {f"m{number}": SimpleNamespace(alive=one) for number, one in enumerate(alive, 2)}

    async def ask(self) -> None:
        if not self.answers:
            raise Unavailable("no answer")


async def test_a_silent_database_is_waited_for_while_most_members_are_there() -> None:
    """Its leader may have died just now."""
    world = World(True, False)
    world.answers = False
    await world.quorum.look()
    assert world.told == []


async def test_members_whose_gateways_alone_are_away_are_a_quorum() -> None:
    world = World(False, False)
    await world.quorum.look()
    assert world.told == []


@pytest.mark.parametrize("alive", [(False, False), (True, False, False)], ids=["one of three", "two of four"])
async def test_there_is_no_quorum_while_most_members_and_the_database_are_silent(
    alive: tuple[bool, ...],
) -> None:
    """Half of them are no majority, either."""
    world = World(*alive)
    world.answers = False
    await world.quorum.look()
    await world.quorum.look()
    assert world.told == [False]
    world.answers = True
    await world.quorum.look()
    assert world.told == [False, True]
    world.answers = False
    await world.quorum.look()
    world.hear(True, False)  # before the database answers it
    await world.quorum.look()
    assert world.told == [False, True, False, True]
