"""All that a client can send has its maximum in a schema, by which it is checked before anything else."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, ClassVar, Final

import h11
import pytest

from gateway import protocol
from gateway.api import openapi, preview
from gateway.api.app import routes
from gateway.errors import GatewayError, InvalidParams, TooLarge
from gateway.hostnames import host_allowed, normalized
from gateway.protocol import maxima
from gateway.runtime.incus import service_unit
from gateway.tools import shell
from gateway.tools.call import ToolFailure
from gateway.tools.schemas import TOOLS, check_size
from gateway.transport import http1

ROUTES: Final = routes()
DOCUMENT: Final = openapi.document(ROUTES)
WIRE: Final = protocol.wire_schema()
# what another schema describes: a tool's input `tools.schemas`, a message of MCP `protocol.McpMessage`
ELSEWHERE: Final = {
    "ws tools/call.arguments.*",
    "POST /v1/tenants/{tenant}/tools/{tool} body",
    "POST /v1/tenants/{tenant}/mcp body",
}


def deep(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = [{"a": value}]
    return value


def unbounded(schema: Any, where: str, definitions: Mapping[str, Any]) -> Iterator[str]:
    """Yield where a schema has a string, list or object without a maximum."""
    if where in ELSEWHERE:
        return
    if not isinstance(schema, dict) or not schema.keys() - {"title", "description", "default"}:
        yield f"{where} may be anything"
        return
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        others = {each: one for each, one in definitions.items() if each != name}  # it may contain itself
        yield from unbounded(definitions[name], where, others) if name in definitions else ()
        return
    if "enum" in schema or "const" in schema:
        return
    for several in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(several, ()):
            yield from unbounded(one, where, definitions)
        if several in schema:
            return
    match schema["type"]:
        case "string" if schema.get("format") == "binary":
            pass  # bytes are streamed, and counted as they come
        case "string" if "maxLength" not in schema:
            yield f"{where} has no maxLength"
        case "array":
            if "maxItems" not in schema:
                yield f"{where} has no maxItems"
            for one in schema.get("prefixItems", [schema.get("items", {})]):
                yield from unbounded(one, f"{where}[]", definitions)
        case "object":
            others = schema.get("additionalProperties", "properties" not in schema)
            if others and "maxProperties" not in schema:
                yield f"{where} has no maxProperties"
            if others:
                yield from unbounded(others, f"{where}.*", definitions)
            for name, one in schema.get("properties", {}).items():
                yield from unbounded(one, f"{where}.{name}", definitions)


def interfaces() -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield the schema of each input of each interface, with its name and the definitions it refers to."""
    for method, one in WIRE["methods"].items():
        yield f"ws {method}", one["params"], WIRE["$defs"]
    yield "ws cancel", WIRE["cancel"], WIRE["$defs"]
    schemas = DOCUMENT["components"]["schemas"]
    for path, methods in DOCUMENT["paths"].items():
        for method, one in methods.items():
            name = f"{method.upper()} {path}"
            for parameter in one["parameters"]:
                yield f"{name} {parameter['in']} {parameter['name']}", parameter["schema"], schemas
            for media in one.get("requestBody", {"content": {}})["content"].values():
                if media:  # else bytes, which are streamed
                    yield f"{name} body", media["schema"], schemas
    for tool, schema in TOOLS.items():
        yield f"tool {tool}", schema, {}
    mcp = protocol.McpMessage.model_json_schema()
    yield "MCP", mcp, mcp["$defs"]


def test_all_that_a_client_sends_has_a_maximum() -> None:
    found = [
        fault for name, schema, definitions in interfaces() for fault in unbounded(schema, name, definitions)
    ]
    assert found == []


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "string", "pattern": "^[a-z]*$"},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "string"}, "maxItems": 1},
        {"type": "array", "maxItems": 1},
        {"type": "object"},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object", "additionalProperties": True, "maxProperties": 1},
        {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False},
        {"anyOf": [{"type": "null"}, {"type": "string"}]},
        {"$ref": "#/$defs/Text"},
        {"default": None},
        {},
    ],
)
def test_what_has_no_maximum_is_found(schema: Any) -> None:
    assert list(unbounded(schema, "it", {"Text": {"type": "string"}}))


@pytest.mark.parametrize(
    "field",
    [
        {"id": "x" * 257},
        {"method": "x" * 257},
        {"params": {"x" * 257: 1}},
        {"params": {"_meta": {"progressToken": "é" * 65_537}}},
        {"params": {"clientInfo": {"icons": [{}] * 257}}},
        {"params": {"capabilities": {str(number): 1 for number in range(65)}}},
        {"params": {"cursor": deep(130)}},
        {"result": {"x": ["y" * 65_537]}},
    ],
)
def test_what_is_too_large_in_a_message_of_mcp_is_named(field: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams) as caught:
        protocol.validate(protocol.McpMessage, field)
    assert caught.value.facts["field"].startswith(next(iter(field))) and len(caught.value.message) < 1100


def refused(method: str, **params: Any) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        protocol.validate(protocol.METHODS[method], params)
    return caught.value


def test_a_refusal_names_the_field_and_never_carries_the_value() -> None:
    long = "é" * (maxima.CONTENT_MAX + 1)
    for method, params, field, kind in (
        ("files/stat", {"path": long}, "path", InvalidParams),
        ("files/write", {"path": "a", "text": long}, "text", TooLarge),
        ("exec/start", {"command": "x", "cwd": long}, "cwd", InvalidParams),
        ("exec/start", {"command": long}, "command", TooLarge),
        ("exec/start", {"argv": ["x", long]}, "argv.1", TooLarge),
        ("exec/start", {"command": "x", "env": {long: "x"}}, "env", InvalidParams),
        ("exec/start", {"command": "x", long: 1}, long[:100], InvalidParams),
        ("exec/signal", {"exec": "x", "signal": long}, "signal", InvalidParams),
        ("history/diff", {"turn": long}, "turn", InvalidParams),
    ):
        error = refused(method, **params)
        assert isinstance(error, kind) and error.facts["field"].startswith(field), error
        assert len(error.message) < 1000 and len(error.facts["field"]) < 1000
        if kind is TooLarge:
            assert error.facts["limit"] < len(long)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_sees_no_value_that_is_too_long(tool: str) -> None:
    for name, schema in TOOLS[tool]["properties"].items():
        if schema["type"] == "string" and "enum" not in schema:
            check_size(tool, {name: "x" * schema["maxLength"]})
            with pytest.raises(ToolFailure, match=name) as caught:
                check_size(tool, {name: "x" * (schema["maxLength"] + 1)})
            assert caught.value.facts["field"] == name and len(caught.value.words) < 200
    with pytest.raises(InvalidParams, match="at most 256"):
        check_size(tool, {"more": [[]] * 300})


# --- what is worked on in the loop costs little, whatever it is ------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of some work, of three attempts the best: other processes take their part."""

    def once() -> float:
        before = time.thread_time()
        with contextlib.suppress(GatewayError, ValueError):
            work()
        return time.thread_time() - before

    return min(once() for _ in range(3))


ODD: Final = (
    *("x", "x ", "\n", "'", "''", '"', "\\", "a='", "A=1;", '"\\', "é", "ﷺ", ".", "[", "#\n"),
    'A="\\"',
)


@pytest.mark.parametrize("piece", ODD)
def test_a_long_command_is_not_judged_for_long(piece: str) -> None:
    """Which program it ends with; the shell's own lexer took time by the square of a word's length."""
    for length in (16 << 10, maxima.ARGUMENT_MAX):
        command = (piece * length)[:length]
        assert seconds(lambda command=command: shell.interpretation(command, 1)) < 0.05  # type: ignore[misc]


@pytest.mark.parametrize("piece", ODD)
def test_a_host_is_not_looked_at_for_long(piece: str) -> None:
    """Anybody can send one. Browsers send names in ASCII, and IDNA takes long for others."""
    host = (piece * 15_000)[:15_000].strip()
    assert seconds(lambda: host_allowed(host, {"gateway.example"}, near=False)) < 0.005
    assert seconds(lambda: normalized(host)) < 0.005
    assert seconds(lambda: normalized(host[:253])) < 0.05


@pytest.mark.parametrize("chunk", [b"1\r\na\r\n", b"1;a\r\na\r\n", b"0001\r\na\r\n"])
def test_a_body_in_tiny_chunks_is_not_worked_on_for_long(chunk: bytes) -> None:
    """Anybody can send one, and a read has thousands: the rest is for later turns of the loop."""
    read = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 40_000

    def turn() -> None:
        connection = http1._Http()
        connection.receive_data(read)
        while connection.next_event() not in (h11.NEED_DATA, h11.PAUSED):
            pass

    assert seconds(turn) < 0.05


@pytest.mark.parametrize("piece", ODD)
def test_the_environment_of_a_site_is_not_read_for_long(piece: str) -> None:
    text = (piece * (288 << 10))[: 288 << 10]
    assert seconds(lambda: service_unit.environment_of(text)) < 0.1
    assert seconds(lambda: service_unit.environment_of(f'A="{text}"')) < 0.1
    assert seconds(lambda: service_unit.recipe_of(text.encode())) < 0.05


def test_an_environment_with_empty_lines_and_comments_is_read() -> None:
    env = {"A": 'x"y\\z$`\n', "B": "", "C": "plain é"}
    text = f"# c\n\n{service_unit.environment_file(env)}\n ; d\nD= x y \nE='l\"it'"
    assert service_unit.environment_of(text) == {**env, "D": "x y", "E": 'l"it'}
    for wrong in ("x", "A", 'A="', "A=1\nB", "A=1\n" * 5000):
        with pytest.raises(ValueError, match="not an environment file"):
            service_unit.environment_of(wrong)


@pytest.mark.parametrize("piece", [b"<head ", b"<head", b"<", b"<head x>"[:-1] + b"\n", b">", b" ", b"<p>"])
async def test_a_page_that_comes_in_pieces_is_not_searched_for_long(piece: bytes) -> None:
    """A tenant's site chooses both, while its neighbours wait."""
    page = (piece * (64 << 10))[: 64 << 10]

    class Answer:
        headers: ClassVar = {"Content-Encoding": "identity"}
        content_type, charset = "text/html", "utf-8"

        def __init__(self) -> None:
            self.content = asyncio.StreamReader()
            self.pieces = [page[at : at + 1024] for at in range(0, len(page), 1024)]
            self.content.read = self.read  # type: ignore[method-assign,assignment]
            self.content.iter_chunked = lambda size: self.rest()  # type: ignore[attr-defined]

        async def read(self, size: int) -> bytes:
            return self.pieces.pop(0) if self.pieces else b""

        async def rest(self) -> AsyncIterator[bytes]:
            while self.pieces:
                yield self.pieces.pop(0)

    before = time.thread_time()
    answer: Any = Answer()
    shown = b"".join([part async for part in preview._body(answer, "http://editor.localhost")])
    assert time.thread_time() - before < 0.1
    assert shown.count(b"<script>") == 1 and len(shown) > len(page)
