"""Nothing that a client sends holds up the event loop, however long, deep or odd it is.

What is sent is made of the gateway's own schemas, so a new field is covered by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
from websockets.exceptions import ConnectionClosed

from gateway.protocol import METHODS, McpMessage
from gateway.tools.schemas import TOOLS
from tests import lag, neighbour, thorough
from tests.live import LiveGateway, RpcFailure, local_gateway
from tests.unit.test_edge import DOCUMENT, WIRE, deep

LARGE: Final = 192 << 10  # characters, beyond most maxima; what is quadratic takes seconds for them
LARGEST: Final = 15 << 20  # bytes of a message, just below what a message and a body may have
UNKNOWN: Final = 128 << 10  # characters where a schema names no maximum
LONG: Final = 0.1  # seconds that the loop may be held up at most on a calm machine
USUAL: Final = 0.05  # and in 99 of 100 cases
CALM: Final = 0.045  # seconds of CPU that `yardstick` takes there


_KINDS: Final = ("x", "x ", "\n", "'", "[(", "é", '"a', "\\", "/a", "..", "a,", "\x01", "*", "%")
_turns = itertools.count()


def filled(length: int) -> Iterator[str]:
    """Yield texts of a length, each of a kind that something finds hard.

    Each field gets a few kinds of them, the next field the next few; `tests/run thorough` gives all to each.
    """
    first = next(_turns) * 3
    for number in range(len(_KINDS) if thorough.ALL else 3):
        piece = _KINDS[(first + number) % len(_KINDS)]
        yield (piece * (length // len(piece) + 1))[:length]
    yield "x" * (length - 1) + "😀"  # four bytes for each character


def plain(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    """Return a small value that a schema allows, for the fields that are not tried."""
    match schema:
        case {"$ref": str(where)}:
            return plain(definitions.get(where.rpartition("/")[2], {}), definitions)
        case {"anyOf": [first, *_]} | {"oneOf": [first, *_]}:
            return plain(first, definitions)
        case {"enum": [first, *_]} | {"const": first}:
            return first
        case {"type": "string", "pattern": "^[0-9a-f]{40}$"}:
            return "0" * 40
        case {"type": "string"}:
            return "a"
        case {"type": "integer" | "number"}:
            return 1
        case {"type": "boolean"}:
            return False
        case {"type": "array", "items": items}:
            return [plain(items, definitions)]
        case {"type": "object", "properties": fields}:
            return {name: plain(fields[name], definitions) for name in schema.get("required", ())}
        case _:
            return {}


def nasty(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[Any]:
    """Yield values for a field: the largest that its schema allows, larger ones, and some of other kinds."""
    match schema:
        case {"$ref": str(where)}:
            name = where.rpartition("/")[2]  # which may contain itself
            inside = {each: one for each, one in definitions.items() if each != name}
            yield from nasty(definitions[name], inside) if name in definitions else (deep(100),)
        case {"anyOf": several} | {"oneOf": several}:
            for one in several:
                yield from nasty(one, definitions)
        case {"type": "string"} if "enum" not in schema and "const" not in schema:
            most = schema.get("maxLength", UNKNOWN)
            yield from filled(min(most, LARGE))
            yield from itertools.islice(filled(LARGE), 0, None, 5) if most < LARGE else ()
            yield deep(100)
        case {"type": "array", "items": items}:
            most = schema.get("maxItems", UNKNOWN)
            for value in itertools.islice(nasty(items, definitions), 0, None, 4):
                size = len(value) if isinstance(value, str) else 4000
                yield [value] * max(1, min(most, LARGE // size))
            yield [plain(items, definitions)] * most
            yield ["a"] * 150_000
        case {"type": "object", "properties": fields}:
            for name, one in fields.items():
                for value in nasty(one, definitions):
                    yield {**plain(schema, definitions), name: value}
        case {"type": "object"}:
            most = schema.get("maxProperties", UNKNOWN)
            for text in itertools.islice(filled(LARGE // most or 1), 0, None, 5):
                yield {f"{number}{text}"[: max(1, len(text))]: text for number in range(most)}
            yield {str(number): "a" for number in range(75_000)}
            yield {"x" * LARGE: "a"}
            yield deep(100)
        case {"type": "null" | "boolean"}:
            pass
        case _:
            yield 1 << 62
            yield -1.5e300


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to send: a websocket's message, its frames as bytes, or the bytes of an HTTP request."""

    name: str
    message: str | bytes

    @property
    def size(self) -> int:
        return len(self.message)


def messages() -> Iterator[Case]:
    """Yield messages for the websocket: each method with each of its fields, and each tool."""
    numbers = itertools.count(1000)

    def of(name: str, method: str, params: Any) -> Case:
        call = {"jsonrpc": "2.0", "id": next(numbers), "method": method, "params": params}
        return Case(name, orjson.dumps(call).decode())

    for method in METHODS:
        if method in ("session/end",):
            continue
        schema = WIRE["methods"][method]["params"]
        for params in nasty(schema, WIRE["$defs"]):
            yield of(method, method, params)
        yield of(method, method, {"x" * LARGE: 1})
        yield of(method, method, deep(100))
    for tool, schema in TOOLS.items():
        for given in nasty(schema, {}):
            yield of(tool, "tools/call", {"name": tool, "arguments": given})
        yield of(tool, "tools/call", {"name": tool, "arguments": {"x" * LARGE: "y" * LARGE}})
        yield of(tool, "tools/call", {"name": tool, "arguments": {"file_path": [["x"] * 1000] * 100}})
    path = {"name": "Write", "arguments": {"file_path": "x" * (LARGEST - 10) + "😀", "content": ""}}
    yield of("a message with a path of 15 MiB", "tools/call", path)
    edit = {
        "file_path": "f",
        "old_string": "x" * (LARGEST // 2),
        "new_string": "x" * (LARGEST // 2 - 99) + "😀",
    }
    yield of("a message with an Edit of 15 MiB", "tools/call", {"name": "Edit", "arguments": edit})
    yield of("a message with a cwd of 15 MiB", "exec/start", {"argv": ["true"], "cwd": "é" * (LARGEST // 2)})
    yield of(
        "a message of 190 000 values", "tools/call", {"name": "Read", "arguments": {"a": ["a"] * 190_000}}
    )
    yield Case("a message of nothing but brackets", "[" * LARGEST)
    yield Case(
        "a deep message",
        '{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": ' + '{"a":[' * 500 + "]}" * 500 + "}",
    )
    yield Case("a message that is no JSON", "\\u0000" * (LARGEST // 6))
    for what, frame in (
        ("pings", b"\x89\x80\0\0\0\0"),
        ("pongs", b"\x8a\x80\0\0\0\0"),
        ("tiny messages", b"\x81\x81\0\0\0\0x"),
        ("empty messages", b"\x82\x80\0\0\0\0"),
    ):
        yield Case(what, frame * (LARGE // len(frame)))
    yield Case("a message in many frames", b"\x01\x80mask" + b"\x00\x80mask" * (LARGE // 6) + b"\x80\x80mask")


def requests(token: str) -> Iterator[Case]:
    """Yield HTTP requests: each operation with each of its parameters and fields, MCP's methods, heads."""

    def of(name: str, method: str, target: str, body: Any = None, **headers: str) -> Case:
        content = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
        head = {"Host": "127.0.0.1", "Authorization": f"Bearer {token}", "Accept": "application/json"}
        head |= {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "Connection": "close",
        }
        head |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{key}: {value}\r\n" for key, value in head.items())
        return Case(name, f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1", "replace") + content)

    def words(schema: Mapping[str, Any], length: int) -> Iterator[str]:
        yield from filled(min(schema.get("maxLength", length), length))

    schemas = DOCUMENT["components"]["schemas"]
    for path, methods in DOCUMENT["paths"].items():
        for method, one in methods.items():
            name, verb = f"{method.upper()} {path}", method.upper()
            target = path.replace("{tenant}", "demo").replace("{tool}", "Read").replace("{turn}", "0" * 40)
            safe = verb == "GET" or "{path}" in path
            for parameter in one["parameters"]:
                for text in words(parameter["schema"], 12 << 10):
                    quoted = "".join(f"%{byte:02x}" for byte in text.encode()[: 4 << 10])
                    match parameter["in"]:
                        case "path":
                            where = path.replace(f"{{{parameter['name']}}}", quoted)
                            yield of(name, verb, where.replace("{tenant}", "demo"))
                        case "query" if safe:
                            yield of(name, verb, f"{target}?{parameter['name']}={quoted}")
                        case "header" if safe:
                            line = text.replace("\n", "\t").replace("\x01", "\t").strip()
                            yield of(name, verb, target, None, **{parameter["name"]: line})
            for media, content in one.get("requestBody", {"content": {}})["content"].items():
                if media == "application/json" and "{tool}" not in path and not path.endswith("/mcp"):
                    for body in nasty(content["schema"], schemas):
                        yield of(name, verb, target, body)
                    yield of(name, verb, target, {"x" * LARGE: deep(100)})
                    yield of(name, verb, target, b"[" * LARGE)
    for tool, schema in TOOLS.items():
        for given in itertools.islice(nasty(schema, {}), 0, None, 3):
            yield of(f"POST tools/{tool}", "POST", f"/v1/tenants/demo/tools/{tool}", given)
            call = {
                "jsonrpc": "2.0",
                "id": 1,
                "method": "tools/call",
                "params": {"name": tool, "arguments": given},
            }
            both = "application/json, text/event-stream"
            yield of(f"MCP {tool}", "POST", "/v1/tenants/demo/mcp", call, Accept=both)
    schema = McpMessage.model_json_schema()
    for method in ("initialize", "tools/list", "resources/read", "ping", "notifications/cancelled"):
        for value in ("x" * LARGE, ["a"] * 150_000, deep(100), {"uri": "history:///turns/" + "é" * LARGE}):
            message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": value}
            yield of(f"MCP {method}", "POST", "/v1/tenants/demo/mcp", message, Accept=both)
        for field in ("_meta", "clientInfo", "cursor", "uri", "name"):
            for value in itertools.islice(nasty(schema["$defs"]["McpValue"], {}), 0, None, 3):
                message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {field: value}}
                yield of(f"MCP {method}", "POST", "/v1/tenants/demo/mcp", message, Accept=both)
    for value in nasty(schema, schema["$defs"]):
        yield of("MCP", "POST", "/v1/tenants/demo/mcp", {"jsonrpc": "2.0", **value}, Accept=both)
    nested = (
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":'
        + b'[{"a":' * 500
        + b"0"
        + b"}]" * 500
        + b"}}"
    )
    yield of("MCP, a deep message", "POST", "/v1/tenants/demo/mcp", nested, Accept=both)
    write = {"file_path": "x" * (LARGEST - 99) + "😀", "content": "a"}
    call = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "Write", "arguments": write},
    }
    yield of("MCP, a path of 15 MiB", "POST", "/v1/tenants/demo/mcp", call, Accept=both)
    yield of("POST Write, a path of 15 MiB", "POST", "/v1/tenants/demo/tools/Write", write)
    yield of(
        "POST exec, a cwd of 15 MiB",
        "POST",
        "/v1/tenants/demo/exec",
        {"argv": ["true"], "cwd": "é" * (LARGEST // 2)},
    )
    for hosts in ("é" * 15_000, "x." * 7_500, "." * 15_000, "[" * 15_000, "ﷺ" * 5_000, "é" * 253):
        yield of("a Host", "GET", "/healthz", Host=hosts.encode().decode("latin-1"))
        yield of("a Host", "GET", "/v1/preview", Host=hosts.encode().decode("latin-1"))
    for header in (
        "Origin",
        "Cookie",
        "Authorization",
        "X-Forwarded-For",
        "X-Forwarded-Proto",
        "X-Request-Id",
        "Range",
    ):
        for text in (";" * 60_000, "a=b;" * 15_000, "http://" + "é" * 25_000, "1," * 30_000, "[::" * 20_000):
            yield of(
                f"the header {header}",
                "GET",
                "/v1/tenants",
                None,
                **{header: text.encode().decode("latin-1")},
            )
    for header in ("a:", "a:b", "cookie:gateway_session=a", "x-forwarded-for:1", "if-match:a"):
        lines = f"{header}\r\n" * (240_000 // (len(header) + 2))
        yield Case("many headers", f"GET /v1/tenants HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
    for chunk in (b"1\r\na\r\n", b"1;" + b"a" * 99 + b"\r\na\r\n"):
        body, coded = chunk * ((2 << 20) // len(chunk)), {"Transfer-Encoding": "chunked"}
        for path in ("/v1/session", "/v1/tenants/demo/tools/Read", "/v1/tenants/demo/files/chunked"):
            head = of("", "PUT" if "files" in path else "POST", path, **coded).message
            assert isinstance(head, bytes)
            yield Case(
                "a body in tiny chunks", head.replace(b"Content-Length: 0\r\n", b"") + body + b"0\r\n\r\n"
            )
    for query in ("a&" * 30_000, "slot=%41&" * 6_000, "&" * 60_000, "%" * 60_000):
        yield of("a query", "GET", f"/v1/tenants?{query}")
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        upgrade["Sec-WebSocket-Key"] = "MDEyMzQ1Njc4OWFiY2RlZg=="
        yield of("a query", "GET", f"/v1/tenants/demo/ws?{query}", **upgrade)
    yield of("a path", "GET", "/v1/tenants/demo/files/" + "%2f" * 20_000)
    yield of("a path", "GET", "/" + "a/" * 30_000)


def yardstick() -> float:
    """Return the CPU seconds of what the loop does at least with the largest message: to parse it once."""
    message = orjson.dumps({"a": "x" * LARGEST + "😀"})
    best = 1e9
    for _ in range(5):
        before = time.thread_time()
        orjson.loads(message)
        best = min(best, time.thread_time() - before)
    return best


@dataclass(frozen=True, slots=True)
class Sent:
    name: str
    size: int
    began: float
    ended: float


async def ask(gateway: LiveGateway, request: bytes) -> None:
    """Send a request on a connection of its own, and wait for its answer, or the connection's end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1 << 24)
    try:
        writer.write(request)
        await asyncio.wait_for(reader.read(1), 60)  # its head; some go on for ever
    except ConnectionError:
        pass  # refused before all of it had come
    finally:
        writer.close()


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[tuple[LiveGateway, Path]]:
    """A gateway whose callbacks are measured, with a tenant and its neighbour; the file of what it noted."""
    (noted := tmp_path / "lag").touch()
    gateway = await local_gateway(tmp_path, "demo", "next", GATEWAY_TEST_LAG=str(noted))
    gateway.program = (sys.executable, "-m", "tests.lag")
    await gateway.start()
    try:
        async with gateway.wire("next") as wire:
            await wire.call("files/write", path="f", text="a file\n")
        yield gateway, noted
    finally:
        await gateway.stop()
    log = gateway.log.read_text()
    assert "Traceback" not in log, log[-20_000:]


def judge(sent: list[Sent], noted: Path, beside: neighbour.Beside, calm: neighbour.Beside) -> None:
    """Hold the loop's callbacks against what they may take, and print what a neighbour saw."""
    pace = max(1.0, yardstick() / CALM)
    slow: list[tuple[float, str]] = []
    for callback in lag.noted(noted):
        during = [one for one in sent if one.began <= callback.ended and callback.began <= one.ended]
        if during:
            of = ", ".join(f"{one.name} ({one.size} bytes)" for one in during)
            slow.append((callback.cpu, f"{callback.cpu * 1000:.0f} ms of CPU: {of}: {callback.what}"))
    slow.sort(reverse=True)
    print(f"{len(sent)} sent in {sent[-1].ended - sent[0].began:.1f} s; this machine's pace is {pace:.2f}")
    print(f"a neighbour: {beside}; without: {calm}")
    print("\n".join(text[:300] for _, text in slow[:12]))
    assert [text for cpu, text in slow if cpu > LONG * pace] == []
    often = [text for cpu, text in slow if cpu > USUAL * pace]
    assert len(often) <= len(beside.seconds) // 100, often


@pytest.mark.timeout(300)  # some 20 s on a calm machine
async def test_no_message_holds_up_the_loop(watched: tuple[LiveGateway, Path]) -> None:
    """Each method and each tool, with the largest and oddest values of each of its fields."""
    gateway, noted = watched
    async with neighbour.reading(gateway, "next", "f") as calm:
        await asyncio.sleep(2)  # the time in which nothing happens is what is measured
    sent: list[Sent] = []
    async with neighbour.reading(gateway, "next", "f") as beside:
        pending = messages()
        case = next(pending, None)
        while case is not None:
            async with gateway.wire("demo") as wire:  # once more where one closed it
                await wire.call("files/write", path="f", text="x")
                while case is not None:
                    began = time.monotonic()
                    try:
                        if isinstance(case.message, bytes):
                            wire.socket.transport.write(case.message)
                        else:
                            await wire.send(case.message)
                        await wire.call("ping")
                    except (ConnectionClosed, ConnectionError, RpcFailure):
                        sent.append(Sent(case.name, case.size, began, time.monotonic()))
                        case = next(pending, None)
                        break
                    sent.append(Sent(case.name, case.size, began, time.monotonic()))
                    case = next(pending, None)
    judge(sent, noted, beside, calm)


@pytest.mark.timeout(300)  # some 20 s on a calm machine
async def test_no_request_holds_up_the_loop(watched: tuple[LiveGateway, Path]) -> None:
    """Each operation with the largest and oddest values of each parameter and field, MCP, and heads."""
    gateway, noted = watched
    token = gateway.token("demo", "next")
    async with neighbour.reading(gateway, "next", "f") as calm:
        await asyncio.sleep(2)  # as above
    sent: list[Sent] = []
    async with neighbour.reading(gateway, "next", "f") as beside:
        for case in requests(token):
            assert isinstance(case.message, bytes)
            began = time.monotonic()
            await ask(gateway, case.message)
            sent.append(Sent(case.name, case.size, began, time.monotonic()))
    judge(sent, noted, beside, calm)
