"""Route of a tenant's websocket: accepts it, or refuses it with a close code."""

from __future__ import annotations

from typing import Final

from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from gateway import protocol
from gateway.api.access import check_covered, check_origin, raw_token
from gateway.api.connection import Connection, close_code
from gateway.api.http import address
from gateway.api.services import services
from gateway.errors import Forbidden, GatewayError, RateLimited
from gateway.protocol import CloseCode


async def connect(websocket: WebSocket) -> None:
    gateway = services(websocket)
    try:
        check_origin(websocket)
    except Forbidden:
        await websocket.close()  # before the accept, so that the handshake is answered with 403
        return
    name: str = websocket.path_params["tenant"]
    try:
        raw = raw_token(websocket)
        if gateway.draining:
            await refuse(websocket, CloseCode.DRAINING, "draining")
            return
        token = None if raw is None else gateway.verify(raw)
        check_covered(token, name)
        if token is not None:
            await gateway.runtime.tenants.get(name)
    except GatewayError as error:
        await refuse(websocket, close_code(error), error.message)
        return
    try:
        await Connection(websocket, name, token, gateway, address(websocket)).run()
    except RateLimited as full:
        await refuse(websocket, CloseCode.TOO_MANY, full.message)


async def refuse(websocket: WebSocket, code: int, reason: str) -> None:
    """Close a websocket that is not to be served, with this code."""
    # browsers see the close code of accepted connections only
    offered = websocket.scope.get("subprotocols") or []
    await websocket.accept(protocol.SUBPROTOCOL if protocol.SUBPROTOCOL in offered else None)
    await websocket.close(code, reason[:100])


ROUTES: Final = (WebSocketRoute("/v1/tenants/{tenant}/ws", connect),)
