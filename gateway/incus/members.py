"""The members of an Incus cluster, as incusd knows them, and what their gateways publish there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, urlsplit

from gateway.incus import Incus, IncusError

NO_QUORUM: Final = "no_quorum"
"""The `reason` of what cannot be decided, since Incus's database has no majority or does not answer."""

PREFIX: Final = "user.gateway."
"""What the keys begin with that a gateway publishes as its member's configuration."""

DRAINED: Final = f"{PREFIX}drained"
"""Set on a member that gets no new tenants, since it is to be empty."""

_MEMBERS: Final = "/1.0/cluster/members"
_TRIES: Final = 5  # of a change that another one came before


@dataclass(frozen=True, slots=True)
class Member:
    """One server of the cluster, and its HOST:PORT for the others. Both are empty without a cluster."""

    name: str
    address: str = ""
    config: Mapping[str, str] = field(default_factory=dict)  # its keys that begin with PREFIX

    @property
    def drained(self) -> bool:
        """Return whether the member accepts no new tenants."""
        return self.config.get(DRAINED) == "true"

    @property
    def host(self) -> str:
        """Return its address without the port, and without the brackets of IPv6."""
        return urlsplit(f"//{self.address}").hostname or ""


class Membership:
    """The cluster of one incusd. Its members are read at each call; which of them this one is, only once."""

    def __init__(self, incus: Incus) -> None:
        self._incus = incus

    async def own(self) -> str:
        """Return the name of this server's member, empty without a cluster.

        Incus answers that without its database, and so without a quorum. Raises `IncusError`.
        """
        return await self._incus.member()

    async def members(self) -> tuple[Member, ...]:
        """Return all members by name; without a cluster, the only one.

        Without a quorum incusd does not answer: bound the wait. Raises `IncusError`.
        """
        if not await self.own():
            return (Member(""),)
        found = await self._incus.get(_MEMBERS, recursion="1")
        return tuple(sorted((_member(entry) for entry in found), key=lambda member: member.name))

    async def publish(self, config: Mapping[str, str]) -> None:
        """Set keys of this server's member, which begin with `PREFIX`; an empty value removes one.

        Raises `IncusError`, and `ValueError` without a cluster, where nobody would read them.
        """
        own = await self.own()
        if not own:
            raise ValueError("there is no cluster to publish to")
        path = f"{_MEMBERS}/{quote(own, safe='')}"
        for left in reversed(range(_TRIES)):
            found, tag = await self._incus.get_tagged(path)
            if all(found["config"].get(key, "") == value for key, value in config.items()):
                return
            # all of it: to PATCH, too, a role or group that is left out is one taken away
            kept = {key: found[key] for key in ("roles", "failure_domain", "description", "groups")}
            change = {**kept, "config": {**found["config"], **config}}
            try:
                await self._incus.operate("PATCH", path, change, timeout=30, if_match=tag)
            except IncusError as error:
                if error.status != 412 or not left:
                    raise
            else:
                return


def _member(entry: Mapping[str, Any]) -> Member:
    config = {key: value for key, value in (entry.get("config") or {}).items() if key.startswith(PREFIX)}
    return Member(entry["server_name"], urlsplit(entry["url"]).netloc, config)
