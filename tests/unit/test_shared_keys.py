"""The keys that gateways share: the contract in memory, and what `IncusKeys` makes of an incusd's answers.

tests/integration/test_shared_keys.py has the contract with a real incusd.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.cluster import shared_keys
from gateway.cluster.shared_keys import NO_QUORUM, IncusKeys, SharedKeys
from gateway.errors import RateLimited, Unavailable
from gateway.incus import Incus, IncusError
from tests.contracts.shared_keys import SharedKeysContract
from tests.shared_memory import MemoryKeys


class TestInMemory(SharedKeysContract):
    @pytest.fixture
    async def keys(self) -> tuple[SharedKeys, SharedKeys]:
        keys = MemoryKeys()
        return keys, keys


class Scripted(Incus):
    """An incusd with one project; `ahead` changes of others come before each of ours."""

    def __init__(self, *, there: bool = True, ahead: int = 0) -> None:
        super().__init__(Path("/nonexistent"), "gateway-state")
        self.config: dict[str, str] | None = {"limits.instances": "0"} if there else None
        self.ahead, self.asked = ahead, list[str]()
        self.silent = False
        self.error: IncusError | None = None

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        if_match: str | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        self.asked.append(method)
        await asyncio.sleep(3600 if self.silent else 0)
        if self.error is not None:
            raise self.error
        if method == "POST":
            assert body is not None and path == "/1.0/projects" and body["name"] == "gateway-state"
            if self.config is not None:
                raise IncusError("UNIQUE constraint failed: projects.name", 500)
            self.config = dict(body["config"])
        elif self.config is None:
            raise IncusError("Project not found", 404)
        elif method == "PUT":
            assert body is not None
            if self.ahead:
                self.ahead -= 1
                self.config = {**self.config, "user.other": str(self.ahead)}
            if if_match != str(self.config):
                raise IncusError("ETag doesn't match", 412)
            self.config = dict(body["config"])
        metadata = {"config": dict(self.config or {})}
        return {"type": "sync", "metadata": metadata, "etag": str(self.config)}


@pytest.fixture
async def incus() -> Scripted:
    return Scripted()


@pytest.fixture
async def keys(incus: Scripted) -> AsyncIterator[IncusKeys]:
    async with IncusKeys(incus, 0.2) as keys:
        yield keys


async def test_the_project_is_made_once_whoever_comes_first() -> None:
    """It has nothing of its own: images, profiles, volumes and networks stay the default project's."""
    incus = Scripted(there=False)
    async with IncusKeys(incus) as one, IncusKeys(incus) as other:
        assert all(await asyncio.gather(one.swap("a", None, "1"), other.swap("b", None, "2")))
    assert incus.config is not None
    assert {incus.config[key] for key in incus.config if key.startswith("features.")} == {"false"}
    assert {key for key in incus.config if key.startswith("user.")} == {"user.a", "user.b"}


async def test_what_an_operator_set_stays(incus: Scripted, keys: IncusKeys) -> None:
    assert await keys.swap("a", None, "1")
    assert incus.config == {"limits.instances": "0", "user.a": "1"}
    assert await keys.listed("") == {"a": "1"}


async def test_changes_of_others_come_before_and_none_is_lost(incus: Scripted, keys: IncusKeys) -> None:
    incus.ahead = 3
    assert await keys.swap("a", None, "1")
    assert incus.config == {"limits.instances": "0", "user.other": "0", "user.a": "1"}


async def test_others_that_always_come_before_are_not_waited_for_forever(
    incus: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_keys, "_PAUSE", 0)
    incus.ahead = 1000
    async with IncusKeys(incus) as keys:
        with pytest.raises(Unavailable) as refused:
            await keys.swap("a", None, "1")
    assert refused.value.facts["reason"] == "contended"


async def test_swaps_that_wait_are_made_in_one_request(incus: Scripted, keys: IncusKeys) -> None:
    """In their order, each seeing what those before it made of the keys."""
    first = asyncio.ensure_future(keys.swap("first", None, "x"))
    await asyncio.sleep(0)
    swaps = [keys.swap("a", None, "1"), keys.swap("a", "1", "2"), keys.swap("a", "1", "3")]
    assert await asyncio.gather(first, *swaps) == [True, True, True, False]
    assert incus.asked.count("PUT") <= 2
    assert incus.config is not None and incus.config["user.a"] == "2"


@pytest.mark.parametrize("error", [None, IncusError("no available cowsql leader found", 500)])
async def test_without_a_quorum_the_refusal_comes_in_time(
    incus: Scripted, keys: IncusKeys, error: IncusError | None
) -> None:
    """Incusd hangs then, or says so; and afterwards all goes on."""
    incus.silent, incus.error = error is None, error
    for asked in (keys.swap("a", None, "1"), keys.get("a"), keys.listed(""), anext(keys.changes())):
        began = time.monotonic()
        with pytest.raises(Unavailable) as refused:
            await asked
        assert refused.value.facts["reason"] == NO_QUORUM
        assert "cowsql" not in refused.value.message
        assert time.monotonic() - began < 2
    incus.silent, incus.error = False, None


async def test_a_swap_that_nobody_waits_for_any_more_is_not_made(incus: Scripted) -> None:
    async with IncusKeys(incus, 30) as keys:
        first = asyncio.ensure_future(keys.swap("first", None, "x"))
        given_up = asyncio.ensure_future(keys.swap("a", None, "1"))
        await asyncio.sleep(0)
        given_up.cancel()
        assert await first
        assert await keys.swap("b", None, "1")
    assert incus.config is not None and "user.a" not in incus.config


async def test_the_number_of_keys_has_an_end(
    incus: Scripted, keys: IncusKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_keys, "KEYS_MAX", 2)
    assert await keys.swap("a", None, "1")
    with pytest.raises(RateLimited):
        await keys.swap("b", None, "1")
    assert await keys.swap("a", "1", "2")
    assert await keys.swap("a", "2", None)
    assert await keys.swap("b", None, "1")


async def test_a_stream_of_changes_that_ends_is_no_peace(
    incus: Scripted, keys: IncusKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Incusd closes it without an error, too; whoever follows begins again."""

    async def events(*_: str) -> AsyncIterator[dict[str, Any]]:
        yield {"type": "connected"}
        yield {"type": "lifecycle", "metadata": {"action": "project-updated"}}
        yield {"type": "lifecycle", "metadata": {"action": "profile-updated"}}

    monkeypatch.setattr(incus, "events", events)
    changes = keys.changes()
    await anext(changes)
    await anext(changes)
    with pytest.raises(Unavailable):
        await anext(changes)
