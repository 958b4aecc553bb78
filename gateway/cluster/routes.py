"""Routes for operators that move tenants to other members, and bring tenants back from standby copies."""

from __future__ import annotations

import asyncio
from operator import itemgetter
from typing import Annotated, Any, Final

import orjson
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from gateway import protocol
from gateway.api.access import as_declared, as_operator, check_serving, for_tenant, optional_json, validated
from gateway.api.answers import Moved, Recovered, StandbyCopies
from gateway.api.http import as_json
from gateway.api.operation import Operation
from gateway.api.services import Services, services
from gateway.auth.tokens import Token
from gateway.cluster import topology
from gateway.cluster.cluster import Cluster
from gateway.cluster.moves import Departures
from gateway.cluster.peers import Peer, order
from gateway.cluster.standby import COPIES, RECOVER, Standby
from gateway.cluster.topology import ClusterTopology
from gateway.errors import Forbidden, GatewayError, NotFound, Unavailable
from gateway.protocol import types

_TENANTS: Final = 1000  # tenants of one request
_PATIENCE: Final = 600.0  # seconds for a member to bring its part back


class MoveBody(protocol.Params):
    """`member` is where the tenant goes; by default the member with most room.

    `drained` remembers the member that it leaves, to which `incus-gateway cluster restore` brings it back.
    """

    member: Annotated[types.MemberName, Field(min_length=1)] | None = None
    drained: bool = False


async def move(request: Request) -> Response:
    """Move a tenant to another member of the cluster. It answers at once; `GET` shows how far it is."""
    gateway, name, token = _operated(request)
    check_serving(request)
    body = as_declared(request, MoveBody, await optional_json(request, token))
    cluster, departures = _departures(request)
    member = body.member or await cluster.roomiest(own=False)
    if member is None:
        raise Unavailable("no other member can take tenants now", reason="capacity")
    begun = await departures.begin(name, member, token.subject, drained=body.drained)
    await gateway.audit.note(token.subject, "tenant.move", name, operator=True, to=member)
    answer = as_json(begun.to_dict())
    answer.status_code = 202
    return answer


async def last(request: Request) -> Response:
    """Return the move of a tenant that is under way, or its last one."""
    gateway, name, _ = _operated(request)
    await gateway.runtime.tenants.get(name)  # raises where there is none
    found = await _departures(request)[1].last(name)
    if found is None:
        raise NotFound(f"{name} was never moved from or to this member")
    return as_json(found.to_dict())


def _operated(request: Request) -> tuple[Services, str, Token]:
    """Return the gateway, the tenant and an operator's token. Raises `Forbidden` for any other."""
    name, token = for_tenant(request, "admin")
    if not token.operates:
        raise Forbidden("this needs a token with the scope admin for every tenant")
    return services(request), name, token


def _departures(request: Request) -> tuple[ClusterTopology, Departures]:
    cluster = topology.of(request)
    if cluster is None or cluster.departures is None:
        raise Unavailable("this gateway is in no cluster, so tenants cannot move", reason="no_cluster")
    return cluster, cluster.departures


class RecoverBody(protocol.Params):
    """`tenants` are those to bring back."""

    tenants: Annotated[list[types.TenantName], Field(min_length=1, max_length=_TENANTS)]


async def copies(request: Request) -> Response:
    """Return the standby copies on all members. `lost` is set once the tenant's home was removed."""
    as_operator(request)
    cluster, standby = _standby(request)
    own, (others, silent) = await asyncio.gather(
        standby.listed(), cluster.peers.ask_all(f"/peer/ask/{COPIES}", {})
    )
    found = [*own, *(copy for answer in others.values() for copy in answer or ())]
    return as_json({"copies": sorted(found, key=itemgetter("tenant")), "unanswered": silent})


async def recover(request: Request) -> Response:
    """Bring back tenants of removed servers from their copies, and return once they run."""
    gateway, token = services(request), as_operator(request)
    check_serving(request)
    body, (cluster, standby) = await validated(request, token, RecoverBody), _standby(request)
    peers, wanted = cluster.peers, [*dict.fromkeys(body.tenants)]
    for tenant in wanted:
        await gateway.audit.note(token.subject, "tenant.recover", tenant, operator=True)
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
    return as_json({"recovered": sorted(recovered, key=itemgetter("tenant")), "failed": failed})


def _standby(request: Request) -> tuple[Cluster, Standby]:
    found = topology.of(request)
    if found is None or found.standby is None:
        raise Unavailable("this gateway is in no cluster, so it has no copies", reason="no_cluster")
    return found.cluster, found.standby


ROUTES: Final = (
    Operation(
        "/v1/tenants/{tenant}/move",
        move,
        "POST",
        scope="admin",
        takes=MoveBody,
        optional=True,
        answers={202: Moved},
    ),
    Operation("/v1/tenants/{tenant}/move", last, scope="admin", answers={200: Moved}),
    Operation("/v1/standby-copies", copies, scope="admin", answers={200: StandbyCopies}),
    Operation(
        "/v1/standby-copies/recover",
        recover,
        "POST",
        scope="admin",
        takes=RecoverBody,
        answers={200: Recovered},
    ),
)
