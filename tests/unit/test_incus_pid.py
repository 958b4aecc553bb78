"""An instance's state is fetched only once per start to learn its init pid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gateway.incus import Incus
from tests.unit import incusd

PATH = "/1.0/instances/shop"


def running(pid: int, since: str, **changes: Any) -> dict[str, Any]:
    return incusd.instance(
        "shop",
        status="Running",
        config={"volatile.uuid": "1"},
        last_used_at=since,
        state={"pid": pid},
        **changes,
    )


async def test_a_state_is_asked_for_once_a_start(tmp_path: Path) -> None:
    table = {PATH: running(41, "2026-01-01T00:00:00Z")}
    with incusd.answering(tmp_path / "incus", table) as asked:
        async with Incus(tmp_path / "incus") as incus:
            for _ in range(3):
                assert (await incus.started("shop"))[1] == 41
            assert states(asked) == 1
            table[PATH] = running(77, "2026-01-01T00:00:09Z")
            for _ in range(3):
                found, pid = await incus.started("shop")
                assert (found["name"], pid) == ("shop", 77)
            assert states(asked) == 2
            table[PATH] = running(0, "2026-01-01T00:00:09Z") | {"status": "Stopped"}
            assert (await incus.started("shop"))[1] == 0
            assert states(asked) == 2


async def test_the_process_of_an_instance_that_just_begins_is_not_kept(tmp_path: Path) -> None:
    table = {PATH: running(0, "2026-01-01T00:00:00Z")}
    with incusd.answering(tmp_path / "incus", table) as asked:
        async with Incus(tmp_path / "incus") as incus:
            assert (await incus.started("shop"))[1] == 0
            table[PATH] = running(41, "2026-01-01T00:00:00Z")
            assert (await incus.started("shop"))[1] == 41
            assert states(asked) == 2


async def test_the_process_of_another_instance_of_the_same_name_is_asked_for(tmp_path: Path) -> None:
    table = {PATH: running(41, "2026-01-01T00:00:00Z")}
    with incusd.answering(tmp_path / "incus", table):
        async with Incus(tmp_path / "incus") as incus:
            assert (await incus.started("shop"))[1] == 41
            table[PATH] = running(77, "2026-01-01T00:00:00Z") | {"config": {"volatile.uuid": "2"}}
            assert (await incus.started("shop"))[1] == 77


def states(asked: list[str]) -> int:
    return sum("recursion=1" in address for address in asked)
