"""Whether a root disk has changed since a snapshot; tests/cluster/test_standby.py asks of real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.rootfs import btrfs


def rootfs(pool: Path) -> str:
    (pool / "containers/shop/rootfs").mkdir(parents=True)
    (pool / "containers/shop/backup.yaml").touch()
    (pool / "containers-snapshots/shop/taken").mkdir(parents=True)
    return str(pool / "containers/shop/rootfs")


@pytest.mark.parametrize(
    ("now", "then", "written", "changed"),
    [
        (7, 7, [999], False),
        (8, 7, [999], True),
        (8, 7, [], False),
        (8, 7, ["Incus's", 256], False),
        (8, 7, [256, "Incus's", 999], True),
    ],
)
def test_what_was_written_in_a_later_generation_is_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: int, then: int, written: list[Any], changed: bool
) -> None:
    """But for Incus's own description of the instance, and its folder."""
    where, volume = rootfs(tmp_path), tmp_path / "containers/shop"
    of = {volume: now, tmp_path / "containers-snapshots/shop/taken": then}
    own = {"Incus's": (volume / "backup.yaml").stat().st_ino}
    monkeypatch.setattr(btrfs, "generation", of.__getitem__)
    monkeypatch.setattr(
        btrfs, "written_since", lambda path, since: [own.get(inode, inode) for inode in written if since == 7]
    )
    assert btrfs.changed_since(where, "taken") == changed


def test_what_cannot_be_known_counts_as_changed(tmp_path: Path) -> None:
    """On another file system, or without that snapshot."""
    where = rootfs(tmp_path)
    assert btrfs.changed_since(where, "taken") and btrfs.changed_since(where, "none")


@pytest.mark.parametrize("name", ["", "..", "a/b", "../taken", "x" * 100, ".hidden"])
def test_what_is_no_name_of_a_snapshot_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name of a snapshot"):
        btrfs.changed_since(rootfs(tmp_path), name)
