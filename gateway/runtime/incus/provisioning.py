"""Provision a site inside its container: files, install command, service, and the exchange of two sites.

A copy belongs to one owner and one content, so no owner gets another's. It is removed with the last tenant of
that content, after a long time without use, or when there are too many or too large copies; then the least
recently used goes first. The facts about a copy are stored with it in Incus.

They are in a folder of the container's root, on the workspace's disk. The tenant controls its contents. It is
read through Incus's file API, for which the container need not run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway.errors import Conflict, ExecFailed, GatewayError, NotFound, Unavailable
from gateway.incus import Incus
from gateway.rootfs.instance_record import identity_of
from gateway.rootfs.paths import show
from gateway.runtime import ExecSpec, scripts
from gateway.runtime.incus import service_unit
from gateway.runtime.incus.commands import IncusCommands
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.errors import DISK_FULL, POOL_FULL, translated
from gateway.runtime.incus.records import exposure
from gateway.runtime.incus.service_unit import script, systemd_script
from gateway.runtime.probe import network_up
from gateway.runtime.sites import (
    ALLOWED,
    FORMER_ID,
    Exchange,
    Former,
    Recipe,
    Say,
    Side,
    disk_was_full,
    failure,
    lines,
    quota_was_reached,
)
from gateway.settings import Settings

CONTENT: Final = "user.gateway.content"
"""The key of the upload from which a golden copy or a tenant was made."""

UPLOADER: Final = "user.gateway.uploader"
USED: Final = "user.gateway.used"
BYTES: Final = "user.gateway.bytes"
BASE: Final = "user.gateway.base"
"""The base of a copy: the image and the gateway's way of making copies."""


@dataclass(frozen=True, slots=True)
class UploadedSite:
    """A golden copy of an upload; `used` is in seconds since the epoch."""

    name: str
    identity: str
    content: str
    owner: str
    base: str
    used: float
    bytes: int


def upload_of(instance: Mapping[str, Any], used: Mapping[str, float]) -> UploadedSite | None:
    """Return an instance as an upload's copy, None for a template's. `used` has more recent uses by name."""
    config, name = instance["config"], instance["name"]
    if not config.get(UPLOADER):
        return None
    return UploadedSite(
        name=name,
        identity=identity_of(instance),
        content=config.get(CONTENT, ""),
        owner=config[UPLOADER],
        base=config.get(BASE, ""),
        used=max(number(config.get(USED)), used.get(name, 0.0)),
        bytes=number(config.get(BYTES)),
    )


def surplus(
    copies: Collection[UploadedSite],
    settings: Settings,
    *,
    held: Collection[str],
    base: str,
    now: float,
    coming: str | None = None,
) -> list[UploadedSite]:
    """Return the copies to remove. `held` are the contents of existing tenants.

    With `coming`, room is made for one more copy of that owner.
    """
    kept = list[UploadedSite]()
    for copy in sorted(copies, key=lambda one: one.used, reverse=True):
        fresh = now - copy.used <= settings.upload_copies_unused and copy.base == base
        if fresh and copy.content in held:
            kept.append(copy)
    for owner in {copy.owner for copy in kept}:
        theirs = [copy for copy in kept if copy.owner == owner]
        count = settings.owner_upload_copies - (owner == coming)
        over = _over(theirs, count, settings.owner_upload_copies_bytes)
        kept = [copy for copy in kept if copy not in over]
    count = settings.upload_copies - (coming is not None)
    over = _over(kept, count, settings.upload_copies_bytes)
    stays = {copy.identity for copy in kept} - {copy.identity for copy in over}
    return [copy for copy in copies if copy.identity not in stays]


def freeing(copies: Collection[UploadedSite], wanted: int) -> list[UploadedSite]:
    """Return the least recently used copies whose removal frees `wanted` bytes."""
    gone, freed = list[UploadedSite](), 0
    for copy in sorted(copies, key=lambda one: one.used):
        if freed >= wanted:
            break
        gone.append(copy)
        freed += copy.bytes
    return gone


def _over(newest_first: Sequence[UploadedSite], count: int, room: int) -> list[UploadedSite]:
    """Return the copies exceeding `count` or `room` bytes: the oldest, and any too large by itself."""
    over, held = [copy for copy in newest_first if copy.bytes > room], 0
    fitting = [copy for copy in newest_first if copy.bytes <= room]
    for index, copy in enumerate(fitting):
        held += copy.bytes
        if index >= count or held > room:
            return over + fitting[index:]
    return over


def number(said: str | None) -> int:
    """Parse a non-negative number, 0 if it is not one."""
    return int(said) if said and said.isdecimal() and len(said) < 20 else 0


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


log = logging.getLogger(__name__)

_TAKE: Final = script("take_former")
_COPY: Final = script("copy_former")
_PUT: Final = script("put_former")
_NONE: Final = 3  # exit code of take_former.sh if no such site is kept
_LIST_MAX: Final = 64 << 10  # most bytes of each file
_UNIT_MAX: Final = 512 << 10
_ENVIRONMENT_MAX: Final = 288 << 10  # what `check_env` of deployments accepts, escaped: 30 ms at the worst
_SINCE: Final = re.compile(r"[0-9]{1,12}")


class IncusFormerSites:
    def __init__(self, settings: Settings, incus: Incus, provisioning: Provisioning) -> None:
        self._incus, self._provisioning = incus, provisioning
        self._kept, self._uid = provisioning.kept, str(settings.workspace_uid)

    async def listed(self, tenant: str) -> Sequence[Former]:
        text = await self._read(tenant, f"{self._kept}/list", _LIST_MAX)
        found = []
        for line in (text or b"").decode("utf-8", "replace").splitlines():
            identity, _, since = line.partition(" ")
            if FORMER_ID.fullmatch(identity) and _SINCE.fullmatch(since):
                found.append(Former(identity, float(since)))
        return found[::-1]

    async def live(self, tenant: str) -> tuple[str | None, Recipe | None]:
        said = (await self._read(tenant, f"{self._kept}/live", _LIST_MAX) or b"").decode("utf-8", "replace")
        unit = await self._read(tenant, service_unit.unit_path("live"), _UNIT_MAX)
        identity = said if FORMER_ID.fullmatch(said) else None
        return identity, None if unit is None else service_unit.recipe_of(unit)

    async def recipe(self, tenant: str, former: str) -> Recipe:
        unit = await self._read(tenant, f"{self._kept}/{former}/site.service", _UNIT_MAX)
        recipe = None if unit is None else service_unit.recipe_of(unit)
        if recipe is None:
            raise _gone(tenant, former)
        return recipe

    async def environment(self, tenant: str) -> Mapping[str, str]:
        path = service_unit.environment_path("live")
        text = await self._read(tenant, path, _ENVIRONMENT_MAX)
        try:
            return service_unit.environment_of((text or b"").decode())
        except ValueError:
            raise Conflict(
                f"{path} of tenant {tenant} was edited by hand and cannot be parsed; write it as "
                'NAME="value", one per line, or deploy the site with `env`, which rewrites it'
            ) from None

    async def take(self, tenant: str, former: str) -> None:
        try:
            words = (self._provisioning.places[1], self._kept, former)
            await self._provisioning.script(tenant, _TAKE, *words)
        except ExecFailed as error:
            if error.facts.get("exit_code") == _NONE:
                raise _gone(tenant, former) from None
            raise

    async def copy(self, tenant: str) -> None:
        live, following, _ = self._provisioning.places
        await self._provisioning.script(tenant, _COPY, live, following, self._uid)

    async def put(self, tenant: str, former: str, live: str, most: int) -> None:
        words = (*self._provisioning.places, self._kept, former, live, str(most), self._uid)

        async def kept() -> None:
            await self._provisioning.script(tenant, _PUT, *words)

        await self._provisioning.with_room(tenant, kept)  # it may have to be copied

    async def spare(self, tenant: str) -> bool:
        try:
            await self._provisioning.drop_former(tenant, 1)
        except (GatewayError, TimeoutError, OSError):  # no more are kept, or it cannot be asked
            return False
        log.info("the oldest site that %s kept was removed, since its disk is full", tenant)
        return True

    async def _read(self, tenant: str, path: str, most: int) -> bytes | None:
        with translated(tenant):
            return await self._incus.get_file(tenant, path, most)


def _gone(tenant: str, former: str) -> NotFound:
    return NotFound(f"tenant {tenant} no longer keeps deployment {former}", reason="not_kept")
