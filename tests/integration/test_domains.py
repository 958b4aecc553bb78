"""A domain has one owner whatever happens at once: real sites behind a real Caddy.

GATEWAY_TEST_DOMAIN_ROUNDS is the number of rounds with everything at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.host.requirements import doctor
from gateway.settings import Settings
from tests import thorough
from tests.contracts.gateway import no_traceback, sse
from tests.contracts.idle import get, told
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.waits import pause, until, until_true

pytestmark = pytest.mark.timeout(1800)
ROUNDS = int(os.environ.get("GATEWAY_TEST_DOMAIN_ROUNDS", "6"))
HOME = "gw.test"  # the gateway's own

# each answers with its tenant's name: a container has that name, and a folder is below one that has it
BUN = """
const who = require("os").hostname();
Bun.serve({port: process.env.PORT, hostname: "0.0.0.0", fetch: () => new Response(who)});
"""
PYTHON = """
import http.server, os, pathlib
who = pathlib.Path.cwd().parts[-4].encode()
class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(who)))
        self.end_headers()
        self.wfile.write(who)
    def log_message(self, *words): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Site).serve_forever()
"""


@dataclass
class World:
    """A gateway of one runtime, and the state of its Incus or its folder, read without our code."""

    host: Hosting
    runtime: str

    def tenants(self) -> dict[str, dict[str, Any]]:
        """Return each tenant's domain and its address in the form of routes."""
        if self.runtime == "incus":
            listed: list[dict[str, Any]] = []

            def whole() -> bool:  # for an instance that is stopping Incus reports only the name
                listed[:] = json.loads(environment.incus("query", "/1.0/instances?recursion=1").stdout)
                return all(entry["config"] is not None for entry in listed)

            until_true(whole)
            found = {}
            for entry in listed:
                config = entry["config"]
                if entry["expanded_config"].get("user.gateway.managed") == "true":
                    address = (entry["expanded_devices"].get("eth0") or {}).get("ipv4.address")
                    target = f"{address}:{config.get('user.gateway.port')}"
                    made = not config.get("user.gateway.deployment")
                    domain = config.get("user.gateway.domain") if made else None
                    found[entry["name"]] = {"domain": domain or None, "target": target}
            return found
        home = self.host.settings.state_dir / "tenants"
        found = {}
        for folder in home.iterdir():
            with contextlib.suppress(FileNotFoundError):
                record = json.loads((folder / "tenant.json").read_text())
                made = not json.loads((folder / "site.json").read_text()).get("deployment")
                target = f"127.0.0.1:{record.get('port')}"
                found[folder.name] = {"domain": record["domain"] if made else None, "target": target}
        return found

    def owners(self) -> dict[str, list[str]]:
        """Return the tenants that carry each domain."""
        owners: dict[str, list[str]] = {}
        for name, facts in self.tenants().items():
            if facts["domain"] is not None:
                owners.setdefault(facts["domain"], []).append(name)
        return owners

    def leads(self) -> dict[str, str]:
        """Return where each domain leads: to a tenant's name, or to an address that no tenant has."""
        names = {facts["target"]: name for name, facts in self.tenants().items()}
        found = {}
        for entry in (self.host.settings.state_dir / "caddy" / "routes").iterdir():
            with contextlib.suppress(OSError):
                target = entry.readlink().name.removeprefix("asleep_")
                found[entry.name] = names.get(target, target)
        return {domain: where for domain, where in found.items() if domain not in (HOME, "probe.invalid")}

    async def patch(self, tenant: str, domain: str | None, **options: Any) -> tuple[int, Any]:
        status, said, _ = await self.host.call(
            "PATCH", f"/v1/tenants/{tenant}", {"domain": domain}, **options
        )
        return status, said

    async def given(self, tenant: str, domain: str | None) -> None:
        status, said = await self.patch(tenant, domain)
        assert status == 200, said

    async def site(self, tenant: str, domain: str | None = None, **more: Any) -> None:
        record = await self.host.deploy(domain or f"{tenant}.test", "who", tenant=tenant, **more)
        assert record["state"] == "succeeded", record["error"]

    async def gone(self, *tenants: str) -> None:
        for tenant in tenants:
            await self.host.call("DELETE", f"/v1/tenants/{tenant}")


@contextlib.asynccontextmanager
async def world(base: Settings, folder: Path, runtime: str, **changes: Any) -> AsyncIterator[World]:
    template = folder / "templates" / "who"
    template.mkdir(parents=True)
    program = ("bun", "site.js", BUN) if runtime == "incus" else ("python3", "site.py", PYTHON)
    (template / "site.toml").write_text(f'start = ["{program[0]}", "{program[1]}"]\nport = 3000\n')
    (template / program[1]).write_text(program[2])
    fields: dict[str, Any] = {
        "templates_dir": template.parent,
        "runtime": runtime,
        "domain": HOME,
        **changes,
    }
    constants = {"gateway.lifecycle.idle.LOOK_INTERVAL": 0.2, "gateway.caddy.caddy.KEEPALIVE": 0.5}
    async with hosting(base, folder / "state", constants=constants, **fields) as host:
        yield World(host, runtime)
        await no_traceback(host.gateway)


@pytest.fixture(scope="module", params=["incus", "local"])
async def both(
    request: pytest.FixtureRequest, incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """A gateway of either runtime. Both decide alike about domains: `local` is for everything at once."""
    folder = tmp_path_factory.mktemp(f"domains-{request.param}")
    async with world(incus_settings, folder, request.param) as made:
        yield made


@pytest.fixture(scope="module")
async def real(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A gateway on Incus, for tests of an operator's actions."""
    async with world(incus_settings, tmp_path_factory.mktemp("domains-real"), "incus") as made:
        yield made


async def seen(what: Any) -> None:
    """Wait for the effects of Incus's events."""
    await until(lambda: asyncio.to_thread(what), every=0.05)


# --- a route is there when its PATCH answers -------------------------------------------------------------


async def test_a_domain_is_served_when_its_patch_answers_and_the_old_one_no_more(both: World) -> None:
    await both.site("quick")
    before = "quick.test"
    for number in range(8):
        domain = f"quick-{number}.test"
        await both.given("quick", domain)
        assert await both.host.visit(domain) == (200, "quick")
        assert (await both.host.visit(before))[0] == 404
        before = domain
    await both.given("quick", None)
    assert (await both.host.visit(before))[0] == 404
    await both.host.call("POST", "/v1/tenants/quick/stop")
    await both.given("quick", "quick.test")
    assert both.leads() == {"quick.test": "quick"}
    await both.host.call("POST", "/v1/tenants/quick/start")
    await both.host.answers("quick.test", 200, "quick")
    await both.gone("quick")
    await seen(lambda: both.leads() == {})


async def test_a_clone_is_led_to_when_its_patch_answers(real: World) -> None:
    await real.site("first")
    status, _, _ = await real.host.call("POST", "/v1/tenants/first/clone", {"tenant": "second"})
    assert status == 201
    await real.given("second", "second.test")
    status, text = await real.host.visit("second.test")
    assert status in (200, 502), text  # its site may still be starting
    assert real.leads() == {"first.test": "first", "second.test": "second"}
    await real.host.answers("second.test", 200, "second")
    await real.gone("first", "second")


async def test_a_sleeping_tenants_new_domain_wakes_it(both: World) -> None:
    async with told(both.host.gateway, "dozes", "tenant.stopped") as events:
        await sleeping(both, "dozes", events)
        await both.given("dozes", "woken.test")
        assert (await both.host.visit("dozes.test"))[0] == 404
        assert await both.host.visit("woken.test") == (200, "dozes")
    await both.gone("dozes")


def rests_soon(of: World, tenant: str) -> None:
    """Let a tenant fall asleep after a second without visitors."""
    if of.runtime == "incus":
        environment.configure(tenant, "user.gateway.idle_stop", "1")
        return
    record = of.host.settings.state_dir / "tenants" / tenant / "tenant.json"
    fresh = record.with_suffix(".test")
    fresh.write_text(json.dumps({**json.loads(record.read_text()), "idle_stop": 1.0}))
    fresh.replace(record)  # the gateway must never read half of it


async def sleeping(of: World, tenant: str, events: aiohttp.ClientResponse) -> None:
    """Create a tenant; return once it sleeps."""
    await of.site(tenant)
    rests_soon(of, tenant)
    while (await sse(events, 1, 40.0))[0]["data"]["data"].get("reason") != "idle":
        pass
    async with of.host.gateway.http(tenant) as http:
        assert (await get(http, tenant))["asleep"]


# --- single attacks --------------------------------------------------------------------------------------


async def test_the_gateways_own_names_are_nobodys_even_after_a_sleep_and_a_wake(both: World) -> None:
    """Neither by PATCH, nor by a deployment, nor by a key written by hand; the gateway stays reachable."""
    async with told(both.host.gateway, "thief", "tenant.*") as events:
        await sleeping(both, "thief", events)
        for name in (HOME, HOME.upper() + ".", "probe.invalid"):
            status, said = await both.patch("thief", name)
            assert (status, said["code"], said["reason"]) == (409, "conflict", "domain_owned")
            body = {"domain": name, "template": "who", "tenant": "thief"}
            status, said, _ = await both.host.call("POST", "/v1/deployments", body)
            assert (status, said["code"], said["reason"]) == (409, "conflict", "domain_owned")
        async with both.host.gateway.http("thief") as http:
            for name in (HOME, "probe.invalid"):
                if both.runtime == "incus":
                    environment.configure("thief", "user.gateway.domain", name)
                    while (event := (await sse(events, 1))[0])["event"] != "tenant.domain.contested":
                        pass
                    facts = {"domain": name, "keeps": False, "reason": "reserved"}
                    assert event["data"]["data"] == facts
                async with http.post("/v1/tenants/thief/start") as answer:
                    assert answer.status == 200
                while (event := (await sse(events, 1, 40.0))[0])["data"]["data"].get("reason") != "idle":
                    pass
                async with http.post("/v1/tenants/thief/exec", json={"argv": ["true"]}) as answer:
                    assert answer.status == 200  # woken
                assert json.loads((await both.host.visit(HOME, "/healthz"))[1]) == {"status": "alive"}
                assert (await both.host.visit("probe.invalid"))[1] != "thief"
                assert both.leads().keys() <= {"thief.test"}
    await both.gone("thief")


async def test_a_patch_into_anothers_first_deployment_takes_nothing(both: World) -> None:
    await both.site("greedy")
    for number, delay in enumerate((0.0, 0.01, 0.03, 0.06, 0.09) if thorough.ALL else (0.0, 0.03)):
        domain = f"fresh-{number}.test"
        deploying = asyncio.create_task(both.host.deploy(domain, "who", tenant="fresh"))
        await pause(delay)
        while True:  # until the deployment is over
            status, said = await both.patch("greedy", domain)
            if status == 200 and deploying.done():
                break
            if status == 200:  # it came first
                record = await deploying
                assert (record["state"], record["error"]["reason"]) == ("rolledback", "domain_owned")
                break
            assert (status, said["reason"]) == (409, "domain_owned")
            if deploying.done():
                assert deploying.result()["state"] == "succeeded", deploying.result()["error"]
                assert await both.host.visit(domain) == (200, "fresh")
                break
        assert len(both.owners()[domain]) == 1
        await both.given("greedy", "greedy.test")
        await deploying
        await both.gone("fresh")
    await both.gone("greedy")


async def test_whose_domains(both: World) -> None:
    """`contracts` by values are in tests/unit/test_domains.py; here it is what HTTP says."""
    await both.site("mine")
    for domain in ("google.com", "a.b.test"):
        status, said = await both.patch("mine", domain, tenants=("mine",))
        assert (status, said["code"], said["reason"]) == (403, "forbidden", "domain_not_allowed")
        assert "--domain" in said["detail"]
        body = {"domain": domain, "template": "who", "tenant": "mine"}
        for tenants in (("mine",), ("*",)):
            status, said, _ = await both.host.call("POST", "/v1/deployments", body, tenants=tenants)
            assert (status, said["code"], said["reason"]) == (403, "forbidden", "domain_not_allowed")
    options: dict[str, Any] = {"domains": ("*.sites.example.com",)}
    async with both.host.gateway.http("mine", **options) as http:
        for domain, status in (("a.b.sites.example.com", 200), ("mine2.test", 403), ("a.example.com", 403)):
            async with http.patch("/v1/tenants/mine", json={"domain": domain}) as answer:
                assert (domain, answer.status) == (domain, status)
        async with http.get("/v1/session") as answer:
            assert (await answer.json())["domains"] == ["*.sites.example.com"]
    assert await both.host.visit("a.b.sites.example.com") == (200, "mine")
    async with both.host.gateway.http("*", scopes=("admin",)) as http:
        async with http.patch("/v1/tenants/mine", json={"domain": "google.com"}) as answer:
            assert answer.status == 200
    # a tenant may be given the domain that it has
    record = await both.host.ended(
        (
            await both.host.call(
                "POST",
                "/v1/deployments",
                {"domain": "google.com", "template": "who", "tenant": "mine"},
                tenants=("mine",),
            )
        )[1]["id"]
    )
    assert record["state"] == "succeeded", record["error"]
    await both.gone("mine")


async def test_a_copy_by_incus_shares_nothing_silently(real: World) -> None:
    """The original keeps domain and address, even if both sleep or it is renamed; both get events."""
    host = real.host
    await real.site("origin")
    async with (
        told(host.gateway, "origin", "tenant.*") as mine,
        told(host.gateway, "copied", "tenant.*") as theirs,
    ):
        environment.incus("copy", "origin", "copied")
        for events, keeps in ((mine, True), (theirs, False)):
            kinds: dict[str, Any] = {}
            while not {"tenant.domain.contested", "tenant.address.contested"} <= kinds.keys():
                event = (await sse(events, 1))[0]
                kinds[event["event"]] = event["data"]["data"]
            facts = {"domain": "origin.test", "keeps": keeps, "reason": "owned"}
            assert kinds["tenant.domain.contested"] == facts
    for _ in range(5):
        assert await host.visit("origin.test") == (200, "origin")
    async with aiohttp.ClientSession(host.url) as session, session.get("/metrics") as answer:
        shown = await answer.text()
    assert "gateway_domains_contested 1.0" in shown
    assert "gateway_addresses_shared 2.0" in shown
    found = {finding.what: finding for finding in await asyncio.to_thread(doctor, host.settings)}
    for what, fix in (("domains", "incus config set copied"), ("addresses", "incus config device")):
        assert not found[what].ok
        assert "origin" in found[what].detail and "copied" in found[what].detail
        assert fix in found[what].detail
    status, said, _ = await host.call("POST", "/v1/tenants/copied/start", tenants=("copied",))
    assert (status, said["code"], said["reason"]) == (409, "conflict", "address_shared")
    assert "origin" not in said["detail"]
    # another domain does not lead to the original's address
    await real.given("copied", "copied.test")
    assert (await host.visit("copied.test"))[0] == 404
    assert await host.visit("origin.test") == (200, "origin")
    # a renamed instance keeps its domain, whatever else carries it
    environment.configure("copied", "user.gateway.domain", "origin.test")
    environment.incus("stop", "--force", "origin")
    environment.incus("rename", "origin", "moved")
    await seen(lambda: real.leads() == {"origin.test": "moved"})
    # when the owner is gone, the remaining one gets both
    await real.gone("moved")
    await seen(lambda: real.leads() == {"origin.test": "copied"})
    status, _, _ = await host.call("POST", "/v1/tenants/copied/start")
    assert status == 200
    await host.answers("origin.test", 200, "copied")
    await real.gone("copied")


async def test_a_key_written_by_hand_takes_nothing(real: World) -> None:
    await asyncio.gather(real.site("owner"), real.site("other"))
    async with told(real.host.gateway, "other", "tenant.domain.contested") as events:
        for spelling in ("owner.test", "OWNER.test."):
            environment.configure("other", "user.gateway.domain", spelling)
            if spelling == "owner.test":  # once for one state
                facts = {"domain": "owner.test", "keeps": False, "reason": "owned"}
                assert (await sse(events, 1))[0]["data"]["data"] == facts
            for _ in range(5):
                assert await real.host.visit("owner.test") == (200, "owner")
    # nothing changes for the owner: an update, a restart of the gateway
    await real.site("owner")
    assert await real.host.gateway.stop() == 0
    await real.host.gateway.start()
    assert await real.host.visit("owner.test") == (200, "owner")
    status, said = await real.patch("other", "owner.test")
    assert (status, said["reason"]) == (409, "domain_owned")
    await real.gone("owner")
    await seen(lambda: real.leads() == {"owner.test": "other"})
    assert await real.host.visit("owner.test") == (200, "other")
    await real.gone("other")


async def test_a_deployment_holds_its_domain_after_a_restart_until_it_is_undone(real: World) -> None:
    await real.site("waits")
    body = {"domain": "held.test", "template": "who", "tenant": "held"}
    status, begun, _ = await real.host.call("POST", "/v1/deployments", body)
    assert status == 202
    await real.host.reached(begun["id"], "push")
    await real.host.gateway.stop(9)  # type: ignore[arg-type]  # SIGKILL
    await real.host.gateway.start()

    async def given() -> bool:
        status, said = await real.patch("waits", "held.test")
        assert status == 200 or (status, said["reason"]) == (409, "domain_owned")
        return bool(status == 200)

    await until(given, 60)
    record = await real.host.ended(begun["id"])
    assert record["state"] == "rolledback", record
    assert real.owners()["held.test"] == ["waits"]
    assert await real.host.visit("held.test") == (200, "waits")
    await real.gone("waits", "held")


# --- everything at once ----------------------------------------------------------------------------------


@dataclass
class Race:
    """Everything at once for one domain after another, with a record of who may have answered when."""

    world: World
    chance: random.Random
    names: list[str] = field(default_factory=lambda: [f"race-{n}" for n in range(4)])
    # who had a domain: from the start of the request for it until the answer that took it away
    had: list[list[Any]] = field(default_factory=list)
    unsure: list[list[Any]] = field(default_factory=list)
    visits: list[tuple[str, str, float, float]] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    done: bool = False

    @staticmethod
    def who(name: str) -> str:
        """Return the part of a tenant's name that an operator's rename keeps."""
        return name[:6]

    def begins(self, tenant: str, domain: str, since: float) -> None:
        self.had.append([self.who(tenant), domain, since, None])

    def ends(self, tenant: str, but: str | None, at: float) -> None:
        for entry in self.had:
            if entry[0] == self.who(tenant) and entry[3] is None and entry[1] != but:
                entry[3] = at

    async def give(self, tenant: str, domain: str) -> None:
        """PATCH at some moment; if the domain is given, it must be served at once."""
        await pause(self.chance.uniform(0, 0.09))
        since = time.monotonic()
        entry = [self.who(tenant), domain, since, None]
        self.had.append(entry)  # it may serve before we get the answer
        status, said = await self.world.patch(tenant, domain)
        if status in (404, 503):  # an operator is stopping or renaming it: it may or may not have the domain
            self.unsure.append(entry)
            return
        if status != 200:
            entry[3] = time.monotonic()
            assert status == 409, said
            return
        self.ends(tenant, domain, time.monotonic())
        status, _ = await self.world.host.visit(domain)
        assert status != 404, f"{domain} leads nowhere right after {tenant} got it"

    async def deploy(self, tenant: str, domain: str) -> None:
        await pause(self.chance.uniform(0, 0.09))
        entry = [self.who(tenant), domain, time.monotonic(), None]
        self.had.append(entry)
        body = {"domain": domain, "template": "who", "tenant": tenant}
        status, begun, _ = await self.world.host.call("POST", "/v1/deployments", body)
        if status == 202:
            record = await self.world.host.ended(begun["id"])
            if record["state"] == "succeeded":
                return
            assert record["error"]["reason"] == "domain_owned", record["error"]
        else:
            assert status == 409, begun
        entry[3] = time.monotonic()

    async def clone(self, domain: str) -> None:
        status, said, _ = await self.world.host.call(
            "POST", f"/v1/tenants/{self.names[0]}/clone", {"tenant": "race-c"}
        )
        assert status in (201, 504), said
        await self.give("race-c", domain)

    async def rename(self, number: int) -> None:
        """Do what an operator does: stop, rename, start."""
        old = self.names[number]
        new = f"race-{number}" if old != f"race-{number}" else f"race-{number}-b"
        for words in (("stop", "--force", old), ("rename", old, new), ("start", new)):
            done = await asyncio.to_thread(environment.incus, *words, check=False)
            if done.returncode != 0 and words[0] == "rename":  # a visitor woke it in between
                return
        self.names[number] = new

    async def visit(self, domain: str, between: float) -> None:
        while not self.done:
            since = time.monotonic()
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with asyncio.timeout(20):
                    status, text = await self.world.host.visit(domain)
                self.statuses[status] = self.statuses.get(status, 0) + 1
                if status == 200:
                    self.visits.append((domain, text, since, time.monotonic()))
            await pause(between)

    def wrong(self) -> list[tuple[str, str, float, float]]:
        """Return the answers of sites that cannot have had the domain at that time."""
        return [
            (domain, text, since, until)
            for domain, text, since, until in self.visits
            if not any(
                who == self.who(text)
                and of == domain
                and begun <= until
                and (ended is None or ended >= since)
                for who, of, begun, ended in self.had
            )
        ]

    async def round(self, number: int) -> None:
        prize = f"prize-{number % 3}.test"
        now = {name: facts["domain"] for name, facts in self.world.tenants().items()}
        works = []
        for name in self.names:
            if now.get(name) == prize:  # give it up while others want it
                works.append(self.give(name, f"{self.who(name)}.test"))
            elif self.chance.random() < 0.7:
                works.append(self.give(name, prize))
        kind = number % 8
        if kind == 0:
            works.append(self.deploy("race-n", prize))
        elif kind == 2 and self.world.runtime == "incus":
            works.append(self.clone(prize))
        elif kind == 4 and self.world.runtime == "incus":
            works.append(self.rename(1))
        elif kind == 6:
            name = self.names[2]
            works.append(self.deploy(name, now.get(name) or f"{name}.test"))
        self.chance.shuffle(works)
        await asyncio.gather(*works)
        owners = self.world.owners()
        for entry in self.unsure:
            if entry[0] in map(self.who, owners.get(entry[1], ())):
                self.ends(entry[0], entry[1], time.monotonic())
            else:
                entry[3] = time.monotonic()
        self.unsure.clear()
        assert {domain: names for domain, names in owners.items() if len(names) > 1} == {}
        for domain, where in self.world.leads().items():
            assert [where] == owners.get(domain, [where]), f"{domain} leads to {where}"
        for name in ("race-n", "race-c"):
            self.ends(name, None, time.monotonic() + 5)
            await self.world.gone(name)
        wrong = self.wrong()
        assert not wrong, (wrong[:3], [entry for entry in self.had if entry[1] == wrong[0][0]][-6:])
        self.visits.clear()
        self.had = [entry for entry in self.had if entry[3] is None or entry[3] > time.monotonic() - 60]


@pytest.mark.parametrize("both", ["incus", "local"], indirect=True, scope="module")
async def test_whatever_happens_at_once_a_domain_has_one_owner(both: World) -> None:
    """Deployments, PATCH, clones, renames, sleeps, wakes: one owner each, and no other site answers."""
    race = Race(both, random.Random(13))
    for name in race.names:
        race.begins(name, f"{name}.test", time.monotonic())
    for name in race.names:
        await both.site(name)
    rests_soon(both, "race-3")
    domains = [f"prize-{number}.test" for number in range(3)] + [f"race-{number}.test" for number in range(4)]
    visitors = [
        asyncio.create_task(race.visit(domain, 3.0 if domain == "race-3.test" else 0.1)) for domain in domains
    ]
    try:
        for number in range(ROUNDS):
            await race.round(number)
    finally:
        race.done = True
        await asyncio.gather(*visitors)
    print(f"{both.runtime}: {ROUNDS} rounds, answers {race.statuses}")
    assert race.statuses[200] > ROUNDS
    await both.gone(*race.names)
