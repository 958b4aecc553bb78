"""A tenant's history over MCP: the turns as resources, as JSON and each as a patch, and a tool to undo one.

Imported only if the gateway serves MCP, like `gateway.api.mcp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import mcp_types as types
import orjson
from mcp.shared.exceptions import MCPError

from gateway.auth.tokens import Token
from gateway.errors import GatewayError
from gateway.history import History
from gateway.protocol import HistoryUndo, validate

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

UNDO: Final = types.Tool(
    name="UndoTurn",
    description=(
        "Takes back exactly what one turn changed in this project; what was changed later stays. The "
        f"resource {_LIST} lists the turns. Where later changes are of the same lines, nothing is changed, "
        "and the answer has the paths in `conflicts`; those repeated in `force` become what they were before "
        "the turn. The undo is a turn too, and can be undone."
    ),
    input_schema=HistoryUndo.model_json_schema(by_alias=True),
    annotations=types.ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False),
)


async def undo(
    history: History, tenant: str, token: Token, arguments: Mapping[str, Any]
) -> types.CallToolResult:
    """Take back a turn. Raises what `History.undo` raises, and `InvalidParams`."""
    token.require("files:write")
    given = validate(HistoryUndo, arguments)
    done = await history.undo(tenant, given.turn, given.force, token.subject)
    text = types.TextContent(text=orjson.dumps(done).decode())
    return types.CallToolResult(content=[text], structured_content=done)


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
