"""`succeeded` means that a site stays up, and one that cannot be reached is told why at once."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings
from tests.archives import Member, archive
from tests.contracts.gateway import sse
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.waits import pause

pytestmark = pytest.mark.timeout(300)

# what each does once it was asked for the first time
PAGE = """const page = `<!doctype html><script type=module src="/main.js"></script>`;
const asked = new Set<string>();
Bun.serve({port: process.env.PORT, hostname: "0.0.0.0", fetch(request) {
  const { pathname } = new URL(request.url);
  asked.add(pathname);
  if (asked.size == 1) setTimeout(then, 500);
  if (pathname == "/asked") return Response.json([...asked, process.argv.at(-1)]);
  const type = {"content-type": pathname.endsWith(".js") ? "text/javascript" : "text/html"};
  const inner = pathname == "/main.js" ? 'import "./inner.js"' : "";
  return new Response(pathname == "/" ? page : inner, {headers: type});
}});
"""
SERVE = """Bun.serve({{port: {port}, hostname: "{address}", fetch: () => new Response("x")}});"""


def site(then: str, start: str = '["bun", "serve.ts"]') -> list[Member]:
    text = f"function then() {{ {then} }}\n{PAGE}"
    return [("serve.ts", text.encode()), ("site.toml", f"start = {start}\n".encode())]


def upload(*members: Member) -> dict[str, str]:
    return {"archive": base64.b64encode(archive(*members, manifest=None)).decode()}


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    state = tmp_path_factory.mktemp("verify") / "state"
    async with hosting(incus_settings, state, settle_time=1.5, verify_timeout=15.0) as host:
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


async def test_a_site_that_compiles_and_then_restarts_its_server_has_done_so(host: Hosting) -> None:
    """As with `tsc --watch` beside a server: no visitor comes before it has."""
    compiles = "const end = Date.now() + 3000; while (Date.now() < end);"
    script = f"bun serve.ts & bun -e '{compiles}'; kill $!; wait; touch compiled; exec bun serve.ts"
    record = await host.deploy("compiled.test", upload(*site("", json.dumps(["sh", "-c", script]))))
    assert record["state"] == "succeeded", record["error"]
    assert (await host.visit("compiled.test"))[0] == 200
    there = environment.incus("exec", record["tenant"], "--", "ls", "/srv/site/compiled")
    assert there.returncode == 0
    await host.call("DELETE", f"/v1/tenants/{record['tenant']}")


async def test_an_update_that_does_not_settle_leaves_the_old_site(host: Hosting) -> None:
    """No visitor ever meets the new one. The old one had been looked at as by a browser."""
    start = '"bun serve.ts --port=$PORT"'
    first = await host.deploy("steady.test", upload(*site("", start)), env={"PORT": "8080"})
    assert first["state"] == "succeeded", first["error"]
    asked = json.loads((await host.visit("steady.test", "/asked"))[1])
    assert {"/", "/main.js", "/inner.js", "--port=3000"} < {*asked}
    answers = set[int]()

    async def visit() -> None:
        while True:
            answers.add((await host.visit("steady.test"))[0])
            await pause(0.02)  # at full speed they would take the machine from what they watch

    visiting = asyncio.create_task(visit())
    error = await refused(host, "steady.test", *site('console.error("out of luck"); process.exit(3)'))
    visiting.cancel()
    await asyncio.gather(visiting, return_exceptions=True)
    assert (error["reason"], error["phase"]) == ("unsteady", "verify")
    assert "out of luck" in error["message"]
    again = json.loads((await host.visit("steady.test", "/asked"))[1])
    assert again[-1] == "--port=3000" and {*asked} <= {*again}, "it was never started again"
    assert answers == {200}


async def test_a_site_that_listens_elsewhere_is_told_at_once_and_has_its_time(host: Hosting) -> None:
    """As a helper does that starts before the site itself."""

    async def elsewhere(domain: str, address: str, port: str) -> str:
        text = SERVE.format(port=port, address=address).encode()
        error = await refused(host, domain, ("serve.ts", text), ("site.toml", b'start = ["bun", "serve.ts"]'))
        assert error["reason"] == "wrong_address", error
        return str(error["message"])

    wheres = ("127.0.0.1:8000", "[::1]:3000", "0.0.0.0:8080")
    async with host.gateway.http("*") as session:
        events = await session.get("/v1/events?type=deployment.phase.log")
        failing = asyncio.gather(
            elsewhere("loopback.test", "127.0.0.1", "8000"),
            elsewhere("six.test", "::1", "process.env.PORT"),
            elsewhere("port.test", "0.0.0.0", "8080"),
        )
        told = [event["data"]["data"]["lines"] for event in await sse(events, 3)]
        assert not failing.done()
        assert sorted(told) == sorted([f"it listens on {one}, and not yet on 0.0.0.0:3000"] for one in wheres)
        found = await failing
    for message, where in zip(found, wheres, strict=True):
        assert f"it listens on {where}; it must listen on 0.0.0.0:$PORT" in message
        assert "where PORT is 3000: with bun, Bun.serve({" in message
    # a helper, and the site after it
    later = "Bun.serve({port: 4000, fetch: () => new Response('helper')});\nawait Bun.sleep(6000);\n"
    text = later + SERVE.format(port="process.env.PORT", address="0.0.0.0")
    start = b'start = ["bun", "serve.ts"]'
    record = await host.deploy("helper.test", upload(("serve.ts", text.encode()), ("site.toml", start)))
    assert record["state"] == "succeeded", record["error"]
    assert await host.visit("helper.test") == (200, "x")
    await host.call("DELETE", "/v1/tenants/helper-test")


async def test_a_site_of_the_local_runtime_is_told_the_same(incus_settings: Settings, tmp_path: Path) -> None:
    def serving(address: str, port: str, lives: float = 600) -> list[Member]:
        text = f"""
import http.server, os, sys, threading
http.server.ThreadingHTTPServer.address_family = 10 if ":" in "{address}" else 2
server = http.server.ThreadingHTTPServer(("{address}", int({port})), http.server.SimpleHTTPRequestHandler)
threading.Timer({lives}, lambda: (print("out of luck", flush=True), os._exit(3))).start()
server.serve_forever()
"""
        start = f'start = "{sys.executable} -u serve.py $PORT"\n'
        return [("serve.py", text.encode()), ("site.toml", start.encode()), ("index.html", b"mine")]

    port = random.randrange(20_000, 30_000)
    changes: dict[str, Any] = {"runtime": "local", "settle_time": 1.5, "verify_timeout": 15.0}
    async with hosting(incus_settings, tmp_path / "state", **changes) as local:
        crashed, elsewhere, another, good = await asyncio.gather(
            refused(local, "crash.test", *serving("127.0.0.1", "sys.argv[1]", 1.2)),
            refused(local, "six.test", *serving("::1", "sys.argv[1]")),
            refused(local, "port.test", *serving("127.0.0.1", str(port))),
            local.deploy("good.test", upload(*serving("0.0.0.0", "sys.argv[1]"))),
        )
        assert crashed["reason"] == "unsteady" and "out of luck" in crashed["message"], crashed
        assert elsewhere["reason"] == another["reason"] == "wrong_address", (elsewhere, another)
        assert "it listens on [::1]:" in elsewhere["message"]
        assert f"it listens on 127.0.0.1:{port};" in another["message"]
        assert good["state"] == "succeeded", good["error"]
        assert (await local.visit("good.test"))[1] == "mine"
