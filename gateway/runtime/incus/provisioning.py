"""Provision a site inside its container: files, install command, service, and the exchange of two sites."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from gateway.errors import ExecFailed, GatewayError, Unavailable
from gateway.incus import Incus
from gateway.rootfs.paths import show
from gateway.runtime import ExecSpec, scripts
from gateway.runtime.incus import service_unit
from gateway.runtime.incus.addresses import exposure
from gateway.runtime.incus.commands import IncusCommands
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.errors import DISK_FULL, POOL_FULL, translated
from gateway.runtime.incus.script_files import script, systemd_script
from gateway.runtime.incus.uploads import number
from gateway.runtime.installs import failure
from gateway.runtime.probe import network_up
from gateway.runtime.sites import (
    ALLOWED,
    Exchange,
    Recipe,
    Say,
    Side,
    disk_was_full,
    lines,
    quota_was_reached,
)
from gateway.settings import Settings

_INSTALLS: Final = 3  # attempts of an install command
# drivers with one file system for all tenants, where a tenant at its limit gets a quota error
_SHARED: Final = ("btrfs", "dir", "zfs")
_EMPTY: Final = 0.5  # use of a pool below which a command cannot have filled it, even if it cleaned up
_PATH_SHOWN: Final = 500
_SIZE: Final = 12  # characters of the size that seal.sh prints
_PRINTED: Final = 4 << 20  # bytes that a script may print; ours print a few lines
LOOK: Final = 10.0  # seconds for a script that only reads
_ALLOWS: Final = 30.0  # seconds to tell a domain to systemd, which may just be starting
_DROPS: Final = 60.0  # seconds to remove a kept site
_UNREADABLE: Final = "\ncannot be read: "  # as stage.sh prints it
_STAGE: Final = script("stage")
_DISCARD: Final = script("discard")
_UNPACK: Final = script("unpack")
_CARRY: Final = script("carry")
_KEEP_ENVIRONMENT: Final = script("keep_environment")
_START_SERVICE: Final = systemd_script("start_service")
_ALLOW_DOMAIN: Final = systemd_script("allow_domain")
_HALT: Final = systemd_script("halt")
_SETTLE: Final = systemd_script("settle")
_UNSETTLE: Final = systemd_script("unsettle")
_CLEAR: Final = systemd_script("clear")
_SEAL: Final = script("seal")
_ACCESS_TIMES: Final = Path(__file__).with_name("access_times.py").read_text()
_DROP: Final = script("drop_former")


class Provisioning:
    """The sites inside the containers of one Incus project; the methods are those of `Sites`."""

    def __init__(self, settings: Settings, incus: Incus, making: Creation, commands: IncusCommands) -> None:
        self._settings, self._incus = settings, incus
        self._making, self._commands = making, commands
        self._uid = str(settings.workspace_uid)
        self._live, self._next = settings.workspace, service_unit.beside(settings, "next")
        self._note = service_unit.beside(settings, "before")
        self.places = (self._live, self._next, self._note)
        self.kept = service_unit.beside(settings, "kept")

    # --- files --------------------------------------------------------------------------------------

    async def push(
        self,
        tenant: str,
        side: Side,
        recipe: Recipe,
        env: Mapping[str, str] | None,
        lost: bytes = b"",
        how: Exchange = "update",
    ) -> None:
        await self.with_room(tenant, lambda: self._push(tenant, side, recipe, env, lost, how))

    async def _push(
        self,
        tenant: str,
        side: Side,
        recipe: Recipe,
        env: Mapping[str, str] | None,
        lost: bytes,
        how: Exchange,
    ) -> None:
        if side == "next":
            await self.script(tenant, _STAGE, self._live, self._next, self._uid, how)
            if lost:
                await self.script(tenant, _DISCARD, self._next, self._uid, given=lost)
        if recipe.archive:
            await self.script(tenant, _UNPACK, self._folder(side), self._uid, given=recipe.archive)
        if env is not None:
            # on stdin: it may contain secrets, and command lines are visible on the host
            text = service_unit.environment_file(env).encode()
            await self.script(tenant, _KEEP_ENVIRONMENT, service_unit.environment_path(side), given=text)

    async def install(self, tenant: str, side: Side, recipe: Recipe, say: Say) -> None:
        if not recipe.install:
            return
        await self.reachable(tenant)
        for left in reversed(range(_INSTALLS)):
            try:
                await self.with_room(tenant, lambda: self._install(tenant, side, recipe, say))
                return
            except ExecFailed as error:
                # registries and name servers fail occasionally; what was fetched is kept
                lasts = error.facts.get("cause", "registry") != "registry"
                if not left or "exit_code" not in error.facts or lasts:
                    raise
                say(f"the install command ended with {error.facts['exit_code']}, trying again")

    async def _install(self, tenant: str, side: Side, recipe: Recipe, say: Say) -> None:
        process = await self._commands.exec(
            tenant, ExecSpec(recipe.install, cwd=self._folder(side), env={"CI": "1"}, merged=True)
        )
        try:
            async with asyncio.timeout(self._settings.install_timeout):
                tail = await lines(process, say, self._settings.install_log, self._settings.install_output)
                exit_ = await process.wait()
        except BaseException as error:
            await asyncio.shield(process.kill(0))
            if isinstance(error, TimeoutError):
                raise ExecFailed(
                    f"the install command did not finish within {self._settings.install_timeout:.0f} s; "
                    "GATEWAY_INSTALL_TIMEOUT sets the limit",
                    reason="install_failed",
                ) from error
            raise
        finally:
            await process.aclose()
        if exit_.code != 0:
            await self._if_full(tail)
            known = failure(exit_.code, tail)
            raise ExecFailed(
                f"the install command {' '.join(recipe.install)} ended with {exit_.code}: {tail[-1000:]}",
                reason="install_failed",
                exit_code=exit_.code,
                **({} if known is None else known.facts),
            )

    async def reachable(self, name: str) -> None:
        """Wait until the container's network is up."""
        found = exposure(await self._making.placed(name), 9)
        if found is not None:
            await network_up(found.address, self._settings.verify_timeout)

    # --- service ------------------------------------------------------------------------------------

    async def start(self, tenant: str, side: Side, recipe: Recipe) -> None:
        words = (service_unit.unit_path(side), side, service_unit.NAMES[side])
        unit = service_unit.unit(self._settings, recipe, side).encode()
        await self.script(tenant, _START_SERVICE, *words, given=unit)

    async def restart(self, tenant: str) -> None:
        await self.run(tenant, ("systemctl", "restart", service_unit.NAMES["live"]))

    async def allow(self, tenant: str, domain: str) -> None:
        await self.script(tenant, _ALLOW_DOMAIN, f"{ALLOWED}={domain}", seconds=_ALLOWS)

    # --- the exchange -------------------------------------------------------------------------------

    async def halt(self, tenant: str) -> None:
        await self.script(tenant, _HALT, self._live, self._note)

    async def settle(self, tenant: str, recipe: Recipe, kept: bytes, how: Exchange) -> None:
        if kept:
            words = (self._live, self._next, self._uid, self._note, how)
            await self.script(tenant, _CARRY, *words, given=kept)
        unit = service_unit.unit(self._settings, recipe, "live").encode()
        await self.script(tenant, _SETTLE, *self.places, how, given=unit)

    async def unsettle(self, tenant: str) -> None:
        await self.script(tenant, _UNSETTLE, *self.places)

    async def clear(self, tenant: str) -> None:
        await self.script(tenant, _CLEAR, *self.places, self.kept, self._uid)

    async def seal(self, name: str) -> int:
        """Stop the site, remove what copies must not share, and return the bytes of the container's files."""
        # Access times are switched off: recording them, a day later at the first read of each file, a copy
        # would stop sharing the files' metadata, and btrfs would recompute its quotas: 1.2 s of CPU with 60
        # copies.
        with contextlib.suppress(GatewayError, TimeoutError):  # an operator's image may lack Python
            await self.run(name, ("python3", "-c", _ACCESS_TIMES, "/"))
        said = (await self.script(name, _SEAL))[-_SIZE:].strip()
        return number(said) << 10

    # --- in the container ---------------------------------------------------------------------------

    def _folder(self, side: Side) -> str:
        return self._live if side == "live" else self._next

    async def script(
        self, name: str, script: str, *words: str, given: bytes = b"", seconds: float | None = None
    ) -> str:
        return await self.run(name, ("/bin/sh", "-c", script, "sh", *words), given=given, seconds=seconds)

    async def run(
        self, name: str, argv: tuple[str, ...], *, given: bytes = b"", seconds: float | None = None
    ) -> str:
        """Run a command as the container's root; return the end of its output. Raises `ExecFailed`."""
        limit = seconds or self._settings.install_timeout
        ended = await scripts.run(
            self._commands.exec, name, argv, given=given, seconds=limit, printed=_PRINTED
        )
        if ended.code == 0:
            return ended.said
        await self._if_full(ended.said)
        _, unreadable, path = ended.said.rpartition(_UNREADABLE)
        if unreadable:
            where = f"{self._live}/{show(path[:_PATH_SHOWN])}"
            raise ExecFailed(
                f"{where} is not readable by the site's user, so an update would lose it; "
                "give it to that user (chown, chmod) or remove it",
                reason="unreadable",
            )
        raise ExecFailed(
            f"preparing tenant {name} failed: {ended.said.strip()[-500:]}",
            reason="script_failed",
            exit_code=ended.code,
        )

    async def with_room(self, tenant: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do work that needs disk space; while the disk is full, drop the tenant's oldest kept site."""
        while True:
            try:
                return await work()
            except Unavailable as error:
                if error.facts.get("reason") != "disk_full":
                    raise
                try:
                    await self.drop_former(tenant, 0)
                except GatewayError:  # no kept site is left
                    raise error from None

    async def drop_former(self, tenant: str, least: int) -> None:
        """Remove the oldest kept site of a tenant. Raises `ExecFailed` if it keeps no more than `least`."""
        await self.script(tenant, _DROP, self.kept, str(least), seconds=_DROPS)

    async def _if_full(self, said: str) -> None:
        """Raise `Unavailable` if a failed command ran out of space, on the tenant's disk or in the pool.

        It may also have filled a file system in memory, such as /tmp, which is its own problem.
        """
        if quota_was_reached(said):
            raise Unavailable(DISK_FULL, reason="disk_full")
        if not disk_was_full(said):
            return
        pool = (await self._making.profile())["devices"]["root"]["pool"]
        with translated(""):
            driver = (await self._incus.get(f"/1.0/storage-pools/{pool}"))["driver"]
            space = (await self._incus.get(f"/1.0/storage-pools/{pool}/resources"))["space"]
        if driver not in _SHARED:
            raise Unavailable(DISK_FULL, reason="disk_full")
        if space["used"] > space["total"] * _EMPTY:
            raise Unavailable(POOL_FULL, reason="disk_full")
