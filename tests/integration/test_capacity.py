"""What this host has promised: new tenants and clones beyond it are refused, and `capacity` tells it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from gateway.limits.capacity import host_memory
from gateway.rootfs.instance_record import is_tenant
from gateway.settings import Settings
from tests.integration import environment
from tests.integration.sites import hosting

pytestmark = pytest.mark.timeout(120)


async def test_of_three_at_a_time_the_last_place_is_given_once(
    incus_settings: Settings, tmp_path: Path
) -> None:
    """Others are told why, and nothing is left of them; what is there already is updated as before."""
    # by a hair more than the tenants of other tests have, which run beside it
    tenants = [entry for entry in environment.instances() if is_tenant(entry)]
    used = sum(512 << 20 for entry in tenants if entry["status"] != "Stopped")
    factor = (used + (700 << 20)) / host_memory().total
    async with hosting(incus_settings, tmp_path / "state", overcommit=factor) as host:
        ended = await asyncio.gather(*(host.deploy(f"last{number}.test") for number in range(3)))
        made = [record for record in ended if record["state"] == "succeeded"]
        refused = [record["error"] for record in ended if record["state"] != "succeeded"]
        assert len(made) == 1 and len(refused) == 2, ended
        assert {(error["reason"], error["code"], error["phase"]) for error in refused} == {
            ("capacity", "unavailable", "validate")
        }
        tenant = made[0]["tenant"]
        status, said, _ = await host.call("POST", f"/v1/tenants/{tenant}/clone", {"tenant": "twin"})
        assert (status, said["reason"]) == (503, "capacity")
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "capacity", "--json"),
            env={**os.environ, **environment.variables(host.settings)},
            stdout=asyncio.subprocess.PIPE,
        )
        told, _ = await program.communicate()
        report = json.loads(told)
        assert program.returncode == 0
        assert report["sizes"]["small"]["takes"] == 0
        assert report["sizes"]["small"]["bottleneck"] == "promise"
        assert report["measured"] and 4 << 20 < report["memory_each"] < 512 << 20
        again = await host.deploy(made[0]["domain"])
        assert again["state"] == "succeeded", again["error"]
