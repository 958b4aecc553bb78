"""The OpenAPI document as a page to read: plain HTML without scripts or external resources."""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, Final

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
