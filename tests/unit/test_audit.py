"""Who did what is kept for the operator: no tenant pushes out what another, or the operator, did."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from gateway.audit import AuditLog, AuditRecord
from gateway.events import Bus, StoredJournal
from gateway.settings import Settings
from gateway.storage.store import Store
from tests.waits import until

KEPT = 30


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[tuple[AuditLog, Bus]]:
    async with Store(tmp_path) as store:
        journal = StoredJournal(store, kept=10_000, kept_bytes=1 << 26, age=1e6)
        async with journal:
            bus = Bus(journal)
            async with AuditLog(store, bus, Settings(audit_kept=KEPT)) as audit:
                yield audit, bus


async def test_a_flood_pushes_out_its_own_alone(rig: tuple[AuditLog, Bus]) -> None:
    """By requests and by events; operators' deeds have a room of their own."""
    audit, bus = rig
    await audit.note("her", "tenant.stop", "quiet")
    await audit.note("op", "token.revoked", None, operator=True, token="t")
    await audit.note("op", "tenant.destroy", "greedy", operator=True)
    for number in range(5 * KEPT):
        await audit.note("him", "tenant.start", "greedy")
        bus.publish("file.written", "greedy", {"path": f"{number}", "by": "him"})
    bus.publish("file.written", "quiet", {"path": "x" * 10_000, "by": "her"})

    async def taken() -> bool:  # nobody tells when an event was
        entries = await audit.entries(1000)
        return any(entry["action"] == "file.written" and entry["tenant"] == "quiet" for entry in entries)

    await until(taken)
    await audit.note("him", "tenant.start", "greedy")
    entries = await audit.entries(1000)
    told = [(entry["who"], entry["action"]) for entry in entries]
    for kept in (("op", "token.revoked"), ("op", "tenant.destroy"), ("her", "tenant.stop")):
        assert kept in told
    assert told.count(("him", "tenant.start")) + told.count(("him", "file.written")) == KEPT - 2
    (path,) = (entry["facts"]["path"] for entry in entries if entry["who"] == "her" and entry["facts"])
    assert path == "x" * 500
    assert [entry["id"] for entry in entries] == sorted((entry["id"] for entry in entries), reverse=True)
    for number in range(3 * KEPT):
        await audit.note("op", "tenant.stop", "quiet", operator=True, number=number)
    entries = await audit.entries(1000)
    assert [entry["who"] for entry in entries].count("op") == KEPT
    assert ("her", "tenant.stop") in [(entry["who"], entry["action"]) for entry in entries]


async def test_what_cannot_be_recorded_holds_up_nothing_that_follows(
    rig: tuple[AuditLog, Bus], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    audit, bus = rig
    write, broken = audit._write, asyncio.Event()

    async def once(entries: Sequence[AuditRecord]) -> None:
        if not broken.is_set():
            broken.set()
            raise ValueError("nobody foresaw this")
        await write(entries)

    monkeypatch.setattr(audit, "_write", once)
    bus.publish("file.written", "a", {"path": "first", "by": "her"})
    await asyncio.wait_for(broken.wait(), 20)
    bus.publish("file.written", "a", {"path": "second", "by": "her"})
    await until(lambda: audit.entries(10))  # nobody tells when an event was taken over
    entries = await audit.entries(10)
    assert [entry["facts"]["path"] for entry in entries] == ["second"]
    assert "cannot record the events from" in caplog.text
