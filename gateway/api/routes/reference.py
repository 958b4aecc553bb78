"""Routes that describe the API: OpenAPI, the websocket's schema, and both as a page."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from gateway import protocol
from gateway.api import openapi
from gateway.api.operation import OPEN, Media, Operation

_HEADERS: Final = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


async def document(request: Request) -> Response:
    """Return this document: the HTTP API in OpenAPI 3.1."""
    return Response(orjson.dumps(await _document(request)), headers=_HEADERS, media_type="application/json")


async def wire(request: Request) -> Response:
    """Return the JSON Schema of the websocket's methods and notifications."""
    said = await asyncio.to_thread(protocol.wire_schema)
    return Response(orjson.dumps(said), headers=_HEADERS, media_type="application/schema+json")


async def page(request: Request) -> Response:
    """Return the HTTP API as a page to read."""
    text = await asyncio.to_thread(openapi.page, await _document(request))
    return HTMLResponse(text, headers={**_HEADERS, "Content-Security-Policy": openapi.POLICY})


async def _document(request: Request) -> dict[str, Any]:
    """Return the document of the application's routes, which is made only once, since that takes a while."""
    state = request.app.state
    if not hasattr(state, "openapi"):
        state.openapi = asyncio.ensure_future(asyncio.to_thread(openapi.document, request.app.routes))
    found: dict[str, Any] = await asyncio.shield(state.openapi)
    return found


ROUTES: Final = (
    Operation("/openapi.json", document, scope=OPEN, answers={200: Media("application/json")}),
    Operation("/wire.json", wire, scope=OPEN, answers={200: Media("application/schema+json")}),
    Operation("/reference", page, scope=OPEN, answers={200: Media("text/html", text=True)}),
)
