"""Copies of uploads: whose they are, which ones are kept, and when they are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from gateway.auth.tokens import Token
from gateway.deployments.queue import DeploymentQueue, Warming
from gateway.deployments.request import DeploymentOwner, uploader
from gateway.deployments.template import uploaded
from gateway.errors import Unavailable
from gateway.limits.capacity import DiskSpace
from gateway.runtime import Space
from gateway.runtime.incus.provisioning import UploadedSite, freeing, number, surplus
from gateway.runtime.sites import Prepared, Recipe
from gateway.settings import Settings
from tests.archives import archive, folder
from tests.waits import settled, turn

DAY = 86400.0
pytestmark = pytest.mark.timeout(20)


def token(*tenants: str, subject: str = "operator") -> Token:
    return Token(subject, frozenset(tenants), frozenset({"deploy"}), 0, "id")


def never(name: str) -> float:
    return 0.0


def test_an_uploader_is_a_subject_with_its_tenants_as_long_as_their_names_are_theirs() -> None:
    """All tokens may have one subject, two customers' tokens one name after the other."""
    names = [
        uploader(who, never)
        for who in (
            *(token("*"), token("*", subject="else"), token("a"), token("b"), token("a", "b")),
            *(token("a", subject="else"), token("a,b"), token("ab")),
        )
    ]
    assert len(set(names)) == len(names)
    assert uploader(token("b", "a"), never) == uploader(token("a", "b"), never)
    assert uploader(token("a"), lambda name: 5.0) != uploader(token("a"), never)
    assert uploader(token("*"), lambda name: 5.0) == uploader(token("*"), never)


def test_an_uploads_key_is_of_its_owner_and_of_all_that_it_holds() -> None:
    start = 'start = ["bun", "serve.ts"]\n'
    mine = uploaded(folder(start, (".env", b"1")))
    keys = {
        mine.recipe("me").key,
        mine.recipe("you").key,
        uploaded(folder(start, (".env", b"2"))).recipe("me").key,
        uploaded(folder(start + "port = 4000\n", (".env", b"1"))).recipe("me").key,
        uploaded(archive((".env", b"1"), ("serve.ts", b""))).recipe("me").key,
    }
    assert len(keys) == 5
    assert mine.recipe("me").owner == "me"
    nobodys = mine.recipe()
    assert (nobodys.key, nobodys.owner) == ("", "")


def copy(name: str, owner: str = "me", used: float = 0.0, size: int = 1, **more: str) -> UploadedSite:
    given = {"content": name, "base": "now"} | more
    return UploadedSite(name=name, identity=name, owner=owner, used=used, bytes=size, **given)


def gone(copies: list[UploadedSite], coming: str | None = None, **settings: Any) -> set[str]:
    known = Settings(**({"upload_copies_unused": 7 * DAY} | settings))
    held = {one.content for one in copies} - {"ended"}
    return {one.name for one in surplus(copies, known, held=held, base="now", now=10 * DAY, coming=coming)}


def test_those_used_longest_ago_go_beyond_an_owners_share_and_beyond_that_of_all() -> None:
    mine = [copy(f"mine{n}", used=9 * DAY + n) for n in range(3)]
    theirs = [copy(f"theirs{n}", "you", used=9.5 * DAY + n) for n in range(3)]
    both = mine + theirs
    assert gone(both) == set()
    assert gone(both, owner_upload_copies=2) == {"mine0", "theirs0"}
    assert gone(both, owner_upload_copies=3, coming="me") == {"mine0"}
    assert gone(both, upload_copies=4) == {"mine0", "mine1"}
    assert gone(both, upload_copies=4, coming="new") == {"mine0", "mine1", "mine2"}
    assert gone(both, upload_copies=0) == {one.name for one in both}
    assert gone(both, owner_upload_copies_bytes=2) == {"mine0", "theirs0"}
    assert gone(both, upload_copies_bytes=5) == {"mine0"}


def test_one_that_is_too_large_goes_and_no_others_for_it() -> None:
    large = copy("large", used=9 * DAY, size=100)
    for used in (1, -1):
        others = [large, copy("small", used=9 * DAY + used)]
        assert gone(others, owner_upload_copies_bytes=50) == {"large"}
        assert gone(others, upload_copies_bytes=50) == {"large"}
    assert gone([large, copy("theirs", "you", used=9 * DAY)], owner_upload_copies_bytes=50) == {"large"}


def test_the_unused_the_outdated_and_those_of_tenants_that_ended_go() -> None:
    copies = [
        copy("old", used=2 * DAY),
        copy("odd", used=9 * DAY, base="an earlier image"),
        copy("left", used=9 * DAY, content="ended"),
        copy("kept", used=9 * DAY),
    ]
    assert gone(copies) == {"old", "odd", "left"}


def test_as_few_are_given_up_as_free_what_is_wanted() -> None:
    copies = [copy("b", used=2, size=10), copy("a", used=1, size=10), copy("c", used=3, size=10)]
    assert [one.name for one in freeing(copies, 11)] == ["a", "b"]
    assert freeing(copies, 0) == []
    assert len(freeing(copies, 1 << 60)) == 3


@pytest.mark.parametrize("said", [None, "", "-1", "1e9", "9" * 30, "١٢x", "12\n"])
def test_a_number_that_is_none_counts_nothing(said: str | None) -> None:
    assert number(said) == 0


class Pool:
    """A runtime whose storage pool has so many bytes left of 100."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.usage = self

    async def space(self) -> Space:
        return Space(100, 100 - self.left)


async def test_copies_are_given_up_before_anything_is_refused_for_want_of_room() -> None:
    wanted = list[int]()

    async def spare(many: int) -> int:
        wanted.append(many)
        return 4

    nothing = cast(Any, None)
    settings = Settings(pool_reserve=0.1)
    await DiskSpace(cast(Any, Pool(10)), nothing, nothing, settings, spare).admit()
    assert wanted == []
    await DiskSpace(cast(Any, Pool(6)), nothing, nothing, settings, spare).admit()
    assert wanted == [4]
    with pytest.raises(Unavailable):
        await DiskSpace(cast(Any, Pool(5)), nothing, nothing, settings, spare).admit()
    with pytest.raises(Unavailable):  # not for another copy
        await DiskSpace(cast(Any, Pool(6)), nothing, nothing, settings, spare).spacious()
    assert wanted == [4, 5]


class Kitchen:
    """Sites that prepare when they are let."""

    def __init__(self) -> None:
        self.begun: asyncio.Queue[tuple[str, Prepared]] = asyncio.Queue()

    def prepare(self, recipe: Recipe, prepared: Prepared, size: str = "small") -> None:
        self.begun.put_nowait((recipe.key, prepared))


def recipe(key: str, owner: str, size: int = 1) -> Recipe:
    return Recipe(b"x" * size, ("true",), 3000, key=key, owner=owner)


@pytest.fixture
async def warming(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[Warming, Kitchen, DeploymentQueue]]:
    monkeypatch.setattr("gateway.deployments.queue.PENDING_BYTES", 100)
    kitchen, turns = Kitchen(), DeploymentQueue(Settings(max_deployments=4))
    made = Warming(cast(Any, kitchen), turns, None)
    yield made, kitchen, turns
    await made.aclose()


async def test_copies_are_made_one_at_a_time_the_newest_of_each_owner(
    warming: tuple[Warming, Kitchen, DeploymentQueue],
) -> None:
    made, kitchen, _ = warming
    made.want(recipe("a1", "a"), "small")
    key, prepared = await kitchen.begun.get()
    for name in ("a2", "a3", "b1", "a4"):
        made.want(recipe(name, name[0]), "small")
    await turn()
    assert key == "a1" and kitchen.begun.empty()
    prepared(Unavailable("it failed"))  # the others' are made all the same
    seen = []
    for _ in range(2):
        key, prepared = await kitchen.begun.get()
        seen.append(key)
        prepared(None)
    assert seen == ["b1", "a4"]


async def test_no_copy_is_begun_while_others_deploy(
    warming: tuple[Warming, Kitchen, DeploymentQueue],
) -> None:
    made, kitchen, turns = warming
    owner = DeploymentOwner(None, "me")
    async with turns.turn(owner), turns.turn(owner):
        async with turns.turn(owner):
            made.want(recipe("a", "a"), "small")
            await settled()
            assert kitchen.begun.empty(), "three of four places are taken"
        assert (await kitchen.begun.get())[0] == "a"


async def test_what_waits_for_its_copy_is_bounded_in_memory(
    warming: tuple[Warming, Kitchen, DeploymentQueue],
) -> None:
    made, _, turns = warming
    async with turns.turn(DeploymentOwner(None, "me")), turns.turn(DeploymentOwner(None, "me")):
        async with turns.turn(DeploymentOwner(None, "me")):
            made.want(recipe("a1", "a", 60), "small")
            made.want(recipe("b1", "b", 60), "small")  # too much with the first
            made.want(recipe("a2", "a", 101), "small")  # too much at all: the one before stays
            assert [wish.recipe.key for wish in made._wishes.values()] == ["a1"]
            for number_ in range(200):
                made.want(recipe(f"c{number_}", f"c{number_}"), "small")
            assert sum(len(wish.recipe.archive) for wish in made._wishes.values()) <= 100


async def test_an_end_in_the_midst_of_it_leaves_nothing(
    warming: tuple[Warming, Kitchen, DeploymentQueue],
) -> None:
    made, kitchen, _ = warming
    made.want(recipe("a", "a"), "small")
    _, prepared = await kitchen.begun.get()
    await made.aclose()
    prepared(None)  # nobody waits any more
