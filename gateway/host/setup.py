"""Prepare this host for tenants, idempotently: kernel limits, project, bridge, firewall, pool, profile.

Each step compares the actual state with the wanted one and changes only the difference: a second run changes
nothing, and manual alterations are reverted. Keys that are not ours stay.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any, Final

from gateway import incus as api
from gateway.host import HostError
from gateway.host.image import BRIDGE, CA_BUNDLE, TRUST
from gateway.host.incus import IncusAdmin
from gateway.incus import member_of
from gateway.incus.members import PREFIX, Membership
from gateway.rootfs import bridge_port
from gateway.rootfs.instance_record import MANAGED
from gateway.rootfs.quotas import SIMPLE, Kind, Quotas
from gateway.runtime.incus.creation import FIRST_TO_GO
from gateway.settings import Settings

# As recommended for servers by Incus's documentation (reference/server_settings). Their use counts towards
# the memory of the container or worker.
INOTIFY_LIMITS = {
    "fs.inotify.max_queued_events": 1_048_576,
    "fs.inotify.max_user_instances": 1_048_576,
    "fs.inotify.max_user_watches": 1_048_576,
}
DROP_IN = Path("/etc/sysctl.d/60-incus-gateway.conf")
KERNEL = Path("/proc/sys")
_HEAD = "# Made by `incus-gateway setup`: many containers watch files.\n"


def raise_limits(drop_in: Path = DROP_IN, kernel: Path = KERNEL) -> str | None:
    """Raise limits that are too low, now and for later boots; return what was changed, or None.

    Never lowers a limit, and skips limits that cannot be set here (as in a container): a watch beyond the
    limit then fails with an error that names it. Raises `HostError` if the drop-in cannot be written.
    """
    raised: dict[str, str] = {}
    for name, wanted in INOTIFY_LIMITS.items():
        value = kernel / name.replace(".", "/")
        try:
            now = int(value.read_text())
            if now >= wanted:
                continue
            value.write_text(str(wanted))
        except (OSError, ValueError):
            continue
        raised[name] = f"{name.rpartition('.')[2]} {now} -> {wanted}"
    said = [*raised.values()]
    try:
        old = drop_in.read_text() if drop_in.exists() else ""
        # Limits that were high enough without us are left out: they may be set higher elsewhere.
        ours = [name for name in INOTIFY_LIMITS if name in raised or f"{name} =" in old]
        text = _HEAD + "".join(f"{name} = {INOTIFY_LIMITS[name]}\n" for name in ours)
        if ours and text != old:
            drop_in.parent.mkdir(parents=True, exist_ok=True)
            drop_in.write_text(text)
            said.append(f"saved in {drop_in}")
    except OSError as error:
        raise HostError(f"cannot write {drop_in}: {error.strerror}") from None
    return ", ".join(said) or None


# --- disk quotas --------------------------------------------------------------------------------------------


_BTRFS_PROGS: Final = (6, 7)  # the btrfs-progs that know simple quotas; Incus runs them


def quotas_in_force(settings: Settings) -> bool:
    """Return whether the kernel enforces the pool's quotas; a pool of folders has none."""
    return _quotas(settings).in_force()


def quota_kind(settings: Settings) -> Kind | None:
    """Return which quotas the pool has, None for a pool of folders."""
    return _quotas(settings).kind()


def unlimited_tenants(settings: Settings, tenants: Collection[str]) -> list[str]:
    """Return which of these tenants no limit counts for, in a pool with simple quotas. Needs root."""
    if (groups := _quotas(settings).groups()) is None:
        return []
    own = settings.incus_project
    folders = {tenant if own == "default" else f"{own}_{tenant}": tenant for tenant in tenants}
    return [folders[folder] for folder in groups.lacking() if folder in folders]


def enforce_quotas(settings: Settings) -> str | None:
    """Enforce the quotas, wait until they are in force, and return what was changed. Raises `HostError`.

    A pool that has no quotas yet gets simple ones, if this host can have them.
    """
    found, changed = _quotas(settings), list[str]()
    try:
        if found.kind() == "off" and wants_simple_quotas(settings):
            found.begin_simple()
            changed.append("simple ones: what a tenant writes counts for it")
        changed += found.enforce(wait=True)
    except OSError as error:
        raise HostError(
            f"cannot enforce the disk quotas: {error.strerror}; see `btrfs quota rescan -s` and the "
            "kernel log"
        ) from None
    return "; ".join(changed) or None


def wants_simple_quotas(settings: Settings) -> bool:
    """Return whether a new pool gets simple quotas on this host."""
    if not settings.simple_quotas or (btrfs := shutil.which("btrfs")) is None:
        return False
    said = subprocess.run([btrfs, "--version"], check=False, capture_output=True, text=True).stdout
    return supports_simple_quotas(os.uname().release, said)


def supports_simple_quotas(linux: str, programs: str) -> bool:
    """Return whether the Linux of a release, and btrfs-progs by the version they tell, have simple quotas."""
    return _version_in(linux) >= SIMPLE and _version_in(programs) >= _BTRFS_PROGS


def _version_in(text: str) -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)", text)
    return (0, 0) if found is None else (int(found[1]), int(found[2]))


def _quotas(settings: Settings) -> Quotas:
    return Quotas(settings.incus_socket.parent / "storage-pools" / settings.pool)


# --- addresses of tenants -----------------------------------------------------------------------------------


_GUARD: Final = Path(__file__).with_name("address_guard")
_MAX_GUARDED: Final = 1 << 14  # addresses; more would take seconds to put in force


def guard_addresses(settings: Settings) -> str | None:
    """Put the table in force; return what was changed, or None. Needs root.

    Where the kernel cannot have such a table, tenants get Incus's filter. Raises `HostError`.
    """
    hook = bridge_port.guard_hook(settings.incus_socket.parent, settings.network)
    nft, wanted = shutil.which("nft"), guard_table(settings)
    if wanted is None:
        hook.unlink(missing_ok=True)
        return None
    # once there are tenants that need it, a failure is one
    if not hook.exists() and (nft is None or not _accepts(nft, wanted)):
        return None
    if nft is None:
        raise HostError("nft is missing, and no tenant starts without it; install the package nftables")
    table = hook.with_suffix(".nft")
    words = {"NFT": nft, "TABLE": guard_table_name(settings), "FILE": str(table)}
    script = _filled(_GUARD.with_suffix(".sh").read_text(), words)
    same = _read(table) == wanted and _read(hook) == script
    if same and guard_in_force(settings):
        return None
    hook.parent.mkdir(mode=0o755, exist_ok=True)
    _replace(table, wanted, 0o644)
    said = subprocess.run([nft, "-f", str(table)], check=False, capture_output=True, text=True)
    if said.returncode != 0:
        raise HostError(f"cannot restrict tenants to their addresses: {said.stderr.strip()[:500]}")
    _replace(hook, script, 0o755)
    return "each tenant is restricted to its own"


def guard_in_force(settings: Settings) -> bool:
    """Return whether the table is there. Needs root."""
    nft = shutil.which("nft") or "nft"
    words = (nft, "list", "chain", "bridge", guard_table_name(settings), "ports")
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


def guard_table_name(settings: Settings) -> str:
    """Return the name of the network's table."""
    return "gateway_" + re.sub("[^A-Za-z0-9]", "_", settings.network)


def guard_table(settings: Settings) -> str | None:
    """Return the table as nft(8) takes it, None if the network has too many addresses."""
    bridge = IPv4Interface(settings.network_ipv4)
    if bridge.network.num_addresses > _MAX_GUARDED:
        return None
    names, addresses = [], []
    for address in bridge.network.hosts():
        if address != bridge.ip:
            names.append(f'"{bridge_port.port_name(address)}"')
            addresses.append(f"{names[-1]} . {bridge_port.hardware_address(address)} . {address}")
    words = {
        "TABLE": guard_table_name(settings),
        "NAMES": ", ".join(names),
        "ADDRESSES": ", ".join(addresses),
    }
    return _filled(_GUARD.with_suffix(".nft").read_text(), words)


def _filled(text: str, words: dict[str, str]) -> str:
    return re.sub("|".join(rf"\b{name}\b" for name in words), lambda found: words[found[0]], text)


def _accepts(nft: str, text: str) -> bool:
    """Return whether nft and the kernel take the table."""
    words = (nft, "--check", "-f", "-")
    return subprocess.run(words, check=False, input=text, text=True, capture_output=True).returncode == 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _replace(path: Path, text: str, mode: int) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.chmod(mode)
    new.replace(path)


# --- what each member of a cluster has for itself ------------------------------------------------------

ADDRESSES: Final = f"{PREFIX}addresses"
"""A member's key with its host's addresses, comma-separated: tenants of no member are to reach them."""


def members(incus: IncusAdmin) -> Sequence[Mapping[str, Any]]:
    """Return the members of the cluster as Incus describes them, none without one."""
    return incus.list("cluster", "members") if member_of(incus.get()) else []


def create_on_all(incus: IncusAdmin, kind: str, body: Mapping[str, Any], own: Iterable[str] = ()) -> None:
    """Create a network or a storage pool; `own` are the keys of its configuration that are each member's own.

    In a cluster it is announced for each member first, which an interrupted run may have done in part.
    """
    there = members(incus)
    if not there:
        incus.post(kind, json=body)
        return
    config = body["config"]
    each = {key: config[key] for key in own if key in config}
    announced = (incus.find(kind, body["name"]) or {}).get("locations") or ()
    for member in there:
        if (name := member["server_name"]) not in announced:
            incus.post(kind, params={"target": name}, json={**body, "config": each})
    common = {key: value for key, value in config.items() if key not in each}
    incus.post(kind, json={**body, "config": common})


def is_pending(found: Mapping[str, Any] | None) -> bool:
    """Return whether a network or pool does not exist, or was only announced."""
    return found is None or found.get("status") == "Pending"


def all_addresses(incus: IncusAdmin, own: Iterable[IPv4Address]) -> list[IPv4Address]:
    """Return this host's addresses and those that the other members have published."""
    name, found = member_of(incus.get()), set(own)
    for member in members(incus):
        if member["server_name"] != name:
            found |= set(_parsed(member))
    return sorted(found)


def addresses_published(incus: IncusAdmin, own: Sequence[IPv4Address]) -> bool:
    """Return whether the other members can know this host's addresses; without a cluster nobody need to."""
    name = member_of(incus.get())
    mine = next((member for member in members(incus) if member["server_name"] == name), None)
    return mine is None or _parsed(mine) == [*own]


def publish_addresses(settings: Settings, incus: IncusAdmin, own: Sequence[IPv4Address]) -> str | None:
    """Publish this host's addresses for the firewall of all members; return what was done, or None."""
    if addresses_published(incus, own):
        return None

    async def change() -> None:
        async with api.Incus(settings.incus_socket, timeout=settings.incus_timeout) as client:
            await Membership(client).publish({ADDRESSES: ",".join(map(str, own))})

    try:
        asyncio.run(change())
    except api.IncusError as error:
        raise HostError(f"Incus reports: {error.message}") from error
    return "published"


def _parsed(member: Mapping[str, Any]) -> list[IPv4Address]:
    text = (member.get("config") or {}).get(ADDRESSES) or ""
    try:
        return [IPv4Address(part) for part in text.split(",") if part]
    except AddressValueError:
        raise HostError(
            f"{ADDRESSES} of {member['server_name']} is not a list of addresses; unset it"
        ) from None


# --- steps --------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class Host:
    """A host to set up. With a client that refuses changes, each step only compares."""

    settings: Settings
    client: type[IncusAdmin] = IncusAdmin

    @property
    def root(self) -> IncusAdmin:
        """A new client of Incus's default project."""
        return self.client(self.settings.incus_socket)

    @property
    def incus(self) -> IncusAdmin:
        """A new client of the tenants' project."""
        return self.client(self.settings.incus_socket, self.settings.incus_project)


def project(host: Host) -> str | None:
    """Create the tenants' project; return what was done, or None, as all these steps do."""
    incus, settings = host.root, host.settings
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


def member_addresses(host: Host) -> str | None:
    """Publish this host's addresses if it is in a cluster."""
    return publish_addresses(host.settings, host.root, host_addresses())


def firewall(host: Host) -> str | None:
    """Create the tenants' network ACL, or correct its rules."""
    incus = host.incus
    wanted = acl(host.settings, all_addresses(incus, host_addresses()))
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


def bridge(host: Host) -> str | None:
    """Create the tenants' bridge, or correct its configuration."""
    incus, settings = host.incus, host.settings
    wanted = network(settings)
    found = incus.find("networks", settings.network)
    if found is not None and found.get("managed") and is_pending(found):
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
        create_on_all(incus, "networks", {"name": settings.network, "type": "bridge", "config": wanted})
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
    incus: IncusAdmin, path: tuple[str, ...], found: Mapping[str, Any], wanted: Mapping[str, str]
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


def pool(host: Host) -> str | None:
    """Create the tenants' storage pool. One that exists stays as it is."""
    incus, settings = host.incus, host.settings
    found = incus.find("storage-pools", settings.pool)
    if not is_pending(found):
        return None
    config, said = new_pool(settings)
    # Left by a run that was interrupted before Incus recorded the pool.
    (settings.incus_socket.parent / "disks" / f"{settings.pool}.img").unlink(missing_ok=True)
    body = {"name": settings.pool, "driver": "btrfs" if config else "dir", "config": config}
    create_on_all(incus, "storage-pools", body, own=config)
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
    for instance in IncusAdmin(settings.incus_socket, settings.incus_project).instances():
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


def tenant_profile(host: Host) -> str | None:
    """Create the tenants' profile, or correct it."""
    incus, settings = host.incus, host.settings
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
