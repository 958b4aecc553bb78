"""How far the kernel reads ahead in the tenants' pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.rootfs import btrfs


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bdi").mkdir()
    setting = tmp_path / "bdi" / "read_ahead_kb"
    setting.write_text("4096\n")
    monkeypatch.setattr(btrfs, "in_sysfs", lambda pool, sysfs: tmp_path)
    return setting


def test_it_is_bounded_once_and_told(setting: Path, tmp_path: Path) -> None:
    words = "the kernel reads 128 KiB ahead in the tenants' pool, not 4096"
    assert btrfs.bound_read_ahead(tmp_path) == words
    assert setting.read_text() == "128"
    assert btrfs.bound_read_ahead(tmp_path) == ""


def test_a_smaller_value_stays(setting: Path, tmp_path: Path) -> None:
    setting.write_text("64\n")
    assert btrfs.bound_read_ahead(tmp_path) == ""
    assert setting.read_text() == "64\n"


def test_another_file_system_is_left_alone(tmp_path: Path) -> None:
    assert btrfs.bound_read_ahead(tmp_path) == ""
    assert btrfs.bound_read_ahead(Path("/proc")) == ""


def test_a_kernel_that_lets_nothing_be_set_is_left_alone(setting: Path, tmp_path: Path) -> None:
    """As in a container; the disks' limits, which are looked at next, are worth more."""
    setting.unlink()
    assert btrfs.bound_read_ahead(tmp_path) == ""
