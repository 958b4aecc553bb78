"""Instances created at the same time get different addresses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import Conflict, Unavailable
from gateway.incus import Incus, IncusError
from gateway.runtime.incus.creation import Creation
from gateway.settings import Settings
from tests.waits import settled, turn


class Full(Incus):
    """An Incus that accepts an address only once, and lists an instance only once it is created."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), "default", 1.0)
        self.addresses: list[str] = []
        self.refused = 0
        self.asked: list[str] = []

    async def get(self, path: str, **query: str) -> Any:
        self.asked.append(path)
        await turn()
        if path == "/1.0":
            return {}
        return {"devices": {"root": {}, "eth0": {}}} if "/profiles/" in path else []

    async def instances(
        self, *, state: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> list[dict[str, Any]]:
        found = [{"devices": {"eth0": {"ipv4.address": address}}} for address in self.addresses]
        await turn()
        return found

    async def operate(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float = 0,
        if_match: str | None = None,
        target: str | None = None,
        project: str | None = None,
    ) -> Any:
        assert body is not None
        address = body["devices"]["eth0"]["ipv4.address"]
        if address in self.addresses:
            self.refused += 1
            raise IncusError(f'IP address "{address}" already defined on another NIC', 400)
        await settled()
        if address in self.addresses:
            self.refused += 1
            raise IncusError(f'IP address "{address}" already defined on another NIC', 400)
        self.addresses.append(address)


async def make(making: Creation, number: int) -> None:
    await making.make(f"t-{number}", {}, {}, {}, start=False)


async def test_instances_that_are_made_at_once_have_addresses_of_their_own(tmp_path: Path) -> None:
    """Incus refuses a duplicate, and its remains make the next attempt fail."""
    incus = Full()
    making = Creation(Settings(state_dir=tmp_path, network_ipv4="10.9.8.1/28"), incus)
    async with asyncio.timeout(60):
        await asyncio.gather(*(make(making, number) for number in range(13)))
        assert (len(set(incus.addresses)), incus.refused) == (13, 0)
        assert "10.9.8.1" not in incus.addresses
        with pytest.raises(Unavailable, match="all addresses"):
            await make(making, 13)
        # what was not made after all is free again
        assert not making._promised
    # DHCP's are asked for together, and the profile, which nobody hears of here, for each
    assert sum(path.endswith("/leases") for path in incus.asked) == 1


class Taken(Full):
    """An Incus in which somebody else's instance has the name as soon as ours was made, if it `is_taken`."""

    def __init__(self, *, is_taken: bool) -> None:
        super().__init__()
        self.is_taken = is_taken
        self.done: list[str] = []
        self._identity = ""

    async def instance(self, name: str, **_: Any) -> dict[str, Any]:
        return {"name": name, "config": {"volatile.uuid": "another's" if self.is_taken else self._identity}}

    async def operate(self, method: str, path: str, body: Any = None, **_: Any) -> Any:
        self.done.append(f"{method} {path}")
        self._identity = body.get("config", {}).get("volatile.uuid", self._identity)
        assert "start" not in body


@pytest.mark.parametrize("is_taken", [False, True])
async def test_an_instance_is_started_once_its_disk_is_limited_and_no_other_is(
    tmp_path: Path, is_taken: bool
) -> None:
    incus = Taken(is_taken=is_taken)

    async def limited(name: str, *, standby: bool = False) -> int:
        assert not standby
        incus.done.append(f"limited {name}")
        return 0

    making = Creation(Settings(state_dir=tmp_path), incus, limited=limited)
    with pytest.raises(Conflict) if is_taken else contextlib.nullcontext():
        await making.make("shop", {}, {}, {}, start=True)
    steps = ["POST /1.0/instances", "limited shop", "PUT /1.0/instances/shop/state"]
    assert incus.done == steps[: 2 if is_taken else 3]
