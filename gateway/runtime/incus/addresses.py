"""Read an instance's address, and where its site answers, from its record in Incus."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.runtime.sites import Exposure

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
