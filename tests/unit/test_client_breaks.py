"""The Python client over breaks of its connection, against a whole gateway with the local runtime."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gateway_client import Client, Retry
from tests.live import local_gateway
from tests.waits import standstill

SIZE = 48 << 20


async def test_a_reader_that_stands_still_loses_nothing_by_a_break(tmp_path: Path) -> None:
    """What was in the kernel's buffers, which take more than the gateway can send again, ends with it."""
    gateway = await local_gateway(tmp_path, "shop", GATEWAY_EXEC_UNACKED=str(1 << 20))
    await gateway.start()
    try:
        async with (
            gateway.wire("shop") as wire,
            Client(gateway.url, token=gateway.token("shop"), retry=Retry(first=0.01)) as client,
            client.tenant("shop").exec(f"head -c {SIZE} /dev/zero") as run,
        ):
            got = len(await anext(run.stdout))

            async def printed() -> int:
                listed = await wire.call("exec/list")
                return int(listed["execs"][0]["offsets"]["stdout"])

            assert await standstill(printed) < SIZE
            run._attachment.connection()._socket.transport.abort()
            got += sum([len(chunk) async for chunk in run.stdout])
            assert (got, run.stdout.lost) == (SIZE, 0)
            assert (await run.wait()).code == 0
    finally:
        assert await gateway.stop() == 0


async def test_a_gateway_that_keeps_little_is_no_standstill(tmp_path: Path) -> None:
    """It sends ahead what a client takes before it acknowledges anything."""
    gateway = await local_gateway(tmp_path, "shop", GATEWAY_EXEC_UNACKED="1")
    await gateway.start()
    try:
        async with (
            Client(gateway.url, token=gateway.token("shop")) as client,
            client.tenant("shop").exec("head -c 3000000 /dev/zero") as run,
        ):
            assert len(await asyncio.wait_for(run.stdout.read(), 30)) == 3_000_000
    finally:
        assert await gateway.stop() == 0
