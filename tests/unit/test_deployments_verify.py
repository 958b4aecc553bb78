"""When a service is told to listen in vain, when to be unsteady; without tenants."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, strategies

from gateway.deployments import verify
from gateway.deployments.verify import (
    SiteUnderTest,
    Unsteady,
    UptimeCheck,
    Verifier,
    Way,
    WrongAddress,
    why_unsteady,
)
from gateway.errors import ExecFailed, Timeout
from gateway.runtime.incus import site_services
from gateway.runtime.listening import ListeningSocket, in_table, listener, of_tree
from gateway.runtime.sites import Exposure, Life, Recipe, Service, Side
from gateway.settings import Settings
from tests.waits import turn

PORT, AT = 3000, "10.83.3.7"


def told(looks: Iterable[tuple[float, str]]) -> list[str | None]:
    """Return what each look finds: when, and where it listened."""
    misplaced, found = WrongAddress(PORT, (AT,)), []
    for now, where in looks:
        ends = (one.rpartition(":") for one in where.split())
        listens = frozenset(ListeningSocket(address, int(port)) for address, _, port in ends)
        one = misplaced.look(Service("running", listens=listens), now)
        found.append(None if one is None else str(one))
    return found


@pytest.mark.parametrize("where", ["127.0.0.1:3000", "::1:3000", "10.83.3.9:3000"])
def test_the_right_port_of_a_wrong_address_is_told_soon(where: str) -> None:
    *early, late = told([(0.0, ""), (0.7, where), (1.5, where), (4.0, where)])
    assert early == [None] * 3
    assert late == where.replace("::1", "[::1]")


def test_a_right_port_that_is_of_those_for_others_is_told_too() -> None:
    for port in (9229, 41_000):
        misplaced = WrongAddress(port, (AT,))
        service = Service("running", listens=frozenset({ListeningSocket("127.0.0.1", port)}))
        assert [misplaced.look(service, now) for now in (0.0, 3.0)] == [
            None,
            ListeningSocket("127.0.0.1", port),
        ]


@pytest.mark.parametrize("where", ["0.0.0.0:3000", ":::3000", f"{AT}:3000", "127.0.0.1:3000 0.0.0.0:3000"])
def test_what_will_be_reached_is_never_told(where: str) -> None:
    assert told([(now, f"{where} 127.0.0.1:8000") for now in range(60)]) == [None] * 60


@pytest.mark.parametrize("where", ["127.0.0.1:9229", "0.0.0.0:24678", "127.0.0.1:5432", "127.0.0.1:41000"])
def test_what_a_site_needs_for_itself_is_never_told(where: str) -> None:
    assert told([(now, where) for now in range(60)]) == [None] * 60


def test_a_site_that_listens_elsewhere_first_has_a_moment() -> None:
    looks = [(0.0, "127.0.0.1:8000"), (2.9, "127.0.0.1:8000"), (3.6, "127.0.0.1:8000 0.0.0.0:3000")]
    assert told(looks) == [None] * 3
    # and one that comes and goes begins anew
    looks = [(0.0, "127.0.0.1:8000"), (2.0, ""), (4.0, "127.0.0.1:8000"), (6.0, "127.0.0.1:8000")]
    assert told(looks) == [None] * 4


def test_unsteady_is_what_nobody_asked_for() -> None:
    before = Service("running", restarts=1, started=10.0)
    assert why_unsteady(before, before, answered=12.0) == ""
    assert "restarted, 2 times in total" in why_unsteady(
        before, Service("running", restarts=2, started=13.0), answered=12.0
    )
    # somebody started it again: its count begins anew
    assert why_unsteady(before, Service("running", restarts=0, started=13.0), answered=12.0) == ""
    killed = Service("running", restarts=1, started=10.0, oom_kills=1)
    assert "memory" in why_unsteady(before, killed, answered=12.0)
    assert why_unsteady(killed, killed, answered=12.0) == ""
    assert why_unsteady(before, None, answered=12.0) == ""


def test_a_service_is_read_from_what_its_container_tells() -> None:
    said = (
        "NRestarts=2\nExecMainStartTimestampMonotonic=13351533966\nActiveState=active\nSubState=running\n"
        "OomKills=1\nListen=0100007F:1F40\nListen=" + "0" * 24 + "01000000:0BB8\n"
    )
    listens = {ListeningSocket("127.0.0.1", 8000), ListeningSocket("::1", 3000)}
    assert site_services.read(said) == Service("running", 2, 13351.533966, 1, frozenset(listens))
    waits = site_services.read("ActiveState=activating\nSubState=auto-restart\n")
    assert waits is not None and waits.state == "ended"
    assert site_services.read("") is None
    assert site_services.read("ActiveState=\x1b[2J\nNRestarts=" + "9" * 5000 + "\nListen=x\n") == Service(
        "ended"
    )


@given(strategies.text())
def test_whatever_a_container_tells_is_a_service_or_none(said: str) -> None:
    site_services.read(said)
    site_services.read(f"ActiveState={said}\nNRestarts={said}\nListen={said}")
    listener(said)


def test_a_table_is_read_as_the_kernel_writes_it() -> None:
    line = "0: {}:1F40 00000000:0000 {} 00000000:00000000 00:00000000 00000000 1000 0 {} 1 0 100 0 0 10 0"
    mapped = "0000000000000000FFFF00000100007F"
    lines = ["sl local_address", line.format("00000000", "0A", 7), line.format(mapped, "0A", 8)]
    lines += [line.format("0100007F", "0A", 9), line.format("0100007F", "01", 7), "", "x" * 1000]
    assert [*in_table(lines, {"7", "8"})] == [
        ListeningSocket("0.0.0.0", 8000),
        ListeningSocket("127.0.0.1", 8000),
    ]


async def test_a_process_tree_is_asked_where_it_listens() -> None:
    """Also one that a shell started; what others have is not told."""
    code = "import socket, sys; s = socket.create_server((sys.argv[1], 0)); "
    code += "print(s.getsockname()[1]); sys.stdin.read()"
    with subprocess.Popen(
        ["sh", "-c", f'"{sys.executable}" -uc "{code}" 127.0.0.1; true'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as shell:
        assert shell.stdin is not None and shell.stdout is not None
        port = int(await asyncio.to_thread(shell.stdout.readline))
        assert of_tree(shell.pid) == {ListeningSocket("127.0.0.1", port)}
        shell.stdin.close()
    assert not of_tree(shell.pid)


class Rig:
    """A site on loopback whose service does as it is told, and a Caddy that leads there."""

    def __init__(self) -> None:
        self.service: Service | None = Service("running", started=time.monotonic())
        self.life: Life | None = None
        self.status = "200 OK"
        self.part = "200 OK"  # of what its page names
        self.later = ""  # instead, from the second word on
        self.body = ""
        self.said = "out of luck"
        self.told: asyncio.Queue[str] = asyncio.Queue()

    async def ask(self, domain: str, path: str, timeout: float) -> int:
        return int(self._next()[:3])

    def _next(self) -> str:
        status, self.status = self.status, self.later or self.status
        return status

    async def ensure(self) -> bool:
        return False

    async def log(self, tenant: str, side: str) -> str:
        return self.said

    async def tell(self, why: str) -> None:
        self.told.put_nowait(why)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        status = self.part if b".js" in head else self._next()
        writer.write(f"HTTP/1.0 {status}\r\nContent-Type: text/html\r\n\r\n{self.body}".encode())
        writer.close()

    @contextlib.asynccontextmanager
    async def opened(self, **settings: Any) -> AsyncIterator[tuple[Verifier, SiteUnderTest]]:
        async def state(tenant: str, side: str) -> Service | None:
            return self.service

        async def life(tenant: str, side: str) -> Life | None:
            return self.life

        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        services = cast(Any, SimpleNamespace(state=state, life=life, log=self.log))
        verifier = Verifier(services, cast(Any, self), Settings(caddy_ask=port, **settings))
        where = Exposure("127.0.0.1", port)
        async with server, asyncio.timeout(30):
            yield verifier, SiteUnderTest("shop", "live", "shop.test", Recipe(b"", ("x",), 3000), where)
            await verifier.aclose()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(verify, "_LAST", 0.2)
    monkeypatch.setattr(verify, "_MISSING", 0.2)
    monkeypatch.setattr(verify, "_STEADY_LOOK", 0.05)
    monkeypatch.setattr(verify, "_OVER_LOOK", 0.4)
    return Rig()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("0.0.0.0", "listens on the right port but does not answer / in 0.4 s (GATEWAY_VERIFY_TIMEOUT)"),
        ("10.9.9.9", "it must listen on 0.0.0.0 and $PORT"),
    ],
)
async def test_a_site_that_is_slow_is_not_told_to_listen_elsewhere(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, address: str, said: str
) -> None:
    monkeypatch.setattr(verify, "_LOOK", 0.05)
    rig.status = "503 Service Unavailable"
    async with rig.opened(verify_timeout=0.4) as (verifier, site):
        rig.service = Service("running", listens=frozenset({ListeningSocket(address, site.exposure.port)}))
        with pytest.raises(Timeout) as caught:
            await verifier.answering(site)
        assert said in caught.value.message


async def test_a_site_that_stays_settles(rig: Rig) -> None:
    for way in ("caddy", "direct"):
        async with rig.opened() as (verifier, site):
            answered = time.monotonic()
            await verifier.settled(site, way, answered, 0.3)
            assert time.monotonic() >= answered + 0.3
            rig.service = None  # nobody can say how its service does: its answers count
            await verifier.settled(site, way, answered, 0.3)


@pytest.mark.parametrize("way", ["caddy", "direct"])
async def test_a_site_that_does_not_stay_is_told_with_what_it_said(rig: Rig, way: Way) -> None:
    async with rig.opened() as (verifier, site):
        answered = time.monotonic()

        async def fails() -> str:
            with pytest.raises(ExecFailed) as caught:
                await verifier.settled(site, way, answered, 0.3)
            assert caught.value.facts["reason"] == "unsteady"
            assert "Its last output: out of luck" in caught.value.message
            return caught.value.message

        rig.service = Service("ended")
        assert "its service ended" in await fails()
        rig.service = Service("running", restarts=1, started=answered + 0.1)
        assert "was restarted" in await fails()
        rig.service, rig.status, rig.later = Service("running"), "200 OK", "502 Bad Gateway"
        assert "no longer answers (status 502)" in await fails()


async def test_a_site_that_ends_while_its_page_is_waited_for_is_told_at_once(rig: Rig) -> None:
    rig.status = "502 Bad Gateway"
    async with rig.opened() as (verifier, site):
        rig.body, answered = "<script src=x.js></script>", time.monotonic()
        rig.service = Service("running", restarts=1, started=answered + 0.1)
        with pytest.raises(ExecFailed, match="was restarted") as caught:
            await verifier.settled(site, "caddy", answered, 0.3)
        assert caught.value.facts["reason"] == "unsteady"
        rig.service = Service("running")
        away = replace(site, exposure=replace(site.exposure, port=1))
        with pytest.raises(ExecFailed, match="nothing listens"):
            await verifier.settled(away, "caddy", answered, 0.3)


async def test_a_page_that_is_not_whole_is_told(rig: Rig) -> None:
    """A server that is not ready yet has time; what is not there has a moment only."""
    rig.body = '<script src="/a.js"></script><script src="/b.js"></script>'
    rig.part = "404 Not Found"
    async with rig.opened() as (verifier, site):
        with pytest.raises(Timeout, match=r"refers to /a\.js \(and 1 more\), .*: status 404") as caught:
            await verifier.settled(site, "direct", time.monotonic(), 0.0)
        assert caught.value.facts["reason"] == "never_healthy"
        rig.part = "504 Outdated"
        waiting = asyncio.create_task(verifier.settled(site, "direct", time.monotonic(), 0.0))
        await asyncio.wait([waiting], timeout=0.5)
        assert not waiting.done()
        rig.part = "200 OK"
        await waiting


async def test_one_that_is_over_is_watched_on_until_its_tenant_ends(rig: Rig) -> None:
    async with rig.opened() as (verifier, site):
        rig.service = Service("running", started=0.0)
        verifier.watch(site, 60.0, rig.tell)
        await turn()
        rig.service = Service("running", restarts=1, started=time.monotonic() + 1)
        assert "was restarted" in await rig.told.get()
        verifier.watch(site, 60.0, rig.tell)
        verifier.forget("shop")
        verifier.watch(site, 0.0, rig.tell)
        assert verifier._watching == {}
        for number in range(100):
            verifier.watch(replace(site, tenant=f"t{number}"), 60.0, rig.tell)
        assert len(verifier._watching) == 64


async def test_one_that_is_over_is_looked_at_before_and_after_its_time(rig: Rig) -> None:
    """Each look is a command in the container: hundreds of deployments are not to wait for those."""
    asked: list[str] = []
    async with rig.opened() as (verifier, site):
        look = verifier._services.state

        async def counted(tenant: str, side: Side) -> Service | None:
            asked.append(tenant)
            return await look(tenant, side)

        rig.service = Service("running", started=0.0)
        verifier._services.state = counted  # type: ignore[method-assign] # a rig's, and to be counted
        verifier.watch(site, 0.4, rig.tell)
        await asyncio.wait([*verifier._watching.values()])
    assert asked == ["shop", "shop"]


async def test_a_service_that_the_host_sees_running_is_not_queried(rig: Rig) -> None:
    """A command runs in the container only once the host sees another life of the service."""
    asked: list[str] = []

    async def service(tenant: str, side: Side) -> Service | None:
        asked.append(tenant)
        return rig.service

    async with rig.opened() as (verifier, site):
        verifier._services.state = service  # type: ignore[method-assign] # a rig's, and to be counted
        rig.life = Life("1 7", 0.0)
        answered = time.monotonic()
        await verifier.settled(site, "direct", answered, 0.3)
        verifier.watch(site, 0.4, rig.tell)
        await asyncio.wait([*verifier._watching.values()])
        assert asked == [] and rig.told.empty()

        verifier.watch(site, 60.0, rig.tell)
        await turn()
        rig.life, rig.service = Life("2 9", 0.0), Service("running", restarts=1, started=answered + 60)
        assert "was restarted" in await rig.told.get()
        assert asked == ["shop"]


async def test_a_site_that_is_still_at_work_is_watched_until_it_rests(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler beside its server has that restarted: who looks then finds nobody there."""
    monkeypatch.setattr(verify, "_SPAN", 0.0)
    monkeypatch.setattr(verify, "_WORKING", 1000.0)
    looks = 0

    async def life(tenant: str, side: Side) -> Life | None:
        nonlocal looks
        looks += 1
        return Life("1 7", 0.0, worked=1.0 * min(looks, 20))

    async with rig.opened() as (verifier, site):
        verifier._services.life = life  # type: ignore[method-assign] # a rig's, and to be counted
        assert await verifier.settled(site, "direct", time.monotonic(), 0.1)
        assert looks > 20
        assert not await verifier.settled(site, "direct", time.monotonic(), 0.1), "it rests by then"

        monkeypatch.setattr(verify, "_WORKING", 3.0)
        looks, answered = -10_000, time.monotonic()  # one that never rests
        await verifier.settled(site, "direct", answered, 0.1)
        assert answered + 0.4 <= time.monotonic()


async def steadied(rig: Rig, *lives: Life | None, answered: float = 5.0) -> list[str]:
    """Return what each look after the first one finds."""
    async with rig.opened() as (verifier, site):
        rig.life = lives[0]
        steady = UptimeCheck(verifier._services, site.tenant, site.side, answered)
        await steady.begin()
        found = []
        for rig.life in lives[1:]:
            found.append(await steady.failure())
        return found


async def test_a_process_that_the_kernel_kills_is_told_of_the_same_life(rig: Rig) -> None:
    (found,) = await steadied(rig, Life("1 7", 0.0, oom_kills=2), Life("1 7", 0.1, oom_kills=3))
    assert "because memory ran out" in found
    assert await steadied(rig, Life("1 7", 0.0, oom_kills=2), Life("1 7", 0.1, oom_kills=2)) == [""]


@pytest.mark.parametrize("short", [True, False])
async def test_a_site_that_is_killed_lacked_memory_only_if_that_was_reported(rig: Rig, short: bool) -> None:
    rig.said = "site.service: Main process exited, code=killed, status=9/KILL"

    async def has_killed(tenant: str, since: float) -> bool:
        return short

    async with rig.opened() as (verifier, site):
        verifier._pressure = cast(Any, SimpleNamespace(has_killed=has_killed))
        rig.service = Service("ended", restarts=1, started=time.monotonic() + 100)
        with pytest.raises(Unsteady) as caught:
            await verifier.settled(site, "direct", time.monotonic(), 0.3)
        assert ("because memory ran out" in caught.value.why) is short
        assert ("it was killed (SIGKILL)" in caught.value.why) is not short
        rig.service, rig.status = Service("ended", restarts=verify._RESTARTS), "500 No"
        with pytest.raises(Timeout) as refused:
            await verifier.answering(site)
        assert ("because memory runs out" in refused.value.message) is short


async def test_a_life_that_began_after_the_answer_is_not_the_one_that_answered(rig: Rig) -> None:
    """It restarted between the two, so systemd is asked."""
    rig.service = Service("running", restarts=1, started=6.0)
    (found,) = await steadied(rig, Life("2 9", 6.0), Life("2 9", 6.0))
    assert "was restarted" in found


async def test_a_life_that_is_not_seen_is_asked_for(rig: Rig) -> None:
    rig.service = Service("ended")
    assert await steadied(rig, Life("1 7", 0.0), None, None) == ["", "its service ended"]
    assert await steadied(rig, None, Life("1 7", 0.0), None) == ["", "its service ended"]
