"""Limits of Incus containers: change them all at once or none, and keep those in force that are configured.

A limit must never be set below current use. A btrfs pool applies such a disk quota, reports an error, and
then refuses every other one, even a larger one (measured with Incus 6.0.4). A memory limit below current use
is refused by the kernel with cgroups v1; with v2 it kills processes until they fit. So both are checked
before anything is changed, and the refusal names the number. Page cache does not count, because the kernel
can reclaim it.

Incus applies a limit when it changes. So `Resizing.enforce` compares all with the kernel's
(`rootfs.memory`) and mends one that differs by a change to an equivalent spelling, and back.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from gateway.errors import Conflict, GatewayError, TenantNotRunning, Unavailable
from gateway.incus import Incus, IncusError
from gateway.incus.client import instance_path
from gateway.rootfs.instance_record import folder_of, identity_of, is_tenant
from gateway.rootfs.memory import limits_in_force, place, private
from gateway.rootfs.quotas import SLACK
from gateway.runtime import scripts
from gateway.runtime.incus.commands import IncusCommands
from gateway.runtime.incus.creation import WHOLE, Creation
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.records import Instance
from gateway.runtime.incus.service_unit import systemd_script
from gateway.runtime.sizes import SITE_SHARE, SIZES, MiB, size_of
from gateway.settings import Settings
from gateway.tasks import whole

log = logging.getLogger(__name__)

UPDATING: Final = "user.gateway.memory"
"""Set while an update has doubled the memory: the former limit (`-`: the profile's), and the double."""

APPLY: Final = ("/bin/sh", "-c", systemd_script("apply_limits"), "sh", f"{SITE_SHARE}%")
"""Makes a container's systemd recompute the site's shares of the new limits; run it as root."""

_SURE: Final = 2  # looks in a row that find the same
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")  # the kernel rounds a limit of memory down to it

Differing = Mapping[str, tuple[int, int | None]]
"""Limits that are not in force, by key: what is configured, and what the kernel has, None for no limit."""

_KEYS: Final = ("cpu", "memory", "processes")
# disk use of a container in bytes, including its image but no other file systems
_USED: Final = ("du", "--summarize", "--one-file-system", "--block-size=1", "/")
_LOOKING: Final = 120.0  # seconds to scan a whole disk
_PRINTED: Final = 64 << 10
_DISK_MARGIN: Final = 64 * MiB  # for writes between the scan and the change, and for metadata
_MEMORY_SHARE: Final = (SITE_SHARE - 5) / 100  # of a limit; a site above its share would be killed
_APPLYING: Final = 30.0
_TRIES: Final = 5
_SHOWN: Final = 500  # characters of output to log


class Resizing:
    """The sizes of one Incus project's instances. Does not check whether an instance is a tenant."""

    def __init__(self, settings: Settings, incus: Incus, making: Creation, commands: IncusCommands) -> None:
        self._settings, self._incus = settings, incus
        self._making, self._commands = making, commands
        self._pool = settings.incus_socket.parent / "storage-pools" / settings.pool
        self._grown: set[str] = set()  # by updates of this process that are under way
        self._looks: dict[str, tuple[Differing, int]] = {}  # that found it so, in a row

    async def resize(self, name: str, size: str) -> None:
        """Apply the limits of a size to an instance. Raises `Conflict` if it uses more than they allow."""
        path, limit = instance_path(name), self._settings.lifecycle_timeout
        profile = await self._making.profile()
        for attempt in range(_TRIES):
            with translated(name):
                found, tag = await self._incus.get_tagged(path)
            if UPDATING in found["config"]:
                raise Conflict(
                    "an update of this tenant is running; change the size when it has finished", retry_after=5
                )
            wanted = _sized(found, profile, SIZES[size])
            await self._fits(found, wanted, profile)
            try:
                await whole(self._incus.operate("PUT", path, wanted, timeout=limit, if_match=tag))
                await self._making.limited(name)
                break
            except IncusError as error:
                if error.status == 412 and attempt < _TRIES - 1:  # 412: changed by others meanwhile
                    continue
                await whole(self._take_back(found))
                if "cgroup item" in error.message:  # refused by cgroups v1
                    raise _in_use("memory", _memory(wanted, profile), None) from error
                with translated(name):
                    raise
        if found["status"] == "Running":
            await self._share_cpus(found, wanted, profile)
            await self._applied(name)

    async def _take_back(self, before: Mapping[str, Any]) -> None:
        """Undo the remains of a failed change; nearly always Incus has done so itself."""
        name, limit = before["name"], self._settings.lifecycle_timeout
        try:
            now, tag = await self._incus.get_tagged(instance_path(name))
            if _limits(now) != _limits(before):
                body = {key: now[key] for key in WHOLE}
                own = {key: value for key, value in now["config"].items() if not _is_limit(key)}
                limits = {key: value for key, value in before["config"].items() if _is_limit(key)}
                body |= {"config": own | limits, "devices": before["devices"]}
                await self._incus.operate("PUT", instance_path(name), body, timeout=limit, if_match=tag)
        except IncusError as error:
            log.error("the size of tenant %s was changed only in part: %s", name, error.message)

    async def _share_cpus(
        self, found: Mapping[str, Any], wanted: Mapping[str, Any], profile: Mapping[str, Any]
    ) -> None:
        """Make Incus distribute CPUs by the current limit.

        When a limit changes, Incus distributes by the previous one (measured with 6.0.4) until the next
        change of any instance.
        """
        name = found["name"]
        before, after = ({**profile["config"], **one["config"]}.get("limits.cpu") for one in (found, wanted))
        if before != after:
            try:
                await self._apply_again(name, ["cpu"])
            except GatewayError as error:
                log.warning("tenant %s gets its CPUs only with the next change: %s", name, error.message)

    # --- more memory for an update --------------------------------------------------------------------

    async def grow(self, name: str) -> None:
        """Double the memory of an instance that has a limit, for two sites side by side. Idempotent."""

        def doubled(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
            limit = found["expanded_config"].get("limits.memory", "")
            number, unit = limit.rstrip("KMGTiB"), limit.lstrip("0123456789")
            if UPDATING in found["config"] or not number.isdigit():
                return None
            twice = f"{int(number) * 2}{unit}"
            mark = f"{found['config'].get('limits.memory', '-')} {twice}"
            return {"config": {**found["config"], UPDATING: mark, "limits.memory": twice}}

        self._grown.add(name)
        await self._making.edit(name, doubled)

    async def shrink(self, name: str) -> None:
        """Restore the memory limit from before `grow`. Idempotent; `enforce` does so where it has failed."""

        def restored(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
            config = dict(found["config"])
            if (mark := config.pop(UPDATING, None)) is None:
                return None
            before, _, twice = mark.partition(" ")
            if config.get("limits.memory") == twice:  # otherwise someone has changed it
                del config["limits.memory"]
                config |= {} if before == "-" else {"limits.memory": before}
            return {"config": config}

        self._grown.discard(name)
        if UPDATING not in (await self._making.placed(name))["config"]:
            return
        try:
            await self._making.edit(name, restored)
        except (Conflict, Unavailable) as error:
            log.warning("tenant %s keeps the memory of an update for now: %s", name, error.message)
        else:
            await self._applied(name)  # its site was started with a share of twice as much

    # --- what is in force -----------------------------------------------------------------------------

    async def enforce(self) -> None:
        """Mend the limits of running instances that are not in force; call it every half minute.

        Only what differs at two looks in a row is mended: before, it may be just changing. Memory that an
        update has left doubled is taken back, too.
        """
        looks = dict[str, tuple[Differing, int]]()
        for instance in await self._making.instances():
            name = instance["name"]
            if not is_tenant(instance) or instance["status"] != "Running":
                continue
            if UPDATING in instance["config"] and name not in self._grown:
                await self.shrink(name)
                continue
            instance, init = await self._incus.started(name)
            instance = {**instance, "project": self._incus.project}
            found = await asyncio.to_thread(not_in_force, instance, init, self._pool) if init else {}
            if found:
                before, count = self._looks.get(name, (found, 0))
                looks[name] = found, count + 1 if before == found else 1
        self._looks = looks
        for name, (found, count) in looks.items():
            if count == _SURE:
                log.warning("tenant %s has %s: applying its limits again", name, words(found))
                try:
                    await self._apply_again(name, found)
                    await self._applied(name)
                except GatewayError as error:
                    log.error("the limits of tenant %s cannot be applied: %s", name, error.message)
            elif count == _SURE + 1:
                log.error("tenant %s still has %s: restart it", name, words(found))

    async def _apply_again(self, name: str, keys: Collection[str]) -> None:
        """Make Incus apply limits that it has: it applies what changes, so spell them otherwise and back."""
        names = [f"limits.{'memory' if key == 'swap' else key}" for key in keys if key != "disk"]
        own: dict[str, Any] = {}
        other: dict[str, str] = {}

        def respelled(found: Instance) -> Mapping[str, Any]:
            limits, devices = found["expanded_config"], found["devices"]
            own.update(found)
            other.update({key: f"0{limits[key]}" for key in names if limits.get(key, "")[:1].isdecimal()})
            if "disk" in keys:
                root = found["expanded_devices"]["root"]
                devices = {**devices, "root": {**root, "size": f"0{root['size']}"}}
            return {"config": {**found["config"], **other}, "devices": devices}

        def restored(found: Instance) -> Mapping[str, Any]:
            mine = {key for key, value in other.items() if found["config"].get(key) == value}
            config = {key: value for key, value in found["config"].items() if key not in mine}
            config |= {key: value for key, value in own["config"].items() if key in mine}
            devices = dict(found["devices"])
            if "disk" in keys and devices.pop("root")["size"].startswith("0"):
                devices |= {key: value for key, value in own["devices"].items() if key == "root"}
            return {"config": config, "devices": devices}

        await self._making.edit(name, respelled)
        await self._making.edit(name, restored)
        if "disk" in keys:
            await self._making.limited(name)

    # --- current use --------------------------------------------------------------------------------

    async def _fits(
        self, found: Mapping[str, Any], wanted: Mapping[str, Any], profile: Mapping[str, Any]
    ) -> None:
        """Raise `Conflict` if an instance uses more than its new limits allow."""
        name = found["name"]
        before, after = (_disk(found["devices"], profile), _disk(wanted["devices"], profile))
        if after and (not before or after < before):
            used = await self._making.limited(name)
            if used is None and found["status"] != "Running":
                raise TenantNotRunning(
                    f"tenant {name} is {found['status'].lower()}: its disk usage is known only while it is "
                    "running, and the new disk would be smaller; start it first"
                )
            used = await self._on_disk(name) if used is None else used
            if used + max(_DISK_MARGIN, used // 20) > after:
                raise _in_use("disk", after, used)
        has, gets = _memory(found, profile), _memory(wanted, profile)
        if gets and (not has or gets < has) and found["status"] != "Stopped":
            held = await self._in_memory(name)
            if held > gets * _MEMORY_SHARE:
                raise _in_use("memory", gets, held)

    async def _on_disk(self, name: str) -> int:
        """Return an instance's disk use in bytes; Incus's own count omits the image."""
        said = (await self._root(name, _USED, _LOOKING)).said  # an error, too, for a file that has just gone
        number = said.split()[-2:][:1]
        state = await self._state(name)
        own = int(((state.get("disk") or {}).get("root") or {}).get("usage") or 0)
        if not number or not number[0].isdecimal():
            raise Unavailable(f"cannot read the disk usage of tenant {name}; try again later")
        return max(int(number[0][:18]), own)

    async def _in_memory(self, name: str) -> int:
        """Return the memory of an instance that cannot be reclaimed, in bytes; if unknown, all its memory."""
        state = await self._state(name)
        held = await asyncio.to_thread(_private, int(state.get("pid") or 0))
        return int((state.get("memory") or {}).get("usage") or 0) if held is None else held

    async def _state(self, name: str) -> dict[str, Any]:
        with translated(name):
            return await self._incus.state(name)

    # --- in the container ---------------------------------------------------------------------------

    async def _applied(self, name: str) -> None:
        """Make the instance's systemd recompute its services' shares of the new limits."""
        try:
            ended = await self._root(name, APPLY, _APPLYING)
            why = ended.said.strip()[-_SHOWN:] if ended.code else ""
        except GatewayError as error:
            why = error.message
        if why:
            log.warning("the site of %s keeps its old limits until it restarts: %s", name, why)

    async def _root(self, name: str, argv: tuple[str, ...], seconds: float) -> scripts.ScriptResult:
        """Run a command as the container's root, and wait until it has ended."""
        try:
            return await scripts.run(self._commands.exec, name, argv, seconds=seconds, printed=_PRINTED)
        except TimeoutError:
            raise Unavailable(f"tenant {name} did not answer in time; try again later") from None


def not_in_force(instance: Mapping[str, Any], init: int, pool: Path) -> Differing:
    """Return the limits of a running instance that the kernel does not have: as configured, as found.

    `init` is its init process, `pool` where its pool is mounted, and `project` is added to Incus's record.
    """
    config, root = instance["expanded_config"], instance["expanded_devices"].get("root", {})
    found = limits_in_force(init, pool, folder_of(instance), identity_of(instance))
    memory, cpus = config.get("limits.memory", ""), config.get("limits.cpu", "")
    wanted = {"disk": size_of(root.get("size", "")), "processes": int(config.get("limits.processes") or 0)}
    if cpus.isdecimal():
        wanted["cpu"] = min(int(cpus), os.cpu_count() or 1)
    if size_of(memory) and config.get("limits.memory.enforce", "hard") == "hard":
        wanted["memory"] = size_of(memory)
        wanted["swap"] = size_of(config.get("limits.memory.swap", ""))  # true and false are 0 (Incus 6.0)
    differing = dict[str, tuple[int, int | None]]()
    for key, limit in wanted.items():
        slack = {"memory": _PAGE, "disk": SLACK + 1}.get(key, 1)
        if key in found and (limit or key == "swap"):
            has = found[key]
            if has is None or not 0 <= (limit - has if key == "memory" else has - limit) < slack:
                differing[key] = limit, has
    return differing


def words(found: Differing) -> str:
    """Return a line about limits that are not in force."""
    return ", ".join(
        f"{key} {'no limit' if has is None else has} instead of {limit}"
        for key, (limit, has) in found.items()
    )


def _private(pid: int) -> int | None:
    """Return a container's memory that cannot be reclaimed, in bytes, by its init pid; None if unknown."""
    found = place(pid)
    return None if found is None else private(found)


def _sized(found: Mapping[str, Any], profile: Mapping[str, Any], size: Mapping[str, str]) -> dict[str, Any]:
    """Return an instance's whole configuration with a size's limits; others come from the profile."""
    body = {key: found[key] for key in WHOLE}
    own = {key: value for key, value in found["config"].items() if not _is_limit(key)}
    body["config"] = own | {f"limits.{key}": size[key] for key in _KEYS if key in size}
    default = profile["devices"]["root"]
    devices = dict(found["devices"])
    root = {**devices.get("root", default), "size": size.get("disk", default.get("size", ""))}
    devices.pop("root", None)
    body["devices"] = devices if root == default else {**devices, "root": root}
    return body


def _is_limit(key: str) -> bool:
    return key.removeprefix("limits.") in _KEYS and key.startswith("limits.")


def _limits(instance: Mapping[str, Any]) -> tuple[dict[str, str], Any]:
    config = {key: value for key, value in instance["config"].items() if _is_limit(key)}
    return config, instance["devices"].get("root")


def _disk(devices: Mapping[str, Mapping[str, str]], profile: Mapping[str, Any]) -> int:
    return size_of(devices.get("root", profile["devices"]["root"]).get("size", ""))


def _memory(instance: Mapping[str, Any], profile: Mapping[str, Any]) -> int:
    """Return an instance's memory limit in bytes, 0 if it is not a number of bytes."""
    return size_of({**profile["config"], **instance["config"]}.get("limits.memory", ""))


def _in_use(what: str, limit: int, used: int | None) -> Conflict:
    """Return the error for a size smaller than current use."""
    advice = {
        "disk": "keep the size, or make room first",
        "memory": "keep the size, or stop what runs in it",
    }
    holds = "more" if used is None else f"{-(-used // MiB)} MiB"
    said = f"the tenant uses {holds} of {what}; a size with {limit // MiB} MiB is too small"
    return Conflict(f"{said}: {advice[what]}", reason="in_use", limit=limit, used=used, what=what)
