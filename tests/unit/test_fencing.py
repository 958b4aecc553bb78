"""Without a lease none of the tenants that others have copies of is reached here, and no other is touched."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.cluster.peers import MemberAway
from gateway.errors import NotFound, Unavailable
from gateway.lifecycle import fencing
from gateway.lifecycle.doors import Doors
from gateway.lifecycle.fencing import Fence
from gateway.settings import Settings
from tests.waits import turn, until


class World:
    """A lease by hand, and what is done at the fence."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held, self.quorum = folder, True, True
        self.suspicion: str | None = None
        self.copied = {"shop", "blog"}
        self.others = set[str]()  # other members' tenants of which something is left here
        self.frozen, self.parted, self.pages = set[str](), list[str](), set[str]()
        self.broken, self.stopped = set[str](), set[str]()
        self.accusations = list[str]()
        self.starts = 0
        self.pause = self.left = 0.005

    # the lease
    async def renew(self) -> str | None:
        if not self.quorum:
            self.held = False
            raise Unavailable("no quorum")
        self.held = self.suspicion is None
        return self.suspicion

    async def clear(self, suspicion: str) -> None:
        assert suspicion == self.suspicion
        self.suspicion = None

    # the hands
    async def fence(self, tenant: str, *, frozen: bool) -> None:
        await turn()
        if tenant in self.stopped:
            raise NotFound("it does not run")
        if tenant in self.broken:
            raise Unavailable("no root")
        (self.frozen.add if frozen else self.frozen.discard)(tenant)

    def at(self) -> Fence:
        async def part(tenant: str) -> None:
            self.parted.append(tenant)

        async def accused(suspicion: str) -> None:
            self.accusations.append(suspicion)

        async def back() -> None:
            self.starts += 1
            if self.starts == 1:
                raise Unavailable("not all of it can be started yet")

        def page(domain: str, away: bool) -> None:
            (self.pages.add if away else self.pages.discard)(domain)

        world = cast(Any, self)
        return Fence(
            "m1",
            world,
            world,
            self.folder,
            copied=lambda: self.copied,
            domain=lambda tenant: f"{tenant}.example.com" if tenant == "shop" else None,
            part=part,
            page=page,
            accused=accused,
            back=back,
            left=lambda: self.others,
        )


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.lifecycle.fencing._LOOK", 0.01)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@contextlib.asynccontextmanager
async def following(fence: Fence) -> AsyncIterator[Fence]:
    tasks = [asyncio.create_task(work) for work in (fence.renew(), fence.guard(), fence.follow())]
    try:
        yield fence
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended


async def test_they_are_frozen_without_a_lease_and_thawed_with_one(world: World) -> None:
    async with following(world.at()) as fence:
        await until(lambda: world.starts == 2)  # what ran before this process, once it is certain
        fence.check("shop")
        assert not world.frozen
        world.quorum = False
        await until(lambda: world.frozen == {"shop", "blog"} and len(world.parted) == 2)
        assert world.pages == {"shop.example.com"} and set(world.parted) == world.copied
        with pytest.raises(MemberAway) as refused:
            fence.check("shop")
        assert refused.value.facts == {"reason": "member_away", "location": "m1"}
        fence.check("other")
        world.quorum = True
        await until(lambda: not world.frozen and not fence.holds("shop"))
        await until(lambda: not list(world.folder.iterdir()))
        assert not world.pages and len(world.parted) == 2
        await until(lambda: world.starts == 3)


async def test_what_is_left_of_another_members_tenant_stays_frozen(world: World) -> None:
    world.quorum = False
    async with following(world.at()) as fence:
        await until(lambda: world.frozen == {"shop", "blog"})
        world.others, world.quorum = {"shop"}, True
        await until(lambda: world.frozen == {"shop"} and not fence.holds("blog"))
        assert fence.holds("shop")
        world.others = set()
        await until(lambda: not world.frozen and not fence.holds("shop"))


async def test_calls_are_refused_from_the_very_moment(world: World) -> None:
    """Not only once somebody has looked: a process may have had no CPU meanwhile."""
    fence, doors = world.at(), Doors(Settings())
    doors.check = fence.check
    await doors.wait("shop")
    world.held = False
    assert doors.closed("shop") and not doors.closed("other")
    with pytest.raises(MemberAway):
        await doors.wait("shop")


async def test_what_starts_without_a_lease_is_frozen_too(world: World) -> None:
    world.stopped.add("shop")
    world.quorum = False
    async with following(world.at()):
        await until(lambda: world.frozen == {"blog"})
        world.stopped.clear()
        await until(lambda: world.frozen == {"shop", "blog"})
        world.copied.add("new")
        await until(lambda: "new" in world.frozen)


async def test_what_cannot_be_frozen_is_refused_all_the_same_and_holds_up_no_other(world: World) -> None:
    world.broken.add("blog")
    world.quorum = False
    async with following(world.at()) as fence:
        await until(lambda: world.frozen == {"shop"})
        assert fence.holds("blog")
        world.broken.clear()
        await until(lambda: world.frozen == {"shop", "blog"})
        world.broken.add("blog")
        world.quorum = True
        await until(lambda: world.frozen == {"blog"})
        assert fence.holds("blog"), "until it is thawed"
        world.broken.clear()
        await until(lambda: not fence.holds("blog"))


@pytest.mark.parametrize("how", ["full", "stuck"])
async def test_they_are_frozen_whatever_the_disk_of_the_state_dir_does(
    world: World, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """At once, by the first look."""
    stuck = threading.Event()

    def write(*_: object) -> None:
        if how == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        stuck.wait()

    monkeypatch.setattr("gateway.lifecycle.fencing._write", write)
    monkeypatch.setattr("gateway.lifecycle.fencing._WRITING", 0.01)
    world.quorum = world.held = False
    try:
        await asyncio.wait_for(world.at()._raise(), 5)
    finally:
        stuck.set()
    assert world.frozen == set(world.parted) == {"shop", "blog"}


def test_what_was_frozen_is_written_down_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next process would leave some of them frozen for ever."""
    file = tmp_path / "fenced"
    fencing._write(file, {"shop", "blog"})
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fencing._write(file, {"shop", "blog", "more"})
    assert fencing._read(file) == {"shop", "blog"}
    fencing._write(file, {"more"})
    assert fencing._read(file) == {"more"} and [*tmp_path.iterdir()] == [file]


def killed(*_: object) -> None:
    raise KeyboardInterrupt


async def test_the_next_process_thaws_what_the_last_one_froze(world: World) -> None:
    world.quorum = False
    async with following(world.at()):
        await until(lambda: len(world.frozen) == 2)
    world.copied.discard("blog")  # its copy is gone by now
    world.quorum = True
    async with following(world.at()) as fence:
        await until(lambda: not world.frozen and not fence.holds("blog"))
        await until(lambda: not list(world.folder.iterdir()))


async def test_a_suspicion_is_answered_before_anything_runs_again(world: World) -> None:
    async with following(world.at()):
        await until(lambda: world.held)
        world.suspicion = "s1"
        world.held = False
        await until(lambda: world.accusations)
        assert world.accusations == ["s1"]
        await until(lambda: world.held and not world.frozen)
