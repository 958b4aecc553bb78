"""Tenants of the `local` runtime on disk: a folder each, with its record, its disk and its snapshots.

`tenants/NAME` has `tenant.json`, `root` and `snapshots/SNAPSHOT`. Whatever is incomplete begins with a dot.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.errors import Conflict, NotFound, Unavailable
from gateway.runtime import DiskSnapshot, TenantEvent, TenantInstance


class LocalDisks:
    """The tenants' records and disks in one folder. Unknown names raise `NotFound`."""

    def __init__(self, home: Path, member: str) -> None:
        """`member` is the server that they are on."""
        self.home = home
        self._member = member

    def list(self) -> list[TenantInstance]:
        return [
            self.get(folder.name)
            for folder in sorted(self.home.iterdir())
            if not folder.name.startswith(".") and (folder / "tenant.json").exists()
        ]

    def get(self, name: str) -> TenantInstance:
        record = self.record(name)
        return TenantInstance(
            name=name,
            status=record["status"],
            domain=record.get("domain"),
            port=record.get("port"),
            created=record.get("created"),
            instance=record.get("instance"),
            location=self._member,
            asleep=record.get("asleep", False),
            idle_stop=record.get("idle_stop"),
        )

    def record(self, name: str) -> dict[str, Any]:
        """Return what is recorded of a tenant."""
        try:
            # by hand, since each call of a tool reads it: a Path and a buffer cost twice as much
            with open(f"{self.home}/{name}/tenant.json", "rb", buffering=0) as file:  # noqa: PTH123
                record: dict[str, Any] = orjson.loads(file.read())
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"no tenant {name}") from None
        return record

    def change(self, name: str, **facts: Any) -> None:
        """Change facts of a tenant's record, atomically."""
        record = {**self.record(name), **facts}
        path = self.home / name / "tenant.json"
        temporary = path.with_suffix(".new")
        temporary.write_bytes(orjson.dumps(record))
        temporary.replace(path)

    def disk(self, name: str) -> Path:
        """Return the folder that is a tenant's root."""
        self.record(name)
        return self.home / name / "root"

    async def make(
        self,
        name: str,
        domain: str | None,
        workspace: str,
        *,
        disk: Path | None = None,
        site: Mapping[str, Any] | None = None,
    ) -> None:
        """Create a stopped tenant atomically, with a copy of `disk` if given. Raises `Conflict`."""
        place = self.home / name
        taken = Conflict(f"tenant {name} already exists; choose another name")
        if place.exists():
            raise taken
        record = {
            "status": "stopped",
            "domain": domain,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "instance": secrets.token_hex(16),
        }
        fresh = self._aside(name)
        try:
            fresh.mkdir()
            if disk is None:
                (fresh / "root" / workspace.lstrip("/")).mkdir(parents=True)
            else:
                await _copy(disk, fresh / "root")
            if site is not None:
                (fresh / "site.json").touch(mode=0o600)
                (fresh / "site.json").write_bytes(orjson.dumps(site))
            (fresh / "tenant.json").write_bytes(orjson.dumps(record))
            fresh.rename(place)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # created meanwhile
                raise taken from None
            raise
        finally:
            await asyncio.to_thread(shutil.rmtree, fresh, ignore_errors=True)

    def take_out(self, name: str) -> Path:
        """Remove a tenant at once; return the folder that it leaves, for the caller to delete."""
        gone = self._aside(name)
        (self.home / name).rename(gone)
        return gone

    def _aside(self, name: str) -> Path:
        return self.home / f".{name}-{secrets.token_hex(8)}"

    # --- snapshots --------------------------------------------------------------------------------------

    async def snapshots(self, name: str) -> Sequence[DiskSnapshot]:
        """Return a tenant's snapshots, oldest first."""
        self.record(name)
        folder = self.home / name / "snapshots"
        found = sorted(folder.iterdir(), key=lambda path: path.stat().st_ctime_ns) if folder.exists() else []
        kept = [path for path in found if not path.name.startswith(".")]
        return [await asyncio.to_thread(_snapshot, path) for path in kept]

    def kept(self, name: str, snapshot: str) -> Path:
        """Return the folder of a snapshot. Raises `NotFound`."""
        self.record(name)
        kept = self.home / name / "snapshots" / snapshot
        if not kept.is_dir():
            raise NotFound(f"tenant {name} has no snapshot {snapshot[:63]}")
        return kept

    async def keep(self, name: str, snapshot: str) -> DiskSnapshot:
        """Make a snapshot of a tenant's disk. Raises `Conflict` if the name is taken."""
        kept = self.home / name / "snapshots" / snapshot
        disk = self.disk(name)
        if kept.exists():
            raise Conflict(f"tenant {name} already has a snapshot {snapshot}; choose another name")
        await _copy(disk, kept)
        return await asyncio.to_thread(_snapshot, kept)

    async def restore(self, name: str, snapshot: str) -> None:
        """Replace a stopped tenant's disk by a copy of a snapshot."""
        await _copy(self.kept(name, snapshot), self.disk(name))


async def _copy(source: Path, target: Path) -> None:
    """Replace a folder by a copy of another, atomically."""
    target.parent.mkdir(exist_ok=True)
    fresh, old = (target.with_name(f".{target.name}-{secrets.token_hex(4)}") for _ in range(2))
    argv = ("cp", "--archive", "--reflink=auto", "--", str(source), str(fresh))
    copying = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE)
    try:
        _, said = await copying.communicate()
        if copying.returncode != 0:
            raise Unavailable(f"the copy failed: {said.decode(errors='replace')[-200:].strip()}")
        await asyncio.to_thread(_replace, target, fresh, old)
    finally:
        if copying.returncode is None:
            copying.kill()
            await copying.wait()
        for left in (fresh, old):
            await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)


def _replace(target: Path, fresh: Path, old: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    fresh.rename(target)


def _snapshot(kept: Path) -> DiskSnapshot:
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(kept.stat().st_ctime))
    return DiskSnapshot(kept.name, created, size(kept))


def size(folder: Path) -> int:
    """Return the disk space used by the files in a folder, in bytes."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512  # noqa: PTH118
    return total


_WAITING: Final = 1000  # changes that wait for a reader


class LocalChanges:
    """Implements `gateway.runtime.TenantChanges`."""

    told: Sequence[str] = ()

    def __init__(self, disks: LocalDisks) -> None:
        self._disks = disks
        self._events: asyncio.Queue[TenantEvent] = asyncio.Queue(maxsize=_WAITING)

    async def watch(self) -> AsyncIterator[TenantEvent]:
        yield TenantEvent("gateway.resynced", None, {"tenants": len(self._disks.list())})
        while True:
            yield await self._events.get()

    def skip(self, told: Sequence[str]) -> None:
        pass

    def add(self, kind: str, name: str, **facts: str) -> None:
        """Make `watch` yield a change."""
        with contextlib.suppress(asyncio.QueueFull):  # a full queue has no reader
            self._events.put_nowait(TenantEvent(kind, name, facts))
