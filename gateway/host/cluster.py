"""The members of an Incus cluster: form one, add and remove members, check what each of them has."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway.errors import Unavailable
from gateway.host import HostError, Report, run
from gateway.host.caddy_service import in_use
from gateway.host.daemon import INCUSD, Daemon
from gateway.host.incus import IncusAdmin
from gateway.host.setup import host_addresses, members, new_pool, publish_addresses
from gateway.incus import member_of
from gateway.incus.members import DRAINED
from gateway.rootfs import connections, locations
from gateway.settings import Settings

_DECIDES: Final = 3.0  # seconds; one that has a quorum takes milliseconds
_FEW: Final = 3  # members from which one may be lost
_HEALS: Final = (6, 0, 6)  # first version whose healing leaves the leader's bridges up (lxc/incus#2976)
_HEALING: Final = "cluster.healing_threshold"
_REPLICAS: Final = "cluster.images_minimal_replica"


def quorum_problem(settings: Settings) -> str | None:
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


# --- checks ----------------------------------------------------------------------------------------------


def cluster_problems(incus: IncusAdmin, settings: Settings) -> tuple[list[str], list[str]]:
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
        for what, look in _member_checks(incus, settings, name).items():
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


def _member_checks(
    incus: IncusAdmin, settings: Settings, member: str
) -> Mapping[str, Callable[[], str | None]]:
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


# --- forming a cluster --------------------------------------------------------------------------------------


CLUSTER_PORT: Final = 8443
"""Where a member's incusd serves the others."""

_MEMBER_NAME: Final = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")
_JOIN_TIMEOUT: Final = 300.0  # seconds; 28 were seen while another member was dead


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What lets one server join: `name` is its name in the cluster, `addresses` are members' HOST:PORT."""

    text: str
    name: str
    addresses: Sequence[str]

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Raise `HostError` if it is no token of `incus cluster add`."""
        try:
            found = json.loads(base64.b64decode(text, validate=True))
            token = cls(text, str(found["server_name"]), [str(address) for address in found["addresses"]])
        except (binascii.Error, ValueError, KeyError, TypeError):
            token = None
        if token is None or not token.addresses or not _MEMBER_NAME.fullmatch(token.name):
            raise HostError("this is not a token; make one on a member: incus-gateway cluster add NAME")
        return token


def enable_cluster(settings: Settings, name: str, address: str, report: Report) -> None:
    """Make this server the first member of a cluster; its tenants keep running. Idempotent.

    `address` is this host's for the other members, found out if it is empty. Raises `HostError`.
    """
    incus = IncusAdmin(settings.incus_socket)
    _need_incus()
    if member := member_of(incus.get()):
        report(f"this server is already the member {member}")
        return
    if not _MEMBER_NAME.fullmatch(name):
        raise HostError(f"{name} is not a member's name: use letters, digits and dashes")
    listens = str((incus.get().get("config") or {}).get("core.https_address") or "")
    if address or _is_wildcard(listens):  # which a cluster refuses: others must reach it there
        address = address or local_address()
        if not listens and (reason := in_use(CLUSTER_PORT, address)):
            raise HostError(
                f"incusd cannot listen on {address}:{CLUSTER_PORT}: {reason}; free it or give --address"
            )
        listens = f"{_bracketed(address)}:{CLUSTER_PORT}"
        incus.patch(json={"config": {"core.https_address": listens}})
    incus.put("cluster", json={"server_name": name, "enabled": True})
    publish_addresses(settings, incus, host_addresses())
    report(f"this server is the member {name}, at {listens}; let only the other members reach that port")


def add_member(settings: Settings, name: str) -> str:
    """Return a token with which one server can join under that name, within three hours."""
    if not member_of(IncusAdmin(settings.incus_socket).get()):
        raise HostError("this server is not in a cluster; start one: incus-gateway cluster enable")
    if not _MEMBER_NAME.fullmatch(name):
        raise HostError(f"{name} is not a member's name: use letters, digits and dashes")
    command = ["incus", "cluster", "add", name, "--quiet"]
    said = run(command, env=Daemon.at(settings.incus_socket).environment, fix="see: incus cluster list")
    return said.split()[-1]


def join_cluster(settings: Settings, text: str, report: Report) -> None:
    """Make this server, whose Incus must be empty, the member that a token names. Idempotent.

    Raises `HostError`.
    """
    token = JoinToken.parse(text)
    incus = IncusAdmin(settings.incus_socket, timeout=_JOIN_TIMEOUT)
    _need_incus()
    if member := member_of(incus.get()):
        if member != token.name:
            raise HostError(f"this server is already the member {member}, not {token.name}")
        report(f"this server is already the member {member}")
        return
    for what in ("instances", "storage-pools", "networks"):
        there = [one for one in incus.list(what) if one.get("managed", True)]
        if there:
            raise HostError(
                f"this server's Incus has {what} of its own, {there[0]['name']} among them, and a join would "
                "lose them: only an empty one can join; begin a cluster with the server that has them"
            )
    config, _ = new_pool(settings)
    own = [{"entity": "storage-pool", "name": settings.pool, "key": k, "value": v} for k, v in config.items()]
    preseed = {
        "cluster": {
            "enabled": True,
            "server_address": f"{_bracketed(local_address(token.addresses[0]))}:{CLUSTER_PORT}",
            "cluster_token": token.text,
            "member_config": own,
        }
    }
    run(
        ["incus", "admin", "init", "--preseed"],
        env=Daemon.at(settings.incus_socket).environment,
        fix="see incusd's log; each try uses up a token: make another one",
        timeout=_JOIN_TIMEOUT,
        given=json.dumps(preseed),  # which is YAML too
    )
    report(f"joined as the member {token.name}")


def member_rows(settings: Settings) -> list[Mapping[str, Any]]:
    """Return the members as `{name, address, status, message, roles, own, drained}`, if there are any."""
    if (silent := quorum_problem(settings)) is not None:
        raise HostError(silent)
    incus = IncusAdmin(settings.incus_socket)
    own = member_of(incus.get())
    return [
        {
            "name": member["server_name"],
            "address": member["url"].rpartition("/")[2],
            "status": member["status"],
            "message": member.get("message", ""),
            "roles": member.get("roles") or [],
            "own": member["server_name"] == own,
            "drained": (member.get("config") or {}).get(DRAINED) == "true",
        }
        for member in members(incus)
    ]


def set_drained(settings: Settings, name: str, drained: bool) -> None:
    """Keep new tenants from a member, or allow them again. Raises `HostError`."""
    incus = IncusAdmin(settings.incus_socket)
    if not member_of(incus.get()):
        raise HostError("this server is not in a cluster")
    found = incus.get("cluster", "members", name)
    # all of it: to PATCH, too, a role or group that is left out is one taken away
    kept = {key: found[key] for key in ("roles", "failure_domain", "description", "groups")}
    config = {**found["config"], DRAINED: "true" if drained else ""}
    incus.patch("cluster", "members", name, json={**kept, "config": config})


def check_removable(settings: Settings, name: str, *, force: bool) -> None:
    """Raise `HostError` unless it is another member, and with `force` one that Incus takes for dead."""
    found = next((row for row in member_rows(settings) if row["name"] == name), None)
    if found is None:
        raise HostError(f"{name} is not a member of this cluster; see: incus-gateway cluster list")
    if found["own"]:
        raise HostError(f"this is {name} itself; run this on another member")
    if force and found["status"] == "Online":
        raise HostError(
            f"{name} is online; move its tenants away (incus-gateway cluster drain {name}) and remove it "
            "without --force, or switch it off"
        )


def remove_member(settings: Settings, name: str, *, force: bool) -> None:
    """Remove another member; with `force` one that is dead for good, and its instances with it.

    Raises `HostError`, without `force` if it has any instance left or does not answer.
    """
    incus = IncusAdmin(settings.incus_socket, timeout=_JOIN_TIMEOUT)
    incus.delete("cluster", "members", name, **({"params": {"force": "1"}} if force else {}))


def recover_from_quorum_loss(settings: Settings, report: Report) -> None:
    """Make this server continue alone, with its own tenants, after most members were lost for good.

    Its incusd is restarted, its tenants run on. No other voter may ever be started again: it would be a
    second cluster with the same tenants. Raises `HostError`.
    """
    daemon = Daemon.at(settings.incus_socket)
    daemon.stop(instances=False)
    try:
        run(
            [INCUSD, "cluster", "recover-from-quorum-loss", "--quiet"],
            env=daemon.environment,
            fix="see incusd's log",
        )
    finally:
        daemon.ensure(report)
    report("this server decides alone now; for each lost one: incus-gateway cluster remove NAME --force")


def local_address(peer: str = "192.0.2.1:9") -> str:
    """Return this host's address on the route to a peer, HOST:PORT; nothing is sent. Raises `HostError`."""
    host, _, port = peer.rpartition(":")
    host = host.strip("[]")
    with contextlib.suppress(OSError, ValueError):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))
            return str(probe.getsockname()[0])
    raise HostError(f"this host has no route to {host}; give its own address: --address")


def _is_wildcard(listens: str) -> bool:
    """Return whether incusd listens on no address or on all of them."""
    return listens.rpartition(":")[0].strip("[]") in ("", "0.0.0.0", "::")  # noqa: S104 - nobody binds it


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _need_incus() -> None:
    """Raise `HostError` where there is no command `incus`, by which servers join."""
    if shutil.which("incus") is None:
        raise HostError("incus is not installed; install it: apt-get install incus-client")
