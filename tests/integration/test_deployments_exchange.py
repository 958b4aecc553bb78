"""An update replaces a site whose program cannot run twice, and no visitor gets an error meanwhile."""

from __future__ import annotations

import asyncio
import base64
import signal
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from gateway.settings import Settings
from tests.archives import archive
from tests.integration.sites import Hosting, Visitors, hosting
from tests.waits import pause

pytestmark = pytest.mark.timeout(300)

# As the locks of Vite, Astro, Next and others, none of which is released at the end
SERVE: Final = """
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
const lock = process.argv[2], file = lock == "cache" ? "node_modules/.vite/lock/a.json" : ".site/lock.json";
const port = lock == "port" ? 3000 : Number(process.env.PORT);
const runs = (pid) => { try { process.kill(pid, 0); return true } catch (e) { return e.code != "ESRCH" } };
if (existsSync(file)) {
  const held = JSON.parse(readFileSync(file, "utf8"));
  const there = lock == "proc" ? existsSync(`/proc/${held.pid}/cmdline`)
    : lock == "http" ? await fetch(`http://127.0.0.1:${held.port}/`).then(() => true, () => false)
    : lock == "kill" || lock == "cache" ? runs(held.pid) : false;
  if (there && held.pid != process.pid) throw `Another dev server is already running (pid ${held.pid}).`;
}
mkdirSync(file.replace(/[^/]*$/, ""), { recursive: true });
writeFileSync(file, JSON.stringify({ pid: process.pid, port }));
Bun.serve({ port, hostname: "0.0.0.0", async fetch(request) {
  return new Response(`VERSION ${process.env.GREETING} ${(await request.text()).length}`);
} });
"""
STARTS: Final = {
    "kill": '["bun", "serve.ts", "kill"]',
    "proc": '["bun", "serve.ts", "proc"]',
    "cache": '["bun", "serve.ts", "cache"]',
    "http": '["bun", "serve.ts", "http"]',
    # these two are also held by what has another process id, and the last one says nothing
    "port": '["bun", "serve.ts", "port"]',
    "flock": '["flock", "--nonblock", "/tmp/site.lock", "bun", "serve.ts", "flock"]',
}


def site(lock: str, version: str, before: str = "") -> dict[str, str]:
    text = before + SERVE.replace("VERSION", version)
    members = [("serve.ts", text.encode()), ("site.toml", f"start = {STARTS[lock]}\n".encode())]
    return {"archive": base64.b64encode(archive(*members, manifest=None)).decode()}


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    async with hosting(incus_settings, tmp_path_factory.mktemp("exchange") / "state") as host:
        yield host


async def deployed(host: Hosting, domain: str, template: dict[str, str]) -> dict[str, Any]:
    record = await host.deploy(domain, template)
    assert record["state"] == "succeeded", (domain, record["error"])
    return record


async def changed(host: Hosting, method: str, path: str, body: dict[str, Any]) -> None:
    status, begun, _ = await host.call(method, path, body)
    assert status == 202, begun
    record = await host.ended(begun["id"])
    assert record["state"] == "succeeded", (path, record["error"])


@pytest.mark.parametrize(
    "locks", [("kill", "port"), ("proc", "cache", "http", "flock")], ids=["pid and port", "others"]
)
async def test_a_program_that_cannot_run_twice_is_updated(host: Hosting, locks: tuple[str, ...]) -> None:
    """Whatever its lock is: by the process id, by /proc, in a cache, by HTTP, a fixed port, flock(2)."""

    async def updated(lock: str) -> None:
        domain = f"{lock}.test"
        await deployed(host, domain, site(lock, "one"))
        visitors = Visitors(host, domain, exact=True)
        async with visitors.watching("update"):
            await deployed(host, domain, site(lock, "two"))
        assert {said.split()[0] for said in visitors.said} == {"one", "two"}
        assert (await host.visit(domain))[1].startswith("two ")

    async with asyncio.TaskGroup() as group:
        for lock in locks:
            group.create_task(updated(lock))


@pytest.mark.parametrize("lock", ["kill", "port"])
async def test_so_are_its_environment_and_a_rollback_and_a_broken_one_is_undone(
    host: Hosting, lock: str
) -> None:
    """A broken one is met by no visitor, also where only the exchange tells that it is."""
    domain, tenant = f"more-{lock}.test", f"more-{lock}-test"
    await deployed(host, domain, site(lock, "one"))
    visitors = Visitors(host, domain, exact=True)
    async with visitors.watching("env"):
        await changed(host, "PATCH", f"/v1/tenants/{tenant}/env", {"env": {"GREETING": "hello"}})
    assert visitors.said == {"one undefined", "one hello"}
    async with visitors.watching("rollback"):
        await changed(host, "POST", f"/v1/tenants/{tenant}/rollback", {})
    assert (await host.visit(domain))[1] == "one undefined 0"
    for number, broken in enumerate(('throw "out of luck";\n', 'throw "in use, and out of luck";\n')):
        visitors.said.clear()
        async with visitors.watching(f"broken {number}"):
            record = await host.deploy(domain, site(lock, "two", before=broken))
            assert (record["state"], record["error"]["reason"]) == ("rolledback", "never_healthy"), record
            assert "out of luck" in record["error"]["message"]
        assert visitors.said == {"one undefined"}


async def test_a_gateway_that_is_killed_while_visitors_wait_has_them_wait_on(host: Hosting) -> None:
    """They reach the site that was before, once the next gateway has undone the exchange."""
    domain = "killed.test"
    await deployed(host, domain, site("kill", "one"))
    slow = "await new Promise((go) => setTimeout(go, process.env.PORT == 3000 ? 5000 : 0));\n"
    visitors = Visitors(host, domain, exact=True)
    async with visitors.watching("a killed gateway"):
        body = {"domain": domain, "template": site("kill", "two", before=slow)}
        status, begun, _ = await host.call("POST", "/v1/deployments", body)
        assert status == 202, begun

        async def held() -> bool:
            routes = host.settings.state_dir / "caddy" / "routes"
            return (routes / domain).readlink().name.startswith("asleep_")

        while not await held():
            await pause(0.02)
        await pause(1.0)
        await host.gateway.stop(signal.SIGKILL)
        await host.gateway.start()
        assert (await host.ended(begun["id"]))["state"] == "rolledback"
    assert visitors.said == {"one undefined"}
