"""Name a tenant's port of the bridge, and its hardware address, after its address.

So one table says for all addresses of a network from where they may be used: `gateway.host.address_guard`
puts it in force. Incus's own filter has two chains for each tenant instead, which every packet goes through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

_NAME: Final = re.compile(r"gw([0-9a-f]{8})")
_OWN: Final = "0a:67:77"  # locally administered; three bytes of the address follow
_INCUS_FILTERS: Final = ("mac_filtering", "ipv4_filtering", "ipv6_filtering")


def port_name(address: IPv4Address) -> str:
    """Return the name of the host's interface of the tenant with an address."""
    return f"gw{int(address):08x}"


def hardware_address(address: IPv4Address) -> str:
    """Return the MAC address of the tenant with an address; unique among 16 million neighbours."""
    return f"{_OWN}:{address.packed[1:].hex(':')}"


def hardware_address_of(name: str) -> str | None:
    """Return the MAC address behind a port by its name, None for another interface."""
    found = _NAME.fullmatch(name)
    return None if found is None else hardware_address(IPv4Address(int(found[1], 16)))


def device(nic: Mapping[str, str], address: IPv4Address) -> dict[str, str]:
    """Return a tenant's NIC with a guarded port, without Incus's own filter."""
    own = {"host_name": port_name(address), "hwaddr": hardware_address(address)}
    return {**nic, **own, **{f"security.{name}": "false" for name in _INCUS_FILTERS}}


def unguarded(nic: Mapping[str, str]) -> dict[str, str]:
    """Return a NIC with Incus's own filter in place of a guarded port, if it has one."""
    if hardware_address_of(nic.get("host_name", "")) is None:
        return dict(nic)
    kept = {key: value for key, value in nic.items() if key not in ("host_name", "hwaddr")}
    return {**kept, **{f"security.{name}": "true" for name in _INCUS_FILTERS}}


def at_bridge(nic: Mapping[str, str], bridge: str) -> dict[str, str]:
    """Return a NIC of a managed bridge by the name of that: to Incus the same, but for how it is looked up.

    For a `network` it asks its database twice whenever it needs the type of the NIC. As one instance is
    renamed it needs that of all (`UpdateDNSMasqStatic`), twice: with 100 of them that makes a rename's 0.05 s
    of CPU 0.2 s.
    """
    if nic.get("network") != bridge:
        return dict(nic)
    kept = {key: value for key, value in nic.items() if key != "network"}
    return {**kept, "nictype": "bridged", "parent": bridge}


def hook(incus: Path, network: str) -> Path:
    """Return the program that LXC runs before it starts a tenant with a guarded port; setup writes it.

    It puts the table in force, whoever starts the tenant. `incus` is Incus's folder.
    """
    return incus / "gateway-guard" / network
