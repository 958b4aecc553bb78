"""Whether a root disk has changed since a snapshot; tests/cluster/test_standby.py asks of real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.rootfs import subvolume


def rootfs(pool: Path) -> str:
    (pool / "containers/shop/rootfs").mkdir(parents=True)
    (pool / "containers-snapshots/shop/taken").mkdir(parents=True)
    return str(pool / "containers/shop/rootfs")


@pytest.mark.parametrize(("now", "then", "changed"), [(7, 7, False), (8, 7, True)])
def test_a_later_generation_is_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: int, then: int, changed: bool
) -> None:
    of = {tmp_path / "containers/shop": now, tmp_path / "containers-snapshots/shop/taken": then}
    monkeypatch.setattr(subvolume, "generation", of.__getitem__)
    assert subvolume.changed(rootfs(tmp_path), "taken") == changed


def test_what_cannot_be_known_counts_as_changed(tmp_path: Path) -> None:
    """On another file system, or without that snapshot."""
    where = rootfs(tmp_path)
    assert subvolume.changed(where, "taken") and subvolume.changed(where, "none")


@pytest.mark.parametrize("name", ["", "..", "a/b", "../taken", "x" * 100, ".hidden"])
def test_what_is_no_name_of_a_snapshot_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name of a snapshot"):
        subvolume.changed(rootfs(tmp_path), name)
