"""Prepare Incus for tenants, idempotently: project, bridge, firewall, pool, profile.

Each step compares the actual state with the wanted one and changes only the difference: a second run changes
nothing, and manual alterations are reverted. Keys that are not ours stay.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

from gateway.host import Change, HostError, Report, Steps, cluster, quotas
from gateway.host.address_guard import guard
from gateway.host.caddy_service import hand_over
from gateway.host.definition import BRIDGE, CA_BUNDLE, TRUST
from gateway.host.incus import Incus
from gateway.host.limits import raise_limits
from gateway.rootfs import bridge_port
from gateway.rootfs.instance_record import MANAGED
from gateway.runtime.incus.creation import FIRST_TO_GO
from gateway.settings import Settings
from gateway.storage.state_dir import close

GiB = 1 << 30

# Networks tenants must not reach: the host's surroundings and other tenants. RFC 1918, RFC 6598 (carriers),
# RFC 3927 (cloud metadata), RFC 1122 (this network, loopback), RFC 2544 (benchmarks), multicast, reserved.
PRIVATE = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)


def acl_name(settings: Settings) -> str:
    """Return the name of the network ACL, which is also that of the tenants' profile."""
    return settings.profile


def setup(settings: Settings, report: Report) -> list[Change]:
    """Set up everything a tenant needs except its image; return the outcome of each step.

    The daemon must be running. For the local runtime nothing is needed or done. Raises `HostError`, which
    names the failed step; earlier steps stay done, and the next run continues from there.
    """
    steps = Steps(report)
    if settings.broker_socket is not None and os.geteuid() == 0:
        steps.run("state dir", lambda: close(settings), unchanged="closed to other users")
        steps.run("folders of Caddy's routes", lambda: hand_over(settings))
    if settings.runtime == "local":
        steps.run("host", lambda: None, unchanged="the local runtime needs no setup")
        return steps.changes
    steps.run("inotify limits", raise_limits, unchanged="high enough, or cannot be raised here")
    root = Incus(settings.incus_socket)
    steps.run(f"project {settings.incus_project}", lambda: _project(root, settings))
    incus = Incus(settings.incus_socket, settings.incus_project)
    if cluster.members(root):
        steps.run("addresses of this member", lambda: cluster.publish(settings, root, host_addresses()))
    steps.run(f"firewall {acl_name(settings)}", lambda: _acl(incus, settings, host_addresses()))
    steps.run(f"bridge {settings.network}", lambda: _network(incus, settings))
    steps.run(f"forwarding of {settings.network}", lambda: forwarding(settings))
    steps.run(f"storage pool {settings.pool}", lambda: _pool(incus, settings))
    if os.geteuid() == 0:
        steps.run("disk quotas", lambda: quotas.enforce(settings), unchanged="in force")
        steps.run(f"addresses of {settings.network}", lambda: guard(settings), unchanged="each tenant's own")
    steps.run(f"profile {settings.profile}", lambda: _profile(incus, settings))
    steps.run(f"ports of {settings.network}", lambda: pin(settings))
    return steps.changes


def _project(incus: Incus, settings: Settings) -> str | None:
    if incus.find("projects", settings.incus_project) is not None:
        return None
    features = {f"features.{name}": "true" for name in ("images", "profiles", "storage.volumes")}
    incus.post("projects", json={"name": settings.incus_project, "config": features})
    return "created"


def host_addresses() -> list[IPv4Address]:
    """Return the IPv4 addresses of this host that `PRIVATE` does not cover."""
    said = subprocess.run(["ip", "-json", "-4", "address"], check=False, capture_output=True, text=True)
    if said.returncode != 0:
        raise HostError(f"cannot list the host's addresses: {said.stderr.strip()}; is iproute2 installed?")
    found = {
        IPv4Address(address["local"])
        for link in json.loads(said.stdout or "[]")
        for address in link.get("addr_info", [])
        if address.get("family") == "inet"
    }
    return sorted(address for address in found if not any(address in network for network in PRIVATE))


def acl(settings: Settings, addresses: list[IPv4Address]) -> dict[str, Any]:
    """Return the network ACL: no access to the host, private networks and other tenants, but to all else.

    Incus puts drop before allow, whatever the order here. DHCP, DNS and ping to the bridge itself are always
    allowed. Ingress is for the gateway and Caddy, which reach tenants from the bridge's address.
    """
    bridge = IPv4Interface(settings.network_ipv4)
    closed = [str(network) for network in PRIVATE]
    if not any(bridge.network.subnet_of(network) for network in PRIVATE):
        closed.append(str(bridge.network))
    closed += [f"{address}/32" for address in addresses]
    return {
        "name": acl_name(settings),
        "description": "Tenants of incus-gateway: internet access, but none to the host",
        "egress": [
            {"action": "drop", "state": "enabled", "destination": ",".join(closed)},
            {"action": "allow", "state": "enabled", "destination": "0.0.0.0/0"},
        ],
        "ingress": [{"action": "allow", "state": "enabled", "source": f"{bridge.ip}/32"}],
        "config": {},
    }


def _acl(incus: Incus, settings: Settings, addresses: list[IPv4Address]) -> str | None:
    wanted = acl(settings, cluster.all_addresses(incus, addresses))
    found = incus.find("network-acls", wanted["name"])
    if found is None:
        incus.post("network-acls", json=wanted)
        return "created"
    if _rules(found) == _rules(wanted):
        return None
    incus.put("network-acls", wanted["name"], json={**wanted, "config": found.get("config") or {}})
    return "rules corrected"


def _rules(acl: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return rules in a comparable form: sorted and without empty fields, since Incus alters both."""
    return {
        way: sorted(
            ({key: value for key, value in rule.items() if value} for rule in acl.get(way) or ()),
            key=lambda rule: json.dumps(rule, sort_keys=True),
        )
        for way in ("egress", "ingress")
    }


def network(settings: Settings) -> dict[str, str]:
    """Return the configuration of the tenants' bridge."""
    return {
        "ipv4.address": settings.network_ipv4,
        "ipv4.nat": "true",
        "ipv4.dhcp": "true",
        "ipv6.address": "none",
        # Tenants must not resolve each other's names,
        "dns.mode": "none",
        # nor names they choose in DHCP requests.
        "raw.dnsmasq": "dhcp-ignore-names",
        "security.acls": acl_name(settings),
        "security.acls.default.egress.action": "reject",
        "security.acls.default.ingress.action": "reject",
    }


def _network(incus: Incus, settings: Settings) -> str | None:
    wanted = network(settings)
    found = incus.find("networks", settings.network)
    if found is not None and found.get("managed") and cluster.is_pending(found):
        found = None
    if found is None or not found.get("managed"):
        if found is not None:
            raise HostError(
                f"an interface {settings.network} exists that Incus does not manage; set GATEWAY_NETWORK to "
                f"another name, or remove it with `ip link delete {settings.network}` if it is not needed"
            )
        taken = _overlapping(IPv4Interface(settings.network_ipv4).network)
        if taken:
            raise HostError(
                f"{settings.network_ipv4} overlaps {taken}, which this host already uses; "
                "set GATEWAY_NETWORK_IPV4 to a free private network"
            )
        cluster.create(incus, "networks", {"name": settings.network, "type": "bridge", "config": wanted})
        return f"created, {settings.network_ipv4}"
    return _amend(incus, ("networks", settings.network), found, wanted)


def _overlapping(wanted: IPv4Network) -> str | None:
    said = subprocess.run(["ip", "-json", "-4", "address"], check=False, capture_output=True, text=True)
    for link in json.loads(said.stdout or "[]"):
        for address in link.get("addr_info", []):
            used = IPv4Interface(f"{address['local']}/{address['prefixlen']}").network
            if used.overlaps(wanted):
                return f"{used} on {link['ifname']}"
    return None


def _amend(
    incus: Incus, path: tuple[str, ...], found: Mapping[str, Any], wanted: Mapping[str, str]
) -> str | None:
    wrong = {key: value for key, value in wanted.items() if found["config"].get(key) != value}
    if not wrong:
        return None
    incus.patch(*path, json={"config": wrong})
    return f"corrected: {', '.join(sorted(wrong))}"


def forwarding(settings: Settings) -> str | None:
    """Allow the bridge's traffic if Docker has set the forwarding policy to DROP.

    Docker evaluates the chain DOCKER-USER, which it leaves to the operator, before its own rules. Returns
    what was done, or None.
    """
    if shutil.which("iptables") is None:
        return None
    listed = subprocess.run(
        ["iptables", "-w", "-S", "DOCKER-USER"], check=False, capture_output=True, text=True
    )
    if listed.returncode != 0:
        return None
    added = []
    for way in ("-i", "-o"):
        rule = ["DOCKER-USER", way, settings.network, "-j", "ACCEPT"]
        if subprocess.run(["iptables", "-w", "-C", *rule], check=False, capture_output=True).returncode != 0:
            done = subprocess.run(
                ["iptables", "-w", "-I", *rule], check=False, capture_output=True, text=True
            )
            if done.returncode != 0:
                raise HostError(
                    f"cannot allow {settings.network} in Docker's firewall: {done.stderr.strip()}"
                )
            added.append(way)
    return "allowed in Docker's firewall" if added else None


def pool_size(free: int) -> int:
    """Return the size of the pool's sparse file for a disk with `free` bytes: half, 5 GiB to 200 GiB."""
    if free < 5 * GiB:
        raise HostError(
            f"only {free / GiB:.1f} GiB of disk are free, but a pool needs 5; make room, "
            "or name a block device in GATEWAY_POOL_SOURCE"
        )
    return max(5 * GiB, min(free // 2, 200 * GiB)) // GiB * GiB


def _pool(incus: Incus, settings: Settings) -> str | None:
    found = incus.find("storage-pools", settings.pool)
    if not cluster.is_pending(found):
        return None
    config, said = new_pool(settings)
    # Left by a run that was interrupted before Incus recorded the pool.
    (settings.incus_socket.parent / "disks" / f"{settings.pool}.img").unlink(missing_ok=True)
    body = {"name": settings.pool, "driver": "btrfs" if config else "dir", "config": config}
    cluster.create(incus, "storage-pools", body, own=config)
    return said


def new_pool(settings: Settings) -> tuple[dict[str, str], str]:
    """Return what a new pool is configured with on this host, nothing for plain folders, and words for it."""
    if not _has_btrfs():
        return {}, "created as plain folders: this kernel lacks btrfs, so disk quotas are NOT enforced"
    if settings.pool_source:
        source = Path(settings.pool_source)
        if not source.is_block_device():
            raise HostError(f"GATEWAY_POOL_SOURCE is {source}, which is not a block device")
        return {"source": str(source)}, f"created on {source}"
    size = pool_size(shutil.disk_usage(settings.incus_socket.parent).free)
    return {"size": f"{size // GiB}GiB"}, f"created in a sparse file of {size // GiB} GiB"


def _has_btrfs() -> bool:
    def listed() -> bool:
        return "\tbtrfs\n" in Path("/proc/filesystems").read_text()

    if not listed() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "btrfs"], check=False, capture_output=True)
    return listed()


def pin(settings: Settings) -> str | None:
    """Bind each running tenant's MAC address to its bridge port; return what was done, or None.

    The gateway itself does this for each tenant that starts.
    """
    done = 0
    for instance in Incus(settings.incus_socket, settings.incus_project).instances():
        for port in bridge_port.ports(instance["config"], settings.network):
            try:
                done += port.bind()
            except OSError as error:
                raise HostError(
                    f"cannot bind port {port.name} of {settings.network} to its tenant: {error.strerror}"
                ) from None
    return f"bound {done} to their tenants' addresses" if done else None


def profile(settings: Settings) -> dict[str, Any]:
    """Return the tenants' profile: their limits and their isolation."""
    root = {"type": "disk", "path": "/", "pool": settings.pool, "size": settings.tenant_disk}
    # No limit on writes: btrfs has one log for all, so that a commit waits for the slowest writer.
    root |= {"limits.read": settings.tenant_read} if settings.tenant_read else {}
    return {
        "config": {
            MANAGED: "true",
            "limits.cpu": settings.tenant_cpu,
            "limits.memory": settings.tenant_memory,
            "limits.memory.enforce": "hard",
            # A swapping tenant makes all others wait for the disk.
            "limits.memory.swap": "false",
            "limits.processes": str(settings.tenant_processes),
            # A separate range of host uids, because the kernel counts some limits per uid.
            "security.idmap.isolated": "true",
            "raw.lxc": FIRST_TO_GO,
            # No tenant needs the host's metadata socket.
            "security.guestapi": "false",
            # A new tenant's resolver; the image's template uses it.
            BRIDGE: str(IPv4Interface(settings.network_ipv4).ip),
            # For commands; the image sets the same for services.
            **{f"environment.{name}": str(CA_BUNDLE) for name in TRUST},
        },
        "devices": {
            "root": root,
            "eth0": {
                "type": "nic",
                "name": "eth0",
                "network": settings.network,
                # The ACL keeps tenants from the host, port isolation keeps them from each other.
                "security.port_isolation": "true",
                # No tenant may use another's address. IPv6 is not routed, so all of it is dropped.
                "security.mac_filtering": "true",
                "security.ipv4_filtering": "true",
                "security.ipv6_filtering": "true",
            },
        },
    }


def _profile(incus: Incus, settings: Settings) -> str | None:
    wanted = profile(settings)
    found = incus.find("profiles", settings.profile)
    if found is None:
        incus.post(
            "profiles",
            json={"name": settings.profile, "description": "A tenant of incus-gateway", **wanted},
        )
        return "created"
    wrong = [key for key, value in wanted["config"].items() if found["config"].get(key) != value]
    wrong += [name for name, device in wanted["devices"].items() if found["devices"].get(name) != device]
    if not wrong:
        return None
    incus.put(
        "profiles",
        settings.profile,
        json={
            "description": found["description"],
            "config": {**found["config"], **wanted["config"]},
            "devices": {**found["devices"], **wanted["devices"]},
        },
    )
    return f"corrected: {', '.join(sorted(wrong))}"
