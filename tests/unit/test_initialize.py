"""How long `initialize` may take: a client must say it soon, what it asks Incus for may take longer."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.constants import constants
from tests.live import LiveGateway, local_gateway
from tests.waits import pause, until

STUCK = Path(__file__).parents[1] / "stuck.py"
SOON = 2.0  # seconds; a busy machine takes one to connect


async def stuck(folder: Path, there: Path) -> LiveGateway:
    """Return a gateway that finds its tenant only once a file exists."""
    few = constants(
        {
            "gateway.api.connection.connection.INITIALIZE_TIMEOUT": SOON,
            "gateway.limits.budget.ANONYMOUS": 1,
        }
    )
    gateway = await local_gateway(folder, "one", **few)
    gateway.program = (sys.executable, str(STUCK), str(there))
    return gateway


async def test_a_client_is_not_told_that_it_was_late_where_incus_is(tmp_path: Path) -> None:
    """Nor do others that have shown no token take its place meanwhile."""
    there = tmp_path / "there"
    gateway = await stuck(tmp_path / "state", there)
    await gateway.start()
    try:
        async with gateway.raw("one") as wire:
            _, answer = await wire.start_call("initialize", token=gateway.token("one"))
            await pause(SOON + 0.2)
            async with gateway.raw("one") as stranger, gateway.raw("one"):
                assert await stranger.closed() == 4429
                assert not answer.done()
                there.touch()
                await until(answer.done)
            assert (await answer)["tenant"] == "one"
            assert await wire.call("ping") == {}
    finally:
        await gateway.stop()
