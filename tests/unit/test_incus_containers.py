"""Where containers are is kept only while a change would be reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.errors import NotFound, Unavailable
from gateway.incus import Incus
from gateway.runtime.incus.runtime import Containers
from gateway.settings import Settings
from tests.unit.incusd import instance


class Started(Incus):
    """An Incus that counts how often it is asked where a container is."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), "default", 1.0)
        self.asked = 0
        self.found = instance("shop")

    async def started(self, name: str) -> tuple[dict[str, Any], int]:
        self.asked += 1
        return self.found, 4711


def containers(tmp_path: Path, *standing: bool) -> tuple[Containers, Started]:
    """Return some for which the event stream is `standing` at each look, and the last value ever after."""
    looks, incus = list(standing), Started()
    return Containers(
        Settings(state_dir=tmp_path), incus, lambda: looks.pop(0) if looks[1:] else looks[0]
    ), incus


async def test_one_lookup_serves_until_something_changes(tmp_path: Path) -> None:
    found, incus = containers(tmp_path, True)
    assert await found.init_pid("shop") == 4711
    assert (await found.filesystem("shop")).tenant == "shop"
    assert incus.asked == 1
    for number, changed in enumerate(("shop", None), start=2):
        found.forget("other")
        found.forget(changed)
        await found.init_pid("shop")
        assert incus.asked == number


@pytest.mark.parametrize("standing", [(False,), (False, True), (True, False, False)])
async def test_nothing_is_kept_that_might_have_changed(tmp_path: Path, standing: tuple[bool, ...]) -> None:
    """The stream has to stand before the lookup and after it."""
    found, incus = containers(tmp_path, *standing)
    await found.init_pid("shop")
    await found.init_pid("shop")
    assert incus.asked == 2


async def test_nothing_runs_in_one_that_leaves(tmp_path: Path) -> None:
    found, incus = containers(tmp_path, True)
    await found.init_pid("shop")  # kept, and refused none the less
    found.leaving.add("shop")
    with pytest.raises(Unavailable, match="moving"):
        await found.filesystem("shop")
    found.leaving.clear()
    await found.filesystem("shop")
    assert incus.asked == 1


async def test_another_instance_is_no_tenant(tmp_path: Path) -> None:
    found, incus = containers(tmp_path, True)
    incus.found = instance("shop", expanded_config={})
    with pytest.raises(NotFound):
        await found.init_pid("shop")
