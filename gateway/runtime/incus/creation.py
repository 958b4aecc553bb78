"""Creates instances, each with its own address, and removes those that failed, and no others.

The creator of an instance chooses its `volatile.uuid`. So it is known before it exists what an undo must
remove, and never by its name alone, which may be another's by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from gateway.errors import Conflict, GatewayError, NotFound, Timeout, Unavailable
from gateway.incus import Incus, IncusError
from gateway.incus.client import instance_path
from gateway.rootfs.locations import MANAGED
from gateway.runtime import Removal, Removed, unheard
from gateway.runtime.incus.addresses import Instance, fixed, leased
from gateway.runtime.incus.errors import translated
from gateway.settings import Settings
from gateway.tasks import whole

log = logging.getLogger(__name__)

IDENTITY: Final = "volatile.uuid"
MADE: Final = "user.gateway.made"
"""Holds the identity of the instance that we made: a copy of it that an operator makes has another."""

STATIC: Final = "raw.lxc"
"""Gives an instance its address before anything of it runs; no two may have the same."""

FIRST_TO_GO: Final = "lxc.proc.oom_score_adj = 300\n"
"""Has the kernel end a tenant's processes before the gateway's (100, deploy/*.service) and the host's.

In the key `raw.lxc` of the profile, and so in every `raw.lxc` that stands in its place. A tenant's root may
take it back to 0, not below.
"""

_STATIC: Final = FIRST_TO_GO + "lxc.net.0.ipv4.address = {address}\nlxc.net.0.ipv4.gateway = {gateway}\n"
_NIC: Final = "eth0"
_LEASES: Final = 5.0  # seconds for which those of DHCP are believed
_TRIES: Final = 20  # addresses that are tried until one is free
_STOPS: Final = 5  # stops of an instance that others start again, until it is left alone
WHOLE: Final = ("architecture", "config", "description", "ephemeral", "profiles")
_PAUSE: Final = 0.2  # Incus has no word for "when it is no longer busy"

Which = Callable[[Instance], bool]


def identity_of(instance: Instance) -> str:
    """Return what tells an instance from all others, those that had its name before it too."""
    return str(instance["config"].get(IDENTITY, ""))


def is_ours(instance: Instance) -> bool:
    """Say whether its marks are its own, and not copied with the rest of another's configuration."""
    identity = identity_of(instance)
    # one of an earlier version has no such note
    return bool(instance["config"].get(MADE, identity) == identity)


class Creation:
    """Makes and removes the instances of one Incus project. `removed` hears what was removed, and why."""

    def __init__(self, settings: Settings, incus: Incus, removed: Removed = unheard) -> None:
        self._settings = settings
        self._incus = incus
        self._removed = removed
        self._choosing = asyncio.Lock()
        self._promised: set[str] = set()  # addresses of instances that are being made
        self._leases: set[str] = set()
        self._lease_look = 0.0  # when they are asked for again

    # --- made ---------------------------------------------------------------------------------------

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
    ) -> None:
        """Create an instance with its own address. Raises `Conflict` if the name is taken.

        A cancel does not stop the creation half-way, so that the undo finds the instance.
        """
        identity = identity or str(uuid4())
        nic = devices.get(_NIC) or (await self.profile())["devices"][_NIC]
        for attempt in range(_TRIES):
            async with self._free_address() as address:
                body = {
                    "name": name,
                    "type": "container",
                    "source": source,
                    "profiles": profiles or [self._settings.profile],
                    "config": {**config, STATIC: self._static(address), MADE: identity, IDENTITY: identity},
                    "devices": {**devices, _NIC: {**nic, "ipv4.address": str(address.ip)}},
                    "start": start,
                }
                with translated(name):
                    try:
                        await self.operate("POST", "/1.0/instances", body)
                        return
                    except IncusError as error:
                        # another gateway took that address in between
                        if "IP address" not in error.message or attempt == _TRIES - 1:
                            raise
            # what is left of it would stand in the way of another try
            await self.remove(lambda one: identity_of(one) == identity, "its address was taken")

    @contextlib.asynccontextmanager
    async def undone(self, why: str) -> AsyncIterator[str]:
        """Give the identity for a new instance; where the body fails the instance of that one is removed."""
        identity = str(uuid4())
        try:
            yield identity
        except BaseException:
            try:
                await whole(self.remove(lambda one: identity_of(one) == identity, why))
            except GatewayError as error:
                log.error("an instance that came to nothing (%s) is still there: %s", identity, error.message)
            raise

    async def free(self, name: str) -> None:
        """Return if no instance has that name. Raises `Conflict`."""
        with contextlib.suppress(NotFound), translated(name):
            await self._incus.get(instance_path(name))
            raise Conflict(f"tenant {name} already exists; choose another name")

    # --- removed ------------------------------------------------------------------------------------

    async def remove(self, which: Which, why: str) -> None:
        """Destroy all instances for which that is true, in whatever state; return once there is none.

        Those that are still being made are waited for. What comes under one's name meanwhile stays.
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
                            log.info("%s cannot be removed yet: %s", instance["name"], error.message)
                            await asyncio.sleep(_PAUSE)
        except TimeoutError:
            raise Timeout("an instance could not be removed in time; the gateway's log says more") from None
        finally:
            still = {identity_of(one) for one in left}
            for identity, gone in asked.items():
                if identity not in still:
                    # what is kept ready is no tenant
                    tenant = gone["name"] if gone["config"].get(MANAGED) != "false" else None
                    await self._removed(Removal(tenant, gone["name"], identity, why))

    async def destroy(self, name: str, identity: str) -> None:
        """Destroy the instance that has that name and identity. Raises `NotFound` if there is none."""
        asked: dict[str, Instance] = {}
        there = await self.instance(name)
        if identity_of(there) == identity:
            await self._remove(there, lambda one: True, asked)
        if not asked:
            raise NotFound(f"no tenant {name}")

    async def _remove(self, instance: Instance, which: Which, asked: dict[str, Instance]) -> None:
        """Stop and delete an instance, unless it is another by now; `asked` gets it before it is deleted."""
        name, identity = instance["name"], identity_of(instance)
        for _ in range(_STOPS):
            # Incus knows names alone: a look right before each step
            now = await self.instance(name)
            if identity_of(now) != identity or not which(now):
                return
            if now["status"] == "Stopped":
                break
            body = {"action": "stop", "timeout": -1, "force": True}
            with translated(name):
                await self.operate("PUT", instance_path(name, "state"), body)
        else:
            raise Conflict(f"{name} is started again and again by another program")
        asked[identity] = now
        with translated(name):
            await self.operate("DELETE", instance_path(name))

    # --- addresses ----------------------------------------------------------------------------------

    async def anchor(self, name: str) -> None:
        """Give an instance without a fixed address one: that which it has now, or one that is free.

        Where its site is must be known while it sleeps, too.
        """
        now = await self.placed(name)
        nic = now["expanded_devices"].get(_NIC)
        if nic is None or nic.get("ipv4.address"):
            return
        bridge = IPv4Interface(self._settings.network_ipv4)
        has = leased(now)
        if has is None and now["status"] != "Stopped":
            return  # it may be just about to get one, which would not be the one chosen here
        async with contextlib.AsyncExitStack() as stack:
            if has is None or IPv4Address(has) not in bridge.network:
                address = await stack.enter_async_context(self._free_address())
            else:
                address = IPv4Interface(f"{has}/{bridge.network.prefixlen}")
            change = {
                "config": {STATIC: self._static(address)},
                "devices": {_NIC: {**nic, "ipv4.address": str(address.ip)}},
            }
            with translated(name):
                await self.operate("PATCH", instance_path(name), change)

    def _static(self, address: IPv4Interface) -> str:
        # it has its address from the first moment, and not only when it has asked for it
        gateway = IPv4Interface(self._settings.network_ipv4).ip
        return _STATIC.format(address=address, gateway=gateway)

    @contextlib.asynccontextmanager
    async def _free_address(self) -> AsyncIterator[IPv4Interface]:
        """Choose a free address, and reserve it here until its instance is made."""
        settings = self._settings
        bridge = IPv4Interface(settings.network_ipv4)
        async with self._choosing:
            # of these the instances may be made after all are listed, and before the choice
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
            # for seconds this host takes an address that was another's for that one's: not at once again
            known = await asyncio.to_thread(_neighbours)
            if len(taken | known) < count:
                taken |= known
            if len(taken) >= count:
                raise Unavailable(
                    f"every address of {settings.network_ipv4} is taken; choose a larger "
                    "GATEWAY_NETWORK_IPV4",
                    reason="quota",
                )
            address = str(bridge.ip)
            while address in taken:
                # at random: of two gateways that ask at the same time each gets another
                address = str(IPv4Address(first + random.randrange(count)))  # noqa: S311 - no secret
            self._promised.add(address)
        try:
            yield IPv4Interface(f"{address}/{bridge.network.prefixlen}")
        finally:
            self._promised.discard(address)

    async def _leased(self) -> set[str]:
        """Return the addresses that DHCP has given away, as incusd told them some seconds ago at most.

        It looks through all instances for them. One that is given away since shows among the neighbours.
        """
        now = time.monotonic()
        if now >= self._lease_look:
            with translated(""):
                leases = await self._incus.get(f"/1.0/networks/{self._settings.network}/leases")
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
        """Return an instance with its `state` only where that alone tells its address."""
        with translated(name):
            return await self._incus.instance(name, state=lambda one: fixed(one) is None)

    async def devices(self, size: Mapping[str, str]) -> Mapping[str, Mapping[str, str]]:
        """Return the devices in which an instance of a size differs from the tenants' profile."""
        if "disk" not in size:
            return {}
        return {"root": {**(await self.profile())["devices"]["root"], "size": size["disk"]}}

    async def profile(self) -> dict[str, Any]:
        """Return the tenants' profile."""
        with translated(""):
            return await self._incus.profile(self._settings.profile)

    async def operate(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        """Do an operation, and see its end also where this is cancelled: nothing happens after an undo."""
        await whole(self._incus.operate(method, path, body, timeout=self._settings.lifecycle_timeout))

    async def remove_device(self, name: str, device: str) -> None:
        """Take a device of its own from an instance, and change nothing else of it. Idempotent."""
        path, limit = instance_path(name), self._settings.lifecycle_timeout
        for attempt in range(_TRIES):
            with translated(name):
                found, tag = await self._incus.get_tagged(path)
                if device not in found["devices"]:
                    return
                # Incus takes a device away only with the whole of an instance's configuration
                kept = {key: found[key] for key in WHOLE}
                kept["devices"] = {key: value for key, value in found["devices"].items() if key != device}
                try:
                    await whole(self._incus.operate("PUT", path, kept, timeout=limit, if_match=tag))
                    return
                except IncusError as error:
                    if error.status != 412 or attempt == _TRIES - 1:  # others changed it meanwhile
                        raise


def _neighbours() -> set[str]:
    """Return the addresses that this host's kernel believes to know."""
    with contextlib.suppress(OSError):
        return {line.split()[0] for line in Path("/proc/net/arp").read_text().splitlines()[1:]}
    return set()
