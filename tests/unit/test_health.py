"""Sites that hang, refuse and fail, as the watch from outside sees them; real sockets, no tenants."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, strategies

from gateway.deployments.health import Health
from gateway.errors import RateLimited
from gateway.events import Bus
from gateway.runtime.listening import packets
from gateway.runtime.probe import status_of
from gateway.runtime.sites import Exposure, Sites, TenantSite
from gateway.settings import Settings
from tests.waits import until

DEADLINE = 30

Ends = dict[str, Callable[[], None] | None]


class Told:
    """A bus that hands over what is published."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[tuple[str, str, Any]] = asyncio.Queue()

    def publish(self, type: str, tenant: str, data: Any) -> None:
        self.events.put_nowait((type, tenant, data))


class Listed:
    """Sites by their ports; the interface of each has its tenant's name. `ends` of some would be reported."""

    def __init__(self, ports: dict[str, int], ends: Ends) -> None:
        self.ports, self.ends = ports, ends
        self.services = self

    async def report_end(self, tenant: str, ended: Callable[[], None]) -> bool:
        if tenant not in self.ends or self.ends[tenant] is not None:
            return False
        self.ends[tenant] = ended
        return True

    async def listed(self) -> Sequence[TenantSite]:
        return [
            TenantSite(tenant, f"{tenant}.test", True, Exposure("127.0.0.1", port), link=tenant)
            for tenant, port in self.ports.items()
        ]


class Server:
    """A site that answers with `said`, and waits for ever where that is None; `asked` counts."""

    def __init__(self, said: bytes | None) -> None:
        self.said = said
        self.asked = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        ended = asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            self.asked += 1
            if self.said is None:
                await ended.wait()
            else:
                writer.write(self.said)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        yield server.sockets[0].getsockname()[1]
        ended.set()
        server.close()


@contextlib.asynccontextmanager
async def watching(
    told: Told,
    ports: dict[str, int],
    packets: Callable[[], Mapping[str, int]] = dict[str, int],
    ends: Ends | None = None,
    *,
    timeout: float = 5.0,
    interval: float = 0.02,
) -> AsyncIterator[Health]:
    listed = Listed(ports, {} if ends is None else ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gateway.deployments.health.INTERVAL", interval)
        patch.setattr("gateway.deployments.health.TIMEOUT", timeout)
        async with Health(cast(Sites, listed), cast(Bus, told), Settings(), packets=packets) as health:
            yield health


async def test_looks_at_a_site_that_hangs_hold_up_no_look_at_another_s() -> None:
    """Clients ask for 96 looks at one; only so many wait, and one at another site is made at once."""
    told, hung, well = Told(), Server(None), Server(b"HTTP/1.1 200 OK\r\n\r\n")
    async with (
        asyncio.timeout(DEADLINE),
        hung.serving() as hangs,
        well.serving() as answers,
        watching(told, {"hangs": hangs, "well": answers}, timeout=3600, interval=3600) as health,
    ):
        looks = [asyncio.create_task(health.now("hangs")) for _ in range(160)]
        await asyncio.wait(looks, return_when=asyncio.FIRST_COMPLETED)
        assert (await health.now("well"))["answers"] is True
        refused = [look.exception() for look in looks if look.done()]
        assert refused and all(isinstance(error, RateLimited) for error in refused)
        assert hung.asked <= 5  # four of them, and the watch itself
        for look in looks:
            look.cancel()
        await asyncio.gather(*looks, return_exceptions=True)
        assert (health._asking.held, health._asking.waiting) == (0, 0)


async def test_a_site_that_hangs_holds_up_no_look_at_another() -> None:
    """Others are found unhealthy after some failed looks, and healthy again, while one says nothing."""
    told, failing = Told(), Server(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with (
            asyncio.timeout(DEADLINE),
            Server(None).serving() as hangs,
            failing.serving() as fails,
            watching(told, {"hangs": hangs, "fails": fails, "away": nobody.getsockname()[1]}, timeout=3600),
        ):
            both = [await told.events.get(), await told.events.get()]
            found = {tenant: (kind, data) for kind, tenant, data in both}
            kind, data = found["away"]
            assert (kind, data["failures"], data["why"]) == ("tenant.unhealthy", 3, "no connection")
            kind, data = found["fails"]
            assert (kind, data["failures"], data["why"]) == ("tenant.unhealthy", 3, "status 502")
            failing.said = b"HTTP/1.1 200 OK\r\n\r\n"
            assert (await told.events.get())[:2] == ("tenant.healthy", "fails")


async def test_a_site_that_says_nothing_for_long_is_unhealthy_at_once() -> None:
    told, hanging = Told(), Server(None)
    async with (
        asyncio.timeout(DEADLINE),
        hanging.serving() as hangs,
        watching(told, {"hangs": hangs}, timeout=0.2),
    ):
        kind, _, data = await told.events.get()
        assert (kind, data["failures"], data["why"]) == ("tenant.unhealthy", 1, "no answer in 0.2 s")
        hanging.said = b"HTTP/1.1 404 Not Found\r\n\r\n"
        assert (await told.events.get())[0] == "tenant.healthy"


async def test_a_look_that_began_while_a_site_was_deployed_says_nothing_of_it() -> None:
    """It was asked while its server began, or of the one before; the deployment's visitors are answered."""
    told, beginning, deploying = Told(), Server(None), True
    async with (
        asyncio.timeout(DEADLINE),
        beginning.serving() as begins,
        watching(told, {"begins": begins}, timeout=0.5) as health,
    ):
        health._register = cast(Any, SimpleNamespace(deploying=lambda tenant: deploying))
        await until(lambda: beginning.asked == 1)
        deploying, beginning.said = False, b"HTTP/1.1 200 OK\r\n\r\n"
        await until(lambda: beginning.asked == 3)
        assert told.events.empty()


async def test_a_site_that_says_nothing_while_it_is_deployed_is_not_unhealthy() -> None:
    """It shares its processors with the next one, and visitors rather wait."""
    told, hanging, deployed = Told(), Server(None), {"hangs"}
    async with (
        asyncio.timeout(DEADLINE),
        hanging.serving() as hangs,
        watching(told, {"hangs": hangs}, timeout=0.05) as health,
    ):
        health._register = cast(Any, SimpleNamespace(deploying=deployed.__contains__))
        await until(lambda: hanging.asked > 2)
        assert told.events.empty()
        deployed.clear()
        assert (await told.events.get())[0] == "tenant.unhealthy"


async def test_a_site_that_is_well_and_answers_nobody_is_looked_at_every_fourth_time() -> None:
    """One that answers visitors, or whose interface is another by now, is looked at each time."""
    good = b"HTTP/1.1 200 OK\r\n\r\n"
    silent, visited, renewed = Server(good), Server(good), Server(good)
    rounds, over = 0, asyncio.Event()

    def packets() -> dict[str, int]:
        nonlocal rounds
        rounds += 1
        if rounds > 60:
            over.set()
        # eight for each look
        return {"silent": 5000 + 8 * (rounds // 4), "visited": 4 * rounds, "renewed": 9000 - rounds}

    async with (
        asyncio.timeout(DEADLINE),
        silent.serving() as one,
        visited.serving() as two,
        renewed.serving() as three,
        watching(Told(), {"silent": one, "visited": two, "renewed": three}, packets),
    ):
        await over.wait()
        asked = (silent.asked, visited.asked, renewed.asked)
    assert 0 < asked[0] <= 0.35 * asked[2], asked
    # a single visitor is seen from the second interval on
    assert asked[1] > 1.5 * asked[0], asked


async def test_a_site_whose_end_would_be_reported_is_looked_at_less_and_after_its_end_at_once() -> None:
    """And no more often than each time, however often an end is reported."""
    good = b"HTTP/1.1 200 OK\r\n\r\n"
    ended, waits = Server(good), Server(good)
    ends: Ends = {"ended": None, "waits": None}
    rounds, asked, over = 0, 0, asyncio.Event()

    def packets() -> dict[str, int]:
        nonlocal rounds, asked
        rounds += 1
        if rounds == 37:
            asked = ended.asked
        if rounds >= 37:  # from here on it ends in each interval
            report, ends["ended"] = ends["ended"], None
            if report is not None:
                report()
        if rounds > 60:
            over.set()
        return {"ended": 5000, "waits": 5000}

    async with (
        asyncio.timeout(DEADLINE),
        ended.serving() as one,
        waits.serving() as two,
        watching(Told(), {"ended": one, "waits": two}, packets, ends),
    ):
        await over.wait()
    # as a new one, and then every twelfth time
    assert 3 <= asked <= 5, asked
    assert 4 <= waits.asked <= 7, waits.asked
    assert 12 <= ended.asked - asked <= 26, (asked, ended.asked)


async def test_a_silent_site_that_fails_is_looked_at_each_time() -> None:
    told, failing = Told(), Server(b"HTTP/1.1 200 OK\r\n\r\n")
    rounds = 0

    def packets() -> dict[str, int]:
        nonlocal rounds
        rounds += 1
        if rounds == 10:
            failing.said = b"HTTP/1.1 502 Bad Gateway\r\n\r\n"
        return {"fails": 1}

    async with (
        asyncio.timeout(DEADLINE),
        failing.serving() as fails,
        watching(told, {"fails": fails}, packets),
    ):
        kind, _, data = await told.events.get()
        # seen at the fourth of those at most, and three in a row
        assert (kind, data["failures"], rounds <= 10 + 7) == ("tenant.unhealthy", 3, True)


def test_packets_are_those_that_came_from_a_tenant(tmp_path: Path) -> None:
    table = tmp_path / "dev"
    table.write_text(
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop\n"
        "    lo:  2776      31    0    0    0     0          0         0     2776      31    0    0\n"
        "veth1f2a: 90210 1234    0    0    0     0          0         0  1234567    4321    0    0\n"
    )
    assert packets(table) == {"lo": 31, "veth1f2a": 1234}
    assert packets(tmp_path / "away") == {}


@given(strategies.binary(max_size=80))
def test_a_status_line_is_http_or_none(line: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert 100 <= status_of(line) <= 599


@pytest.mark.parametrize("line", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200\r\n", b"HTTP/1.1 200 \n"])
def test_a_status_line_of_a_plain_server(line: bytes) -> None:
    assert status_of(line) == 200


ODD = [
    b"HTTP/1.1\r\n\r\n",
    b"HTTP/1.1 \r\n\r\n",
    b"HTTP/1.1 -200 OK\r\n\r\n",
    b"HTTP/1.1 +200 OK\r\n\r\n",
    b"HTTP/1.1 2_0_0 OK\r\n\r\n",
    b"HTTP/1.1 099 OK\r\n\r\n",
    b"HTTP/1.1 600 OK\r\n\r\n",
    b"HTTP/1.1 2000 OK\r\n\r\n",
    b"HTTP/1.1  200 OK\r\n\r\n",
    b"HTTP/2 200\r\n\r\n",
    b"HTTP/1.1 " + b"9" * 5000 + b"\r\n\r\n",
    b"HTTP/1.1 200 " + b"x" * 100_000 + b"\r\n\r\n",
    "HTTP/1.1 ２００ OK\r\n\r\n".encode(),
    b"x" * 1_000_000,
    b"",
]


@pytest.mark.parametrize("said", ODD, ids=range(len(ODD)))
async def test_an_odd_answer_is_unhealthy_and_the_next_look_is_taken(said: bytes) -> None:
    told, odd = Told(), Server(said)
    async with asyncio.timeout(DEADLINE), odd.serving() as port, watching(told, {"odd": port}) as health:
        kind, _, data = await told.events.get()
        assert (kind, data["why"]) in {("tenant.unhealthy", "no HTTP"), ("tenant.unhealthy", "no connection")}
        assert await health.now("odd") == {"answers": False, "status": None}
        odd.said = b"HTTP/1.1 204 No Content\r\n\r\n"
        assert (await told.events.get())[:2] == ("tenant.healthy", "odd")


async def test_what_nobody_foresaw_of_one_site_is_told_and_ends_no_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(*words: Any, **more: Any) -> int:
        raise IndexError("odd")

    told, well = Told(), Server(b"HTTP/1.1 200 OK\r\n\r\n")
    async with asyncio.timeout(DEADLINE), well.serving() as port:
        with monkeypatch.context() as patch:
            patch.setattr("gateway.deployments.health.ask", fail)
            async with watching(told, {"odd": port}):
                kind, _, data = await told.events.get()
                assert (kind, data["why"]) == ("tenant.unhealthy", "it cannot be checked")
                patch.undo()
                assert (await told.events.get())[0] == "tenant.healthy"
