"""Routes of a tenant's single files: raw bytes both ways, with conditions as in RFC 9110."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.api.access import check_live, queried, using_tenant
from gateway.api.answers import RemovalQuery
from gateway.api.http import as_json, file_path
from gateway.api.operation import Media, Operation
from gateway.api.services import services
from gateway.errors import Conflict
from gateway.files import http
from gateway.protocol.results import FileWritten


async def get(request: Request) -> Response:
    """Return the bytes of a file, or one range of them."""
    gateway = services(request)
    name, _ = await using_tenant(request, "files:read")
    async with contextlib.AsyncExitStack() as stack:
        source = await stack.enter_async_context(gateway.files.read(name, file_path(request)))
        return http.Sending(request, source, stack, gateway.settings.transfer_stall)


async def put(request: Request) -> Response:
    """Store the body as a file, atomically once its last byte has arrived."""
    gateway = services(request)
    name, token = await using_tenant(request, "files:write")
    settings, path = gateway.settings, file_path(request)
    conditions = http.conditions(request.headers)
    still = partial(check_live, request, token)
    body = http.received(request, settings.upload_max, settings.transfer_stall, still)
    try:
        result = await gateway.files.write(name, path, body, conditions, by=token.subject)
    except Conflict as error:
        raise http.failed_condition(error) from None
    response = as_json(result)
    response.status_code = 201 if result["created"] else 200
    response.headers["ETag"] = f'"{result["etag"]}"'
    return response


async def delete(request: Request) -> Response:
    """Remove a file, a link itself, or a folder."""
    name, token = await using_tenant(request, "files:write")
    recursive = queried(request, RemovalQuery).recursive
    given = {"path": file_path(request), "recursive": recursive, **http.conditions(request.headers)}
    try:
        await services(request).files.call(name, "files/remove", given, by=token.subject)
    except Conflict as error:
        raise http.failed_condition(error) from None
    return Response(status_code=204)


_PATH: Final = "/v1/tenants/{tenant}/files/{path:any}"
_BYTES: Final = Media("application/octet-stream")
_CONDITIONS: Final = ("If-Match", "If-None-Match")

ROUTES: Final = (
    Operation(
        _PATH,
        get,
        scope="files:read",
        headers=("Range", *_CONDITIONS),
        answers={200: _BYTES, 206: _BYTES, 304: None},
    ),
    Operation(
        _PATH,
        put,
        "PUT",
        scope="files:write",
        takes=_BYTES,
        headers=_CONDITIONS,
        answers={201: FileWritten, 200: FileWritten},
    ),
    Operation(
        _PATH,
        delete,
        "DELETE",
        scope="files:write",
        query=RemovalQuery,
        headers=_CONDITIONS,
        answers={204: None},
    ),
)
