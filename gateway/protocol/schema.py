"""The protocol as JSON Schema: parameters and results of every method, and the server's notifications."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from gateway.protocol.params import METHODS, CancelRequest
from gateway.protocol.results import NOTIFICATIONS, RESULTS
from gateway_client.wire import SUBPROTOCOL

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


@cache
def wire_schema() -> dict[str, Any]:
    """Return the schema of `gateway.v1`.

    `methods` has `params` and `result` of each request, `notifications` the parameters of the server's, and
    `cancel` those of the client's cancel. `$defs` has the types that they refer to.
    """
    wanted: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = []
    for method, model in METHODS.items():
        wanted.append((f"{method} params", "validation", TypeAdapter(model)))
        wanted.append((f"{method} result", "serialization", TypeAdapter(RESULTS[method])))
    for name, shape in NOTIFICATIONS.items():
        wanted.append((f"{name} told", "serialization", TypeAdapter(shape)))
    wanted.append(("cancel", "validation", TypeAdapter(CancelRequest)))
    found, definitions = TypeAdapter.json_schemas(wanted)
    of = {key: value for (key, _), value in found.items()}
    return {
        "$schema": _DIALECT,
        "title": SUBPROTOCOL,
        "methods": {
            method: {"params": of[f"{method} params"], "result": of[f"{method} result"]} for method in METHODS
        },
        "notifications": {name: of[f"{name} told"] for name in NOTIFICATIONS},
        "cancel": of["cancel"],
        "$defs": definitions["$defs"],
    }
