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

from gateway.cluster.keys import FolderKeys, IncusKeys
from gateway.errors import RateLimited, Unavailable
from gateway.incus import Incus, IncusError
from gateway.incus.members import NO_QUORUM
from gateway.ownership.reservations import Keys, SharedKeys
from tests.contracts.shared_keys import KeysContract, SharedKeysContract
from tests.shared_memory import MemoryKeys
from tests.waits import until


class TestInMemory(SharedKeysContract):
    @pytest.fixture
    async def keys(self) -> tuple[SharedKeys, SharedKeys]:
        keys = MemoryKeys()
        return keys, keys


class TestInAFolder(KeysContract):
    @pytest.fixture
    async def keys(self, tmp_path: Path) -> tuple[Keys, Keys]:
        return FolderKeys(tmp_path / "keys"), FolderKeys(tmp_path / "keys")


class Scripted(Incus):
    """An incusd with the profiles of one project; `ahead` changes of others come before each of ours."""

    def __init__(self, *, there: bool = True, ahead: int = 0) -> None:
        super().__init__(Path("/nonexistent"), "gateway-keys")
        self.profiles: dict[str, dict[str, str]] | None = {"default": {}} if there else None
        self.features: dict[str, str] = {}
        self.ahead, self.asked = ahead, list[str]()
        self.silent, self.stuck = False, set[str]()
        self.error: IncusError | None = None

    async def _request(
        self, method: str, path: str, *, body: Mapping[str, Any] | None = None, **_: Any
    ) -> dict[str, Any]:
        self.asked.append(f"{method} {path}")
        await asyncio.sleep(3600 if self.silent else 0)
        if self.error is not None:
            raise self.error
        metadata: Any = None
        if path == "/1.0":
            metadata = {"environment": {}}
        elif path == "/1.0/projects":
            assert body is not None and body["name"] == "gateway-keys"
            if self.profiles is not None:
                raise IncusError("UNIQUE constraint failed: projects.name", 500)
            self.profiles, self.features = {"default": {}}, dict(body["config"])
        elif self.profiles is None:
            raise IncusError("Project not found", 404)
        elif method == "DELETE":
            if (name := path.rpartition("/")[2].replace("%40", "@")) in self.stuck:
                raise IncusError("it is busy", 500)
            if self.profiles.pop(name, None) is None:
                raise IncusError("Profile not found", 404)
        elif method == "POST":
            assert body is not None
            if self.ahead:
                self.ahead -= 1
                self.profiles[body["name"]] = {"user.value": "other", "user.at": "0"}
            if body["name"] in self.profiles:
                raise IncusError('The "x" profile already exists', 400)
            self.profiles[body["name"]] = dict(body["config"])
        elif path.startswith("/1.0/profiles/"):
            if (name := path.rpartition("/")[2].replace("%40", "@")) not in self.profiles:
                raise IncusError("Profile not found", 404)
            metadata = {"name": name, "config": self.profiles[name]}
        else:
            metadata = [{"name": name, "config": config} for name, config in self.profiles.items()]
        return {"type": "sync", "metadata": metadata, "etag": ""}

    def versions(self) -> set[str]:
        assert self.profiles is not None
        return self.profiles.keys() - {"default"}


@pytest.fixture
async def incus() -> Scripted:
    return Scripted()


@pytest.fixture
async def keys(incus: Scripted) -> AsyncIterator[IncusKeys]:
    async with IncusKeys(incus, 0.2) as keys:
        yield keys


async def test_the_project_is_made_once_whoever_comes_first() -> None:
    """It has nothing of its own but its profiles; images, volumes and networks stay the default project's."""
    incus = Scripted(there=False)
    async with IncusKeys(incus) as one, IncusKeys(incus) as other:
        assert all(await asyncio.gather(one.swap("a", None, "1"), other.swap("b", None, "2")))
    own = {feature for feature, value in incus.features.items() if value == "true"}
    assert own == {"features.profiles"} and len(incus.features) > 4
    assert incus.versions() == {"a@1", "b@1"}


async def test_of_two_that_follow_one_value_one_does(incus: Scripted, keys: IncusKeys) -> None:
    incus.ahead = 1
    assert not await keys.swap("a", None, "1")
    assert await keys.get("a") == "other"
    assert await keys.swap("a", "other", "1")
    assert incus.versions() == {"a@1", "a@2"}


async def test_a_value_that_was_followed_is_kept_a_while_and_then_deleted(
    incus: Scripted, keys: IncusKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is the mark of a removed key: nobody follows again what he read just before."""
    assert await keys.swap("a", None, "1")
    assert await keys.swap("a", "1", None)
    assert await keys.get("a") is None and await keys.listed("") == {}
    assert await keys.swap("b", None, "x")
    assert incus.versions() == {"a@1", "a@2", "b@1"}
    monkeypatch.setattr("gateway.cluster.keys._FOLLOWED", -10.0)
    assert await keys.swap("b", "x", "y")
    await until(lambda: "a@1" not in incus.versions())
    assert "a@2" in incus.versions()
    monkeypatch.setattr("gateway.cluster.keys._REMOVED_KEPT", -10.0)
    assert await keys.swap("b", "y", "z")
    await until(lambda: "a@2" not in incus.versions())
    assert await keys.get("b") == "z"


async def test_who_stalls_does_not_win_what_others_have_followed_meanwhile(
    incus: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it took, and though another member's clock is two minutes ahead and it deletes at once."""
    async with IncusKeys(incus) as slow, IncusKeys(incus) as other:
        assert await other.swap("a", None, "1")
        reads = slow._read
        stalled, go_on = asyncio.Event(), asyncio.Event()

        async def stalls() -> Any:
            found = await reads()
            stalled.set()
            await go_on.wait()
            return found

        monkeypatch.setattr(slow, "_read", stalls)
        swap = asyncio.create_task(slow.swap("a", "1", "slow"))
        await stalled.wait()
        monkeypatch.setattr("gateway.cluster.keys._FOLLOWED", -120.0)
        for before, after in (("1", "2"), ("2", "3"), ("3", "4"), ("4", "5")):
            assert await other.swap("a", before, after)
            await asyncio.gather(*other._sweeps)
        assert "a@1" not in incus.versions() and "a@2" not in incus.versions()
        go_on.set()
        with pytest.raises(Unavailable) as caught:
            await swap
        assert caught.value.facts["reason"] == "contended"
        assert await other.get("a") == "5"


async def test_a_removed_key_that_was_forgotten_is_not_set_twice(
    incus: Scripted, keys: IncusKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await keys.swap("a", None, "1") and await keys.swap("a", "1", None)
    before = await keys._read()
    assert incus.profiles is not None
    incus.profiles = {"default": {}}  # forgotten after an hour
    assert await keys.swap("a", None, "new")
    monkeypatch.setattr(keys, "_read", lambda: asyncio.sleep(0, before))
    follow = keys._follow

    async def followed(*given: Any) -> str:
        own = await follow(*given)
        monkeypatch.undo()
        return own

    monkeypatch.setattr(keys, "_follow", followed)
    with pytest.raises(Unavailable):
        await keys.swap("a", None, "slow")
    assert await keys.get("a") == "new"


async def test_older_values_go_before_younger_ones(incus: Scripted, keys: IncusKeys) -> None:
    """A younger one stays while an older one cannot be deleted: by that others know that it was followed."""
    incus.profiles = {"default": {}} | {f"a@{number}": {"user.at": "0"} for number in range(1, 5)}
    incus.stuck = {"a@2"}
    await keys._delete(["a@1", "a@2", "a@3"])
    assert incus.versions() == {"a@2", "a@3", "a@4"}


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
        assert time.monotonic() - began < 10  # it would wait for ever
    incus.silent, incus.error = False, None


async def test_the_number_of_keys_has_an_end(
    incus: Scripted, keys: IncusKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.cluster.keys.KEYS_MAX", 1)
    assert await keys.swap("a", None, "1")
    with pytest.raises(RateLimited):
        await keys.swap("b", None, "1")
    assert await keys.swap("a", "1", "2")
    assert await keys.swap("a", "2", None)


async def test_a_stream_of_changes_that_ends_is_no_peace(
    incus: Scripted, keys: IncusKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Incusd closes it without an error, too; whoever follows begins again."""

    async def events(*_: str) -> AsyncIterator[dict[str, Any]]:
        yield {"type": "connected"}
        yield {"type": "lifecycle", "metadata": {"action": "profile-created"}}
        yield {"type": "lifecycle", "metadata": {"action": "profile-deleted"}}

    monkeypatch.setattr(incus, "events", events)
    changes = keys.changes()
    await anext(changes)
    await anext(changes)
    with pytest.raises(Unavailable):
        await anext(changes)
