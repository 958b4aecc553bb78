"""Each confined worker has its own cgroup, which does not outlive it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.errors import Unavailable
from gateway.rootfs.worker_cgroup import Hierarchy, WorkerCgroups, hierarchies
from gateway.rootfs.workers import Workers
from gateway.settings import MiB, Settings
from tests.unit.test_rootfs_workers import PROBES, LaidRoot, echo, gone, make_root, pid_of
from tests.unit.test_rootfs_workers import folders as at

needs_groups = pytest.mark.skipif(
    os.getuid() != 0 or "memory" not in {name for found in hierarchies() for name in found.controllers},
    reason="control groups are made by root, and their memory controller must be there",
)


@pytest.fixture
def root(tmp_path: Path) -> LaidRoot:
    return make_root(tmp_path)


def folders_of(pid: int) -> dict[str, Path]:
    """Return a process's cgroups by controller, as the kernel reports them."""
    inside: dict[str, str] = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        inside |= {name or "unified": path for name in names.split(",")}
    return {
        name: Path(found.mount + inside["unified" if found.unified else name])
        for found in hierarchies()
        for name in found.controllers
    }


def first(folder: Path, *names: str) -> int:
    """Return the number in the first existing file: v1 and v2 use different names."""
    return int(next((folder / name).read_text() for name in names if (folder / name).exists()))


@needs_groups
async def test_bounds(root: LaidRoot) -> None:
    """A worker is alone in its cgroup, which limits its memory and processes and is removed with it."""
    async with Workers(Settings(worker_memory=96 * MiB), at(root.path.parent), PROBES) as workers:
        pids = [await pid_of(workers, root, search=search) for search in (False, True)]
        layers = workers.layers(root.tenant)
        places = [folders_of(pid) for pid in pids]
        for pid, folders in zip(pids, places, strict=True):
            for folder in folders.values():
                assert (folder / "cgroup.procs").read_text().split() == [str(pid)]
            assert first(folders["memory"], "memory.max", "memory.limit_in_bytes") == 96 * MiB
            assert first(folders["pids"], "pids.max") == 1
        await workers.forget(root.tenant)
        left = [folder for folders in places for folder in folders.values() if folder.exists()]
    assert layers is not None and {"memory group", "pids group"} <= set(layers)
    assert left == []


@needs_groups
async def test_memory(root: LaidRoot) -> None:
    """A worker that exceeds its memory is killed by the kernel, which costs one call."""
    async with Workers(Settings(worker_memory=64 * MiB), at(root.path.parent), PROBES) as workers:
        pid = await pid_of(workers, root)
        assert await workers.call(root, "gorge", {"megabytes": 8}) == b"8"
        with pytest.raises(Unavailable):
            await workers.call(root, "gorge", {"megabytes": 160})
        await gone(pid)  # no MemoryError of its own: that is for an address space of 256 MiB more
        assert await echo(workers, root) == "hi"


@needs_groups
async def test_leftovers(root: LaidRoot) -> None:
    """A broker removes what a killed one left, but nothing of a running one."""
    found = hierarchies()[0]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    async with Workers(Settings(), at(root.path.parent), PROBES) as other:
        living = folders_of(await pid_of(other, root))
        for top in ("incus-gateway", "incus-gateway-searches"):
            Path(found.mount, top, f"{ended.pid}-17", "3").mkdir(parents=True)
        async with Workers(Settings(), at(root.path.parent), PROBES) as workers:
            await echo(workers, root)
            left = list(Path(found.mount).glob(f"incus-gateway*/{ended.pid}-17"))
            kept = all(folder.exists() for folder in living.values())
        assert left == []
        assert kept
        assert await echo(other, root) == "hi"
    assert not any(folder.parent.exists() for folder in living.values())


def test_none_can_be_made(tmp_path: Path) -> None:
    """If no cgroup can be created or limited, a worker has none, reports it and leaves no folder."""
    for mount in (tmp_path, tmp_path / "missing"):
        groups = WorkerCgroups([Hierarchy(str(mount), ("memory", "pids"), unified=True)])
        group = groups.new(1, search=False)
        assert group.bound(64 * MiB) == []
        assert group.enter() == []
        group.remove()
        groups.close()
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("hybrid", [False, True])
def test_finds_controllers(tmp_path: Path, hybrid: bool) -> None:
    """Each controller is used where it is: in v2 on a pure host, else in v1."""
    unified = tmp_path / "unified"
    unified.mkdir()
    (unified / "cgroup.controllers").write_text("hugetlb\n" if hybrid else "cpuset cpu io memory pids\n")
    lines = [f"30 23 0:26 / {unified} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"]
    if hybrid:
        lines += [
            "31 23 0:27 / /v1/memory rw,relatime - cgroup cgroup rw,memory\n",
            "32 23 0:28 / /v1/pids rw,relatime - cgroup cgroup rw,pids\n",
            "33 23 0:29 / /v1/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n",
        ]
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text("".join(lines))
    wanted = (
        [Hierarchy("/v1/memory", ("memory",), False), Hierarchy("/v1/pids", ("pids",), False)]
        if hybrid
        else [Hierarchy(str(unified), ("memory", "pids"), True)]
    )
    assert hierarchies(str(mountinfo)) == wanted


def test_v2_files(tmp_path: Path) -> None:
    """On a pure v2 host, controllers are delegated level by level, and the limits have v2's names."""
    (tmp_path / "cgroup.subtree_control").touch()
    (tmp_path / "incus-gateway-searches").mkdir()
    (tmp_path / "incus-gateway-searches" / "cpu.weight").touch()
    groups = WorkerCgroups([Hierarchy(str(tmp_path), ("memory", "pids"), unified=True)])
    (mine,) = (tmp_path / "incus-gateway-searches").glob(f"{os.getpid()}-*")
    worker = mine / "4"
    worker.mkdir()
    for name in ("memory.max", "memory.swap.max", "pids.max"):
        (worker / name).touch()
    group = groups.new(4, search=True)
    assert group.bound(64 * MiB) == ["memory", "pids"]
    assert {file.name: file.read_text() for file in worker.iterdir()} == {
        "memory.max": str(64 * MiB),
        "memory.swap.max": "0",
        "pids.max": "1",
    }
    assert (tmp_path / "incus-gateway-searches" / "cpu.weight").read_text() == "33"
    assert (tmp_path / "cgroup.subtree_control").read_text() != ""
