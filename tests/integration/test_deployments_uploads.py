"""Golden copies of uploaded folders: for the same bytes of the same owner, and for nobody else."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings
from tests.archives import folder
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.waits import until

pytestmark = pytest.mark.timeout(200)
DEADLINE = 120.0  # seconds of whatever is done in the background, on a busy machine
# what only an installed copy has, and what says who installed it
INSTALL = 'start = ["bun", "serve.ts"]\ninstall = ["sh", "-c", "hostname > installed"]\n'


def uploaded(*more: tuple[str, bytes]) -> dict[str, str]:
    return {"archive": base64.b64encode(folder(INSTALL, *more)).decode()}


def copies() -> list[dict[str, Any]]:
    """Return the golden copies that are whole."""
    return [
        entry
        for entry in environment.instances()
        if entry["config"].get("user.gateway.role") == "golden"
        and entry["status"] == "Stopped"
        and environment.snapshots(entry["name"])
    ]


async def seen(what: Callable[[], bool]) -> None:
    """Wait until Incus says so: nobody tells what happens to instances that are no tenants."""
    await until(lambda: asyncio.to_thread(what), DEADLINE, every=0.2)


async def made_of(
    host: Hosting, domain: str, template: Any, *tenants: str, subject: str = "test"
) -> dict[str, Any]:
    """Deploy with a token of these tenants; return the record of what succeeded."""
    covered = tenants or ("*",)
    async with host.gateway.http(*covered, subject=subject, domains=("*.test",)) as session:
        body = {"domain": domain, "template": template}
        async with session.post("/v1/deployments", json=body) as answer:
            begun = await answer.json()
            assert answer.status == 202, begun
    record = await host.ended(begun["id"])
    assert record["state"] == "succeeded", record["error"]
    return record


async def test_a_second_tenant_of_an_owners_folder_is_made_from_a_golden_copy(
    incus_settings: Settings, tmp_path: Path
) -> None:
    """It survives a kill, serves no other owner, and goes with the last tenant of that content."""
    mine = uploaded((".env", b"KEY=secret\n"))
    async with hosting(
        incus_settings, tmp_path / "state", golden=True, settle_time=0.0, reconcile_interval=1.0
    ) as host:
        assert (await made_of(host, "one.test", mine))["source"] == "image"
        await seen(lambda: len(copies()) == 1)
        # Incus shows a snapshot that is still being made, and one that a kill cut off is not taken
        await seen(lambda: not json.loads(environment.incus("operation", "list", "--format=json").stdout))
        (copy,) = copies()
        assert int(copy["config"]["user.gateway.bytes"]) > 0
        await host.gateway.stop(signal.SIGKILL)
        await host.gateway.start()

        second = await made_of(host, "two.test", mine)
        assert second["source"] == "golden"
        assert (await host.visit("two.test"))[1] == "mine"
        installed = environment.incus("exec", "two-test", "--", "cat", "/srv/site/installed").stdout.decode()
        assert installed.startswith("gateway-golden-"), "it was installed once"
        config = next(e for e in environment.instances() if e["name"] == "two-test")["config"]
        assert not {key for key in config if key in ("user.gateway.uploader", "user.gateway.key")}

        theirs = await made_of(host, "theirs.test", mine, subject="other")
        assert theirs["source"] == "image", "the same bytes of somebody else"

        # what a copy may hold of secrets ends with the last tenant that has them
        await host.call("DELETE", "/v1/tenants/one-test")
        assert (await made_of(host, "two.test", uploaded()))["kind"] == "update"
        await seen(lambda: copy["name"] not in {entry["name"] for entry in environment.instances()})
