"""A tenant's size is changed while it runs, up and down, as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.host.setup import quota_kind
from gateway.rootfs import memory
from gateway.rootfs.site_cgroup import SITE
from gateway.runtime.sizes import SITE_SHARE
from gateway.settings import MiB, Settings
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.waits import until

pytestmark = pytest.mark.timeout(200)
DOMAIN, TENANT = "grows.test", "grows-test"
URL = f"/v1/tenants/{TENANT}"
PAGE = os.sysconf("SC_PAGE_SIZE")
SMALL = {"cpu": "1", "memory": "512MiB", "disk": "2GiB"}
MEDIUM = {"cpu": "2", "memory": "1GiB", "disk": "8GiB"}
# with what else runs in the tenant more than a site may have of 512 MiB (85 %), and less than all of it
HOG = "let kept = Array.from({length: 415}, (_, i) => new Uint8Array(1 << 20).fill(i)); console.log('full');"


QUICK = {"gateway.lifecycle.idle.LOOK_INTERVAL": 0.5, "gateway.caddy.caddy.KEEPALIVE": 0.5}


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    state = tmp_path_factory.mktemp("sizes") / "state"
    async with hosting(
        incus_settings,
        state,
        constants=QUICK,
    ) as host:
        record = await host.deploy(DOMAIN)
        assert record["state"] == "succeeded", record["error"]
        yield host


async def resize(host: Hosting, size: str) -> tuple[int, Any]:
    status, answer, _ = await host.call("PATCH", URL, {"size": size})
    return status, answer


async def sh(host: Hosting, line: str) -> str:
    status, answer, _ = await host.call("POST", f"{URL}/exec", {"command": line})
    assert (status, answer["exit_code"]) == (200, 0), answer
    return str(answer["stdout"])


def kernels() -> dict[str, int]:
    """Return the limits in the kernel's own files, on hosts with one cgroup tree or with several."""
    root = Path("/sys/fs/cgroup")
    v1 = (root / "memory").is_dir()
    group = environment.cgroup(TENANT).name
    limit = root / ("memory" if v1 else "") / group / ("memory.limit_in_bytes" if v1 else "memory.max")
    cpus = root / ("cpuset" if v1 else "") / group / "cpuset.cpus"
    first, _, last = cpus.read_text().strip().partition("-")
    shown = json.loads(environment.incus("query", f"/1.0/instances/{TENANT}/state").stdout)
    return {
        "memory": int(limit.read_text()),
        "cpus": int(last or first) - int(first) + 1,
        "disk": shown["disk"]["root"]["total"],
    }


def site() -> int | None:
    """Return the memory that the kernel lets the site have."""
    place = memory.place(environment.init_pid(TENANT))
    found = None if place is None else memory.sample(place.below(SITE))
    return None if found is None else found.limit


async def limited(mib: int, cpus: int, disk: int) -> None:
    """Return once the kernel has these limits; Incus deals out the CPUs a moment after the others."""
    wanted = {"memory": mib * MiB, "cpus": cpus, "disk": disk * MiB}
    assert {**kernels(), "cpus": cpus} == wanted
    share = mib * MiB * SITE_SHARE // 100 // PAGE * PAGE
    await until(lambda: kernels() == wanted and site() == share, every=0.1)


async def asleep(host: Hosting) -> bool:
    return bool((await host.call("GET", URL))[1]["asleep"])


async def made_small(host: Hosting) -> bool:
    return (await resize(host, "small"))[0] == 200


def has(limits: dict[str, Any], wanted: dict[str, str]) -> bool:
    return {key: limits[key] for key in wanted} == wanted


async def test_limits_change_while_a_command_and_the_site_run(host: Hosting) -> None:
    """In the kernel, without a restart of anything; the size holds over a restart, an update and a sleep."""
    main = await sh(host, "systemctl show --value --property=MainPID site.service")
    async with host.gateway.wire(TENANT) as wire:
        await wire.call("events/subscribe", types=["tenant.resized"])
        begun = await wire.call("exec/start", argv=["sleep", "600"])
        await limited(512, 1, 2048)
        status, answer = await resize(host, "medium")
        assert status == 200 and has(answer["limits"], MEDIUM), answer
        told = await wire.until(lambda: wire.notified("event", type="tenant.resized", subject=TENANT))
        assert told["data"]["size"] == "medium" and has(told["data"]["limits"], MEDIUM)
        assert has(told["data"]["from"], SMALL) and told["data"]["by"]
        await limited(1024, 2, 8192)
        status, answer = await resize(host, "small")
        assert status == 200 and has(answer["limits"], SMALL), answer
        await limited(512, 1, 2048)
        assert (await resize(host, "medium"))[0] == 200
        running = (await wire.call("exec/list"))["execs"]
        assert [entry["state"] for entry in running if entry["exec"] == begun["exec"]] == ["running"]
        await wire.call("exec/cancel", exec=begun["exec"])
    assert await sh(host, "systemctl show --value --property=MainPID site.service") == main
    assert (await host.visit(DOMAIN))[0] == 200
    for change in ("restart", "update", "sleep"):
        if change == "update":
            record = await host.deploy(DOMAIN)
            assert record["state"] == "succeeded", record["error"]
        elif change == "sleep":
            environment.configure(TENANT, "user.gateway.idle_stop", "0.1")
            await until(lambda: asleep(host), every=0.2)
            environment.configure(TENANT, "user.gateway.idle_stop", "0")
            assert (await host.visit(DOMAIN))[0] == 200
        else:
            await host.call("POST", f"{URL}/restart")
        _, answer, _ = await host.call("GET", URL)
        assert has(answer["limits"], MEDIUM), (change, answer["limits"])
        assert kernels()["memory"] == 1024 * MiB and kernels()["disk"] == 8192 * MiB
    async with host.gateway.http("*", scopes=("admin",)) as http:
        async with http.get(f"/v1/audit?tenant={TENANT}") as answer:
            entries = (await answer.json())["entries"]
    facts = [entry["facts"] for entry in entries if entry["action"] == "tenant.resize"]
    assert [entry["size"] for entry in facts] == ["medium", "small", "medium"]


async def test_what_is_in_use_is_not_taken_away(host: Hosting) -> None:
    """Nothing of the other limits changes then, nothing dies, and it can still grow."""
    assert (await resize(host, "medium"))[0] == 200
    await sh(host, "fallocate --length 2300M /home/site/large; sync")
    status, answer = await resize(host, "small")
    assert (status, answer["code"], answer["reason"]) == (409, "conflict", "in_use"), answer
    assert answer["what"] == "disk" and answer["used"] > 2300 * MiB and answer["limit"] == 2048 * MiB
    await limited(1024, 2, 8192)
    await host.call("POST", f"{URL}/snapshots", {"name": "large"})
    await sh(host, "rm /home/site/large; sync")
    if simple := quota_kind(host.settings) == "simple":  # what a snapshot holds counts, until it is gone
        status, answer = await resize(host, "small")
        assert (status, answer["reason"], answer["what"]) == (409, "in_use", "disk"), answer
        assert (await host.call("DELETE", f"{URL}/snapshots/large"))[0] == 204
    async with host.gateway.wire(TENANT) as wire:
        begun = await wire.call("exec/start", argv=["bun", "-e", HOG + "setInterval(() => kept[0], 1000)"])
        await wire.until(lambda: b"full" in wire.output[begun["channel"], 1])
        status, answer = await resize(host, "small")
        assert (status, answer["reason"], answer["what"]) == (409, "in_use", "memory"), answer
        assert 415 * MiB <= answer["used"] < 512 * MiB and "MiB of memory" in answer["detail"]
        await limited(1024, 2, 8192)
        assert (await resize(host, "large"))[0] == 200
        running = (await wire.call("exec/list"))["execs"]
        assert [entry["state"] for entry in running if entry["exec"] == begun["exec"]] == ["running"]
        await wire.call("exec/cancel", exec=begun["exec"])
    # nobody tells when all that it held is given back
    await until(lambda: made_small(host), every=0.5)
    if not simple:  # what that snapshot holds is more than there is room for now
        status, answer, _ = await host.call("POST", f"{URL}/snapshots/large/restore")
        assert (status, answer["reason"]) == (409, "in_use"), answer
        assert (await host.visit(DOMAIN))[0] == 200
        status, answer, _ = await host.call("POST", f"{URL}/clone", {"tenant": "copy", "snapshot": "large"})
        assert (status, answer["reason"]) == (409, "in_use"), answer
    assert (await resize(host, "large"))[0] == 200
    assert simple or (await host.call("POST", f"{URL}/snapshots/large/restore"))[0] == 200
    assert kernels()["disk"] == 16384 * MiB


async def test_a_stopped_tenant_gets_a_smaller_size_where_its_disk_is_known(host: Hosting) -> None:
    """A larger one in any case. Full quotas are known of a tenant that runs alone."""
    await host.call("POST", f"{URL}/stop")
    assert (await resize(host, "large"))[0] == 200
    status, answer = await resize(host, "small")
    if known := quota_kind(host.settings) == "simple":
        assert status == 200, answer
    else:
        assert (status, answer["code"]) == (409, "tenant_not_running"), answer
    await host.call("POST", f"{URL}/start")
    assert kernels()["memory"] == (512 if known else 2048) * MiB


@pytest.mark.parametrize("body", [{"size": "huge"}, {"size": 1}, {"size": "small", "domain": None}, {}])
async def test_what_is_no_size(host: Hosting, body: Any) -> None:
    status, answer, _ = await host.call("PATCH", URL, body)
    assert (status, answer["code"]) == (400, "invalid_params")
