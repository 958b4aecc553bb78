"""A deployment that is broken anywhere leaves nothing: every effect fails after it happened.

With `tests/run thorough` it fails before that too, when less is there to be undone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.caddy import Caddy
from gateway.deployments import Context, Deployer, DeploymentRequest, Record
from gateway.deployments.record import Register
from gateway.deployments.request import Rollback
from gateway.errors import Unavailable
from gateway.events import Bus, Event, MemoryJournal
from gateway.ownership.domains import Domains
from gateway.runtime.incus import IncusRuntime, IncusSites
from gateway.runtime.sites import Sites
from gateway.settings import Settings
from gateway.storage.store import Store
from tests import thorough
from tests.integration import environment
from tests.integration.sites import OPERATOR, Hosting, RealCaddy, settings_for
from tests.waits import until

# every effect of a deployment, in order; what it does before it is a fault of the phase before
CREATE = ["create", "push", "install", "start", "expose", "set", "ask", "certify"]
UPDATE = ["push", "install", "start", "expose", "set", "ask", "halt", "settle"]
ROLLBACK = ["take", "start", "expose", "set", "ask", "settle"]
WHEN = ("before", "after") if thorough.ALL else ("after",)


@dataclass
class Broken:
    """Hands every call on to the real thing, but breaks at one point for each tenant or domain.

    `when` is before, after (what was to be done is done) or hang (it is done, and never returns).
    """

    real: Any
    faults: dict[str, tuple[str, str]] = field(default_factory=dict)
    reached: dict[str, asyncio.Event] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        if name not in {*CREATE, *UPDATE, *ROLLBACK}:
            return found
        return self._broken_later(name, found) if name != "set" else self._broken(name, found)

    def _broken(self, name: str, found: Callable[..., Any]) -> Callable[..., Any]:
        def call(subject: str, *words: Any) -> Any:
            self._fail(subject, name, "before")
            result = found(subject, *words)
            self._fail(subject, name, "after")
            return result

        return call

    def _broken_later(self, name: str, found: Callable[..., Any]) -> Callable[..., Any]:
        async def call(subject: str, *words: Any) -> Any:
            self._fail(subject, name, "before")
            result = await found(subject, *words)
            self._fail(subject, name, "after")
            if self.faults.get(subject) == (name, "hang"):
                del self.faults[subject]
                self.reached.setdefault(subject, asyncio.Event()).set()
                await asyncio.Event().wait()
            return result

        return call

    def _fail(self, subject: str, name: str, when: str) -> None:
        if self.faults.get(subject) == (name, when):
            del self.faults[subject]
            raise Unavailable(f"broken {when} {name}")


@dataclass
class Rig:
    """Deployments of this process on the tests' Incus, with a real Caddy."""

    deployments: Deployer
    sites: Broken
    former: Broken
    caddy: Broken
    journal: MemoryJournal
    host: Hosting

    async def deploy(self, domain: str, **more: Any) -> Record:
        record, _ = await self.deployments.begin(DeploymentRequest(domain, "static", **more), OPERATOR)
        return record

    async def rollback(self, tenant: str) -> Record:
        record, _ = await self.deployments.change(tenant, Rollback(), OPERATOR)
        return record

    def fails(self, number: int, name: str, when: str) -> None:
        """Have the next call of one kind fail for the tenant `live-NUMBER-test`, or for its domain."""
        subject = f"live-{number}.test" if name in ("set", "ask") else f"live-{number}-test"
        target = self.caddy if name in ("set", "ask") else self.former if name == "take" else self.sites
        target.faults[subject] = (name, when)

    async def ended(self, record: Record) -> Record:
        await until(lambda: record.over, 100)
        return record

    async def told(self, record: Record) -> list[str]:
        """Return the types of a deployment's events, in their order."""
        found, after, end = list[Event](), 0, self.journal.newest
        while after < end:
            stretch = await self.journal.read(after, 100_000)
            found += stretch.events
            after = stretch.end
        return [event.type for event in found if event.deployment == record.id]


@pytest.fixture(scope="module")
async def rig(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    state = tmp_path_factory.mktemp("faults") / "state"
    settings = settings_for(incus_settings, state, verify_timeout=20.0)
    process = RealCaddy(settings)
    await process.start()
    journal = MemoryJournal(100_000)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(process.stop)
        store = await stack.enter_async_context(Store(settings.state_dir))
        runtime = await stack.enter_async_context(IncusRuntime(settings))
        sites = Broken(await stack.enter_async_context(IncusSites(settings, runtime)))
        former = Broken(sites.real.former)
        vars(sites)["former"] = former
        caddy = Broken(await stack.enter_async_context(Caddy(settings)))
        bus = Bus(journal)
        domains = await Domains.opened(runtime.tenants, store, bus, settings)
        register = Register(store, domains, settings)
        deployments = await stack.enter_async_context(
            Deployer(
                Context(
                    runtime=runtime,
                    sites=cast(Sites, sites),
                    caddy=cast(Caddy, caddy),
                    domains=domains,
                    register=register,
                    bus=bus,
                    settings=settings,
                )
            )
        )
        await deployments.recover()
        yield Rig(deployments, sites, former, caddy, journal, Hosting(settings, Path("/dev/null")))
        await asyncio.to_thread(remove, "live-")


def remove(prefix: str) -> None:
    for name in [entry["name"] for entry in environment.instances()]:
        if name.startswith(prefix):
            environment.incus("delete", "--force", name)


@pytest.fixture(autouse=True)
async def nothing_is_left(rig: Rig) -> AsyncIterator[None]:
    """Remove the sites of each test; those that are updated stay for the next one.

    What the reconciler would do about it some time later, amid the next test, it does now.
    """
    yield
    await asyncio.to_thread(remove, "fault-")
    async with asyncio.timeout(60):
        await rig.deployments._reconciler.reconcile()
        while any(domain.startswith("fault-") for domain, _ in rig.host.leavings()["routes"]):
            await rig.deployments._reconciler.reconcile()


async def deployed(rig: Rig, number: int, **more: Any) -> None:
    """Deploy the site `live-NUMBER.test`, as its first one or as an update."""
    record = await rig.ended(await rig.deploy(f"live-{number}.test", **more))
    assert record.state == "succeeded", record.error


async def test_a_new_site_that_breaks_anywhere_leaves_nothing(rig: Rig) -> None:
    """Whichever effect of a first deployment fails, all is as it was."""
    before = rig.host.leavings()
    records = []
    for number, (name, when) in enumerate((name, when) for name in CREATE[:-1] for when in WHEN):
        tenant, domain = f"fault-{number}-test", f"fault-{number}.test"
        target = rig.caddy if name in ("set", "ask") else rig.sites
        target.faults[domain if target is rig.caddy else tenant] = (name, when)
        records.append((name, when, await rig.deploy(domain)))
    for name, when, record in records:
        await rig.ended(record)
        assert record.state == "rolledback", (name, when, record)
        assert record.error is not None
        assert record.error["message"] == f"broken {when} {name}"
    assert rig.host.leavings() == before


async def test_an_update_that_breaks_anywhere_leaves_the_old_site_as_it_was(rig: Rig) -> None:
    """Whichever effect of an update fails, the old site answers, and its container holds nothing new."""
    points = [(name, when) for name in UPDATE for when in WHEN]
    tenants = 3
    await asyncio.gather(*(deployed(rig, number) for number in range(tenants)))
    before = rig.host.leavings()
    at_rest = [inside(f"live-{number}-test") for number in range(tenants)]
    for start in range(0, len(points), tenants):
        records = []
        for number, (name, when) in enumerate(points[start : start + tenants]):
            rig.fails(number, name, when)
            records.append((name, when, await rig.deploy(f"live-{number}.test", env={"A": "1"})))
        for name, when, record in records:
            await rig.ended(record)
            assert record.state == "rolledback", (name, when, record)
            assert record.error is not None
            assert record.error["message"] == f"broken {when} {name}"
        assert rig.host.leavings() == before, points[start : start + tenants]
        for number in range(tenants):
            assert inside(f"live-{number}-test") == at_rest[number], points[start : start + tenants]
            assert (await rig.host.visit(f"live-{number}.test"))[0] == 200


async def test_a_rollback_that_breaks_anywhere_leaves_the_live_site_and_the_kept_one(rig: Rig) -> None:
    """Whichever effect of a rollback fails, the live site answers, and the container holds what it did."""
    points = [(name, when) for name in ROLLBACK for when in WHEN]
    tenants = 3
    there = {entry["name"] for entry in environment.instances()}
    missing = [number for number in range(tenants) if f"live-{number}-test" not in there]
    await asyncio.gather(*(deployed(rig, number) for number in missing))
    await asyncio.gather(*(deployed(rig, number, env={"A": "1"}) for number in range(tenants)))
    before = rig.host.leavings()
    at_rest = [inside(f"live-{number}-test") for number in range(tenants)]
    assert all("/site.service" in said and "/.site-kept/d-" in said[1:] for said in at_rest)
    for start in range(0, len(points), tenants):
        records = []
        for number, (name, when) in enumerate(points[start : start + tenants]):
            rig.fails(number, name, when)
            records.append((name, when, await rig.rollback(f"live-{number}-test")))
        for name, when, record in records:
            await rig.ended(record)
            assert (record.state, (record.error or {}).get("message")) == (
                "rolledback",
                f"broken {when} {name}",
            ), (name, when, record)
        assert rig.host.leavings() == before, points[start : start + tenants]
        for number in range(tenants):
            assert inside(f"live-{number}-test") == at_rest[number], points[start : start + tenants]
            assert (await rig.host.visit(f"live-{number}.test"))[0] == 200


def inside(tenant: str) -> str:
    """Return what a deployment may have changed in a container."""
    look = (
        "cd /srv && find . -path ./site/node_modules -prune -o -printf '%p %s %u\\n' | sort;"
        "ls -l --time-style=+ /etc/site* /etc/systemd/system/site* /run/systemd/system/site*.service "
        "2>/dev/null;"
        "cat /etc/systemd/system/site.service; systemctl is-active site.service site-next.service"
    )
    return environment.incus("exec", tenant, "--", "sh", "-c", look, check=False).stdout.decode()


async def test_an_undo_leaves_what_is_somebody_elses_by_then(rig: Rig) -> None:
    """A route that leads elsewhere, memory that was given, a tenant that was made under the name."""
    domain, tenant = "live-0.test", "live-0-test"
    assert (await rig.ended(await rig.deploy(domain))).state == "succeeded"

    async def hangs(name: str) -> Record:
        subject, target = (domain, rig.caddy) if name == "ask" else (tenant, rig.sites)
        target.reached[subject] = asyncio.Event()
        target.faults[subject] = (name, "hang")
        record = await rig.deploy(domain)
        await asyncio.wait_for(target.reached[subject].wait(), 60)
        return record

    async def somebody(*words: str) -> None:  # in a thread: the deployments of this loop go on meanwhile
        await asyncio.to_thread(environment.incus, *words)

    def now() -> Any:
        return next(entry for entry in environment.instances() if entry["name"] == tenant)

    record = await hangs("ask")
    await asyncio.to_thread(environment.configure, tenant, "limits.memory", "777MiB")
    rig.caddy.real.set(domain, "127.0.0.9:9")
    assert (await rig.deployments.cancel(record.id)).state == "rolledback"
    assert now()["config"]["limits.memory"] == "777MiB"
    assert "user.gateway.memory" not in now()["config"]
    assert rig.caddy.real.get(domain) == "127.0.0.9:9"

    await somebody("stop", "--force", tenant)
    record = await hangs("install")  # which started it, and would stop it again
    await somebody("delete", "--force", tenant)
    await somebody("launch", rig.host.settings.image, tenant, "--profile", rig.host.settings.profile)
    assert (await rig.deployments.cancel(record.id)).state == "rolledback"
    assert now()["status"] == "Running"
    await asyncio.to_thread(remove, tenant)


@pytest.mark.parametrize("name", ["create", "push", "expose"])
async def test_a_cancelled_deployment_leaves_nothing(rig: Rig, name: str) -> None:
    """A cancel in mid-phase answers once all is undone, and says so in this order."""
    before = rig.host.leavings()
    subject, domain = "fault-cancel-test", "fault-cancel.test"
    rig.sites.reached[subject] = asyncio.Event()
    rig.sites.faults[subject] = (name, "hang")
    record = await rig.deploy(domain)
    await asyncio.wait_for(rig.sites.reached[subject].wait(), 60)
    said = await rig.deployments.cancel(record.id)
    assert said.state == "rolledback"
    assert said.error is not None
    assert said.error["code"] == "cancelled"
    assert (await rig.told(said))[-2:] == ["deployment.cancelled", "deployment.rolledback"]
    assert rig.host.leavings() == before
