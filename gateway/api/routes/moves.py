"""Routes that move a tenant to another member of the cluster."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from gateway import protocol
from gateway.api.access import as_declared, check_serving, for_tenant, optional_json
from gateway.api.answers import Moved
from gateway.api.http import as_json
from gateway.api.operation import Operation
from gateway.api.placing import roomiest
from gateway.api.services import Services, services
from gateway.auth.tokens import Token
from gateway.errors import Forbidden, NotFound, Unavailable
from gateway.lifecycle.departures import Departures
from gateway.protocol import types


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
    departures = _departures(gateway)
    member = body.member or await _chosen(gateway)
    begun = await departures.begin(name, member, token.subject, drained=body.drained)
    await gateway.audit.note(token.subject, "tenant.move", name, operator=True, to=member)
    answer = as_json(begun.to_dict())
    answer.status_code = 202
    return answer


async def last(request: Request) -> Response:
    """Return the move of a tenant that is under way, or its last one."""
    gateway, name, _ = _operated(request)
    await gateway.runtime.tenants.get(name)  # raises where there is none
    found = await _departures(gateway).last(name)
    if found is None:
        raise NotFound(f"{name} was never moved from or to this member")
    return as_json(found.to_dict())


def _operated(request: Request) -> tuple[Services, str, Token]:
    """Return the gateway, the tenant and an operator's token. Raises `Forbidden` for any other."""
    name, token = for_tenant(request, "admin")
    if not token.operates:
        raise Forbidden("this needs a token with the scope admin for every tenant")
    return services(request), name, token


def _departures(gateway: Services) -> Departures:
    if gateway.departures is None:
        raise Unavailable("this gateway is in no cluster, so tenants cannot move", reason="no_cluster")
    return gateway.departures


async def _chosen(gateway: Services) -> str:
    assert gateway.cluster is not None
    found = await roomiest(gateway, gateway.cluster, own=False)
    if found is None:
        raise Unavailable("no other member can take tenants now", reason="capacity")
    return found


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
)
