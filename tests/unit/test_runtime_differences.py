"""The events derived from two listings of the tenants."""

from __future__ import annotations

from gateway.runtime import Status
from gateway.runtime.incus.watch import differences


def seen(known: dict[str, Status], now: dict[str, Status]) -> list[tuple[str, str | None]]:
    events = differences(known, now)
    assert all(event.data == {"resync": True} for event in events)
    return [(event.type, event.tenant) for event in events]


def test_every_change_is_told_once() -> None:
    assert seen(
        {"same": "running", "stops": "running", "starts": "stopped", "goes": "running", "thaws": "frozen"},
        {"same": "running", "stops": "stopped", "starts": "running", "new": "running", "idle": "stopped"}
        | {"thaws": "running"},  # type: ignore[arg-type]
    ) == [
        ("tenant.stopped", "stops"),
        ("tenant.started", "starts"),
        ("tenant.created", "new"),
        ("tenant.started", "new"),
        ("tenant.created", "idle"),
        ("tenant.started", "thaws"),
        ("tenant.destroyed", "goes"),
    ]


def test_no_change_is_no_event() -> None:
    assert seen({"a": "frozen", "b": "error"}, {"a": "frozen", "b": "error"}) == []
