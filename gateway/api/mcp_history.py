"""A tenant's history as MCP resources: the turns as JSON, and each turn as a patch.

Imported only if the gateway serves MCP, like `gateway.api.mcp`.
"""

from __future__ import annotations

from typing import Final

import mcp_types as types
import orjson
from mcp.shared.exceptions import MCPError

from gateway.auth.tokens import Token
from gateway.errors import GatewayError
from gateway.history import History

_LIST: Final = "history:///turns"
_TURN: Final = "history:///turns/"

# fixed, since a client may request the list at each connection, and no git should run for that
RESOURCES: Final = types.ListResourcesResult(
    resources=[
        types.Resource(
            name="turns",
            title="Turns",
            uri=_LIST,
            description="What agents changed in this project, turn by turn, latest first.",
            mime_type="application/json",
        )
    ]
)
TEMPLATES: Final = types.ListResourceTemplatesResult(
    resource_templates=[
        types.ResourceTemplate(
            name="turn",
            title="Turn",
            uri_template=f"{_TURN}{{turn}}",
            description="What one turn changed, as a patch.",
            mime_type="text/x-diff",
        )
    ]
)


async def read(history: History, tenant: str, token: Token, uri: str) -> types.ReadResourceResult:
    """Return a resource. Raises `MCPError`."""
    try:
        token.require("files:read")
        if uri == _LIST:
            text, kind = orjson.dumps(await history.turns(tenant)).decode(), "application/json"
        elif uri.startswith(_TURN):
            shown = await history.changes(tenant, uri.removeprefix(_TURN))
            text, kind = f"{shown['title']}\n\n{shown['diff']}", "text/x-diff"
        else:
            raise MCPError(
                types.INVALID_PARAMS, f"no resource {uri[:200]}; there are {_LIST} and {_TURN}TURN"
            )
    except GatewayError as error:
        raise MCPError(types.INVALID_PARAMS, error.message, {**error.facts, "code": error.code}) from None
    return types.ReadResourceResult(contents=[types.TextResourceContents(uri=uri, mime_type=kind, text=text)])
