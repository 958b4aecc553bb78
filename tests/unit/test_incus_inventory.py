"""The cached list of instances: fetched once, then only the changed ones."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from gateway.incus.inventory import Inventory, touched_by
from tests.waits import settled


class Table:
    """The instances of a fake incusd, and the requests made to it."""

    def __init__(self, *names: str) -> None:
        self.entries: dict[str, dict[str, Any]] = {
            name: {"name": name, "n": 0, "config": {}} for name in names
        }
        self.asked: list[str] = []
        self.inventory = Inventory(self.fetch_all, self.fetch)
        self.held: asyncio.Event | None = None
        self.listing: asyncio.Event | None = None

    async def fetch_all(self) -> list[dict[str, Any]]:
        self.asked.append("*")
        found = [dict(entry) for entry in self.entries.values()]
        if self.listing is not None:
            await self.listing.wait()
        return found

    async def fetch(self, name: str) -> dict[str, Any] | None:
        self.asked.append(name)
        found, held = self.entries.get(name), self.held
        answer = None if found is None else dict(found)
        if held is not None:
            await held.wait()
        return answer

    async def one(self, name: str) -> dict[str, Any] | None:
        return await self.inventory.one(name, self.fetch)

    async def names(self) -> dict[str, int]:
        return {entry["name"]: entry["n"] for entry in await self.inventory.all()}


def lifecycle(action: str, name: str, **context: str) -> Mapping[str, Any]:
    return {"type": "lifecycle", "metadata": {"action": action, "name": name, "context": context}}


@pytest.fixture
def table() -> Table:
    found = Table("one", "two")
    found.inventory.listening(True)
    return found


async def test_without_events_every_list_asks_for_all() -> None:
    table = Table("one")
    await table.names()
    await table.names()
    assert table.asked == ["*", "*"]


async def test_with_events_only_what_changed_is_asked_for(table: Table) -> None:
    await table.names()
    assert await table.names() == {"one": 0, "two": 0}
    table.entries["one"]["n"] = 1
    table.inventory.noted(lifecycle("instance-updated", "one"))
    assert await table.names() == {"one": 1, "two": 0}
    assert table.asked == ["*", "one"]


@pytest.mark.parametrize("action", ["instance-exec", "instance-file-pushed", "instance-snapshot-created"])
async def test_looks_change_nothing(table: Table, action: str) -> None:
    await table.names()
    table.inventory.noted(lifecycle(action, "one"))
    await table.names()
    assert table.asked == ["*"]


async def test_made_renamed_and_removed_ones_come_and_go(table: Table) -> None:
    await table.names()
    table.entries["new"] = {"name": "new", "n": 0, "config": {}}
    table.inventory.noted(lifecycle("instance-created", "new"))
    assert set(await table.names()) == {"one", "two", "new"}
    table.entries["other"] = {**table.entries.pop("one"), "name": "other"}
    table.inventory.noted(lifecycle("instance-renamed", "other", old_name="one"))
    assert set(await table.names()) == {"two", "new", "other"}
    del table.entries["two"]
    table.inventory.noted(lifecycle("instance-deleted", "two"))
    assert set(await table.names()) == {"new", "other"}
    assert table.asked.count("*") == 1


async def test_what_changes_while_it_is_asked_for_is_asked_for_again(table: Table) -> None:
    await table.names()
    table.held = asyncio.Event()
    table.inventory.touched("one")
    first = asyncio.create_task(table.names())
    await settled()
    assert "one" in table.asked
    table.entries["one"]["n"] = 5
    table.inventory.touched("one")
    second = asyncio.create_task(table.names())
    table.held.set()
    assert (await first)["one"] == 0
    assert (await second)["one"] == 5


async def test_a_list_that_fails_forgets_no_change(table: Table) -> None:
    await table.names()
    table.held = asyncio.Event()
    table.inventory.touched("one")
    failing = asyncio.create_task(table.names())
    await settled()
    assert "one" in table.asked
    failing.cancel()
    await asyncio.gather(failing, return_exceptions=True)
    table.held = None
    table.entries["one"]["n"] = 7
    assert (await table.names())["one"] == 7


async def test_many_changes_are_asked_for_together(table: Table) -> None:
    await table.names()
    table.inventory.touched(*(f"t{number}" for number in range(100)))
    await table.names()
    assert table.asked == ["*", "*"]


async def test_a_changed_profile_changes_all(table: Table) -> None:
    await table.names()
    table.inventory.noted({"metadata": {"action": "profile-updated", "name": "gateway-tenant"}})
    await table.names()
    assert table.asked == ["*", "*"]


async def test_after_the_events_were_interrupted_all_are_asked_for(table: Table) -> None:
    await table.names()
    table.inventory.listening(False)
    await table.names()
    table.inventory.listening(True)
    await table.names()
    await table.names()
    assert table.asked == ["*", "*", "*"]


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/1.0/instances", {"name": "new"}, ["new"]),
        ("/1.0/instances/one", {"name": "other"}, ["one", "other"]),
        ("/1.0/instances/one", {"config": {}}, ["one"]),
        ("/1.0/instances/one", None, ["one"]),
        ("/1.0/instances/one/state", {"action": "stop"}, ["one"]),
        ("/1.0/instances/one/snapshots", {"name": "snap"}, ["one"]),
        ("/1.0/networks/one", {"name": "x"}, []),
    ],
)
def test_what_a_request_changes(path: str, body: Mapping[str, Any] | None, names: list[str]) -> None:
    assert touched_by(path, body) == names


async def test_a_profile_is_asked_for_once_a_change_while_events_are_heard(table: Table) -> None:
    asked: list[int] = []

    async def fetch() -> dict[str, Any]:
        asked.append(len(asked))
        return {"n": len(asked)}

    for _ in range(3):
        assert (await table.inventory.profile("small", fetch))["n"] == 1
    table.inventory.noted(lifecycle("profile-updated", "small"))
    assert (await table.inventory.profile("small", fetch))["n"] == 2
    table.inventory.listening(False)
    for number in (3, 4):
        assert (await table.inventory.profile("small", fetch))["n"] == number


async def test_a_profile_that_is_changed_while_it_is_asked_for_is_asked_for_again(table: Table) -> None:
    async def overtaken() -> dict[str, Any]:
        table.inventory.noted(lifecycle("profile-updated", "small"))
        return {"n": 1}

    async def fetch() -> dict[str, Any]:
        return {"n": 2}

    await table.inventory.profile("small", overtaken)
    assert (await table.inventory.profile("small", fetch))["n"] == 2


async def test_one_that_is_up_to_date_is_not_asked_for(table: Table) -> None:
    await table.names()
    assert await table.one("one") == {"name": "one", "n": 0, "config": {}}
    assert table.asked == ["*"]


@pytest.mark.parametrize("heard", [True, False])
async def test_one_that_changed_is_asked_for(table: Table, heard: bool) -> None:
    await table.names()
    table.inventory.listening(heard)
    await table.names()
    table.entries["one"]["n"] = 1
    table.inventory.noted(lifecycle("instance-updated", "one"))
    found = [(await table.one("one") or {})["n"] for _ in range(2)]
    assert found == [1, 1]
    assert table.asked == ["*", "*", "one"] + ["one"] * (not heard)
    assert (await table.names())["one"] == 1


async def test_one_that_is_unknown_is_asked_for(table: Table) -> None:
    await table.names()
    table.entries["new"] = {"name": "new", "n": 3, "config": {}}
    assert (await table.one("new") or {})["n"] == 3
    assert await table.one("none") is None


async def test_a_slow_answer_replaces_no_later_one(table: Table) -> None:
    await table.names()
    table.held = asyncio.Event()
    table.inventory.touched("one")
    slow = asyncio.create_task(table.one("one"))
    await settled()
    held, table.held = table.held, None
    table.entries["one"]["n"] = 8
    table.inventory.touched("one")
    assert (await table.one("one") or {})["n"] == 8
    held.set()
    assert (await slow or {})["n"] == 0
    assert (await table.names())["one"] == 8


@pytest.mark.parametrize("known", [False, True])
async def test_one_that_is_asked_for_during_a_list_is_asked_for_again(table: Table, known: bool) -> None:
    """The list begins before the change and ends after that answer; many changes have all listed anew."""
    if known:
        await table.names()
        table.inventory.touched(*(f"t{number}" for number in range(100)))
    table.listing = asyncio.Event()
    first = asyncio.create_task(table.names())
    await settled()
    table.entries["one"]["n"] = 4
    table.inventory.touched("one")
    assert (await table.one("one") or {})["n"] == 4
    table.listing.set()
    assert (await first)["one"] == 0
    assert (await table.names())["one"] == 4


async def test_a_profile_that_changes_during_a_list_has_it_asked_for_again(table: Table) -> None:
    table.listing = asyncio.Event()
    first = asyncio.create_task(table.names())
    await settled()
    table.inventory.noted({"metadata": {"action": "profile-updated", "name": "tenants"}})
    table.entries["one"]["n"] = 6
    table.listing.set()
    assert (await first)["one"] == 0
    assert (await table.names())["one"] == 6


async def test_one_that_is_stopping_is_asked_for_again(table: Table) -> None:
    await table.names()
    whole = table.entries["one"]
    table.entries["one"] = {"name": "one"}
    table.inventory.touched("one")
    assert await table.one("one") == {"name": "one"}
    table.entries["one"] = whole | {"n": 2}
    assert (await table.names())["one"] == 2
