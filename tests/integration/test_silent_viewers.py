"""A viewer that stands still while its command falls silent gets every byte once it reads again.

incusd pings each output every 10 s. Where what it may leave unread is just full and nothing is printed, such
a ping would break the output off for good (`gateway.incus.exec_sockets`); about one size in fifty is such a
one. GATEWAY_TEST_SILENT says how many sizes are tried, 50 at a time; from 100 on without a holder, too.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from functools import partial

import pytest

from gateway.settings import Settings
from tests.integration.conftest import Container
from tests.integration.hosts import Host
from tests.live import LiveGateway, Wire
from tests.waits import pause

COUNT = int(os.environ.get("GATEWAY_TEST_SILENT", "24"))
AT_ONCE = 50
STILL = 17.5  # seconds: a ping and its deadline at the least
# which commands have a memory of their own, into which their output is received; others share a buffer
HOLDERS = ["held"] if COUNT < 100 else ["held", "not held"]
SIZES = range(480_000, 1_040_001, 560_000 // (COUNT - 1))


@pytest.fixture(params=HOLDERS)
async def gateway(
    request: pytest.FixtureRequest, incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("silent") / "state"
    folder.mkdir()
    host = Host(incus_settings, folder, GATEWAY_MAX_EXECS="1000")
    if request.param == "held":
        await host.hold()
    await host.gateway.start()
    try:
        yield host.gateway
    finally:
        await (host.close() if request.param == "held" else host.gateway.stop())


@pytest.mark.timeout(120 + COUNT)
async def test_a_viewer_that_stands_still_loses_nothing(
    gateway: LiveGateway, shared_tenant: Container
) -> None:
    """Each acknowledges nothing for longer than incusd waits between two pings, and then everything."""

    def news(wire: Wire, exec_: str, channel: int, had: int) -> bool:
        return len(wire.output[channel, 1]) > had or wire.notified("exec/exited", exec=exec_) is not None

    async def view(wire: Wire, size: int) -> tuple[str, int | None, int | None]:
        """Return how the command ended, and how many bytes of its output came, None if others did."""
        script = f"seq 1 1000000 | head -c {size}; read word; exit 5"
        started = await wire.call("exec/start", command=script, window=4096, stdin=True, lingerMs=-1)
        exec_, channel = started["exec"], started["channel"]
        await pause(STILL)
        await wire.stdin(channel, b"go\n")
        had = 0
        while wire.notified("exec/exited", exec=exec_) is None:
            if (now := len(wire.output[channel, 1])) > had:
                had = now
                await wire.call("exec/ack", exec=exec_, stdout=had, stderr=0)
            await wire.until(partial(news, wire, exec_, channel, had))
        exit_ = await wire.exited(exec_)
        came = wire.output[channel, 1]
        return exit_["reason"], exit_["exitCode"], len(came) if came == WHOLE[: len(came)] else None

    async with gateway.wire(shared_tenant.name) as wire:
        told = list[tuple[str, int | None, int | None]]()
        for first in range(0, len(SIZES), AT_ONCE):
            told += await asyncio.gather(*(view(wire, size) for size in SIZES[first : first + AT_ONCE]))
    broken = {size: one for size, one in zip(SIZES, told, strict=True) if one != ("exited", 5, size)}
    assert not broken


WHOLE = b"".join(b"%d\n" % number for number in range(1, 200_000))
