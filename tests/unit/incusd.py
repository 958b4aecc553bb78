"""An incusd that answers GET from a table, for tests of what the broker makes of its answers.

`tests/integration/test_broker.py` asks the real one the same.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

IDMAP = json.dumps(
    [
        {"Isuid": uid, "Isgid": not uid, "Hostid": 1_000_000, "Nsid": 0, "Maprange": 65_536}
        for uid in (True, False)
    ]
)


def instance(name: str, **changes: Any) -> dict[str, Any]:
    """Return a tenant as Incus shows it; `changes` override fields."""
    return {
        "name": name,
        "type": "container",
        "config": {"volatile.idmap.current": IDMAP, "volatile.last_state.idmap": "[]"},
        "expanded_config": {"user.gateway.managed": "true"},
        "expanded_devices": {"root": {"type": "disk", "path": "/", "pool": "pool"}},
        "state": {"pid": 0},
    } | changes


@contextmanager
def answering(socket: Path, table: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """Answer at `socket` by the `metadata` of each path in `table`; yield the addresses that were asked.

    A path with `?project=…` is of that project, any other of all.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            asks = urlsplit(self.path)
            project = parse_qs(asks.query).get("project", [""])[0]
            found = table.get(f"{asks.path}?project={project}", table.get(asks.path))
            status = 404 if found is None else 200
            body = json.dumps({"type": "sync", "metadata": found, "error_code": status}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingUnixStreamServer(str(socket), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()
            socket.unlink()
