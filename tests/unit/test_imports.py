"""Imports point one way, as in docs/architecture.md: a room knows only the rooms below it."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEVELS = (
    {
        "errors",
        "settings",
        "protocol",
        "transport",
        "tasks",
        "terminal",
        "bounds",
        "holder",
        "notify",
        "admission",
    },
    {"storage", "hostnames"},
    {"auth", "incus", "rootfs", "events", "idempotency"},
    {"runtime", "audit"},
    {"files", "ownership", "limits"},
    {"execs", "tools"},
    {"shells"},
    {"caddy", "detection"},
    {"deployments"},
    {"host"},
    {"lifecycle", "migration"},
    {"history"},
    {"api"},
    {"cluster"},
    {"server"},
    {"cli"},
    {"__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Tighter than the levels: rooms that may know only these of ours.
ONLY: dict[str, set[str]] = {
    "errors": set(),
    "settings": set(),
    "protocol": {"errors"},
    "terminal": set(),
    "tasks": {"errors"},
    "admission": {"errors"},
    "bounds": {"admission"},
    "holder": set(),
    "notify": set(),
    "transport": {"admission", "protocol"},
    "storage": {"admission", "errors", "settings"},
    "hostnames": {"errors", "protocol", "settings"},
    # browsers and tenants are nothing to these
    "incus": {"errors", "settings", "bounds"},
    "rootfs": {"errors", "settings", "bounds"},
    "runtime": {
        "admission",
        "errors",
        "settings",
        "hostnames",
        "holder",
        "incus",
        "rootfs",
        "tasks",
        "bounds",
    },
    "auth": {"errors", "protocol", "settings", "hostnames", "storage"},
    "audit": {"settings", "storage", "events"},
    "idempotency": {"errors", "settings", "storage"},
    "ownership": {
        "admission",
        "auth",
        "errors",
        "incus",
        "settings",
        "storage",
        "events",
        "hostnames",
        "runtime",
    },
    "limits": {"admission", "bounds", "errors", "settings", "storage", "events", "rootfs", "runtime"},
    "execs": {
        "admission",
        "errors",
        "limits",
        "settings",
        "runtime",
        "rootfs",
        "events",
        "idempotency",
        "storage",
    },
    "files": {"admission", "bounds", "errors", "settings", "runtime", "rootfs", "events"},
    "tools": {
        "admission",
        "errors",
        "protocol",
        "settings",
        "runtime",
        "rootfs",
        "events",
        "files",
        "idempotency",
        "storage",
        "tasks",
    },
}
# what the client holds for both ends, and the rooms of the server that hand it on
OF_THE_CLIENT = {"errors": "gateway_client.errors.", "protocol": "gateway_client.wire."}


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
            allowed = theirs == top  # it is installed without a gateway
        elif theirs == "gateway_client":
            # the command line is a client, the server is none
            allowed = room == "cli" or (room in OF_THE_CLIENT and name.startswith(OF_THE_CLIENT[room]))
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


def test_the_architecture_names_what_there_is() -> None:
    """Every room is in its table, and every link into the source leads to a file."""
    text = (ROOT / "docs/architecture.md").read_text()
    table = text.partition("## Rooms")[2].partition("##")[0]
    rooms = {module.split(".")[1] for module, _ in modules() if module.startswith("gateway.")} - {"__main__"}
    named = set(re.findall(r"`([a-z_]+)/?`", table))
    assert rooms <= named, "give the new room its row"
    links = set(re.findall(r"\]\(\.\./(gateway/[^)]+)\)", text))
    assert len(links) > 40
    assert {path for path in links if not (ROOT / path).is_file()} == set()


def test_no_package_is_a_house_of_its_own() -> None:
    """None holds more than 12 % of the lines; one inside another counts for itself."""
    sizes: Counter[Path] = Counter()
    for module, path in modules():
        if module.startswith("gateway."):
            sizes[path.parent] += len(path.read_text().splitlines())
    assert len(sizes) > 20
    large = {
        str(folder.relative_to(ROOT)): lines for folder, lines in sizes.items() if folder.name != "gateway"
    }
    assert {name for name, lines in large.items() if lines > 0.12 * sizes.total()} == set()


def circles(imports: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Return the groups of modules that import each other in a loop."""
    order, seen = list[str](), set[str]()

    def visit(module: str, edges: Mapping[str, Iterable[str]], found: list[str]) -> None:
        seen.add(module)
        for other in edges.get(module, ()):
            if other not in seen:
                visit(other, edges, found)
        found.append(module)

    for module in imports:
        if module not in seen:
            visit(module, imports, order)
    importers: dict[str, list[str]] = {}
    for module, others in imports.items():
        for other in others:
            importers.setdefault(other, []).append(module)
    seen.clear()
    groups = []
    for module in reversed(order):
        if module not in seen:
            group = list[str]()
            visit(module, importers, group)
            groups.append(set(group))
    return [group for group in groups if len(group) > 1]


def test_no_modules_import_each_other_in_a_loop() -> None:
    """Those for types alone are imports too: what must know another's type belongs below or beside it."""
    known = {module for module, _ in modules()}
    imports = {
        module: {
            name if name in known else name.rpartition(".")[0]
            for _, name in imported(path.read_text(), module, path.name == "__init__.py")
        }
        & known - {module}
        for module, path in modules()
    }
    for package in (module for module, path in modules() if path.name == "__init__.py"):
        # it hands on what is in its modules, and these may use what it defines
        imports[package] = {name for name in imports[package] if not name.startswith(f"{package}.")}
    assert imports["gateway_client.tenant"] >= {"gateway_client.connections", "gateway_client.files"}
    assert circles(imports) == []


def test_a_loop_is_found() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": ["b", "d"], "d": []}) == [{"b", "c"}]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gateway.errors", "import gateway.settings"),
        ("gateway.protocol", "from gateway import settings"),
        ("gateway.settings", "from gateway.errors import GatewayError"),
        ("gateway.auth.tokens", "from gateway.events import Bus"),
        ("gateway.incus.client", "from gateway.runtime import Tenant"),
        ("gateway.incus.client", "from ..runtime import Tenant"),
        ("gateway.rootfs.root", "from gateway.protocol import Frame"),
        ("gateway.runtime.local", "def f():\n    from gateway.execs import Exec"),
        ("gateway.tools.read", "if TYPE_CHECKING:\n    from gateway.execs import Exec"),
        ("gateway.tools.read", "if TYPE_CHECKING:\n    from gateway.api.connection import Connection"),
        ("gateway.execs.table", "from gateway.incus import client"),
        ("gateway.caddy", "import gateway.api.app as app"),
        ("gateway.lifecycle.idle", "from gateway.api import mcp"),
        ("gateway.api.app", "from gateway.cli import main"),
        ("gateway.api.app", "from gateway_client import Client"),
        ("gateway", "from gateway.settings import load"),
        ("gateway_client.client", "from gateway.settings import load"),
        ("gateway_client.client", "from gateway import events"),
        ("gateway_client.client", "from gateway.protocol import Frame"),
        ("gateway_client.client", "from gateway.errors import GatewayError"),
        ("gateway.protocol", "from gateway_client import Client"),
        ("gateway.api.app", "from gateway_client.wire import Frame"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gateway.protocol", "from gateway.errors import GatewayError"),
        ("gateway.auth.tokens", "from gateway.settings import Settings\nimport jwt"),
        ("gateway.incus.client", "from gateway.incus.stream_socket import Socket\nfrom . import socket"),
        ("gateway.runtime.incus.tenants", "from gateway.incus import client\nfrom ...rootfs import root"),
        ("gateway.host.setup", "from gateway.host.image import build\nfrom gateway.incus import client"),
        ("gateway.api.app", "from gateway import __version__\nfrom gateway.api import connection"),
        ("gateway.cli.main", "from gateway_client import Client"),
        ("gateway.errors", "from gateway_client.errors import GatewayError"),
        ("gateway_client.client", "from gateway_client import wire\nfrom gateway_client.wire import Frame"),
    ],
)
def test_an_import_that_points_down_is_fine(module: str, source: str) -> None:
    assert violations(source, module) == []
