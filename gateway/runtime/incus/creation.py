"""Create instances, each with its own address, and remove failed ones, and only those.

The creator chooses an instance's `volatile.uuid`. So even before the instance exists it is known what an undo
has to remove; the name alone would not do, as it may belong to another instance by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import uuid4

from gateway.errors import Conflict, GatewayError, NotFound, Timeout, Unavailable
from gateway.incus import Incus, IncusError
from gateway.incus.client import instance_path
from gateway.rootfs import bridge_port
from gateway.rootfs.instance_record import IDENTITY, MANAGED, identity_of
from gateway.runtime import Removal, Removed, unheard
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.records import Instance, fixed, leased
from gateway.settings import Settings
from gateway.tasks import whole

log = logging.getLogger(__name__)

MADE: Final = "user.gateway.made"
"""The instance's identity when the gateway created it; a copy made by an operator has another one."""

STATIC: Final = "raw.lxc"
"""Sets an instance's address before anything in it runs; it must be unique."""

FIRST_TO_GO: Final = "lxc.proc.oom_score_adj = 300\n"
"""Makes the kernel kill a tenant's processes before the gateway's (100, deploy/*.service) and the host's.

It is in the profile's `raw.lxc`, and therefore in every `raw.lxc` that overrides it. A tenant's root can
lower it to 0, but not below.
"""

_STATIC: Final = FIRST_TO_GO + "lxc.net.0.ipv4.address = {address}\nlxc.net.0.ipv4.gateway = {gateway}\n"
_NIC: Final = "eth0"
_LEASES: Final = 5.0  # seconds for which DHCP leases are cached
_TRIES: Final = 20  # addresses to try
_STOPS: Final = 5  # attempts to stop an instance that another program keeps starting
WHOLE: Final = ("architecture", "config", "description", "ephemeral", "profiles")
_PAUSE: Final = 0.2  # seconds; Incus cannot tell when an instance is no longer busy

Which = Callable[[Instance], bool]


class Limited(Protocol):
    """Limits an instance's disk, or counts a standby copy's: `DiskLimits.limit`."""

    def __call__(self, instance: str, /, *, standby: bool = False) -> Awaitable[int | None]: ...


async def by_incus(instance: str, *, standby: bool = False) -> int | None:
    """A `Limited` for disks that Incus itself counts and limits."""
    return None


def is_ours(instance: Instance) -> bool:
    """Return whether an instance's marks are its own, not copied from another's configuration."""
    identity = identity_of(instance)
    # instances of an earlier version lack the key
    return bool(instance["config"].get(MADE, identity) == identity)


class Creation:
    """Creates and removes the instances of one Incus project. `removed` is told of each removal.

    `limited` limits an instance's disk, see `DiskLimits.limit`.
    """

    def __init__(
        self,
        settings: Settings,
        incus: Incus,
        removed: Removed = unheard,
        limited: Limited = by_incus,
    ) -> None:
        self._settings = settings
        self._incus = incus
        self._removed = removed
        self.limited = limited
        self._choosing = asyncio.Lock()
        self._promised: set[str] = set()  # addresses of instances being created
        self._leases: set[str] = set()
        self._lease_look = 0.0  # when to fetch them again

    # --- creating -----------------------------------------------------------------------------------

    async def make(
        self,
        name: str,
        source: Mapping[str, Any],
        config: Mapping[str, str],
        devices: Mapping[str, Mapping[str, str]],
        *,
        start: bool,
        identity: str = "",
        profiles: Sequence[str] = (),
        architecture: str = "",
        patience: float | None = None,
    ) -> None:
        """Create an instance with its own address. Raises `Conflict` if the name is taken.

        A copy from another member needs its `architecture`, and for a large disk `patience`, in seconds.
        A cancel does not interrupt the creation, so that the undo finds the instance.
        """
        identity = identity or str(uuid4())
        nic = devices.get(_NIC) or (await self.profile())["devices"][_NIC]
        for attempt in range(_TRIES):
            async with self._free_address() as address:
                own, static = self._placed(nic, address)
                body = {
                    "name": name,
                    "type": "container",
                    "source": source,
                    "profiles": profiles or [self._settings.profile],
                    "config": {**config, STATIC: static, MADE: identity, IDENTITY: identity},
                    "devices": {**devices, _NIC: own},
                    **({"architecture": architecture} if architecture else {}),
                }
                with translated(name):
                    try:
                        await self.operate("POST", "/1.0/instances", body, patience)
                        await self.limited(name)
                        if start:
                            if identity_of(await self.instance(name)) != identity:
                                raise Conflict(f"another instance has the name {name} now")
                            await self.begin(name)
                        return
                    except IncusError as error:
                        # another gateway took the address in the meantime
                        if "IP address" not in error.message or attempt == _TRIES - 1:
                            raise
            # the remains would make the next attempt fail
            await self.remove(lambda one: identity_of(one) == identity, "its address was taken")

    async def begin(self, name: str) -> None:
        """Start an instance whose disk is limited."""
        await self.operate("PUT", instance_path(name, "state"), {"action": "start", "timeout": -1})

    @contextlib.asynccontextmanager
    async def undone(self, why: str) -> AsyncIterator[str]:
        """Yield an identity for a new instance; if the body fails, the instance with it is removed."""
        identity = str(uuid4())
        try:
            yield identity
        except BaseException:
            try:
                await whole(self.remove(lambda one: identity_of(one) == identity, why))
            except GatewayError as error:
                log.error("cannot remove the failed instance %s: %s", identity, error.message)
            raise

    async def free(self, name: str) -> None:
        """Raise `Conflict` if an instance has that name."""
        with contextlib.suppress(NotFound), translated(name):
            if await self._incus.member():
                # of all members: a dead one's instance is listed, but cannot be asked
                if name not in await self._incus.names():
                    return
            else:
                await self._incus.get(instance_path(name))
            raise Conflict(f"tenant {name} already exists; choose another name")

    # --- removing -----------------------------------------------------------------------------------

    async def remove(self, which: Which, why: str) -> None:
        """Destroy all instances for which `which` is true, in any state; return once there are none.

        Instances still being created are waited for. A new instance that takes a name meanwhile is kept.
        """
        asked: dict[str, Instance] = {}
        left: Sequence[Instance] = []
        try:
            async with asyncio.timeout(self._settings.lifecycle_timeout):
                while left := [one for one in await self.instances() if which(one)]:
                    for instance in left:
                        try:
                            await self._remove(instance, which, asked)
                        except NotFound:
                            continue
                        except (Conflict, Unavailable) as error:
                            log.info("cannot remove %s yet: %s", instance["name"], error.message)
                            await asyncio.sleep(_PAUSE)
        except TimeoutError:
            raise Timeout("cannot remove an instance in time; see the gateway's log") from None
        finally:
            still = {identity_of(one) for one in left}
            for identity, gone in asked.items():
                if identity not in still:
                    # prepared instances are not tenants
                    tenant = gone["name"] if gone["config"].get(MANAGED) != "false" else None
                    await self._removed(Removal(tenant, gone["name"], identity, why))

    async def destroy(self, name: str, identity: str) -> None:
        """Destroy the instance with this name and identity. Raises `NotFound` if there is none."""
        asked: dict[str, Instance] = {}
        there = await self.instance(name)
        if identity_of(there) == identity:
            await self._remove(there, lambda one: True, asked)
        if not asked:
            raise NotFound(f"no tenant {name}")

    async def _remove(self, instance: Instance, which: Which, asked: dict[str, Instance]) -> None:
        """Stop and delete an instance unless its name is another's by now; record it in `asked` first."""
        name, identity = instance["name"], identity_of(instance)
        for _ in range(_STOPS):
            # Incus addresses instances by name only, so check right before each step
            now = await self.instance(name)
            if identity_of(now) != identity or not which(now):
                return
            if now["status"] == "Stopped":
                break
            body = {"action": "stop", "timeout": -1, "force": True}
            try:
                with translated(name):
                    await self.operate("PUT", instance_path(name, "state"), body)
            except Unavailable:
                # Incus stops it, and then cannot tidy a full disk
                if (await self.instance(name))["status"] != "Stopped":
                    raise
        else:
            raise Conflict(f"another program keeps starting {name}")
        asked[identity] = now
        with contextlib.suppress(GatewayError):  # it needs some room to remove subvolumes from a full disk
            await self.limited(name)
        with translated(name):
            await self.operate("DELETE", instance_path(name))

    # --- addresses ----------------------------------------------------------------------------------

    async def anchor(self, name: str) -> None:
        """Fix an instance's address: its current one, or else a free one.

        The location of its site must be known even while it sleeps.
        """
        now = await self.placed(name)
        nic = now["expanded_devices"].get(_NIC)
        if nic is None or nic.get("ipv4.address"):
            return
        bridge = IPv4Interface(self._settings.network_ipv4)
        has = leased(now)
        if has is None and now["status"] != "Stopped":
            return  # it may be about to get one other than the one chosen here
        async with contextlib.AsyncExitStack() as stack:
            if has is None or IPv4Address(has) not in bridge.network:
                address = await stack.enter_async_context(self._free_address())
            else:
                address = IPv4Interface(f"{has}/{bridge.network.prefixlen}")
            change = {
                "config": {STATIC: self._static(address)},
                "devices": {_NIC: {**bridge_port.unguarded(nic), "ipv4.address": str(address.ip)}},
            }
            with translated(name):
                await self.operate("PATCH", instance_path(name), change)

    def _placed(self, nic: Mapping[str, str], address: IPv4Interface) -> tuple[Mapping[str, str], str]:
        """Return the NIC and the `raw.lxc` of a new instance with an address."""
        nic = bridge_port.at_bridge(bridge_port.unguarded(nic), self._settings.network)
        own = {**nic, "ipv4.address": str(address.ip)}
        static = self._static(address)
        hook = bridge_port.guard_hook(self._settings.incus_socket.parent, self._settings.network)
        if not hook.exists():  # this host cannot have the table for all
            return own, static
        return bridge_port.guarded(own, address.ip), f"{static}lxc.hook.pre-start = {hook}\n"

    def _static(self, address: IPv4Interface) -> str:
        # it has its address from the start, not only after DHCP
        gateway = IPv4Interface(self._settings.network_ipv4).ip
        return _STATIC.format(address=address, gateway=gateway)

    @contextlib.asynccontextmanager
    async def _free_address(self) -> AsyncIterator[IPv4Interface]:
        """Choose a free address and reserve it until its instance is created."""
        settings = self._settings
        bridge = IPv4Interface(settings.network_ipv4)
        async with self._choosing:
            # read first: their instances may be created between the listing and the choice
            taken = {str(bridge.ip), *self._promised}
            instances = await self.instances()
            taken |= await self._leased()
            for instance in instances:
                taken |= {
                    device["ipv4.address"]
                    for device in instance["devices"].values()
                    if "ipv4.address" in device
                }
            first, count = int(bridge.network.network_address) + 1, bridge.network.num_addresses - 2
            # this host maps a reused address to its former owner for some seconds, so avoid recent ones
            known = await asyncio.to_thread(_neighbours)
            if len(taken | known) < count:
                taken |= known
            if len(taken) >= count:
                raise Unavailable(
                    f"all addresses of {settings.network_ipv4} are taken; choose a larger "
                    "GATEWAY_NETWORK_IPV4",
                    reason="quota",
                )
            address = str(bridge.ip)
            while address in taken:
                # at random, so that two gateways choosing at the same time get different ones
                address = str(IPv4Address(first + random.randrange(count)))  # noqa: S311 - no secret
            self._promised.add(address)
        try:
            yield IPv4Interface(f"{address}/{bridge.network.prefixlen}")
        finally:
            self._promised.discard(address)

    async def _leased(self) -> set[str]:
        """Return the addresses leased by DHCP, at most some seconds old.

        incusd goes through all instances to list them. A newer lease shows up among the neighbours.
        """
        now = time.monotonic()
        if now >= self._lease_look:
            with translated(""):
                leases = await self._incus.own(f"/1.0/networks/{self._settings.network}/leases")
            self._leases, self._lease_look = {str(lease["address"]) for lease in leases}, now + _LEASES
        return self._leases

    # --- Incus --------------------------------------------------------------------------------------

    async def instances(self) -> Sequence[Instance]:
        with translated(""):
            return await self._incus.instances()

    async def instance(self, name: str) -> Instance:
        """Return an instance without its `state`."""
        with translated(name):
            return await self._incus.instance(name, state=lambda one: False)

    async def placed(self, name: str) -> Instance:
        """Return an instance, with its `state` only if that is needed for its address."""
        with translated(name):
            return await self._incus.instance(name, state=lambda one: fixed(one) is None, as_listed=True)

    async def devices(self, size: Mapping[str, str]) -> Mapping[str, Mapping[str, str]]:
        """Return the devices of an instance of a size that differ from the tenants' profile."""
        if "disk" not in size:
            return {}
        return {"root": {**(await self.profile())["devices"]["root"], "size": size["disk"]}}

    async def profile(self) -> dict[str, Any]:
        """Return the tenants' profile."""
        with translated(""):
            return await self._incus.profile(self._settings.profile)

    async def operate(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        patience: float | None = None,
    ) -> None:
        """Run an operation to its end even if cancelled, so that nothing happens after an undo."""
        timeout = self._settings.lifecycle_timeout if patience is None else patience
        await whole(self._incus.operate(method, path, body, timeout=timeout))

    async def remove_device(self, name: str, device: str) -> None:
        """Remove a device from an instance's own configuration and change nothing else. Idempotent."""

        def without(found: Instance) -> Mapping[str, Any] | None:
            kept = {key: value for key, value in found["devices"].items() if key != device}
            return {"devices": kept} if device in found["devices"] else None

        await self.edit(name, without)

    async def edit(self, name: str, change: Callable[[Instance], Mapping[str, Any] | None]) -> None:
        """Change an instance's own configuration by a PUT of all of it.

        Only so does Incus remove a device, and apply the profile's limit in place of one that is removed.
        `change` gets the instance and returns what becomes of some of its parts, or None to leave it; it is
        called again if others change the instance meanwhile.
        """
        path, limit = instance_path(name), self._settings.lifecycle_timeout
        for attempt in range(_TRIES):
            with translated(name):
                found, tag = await self._incus.get_tagged(path)
                if (changed := change(found)) is None:
                    return
                body = {**{key: found[key] for key in (*WHOLE, "devices")}, **changed}
                try:
                    await whole(self._incus.operate("PUT", path, body, timeout=limit, if_match=tag))
                    return
                except IncusError as error:
                    if error.status != 412 or attempt == _TRIES - 1:  # 412: changed by others meanwhile
                        raise


def _neighbours() -> set[str]:
    """Return the addresses in this host's neighbour table."""
    with contextlib.suppress(OSError):
        return {line.split()[0] for line in Path("/proc/net/arp").read_text().splitlines()[1:]}
    return set()
