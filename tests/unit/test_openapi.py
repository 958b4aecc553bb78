"""The gateway's description of itself: complete, made of what checks requests, and true of a live gateway."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from starlette.routing import WebSocketRoute

from gateway import protocol
from gateway.api import editor, openapi
from gateway.api.answers import TenantsQuery
from gateway.api.app import routes
from gateway.api.operation import ApiCall, ApiOperation, ApiRoutes
from gateway.deployments.request import RollbackBody
from gateway.protocol.results import NOTIFICATIONS, RESULTS
from tests import shapes
from tests.live import local_gateway

ROOT = Path(__file__).parents[2]
ROUTES = routes()
DOCUMENT = openapi.document(ROUTES)


def test_every_route_is_described() -> None:
    """All but the editor's files and the websocket, which has a schema of its own; each has its sentence."""
    others = [route for route in ROUTES if not isinstance(route, ApiOperation)]
    assert [route for route in others if not isinstance(route, WebSocketRoute)] == list(editor.ROUTES)
    operations = [one for methods in DOCUMENT["paths"].values() for one in methods.values()]
    assert len(operations) == len({one["operationId"] for one in operations}) > 45
    for one in operations:
        assert one["summary"] and one["responses"], one["operationId"]


def test_generators_of_clients_stumble_over_nothing() -> None:
    """Each body has a schema, a file is `binary`, and a default is a value of its schema."""

    def visit(there: Any, path: str) -> None:
        if isinstance(there, list):
            for number, one in enumerate(there):
                visit(one, f"{path}/{number}")
        if not isinstance(there, dict):
            return
        if "content" in there and "properties" not in path[-12:]:
            assert all("schema" in media for media in there["content"].values()), path
        if "default" in there and not path.endswith("/properties") and not path.endswith("/responses"):
            assert there["default"] is not None, path
            assert there["default"] in there.get("enum", [there["default"]]), path
        for name, one in there.items():
            visit(one, f"{path}/{name}")

    visit(DOCUMENT, "")
    body = DOCUMENT["paths"]["/v1/tenants/{tenant}/files/{path}"]["put"]["requestBody"]
    assert body["content"]["application/octet-stream"]["schema"] == {"type": "string", "format": "binary"}


def test_every_route_of_the_contract_is_there_and_the_other_way_round() -> None:
    """docs/protocol.md names each path of the document."""
    page = (ROOT / "docs/protocol.md").read_text()
    short = {path.replace("{tenant}", "{t}") for path in DOCUMENT["paths"]}
    missing = {
        path
        for path in short
        # several of one path stand together, and names in braces are shorter there
        if not re.search(re.escape(re.sub(r"\{(?!t\})\w+\}.*", "", path).rstrip("/")), page)
        and path.rpartition("/")[2] not in ("stop", "restart")
    }
    assert missing == set()


def test_every_method_of_the_websocket_has_its_result() -> None:
    assert RESULTS.keys() == protocol.METHODS.keys()
    schema = protocol.wire_schema()
    assert schema["methods"].keys() == RESULTS.keys()
    assert schema["notifications"].keys() == NOTIFICATIONS.keys()
    page = (ROOT / "docs/protocol.md").read_text()
    for name in (*RESULTS, *NOTIFICATIONS):
        assert f"`{name}" in page, name


def test_what_a_function_takes_is_what_is_checked_and_described() -> None:
    """A route cannot declare one thing and check another: the function's own parameters declare it."""
    routes = ApiRoutes("tests")

    @routes("POST", "/", scope="deploy", answers={200: None})
    async def endpoint(call: ApiCall, body: RollbackBody, query: TenantsQuery) -> None:
        raise NotImplementedError

    (one,) = routes
    assert (one.takes, one.query, one.required) == (RollbackBody, TenantsQuery, "deploy")


def test_the_page_shows_every_operation_and_escapes() -> None:
    page = openapi.page(DOCUMENT)
    for path in DOCUMENT["paths"]:
        assert path in page
    hostile = {**DOCUMENT, "paths": {"/<script>": {"get": {**DOCUMENT["paths"]["/healthz"]["get"]}}}}
    assert "<script" not in openapi.page(hostile)
    assert "http://" not in page and "https://" not in page and "<script" not in page


@pytest.mark.timeout(300)  # some seconds of CPU, on a machine that runs other tests too
async def test_a_gateway_answers_only_what_its_document_says(tmp_path: Path) -> None:
    """Schemathesis asks each route what the document allows, and what it does not: no 500, no other answer.

    It takes each kind of value for each member once; `--phases fuzzing` would go on at random.

    Its token may run no command: the runtime `local` has nothing that would hold one.
    """
    gateway = await local_gateway(tmp_path, "demo", "other")
    await gateway.start()
    try:
        async with aiohttp.ClientSession(gateway.url) as session:
            async with session.get("/openapi.json") as answer:
                served: dict[str, Any] = await answer.json()
            async with session.get("/reference") as answer:
                assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
                assert "/v1/tenants/{tenant}/exec" in await answer.text()
            async with session.get("/wire.json") as answer:
                assert (await answer.json(content_type=None)).keys() == protocol.wire_schema().keys()
        assert served == DOCUMENT
        token = gateway.token("*", scopes=("files:read", "files:write", "deploy", "events"), domains=())
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("st")),
            *("--config-file", str(ROOT / "tests/schemathesis.toml"), "run", f"{gateway.url}/openapi.json"),
            *("--phases", "coverage", "--workers", "4", "--seed", "1"),
            *("--header", f"Authorization: Bearer {token}", "--no-color"),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        printed, _ = await asyncio.wait_for(process.communicate(), 240)
        said = printed.decode()
        assert process.returncode == 0, said
        asked = re.search(r"(\d+) generated", said)
        assert asked is not None and int(asked[1]) > 500, said
    finally:
        assert await gateway.stop() == 0
    assert "Traceback" not in gateway.log.read_text()


def test_an_answer_outside_the_document_is_found() -> None:
    """The check that every test of a live gateway makes."""
    shapes.check_answer("GET", "/healthz", 200, "application/json", b'{"status":"alive"}')
    for status, media, body in (
        (200, "application/json", b'{"status":"dead"}'),
        (200, "application/json", b'{"status":"alive","more":1}'),
        (200, "text/plain", b"alive"),
        (201, "application/json", b'{"status":"alive"}'),
    ):
        with pytest.raises(AssertionError):
            shapes.check_answer("GET", "/healthz", status, media, body)
    with pytest.raises(AssertionError):
        shapes.check_result("files/remove", {"removed": "1"}, 20)


def test_the_types_of_the_typescript_client_are_made_of_the_schema() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "clients/typescript/wire_types.py", "--check"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize(
    ("model", "interface"),
    [
        ("Session", "Session"),
        ("TenantShown", "TenantInfo"),
        ("Site", "SiteAnswer"),
        ("Deployment", "DeploymentRecord"),
        ("Detected", "Detected"),
    ],
)
def test_the_types_of_typescript_have_all_that_is_answered(model: str, interface: str) -> None:
    types = (ROOT / "clients/typescript/src/types.ts").read_text()

    def fields(name: str) -> set[str]:
        found = re.search(rf"interface {name} (?:extends (\w+) )?\{{(.*?)^\}}", types, re.M | re.S)
        assert found is not None, name
        names = set(re.findall(r"^  readonly (\w+)\??:", found[2], re.M))
        return names | (fields(found[1]) if found[1] else set())

    assert DOCUMENT["components"]["schemas"][model]["properties"].keys() <= fields(interface)
