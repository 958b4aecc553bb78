"""Shows a folder of the host to one tenant, by a mount that maps its owner and no other id.

Incus's own `shift=true` would map every id, root too: root in the container could then write into the folder
as root of the host, and a set-uid file there would be a way to become it. In this mount only the folder's
owner is the workspace's user inside. All other ids are unmapped: what root in the container creates is
refused (EOVERFLOW), and others' files stay others'. The mount is private, so no mount of the container comes
out.

Run the scripts of a migration in its tenant.

The tenants that sites move into: keys in Incus, workspaces, scripts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.errors import ExecFailed, NotFound, Unavailable
from gateway.host import HostError, run
from gateway.incus.client import instance_path
from gateway.migration.plan import Moving
from gateway.migration.source import Owner
from gateway.rootfs.instance_record import identity_of
from gateway.rootfs.shown_folders import mounts, place, unmount
from gateway.runtime import Commands, scripts
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.records import DEVICE, MIGRATION_STATE
from gateway.runtime.sites import disk_was_full
from gateway.settings import Settings

_FIX: Final = (
    "mount (util-linux) 2.39 or later and a file system that takes a map of ids (ext4, xfs, btrfs, tmpfs) "
    "are needed; the old site keeps running"
)


def open_door(where: Path, folder: Path, owner: Owner, inside: Owner, *, read_only: bool) -> None:
    """Mount `folder` with the ids of `owner` shown as the host's ids `inside`.

    Idempotent; a mount that shows anything else is replaced. Raises `HostError`.
    """
    if shows(where, folder, inside, read_only=read_only):
        return
    close_door(where)
    for folder_of_mounts in (where.parent, where):
        folder_of_mounts.mkdir(mode=0o711, parents=True, exist_ok=True)
    options = ["bind", "nosuid", "nodev"]
    options += ["ro"] if read_only else []
    options.append(f"X-mount.idmap=u:{owner.uid}:{inside.uid}:1 g:{owner.gid}:{inside.gid}:1")
    try:
        run(["mount", "-o", ",".join(options), "--", folder, where], fix=_FIX)
        run(["mount", "--make-private", "--", where], fix=_FIX)
        if not shows(where, folder, inside, read_only=read_only):
            raise HostError(
                f"{folder} does not belong to {owner.uid}:{owner.gid} any more; give it back to them, or "
                "undo the migration with --back"
            )
    except HostError:
        close_door(where)
        raise


def shows(where: Path, folder: Path, inside: Owner, *, read_only: bool) -> bool:
    """Return whether exactly this folder is mounted, with its owner shown as `inside`, and in this mode."""
    found = mounts(where)
    if len(found) != 1 or not found[0] >= {"nosuid", "nodev", "idmapped", "ro" if read_only else "rw"}:
        return False
    try:
        there, here = where.stat(), folder.stat()
    except OSError:
        return False
    same = (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
    return same and (there.st_uid, there.st_gid) == (inside.uid, inside.gid)


def close_door(where: Path) -> None:
    """Take the mount away; what still uses it keeps it until it ends. Idempotent. Raises `HostError`."""
    try:
        unmount(where)
    except OSError as error:
        raise HostError(f"{error.strerror}; see what uses {where}") from error


def mapped(config: Mapping[str, Any], uid: int) -> Owner:
    """Return the host's ids of a user of an instance, by its configuration. Raises `HostError`."""
    found: dict[str, int] = {}
    known = config.get("volatile.idmap.current") or config.get("volatile.idmap.next") or "[]"
    for line in orjson.loads(known) or ():
        if line["Nsid"] <= uid < line["Nsid"] + line["Maprange"]:
            host = line["Hostid"] + uid - line["Nsid"]
            found |= {kind: host for kind, key in (("uid", "Isuid"), ("gid", "Isgid")) if line[key]}
    if found.keys() != {"uid", "gid"}:
        raise HostError(
            "Incus reports no id map for this tenant; a site cannot move into a privileged container"
        )
    return Owner(found["uid"], found["gid"])


_PRINTED: Final = 1 << 20  # bytes that one of our scripts may print
_HERE: Final = Path(__file__).parent


async def inside(
    commands: Commands, tenant: str, script: str, *words: str, seconds: float, given: bytes = b""
) -> str:
    """Run a script of this package as the container's root; return the end of its output.

    Raises `ExecFailed`, `Unavailable` if the disk is full, `TimeoutError` after `seconds`.
    """
    argv = ("/bin/sh", "-c", _HERE.joinpath(f"{script}.sh").read_text(), script, *words)
    ended = await scripts.run(commands.exec, tenant, argv, given=given, seconds=seconds, printed=_PRINTED)
    if ended.code == 0:
        return ended.said.strip()
    if disk_was_full(ended.said):
        raise Unavailable(
            "the tenant's disk is full; go back (--back) and choose a larger --size, or leave paths out "
            "(--leave)",
            reason="disk_full",
        )
    raise ExecFailed(
        f"{script} failed in {tenant}: {ended.said.strip()[-800:] or ended.code}", reason="script_failed"
    )


_SCRIPT: Final = 60.0  # seconds for a script that copies nothing


class Destination:
    """Carries out a migration's steps in a tenant, without deciding anything."""

    def __init__(self, settings: Settings, runtime: IncusRuntime) -> None:
        self._settings, self._runtime = settings, runtime
        folder, _, name = settings.workspace.rpartition("/")
        self._next, self._kept = f"{folder}/.{name}-next", f"{folder}/.{name}-kept"

    # --- keys ---------------------------------------------------------------------------------------

    async def instance(self, tenant: str) -> Mapping[str, Any] | None:
        """Return a tenant's instance, or None."""
        with contextlib.suppress(NotFound):
            return await self._runtime.making.instance(tenant)
        return None

    async def moving(self, tenant: str) -> Moving:
        """Return the state of the migration into a tenant. Raises `NotFound`."""
        found = await self.instance(tenant)
        if found is None or not found["config"].get(MIGRATION_STATE):
            raise NotFound(f"no migration into {tenant} is under way")
        return Moving.of(tenant, found["config"])

    async def change(self, tenant: str, config: Mapping[str, str]) -> None:
        """Change keys of a tenant's instance. An empty value removes a key."""
        with translated(tenant):
            await self._runtime.making.operate("PATCH", instance_path(tenant), {"config": config})

    # --- the host's folder as the workspace ---------------------------------------------------------

    async def show_folder(self, moving: Moving) -> None:
        """Mount the host's folder as the workspace while the tenant is stopped, and start it."""
        tenant, making = moving.tenant, self._runtime.making
        instance = await making.instance(tenant)
        where = self.place(instance)
        there = instance["devices"].get(DEVICE, {}).get("source") == str(where)
        ours = mapped(instance["config"], self._settings.workspace_uid)
        if not there or not await asyncio.to_thread(
            shows, where, moving.folder, ours, read_only=moving.read_only
        ):
            await self._runtime.tenants.stop(tenant)
            instance = await making.instance(tenant)
            ours = mapped(instance["config"], self._settings.workspace_uid)
            await asyncio.to_thread(
                open_door, where, moving.folder, moving.owner, ours, read_only=moving.read_only
            )
            device = {"type": "disk", "path": self._settings.workspace, "source": str(where)}
            device |= {"readonly": "true"} if moving.read_only else {}
            with translated(tenant):
                await making.operate("PATCH", instance_path(tenant), {"devices": {DEVICE: device}})
        await self._runtime.tenants.start(tenant)

    def place(self, instance: Mapping[str, Any]) -> Path:
        """Return where an instance's view of its folder is mounted."""
        return place(self._settings.incus_socket.parent, identity_of(instance))

    async def hide_folder(self, tenant: str) -> None:
        """Take away the mount of a tenant that has its own files."""
        where = self.place(await self._runtime.making.instance(tenant))
        await asyncio.to_thread(close_door, where)

    async def shows_folder(self, tenant: str) -> bool:
        """Return whether the host's folder is the workspace."""
        return DEVICE in (await self._runtime.making.instance(tenant))["devices"]

    # --- the tenant's own copy ----------------------------------------------------------------------

    async def mirror(self, moving: Moving) -> None:
        """Update the copy beside the workspace with the changes in the folder."""
        left = [f"--exclude=/{_literal(path)}" for path in moving.leave]
        if moving.recipe.install:  # packages are installed again inside
            left.append("--exclude=node_modules/")
        words = (self._settings.workspace, self._next, str(self._settings.workspace_uid), *left)
        await self.run(moving.tenant, "mirror", *words, seconds=self._settings.install_timeout)

    async def move_in(self, tenant: str) -> None:
        """Replace the folder by the copy as the workspace."""
        await self._runtime.making.remove_device(tenant, DEVICE)
        await self.run(tenant, "move_in", self._settings.workspace, self._next)

    async def move_out(self, tenant: str) -> str:
        """Free the workspace for the folder; return where the tenant's own files are kept, or ""."""
        uid = str(self._settings.workspace_uid)
        return await self.run(tenant, "move_out", self._settings.workspace, self._next, self._kept, uid)

    async def kept(self, tenant: str) -> str:
        """Return where `move_out` has kept files, or ""."""
        return await self.run(tenant, "kept", self._kept)

    async def run(
        self, tenant: str, script: str, *words: str, given: bytes = b"", seconds: float = _SCRIPT
    ) -> str:
        """Run a script of this package in the tenant; see `inside`."""
        return await inside(self._runtime.commands, tenant, script, *words, given=given, seconds=seconds)


def _literal(path: str) -> str:
    """Escape a path for rsync, so that it matches only itself."""
    return "".join(f"\\{letter}" if letter in "*?[\\" else letter for letter in path)
