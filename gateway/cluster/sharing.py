"""What the gateway of a cluster's member shares with the others, built once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.cluster.member import Member, Membership
from gateway.cluster.placements import Placements
from gateway.cluster.remote_sites import RemoteSites
from gateway.cluster.reservations import Reservations
from gateway.cluster.shared_keys import NO_QUORUM, IncusKeys, SharedKeys
from gateway.errors import Unavailable
from gateway.incus import Incus, IncusError
from gateway.settings import Settings

log = logging.getLogger(__name__)

_LOOK: Final = 5.0  # seconds for incusd to say whether it is clustered
_MEMBER: Final = "member"
"""The file in the state dir with the member's name, for a start while incusd does not answer."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """What the gateways of a cluster share, as seen by the member `own`."""

    own: str
    members: Callable[[], Awaitable[Collection[str]]]
    """Returns the names of the cluster's members, or raises `Unavailable`."""
    keys: SharedKeys
    domains: Reservations
    placements: Placements
    sites: RemoteSites

    async def follow(self, *look_soon: Callable[[], None]) -> None:
        """Call these once and after each change of the keys, until the connection to Incus breaks.

        Then it raises `Unavailable`.
        """
        async with contextlib.aclosing(self.keys.changes()) as changes:  # type: ignore[type-var]
            async for _ in changes:
                for look in look_soon:
                    look()


@contextlib.asynccontextmanager
async def sharing(own: str, alive: Callable[[str], bool], settings: Settings) -> AsyncIterator[Sharing]:
    """Open what this member's gateway shares with the others; `alive` says which of them are reachable."""
    async with Incus(settings.incus_socket, settings.cluster_project, settings.cluster_patience) as incus:
        membership = Membership(incus)

        async def members() -> Sequence[Member]:
            try:
                async with asyncio.timeout(settings.cluster_patience):
                    return await membership.members()
            except (IncusError, TimeoutError) as error:
                raise Unavailable(
                    "cannot list the members of the cluster now; try again soon", reason=NO_QUORUM
                ) from error

        async def names() -> Collection[str]:
            return {member.name for member in await members()}

        async with IncusKeys(incus, settings.cluster_patience) as keys:
            yield Sharing(
                own=own,
                members=names,
                keys=keys,
                domains=Reservations(keys, "domain", own, names),
                placements=Placements(keys, names, settings.cluster_home_kept),
                sites=RemoteSites(own, members, settings.caddy_peers, alive),
            )


async def own_member(incus: Incus, state_dir: Path) -> str:
    """Return the name of this server's member, "" without a cluster; the last one known if incusd is down."""
    noted = state_dir / _MEMBER
    try:
        async with asyncio.timeout(_LOOK):
            own = await incus.member()
    except (IncusError, TimeoutError):
        log.warning("incusd does not answer: assuming the cluster membership of the last start")
        return await asyncio.to_thread(_noted, noted)
    await asyncio.to_thread(_note, noted, own)
    return own


def _noted(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _note(path: Path, own: str) -> None:
    if own:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text(f"{own}\n")
    else:
        path.unlink(missing_ok=True)
