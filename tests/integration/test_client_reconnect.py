"""The Python client behind a proxy that cuts its connections: nothing is lost, nothing is made twice.

GATEWAY_TEST_CUTS is how often a command's output is cut, at bytes drawn by chance.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
from collections.abc import AsyncIterator

import pytest

from gateway.settings import Settings
from gateway_client import Change, Client, Retry, Tenant
from tests.contracts.processes import mark
from tests.integration.conftest import Container
from tests.integration.test_gateway_incus import live
from tests.live import LiveGateway
from tests.waits import until

CUTS = int(os.environ.get("GATEWAY_TEST_CUTS", "20"))
SOON = Retry(first=0.01, most=0.2, patience=20)


class Cutter:
    """A TCP proxy that resets each connection after some bytes, as often as it may."""

    def __init__(self, port: int, least: int, most: int) -> None:
        self.port = 0
        self.cuts = 0
        self._target = port
        self._least, self._most = least, most
        self._random = random.Random(7)

    @contextlib.asynccontextmanager
    async def serving(self, cuts: int) -> AsyncIterator[Cutter]:
        self._left = cuts
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield self

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection("127.0.0.1", self._target)
        budget = self._random.randint(self._least, self._most)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            nonlocal budget
            while data := await source.read(4096):
                budget -= len(data)
                if budget < 0 and self._left > 0:
                    self._left -= 1
                    self.cuts += 1
                    return
                target.write(data)
                await target.drain()

        copies = [asyncio.create_task(copy(reader, ours)), asyncio.create_task(copy(theirs, writer))]
        with contextlib.suppress(OSError):
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        for task in copies:
            task.cancel()
        await asyncio.gather(*copies, return_exceptions=True)
        for stream in (writer, ours):
            stream.transport.abort()


@pytest.fixture(scope="module")
async def gateway(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("reconnect")
    async with live(incus_settings, folder / "gateway.log") as gateway:
        yield gateway


@contextlib.asynccontextmanager
async def cut(
    gateway: LiveGateway, tenant: str, cuts: int, least: int, most: int, told: list[Change] | None = None
) -> AsyncIterator[tuple[Tenant, Cutter]]:
    token = gateway.token(tenant)
    on_change = None if told is None else told.append
    async with asyncio.timeout(60 + cuts), Cutter(gateway.port, least, most).serving(cuts) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        async with Client(url, token=token, retry=SOON, on_change=on_change) as client:
            yield client.tenant(tenant), proxy


async def test_output_that_is_cut_again_and_again_arrives_whole(
    gateway: LiveGateway, shared_tenant: Container
) -> None:
    """Both streams, hash for hash, through cuts in their middle; the state is told meanwhile."""
    ends = (30_000 * CUTS, 10_000 * CUTS)
    script = f"seq 1 {ends[0]}; seq 1 {ends[1]} >&2; exit 7"
    expected = [hashlib.sha256("".join(f"{n}\n" for n in range(1, end + 1)).encode()) for end in ends]
    told: list[Change] = []
    async with cut(gateway, shared_tenant.name, CUTS, 20_000, 400_000, told) as (shop, proxy):
        async with shop.exec(script) as run:
            sums = {"stdout": hashlib.sha256(), "stderr": hashlib.sha256()}
            async for name, chunk in run.output():
                sums[name].update(chunk)
            exit_ = await run.wait()
        assert proxy.cuts == CUTS
    assert (exit_.code, exit_.reason, run.stdout.lost, run.stderr.lost) == (7, "exited", 0, 0)
    assert [sums[name].digest() for name in ("stdout", "stderr")] == [one.digest() for one in expected]
    states = [change.state for change in told]
    assert states.count("reconnecting") > CUTS // 2 and "connected" in states


async def test_input_that_is_cut_again_and_again_arrives_once(
    gateway: LiveGateway, shared_tenant: Container
) -> None:
    """Through `cat` and back: no byte lost on the way there, none sent twice, and the end is told."""
    data = os.urandom(12 << 20)
    async with cut(gateway, shared_tenant.name, 12, 300_000, 2_000_000) as (shop, proxy):
        async with shop.exec(["cat"], stdin=True) as run:

            async def give() -> None:
                for start in range(0, len(data), 70_000):
                    await run.write(data[start : start + 70_000])
                await run.close_stdin()

            giving = asyncio.create_task(give())
            back = b"".join([chunk async for chunk in run.stdout])
            await giving
            assert (await run.wait()).code == 0
        assert proxy.cuts == 12
    assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()


async def test_tool_calls_that_are_cut_are_made_once(gateway: LiveGateway, shared_tenant: Container) -> None:
    """Each of forty calls appends a line; where a connection breaks under one, it is asked again."""
    name = mark()
    async with cut(gateway, shared_tenant.name, 15, 1_500, 3_000) as (shop, proxy):
        for number in range(40):
            said = await shop.tool("Bash", {"command": f"echo {number} >>{name}; wc -l <{name}; sleep 0.02"})
            assert said.text == str(number + 1)
        assert proxy.cuts == 15
        listed = (await shop.read(name)).text.splitlines()
        assert [line.partition("\t")[2] for line in listed[:40]] == [str(number) for number in range(40)]


async def test_a_session_and_its_background_outlast_a_cut_and_end_with_the_client(
    gateway: LiveGateway, shared_tenant: Container
) -> None:
    name = mark()
    async with cut(gateway, shared_tenant.name, 1, 10**9, 10**9) as (shop, _):
        await shop.tool("Bash", {"command": f"mkdir -p d{name} && cd d{name}"})
        started = await shop.tool("Bash", {"command": f"sleep {name}", "run_in_background": True})
        assert shop._connections._main is not None
        shop._connections._main._socket.transport.abort()
        said = await shop.tool("Bash", {"command": "basename $PWD"})
        assert said.text == f"d{name}"
        output = await shop.tool("BashOutput", {"bash_id": started.structured["shellId"]})
        assert "<status>running</status>" in output.text
    processes = await asyncio.to_thread(shared_tenant.sh, f"pgrep -f 'sleep {name}$' || echo none")
    assert processes == "none\n"


async def test_events_that_are_cut_are_all_told(gateway: LiveGateway, shared_tenant: Container) -> None:
    """By a stream that is cut under its first event too, in order and each once."""
    name = mark()
    async with cut(gateway, shared_tenant.name, 8, 300, 3_000) as (shop, proxy):
        async with (
            shop.events(types="file.written") as stream,
            Client(gateway.url, token=gateway.token(shared_tenant.name)) as straight,
        ):
            for number in range(40):
                await straight.tenant(shared_tenant.name).write(f"{name}-{number}", "x")
            got = [(await anext(stream)).data["path"] for _ in range(40)]
        assert proxy.cuts >= 4
    assert got == [f"{name}-{number}" for number in range(40)]


async def test_a_gateway_that_restarts_is_found_again(
    incus_settings: Settings,
    tmp_path: object,
    shared_tenant: Container,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Calls wait for it; a command does not outlive it, and that is told and never taken for success."""
    folder = tmp_path_factory.mktemp("restart")
    async with live(incus_settings, folder / "gateway.log") as gateway:
        async with Client(gateway.url, token=gateway.token(shared_tenant.name), retry=SOON) as client:
            shop = client.tenant(shared_tenant.name)
            await shop.write("restarted.txt", "here")
            async with shop.exec("sleep 600") as run:
                assert gateway.process is not None
                gateway.process.kill()
                await gateway.process.wait()
                reading = asyncio.create_task(shop.read("restarted.txt"))
                await until(lambda: shop.state == "reconnecting")
                await gateway.start()
                assert (await reading).text == "1\there"
                exit_ = await run.wait()
                assert (exit_.reason, exit_.code) == ("lost", None)
            assert shop.state == "connected"
