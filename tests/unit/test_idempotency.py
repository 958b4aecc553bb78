"""Idempotency: bounded for each tenant, honest about what is not known, of one store over many lives."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway import idempotency as module
from gateway.errors import Cancelled, Conflict, Gone
from gateway.idempotency import Idempotency, Key
from gateway.settings import Settings
from gateway.storage.store import Store, StoreFailed

KEY: Key = ("shop", "call", "c1")


def key(number: int, tenant: str = "shop") -> Key:
    return tenant, "call", f"c{number}"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with Store(tmp_path) as store:
        yield store


async def opened(store: Store, **settings: Any) -> Idempotency:
    return await Idempotency.opened(store, Settings(**settings))


async def kept(idempotency: Idempotency, numbers: range, tenant: str = "shop") -> list[int]:
    return [n for n in numbers if await idempotency.result(key(n, tenant), b"d") is not None]


async def put(idempotency: Idempotency, number: int, tenant: str = "shop", result: bytes = b"r") -> None:
    await idempotency.begin(key(number, tenant), b"d")
    await idempotency.finish(key(number, tenant), b"d", result)


async def test_a_result_outlives_the_life_that_made_it(store: Store) -> None:
    idempotency = await opened(store)
    assert await idempotency.result(KEY, b"d") is None
    await put(idempotency, 1, result=b"said")
    for life in (idempotency, await opened(store)):
        assert await life.result(KEY, b"d") == b"said"
        with pytest.raises(Conflict):
            await life.result(KEY, b"other")


async def test_a_result_is_in_memory_only_until_it_is_in_the_store(store: Store) -> None:
    idempotency = await opened(store)
    await put(idempotency, 1)
    kept = idempotency._stored["shop"].records[KEY]
    assert kept.result == b"r"
    await store.settled()
    assert kept.result is None
    assert await idempotency.result(KEY, b"d") == b"r"


async def test_what_was_begun_and_not_finished_is_not_known(store: Store) -> None:
    await (await opened(store)).begin(KEY, b"d")
    with pytest.raises(Gone) as unknown:
        await (await opened(store)).result(KEY, b"d")
    assert unknown.value.facts["reason"] == "unknown_outcome"


async def test_what_did_not_happen_may_be_made_again(store: Store) -> None:
    idempotency = await opened(store)
    await idempotency.begin(KEY, b"d")
    await idempotency.forget(KEY)
    for life in (idempotency, await opened(store)):
        assert await life.result(KEY, b"other") is None


async def test_a_fence_holds_but_undoes_no_result(store: Store) -> None:
    idempotency = await opened(store)
    await idempotency.fence(KEY)
    await put(idempotency, 2)
    await idempotency.fence(key(2))
    for life in (idempotency, await opened(store)):
        with pytest.raises(Cancelled):
            await life.result(KEY, b"whatever")
        assert await life.result(key(2), b"d") == b"r"


async def test_no_tenant_pushes_out_anothers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 3)
    idempotency = await opened(store)
    await put(idempotency, 1, "blog")
    for n in range(10):
        await put(idempotency, n)
    monkeypatch.setattr(module, "KEPT", 1000)
    # the next life would take more: what was pushed out is gone from the disk, too
    for life in (idempotency, await opened(store)):
        assert await kept(life, range(10)) == [7, 8, 9]
        assert await kept(life, range(10), "blog") == [1]


async def test_a_tenants_results_are_bounded_in_bytes_and_age(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 10_000)
    idempotency = await opened(store)
    for n in range(20):
        await put(idempotency, n, result=b"x" * 1500)
    assert await kept(idempotency, range(20)) == [15, 16, 17, 18, 19]
    young = await opened(store, idempotency_age=60)
    later = time.time() + 61
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: later))
    await put(young, 30)
    assert await kept(young, range(40)) == [30]


async def test_reads_are_kept_in_memory_alone_and_bounded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READS_BYTES", 10_000)
    idempotency = await opened(store)
    for n in range(20):
        idempotency.keep(key(n), b"d", b"x" * 1500)
    assert await kept(idempotency, range(20)) == [15, 16, 17, 18, 19]
    assert await kept(await opened(store), range(20)) == []


async def test_a_tenant_that_is_destroyed_leaves_none(store: Store) -> None:
    idempotency = await opened(store)
    await put(idempotency, 1)
    await put(idempotency, 1, "blog")
    idempotency.keep(key(2), b"d", b"r")
    await idempotency.forget_tenant("shop")
    for life in (idempotency, await opened(store)):
        assert await kept(life, range(5)) == []
        assert await kept(life, range(5), "blog") == [1]


async def test_without_a_disk_nothing_begins_and_a_result_is_kept_for_this_life(store: Store) -> None:
    idempotency = await opened(store)
    await idempotency.begin(KEY, b"d")
    await store.write(lambda db: db.execute("PRAGMA max_page_count=1").fetchall())
    with pytest.raises(StoreFailed):
        await idempotency.finish(KEY, b"d", b"x" * 100_000)
    assert await idempotency.result(KEY, b"d") == b"x" * 100_000
    with pytest.raises(StoreFailed):
        for n in range(1000):
            await idempotency.begin(key(n + 10), b"d" * 1000)
    assert await idempotency.result(key(n + 10), b"d" * 1000) is None
    await store.write(lambda db: db.execute("PRAGMA max_page_count=100000").fetchall())
    with pytest.raises(Gone):
        await (await opened(store)).result(KEY, b"d")


async def test_earlier_tells_of_every_command(store: Store) -> None:
    idempotency = await opened(store)
    for n in (1, 2):
        await idempotency.begin(("shop", "exec", f"x{n}"), b"d")
    await idempotency.finish(("shop", "exec", "x1"), b"d", b"exit")
    await idempotency.fence(("shop", "exec", "x3"))
    await put(idempotency, 1)
    earlier = await (await opened(store)).earlier("exec")
    assert sorted((key[2], receipt.state, receipt.result) for key, receipt in earlier) == [
        ("x1", "done", b"exit"),
        ("x2", "begun", None),
    ]


async def test_however_many_commands_there_were_they_are_read_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients wait meanwhile, where one gateway takes over from another."""
    idempotency = await opened(store)
    for number in range(50):
        await idempotency.note(("shop", "exec", f"x{number}"), b"d", b"facts %d" % number)
    await store.settled()
    later, read, reads = await opened(store), store.read, list[Any]()

    async def counted(work: Any) -> Any:
        reads.append(work)
        return await read(work)

    monkeypatch.setattr(store, "read", counted)
    found = {key[2]: record.result for key, record in await later.earlier("exec")}
    assert found == {f"x{number}": b"facts %d" % number for number in range(50)}
    assert len(reads) == 1


async def test_what_one_tenant_reads_pushes_out_its_own_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READS_BYTES", 50_000)
    idempotency = await opened(store)
    for number in range(3):
        idempotency.keep(key(number, "quiet"), b"d", b"r" * 1000)
    for number in range(300):
        idempotency.keep(key(number, "greedy"), b"d", b"r" * 1000)
    assert await kept(idempotency, range(3), "quiet") == [0, 1, 2]
    found = await kept(idempotency, range(300), "greedy")
    assert found == list(range(found[0], 300)) and 20 < len(found) < 31
    await idempotency.forget_tenant("greedy")
    assert idempotency._reads_bytes == idempotency._reads["quiet"].bytes
