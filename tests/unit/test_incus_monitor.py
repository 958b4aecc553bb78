"""A container's init process as seen on this host; `test_runtime_incus` tests a real one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gateway.incus import monitor
from gateway.incus.monitor import first_process
from tests.waits import until

DIRECTORY = Path("/var/lib/incus")
BEFORE = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the title of the monitor of `shop`, and one child."""
    monkeypatch.setattr(monitor, "_TREES", (str(tmp_path / "none"), str(tmp_path)))
    title = "[lxc monitor] /var/lib/incus/containers shop"
    with subprocess.Popen([title], executable="/bin/sh", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        try:
            process.stdin.write(b"sleep 60 & wait\n")
            process.stdin.flush()
            (tmp_path / "lxc.monitor.shop").mkdir()
            (tmp_path / "lxc.monitor.shop/cgroup.procs").write_text(f"{process.pid}\n")
            yield process
        finally:
            for pid in (*children(process), process.pid):
                subprocess.run(["kill", "-KILL", str(pid)], check=False, stderr=subprocess.DEVNULL)


def children(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


async def test_it_is_the_child_of_the_containers_monitor(watched: subprocess.Popen[bytes]) -> None:
    await until(lambda: bool(children(watched)))
    assert [first_process(DIRECTORY, "shop", BEFORE)] == children(watched)


async def test_what_is_not_sure_is_not_told(watched: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """Another daemon's container of that name, an earlier run, one that has just ended, strange files."""
    await until(lambda: bool(children(watched)))
    later = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    procs = tmp_path / "lxc.monitor.shop/cgroup.procs"
    assert first_process(Path("/var/lib/other"), "shop", BEFORE) == 0
    assert first_process(DIRECTORY, "shop", later) == first_process(DIRECTORY, "shop", "") == 0
    assert first_process(DIRECTORY, "other", BEFORE) == 0
    for odd in (f"{watched.pid}\n{watched.pid}\n", "", "x\n", f"{2**40}\n"):
        procs.write_text(odd)
        assert first_process(DIRECTORY, "shop", BEFORE) == 0
