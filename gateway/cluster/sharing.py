"""What the gateway of a cluster's member shares with the others, built once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from typing import Final

from gateway.cluster.member import Membership
from gateway.cluster.placements import Placements
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
    """The part of the member `own` in what all gateways of its cluster share."""

    own: str
    keys: SharedKeys
    domains: Reservations
    placements: Placements


@contextlib.asynccontextmanager
async def sharing(settings: Settings) -> AsyncIterator[Sharing | None]:
    """Open what this gateway shares with those of other members; None if incusd is in no cluster."""
    async with Incus(settings.incus_socket, settings.cluster_project, settings.cluster_patience) as incus:
        membership = Membership(incus)

        async def members() -> Collection[str]:
            try:
                async with asyncio.timeout(settings.cluster_patience):
                    return {member.name for member in await membership.members()}
            except (IncusError, TimeoutError) as error:
                raise Unavailable(
                    "which members the cluster has cannot be known now; ask again soon", reason=NO_QUORUM
                ) from error

        own = await _own(membership, settings)
        if not own:
            yield None
            return
        async with IncusKeys(incus, settings.cluster_patience) as keys:
            yield Sharing(
                own=own,
                keys=keys,
                domains=Reservations(keys, "domain", own, members),
                placements=Placements(keys, members, settings.cluster_home_kept),
            )


async def _own(membership: Membership, settings: Settings) -> str:
    """Return the name of this server's member, "" without a cluster; the last one known if incusd is down."""
    noted = settings.state_dir / _MEMBER
    try:
        async with asyncio.timeout(_LOOK):
            own = await membership.own()
    except (IncusError, TimeoutError):
        try:
            return noted.read_text().strip()
        except OSError:
            return ""
    if own:
        noted.write_text(f"{own}\n")
    else:
        noted.unlink(missing_ok=True)
    return own
