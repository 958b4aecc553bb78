"""What a tenant's root sends in the name of others, as far as the host lets it through."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.host.setup import guard_in_force, guard_table_name, pin
from gateway.rootfs import bridge_port
from gateway.runtime.incus import IncusRuntime
from gateway.settings import Settings
from tests.integration import environment
from tests.integration.conftest import Container, settle

# each frame ends with what it is called; the last one is honest, and tells that all others have been sent
SEND = """
import socket, struct, sys
interface, bridge, mac, other_mac, address, other, gateway, only = sys.argv[1:]
raw = lambda text: bytes.fromhex(text.replace(":", ""))
ip = socket.inet_aton
def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16: total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
def udp(sender, name):
    body = struct.pack("!HHHH", 9, 9, 8 + len(name), 0) + name
    def head(check):
        first = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, 17, check)
        return first + ip(sender) + ip(gateway)
    return head(checksum(head(0))) + body
def arp(hardware, sender, name):
    asks = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    return asks + raw(hardware) + ip(sender) + bytes(6) + ip(gateway) + name
IP, ARP = b"\\x08\\x00", b"\\x08\\x06"
group = "01:80:c2:00:00:0e"
frames = [
    (bridge, mac, IP, udp(other, b"~address~")),
    (bridge, other_mac, IP, udp(address, b"~hardware~")),
    (bridge, other_mac, IP, udp(other, b"~both~")),
    (bridge, mac, IP, udp("0.0.0.0", b"~nobody~")),
    (group, mac, IP, udp(other, b"~group~")),
    (group, other_mac, ARP, arp(other_mac, other, b"~grouparp~")),
    ("ff:ff:ff:ff:ff:ff", mac, ARP, arp(mac, other, b"~arp~")),
    ("ff:ff:ff:ff:ff:ff", mac, ARP, arp(other_mac, address, b"~arphardware~")),
    (bridge, mac, b"\\x81\\x00\\x00\\x05" + IP, udp(other, b"~vlan~")),
    (bridge, mac, b"\\x86\\xdd", bytes(60) + b"~ip6~"),
    (bridge, mac, b"\\x88\\xb5", bytes(60) + b"~odd~"),
    ("ff:ff:ff:ff:ff:ff", mac, ARP, arp(mac, address, b"~honestarp~")),
    (bridge, mac, IP, udp(address, b"~honest~")),
]
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
    out.bind((interface, 0))
    for to, sender, kind, body in frames:
        if only == "all" or to == group:
            out.send(raw(to) + raw(sender) + kind + body)
"""
ALL = 0x0003  # ETH_P_ALL


@pytest.fixture(scope="module")
async def pair(incus_settings: Settings) -> AsyncIterator[tuple[Container, Container]]:
    """Two tenants that the gateway made."""
    names = [f"t-guard-{os.getpid()}-{number}" for number in range(2)]
    async with IncusRuntime(incus_settings) as runtime:
        try:
            for name in names:
                await runtime.tenants.create(name)
            one, other = (Container(name) for name in names)
            await asyncio.gather(settle(one), settle(other))
            yield one, other
        finally:
            for name in names:
                with contextlib.suppress(Exception):
                    await runtime.tenants.destroy(name)


def hardware(tenant: Container) -> str:
    return tenant.sh("cat /sys/class/net/eth0/address").strip()


def send(one: Container, other: Container, bridge: str, which: str) -> None:
    """Have `one` send `all` frames, or those to the `group` of all bridges."""
    gateway = other.sh("ip -4 route show default").split()[2]
    mac = Path(f"/sys/class/net/{bridge}/address").read_text().strip()
    words = ("eth0", mac, hardware(one), hardware(other), one.address(), other.address(), gateway, which)
    one.run("python3", "-c", SEND, *words)


def heard(one: Container, other: Container, bridge: str) -> list[str]:
    """Have `one` send all frames; return the names of those that came through."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL)) as listening:
        listening.bind((bridge, 0))
        listening.settimeout(20)
        send(one, other, bridge, "all")
        names: list[str] = []
        while "honest" not in names:
            parts = listening.recv(2048).split(b"~")
            if len(parts) == 3:
                names.append(parts[1].decode())
    return names


def dropped(settings: Settings) -> int:
    """Return how many packets were dropped that came to the host past the bridge."""
    words = ("nft", "list", "chain", "inet", guard_table_name(settings), "ports")
    shown = subprocess.run(words, capture_output=True, check=True, text=True).stdout
    return int(shown.partition("counter packets ")[2].split()[0])


def test_only_the_own_address_passes(pair: tuple[Container, Container], incus_settings: Settings) -> None:
    assert guard_in_force(incus_settings), "this kernel cannot have the table"
    assert heard(*pair, incus_settings.network) == ["honestarp", "honest"]


def test_what_is_sent_to_all_bridges_is_dropped_too(
    pair: tuple[Container, Container], incus_settings: Settings
) -> None:
    """The host takes such frames in past the bridge, its table and its firewall; none is heard there."""
    before = dropped(incus_settings)
    send(*pair, incus_settings.network, "group")
    assert dropped(incus_settings) == before + 1  # the other one is of ARP, of which the host makes nothing


def test_no_chain_of_its_own(pair: tuple[Container, Container]) -> None:
    """Packets go through the same few rules however many tenants there are; Incus knows the port by name."""
    shown = (
        environment.incus("config", "get", pair[0].name, "volatile.eth0.host_name").stdout.decode().strip()
    )
    assert bridge_port.hardware_address_of(shown) == hardware(pair[0])
    rules = subprocess.run(("nft", "list", "tables", "bridge"), capture_output=True, check=True).stdout
    if b"table bridge incus\n" in rules:
        rules = subprocess.run(("nft", "list", "table", "bridge", "incus"), capture_output=True).stdout
        assert pair[0].name.encode() not in rules


def test_its_hardware_address_is_bound_to_its_port(
    pair: tuple[Container, Container], incus_settings: Settings
) -> None:
    pin(incus_settings)
    command = ["bridge", "-j", "fdb", "show", "br", incus_settings.network]
    entries = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    bound = {entry["mac"] for entry in entries if "sticky" in entry.get("flags", ())}
    assert {hardware(one) for one in pair} <= bound


async def test_a_tenant_that_incus_starts_has_it_put_in_force(
    pair: tuple[Container, Container], incus_settings: Settings
) -> None:
    """As after a reboot, before there is a gateway."""
    one, other = pair
    table = guard_table_name(incus_settings)
    await asyncio.to_thread(subprocess.run, ("nft", "delete", "table", "bridge", table), check=True)
    assert not guard_in_force(incus_settings)
    # what is sent does come here without the table
    assert {"address", "arp", "honest"} <= set(heard(one, other, incus_settings.network))
    await asyncio.to_thread(environment.incus, "stop", "--force", one.name)
    await asyncio.to_thread(environment.incus, "start", one.name)
    assert guard_in_force(incus_settings)
    await settle(one)
    assert heard(one, other, incus_settings.network) == ["honestarp", "honest"]
