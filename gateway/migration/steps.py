"""The steps of a migration, each with its way back. Where it stands is in the instance's keys alone.

| state | the domain leads to | the workspace is |
|---|---|---|
| attaching, attached | the old service | the folder of the host, by a disk device |
| copied | the old service | the same; the copy lies beside it |
| switching | who comes waits | as before, then the copy |
| switched | the tenant | the tenant's own |
| returning | the old service | the tenant's own, then the folder again |

A run that was killed is gone on with by the next: a switch that was not finished is taken back first.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.caddy import Caddy, asleep
from gateway.deployments.verify import Subject, Verifier
from gateway.errors import Conflict, GatewayError, InvalidParams, NotFound
from gateway.host import HostError, Report
from gateway.host.front import Front
from gateway.hostnames import DomainReserved, normalized, own_names, plain, reserved, tenant_name
from gateway.incus.client import instance_path
from gateway.migration import service
from gateway.migration.door import Owner, close_door, open_door
from gateway.migration.door import inside as mapped
from gateway.migration.inside import inside
from gateway.migration.plan import Plan, Wanted, decided
from gateway.migration.route import drained, led, own_block
from gateway.migration.scan import scan
from gateway.migration.service import Old, Units
from gateway.rootfs.tenants import MANAGED
from gateway.runtime.incus import IncusRuntime, IncusSites
from gateway.runtime.incus.migrations import FACTS, FOLDER, OLD, STATE, UNIT
from gateway.runtime.incus.refusals import translated
from gateway.runtime.incus.sites import HEALTH, environment_file
from gateway.runtime.incus.stock import ROLE
from gateway.runtime.incus.tenants import ASLEEP, DOMAIN, IDLE_STOP, PORT
from gateway.runtime.probe import answer
from gateway.runtime.sites import SIZES, Exposure, Recipe
from gateway.settings import Settings
from gateway.tasks import whole

STEPS: Final = ("attach", "copy", "switch", "finish")
_DEVICE: Final = "migrate"
_DONE: Final[Mapping[str, int]] = {"attached": 1, "copied": 2, "switched": 3}
_SCRIPT: Final = 60.0  # seconds of a script that copies nothing
_LEAVE: Final = ("/proc", "/sys", "/dev", "/run", "/tmp")  # noqa: S108 - what no site lies in, here or inside


class Migration:
    """The migrations of one host's sites into one gateway's tenants."""

    def __init__(
        self,
        settings: Settings,
        runtime: IncusRuntime,
        sites: IncusSites,
        caddy: Caddy,
        units: Units,
        say: Report,
    ) -> None:
        self._settings, self._runtime, self._sites, self._caddy = settings, runtime, sites, caddy
        self._units, self._say = units, say
        self._verifier = Verifier(sites, caddy, settings)
        folder, _, name = settings.workspace.rpartition("/")
        self._next, self._kept = f"{folder}/.{name}-next", f"{folder}/.{name}-kept"

    # --- what the operator asks ---------------------------------------------------------------------

    async def plan(self, domain: str, wanted: Wanted) -> Plan:
        """Look at a folder and its service; change nothing."""
        domain, tenant = self._names(domain)
        folder = await asyncio.to_thread(_real, wanted.folder)
        owner = folder.stat()
        old = await asyncio.to_thread(self._old, folder, wanted.unit, wanted.port, wanted.env)
        found = await asyncio.to_thread(scan, folder, frozenset(wanted.leave))
        with translated(""):
            pool = await self._runtime.incus.get(f"/1.0/storage-pools/{self._settings.pool}")
        asked = Wanted(**{**{name: getattr(wanted, name) for name in Wanted.__slots__}, "folder": folder})
        return decided(
            *(tenant, domain, asked, old, found, Owner(owner.st_uid, owner.st_gid), self._settings),
            own_block=await asyncio.to_thread(self._own_block, domain),
            driver=str(pool["driver"]),
        )

    async def forward(self, domain: str, wanted: Wanted | None, until: str) -> str:
        """Go on to a step, from wherever the migration stands; return its state, "" once it is finished."""
        domain, tenant = self._names(domain)
        found = await self._found(tenant)
        if found is None or not found["config"].get(STATE):
            if wanted is None:
                raise NotFound(f"no migration of {domain} is under way; say --from FOLDER to begin one")
            await self._begin(await self._beginnable(domain, tenant, wanted, found))
        at = await self._settled(tenant)
        for number, step in enumerate(STEPS[: STEPS.index(until) + 1], 1):
            if _DONE.get(at, 0) < number:
                began = time.monotonic()
                await getattr(self, f"_{step}")(tenant)
                self._say(f"{step}: done after {time.monotonic() - began:.1f} s")
                at = {number: state for state, number in _DONE.items()}.get(number, "")
        return at

    async def back(self, domain: str, *, sure: bool) -> str:
        """Undo the last step; return the state, "" where nothing of the migration is left.

        Raises `Conflict` where something would be lost that nothing else has, unless `sure`.
        """
        domain, tenant = self._names(domain)
        state = (await self._config(tenant)).get(STATE, "")
        match state:
            case "attaching" | "attached":
                await self._forget(domain, tenant, sure)
                return ""
            case "copied":
                await self._sites.clear(tenant)
                await self._patch(tenant, {STATE: "attached"})
            case _:
                await self._return(tenant)
        return (await self._config(tenant)).get(STATE, "")

    async def state(self, domain: str) -> Mapping[str, str]:
        """Return what is known of a migration that is under way. Raises `NotFound`."""
        config = await self._config(self._names(domain)[1])
        return {name: config.get(key, "") for name, key in (("state", STATE), ("from", FOLDER), ("old", OLD))}

    # --- attach -------------------------------------------------------------------------------------

    async def _beginnable(
        self, domain: str, tenant: str, wanted: Wanted, found: Mapping[str, Any] | None
    ) -> Plan:
        if found is not None:
            raise Conflict(f"tenant {tenant} exists already; a site moves into a new one")
        for other in await self._runtime.list():
            if plain(other.domain) == domain:
                raise Conflict(f"{domain} is tenant {other.name}'s; take it from that one first")
        plan = await self.plan(domain, wanted)
        if plan.stops:
            raise Conflict("this folder cannot be moved yet: " + "; ".join(plan.stops))
        return plan

    async def _begin(self, plan: Plan) -> None:
        """Make the tenant, stopped; from now on Incus knows of the migration, and its domain leads to the "
        "old."""
        wanted, old, size = plan.wanted, plan.old, SIZES[plan.wanted.size]
        facts = {
            "start": plan.recipe.start,
            "install": plan.recipe.install,
            "owner": [plan.owner.uid, plan.owner.gid],
            "read_only": plan.read_only,
            "leave": wanted.leave,
            "env": wanted.env,
            "pids": [] if wanted.unit else old.pids,
        }
        config = {
            MANAGED: "true",
            ROLE: "tenant",
            DOMAIN: plan.domain,
            PORT: str(old.port),
            HEALTH: wanted.health,
            IDLE_STOP: "0",
            STATE: "attaching",
            OLD: f"{old.address}:{old.port}",
            FOLDER: str(wanted.folder),
            UNIT: wanted.unit or "",
            FACTS: orjson.dumps(facts).decode(),
        }
        config |= {f"limits.{name}": size[name] for name in ("cpu", "memory") if name in size}
        devices = {}
        if "disk" in size:
            root = (await self._runtime.making.profile())["devices"]["root"]
            devices["root"] = {**root, "size": size["disk"]}
        source = {"type": "image", "alias": self._settings.image}
        async with self._runtime.making.undone("the migration could not begin") as identity:
            await self._runtime.making.make(
                plan.tenant, source, config, devices, start=False, identity=identity
            )

    async def _attach(self, tenant: str) -> None:
        config = await self._config(tenant)
        await self._show_folder(tenant)
        workspace = self._settings.workspace
        folder = config[FOLDER]
        if not folder.startswith(tuple(f"{place}/" for place in _LEAVE)):
            await self._inside(tenant, "link", workspace, folder)
        await led(self._caddy, config[DOMAIN], config[OLD])
        await self._patch(tenant, {STATE: "attached"})

    async def _show_folder(self, tenant: str) -> None:
        """Have the folder as the tenant's workspace, and the tenant run. Incus takes such a disk only "
        "cold."""
        instance = await self._runtime.making.instance(tenant)
        config, facts = instance["config"], _facts(instance["config"])
        there = _DEVICE in instance["devices"]
        if not there:
            await self._runtime.stop(tenant)
            instance = await self._runtime.making.instance(tenant)
        ours = mapped(instance["config"], self._settings.workspace_uid)
        owner, read_only = Owner(*facts["owner"]), bool(facts["read_only"])
        where = await asyncio.to_thread(
            open_door, tenant, Path(config[FOLDER]), owner, ours, read_only=read_only
        )
        if not there:
            device = {"type": "disk", "path": self._settings.workspace, "source": str(where)}
            device |= {"readonly": "true"} if read_only else {}
            with translated(tenant):
                await self._runtime.making.operate(
                    "PATCH", instance_path(tenant), {"devices": {_DEVICE: device}}
                )
        await self._runtime.start(tenant)

    async def _forget(self, domain: str, tenant: str, sure: bool) -> None:
        instance = await self._runtime.making.instance(tenant)
        if not sure and not await asyncio.to_thread(self._own_block, domain) and self._caddy.get(domain):
            raise Conflict(
                "visitors may come to the old service by the gateway's route, which goes with the tenant: "
                "first "
                f"have your Caddy serve {domain} itself (reverse_proxy {instance['config'].get(OLD)}), then "
                "say --yes"
            )
        if not sure and instance["status"] == "Running":
            kept = await self._inside(tenant, "kept", self._kept)
            if kept:
                raise Conflict(
                    "the tenant has what was written since a switch, which the folder does not have: "
                    f"{kept}; copy "
                    "it out (incus file pull), then say --yes"
                )
        await self._runtime.making.destroy(tenant, instance["config"].get("volatile.uuid", ""))
        await asyncio.to_thread(close_door, tenant)

    # --- copy ---------------------------------------------------------------------------------------

    async def _copy(self, tenant: str) -> None:
        """Copy the folder, and see the copy's site answer beside the old one, which nobody notices."""
        config = await self._config(tenant)
        recipe = _recipe(config)
        await self._mirror(tenant, config)
        old = await asyncio.to_thread(
            self._old, Path(config[FOLDER]), config.get(UNIT) or None, recipe.port, _facts(config)["env"]
        )
        variables = environment_file(old.environment).encode()
        await self._inside(tenant, "keep", given=variables)
        if recipe.install:
            await self._sites.install(tenant, "next", recipe, lambda line: self._say(f"  {line}"))
        try:
            await self._sites.start(tenant, "next", recipe)
            address = (await self._runtime.get(tenant)).address or ""
            there = Exposure(address, recipe.port, f"{address}:{recipe.port}")
            await self._verifier.answering(Subject(tenant, "next", config[DOMAIN], recipe, there))
        finally:
            await self._inside(tenant, "rest")
        await self._patch(tenant, {STATE: "copied"})

    async def _mirror(self, tenant: str, config: Mapping[str, str]) -> None:
        facts = _facts(config)
        left = [f"--exclude=/{_literal(path)}" for path in facts["leave"]]
        if facts["install"]:  # made anew inside
            left.append("--exclude=node_modules/")
        uid = str(self._settings.workspace_uid)
        await self._inside(
            tenant, "mirror", self._settings.workspace, self._next, uid, *left,
            seconds=self._settings.install_timeout,
        )  # fmt: skip

    # --- switch -------------------------------------------------------------------------------------

    async def _switch(self, tenant: str) -> None:
        config = await self._config(tenant)
        domain, recipe = config[DOMAIN], _recipe(config)
        await led(self._caddy, domain, config[OLD])
        if await asyncio.to_thread(self._own_block, domain):
            raise Conflict(
                f"Caddy has a block of its own for {domain}, which goes before the gateway's routes; remove "
                "it and "
                "reload Caddy: visitors then come to the old service by the gateway's route. Then run this "
                "again"
            )
        await self._mirror(tenant, config)  # what has changed since; the last pass has little left to do
        exposure = await self._sites.expose(tenant, "live", recipe)
        await self._patch(tenant, {STATE: "switching", ASLEEP: "true"})
        began = time.monotonic()
        try:
            await self._exchange(tenant, config, recipe, exposure)
            await self._verifier.answering(Subject(tenant, "live", domain, recipe, exposure))
        except BaseException as error:
            self._say("the switch is taken back: the old service is started again")
            with contextlib.suppress(GatewayError):
                await whole(self._return(tenant))
            if isinstance(error, TimeoutError):
                raise HostError("the last pass of the copy took too long; the old service runs on") from error
            raise
        await self._patch(tenant, {STATE: "switched", ASLEEP: ""})
        await led(self._caddy, domain, exposure.target)
        self._say(f"  visitors waited {time.monotonic() - began:.2f} s at most; none was refused")
        await self._switched(tenant, config)

    async def _exchange(
        self, tenant: str, config: Mapping[str, str], recipe: Recipe, exposure: Exposure
    ) -> None:
        """Stop the old service and start the copy, while who comes waits in Caddy for the gateway's word."""
        await led(self._caddy, config[DOMAIN], asleep(exposure.target))
        address, _, port = config[OLD].partition(":")
        if not await drained(address, int(port)):
            self._say(
                "  some visitors of the old service still had no answer, or a websocket, and were cut off"
            )
        began = time.monotonic()
        await asyncio.to_thread(self._rest, config)
        await self._mirror(tenant, config)
        await self._runtime.making.remove_device(tenant, _DEVICE)
        await self._inside(tenant, "settle", self._settings.workspace, self._next)
        await self._sites.start(tenant, "live", recipe)
        self._say(
            f"  the old service rested, and the copy was made even, in {time.monotonic() - began:.2f} s"
        )

    async def _switched(self, tenant: str, config: Mapping[str, str]) -> None:
        """Do what is left once the domain leads to the tenant. Idempotent."""
        if not config.get(UNIT):
            service.signalled(_facts(config)["pids"], signal.SIGCONT)
        await asyncio.to_thread(close_door, tenant)
        await self._sites.clear(tenant)

    async def _return(self, tenant: str) -> None:
        """Have the old service serve again, and the folder be the workspace; what the tenant wrote stays."""
        config = await self._config(tenant)
        await asyncio.to_thread(self._rise, config)
        address, _, port = config[OLD].partition(":")
        try:
            await answer(address, int(port), config.get(HEALTH) or "/", self._settings.verify_timeout)
        except TimeoutError:
            if config[STATE] == "switched":
                raise HostError(
                    "the old service does not answer; the tenant goes on serving. Mend the old one, then say "
                    "--back"
                ) from None
        await self._patch(tenant, {STATE: "returning", ASLEEP: ""})
        await led(self._caddy, config[DOMAIN], config[OLD])
        if _DEVICE not in (await self._runtime.making.instance(tenant))["devices"]:
            await self._runtime.start(tenant)
            uid = str(self._settings.workspace_uid)
            places = (self._settings.workspace, self._next, self._kept, uid)
            kept = await self._inside(tenant, "unsettle", *places)
            if kept:
                self._say(f"  what the tenant had since the switch is kept in it as {kept}")
        await self._show_folder(tenant)
        await self._patch(tenant, {STATE: "attached"})

    # --- finish -------------------------------------------------------------------------------------

    async def _finish(self, tenant: str) -> None:
        config = await self._config(tenant)
        recipe, unit = _recipe(config), config.get(UNIT)
        exposure = await self._sites.expose(tenant, "live", recipe)
        await self._verifier.seen(Subject(tenant, "live", config[DOMAIN], recipe, exposure))
        await self._switched(tenant, config)
        if unit:
            await asyncio.to_thread(self._units.enable, unit, False)
        await self._patch(tenant, dict.fromkeys((STATE, OLD, FOLDER, UNIT, FACTS, IDLE_STOP), ""))
        self._say(f"  {config[FOLDER]} is as the old service left it, and yours to keep or remove")

    # --- the old service ----------------------------------------------------------------------------

    def _old(self, folder: Path, unit: str | None, port: int | None, names: tuple[str, ...]) -> Old:
        if unit is None:
            return service.of_folder(folder, port, names)
        return service.of_unit(self._units.unit(unit), unit, port)

    def _rest(self, config: Mapping[str, str]) -> None:
        if unit := config.get(UNIT):
            self._units.stop(unit)
        else:
            service.signalled(_facts(config)["pids"], signal.SIGSTOP)

    def _rise(self, config: Mapping[str, str]) -> None:
        if unit := config.get(UNIT):
            self._units.start(unit)
        else:
            service.signalled(_facts(config)["pids"], signal.SIGCONT)

    # --- what all need ------------------------------------------------------------------------------

    async def _settled(self, tenant: str) -> str:
        """Return where a migration stands once what a killed run left half done is taken back."""
        state = (await self._config(tenant)).get(STATE, "")
        if state in ("switching", "returning"):
            self._say("an earlier run was ended in the middle; it is taken back first")
            await self._return(tenant)
        elif state in ("attached", "copied"):
            await self._show_folder(tenant)  # the host may have been started anew
        elif state == "switched":
            await self._switched(tenant, await self._config(tenant))
        return (await self._config(tenant)).get(STATE, "")

    def _names(self, domain: str) -> tuple[str, str]:
        domain = normalized(domain)
        if reserved(domain, own_names(self._settings)):
            raise DomainReserved(domain)
        return domain, tenant_name(domain)

    async def _found(self, tenant: str) -> Mapping[str, Any] | None:
        with contextlib.suppress(NotFound):
            return await self._runtime.making.instance(tenant)
        return None

    async def _config(self, tenant: str) -> Mapping[str, str]:
        found = await self._found(tenant)
        if found is None or not found["config"].get(STATE):
            raise NotFound(f"no migration into {tenant} is under way")
        config: Mapping[str, str] = found["config"]
        return config

    async def _patch(self, tenant: str, config: Mapping[str, str]) -> None:
        with translated(tenant):
            await self._runtime.making.operate("PATCH", instance_path(tenant), {"config": config})

    async def _inside(
        self, tenant: str, script: str, *words: str, given: bytes = b"", seconds: float = _SCRIPT
    ) -> str:
        return await inside(self._runtime, tenant, script, *words, given=given, seconds=seconds)

    def _own_block(self, domain: str) -> bool:
        return own_block(Front(self._settings).running(), domain, str(self._caddy.routes))


def _facts(config: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(config.get(FACTS) or "{}")
    return found


def _recipe(config: Mapping[str, str]) -> Recipe:
    facts, health = _facts(config), config.get(HEALTH) or "/"
    return Recipe(b"", tuple(facts["start"]), int(config[PORT]), health, tuple(facts["install"]), alone=True)


def _real(folder: Path) -> Path:
    """Return a folder by its real path. Raises `InvalidParams` where it is none that could be moved."""
    try:
        real = folder.resolve(strict=True)
    except OSError as error:
        raise InvalidParams(f"{folder} cannot be opened: {error.strerror}", field="from") from error
    if not real.is_dir() or len(real.parts) < 3 or str(real).startswith(("/proc/", "/sys/", "/dev/")):
        raise InvalidParams(f"{folder} is no folder of a site", field="from")
    return real


def _literal(path: str) -> str:
    """Return a path as rsync takes it for nothing but itself."""
    return "".join(f"\\{letter}" if letter in "*?[\\" else letter for letter in path)
