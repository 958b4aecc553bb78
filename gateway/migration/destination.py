"""The tenants that sites move into: keys in Incus, workspaces, scripts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gateway.errors import NotFound
from gateway.incus.client import instance_path
from gateway.migration.record import Moving
from gateway.migration.scripts import inside
from gateway.migration.shifted_mount import close_door, open_door, shows
from gateway.migration.shifted_mount import inside as mapped
from gateway.rootfs.instance_record import identity_of
from gateway.rootfs.shown_folders import place
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.migrations import DEVICE, STATE
from gateway.settings import Settings

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
        if found is None or not found["config"].get(STATE):
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
        """Run a script of this package in the tenant; see `scripts.inside`."""
        return await inside(self._runtime.commands, tenant, script, *words, given=given, seconds=seconds)


def _literal(path: str) -> str:
    """Escape a path for rsync, so that it matches only itself."""
    return "".join(f"\\{letter}" if letter in "*?[\\" else letter for letter in path)
