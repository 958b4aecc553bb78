"""What a cluster of Incus adds to preparing a host: members, and what each of them has for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import AddressValueError, IPv4Address
from typing import Any, Final

from gateway import incus as api
from gateway.errors import Unavailable
from gateway.host import HostError
from gateway.host.incus import Incus
from gateway.incus import member_of
from gateway.incus.members import DRAINED, PREFIX, Membership
from gateway.rootfs import connections, locations
from gateway.settings import Settings

ADDRESSES: Final = f"{PREFIX}addresses"
"""A member's key with its host's addresses, comma-separated: tenants of no member are to reach them."""

_DECIDES: Final = 3.0  # seconds; one that has a quorum takes milliseconds
_FEW: Final = 3  # members from which one may be lost
_HEALS: Final = (6, 0, 6)  # first version whose healing leaves the leader's bridges up (lxc/incus#2976)
_HEALING: Final = "cluster.healing_threshold"
_REPLICAS: Final = "cluster.images_minimal_replica"


def undecided(settings: Settings) -> str | None:
    """Return what to do if Incus's database does not answer within some seconds, None if it does.

    Without a quorum each request that needs the database waits for a minute.
    """
    if not (settings.incus_socket.parent / "cluster.crt").exists():
        return None
    try:
        locations.ask_incus(str(settings.incus_socket), "/1.0/projects", seconds=_DECIDES)
    except Unavailable:
        return (
            f"Incus's database does not answer within {_DECIDES:.0f} s: most members are away, or the leader "
            "has just died. Sites and commands keep running, but nothing can be changed. Start the other "
            "members, or incusd here; if most of them are lost for good, run on the one that is to continue: "
            "incus-gateway cluster recover-from-quorum-loss (docs/cluster.md)"
        )
    return None


def members(incus: Incus) -> Sequence[Mapping[str, Any]]:
    """Return the members of the cluster as Incus describes them, none without one."""
    return incus.list("cluster", "members") if member_of(incus.get()) else []


def create(incus: Incus, kind: str, body: Mapping[str, Any], own: Iterable[str] = ()) -> None:
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


# --- addresses -------------------------------------------------------------------------------------------


def all_addresses(incus: Incus, own: Iterable[IPv4Address]) -> list[IPv4Address]:
    """Return this host's addresses and those that the other members have published."""
    name, found = member_of(incus.get()), set(own)
    for member in members(incus):
        if member["server_name"] != name:
            found |= set(_parsed(member))
    return sorted(found)


def are_published(incus: Incus, own: Sequence[IPv4Address]) -> bool:
    """Return whether the other members can know this host's addresses; without a cluster nobody need to."""
    name = member_of(incus.get())
    mine = next((member for member in members(incus) if member["server_name"] == name), None)
    return mine is None or _parsed(mine) == [*own]


def publish(settings: Settings, incus: Incus, own: Sequence[IPv4Address]) -> str | None:
    """Publish this host's addresses for the firewall of all members; return what was done, or None."""
    if are_published(incus, own):
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


# --- checks ----------------------------------------------------------------------------------------------


def problems(incus: Incus, settings: Settings) -> tuple[list[str], list[str]]:
    """Return what is wrong with the cluster, and what could be better; without a cluster nothing is."""
    server, there = incus.get(), members(incus)
    if not there:
        return [], []
    wrong, better = list[str](), list[str]()
    for member in there:
        if member["status"] != "Online":
            wrong.append(f"{member['server_name']} is {member['status']}: {member.get('message', '')}")
        if (member.get("config") or {}).get(DRAINED) == "true":
            name = member["server_name"]
            better.append(f"{name} is drained and gets no tenants; run: incus-gateway cluster restore {name}")
    living = [member["server_name"] for member in there if member["status"] == "Online"]
    versions = dict[str, list[str]]()
    for name in living:
        for what, look in _of_each(incus, settings, name).items():
            try:
                if said := look():
                    versions.setdefault(said, []).append(name)
            except HostError as error:
                wrong.append(f"{what} of {name}: {error.message}")
    if len(versions) > 1:
        said = "; ".join(f"{', '.join(names)}: {version}" for version, names in sorted(versions.items()))
        wrong.append(f"the members' versions of Incus differ ({said}): upgrade all of them")
    config = server.get("config") or {}
    if _number(config.get(_HEALING)) and _version(server["environment"]["server_version"]) < _HEALS:
        wrong.append(
            f"{_HEALING} is set, and before Incus 6.0.6 healing takes down the bridge of the leader with all "
            f"tenants on it; run: incus config set {_HEALING}=0"
        )
    replicas = _number(config.get(_REPLICAS, "3"))
    if 0 <= replicas < len(there):
        better.append(
            f"images are kept on {replicas} of {len(there)} members, and elsewhere a first tenant waits for "
            f"its copy; run: incus config set {_REPLICAS}=-1"
        )
    if not connections.can_destroy():
        better.append(
            "this kernel cannot close others' connections (CONFIG_INET_DIAG_DESTROY): when the leader's "
            "power fails, Incus answers nobody for some 30 s instead of 5 to 9; use a kernel that can"
        )
    if len(there) < _FEW:
        better.append(
            f"{len(there)} of 3 members: with fewer, the loss of one stops the database of all, and nothing "
            "can be changed until it is back"
        )
    return wrong, better


def _of_each(incus: Incus, settings: Settings, member: str) -> Mapping[str, Callable[[], str | None]]:
    """Return the looks at one member: each returns its version or nothing, and raises what is wrong."""

    def version() -> str:
        return str(incus.get(target=member)["environment"]["server_version"])

    def pool() -> None:
        status = incus.get("storage-pools", settings.pool, target=member)["status"]
        if status != "Created":
            raise HostError(f"it is {status} there; run `incus-gateway setup` there")

    def bridge() -> None:
        if incus.get("networks", settings.network, "state", target=member)["state"] != "up":
            raise HostError("it is down there; restart Incus there")

    return {"Incus": version, f"storage pool {settings.pool}": pool, f"bridge {settings.network}": bridge}


def _number(text: object) -> int:
    try:
        return int(str(text))
    except ValueError:
        return 0


def _version(text: str) -> tuple[int, ...]:
    return tuple(_number(part) for part in text.split("."))
