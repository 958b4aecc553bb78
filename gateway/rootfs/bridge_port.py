"""Bind the MAC address of a container to its port of a bridge.

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
from pathlib import Path
from typing import Any, Final

from gateway.rootfs import netlink
from gateway.rootfs.guarded_port import hardware_address_of

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
