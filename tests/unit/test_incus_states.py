"""A list reads the state of an instance only where something is not known without it, and not each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from gateway.incus import inventory
from gateway.incus.inventory import States


class Incusd:
    """Instances by name, each with the address that its state tells; `read` counts."""

    def __init__(self, **addresses: str) -> None:
        self.addresses, self.begun = addresses, dict.fromkeys(addresses, "1")
        self.read: list[str] = []
        self.states = States(self._state)

    def entry(self, name: str) -> dict[str, Any]:
        return {"name": name, "config": {"volatile.uuid": name}, "last_used_at": self.begun[name]}

    async def _state(self, name: str) -> dict[str, Any] | None:
        self.read.append(name)
        if name not in self.addresses:
            return None
        return {**self.entry(name), "state": {"address": self.addresses[name]}}

    async def listed(self) -> dict[str, str]:
        found = await self.states.added([self.entry(name) for name in self.begun], lacks)
        return {entry["name"]: entry["state"]["address"] for entry in found}


def lacks(instance: Mapping[str, Any]) -> bool:
    return not (instance.get("state") or {}).get("address")


async def test_a_state_is_read_once_a_start() -> None:
    incusd = Incusd(one="10.0.0.1", two="10.0.0.2")
    for _ in range(3):
        assert await incusd.listed() == {"one": "10.0.0.1", "two": "10.0.0.2"}
    assert incusd.read == ["one", "two"]
    incusd.begun["one"], incusd.addresses["one"] = "2", "10.0.0.9"
    assert (await incusd.listed())["one"] == "10.0.0.9"
    assert incusd.read == ["one", "two", "one"]


async def test_one_that_does_not_tell_yet_is_read_again() -> None:
    incusd = Incusd(one="")
    assert await incusd.listed() == {"one": ""}
    incusd.addresses["one"] = "10.0.0.1"
    assert await incusd.listed() == {"one": "10.0.0.1"}


async def test_a_state_is_old_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    incusd = Incusd(one="10.0.0.1")
    await incusd.listed()
    monkeypatch.setattr(inventory, "_STATE_AGE", 0.0)
    incusd.addresses["one"] = "10.0.0.2"
    assert await incusd.listed() == {"one": "10.0.0.2"}


async def test_of_one_that_is_gone_nothing_is_kept() -> None:
    incusd = Incusd(one="10.0.0.1", two="10.0.0.2")
    await incusd.listed()
    del incusd.begun["two"]
    assert await incusd.listed() == {"one": "10.0.0.1"}
    incusd.begun["two"] = "1"
    del incusd.addresses["two"]  # it goes between the list and the look at it
    assert await incusd.listed() == {"one": "10.0.0.1"}
    assert incusd.read == ["one", "two", "two"]
