"""After whatever is done to a tenant, the kernel limits it as the API says; what is lifted comes back."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

import pytest

from gateway.host.requirements import doctor
from gateway.rootfs import btrfs, memory, quotas
from gateway.rootfs.site_cgroup import SITE
from gateway.runtime.incus import IncusRuntime
from gateway.runtime.sizes import SITE_SHARE, size_of
from gateway.settings import Settings
from tests import thorough
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.waits import until

pytestmark = pytest.mark.timeout(300)
DOMAIN, TENANT, COPY = "limited.test", "limited-test", "limited-copy"
PAGE: Final = 4096


QUICK = {"gateway.lifecycle.idle.LOOK_INTERVAL": 0.5, "gateway.caddy.caddy.KEEPALIVE": 0.5}


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    """A gateway that mends nothing, since it never looks."""
    state = tmp_path_factory.mktemp("limited") / "state"
    never = 3600.0
    async with hosting(
        incus_settings,
        state,
        constants=QUICK,
        reconcile_interval=never,
    ) as host:
        record = await host.deploy(DOMAIN)
        assert record["state"] == "succeeded", record["error"]
        await _as_said(host, "deploy")
        yield host


def _identity(tenant: str) -> str:
    found = next(one for one in environment.instances() if one["name"] == tenant)
    return str(found["config"]["volatile.uuid"])


def _in_force(settings: Settings, tenant: str) -> Mapping[str, int | None]:
    pool = settings.incus_socket.parent / "storage-pools" / settings.pool
    return memory.limits_in_force(environment.init_pid(tenant), pool, tenant, _identity(tenant))


async def _as_said(host: Hosting, what: str, tenant: str = TENANT) -> None:
    """Assert that the kernel's limits are the API's; Incus deals out the CPUs a moment after the others."""
    _, told, _ = await host.call("GET", f"/v1/tenants/{tenant}")
    limits = {key: size_of(value) for key, value in told["limits"].items()} | {"swap": 0}
    found = _in_force(host.settings, tenant)
    assert {**found, "cpu": limits["cpu"]} == limits, (what, tenant)
    await until(lambda: _in_force(host.settings, tenant)["cpu"] == limits["cpu"])
    share = limits["memory"] * SITE_SHARE // 100 // PAGE * PAGE
    await until(lambda: _site(tenant) == share, 20)  # once it has started


def _site(tenant: str) -> int | None:
    place = memory.place(environment.init_pid(tenant))
    found = None if place is None else memory.sample(place.below(SITE))
    return None if found is None else found.limit


async def _deployed(host: Hosting, method: str, path: str, body: Any) -> None:
    status, begun, _ = await host.call(method, path, body)
    assert status == 202, begun
    record = await host.ended(begun["id"])
    assert record["state"] == "succeeded", record["error"]


def _changes(host: Hosting) -> dict[str, Callable[[], Awaitable[object]]]:
    url = f"/v1/tenants/{TENANT}"

    def call(method: str, path: str = "", body: Any = None) -> Callable[[], Awaitable[object]]:
        async def change() -> None:
            status, answer, _ = await host.call(method, f"{url}{path}", body)
            assert status < 300, answer

        return change

    async def slept() -> None:
        async def asleep() -> bool:
            return bool((await host.call("GET", url))[1]["asleep"])

        environment.configure(TENANT, "user.gateway.idle_stop", "0.1")
        await until(asleep, every=0.2)
        environment.configure(TENANT, "user.gateway.idle_stop", "0")
        assert (await host.visit(DOMAIN))[0] == 200

    return {
        "update": lambda: host.deploy(DOMAIN),
        "environment": lambda: _deployed(host, "PATCH", f"{url}/env", {"env": {"A": "b"}}),
        "rollback": lambda: _deployed(host, "POST", f"{url}/rollback", {}),
        "domain": call("PATCH", body={"domain": DOMAIN}),
        "sleep": slept,
        "snapshot": call("POST", "/snapshots", {"name": "before"}),
        "restore": call("POST", "/snapshots/before/restore"),
        "update after a restore": lambda: host.deploy(DOMAIN),
        "restart": call("POST", "/restart"),
    }


@pytest.mark.parametrize("size", ["small", *(("medium",) if thorough.ALL else ())])
async def test_each_change_leaves_the_limits_in_force(host: Hosting, size: str) -> None:
    """With the profile's limits, and with limits of its own."""
    status, answer, _ = await host.call("PATCH", f"/v1/tenants/{TENANT}", {"size": size})
    assert status == 200, answer
    await _as_said(host, f"resize to {size}")
    for what, change in _changes(host).items():
        await change()
        await _as_said(host, what)
    status, answer, _ = await host.call("POST", f"/v1/tenants/{TENANT}/clone", {"tenant": COPY})
    assert status < 300, answer
    await _as_said(host, "clone", COPY)
    await host.call("DELETE", f"/v1/tenants/{COPY}")
    await host.call("DELETE", f"/v1/tenants/{TENANT}/snapshots/before")
    await _as_said(host, "removal of a snapshot")


async def test_limits_that_were_lifted_are_put_in_force_again(host: Hosting) -> None:
    """By the look that a gateway takes each half minute; doctor tells of them until then."""
    settings = host.settings
    for key in ("memory", "processes", "cpu"):
        environment.incus("config", "set", TENANT, f"limits.{key}=")
    pool = settings.incus_socket.parent / "storage-pools" / settings.pool
    group = btrfs.group(1, quotas.number_of(_identity(TENANT)))
    level, number = btrfs.level_of(group)
    subprocess.run(["btrfs", "qgroup", "limit", "none", f"{level}/{number}", pool], check=True)
    lifted = _in_force(settings, TENANT)
    assert [lifted[key] for key in ("memory", "processes", "disk")] == [None] * 3
    look = next(found for found in doctor(settings) if found.what == "limits in force")
    assert not look.ok and f"{TENANT} has " in look.detail and "disk no limit" in look.detail
    before = next(one["config"] for one in environment.instances() if one["name"] == TENANT)
    async with IncusRuntime(settings) as runtime:
        await runtime.resizing.enforce()
        assert _in_force(settings, TENANT) == lifted  # once may be by chance
        await runtime.resizing.enforce()
        await _as_said(host, "the second look")
        now = next(one["config"] for one in environment.instances() if one["name"] == TENANT)
        assert {key: now.get(key) for key in before if key.startswith("limits.")} == {
            key: value for key, value in before.items() if key.startswith("limits.")
        }
        assert "limits.memory" not in now or "limits.memory" in before
    assert next(found for found in doctor(settings) if found.what == "limits in force").ok


async def test_memory_that_an_update_left_doubled_is_taken_back(host: Hosting) -> None:
    """By the next process, too: a gateway may be killed during an update."""
    async with IncusRuntime(host.settings) as killed:
        await killed.resizing.grow(TENANT)
        doubled = _in_force(host.settings, TENANT)["memory"]
        await killed.resizing.enforce()  # not before that update has ended
        assert _in_force(host.settings, TENANT)["memory"] == doubled
    async with IncusRuntime(host.settings) as runtime:
        await runtime.resizing.enforce()
    now = _in_force(host.settings, TENANT)["memory"]
    assert doubled is not None and now is not None and doubled == 2 * now
    await _as_said(host, "taken back")
