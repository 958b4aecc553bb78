"""Rollbacks on real containers, and on the `local` runtime, both behind a real Caddy."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import pytest

from gateway.settings import Settings
from tests.archives import Member
from tests.contracts.rollback import KEPT, RollbackContract
from tests.integration.sites import Hosting, hosting

pytestmark = pytest.mark.timeout(300)

BUN = """import { existsSync, readFileSync } from "fs";
const page = readFileSync("index.html", "utf8");
if (page == "fragile" && existsSync("data/off")) process.exit(3);
Bun.serve({port: process.env.PORT, hostname: "0.0.0.0", fetch(request) {
  const { GREETING, SECRET } = process.env;
  const { pathname } = new URL(request.url);
  return new Response(pathname == "/env" ? `${GREETING ?? "none"} ${SECRET ?? "none"}` : page);
}});
"""
PYTHON = """import http.server, os, sys
page = open("index.html").read()
if page == "fragile" and os.path.exists("data/off"):
    sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    wbufsize = 1 << 16  # an answer goes whole or not at all
    def do_GET(self):
        env = [os.environ.get(name, "none") for name in ("GREETING", "SECRET")]
        said = (" ".join(env) if self.path == "/env" else page).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
async def contained(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Hosting]:
    state = tmp_path_factory.mktemp("rollback") / "state"
    async with hosting(incus_settings, state, rollbacks_kept=KEPT) as host:
        yield host


@pytest.fixture(scope="module")
async def local(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    state = tmp_path_factory.mktemp("local") / "state"
    async with hosting(incus_settings, state, runtime="local", rollbacks_kept=KEPT) as host:
        yield host


def site(program: str, name: str, text: str, page: str, keep: str) -> list[Member]:
    manifest = f'start = ["{program}", "{name}"]\n{keep}'
    return [(name, text.encode()), ("index.html", page.encode()), ("site.toml", manifest.encode())]


class TestIncus(RollbackContract):
    @pytest.fixture
    def host(self, contained: Hosting) -> Hosting:
        return contained

    def site(self, page: str, keep: str = "") -> list[Member]:
        return site("bun", "serve.ts", BUN, page, keep)


class TestLocal(RollbackContract):
    @pytest.fixture
    def host(self, local: Hosting) -> Hosting:
        return local

    def site(self, page: str, keep: str = "") -> list[Member]:
        return site(sys.executable, "serve.py", PYTHON, page, keep)
