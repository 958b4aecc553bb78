"""Routes for operators that list standby copies, and bring back the tenants of removed servers from them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from operator import itemgetter
from typing import Annotated, Any, Final

import orjson
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from gateway import protocol
from gateway.api.access import as_operator, check_serving, validated
from gateway.api.answers import Recovered, StandbyCopies
from gateway.api.http import as_json
from gateway.api.operation import Operation
from gateway.api.services import Services, services
from gateway.cluster.listener import Order, Question
from gateway.cluster.orders import order
from gateway.cluster.peers import Peer
from gateway.errors import GatewayError, Unavailable
from gateway.lifecycle.standby import Standby
from gateway.protocol import types

_COPIES: Final = "standby-copies"
_RECOVER: Final = "standby-recover"
_TENANTS: Final = 1000  # tenants of one request
_PATIENCE: Final = 600.0  # seconds for a member to bring its part back


class RecoverBody(protocol.Params):
    """`tenants` are those to bring back."""

    tenants: Annotated[list[types.TenantName], Field(min_length=1, max_length=_TENANTS)]


async def copies(request: Request) -> Response:
    """Return the standby copies on all members. `lost` is set once the tenant's home was removed."""
    gateway, _ = services(request), as_operator(request)
    standby = _standby(gateway)
    assert gateway.cluster is not None
    own, (others, silent) = await asyncio.gather(
        standby.listed(), gateway.cluster.peers.ask_all(f"/peer/ask/{_COPIES}", {})
    )
    found = [*own, *(copy for answer in others.values() for copy in answer or ())]
    return as_json({"copies": sorted(found, key=itemgetter("tenant")), "unanswered": silent})


async def recover(request: Request) -> Response:
    """Bring back tenants of removed servers from their copies, and return once they run."""
    gateway, token = services(request), as_operator(request)
    check_serving(request)
    body, standby = await validated(request, token, RecoverBody), _standby(gateway)
    assert gateway.cluster is not None
    peers, wanted = gateway.cluster.peers, [*dict.fromkeys(body.tenants)]
    for tenant in wanted:
        await gateway.audit.note(token.subject, "tenant.recover", tenant, operator=True)
    text = orjson.dumps({"tenants": wanted})

    async def there(peer: Peer) -> Any:
        try:
            return await order(peers, peer, f"/peer/do/{_RECOVER}", text, _PATIENCE)
        except GatewayError as error:
            return {"recovered": [], "failed": {}, "silent": f"{peer.name}: {error.message}"}

    present = [peers.all[name] for name in peers.present]
    found = await asyncio.gather(_recovered(standby, wanted), *map(there, present))
    recovered = [copy for answer in found for copy in answer["recovered"]]
    failed = {tenant: why for answer in found for tenant, why in answer["failed"].items()}
    silent = "; ".join(answer["silent"] for answer in found if "silent" in answer)
    for tenant in {*wanted} - failed.keys() - {copy["tenant"] for copy in recovered}:
        failed[tenant] = f"no copy of a lost {tenant} was found" + (f" ({silent})" if silent else "")
    return as_json({"recovered": sorted(recovered, key=itemgetter("tenant")), "failed": failed})


def questions(standby: Standby) -> Mapping[str, Question]:
    """Return what peers ask about copies."""

    async def listed(_: Peer, what: Any) -> Any:
        return await standby.listed()

    return {_COPIES: listed}


def orders(standby: Standby) -> Mapping[str, Order]:
    """Return what peers order about copies."""

    async def recover(_: Peer, text: bytes) -> Any:
        return await _recovered(standby, [str(tenant) for tenant in orjson.loads(text)["tenants"]])

    return {_RECOVER: recover}


async def _recovered(standby: Standby, tenants: list[str]) -> dict[str, Any]:
    recovered, failed = await standby.recover(tenants)
    return {"recovered": recovered, "failed": failed}


def _standby(gateway: Services) -> Standby:
    if gateway.standby is None:
        raise Unavailable("this gateway is in no cluster, so it has no copies", reason="no_cluster")
    return gateway.standby


ROUTES: Final = (
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
