"""The kernel's limits are raised once, kept for the next boot, and never lowered."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.host import HostError
from gateway.host.setup import INOTIFY_LIMITS, raise_limits


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A `/proc/sys` with the kernel's defaults, one of which is already higher than ours."""
    for name, value in zip(INOTIFY_LIMITS, (16384, 128, 1 << 30), strict=True):
        path = tmp_path / "sys" / name.replace(".", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return tmp_path / "sys"


def values(kernel: Path) -> list[int]:
    return [int((kernel / name.replace(".", "/")).read_text()) for name in INOTIFY_LIMITS]


def test_raised_once(kernel: Path, tmp_path: Path) -> None:
    drop_in = tmp_path / "etc" / "sysctl.d" / "60.conf"
    said = raise_limits(drop_in, kernel)
    assert said is not None and "max_user_instances 128 -> 1048576" in said and str(drop_in) in said
    assert "max_user_watches" not in said + drop_in.read_text()
    assert values(kernel) == [1_048_576, 1_048_576, 1 << 30]
    assert raise_limits(drop_in, kernel) is None
    # a boot without the drop-in's values, or a drop-in that somebody changed, is put right
    (kernel / "fs/inotify/max_user_instances").write_text("128")
    assert raise_limits(drop_in, kernel) == "max_user_instances 128 -> 1048576"
    drop_in.write_text("fs.inotify.max_user_instances = 1\n")
    assert raise_limits(drop_in, kernel) == f"saved in {drop_in}"
    assert drop_in.read_text().splitlines()[1:] == ["fs.inotify.max_user_instances = 1048576"]


def test_nothing_to_raise(kernel: Path, tmp_path: Path) -> None:
    """If the operator has set more elsewhere, no file is written that would lower it at the next boot."""
    for name in INOTIFY_LIMITS:
        (kernel / name.replace(".", "/")).write_text(str(1 << 30))
    assert raise_limits(tmp_path / "60.conf", kernel) is None
    assert not (tmp_path / "60.conf").exists()


def test_not_to_be_raised(tmp_path: Path) -> None:
    """If the kernel's values cannot be set, the rest of setup continues."""
    assert raise_limits(tmp_path / "60.conf", tmp_path) is None
    assert not (tmp_path / "60.conf").exists()


def test_no_place_for_the_drop_in(kernel: Path, tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("a file")
    with pytest.raises(HostError, match="cannot write"):
        raise_limits(tmp_path / "etc" / "60.conf", kernel)
