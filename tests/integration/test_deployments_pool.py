"""What is made ready before it is asked for: golden copies and the warm pool, on real containers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.caddy import shipped
from gateway.settings import Settings
from tests.contracts.gateway import sse
from tests.contracts.lifecycle import ask
from tests.integration import environment
from tests.integration.sites import hosting
from tests.integration.test_upgrade import upgrade
from tests.waits import pause, until

pytestmark = pytest.mark.timeout(300)
CANCELS = int(os.environ.get("GATEWAY_TEST_CANCELS", "2"))
DEADLINE = 120.0  # seconds of whatever is done in the background, on a busy machine
UNPREPARED = b'gateway_template_unprepared{template="odd"}'
KEY = "user.gateway.key"

# as Vite with its dependencies: it goes on after its first answer, and then writes down what it made
MAKES = """
const over = Date.now() + 1500
const make = () => {
  for (const slice = Date.now() + 50; Date.now() < slice; ) {}
  Date.now() < over ? setTimeout(make, 1) : Bun.write("made", "")
}
if (!(await Bun.file("made").exists())) make()
"""


def having(role: str) -> list[dict[str, Any]]:
    return [e for e in environment.instances() if e["config"].get("user.gateway.role") == role]


def ready() -> bool:
    """Say whether a golden copy and one of the pool are whole."""
    golden = [e for e in having("golden") if e["status"] == "Stopped" and environment.snapshots(e["name"])]
    pool = [e["config"][KEY] for e in having("pool")]
    return len(golden) == 1 and pool == [golden[0]["config"][KEY]] and not copying()


def copying() -> bool:
    """Say whether Incus is at work: it lists an instance before all of it is copied."""
    return bool(json.loads(environment.incus("query", "/1.0/operations").stdout).get("running"))


async def counted(session: aiohttp.ClientSession, line: bytes) -> bool:
    async with session.get("/metrics") as answer:
        return line in await answer.read()


async def seen(what: Callable[[], bool]) -> None:
    """Wait until Incus says so: nobody tells what happens to instances that are no tenants."""
    await until(lambda: asyncio.to_thread(what), DEADLINE, every=0.2)


async def test_a_pool_is_filled_claimed_refilled_adopted_and_drained(
    incus_settings: Settings, tmp_path: Path
) -> None:
    """Each deployment is made from what is ready, by a killed or upgraded gateway too; SIGTERM leaves none.

    A changed template gets a golden copy of its own, and the old one goes with the gateway's next start.
    """
    templates = tmp_path / "templates"
    shutil.copytree(shipped("deploy/templates") / "static", templates / "mine")
    # not the same as `static`, whose copies would serve it and be kept
    (templates / "mine" / "bun.lock").write_text("# one version\n")
    with (templates / "mine" / "server.ts").open("a") as server:
        server.write(MAKES)
    state = tmp_path / "state"
    async with hosting(incus_settings, state, golden=True, warm_pool=1, templates_dir=templates) as host:
        first = await host.deploy("one.test", "mine")
        assert (first["state"], first["source"]) == ("succeeded", "image"), first["error"]
        await seen(ready)
        golden, pooled = having("golden")[0]["name"], having("pool")[0]["name"]
        assert (environment.rootfs(golden) / "srv/site/made").exists(), "it was stopped at its work"

        second = await host.deploy("two.test", "mine")
        assert (second["state"], second["source"]) == ("succeeded", "pool"), second["error"]
        assert "Your site is up." in (await host.visit("two.test"))[1]
        ids = {
            environment.incus("exec", name, "--", "cat", "/etc/machine-id").stdout
            for name in ("one-test", "two-test")
        }
        assert len(ids) == 2, "a copy has a machine id of its own"
        await seen(lambda: ready() and having("pool")[0]["name"] != pooled)

        old = having("golden")[0]["name"]
        await host.gateway.stop(signal.SIGKILL)
        (templates / "mine" / "bun.lock").write_text("# another version of what it needs\n")
        await host.gateway.start()
        await seen(lambda: not having("golden") and not having("pool"))
        third = await host.deploy("three.test", "mine")
        assert (third["state"], third["source"]) == ("succeeded", "image"), third["error"]
        await seen(ready)
        assert having("golden")[0]["name"] != old

        kept = having("pool")[0]["name"]
        await upgrade(host.gateway)
        assert [entry["name"] for entry in having("pool")] == [kept], "a successor has what was ready"
        await host.gateway.stop(signal.SIGKILL)
        await host.gateway.start()
        fourth = await host.deploy("four.test", "mine")
        assert (fourth["state"], fourth["source"]) == ("succeeded", "pool"), fourth["error"]
        assert kept not in {entry["name"] for entry in environment.instances()}, "it became the tenant"
        await host.gateway.stop()
        assert not having("pool"), "nobody looks after it any more"


async def test_a_template_that_cannot_be_made_ready_is_still_deployed(
    incus_settings: Settings, tmp_path: Path
) -> None:
    """Where a golden copy fails it is removed, and an event and the metrics say so, until there is one."""
    templates = tmp_path / "templates"
    shutil.copytree(shipped("deploy/templates") / "static", templates / "odd")
    manifest = templates / "odd" / "site.toml"
    # only what is made for a tenant has its domain's name
    install = 'install = ["sh", "-c", "hostname | grep -qv golden"]\n'
    manifest.write_text(install + manifest.read_text())
    state = tmp_path / "state"
    async with hosting(incus_settings, state, golden=True, warm_pool=1, templates_dir=templates) as host:
        async with host.gateway.http("*") as session:
            events = await session.get("/v1/events?type=gateway.template.*")
            for domain in ("odd.test", "even.test"):
                record = await host.deploy(domain, "odd")
                assert (record["state"], record["source"]) == ("succeeded", "image"), record["error"]
                (told,) = await sse(events, 1, DEADLINE)
                assert told["event"] == "gateway.template.failed"
                facts = {"template": "odd", "code": "exec_failed", "reason": "install_failed"}
                assert told["data"]["data"] == facts
                assert not having("golden") and not having("pool")
            await until(lambda: counted(session, UNPREPARED + b" 1.0"))  # behind the events
            manifest.write_text(manifest.read_text().removeprefix(install))
            assert (await host.deploy("again.test", "odd"))["state"] == "succeeded"
            (told,) = await sse(events, 1, DEADLINE)
            assert (told["event"], told["data"]["data"]) == ("gateway.template.ready", {"template": "odd"})
            assert len(having("golden")) == len(having("pool")) == 1
            await until(lambda: counted(session, UNPREPARED + b" 0.0"))


async def test_a_cancelled_deployment_is_rolled_back_once_nothing_carries_its_domain(
    incus_settings: Settings, tmp_path: Path
) -> None:
    """Whenever it is cancelled: while an instance of the pool is marked, renamed, started, or one is made."""
    state = tmp_path / "state"
    moments = random.Random(3)
    async with hosting(incus_settings, state, golden=True, warm_pool=CANCELS) as host:
        assert (await host.deploy("first.test"))["state"] == "succeeded"
        await seen(ready_pool)
        for number in range(CANCELS):
            domain = f"cancelled-{number}.test"
            _, begun, _ = await host.call("POST", "/v1/deployments", {"domain": domain, "template": "static"})
            await host.reached(begun["id"], "create")
            await pause(moments.uniform(0.0, 0.25))  # any moment of a claim
            _, record, _ = await host.call("DELETE", f"/v1/deployments/{begun['id']}")
            carrying = [
                entry["name"]
                for entry in environment.instances()
                if entry["config"].get("user.gateway.domain") == domain
            ]
            if record["state"] == "rolledback":
                assert carrying == [], number
            async with host.gateway.http("*", scopes=("admin",)) as http:
                entries = (await ask(http, "GET", "/v1/audit?limit=200"))["entries"]
            removed = [one for one in entries if one["action"].endswith(".removed")]
            undone = f"deployment {begun['id']} was undone"
            assert all(one["facts"]["reason"] for one in removed)
            mine = [one["facts"] for one in removed if one["facts"]["reason"] == undone]
            assert len(mine) <= 1, "one instance of each deployment is removed, once"


def ready_pool() -> bool:
    there = [entry for entry in having("pool") if entry["status"] == "Stopped"]
    return len(there) == CANCELS and not copying()
