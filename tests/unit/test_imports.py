"""Imports point one way, as in docs/architecture.md: a room knows only the rooms below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEVELS = (
    {"errors", "settings", "protocol", "websocket", "ledger", "tasks", "terminal", "bounds"},
    {"store", "hostnames", "budget", "http1", "state"},
    {"auth", "incus", "rootfs", "events", "receipts", "revocations"},
    {"grants", "runtime", "audit"},
    {"files", "names", "domains", "room", "pressure"},
    {"execs", "tools", "capacity"},
    {"shells"},
    {"caddy"},
    {"deployments"},
    {"host"},
    {"editor", "life", "metrics", "migration"},
    {"idle"},
    {"connection", "web"},
    {"mcp", "oneshot"},
    {"app"},
    {"server", "progress"},
    {"cli"},
    {"__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Tighter than the levels: rooms that may know only these of ours.
ONLY: dict[str, set[str]] = {
    "errors": set(),
    "settings": set(),
    "websocket": set(),
    "protocol": {"errors"},
    "ledger": set(),
    "terminal": set(),
    "tasks": {"errors"},
    "bounds": set(),
    "state": {"settings"},
    "store": {"errors", "ledger"},
    "budget": {"errors", "settings"},
    "http1": {"settings", "websocket"},
    "editor": {"errors"},
    # browsers and tenants are nothing to these
    "incus": {"errors", "settings", "bounds"},
    "rootfs": {"errors", "settings", "bounds"},
    "runtime": {"errors", "settings", "hostnames", "incus", "rootfs", "tasks", "bounds"},
    "audit": {"settings", "store", "events"},
    "grants": {"auth"},
    "revocations": {"errors", "store"},
    "receipts": {"errors", "settings", "store"},
    "hostnames": {"errors", "settings"},
    "domains": {"auth", "errors", "settings", "store", "events", "hostnames", "runtime"},
    "names": {"errors", "settings", "store", "events", "runtime"},
    "pressure": {"bounds", "errors", "settings", "events", "rootfs", "runtime"},
    "room": {"errors", "settings", "store", "rootfs", "runtime"},
    "capacity": {"errors", "settings", "room", "runtime"},
    "execs": {"errors", "budget", "settings", "runtime", "rootfs", "events", "receipts", "store"},
    "files": {"errors", "settings", "runtime", "rootfs", "events"},
    "tools": {"errors", "settings", "runtime", "rootfs", "events", "files", "receipts", "store", "tasks"},
}
CLIENT_MAY = {"gateway.errors", "gateway.protocol"}


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import in `source`, those in functions and for types included."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return what `module` imports of ours and must not, each as `module:line name`."""
    found = []
    top, *rest = module.split(".")
    room = rest[0] if rest else ""
    for line, name in imported(source, module, is_package):
        theirs, *inner = name.split(".")
        if theirs not in ("gateway", "gateway_client"):
            continue
        if top == "gateway_client":
            allowed = theirs == top or any(f"{name}.".startswith(f"{may}.") for may in CLIENT_MAY)
        elif theirs == "gateway_client":
            allowed = room in ("cli", "progress")  # the command line is a client, the server is none
        else:
            target = inner[0] if inner else ""
            if target not in LEVEL:
                # `gateway` itself holds the version, and knows nobody
                allowed = target in ("", "__version__")
            elif not room:
                allowed = False
            elif target == room:
                allowed = True
            elif room in ONLY:
                allowed = target in ONLY[room]
            elif room == "host":
                allowed = target == "incus" or LEVEL[target] < LEVEL[room]
            else:
                allowed = LEVEL[target] < LEVEL[room]
        if not allowed:
            found.append(f"{module}:{line} {name}")
    return found


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, package in ((ROOT, "gateway"), (ROOT / "clients/python", "gateway_client")):
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_every_import_points_down() -> None:
    wrong = [
        violation
        for module, path in modules()
        for violation in violations(path.read_text(), module, path.name == "__init__.py")
    ]
    assert wrong == []


def test_every_room_has_a_level() -> None:
    rooms = {module.split(".")[1] for module, _ in modules() if module.startswith("gateway.")}
    assert rooms <= LEVEL.keys(), "give the new room its level here and in the architecture"
    assert {"auth", "events", "protocol"} <= rooms  # the walk really finds the source


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gateway.errors", "import gateway.settings"),
        ("gateway.protocol", "from gateway import settings"),
        ("gateway.settings", "from gateway.errors import GatewayError"),
        ("gateway.auth", "from gateway.events import Bus"),
        ("gateway.incus.client", "from gateway.runtime import Tenant"),
        ("gateway.incus.client", "from ..runtime import Tenant"),
        ("gateway.rootfs.tree", "from gateway.protocol import Frame"),
        ("gateway.runtime.local", "def f():\n    from gateway.execs import Exec"),
        ("gateway.tools.read", "if TYPE_CHECKING:\n    from gateway.execs import Exec"),
        ("gateway.tools.read", "if TYPE_CHECKING:\n    from gateway.connection import Connection"),
        ("gateway.execs.table", "from gateway.incus import client"),
        ("gateway.caddy", "import gateway.app as app"),
        ("gateway.connection", "from gateway import mcp"),
        ("gateway.app", "from gateway.cli import main"),
        ("gateway.app", "from gateway_client import Client"),
        ("gateway", "from gateway.settings import load"),
        ("gateway_client.client", "from gateway.settings import load"),
        ("gateway_client.client", "from gateway import events"),
        ("gateway_client.client", "from gateway.protocols import x"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gateway.protocol", "from gateway.errors import GatewayError"),
        ("gateway.auth", "from gateway.settings import Settings\nimport jwt"),
        ("gateway.incus.client", "from gateway.incus.exec import Exec\nfrom . import exec"),
        ("gateway.runtime.incus.tenants", "from gateway.incus import client\nfrom ...rootfs import tree"),
        ("gateway.host.setup", "from gateway.host.image import build\nfrom gateway.incus import client"),
        ("gateway.app", "from gateway import connection, __version__"),
        ("gateway.cli", "from gateway_client import Client"),
        ("gateway_client.client", "from gateway.protocol import Frame\nfrom gateway import errors, protocol"),
    ],
)
def test_an_import_that_points_down_is_fine(module: str, source: str) -> None:
    assert violations(source, module) == []
