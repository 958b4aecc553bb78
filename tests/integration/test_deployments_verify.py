"""`succeeded` means that a site stays up, and one that cannot be reached is told why at once."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.settings import Settings
from tests.archives import Member, archive
from tests.integration.sites import Hosting, hosting

pytestmark = pytest.mark.timeout(300)

# what each does once it was asked for the first time
PAGE = """const page = `<!doctype html><script type=module src="/main.js"></script>`;
const asked = new Set<string>();
Bun.serve({port: process.env.PORT, hostname: "0.0.0.0", fetch(request) {
  const { pathname } = new URL(request.url);
  asked.add(pathname);
  if (asked.size == 1) setTimeout(then, 700);
  if (pathname == "/asked") return Response.json([...asked]);
  const type = {"content-type": pathname.endsWith(".js") ? "text/javascript" : "text/html"};
  const inner = pathname == "/main.js" ? 'import "./inner.js"' : "";
  return new Response(pathname == "/" ? page : inner, {headers: type});
}});
"""


def site(then: str, start: str = '["bun", "serve.ts"]') -> list[Member]:
    text = f"function then() {{ {then} }}\n{PAGE}"
    return [("serve.ts", text.encode()), ("site.toml", f"start = {start}\n".encode())]


def upload(*members: Member) -> dict[str, str]:
    return {"archive": base64.b64encode(archive(*members, manifest=None)).decode()}


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    async with hosting(incus_settings, tmp_path_factory.mktemp("verify") / "state", settle_time=2.0) as host:
        yield host


async def refused(host: Hosting, domain: str, *members: Member) -> dict[str, Any]:
    record = await host.deploy(domain, upload(*members))
    assert record["state"] == "rolledback", record
    return dict(record["error"])


async def test_a_site_that_dies_right_after_its_first_answer_is_no_success(host: Hosting) -> None:
    before = host.leavings()
    crash = refused(host, "crash.test", *site('console.error("out of luck"); process.exit(3)'))
    # its service lives on: only its answers end
    start = '["sh", "-c", "bun serve.ts; echo the child is gone; sleep 1000"]'
    child = refused(host, "child.test", *site("process.exit(0)", start))
    crashed, orphaned = await asyncio.gather(crash, child)
    for error, said in ((crashed, "out of luck"), (orphaned, "the child is gone")):
        assert (error["code"], error["reason"], error["phase"]) == ("exec_failed", "unsteady", "verify")
        assert said in error["message"]
    assert host.leavings() == before


async def test_a_site_that_listens_elsewhere_is_told_at_once(host: Hosting) -> None:
    serve = """Bun.serve({{port: {port}, hostname: "{address}", fetch: () => new Response("x")}});
    console.log("serving");"""

    async def elsewhere(domain: str, address: str, port: str) -> tuple[str, float]:
        began = time.monotonic()
        text = serve.format(port=port, address=address).encode()
        error = await refused(host, domain, ("serve.ts", text), ("site.toml", b'start = ["bun", "serve.ts"]'))
        assert error["reason"] == "wrong_address", error
        return error["message"], time.monotonic() - began

    found = await asyncio.gather(
        elsewhere("loopback.test", "127.0.0.1", "8000"),
        elsewhere("six.test", "::1", "process.env.PORT"),
        elsewhere("port.test", "0.0.0.0", "8080"),
    )
    for (message, took), where in zip(found, ("127.0.0.1:8000", "[::1]:3000", "0.0.0.0:8080"), strict=True):
        assert f"it listens on {where}; it must listen on 0.0.0.0:$PORT" in message
        assert took < 25, "verify_timeout is 30"
