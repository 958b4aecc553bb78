"""Routes for operators that move tenants to other members, and bring tenants back from standby copies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from operator import itemgetter
from typing import Annotated, Any, Final

import orjson
from pydantic import Field

from gateway import protocol
from gateway.api.answers import Moved, Recovered, StandbyCopies
from gateway.api.operation import ApiCall, ApiRoutes
from gateway.cluster import topology
from gateway.cluster.cluster import Cluster
from gateway.cluster.moves import Departures
from gateway.cluster.peers import Peer, order
from gateway.cluster.standby import COPIES, RECOVER, Standby
from gateway.cluster.topology import ClusterTopology
from gateway.errors import GatewayError, NotFound, Unavailable
from gateway.protocol import types

_TENANTS: Final = 1000  # tenants of one request
_PATIENCE: Final = 600.0  # seconds for a member to bring its part back

moves = ApiRoutes("moves")


class MoveBody(protocol.Params):
    """`member` is where the tenant goes; by default the member with most room.

    `drained` remembers the member that it leaves, to which `incus-gateway cluster restore` brings it back.
    """

    member: Annotated[types.MemberName, Field(min_length=1)] | None = None
    drained: bool = False


@moves(
    "POST",
    "/v1/tenants/{tenant}/move",
    scope="admin",
    operator=True,
    serving=True,
    optional=True,
    answers={202: Moved},
)
async def move(call: ApiCall, body: MoveBody) -> Mapping[str, Any]:
    """Move a tenant to another member of the cluster. It answers at once; `GET` shows how far it is."""
    name, token = call.tenant, call.token
    cluster, departures = _departures(call)
    member = body.member or await cluster.roomiest(own=False)
    if member is None:
        raise Unavailable("no other member can take tenants now", reason="capacity")
    begun = await departures.begin(name, member, token.subject, drained=body.drained)
    await call.gateway.audit.note(token.subject, "tenant.move", name, operator=True, to=member)
    return begun.to_dict()


@moves("GET", "/v1/tenants/{tenant}/move", scope="admin", operator=True, answers={200: Moved})
async def last(call: ApiCall) -> Mapping[str, Any]:
    """Return the move of a tenant that is under way, or its last one."""
    await call.gateway.runtime.tenants.get(call.tenant)  # raises where there is none
    found = await _departures(call)[1].last(call.tenant)
    if found is None:
        raise NotFound(f"{call.tenant} was never moved from or to this member")
    return found.to_dict()


def _departures(call: ApiCall) -> tuple[ClusterTopology, Departures]:
    cluster = topology.of(call)
    if cluster is None or cluster.departures is None:
        raise Unavailable("this gateway is in no cluster, so tenants cannot move", reason="no_cluster")
    return cluster, cluster.departures


recovery = ApiRoutes("recovery")


class RecoverBody(protocol.Params):
    """`tenants` are those to bring back."""

    tenants: Annotated[list[types.TenantName], Field(min_length=1, max_length=_TENANTS)]


@recovery("GET", "/v1/standby-copies", scope="admin", operator=True, answers={200: StandbyCopies})
async def copies(call: ApiCall) -> Mapping[str, Any]:
    """Return the standby copies on all members. `lost` is set once the tenant's home was removed."""
    cluster, standby = _standby(call)
    own, (others, silent) = await asyncio.gather(
        standby.listed(), cluster.peers.ask_all(f"/peer/ask/{COPIES}", {})
    )
    found = [*own, *(copy for answer in others.values() for copy in answer or ())]
    return {"copies": sorted(found, key=itemgetter("tenant")), "unanswered": silent}


@recovery(
    "POST",
    "/v1/standby-copies/recover",
    scope="admin",
    operator=True,
    serving=True,
    answers={200: Recovered},
)
async def recover(call: ApiCall, body: RecoverBody) -> Mapping[str, Any]:
    """Bring back tenants of removed servers from their copies, and return once they run."""
    cluster, standby = _standby(call)
    peers, wanted = cluster.peers, [*dict.fromkeys(body.tenants)]
    for tenant in wanted:
        await call.gateway.audit.note(call.token.subject, "tenant.recover", tenant, operator=True)
    text = orjson.dumps({"tenants": wanted})

    async def here() -> Any:
        recovered, failed = await standby.recover(wanted)
        return {"recovered": recovered, "failed": failed}

    async def there(peer: Peer) -> Any:
        try:
            return await order(peers, peer, f"/peer/do/{RECOVER}", text, _PATIENCE)
        except GatewayError as error:
            return {"recovered": [], "failed": {}, "silent": f"{peer.name}: {error.message}"}

    present = [peers.all[name] for name in peers.present]
    found = await asyncio.gather(here(), *map(there, present))
    recovered = [copy for answer in found for copy in answer["recovered"]]
    failed = {tenant: why for answer in found for tenant, why in answer["failed"].items()}
    silent = "; ".join(answer["silent"] for answer in found if "silent" in answer)
    for tenant in {*wanted} - failed.keys() - {copy["tenant"] for copy in recovered}:
        failed[tenant] = f"no copy of a lost {tenant} was found" + (f" ({silent})" if silent else "")
    return {"recovered": sorted(recovered, key=itemgetter("tenant")), "failed": failed}


def _standby(call: ApiCall) -> tuple[Cluster, Standby]:
    found = topology.of(call)
    if found is None or found.standby is None:
        raise Unavailable("this gateway is in no cluster, so it has no copies", reason="no_cluster")
    return found.cluster, found.standby


ROUTES: Final = (*moves, *recovery)
