"""A gateway that is killed at any moment of its deployments leaves nothing half done to the next one.

GATEWAY_TEST_KILLS says how often it is killed (2), GATEWAY_TEST_SEED at which moments.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from gateway.deployments.record import PHASES
from gateway.settings import Settings
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.integration.test_deployments_faults import inside
from tests.waits import pause, until

KILLS = int(os.environ.get("GATEWAY_TEST_KILLS", "2"))
SEED = int(os.environ.get("GATEWAY_TEST_SEED", "0")) or random.randrange(1, 1 << 30)


async def listen(host: Hosting, seen: dict[int, bytes]) -> None:
    """Take down what an event stream brings, until it breaks."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with host.gateway.http("*") as session:
        async with session.get("/v1/events?type=deployment.*", timeout=timeout) as answer:
            await take(answer, seen)


async def take(answer: aiohttp.ClientResponse, seen: dict[int, bytes], last: int | None = None) -> None:
    number = 0
    async for line in answer.content:
        name, _, value = line.rstrip(b"\r\n").partition(b": ")
        if name == b"id":
            number = int(value)
        elif name == b"data":
            seen[number] = value
            if number == last:
                return


def live(said: str) -> str:
    """Return what `inside` says of all but the kept sites, of which each success makes another.

    A rollback to a site without an environment leaves an empty file of it, which is the same.
    """
    lines = (line for line in said.splitlines() if "/.site-kept" not in line and line[:2] != ". ")
    return "\n".join(line for line in lines if not re.search(r" 0 +/etc/site\.env$", line))


@pytest.mark.timeout(120 + KILLS * 30)
async def test_a_killed_gateway_leaves_no_half_done_deployment(
    incus_settings: Settings, tmp_path: Path
) -> None:
    """However far they came: each ends succeeded, or rolled back with nothing left, and no event is lost."""
    moments = random.Random(SEED)
    ends: list[str] = []
    async with hosting(incus_settings, tmp_path / "state", reconcile_interval=1.0, history=False) as host:
        first = await host.deploy("live.test")
        assert first["state"] == "succeeded", first["error"]
        # so that there is one to go back to
        first = await host.deploy("live.test")
        assert first["state"] == "succeeded", first["error"]
        before, at_rest = host.leavings(), live(inside("live-test"))
        for round_ in range(KILLS):
            seen: dict[int, bytes] = {}
            listening = asyncio.create_task(listen(host, seen))
            bodies = {
                domain: ("/v1/deployments", {"domain": domain, "template": "static"})
                for domain in (f"killed-{round_}.test", "live.test")
            }
            if round_ % 2 == 0:
                bodies["live.test"] = ("/v1/tenants/live-test/rollback", {})
            begun = [(await host.call("POST", *body))[1]["id"] for body in bodies.values()]
            which, phase, moment = moments.randrange(2), moments.choice(PHASES), moments.uniform(0, 0.3)
            await host.reached(begun[which], phase)
            await pause(moment)  # the moment is the point
            await host.gateway.stop(signal.SIGKILL)
            await asyncio.gather(listening, return_exceptions=True)
            await host.gateway.start()
            records: list[dict[str, Any]] = [await host.ended(identity) for identity in begun]
            said = f"seed {SEED}, round {round_}, killed {moment:.3f} s into {phase} of {which}: {records}"
            ends += [record["state"] for record in records]
            if records[0]["state"] == "succeeded":
                assert (await host.visit(f"killed-{round_}.test"))[0] == 200, said
                await host.call("DELETE", f"/v1/tenants/killed-{round_}-test")
            with contextlib.suppress(AssertionError):  # a destroyed tenant's route goes a moment later
                await until(lambda: host.leavings() == before, 15, every=0.2)
            assert host.leavings() == before, said
            assert (await host.visit("live.test"))[0] == 200, said
            now = inside("live-test")
            assert live(now) == at_rest, said
            assert re.search(r"^\./\.site-kept/d-[0-9a-f]{16}/site ", now, re.MULTILINE), said
            assert "/.site-kept/taken" not in now, said
            if seen:
                again: dict[int, bytes] = {}
                async with host.gateway.http("*") as session, asyncio.timeout(20):
                    async with session.get("/v1/events?type=deployment.*&lastEventId=1") as answer:
                        await take(answer, again, max(seen))
                assert {number: again.get(number) for number in seen} == seen, said
                assert all(orjson.loads(value)["id"] == str(number) for number, value in seen.items())
    print(
        f"killed {KILLS} times: {ends.count('succeeded')} succeeded, {ends.count('rolledback')} rolled back"
    )
    assert not [entry for entry in environment.instances() if entry["name"].startswith("killed-")]
