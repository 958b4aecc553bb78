"""Convert between an instance's record in Incus and a tenant, including the gateway's own keys.

`gateway.migration` writes them. They are read here because they affect routes: until the switch, the tenant's
domain leads to the old service.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final

import orjson

from gateway.hostnames import plain
from gateway.rootfs.instance_record import is_tenant
from gateway.runtime import Status, TenantInstance
from gateway.runtime.sites import ALLOWED, Exposure

Instance = Mapping[str, Any]


def fixed(instance: Instance) -> str | None:
    """Return an instance's configured address, which it has even while stopped."""
    for device in instance["expanded_devices"].values():
        if device.get("type") == "nic" and device.get("ipv4.address"):
            return str(device["ipv4.address"])
    return None


def leased(instance: Instance) -> str | None:
    """Return a running instance's current address."""
    for name, interface in ((instance.get("state") or {}).get("network") or {}).items():
        for address in () if name == "lo" else interface["addresses"]:
            if address["family"] == "inet" and address["scope"] == "global":
                return str(address["address"])
    return None


def address_of(instance: Instance) -> str | None:
    """Return an instance's address, or None."""
    return fixed(instance) or leased(instance)


def exposure(instance: Instance, port: int) -> Exposure | None:
    """Return where an instance's site answers, or None."""
    address = address_of(instance)
    return None if address is None else Exposure(address, port)


def sharers(instances: Sequence[Instance]) -> Mapping[str, Sequence[str]]:
    """Return the instances of each address, oldest first.

    Several share one after `incus copy`, which copies the address; Incus then starts none of them.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for instance in sorted(instances, key=lambda one: str(one.get("created_at"))):
        address = address_of(instance)
        if address is not None:
            found[address].append(instance["name"])
    return found


MIGRATION_STATE: Final = "user.gateway.migrate"
OLD: Final = "user.gateway.migrate.old"  # address of the old service, ADDRESS:PORT
FOLDER: Final = "user.gateway.migrate.from"
UNIT: Final = "user.gateway.migrate.unit"
FACTS: Final = "user.gateway.migrate.facts"  # about the old service, as JSON, without variables' values

DEVICE: Final = "migrate"
"""The instance's device that shows the folder as the workspace."""

BEFORE_SWITCH: Final = frozenset({"attaching", "attached", "copied", "returning"})

_PLACE: Final = re.compile(r"([0-9.]{7,15}):([1-9][0-9]{0,4})")


def old_service(config: Mapping[str, str]) -> Exposure | None:
    """Return where the old service answers while an instance's domain still leads to it, or None."""
    if config.get(MIGRATION_STATE) not in BEFORE_SWITCH:
        return None
    match = _PLACE.fullmatch(config.get(OLD, ""))
    if match is None or int(match[2]) > 65535:
        return None
    try:
        address = str(ipaddress.IPv4Address(match[1]))
    except ValueError:
        return None
    return Exposure(address, int(match[2]))


DOMAIN: Final = "user.gateway.domain"
_ALLOWED: Final = f"environment.{ALLOWED}"
PORT: Final = "user.gateway.port"
DEPLOYMENT: Final = "user.gateway.deployment"
ASLEEP: Final = "user.gateway.asleep"
IDLE_STOP: Final = "user.gateway.idle_stop"  # set by the operator; overrides the setting of that name
STANDBY: Final = "user.gateway.standby"  # likewise

_INTERFACES: Final = 64  # in the metrics of a tenant, which may create thousands

_STATUS: Final[Mapping[str, Status]] = {
    "Running": "running",
    "Ready": "running",
    "Stopped": "stopped",
    "Frozen": "frozen",
    "Freezing": "frozen",
    "Thawed": "running",
    "Starting": "starting",
    "Stopping": "stopping",
    "Aborting": "stopping",
}


def status_of(instance: Instance) -> Status:
    """Return an instance's status, also while it is being paused or resumed."""
    return _STATUS.get(instance["status"], "error")


def tenant_of(instance: Instance) -> TenantInstance:
    """Return an instance as a tenant."""
    config, devices = instance["expanded_config"], instance["expanded_devices"]
    port = config.get(PORT, "")
    return TenantInstance(
        name=instance["name"],
        status=status_of(instance),
        domain=plain(config.get(DOMAIN)) or config.get(DOMAIN) or None,
        address=address_of(instance),
        port=int(port) if port.isdigit() else None,
        created=instance.get("created_at"),
        instance=instance["config"].get("volatile.uuid"),
        location=None if instance.get("location") in (None, "", "none") else instance["location"],
        limits={
            "cpu": config.get("limits.cpu"),
            "memory": config.get("limits.memory"),
            "processes": config.get("limits.processes"),
            "disk": devices.get("root", {}).get("size"),
        },
        asleep=config.get(ASLEEP) == "true",
        deployment=config.get(DEPLOYMENT) or None,
        migration=config.get(MIGRATION_STATE) or None,
        idle_stop=_seconds(config.get(IDLE_STOP)),
        standby=_seconds(config.get(STANDBY)),
    )


def domain_config(domain: str | None) -> dict[str, str]:
    """Return the keys that set or, with None, remove an instance's domain.

    The init process gets the domain in its environment at its next start and the site's unit passes it on, so
    that golden copies can share the unit.
    """
    return {DOMAIN: domain or "", _ALLOWED: domain or ""}


def lacks_address(instance: Instance) -> bool:
    """Return whether an instance is a tenant whose address is only in its state."""
    return is_tenant(instance) and instance["status"] == "Running" and address_of(instance) is None


def disk_state(instance: Instance) -> str:
    """Return a hash that changes with an instance's disks, their id maps, or their content as a whole."""
    config, devices = instance["config"], instance["expanded_devices"]
    keys = ("uuid.generation", "idmap.current", "idmap.next", "last_state.idmap")
    disks = {name: device for name, device in devices.items() if device.get("type") == "disk"}
    facts = [[config.get(f"volatile.{key}") for key in keys], disks]
    return hashlib.sha256(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def metrics_of(instance: Instance, counted: int | None) -> Mapping[str, Any]:
    """Return the metrics of a tenant; `counted` is what its disk uses, None if only Incus counts that."""
    state = instance["state"]
    memory = state.get("memory") or {}
    disk = (state.get("disk") or {}).get("root") or {}
    network = {
        interface: {
            "received_bytes": facts["counters"]["bytes_received"],
            "sent_bytes": facts["counters"]["bytes_sent"],
        }
        for interface, facts in islice((state.get("network") or {}).items(), _INTERFACES)
        if interface != "lo"
    }
    return {
        "cpu_seconds": (state.get("cpu") or {}).get("usage", 0) / 1e9,
        "memory_bytes": memory.get("usage", 0),
        "memory_peak_bytes": memory.get("usage_peak", 0),
        "memory_limit_bytes": memory.get("total", 0),
        "processes": max(0, state.get("processes", 0)),
        "disk_bytes": disk.get("usage") if counted is None else counted,
        "disk_limit_bytes": disk.get("total"),
        "network": network,
    }


def _seconds(text: str | None) -> float | None:
    """Parse a number of seconds set by an operator; None if it is not valid."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return seconds if seconds >= 0 else None
