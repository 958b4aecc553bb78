"""Measures what clients notice of an upgrade: the longest answer, and how long their websockets are away.

On the tests' own Incus (GATEWAY_TEST_HOST). Five clients ask again and again over new connections, two of
them what Incus is asked for; the longest answer is told with and without these. The Python client follows a
command, and writes and reads files; a bare websocket connects again at once. Upgrades follow one another;
beside each one's numbers are the parts of the pause by the gateways' own logs. The exit code is 1 if a
request was refused or answered with an error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway_client import Change, Client
from tests.integration import environment
from tests.integration.conftest import Container, make_containers
from tests.integration.hosts import Host
from tests.integration.test_upgrade import Hail, some, upgrade
from tests.live import DEADLINE

# seconds that issues promise on a machine that is not busy
ANSWER: Final = 0.3
AWAY: Final = 0.5
_PARTS: Final = re.compile(r"clients waited \d+ ms: (.+)")


@dataclass(frozen=True, slots=True)
class Upgrade:
    """One upgrade: seconds of the longest answer and of each client's pause, and the parts of the pause.

    `own` is the longest answer of those for which Incus is not asked.
    """

    answers: int
    longest: float
    own: float
    bare: float
    python: Sequence[float]
    parts: str

    def __str__(self) -> str:
        python = ", ".join(f"{one * 1000:.0f}" for one in self.python)
        return (
            f"longest of {self.answers} answers {self.longest * 1000:.0f} ms, "
            f"{self.own * 1000:.0f} without Incus; away: bare websocket {self.bare * 1000:.0f} ms, "
            f"Python client {python} ms; {self.parts}"
        )


async def bare(host: Host, tenant: str) -> float:
    """Return the seconds from when a websocket is closed until another answers `initialize`."""
    async with host.gateway.wire(tenant) as wire:
        await wire.closed()
        began = time.perf_counter()
    while True:
        with contextlib.suppress(OSError, ConnectionError):
            async with host.gateway.wire(tenant):
                return time.perf_counter() - began


@contextlib.asynccontextmanager
async def working(host: Host, tenant: str) -> AsyncIterator[list[float]]:
    """Have the Python client follow a command, and write and read a file; yield how long it was away."""
    changes, pauses = list[tuple[float, Change]](), list[float]()

    def noted(change: Change) -> None:
        changes.append((time.perf_counter(), change))

    token = host.gateway.token(tenant)
    async with Client(host.gateway.url, token=token, on_change=noted) as client:
        shop, over = client.tenant(tenant), asyncio.Event()

        async def write() -> None:
            for number in itertools.count():
                if over.is_set():
                    return
                await shop.write("upgraded.txt", str(number))
                assert (await shop.read("upgraded.txt")).text == f"1\t{number}"

        async with shop.exec("cat; exit 4", stdin=True) as run:
            await run.write(b"before\n")
            writing = asyncio.create_task(write())
            yield pauses
            over.set()
            await writing
            await run.write(b"after\n")
            await run.close_stdin()
            assert b"".join([chunk async for chunk in run.stdout]) == b"before\nafter\n"
            assert (await run.wait()).code == 4
    for (before, one), (after, next_) in itertools.pairwise(changes):
        if (one.state, next_.state) == ("reconnecting", "connected"):
            pauses.append(after - before)


async def measured(host: Host, tenant: Container) -> Upgrade:
    """Upgrade once. Raises `AssertionError` where anything went wrong."""
    said = host.gateway.log.stat().st_size
    async with (
        Hail(host.gateway) as alive,
        Hail(host.gateway, "/readyz", 1) as ready,
        Hail(host.gateway, f"/v1/tenants/{tenant.name}", 1, 0.05) as asked,
        working(host, tenant.name) as away,
    ):
        left = asyncio.create_task(bare(host, tenant.name))
        await some(asked, 10)
        await upgrade(host.gateway)
        without = await asyncio.wait_for(left, DEADLINE)
        await some(asked, 10)
    wrong = [*alive.wrong, *ready.wrong, *asked.wrong]
    assert not wrong, wrong[:5]
    took = [*alive.took, *ready.took, *asked.took]
    with host.gateway.log.open("rb") as log:
        log.seek(said)
        parts = _PARTS.search(log.read().decode(errors="replace"))
    return Upgrade(len(took), max(took), max(alive.took), without, away, "" if parts is None else parts[1])


async def run(upgrades: int) -> None:
    settings = environment.settings()
    environment.up(lambda line: None)
    found = list[Upgrade]()
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (tenant,) = await stack.enter_async_context(make_containers("upgrade", settings, 1))
        (folder / "state").mkdir()
        host = Host(settings, folder / "state")
        await host.hold()
        stack.push_async_callback(host.close)
        await host.gateway.start()
        for number in range(upgrades):
            found.append(await measured(host, tenant))
            print(f"{number + 1:>3}: {found[-1]}", flush=True)
    longest = sorted(one.longest for one in found)
    own = sorted(one.own for one in found)
    away = sorted(pause for one in found for pause in (one.bare, *one.python))
    for what, times, promised in (
        ("longest answer", longest, ANSWER),
        ("without Incus", own, ANSWER),
        ("away", away, AWAY),
    ):
        print(
            f"{what}: {sum(one < promised for one in times)} of {len(times)} under {promised * 1000:.0f} ms, "
            f"p50 {times[len(times) // 2] * 1000:.0f} ms, longest {times[-1] * 1000:.0f} ms"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--upgrades", type=int, default=16)
    options = parser.parse_args()
    try:
        asyncio.run(run(options.upgrades))
    except AssertionError as wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
        return 1
    return 0
