"""Form a cluster of servers: enable, add and join members, remove a lost one, continue without a quorum."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway.host import HostError, Report, cluster, run
from gateway.host.caddy_service import in_use
from gateway.host.daemon import INCUSD, Daemon
from gateway.host.incus import Incus
from gateway.host.setup import host_addresses, new_pool
from gateway.incus import member_of
from gateway.incus.members import DRAINED
from gateway.settings import Settings

PORT: Final = 8443
"""Where a member's incusd serves the others."""

_NAME: Final = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")
_JOIN: Final = 300.0  # seconds; 28 were seen while another member was dead


@dataclass(frozen=True, slots=True)
class Token:
    """What lets one server join: `name` is its name in the cluster, `addresses` are members' HOST:PORT."""

    text: str
    name: str
    addresses: Sequence[str]

    @classmethod
    def parse(cls, text: str) -> Token:
        """Raise `HostError` if it is no token of `incus cluster add`."""
        try:
            found = json.loads(base64.b64decode(text, validate=True))
            token = cls(text, str(found["server_name"]), [str(address) for address in found["addresses"]])
        except (binascii.Error, ValueError, KeyError, TypeError):
            token = None
        if token is None or not token.addresses or not _NAME.fullmatch(token.name):
            raise HostError("this is not a token; make one on a member: incus-gateway cluster add NAME")
        return token


def enable(settings: Settings, name: str, address: str, report: Report) -> None:
    """Make this server the first member of a cluster; its tenants keep running. Idempotent.

    `address` is this host's for the other members, found out if it is empty. Raises `HostError`.
    """
    incus = Incus(settings.incus_socket)
    _need_incus()
    if member := member_of(incus.get()):
        report(f"this server is already the member {member}")
        return
    if not _NAME.fullmatch(name):
        raise HostError(f"{name} is not a member's name: use letters, digits and dashes")
    listens = str((incus.get().get("config") or {}).get("core.https_address") or "")
    if address or _is_wildcard(listens):  # which a cluster refuses: others must reach it there
        address = address or own_address()
        if not listens and (reason := in_use(PORT, address)):
            raise HostError(f"incusd cannot listen on {address}:{PORT}: {reason}; free it or give --address")
        listens = f"{_bracketed(address)}:{PORT}"
        incus.patch(json={"config": {"core.https_address": listens}})
    incus.put("cluster", json={"server_name": name, "enabled": True})
    cluster.publish(settings, incus, host_addresses())
    report(f"this server is the member {name}, at {listens}; let only the other members reach that port")


def add(settings: Settings, name: str) -> str:
    """Return a token with which one server can join under that name, within three hours."""
    if not member_of(Incus(settings.incus_socket).get()):
        raise HostError("this server is not in a cluster; start one: incus-gateway cluster enable")
    if not _NAME.fullmatch(name):
        raise HostError(f"{name} is not a member's name: use letters, digits and dashes")
    command = ["incus", "cluster", "add", name, "--quiet"]
    said = run(command, env=Daemon.at(settings.incus_socket).environment, fix="see: incus cluster list")
    return said.split()[-1]


def join(settings: Settings, text: str, report: Report) -> None:
    """Make this server, whose Incus must be empty, the member that a token names. Idempotent.

    Raises `HostError`.
    """
    token = Token.parse(text)
    incus = Incus(settings.incus_socket, timeout=_JOIN)
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
            "server_address": f"{_bracketed(own_address(token.addresses[0]))}:{PORT}",
            "cluster_token": token.text,
            "member_config": own,
        }
    }
    run(
        ["incus", "admin", "init", "--preseed"],
        env=Daemon.at(settings.incus_socket).environment,
        fix="see incusd's log; each try uses up a token: make another one",
        timeout=_JOIN,
        given=json.dumps(preseed),  # which is YAML too
    )
    report(f"joined as the member {token.name}")


def rows(settings: Settings) -> list[Mapping[str, Any]]:
    """Return the members as `{name, address, status, message, roles, own, drained}`, if there are any."""
    if (silent := cluster.undecided(settings)) is not None:
        raise HostError(silent)
    incus = Incus(settings.incus_socket)
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
        for member in cluster.members(incus)
    ]


def set_drained(settings: Settings, name: str, drained: bool) -> None:
    """Keep new tenants from a member, or allow them again. Raises `HostError`."""
    incus = Incus(settings.incus_socket)
    if not member_of(incus.get()):
        raise HostError("this server is not in a cluster")
    found = incus.get("cluster", "members", name)
    # all of it: to PATCH, too, a role or group that is left out is one taken away
    kept = {key: found[key] for key in ("roles", "failure_domain", "description", "groups")}
    config = {**found["config"], DRAINED: "true" if drained else ""}
    incus.patch("cluster", "members", name, json={**kept, "config": config})


def check_removable(settings: Settings, name: str, *, force: bool) -> None:
    """Raise `HostError` unless it is another member, and with `force` one that Incus takes for dead."""
    found = next((row for row in rows(settings) if row["name"] == name), None)
    if found is None:
        raise HostError(f"{name} is not a member of this cluster; see: incus-gateway cluster list")
    if found["own"]:
        raise HostError(f"this is {name} itself; run this on another member")
    if force and found["status"] == "Online":
        raise HostError(
            f"{name} is online; move its tenants away (incus-gateway cluster drain {name}) and remove it "
            "without --force, or switch it off"
        )


def remove(settings: Settings, name: str, *, force: bool) -> None:
    """Remove another member; with `force` one that is dead for good, and its instances with it.

    Raises `HostError`, without `force` if it has any instance left or does not answer.
    """
    incus = Incus(settings.incus_socket, timeout=_JOIN)
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


def own_address(peer: str = "192.0.2.1:9") -> str:
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
