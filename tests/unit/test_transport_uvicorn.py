"""What the transport takes of uvicorn beside its documented interface: fails where uvicorn moves it.

`gateway.transport` extends uvicorn's own protocols, whose attributes are no interface. pyproject.toml holds
uvicorn below the next minor release; these tests say what to look at before that bound is raised.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from gateway.transport.http1 import HttpProtocol
from gateway.transport.websocket import WebSocketProtocol

ROOT = Path(__file__).parents[2]


def named(tree: ast.AST, *, stored: bool = False) -> set[str]:
    """Return the attributes of `self`, and of `super()`, that code asks for, or of `self` that it sets."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (not stored or isinstance(node.ctx, ast.Store)):
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            if isinstance(owner, ast.Name) and owner.id in ("self", "super"):
                found.add(node.attr)
    return found


def source(kind: type) -> ast.ClassDef:
    parsed = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(parsed, ast.ClassDef)
    return parsed


@pytest.mark.parametrize(
    ("ours", "theirs"), [(WebSocketProtocol, WebSocketsSansIOProtocol), (HttpProtocol, H11Protocol)]
)
def test_uvicorn_has_what_is_asked_of_it(ours: type, theirs: type) -> None:
    """Each attribute that we ask for, set or extend, and do not bring along, is one that uvicorn makes."""
    own, made = set(), named(source(theirs), stored=True) | set(vars(theirs))
    for node in source(ours).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own |= named(node, stored=True) if node.name == "__init__" else {node.name}
    extended = {
        node.attr
        for node in ast.walk(source(ours))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call) and node.attr != "__init__"
    } & own
    taken = (named(source(ours)) - own - {"__init__"}) | extended
    assert taken >= {"transport", "data_received"}  # the look at the source really finds some
    assert taken <= made


def test_uvicorn_stops_reading_by_its_mark() -> None:
    """It stops at a message unless `read_paused` says that it has: what we have it believe for small ones."""
    stops: list[bool] = []
    for marked in (False, True):
        queued: list[dict[str, Any]] = []
        here = SimpleNamespace(
            frames=[b"hi"],
            close_sent=False,
            curr_msg_data_type="bytes",
            queue=SimpleNamespace(put_nowait=queued.append),
            read_paused=marked,
            transport=SimpleNamespace(pause_reading=lambda: stops.append(True)),
        )
        WebSocketsSansIOProtocol.send_receive_event_to_app(here)  # type: ignore[arg-type]  # stand-in
        assert queued == [{"type": "websocket.receive", "bytes": b"hi"}]
        assert here.read_paused and len(stops) == 1


def test_uvicorn_is_held_below_its_next_release() -> None:
    """The bound leaves out every release that these tests did not see."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [one for one in project["dependencies"] if one.startswith("uvicorn")] == ["uvicorn>=0.54,<0.55"]
