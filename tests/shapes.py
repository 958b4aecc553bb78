"""Holds what a live gateway answers against what it says of itself: OpenAPI, and the schema of the websocket.

Every answer and notification that a test meets is checked. A member that the schema does not name is a fault
here, though clients must ignore such.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import orjson
from jsonschema import Draft202012Validator
from starlette.routing import Match

from gateway import protocol
from gateway.api import openapi
from gateway.api.app import routes
from gateway.api.operation import ApiOperation

MOST: Final = 256 << 10  # bytes of an answer that is checked: a large one would take longer than its test


def closed(schema: Any) -> Any:
    """Return a schema in which every object has only the members that are named."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(one) for name, one in schema.items()}
    # the facts of an error stand beside its own members
    if "properties" in found and isinstance(found["properties"], dict) and schema.get("title") != "Problem":
        found.setdefault("additionalProperties", False)
    return found


@cache
def _wire() -> dict[str, Any]:
    return {**protocol.wire_schema(), "$defs": closed(protocol.wire_schema()["$defs"])}


@cache
def _validator(where: str, name: str, part: str) -> Draft202012Validator:
    schema = _wire()[where][name]
    return Draft202012Validator({**(schema[part] if part else schema), "$defs": _wire()["$defs"]})


def _check(validator: Draft202012Validator, value: Any, what: str) -> None:
    wrong = next(iter(validator.iter_errors(value)), None)
    assert wrong is None, f"{what} is not in the schema: {wrong.json_path}: {wrong.message[:500]}"


def check_result(method: str, result: Any, size: int) -> None:
    """Check the result of a method of the websocket; of one that there is none of there is nothing to say."""
    if method in protocol.METHODS and size <= MOST:
        _check(_validator("methods", method, "result"), result, f"the result of {method}")


def check_notification(notification: protocol.Notification) -> None:
    method = notification.method
    assert method in _wire()["notifications"], f"the notification {method} is not in the schema"
    _check(_validator("notifications", method, ""), notification.params, method)


@cache
def document() -> dict[str, Any]:
    return openapi.document(routes())


def operation(method: str, path: str) -> Mapping[str, Any] | None:
    """Return what the document says of a request, None if it is no operation."""
    scope = {"type": "http", "method": method, "path": path, "root_path": ""}
    for route in routes():
        if isinstance(route, ApiOperation) and route.matches(scope)[0] is Match.FULL:
            found: Mapping[str, Any] = document()["paths"][openapi.documented(route.path)]
            return found.get(route.method.lower())
    return None


@cache
def _answer(schema: bytes) -> Draft202012Validator:
    components = closed(document()["components"])
    return Draft202012Validator({**orjson.loads(schema), "components": components})


def check_answer(method: str, path: str, status: int, media: str, body: bytes) -> None:
    """Check an answer over HTTP: its status, its media type, and its JSON."""
    said = operation("GET" if method == "HEAD" else method, path)
    if said is None or len(body) > MOST or method == "HEAD":
        return
    what = f"{method} {path}: {status} {media}"
    response = said["responses"].get(str(status))
    if response is None:
        assert status >= 400, f"{what}: this status is not in the document"
        response = said["responses"]["default"]
    content = response.get("content", {})
    if not content:
        assert not body, f"{what}: a body where none is in the document"
        return
    media = media.partition(";")[0]
    assert media in content, f"{what}: this media type is not in the document: {body[:300]!r}"
    if media.endswith("json") and "schema" in content[media]:
        _check(_answer(orjson.dumps(content[media]["schema"])), orjson.loads(body), what)
