"""Commands while everything around them dies: each ends truthfully, and nothing of them is left.

GATEWAY_TEST_SHORT_EXECS is how many short commands are run; by default few enough for a slow machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.rootfs.process_tree import PARENT, of_init, pids
from gateway.settings import Settings
from tests.contracts.processes import Tree, alive, mark
from tests.integration import environment
from tests.integration.conftest import Container, Incusd, MakeTenant
from tests.integration.test_gateway_incus import live
from tests.live import LiveGateway, Wire
from tests.waits import until

SHORT_EXECS = int(os.environ.get("GATEWAY_TEST_SHORT_EXECS", "200"))
AT_ONCE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
async def gateway(incus_settings: Settings, folder: Path) -> AsyncIterator[LiveGateway]:
    async with live(incus_settings, folder / "gateway.log", GATEWAY_CANCEL_TIMEOUT="3") as gateway:
        yield gateway


async def ready(gateway: LiveGateway) -> None:
    async with aiohttp.ClientSession(gateway.url) as http:

        async def up() -> bool:
            async with http.get("/readyz") as response:
                return response.status == 200

        await until(up, 60, every=0.05)


def in_commands(tenant: Container) -> list[int]:
    """Return the processes of all commands in a tenant, the shells that wait included."""
    root = of_init(tenant.pid)
    assert root is not None
    return pids(root / PARENT)


async def begun(wire: Wire, started: Mapping[str, Any], said: bytes = b"r\n") -> None:
    await wire.until(lambda: said in wire.output[started["channel"], 1])


async def test_a_killed_incusd_with_fifty_commands(
    gateway: LiveGateway, incusd: Incusd, tenant: Container
) -> None:
    """Some sleep, some end at that very time: a success is told only of what had printed its last word."""
    seconds = mark()
    async with gateway.wire(tenant.name) as wire:
        sleeping = [f"echo r; setsid sleep {seconds} & exec sleep {seconds}"] * 25
        ending = [f"echo r; sleep {0.4 + n / 20}; echo end; exit {n % 3}" for n in range(25)]
        started = await asyncio.gather(
            *(wire.call("exec/start", command=line) for line in [*sleeping, *ending])
        )
        for one in started:
            await begun(wire, one)
        root = of_init(tenant.pid)
        assert root is not None
        await wire.until(lambda: wire.notified("exec/exited"))
        await incusd.kill()
        exits = [await wire.exited(one["exec"]) for one in started]
        assert {exit_["reason"] for exit_ in exits[:25]} == {"lost"}
        for n, (one, exit_) in enumerate(zip(started[25:], exits[25:], strict=True)):
            output = bytes(wire.output[one["channel"], 1])
            assert exit_["offsets"]["stdout"] == len(output)
            if exit_["reason"] == "exited":
                assert (exit_["exitCode"], output) == (n % 3, b"r\nend\n")
            else:
                assert (exit_["reason"], exit_["exitCode"], exit_["signal"]) == ("lost", None, None)
        assert alive(seconds) == 0
        await until(lambda: not pids(root / PARENT))  # nor a shell that waits
        await incusd.restart()
        await ready(gateway)
        for _ in range(2):
            exit_, output, _ = await wire.run(command="echo back; exit 4")
            assert (exit_["reason"], exit_["exitCode"], output) == ("exited", 4, b"back\n")


async def test_a_killed_gateway_with_ten_commands(
    incus_settings: Settings, folder: Path, make_tenant: MakeTenant
) -> None:
    """The next one ends them all and says so to whoever asks; the site's service never notices."""
    unit = "[Service]\\nExecStart=/usr/bin/sleep infinity\\n"
    main_pid = "systemctl show -p MainPID site.service"
    tenant = await make_tenant(ready=True)
    await asyncio.to_thread(
        tenant.sh,
        f"""mkdir -p /run/systemd/system; printf '{unit}' >/run/systemd/system/site.service
            systemctl daemon-reload && systemctl start site.service""",
    )
    site = await asyncio.to_thread(tenant.sh, main_pid)
    trees = [Tree() for _ in range(10)]
    async with live(incus_settings, folder / "killed.log") as first:
        async with first.wire(tenant.name) as wire:
            events = await wire.call("events/subscribe", types=["exec.*"])
            lines = [tree.script for tree in trees]
            named = [
                await wire.call("exec/start", command=line, execId=f"mine-{n}")
                for n, line in enumerate(lines[:5])
            ]
            nameless = [await wire.call("exec/start", command=line) for line in lines[5:]]
            ended = (await wire.run(command="exit 3"))[0]
            for tree in trees:
                await tree.grown()
            await wire.until(lambda: wire.notified("event", type="exec.exited"))
            await first.stop(signal.SIGKILL)
        assert all(tree.alive() for tree in trees)
        await first.start()
        await until(lambda: not any(tree.alive() for tree in trees))
        async with first.wire(tenant.name) as wire:
            after = events["lastEventId"]
            await wire.call("events/subscribe", types=["exec.exited"], lastEventId=after)
            for one in (*named, *nameless):
                told = await wire.until(lambda one=one: _event(wire, one["exec"]))
                attached = await wire.call("exec/attach", exec=one["exec"])
                assert attached["state"] == "ended"
                for exit_ in (told, await wire.exited(one["exec"])):
                    assert (exit_["reason"], exit_["exitCode"], exit_["signal"]) == ("lost", None, None)
                listed = (await wire.call("exec/list"))["execs"]
                found = next(entry for entry in listed if entry["exec"] == one["exec"])
                assert (found["pid"], found["startedAt"]) == (one["pid"], one["startedAt"])
            # what had ended before is told once, as it ended
            events_of = [n.params for n in wire.notifications if n.params.get("type") == "exec.exited"]
            assert [e["data"] for e in events_of if e["data"]["exec"] == ended["exec"]] == [ended]
            assert (await wire.run(command="exit 5"))[0]["exitCode"] == 5
    assert site.startswith("MainPID=") and site != "MainPID=0\n"
    assert await asyncio.to_thread(tenant.sh, main_pid) == site


def _event(wire: Wire, exec_id: str) -> Mapping[str, Any] | None:
    for said in wire.notifications:
        if said.params.get("type") == "exec.exited" and said.params["data"]["exec"] == exec_id:
            found: Mapping[str, Any] = said.params["data"]
            return found
    return None


COUNTING = "echo r; i=0; while :; do i=$((i+1)); echo $i; done"


def numbers(output: bytes) -> int:
    """Return how far a command counted; a number that is missing, or half of one in the middle, fails."""
    lines = output.decode().split("\n")
    assert lines[0] == "r"
    assert lines[1:-1] == [str(n) for n in range(1, len(lines) - 1)]
    return len(lines)


@pytest.mark.parametrize("words", [("stop", "--force"), ("delete", "--force")])
async def test_a_container_that_goes_in_mid_stream(
    gateway: LiveGateway, tenant: Container, words: tuple[str, ...]
) -> None:
    """Stopped or destroyed: every byte up to the end came, and the end is no success."""
    async with gateway.wire(tenant.name) as wire:
        started = await wire.call("exec/start", command=COUNTING)
        key = started["channel"], 1
        await wire.until(lambda: len(wire.output[key]) > 200_000)
        await asyncio.to_thread(environment.incus, words[0], tenant.name, *words[1:])
        exit_ = await wire.exited(started["exec"])
        assert exit_["exitCode"] != 0
        assert exit_["reason"] == "lost" or exit_["signal"] in ("KILL", "TERM", "HUP")
        assert exit_["offsets"]["stdout"] == len(wire.output[key])
        numbers(bytes(wire.output[key]))
        again = await wire.call("exec/wait", exec=started["exec"])
        assert again == exit_


async def test_a_container_that_is_frozen_in_mid_stream(gateway: LiveGateway, tenant: Container) -> None:
    """Its output stands still and goes on later without a gap; a cancel meanwhile says what it could do."""
    seconds = mark()
    async with gateway.wire(tenant.name) as wire, gateway.wire(tenant.name) as other:
        # four seconds of output, in the midst of which it is frozen
        part = "seq $((n + 1)) $((n + 150000)); sleep 0.2"
        command = f"echo r; for n in $(seq 0 150000 2850000); do {part}; done; exit 6"
        started = await wire.call("exec/start", command=command)
        sleeping = await wire.call("exec/start", argv=["sleep", seconds])
        await wire.until(lambda: len(wire.output[started["channel"], 1]) > 200_000)
        await asyncio.to_thread(environment.incus, "pause", tenant.name)
        killed = await other.call("exec/cancel", exec=sleeping["exec"], graceMs=0)
        assert killed["killed"] + killed["survivors"] == 1
        assert killed["survivors"] == alive(seconds)
        assert wire.notified("exec/exited", exec=started["exec"]) is None
        await asyncio.to_thread(environment.incus, "start", tenant.name)
        exit_ = await wire.exited(started["exec"])
        assert (exit_["reason"], exit_["exitCode"]) == ("exited", 6)
        assert numbers(bytes(wire.output[started["channel"], 1])) == 3_000_002
        await until(lambda: alive(seconds) == 0)
        assert (await wire.exited(sleeping["exec"]))["reason"] == "cancelled"


async def test_short_commands_lose_nothing(gateway: LiveGateway, shared_tenant: Container) -> None:
    """Many at a time, each with words and a code of its own: none without its output or with another code."""
    left, wrong = list(range(SHORT_EXECS)), list[Any]()
    async with contextlib.AsyncExitStack() as stack:

        async def runner(wire: Wire) -> None:
            while left:
                n = left.pop()
                exit_, out, err = await wire.run(command=f"echo out {n}; echo err {n} >&2; exit {n % 50}")
                said = (exit_["exitCode"], exit_["reason"], out, err)
                if said != (n % 50, "exited", b"out %d\n" % n, b"err %d\n" % n):
                    wrong.append((n, said))

        wires = [await stack.enter_async_context(gateway.wire(shared_tenant.name)) for _ in range(4)]
        async with asyncio.TaskGroup() as group:
            for n in range(AT_ONCE):
                group.create_task(runner(wires[n % len(wires)]))
    assert wrong == []


async def test_a_fork_bomb_at_its_limit_is_ended(gateway: LiveGateway, tenant: Container) -> None:
    """With no process left to the tenant a cancel still works, and so does a command after it."""
    limit = environment.settings().tenant_processes
    async with gateway.wire(tenant.name) as wire:
        started = await wire.call("exec/start", command="echo r; f() { f | f & }; f; sleep 600")
        await begun(wire, started)
        # it cannot fork any further; then bash gives up one by one, and others take their place
        await until(lambda: len(in_commands(tenant)) > limit // 2)
        killed = await wire.call("exec/cancel", exec=started["exec"])
        assert killed["survivors"] == 0 and killed["killed"] > limit // 2
        assert (await wire.exited(started["exec"]))["reason"] == "cancelled"
        exit_, out, _ = await wire.run(command="echo after")
        assert (exit_["exitCode"], out) == (0, b"after\n")
