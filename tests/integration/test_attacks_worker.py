"""What a worker could do that was taken over, from inside of one on a real container's disk."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import orjson

from gateway.rootfs import FilesystemRoot
from gateway.rootfs.workers import Workers
from gateway.runtime.incus import IncusRuntime
from gateway.settings import Settings
from tests.integration import environment
from tests.integration.conftest import Container, MakeTenant
from tests.integration.test_attacks import emptied, pool, victim
from tests.unit.test_rootfs_probes import _CHANGES
from tests.unit.test_rootfs_workers import LANES, PROBES, forked_ahead, pid_of
from tests.waits import Gate

__all__ = ["pool", "victim"]  # fixtures

HIDDEN = "hidden below a disk"


def _state(site: Path) -> list[object]:
    file = site / "a.txt"
    return [site.stat().st_mtime_ns, sorted(os.listdir(site)), file.stat().st_ctime_ns, file.read_bytes()]


async def check_confined(container: Container, settings: Settings, pool: str = "") -> None:
    """From no worker is there a way out of the workspace, and from those that look none to a change."""
    container.sh("cd /srv/site; echo alpha > a.txt; mkdir leaving", user=1000)
    container.sh("echo outside > /srv/secret.txt; chmod 644 /srv/secret.txt")
    root = FilesystemRoot(container.name, settings.workspace)
    site = environment.rootfs(container.name, pool or settings.pool) / "srv/site"
    async with Workers(settings, IncusRuntime(settings).locations, PROBES) as workers:
        for lane in LANES:
            before = _state(site)
            assert orjson.loads(await workers.call(root, "attempt", {}, **lane)) == []
            changed = orjson.loads(await workers.call(root, "change_by_reading", {}, **lane))
            if lane.get("search") and not lane.get("changes"):
                assert changed == orjson.loads(await workers.call(root, "change", {}, **lane)) == []
                assert _state(site) == before
            else:
                assert set(changed) <= {"link"}
                container.sh("rm -f /srv/site/by-descriptor")
                assert orjson.loads(await workers.call(root, "change", {}, **lane)) == list(_CHANGES)
            gate = Gate(site)
            leaving = asyncio.ensure_future(workers.call(root, "leave_by_moved", {}, **lane))
            await gate.reached()
            container.sh("mv /srv/site/leaving /srv/left")
            gate.open()
            assert orjson.loads(await leaving) == []
            container.sh("mv /srv/left /srv/site/leaving; rm /srv/site/gate")


async def test_confined(pool: str, victim: Container, incus_settings: Settings) -> None:
    await check_confined(emptied(victim), incus_settings, pool)


async def test_forked_ahead(tenant: Container, incus_settings: Settings) -> None:
    """A container's root finds neither the process that waits, as root, to be a worker, nor its group."""
    root = FilesystemRoot(tenant.name, incus_settings.workspace)
    async with Workers(incus_settings, IncusRuntime(incus_settings).locations, PROBES) as workers:
        waiting = await forked_ahead(workers, [await pid_of(workers, root)])
        assert b"gateway.rootfs" in Path(f"/proc/{waiting}/cmdline").read_bytes()
        tenant.sh(
            "{ grep -l [g]ateway.rootfs /proc/[0-9]*/cmdline; grep -l [i]ncus-gateway /proc/[0-9]*/cgroup;"
            "find /sys/fs/cgroup -name 'incus-gateway*'; echo looked; } > /srv/seen 2>/dev/null"
        )
        assert (environment.rootfs(tenant.name) / "srv/seen").read_text() == "looked\n"
        assert await forked_ahead(workers, [await pid_of(workers, root)]) == waiting


async def test_covered(make_tenant: MakeTenant, incus_settings: Settings, tmp_path: Path) -> None:
    """What lies below another disk, and on it, no worker reads, by name or from its folder."""
    tenant = await make_tenant()
    (tmp_path / "theirs.txt").write_text("the disk's")
    tenant.sh(
        f"mkdir -p /srv/site/up/below; echo '{HIDDEN}' | tee /srv/site/up/x.txt /srv/site/up/below/y.txt",
        1000,
    )
    root = FilesystemRoot(tenant.name, incus_settings.workspace)
    paths = ["/up", "/up/x.txt", "/up/below", "/up/below/y.txt", "/up/theirs.txt", "/a/../up/x.txt"]
    async with Workers(incus_settings, IncusRuntime(incus_settings).locations, PROBES) as workers:
        assert set(orjson.loads(await workers.call(root, "look", {"paths": paths}))) == set(paths[:4])
        await workers.forget(tenant.name)
        words = ("data", "disk", "path=/srv/site/up", f"source={tmp_path}", "shift=true")
        environment.incus("config", "device", "add", tenant.name, *words)
        tenant.sh("test -e /srv/site/up/theirs.txt")
        for lane in LANES:
            assert orjson.loads(await workers.call(root, "look", {"paths": paths}, **lane)) == []
