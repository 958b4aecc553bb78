"""The HTTP API as an OpenAPI 3.1 document, made from the operations and their models, and as a page to read.

The page is plain HTML without scripts or external resources.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode
from starlette.routing import BaseRoute

from gateway import __version__
from gateway.api.answers import Problem
from gateway.api.operation import ANY, OF_TOOL, OPEN, ApiOperation, Media
from gateway.auth import tokens
from gateway.protocol import maxima

PROBLEM: Final = "application/problem+json"
_REF: Final = "#/components/schemas/{model}"
_PARAMETER: Final = re.compile(r"\{(\w+)(?::\w+)?\}")

_SHORT: Final[dict[str, Any]] = {"type": "string", "minLength": 1, "maxLength": maxima.ID_MAX}
_HEADER: Final[dict[str, Any]] = {"type": "string", "maxLength": maxima.HEADER_MAX}
_PATH: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "tenant": (
        "A tenant's name.",
        {"type": "string", "maxLength": maxima.NAME_MAX, "pattern": "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"},
    ),
    "deployment": ("A deployment's id.", _SHORT),
    "snapshot": ("A snapshot's name.", _SHORT),
    "turn": (
        "A turn: 40 hexadecimal digits.",
        {"type": "string", "maxLength": 40, "pattern": "^[0-9a-f]{40}$"},
    ),
    "tool": ("A tool, such as `Read`.", _SHORT),
    "path": (
        "A path relative to the workspace.",
        {"type": "string", "minLength": 1, "maxLength": maxima.PATH_MAX},
    ),
}
_ON: Final[dict[str, Any]] = {"type": "string", "enum": ["0", "1", "false", "true"]}
_HEADERS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "Idempotency-Key": ("An id of the caller's: requests with the same id are done once.", _SHORT),
    "X-Tool-Session": ("Names the tool session.", {"type": "string", "minLength": 1, "maxLength": 128}),
    "X-Read-Before-Write": ("Refuse to write files that the session has not read.", _ON),
    "X-Call-Linger": (
        "Milliseconds that a call outlives its connection.",
        {"type": "string", "maxLength": 15, "pattern": "^[0-9]{1,15}$"},
    ),
    "X-Session-Slot": (
        "Which of a browser's sessions is meant.",
        {"type": "string", "maxLength": 32, "pattern": "^[a-z0-9]{1,32}$"},
    ),
    "If-Match": ("Only if the file has this etag.", _HEADER),
    "If-None-Match": ("Only if the file does not have this etag; `*` means any file.", _HEADER),
    "Range": ("One range of bytes.", {"type": "string", "maxLength": maxima.HEADERS["range"]}),
    "Last-Event-ID": ("Continue after this event.", _HEADER),
}


class _Models:
    """The types of a document, each described once."""

    def __init__(self, types: Iterable[tuple[Any, JsonSchemaMode]]) -> None:
        adapters = [(str(number), mode, TypeAdapter(kind)) for number, (kind, mode) in enumerate(types)]
        self._keys = {(_key(kind), mode): str(number) for number, (kind, mode) in enumerate(types)}
        found, definitions = TypeAdapter.json_schemas(adapters, ref_template=_REF)
        self._found = {key: value for (key, _), value in found.items()}
        self.schemas: dict[str, Any] = _for_generators(definitions.get("$defs", {}))

    def of(self, kind: Any, mode: JsonSchemaMode) -> dict[str, Any]:
        return self._found[self._keys[_key(kind), mode]]


def _for_generators(schema: Any) -> Any:
    """Return a schema without defaults that are no value of it: generators of clients stumble over these.

    What may be left out has the model's null as its default, and a switch a boolean for its words.
    """
    if isinstance(schema, list):
        return [_for_generators(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: _for_generators(value) for name, value in schema.items()}
    match kept:
        case {"default": None, "anyOf": _}:
            del kept["default"]
        case {"default": bool(on), "enum": _}:
            kept["default"] = str(on).lower()
    return kept


def _key(kind: Any) -> str:
    return repr(kind)


def document(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """Return the OpenAPI document of the operations among `routes`."""
    operations = [route for route in routes if isinstance(route, ApiOperation)]
    models = _Models(list(_types(operations)))
    paths: dict[str, dict[str, Any]] = {}
    for one in operations:
        described = _described(one, models)
        if sum(other.function is one.function for other in operations) > 1:
            described["operationId"] += f".{one.method.lower()}"
        paths.setdefault(documented(one.path), {})[one.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "incus-gateway",
            "version": __version__,
            "description": "A tenant's websocket is `/v1/tenants/{tenant}/ws`; `/wire.json` is its schema.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": models.schemas,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                "session": {"type": "apiKey", "in": "cookie", "name": tokens.cookie_name(None, secure=False)},
            },
        },
    }


def documented(path: str) -> str:
    """Return a route's path as written in the document."""
    return _PARAMETER.sub(r"{\1}", path)


def _types(operations: Iterable[ApiOperation]) -> Iterator[tuple[Any, JsonSchemaMode]]:
    yield Problem, "serialization"
    for one in operations:
        for kind in (one.takes, one.query):
            if kind is not None and not isinstance(kind, Media):
                yield kind, "validation"
        for kind in one.answers.values():
            if kind is not None and not isinstance(kind, Media | tuple):
                yield kind, "serialization"


def _described(one: ApiOperation, models: _Models) -> dict[str, Any]:
    summary, _, more = inspect.cleandoc(one.function.__doc__ or "").partition("\n")
    described: dict[str, Any] = {
        "operationId": f"{one.tag}.{one.function.__name__}",
        "tags": [one.tag],
        "summary": summary.rstrip("."),
        "description": "\n\n".join(part for part in (" ".join(more.split()), _scope(one)) if part),
        "parameters": list(_parameters(one, models)),
        "responses": {str(status): _response(kind, models) for status, kind in one.answers.items()},
    }
    if one.takes is not None:
        content = _content(one.takes, models, "validation")
        described["requestBody"] = {"content": content, "required": not one.optional}
    error = {PROBLEM: {"schema": models.of(Problem, "serialization")}}
    if one.errors is not None:
        error |= _content(one.errors, models, "serialization")
    described["responses"]["default"] = {"description": "What went wrong, and what to do.", "content": error}
    if one.required == OPEN:
        described["security"] = []
    return described


def _scope(one: ApiOperation) -> str:
    match one.required:
        case scope if scope == OPEN:
            return "Needs no token."
        case scope if scope == ANY:
            return "Needs a token, with any scopes."
        case scope if scope == OF_TOOL:
            return "Needs the scope of the tool."
        case scope:
            return f"Needs the scope `{scope}`."


def _parameters(one: ApiOperation, models: _Models) -> Iterator[dict[str, Any]]:
    for name in _PARAMETER.findall(one.path):
        told, schema = _PATH.get(name, ("", {"type": "string"}))
        yield {"name": name, "in": "path", "required": True, "description": told, "schema": schema}
    if one.query is not None:
        schema = models.of(one.query, "validation")
        fields = models.schemas[schema["$ref"].rpartition("/")[2]]["properties"]
        for name, field in fields.items():
            yield {"name": name, "in": "query", "required": False, "schema": _without_null(field)}
    for name in one.headers:
        told, schema = _HEADERS[name]
        yield {"name": name, "in": "header", "required": False, "description": told, "schema": schema}


def _without_null(field: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a query's member, which is left out where the model has null."""
    kept = {name: value for name, value in field.items() if name not in ("default", "title", "anyOf")}
    some = [one for one in field.get("anyOf", ()) if one.get("type") != "null"]
    return {**kept, **(some[0] if some else {})}


def _response(kind: Any, models: _Models) -> dict[str, Any]:
    if kind is None:
        return {"description": "Done."}
    told = "Done." if isinstance(kind, Media | tuple) else (inspect.cleandoc(kind.__doc__ or "") or "Done.")
    return {"description": " ".join(told.split()), "content": _content(kind, models, "serialization")}


def _content(kind: Any, models: _Models, mode: JsonSchemaMode) -> dict[str, Any]:
    if isinstance(kind, tuple):
        return {name: said for one in kind for name, said in _content(one, models, mode).items()}
    if isinstance(kind, Media):
        return {kind.type: {"schema": _of_media(kind)}}
    return {"application/json": {"schema": models.of(kind, mode)}}


def _of_media(kind: Media) -> dict[str, Any]:
    """Return the schema of a body that no model describes: text, JSON of any kind, or bytes."""
    if kind.text:
        return {"type": "string"}
    # not 3.1's `contentMediaType`: by `format` every generator knows a file
    return {} if kind.type.endswith("json") else {"type": "string", "format": "binary"}


# --- the page ------------------------------------------------------------------------------------------


_STYLE: Final = Path(__file__).with_name("reference.css").read_text()
_DIGEST: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        f"style-src 'sha256-{_DIGEST}'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The Content-Security-Policy of the page."""


def page(document: Mapping[str, Any]) -> str:
    """Return the whole page."""
    title = escape(f"{document['info']['title']} {document['info']['version']}: HTTP API")
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n<main>\n<h1>{title}</h1>\n"
        '<p>For programs: <a href="/openapi.json">OpenAPI 3.1</a>, and the websocket\'s '
        '<a href="/wire.json">JSON Schema</a>.</p>\n'
        f"{body(document)}</main>\n</html>\n"
    )


def body(document: Mapping[str, Any]) -> str:
    """Return the operations and models as HTML, with headings from the second level on."""
    return "\n".join((*_operations(document), *_models(document))) + "\n"


def _operations(document: Mapping[str, Any]) -> Iterator[str]:
    by_tag: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = defaultdict(list)
    for path, methods in document["paths"].items():
        for method, one in methods.items():
            by_tag[one["tags"][0]].append((path, method, one))
    for tag, operations in by_tag.items():
        yield f"<h2>{escape(tag.capitalize())}</h2>"
        for path, method, one in operations:
            yield f'<h3 id="{escape(one["operationId"])}"><code>{method.upper()} {escape(path)}</code></h3>'
            yield f"<p>{_words(one['summary'])}. {_words(one['description'])}</p>"
            yield from _takes(one)
            yield "<p>Answers:</p>\n<table>"
            for status, response in one["responses"].items():
                kinds = " or ".join(_media(kind, said) for kind, said in response.get("content", {}).items())
                yield f"<tr><td>{escape(status)}<td>{kinds}<td>{_words(response['description'])}"
            yield "</table>"


def _takes(one: Mapping[str, Any]) -> Iterator[str]:
    if one["parameters"]:
        yield "<p>Takes:</p>\n<table>"
        for parameter in one["parameters"]:
            yield (
                f"<tr><td><code>{escape(parameter['name'])}</code><td>{escape(parameter['in'])}"
                f"<td>{_type(parameter['schema'])}<td>{_words(parameter.get('description', ''))}"
            )
        yield "</table>"
    if "requestBody" in one:
        body = one["requestBody"]
        kinds = " or ".join(_media(kind, said) for kind, said in body["content"].items())
        yield f"<p>The body{'' if body['required'] else ', which may be left out'}: {kinds}.</p>"


def _models(document: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Models</h2>"
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield f'<h3 id="model-{escape(name)}">{escape(name)}</h3>'
        yield f"<p>{_words(schema.get('description', ''))}</p>\n<table>"
        for member, one in schema.get("properties", {}).items():
            needed = "" if member in schema.get("required", ()) else "optional"
            yield f"<tr><td><code>{escape(member)}</code><td>{_type(one)}<td>{needed}"
        yield "</table>"


def _media(kind: str, said: Mapping[str, Any]) -> str:
    shown = f"<code>{escape(kind)}</code>"
    return f"{_type(said['schema'])} ({shown})" if "$ref" in said.get("schema", {}) else shown


def _type(schema: Mapping[str, Any]) -> str:
    """Return a type in one line."""
    match schema:
        case {"$ref": str(where)}:
            name = where.rpartition("/")[2]
            return f'<a href="#model-{escape(name)}">{escape(name)}</a>'
        case {"anyOf": list(some)}:
            return " or ".join(_type(one) for one in some)
        case {"const": value}:
            return f"<code>{escape(str(value))}</code>"
        case {"enum": list(values)}:
            return ", ".join(f"<code>{escape(str(value))}</code>" for value in values)
        case {"type": "array"}:
            return f"list of {_type(schema.get('items', {}))}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"object of {_type(values)}"
        case {"type": str(kind)}:
            return escape(kind)
        case _:
            return "anything"


def _words(text: str) -> str:
    """Return text as HTML, with `code` marked up."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
