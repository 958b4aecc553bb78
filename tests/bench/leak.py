"""Looks for what grows without end: rounds of starts through the API, and a kill after some of them.

On the tests' own Incus (GATEWAY_TEST_HOST). After each round, and after its kills and adoptions, it prints
the gateway's descriptors by kind, its memory, what the holder holds, and the commands' groups in the
container.
The first rounds fill what is kept on purpose (ended commands, pools), so the second half is what to look at:
the exit code is 1 where the last round has more descriptors, names or groups than the middle one, or over a
tenth more memory of the gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from tests.integration import environment
from tests.integration.conftest import Container, make_containers
from tests.integration.hosts import Host
from tests.live import Wire

MiB: Final = 1 << 20
_BESIDE: Final = 8  # commands at a time
_SLACK: Final = 6  # descriptors that come and go: warm shells, workers' connections
_WAITING: Final = 24  # at the holder, of the shells that wait


def kinds(pid: int) -> Counter[str]:
    """Return a process's descriptors by what they are."""
    found = Counter[str]()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            found["memfd" if target.startswith("/memfd:command") else target.partition(":")[0][:12]] += 1
    return found


def memory(pid: int) -> float:
    """Return MiB of a process that are its own."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.partition(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return (sizes["Private_Dirty"] + sizes["Private_Clean"]) / 1024


def groups(tenant: Container) -> int:
    """Return how many groups of commands there are in a container."""
    return int(tenant.sh("find /sys/fs/cgroup -mindepth 2 -type d -path '*gateway*' | wc -l"))


class Round:
    """What was seen after one round."""

    def __init__(self, host: Host, tenant: Container) -> None:
        assert host.gateway.process is not None and host.holder is not None
        gateway, holder = host.gateway.process.pid, host.holder.pid
        self.kinds = kinds(gateway)
        self.descriptors = sum(self.kinds.values())
        self.memory = memory(gateway)
        self.held, self.holding = host.held, sum(kinds(holder).values())
        self.holder_memory = memory(holder)
        self.groups = groups(tenant)

    def __str__(self) -> str:
        of = ", ".join(f"{number} {kind}" for kind, number in self.kinds.most_common(5))
        return (
            f"{self.descriptors} descriptors ({of}), {self.memory:.1f} MiB; "
            f"holder: {self.held} names, {self.holding} descriptors, {self.holder_memory:.1f} MiB; "
            f"{self.groups} groups"
        )


async def some(wire: Wire, number: int) -> None:
    """Run commands to their end, one after the other: of `exec/start`, and of Bash."""
    for turn in range(number):
        if turn % 4 == 3:
            given: dict[str, Any] = {"name": "Bash", "arguments": {"command": "echo out; exit 3"}}
            await wire.call("tools/call", **given, callId=f"c-{os.urandom(8).hex()}")
        else:
            await wire.run(command="echo out; exit 3")
        wire.output.clear()
        wire.notifications.clear()


async def lasting(host: Host, name: str, number: int) -> None:
    """Have commands that run on over the kill, and end after it."""
    async with host.gateway.wire(name) as wire:
        for _ in range(number):
            await wire.call("exec/start", argv=["sleep", "1000"], lingerMs=-1)


async def end(host: Host, name: str) -> None:
    async with host.gateway.wire(name) as wire:
        for one in (await wire.call("exec/list"))["execs"]:
            if one["state"] == "running":
                await wire.call("exec/cancel", exec=one["exec"], graceMs=0)


async def run(starts: int, rounds: int, kills: int, seconds: float) -> int:
    settings = environment.settings()
    environment.up(lambda line: None)
    began, seen = time.monotonic(), list[Round]()
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (tenant,) = await stack.enter_async_context(make_containers("leak", settings, 1))
        (folder / "state").mkdir()
        host = Host(settings, folder / "state")
        await host.hold()
        stack.push_async_callback(host.close)
        await host.gateway.start()
        done = 0
        for number in range(rounds):
            async with contextlib.AsyncExitStack() as wires:
                each = [
                    await wires.enter_async_context(host.gateway.wire(tenant.name)) for _ in range(_BESIDE)
                ]
                await asyncio.gather(*(some(wire, starts // rounds // _BESIDE) for wire in each))
            done += starts // rounds // _BESIDE * _BESIDE
            print(f"{done:>6} starts: {Round(host, tenant)}", flush=True)
            for _ in range(kills):
                await lasting(host, tenant.name, 5)
                await host.gateway.stop(signal.SIGKILL)
                await host.gateway.start()
                await end(host, tenant.name)
            await asyncio.sleep(2)  # until warm shells are replaced
            seen.append(Round(host, tenant))
            print(f"{done:>6} starts, {kills * (number + 1):>3} kills: {seen[-1]}", flush=True)
            if time.monotonic() - began > seconds:
                print("no time for more rounds")
                break
    middle, last = seen[len(seen) // 2], seen[-1]
    grown = [
        word
        for word, grew in {
            "descriptors": last.descriptors > middle.descriptors + _SLACK,
            "names at the holder": last.held > middle.held + _SLACK,
            "descriptors of the holder": last.holding > middle.holding + _WAITING,
            "groups": last.groups > middle.groups + _SLACK,
            "memory": last.memory > middle.memory * 1.1,
            "memory of the holder": last.holder_memory > middle.holder_memory * 1.1,
        }.items()
        if grew
    ]
    if grown:
        print(f"grows: {', '.join(grown)}", file=sys.stderr)
    return 1 if grown else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--starts", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kills", type=int, default=2, help="after each round")
    parser.add_argument("--seconds", type=float, default=540, help="after which no round begins")
    options = parser.parse_args()
    return asyncio.run(run(options.starts, options.rounds, options.kills, options.seconds))
