"""Each method of the Python client sends what tests/wire/calls.json says, as TypeScript's does too."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from gateway_client import Client, Deployment, Exec, Files, Tenant
from gateway_client.connections import Connections
from gateway_client.http_client import HttpClient

CALLS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "wire/calls.json").read_text("utf-8"))[
    "calls"
]
CLASSES = {"Client": Client, "Tenant": Tenant, "Files": Files, "Deployment": Deployment, "Exec": Exec}


@pytest.mark.parametrize("name", CLASSES)
def test_every_method_is_in_the_table(name: str) -> None:
    """A new one needs a row, and so its twin in TypeScript."""
    kind = CLASSES[name]
    found = {
        member
        for member in dir(kind)
        if not member.startswith("_") and inspect.isfunction(inspect.getattr_static(kind, member))
    }
    assert found == {call["method"] for call in CALLS if call["class"] == name} - {None}


@pytest.mark.parametrize(
    "call",
    [call for call in CALLS if "live" not in call],
    ids=lambda call: f"{call['class']}.{call['method']}",
)
async def test_a_method_sends_this(call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []

    async def request(self: Connections, method: str, params: Any = None) -> Any:
        params = {name: value for name, value in (params or {}).items() if name != "callId"}
        sent.append({method: params})
        return call.get("answer", {})

    async def ask(self: HttpClient, method: str, path: str, body: Any = None, headers: Any = None) -> Any:
        sent.append({f"{method} {path}": body})
        return call.get("answer", {})

    monkeypatch.setattr(Connections, "request", request)
    monkeypatch.setattr(HttpClient, "json", ask)
    async with Client("http://127.0.0.1:1", token="t") as client:
        tenant = client.tenant("shop")
        objects: dict[str, Any] = {
            "Client": client,
            "Tenant": tenant,
            "Files": tenant.files,
            "Deployment": client.deployment("d-1"),
        }
        await getattr(objects[call["class"]], call["method"])(*call["args"], **call.get("options", {}))
    assert sent == [call["sends"]]
