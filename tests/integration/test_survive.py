"""Commands outlive the gateway: whenever it is killed, each byte comes once and each exit is told.

The gateway is killed and started again beside real commands (`house`, `actors`), and a client resumes as ours
do: from the offsets that it has, with the input that `stdin` says did not arrive. GATEWAY_TEST_KILLS says how
often, and GATEWAY_TEST_SEED at which moments; both are printed. GATEWAY_TEST_SECONDS ends the kills of the
first test.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import time
from pathlib import Path

import pytest

from gateway.holder.holder import held_at
from gateway.host.gateway_process import GatewayProcess, QuickstartFiles
from gateway.host.services import running_holder
from gateway.settings import Settings
from tests.integration.actors import GUESTS, RESIDENTS, tree_of
from tests.integration.conftest import Container
from tests.integration.hosts import Host, held, host
from tests.integration.house import House
from tests.integration.resuming import Resuming
from tests.live import free_ports
from tests.waits import until

__all__ = ["host"]

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("GATEWAY_TEST_KILLS", "7"))
SECONDS = float(os.environ.get("GATEWAY_TEST_SECONDS", "inf"))  # after which nobody is killed any more
HOLD = 0.5  # seconds
CROWD, TRIES = 200, 4  # commands, and kills beside them


@pytest.mark.timeout(120 + 20 * KILLS)
async def test_everything_goes_on_over_kills(host: Host, shared_tenant: Container, tmp_path: Path) -> None:
    """Commands of all kinds are as they were, or have ended as they should; see `actors` for each."""
    shared_tenant.sh("mkdir -p /srv/site/house && chown site: /srv/site/house")
    house = House(host, shared_tenant, tmp_path / "another")
    await house.live(RESIDENTS, GUESTS, KILLS, time.monotonic() + SECONDS)
    host.report(", ".join(f"{number} {what}" for what, number in house.seen.items()))
    shared_tenant.sh("rm -r /srv/site/house")


async def first_answer(host: Host, tenant: str) -> tuple[float, set[str]]:
    """Kill the gateway; return in how many seconds the next one has told what runs, and that."""
    began = 0.0

    async def start() -> None:
        nonlocal began
        began = time.monotonic()

    await host.kill(start)
    async with host.gateway.wire(tenant) as wire:
        listed = await wire.call("exec/list")
    took = time.monotonic() - began
    return took, {one["exec"] for one in listed["execs"] if one["state"] == "running"}


@pytest.mark.timeout(300)
async def test_two_hundred_commands_are_adopted_at_once(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory, shared_tenant: Container
) -> None:
    """All of them at each kill; they delay the first answer, which has them all, by less than a second."""
    name, folder = shared_tenant.name, tmp_path_factory.mktemp("crowd") / "state"
    async with held(incus_settings, folder, GATEWAY_MAX_EXECS=str(2 * CROWD)) as host:
        alone = min([(await first_answer(host, name))[0] for _ in range(TRIES)])
        started = set[str]()
        async with host.gateway.wire(name) as wire:
            for _ in range(CROWD):
                given = await wire.call("exec/start", argv=["sleep", "1000"], lingerMs=-1)
                started.add(given["exec"])
        crowded = list[float]()
        for _ in range(TRIES):
            took, running = await first_answer(host, name)
            assert running == started
            crowded.append(took)
        host.report(f"first answer after {min(crowded):.2f} s, with nothing to adopt {alone:.2f} s, at best")
        assert min(crowded) - alone < 1
        await host.gateway.stop(signal.SIGTERM)
        assert shared_tenant.sh("pgrep -c sleep", check=False).strip() == "0"
        await host.gateway.start()


@pytest.mark.timeout(120 + 20 * KILLS)
async def test_what_ends_all_leaves_nothing(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory, shared_tenant: Container
) -> None:
    """A kill of both at once, `GATEWAY_HOLD` without a gateway, and a stop; each is told."""

    def running() -> int:
        return shared_tenant.count("sleep 1000")

    async def start(host: Host) -> Resuming:
        client = Resuming(host, shared_tenant.name)
        # with an id of its own it is on record before it begins, and not some moment later
        await client.start(command=tree_of(0), execId=secrets.token_hex(8))
        await until(lambda: client.offsets[1] > 0)
        return client

    settings = incus_settings.model_copy(update={"hold": HOLD})
    async with held(settings, tmp_path_factory.mktemp("alone") / "state") as host:
        for _ in range(KILLS):
            client = await start(host)
            await host.end_holder()
            await host.gateway.stop(signal.SIGKILL)
            await host.hold()
            await host.gateway.start()
            exit_ = await client.ended(lost=True)
            assert (exit_["reason"], exit_["exitCode"]) == ("lost", None)
            await until(lambda: running() == 0)

            client = await start(host)
            await host.gateway.stop(signal.SIGKILL)
            # whoever lists what is held counts as a gateway
            await until(lambda: held_at(host.settings.holder_socket) == 0)
            await host.gateway.start()
            exit_ = await client.ended(lost=True)
            assert (exit_["reason"], exit_["exitCode"]) == ("lost", None)
            await until(lambda: running() == 0)

            client = await start(host)
            await host.gateway.stop(signal.SIGTERM)
            assert running() == 0
            assert (await client.ended())["reason"] == "cancelled"
            await host.gateway.start()


async def test_quickstarts_restart_leaves_commands_and_its_stop_ends_them(
    host: Host, shared_tenant: Container, tmp_path: Path
) -> None:
    """Of a gateway and a holder that it starts itself, without systemd; nothing of either is left."""
    folder = tmp_path / "state"
    settings = host.settings.model_copy(
        update={"state_dir": folder, "listen": f"127.0.0.1:{free_ports(1)[0]}"}
    )
    environment = {
        **host.gateway.environment,
        "GATEWAY_STATE_DIR": str(folder),
        "GATEWAY_LISTEN": settings.listen,
    }
    del environment["PATH"]
    folder.mkdir(mode=0o700)
    installed = Path(sys.executable).with_name("incus-gateway")
    process = GatewayProcess(settings, QuickstartFiles(folder), ROOT, installed, environment)
    assert (await asyncio.to_thread(process.ensure, "one")).startswith("started")
    try:
        other = Host(settings, folder)
        other.gateway.at(int(settings.listen.rpartition(":")[2]))
        client = Resuming(other, shared_tenant.name)
        await client.start(command="setsid sleep 1000 & echo up; cat", stdin=True)
        await until(lambda: client.offsets[1] > 0)
        holder = running_holder(settings)
        assert holder is not None
        assert (await asyncio.to_thread(process.ensure, "two")).startswith("replaced")
        assert running_holder(settings) == holder
        await client.write(b"still\n")
        await until(lambda: client.offsets[1] == len(b"up\nstill\n"))
        following = asyncio.ensure_future(client.ended())
        assert await asyncio.to_thread(process.stop)
        assert shared_tenant.sh("pgrep -c 'sleep|cat'", check=False).strip() == "0"
        assert running_holder(settings) is None and process.pid() is None
        assert client.exits and (await following)["reason"] == "cancelled"
    finally:
        await asyncio.to_thread(process.stop)
