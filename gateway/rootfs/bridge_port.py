"""A tenant's port of the bridge: its name, its MAC address, and that no neighbour can take this address.

A guarded port and its MAC address are named after the tenant's address. So one table says for all addresses
of a network from where they may be used: `gateway.host.address_guard` puts it in force. Incus's own filter
has two chains for each tenant instead, which every packet goes through.

A bridge learns the port of an address before any filter drops the forged frame, so a tenant using its
neighbour's address could divert the neighbour's traffic to itself. So learning is disabled on its port, which
gets one permanent address. Each start of a container creates a new port.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

from gateway.rootfs import netlink

_INTERFACES: Final = Path("/sys/class/net")
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,14}")
_ADDRESS: Final = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_KEY: Final = re.compile(r"volatile\.(.+)\.host_name")

# linux/rtnetlink.h, linux/neighbour.h
_ROUTE, _NEW_NEIGHBOUR = 0, 28
_NEIGHBOUR: Final = struct.Struct("=BxxxiHBB")
_STATIC: Final = 0x40  # NUD_NOARP: neither resolved nor expired
_OF_THE_BRIDGE, _STICKY = 0x04, 0x40  # the second keeps the address at its port, even if seen at another
_LINK_ADDRESS: Final = 2


@dataclass(frozen=True, slots=True)
class Port:
    """A bridge port, and the MAC address of the container behind it."""

    name: str
    address: str

    def bind(self) -> bool:
        """Bind the address to the port; return False if it already was. Needs root. Raises `OSError`."""
        learning = _INTERFACES / self.name / "brport/learning"
        try:
            if learning.read_text().strip() == "0":  # the last step is already done
                return False
            index = socket.if_nametoindex(self.name)
            address = bytes.fromhex(self.address.replace(":", ""))
            flags = _OF_THE_BRIDGE | _STICKY
            wanted = _NEIGHBOUR.pack(socket.AF_BRIDGE, index, _STATIC, flags, 0)
            wanted += netlink.ATTRIBUTE.pack(4 + len(address), _LINK_ADDRESS) + address + bytes(2)
            how = netlink.REQUEST | netlink.ACK | netlink.CREATE | netlink.REPLACE
            for _ in netlink.asked(_ROUTE, _NEW_NEIGHBOUR, how, wanted):
                pass
            learning.write_text("0")
        except OSError:
            if learning.exists():
                raise
            return False  # its container has just stopped
        return True


def ports(config: Mapping[str, Any], bridge: str) -> Iterator[Port]:
    """Yield the current ports of a running instance with that configuration at a bridge."""
    for key, name in config.items():
        if (device := _KEY.fullmatch(key)) is None or not _NAME.fullmatch(name):
            continue
        address = hardware_address_of(name) or str(config.get(f"volatile.{device[1]}.hwaddr"))
        try:
            of = (_INTERFACES / name / "brport/bridge").readlink().name
        except OSError:  # not running, or not a bridge port
            continue
        if of == bridge and _ADDRESS.fullmatch(address):
            yield Port(name, address)


_GUARDED: Final = re.compile(r"gw([0-9a-f]{8})")
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
    found = _GUARDED.fullmatch(name)
    return None if found is None else hardware_address(IPv4Address(int(found[1], 16)))


def guarded(nic: Mapping[str, str], address: IPv4Address) -> dict[str, str]:
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


def guard_hook(incus: Path, network: str) -> Path:
    """Return the program that LXC runs before it starts a tenant with a guarded port; setup writes it.

    It puts the table in force, whoever starts the tenant. `incus` is Incus's folder.
    """
    return incus / "gateway-guard" / network
