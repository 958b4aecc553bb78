"""Measures what a history costs: the CPU of a turn in a tree of 1 000 files, and Writes beside commits.

Writes are timed in phases that take turns: without a commit, and with one turn of another session after the
other, each of one changed file. The container's CPU is read from its cgroup, the gateway's from its process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from gateway.host.requirements import setup
from tests.bench.bench import percentile
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.live import Wire

FILES: Final = 1000
_V1: Final = Path("/sys/fs/cgroup/cpuacct")
_V2: Final = Path("/sys/fs/cgroup")
_TICK: Final = os.sysconf("SC_CLK_TCK")


def cpu_of(tenant: str) -> float:
    """Return the CPU seconds of a container so far."""
    old = _V1 / f"lxc.payload.{tenant}" / "cpuacct.usage"
    if old.exists():
        return int(old.read_text()) / 1e9
    stat = (_V2 / f"lxc.payload.{tenant}" / "cpu.stat").read_text()
    return int(stat.partition("usage_usec ")[2].split()[0]) / 1e6


def cpu_of_gateway(host: Hosting) -> float:
    assert host.gateway.process is not None
    fields = Path(f"/proc/{host.gateway.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


async def write(wire: Wire, path: str, text: str) -> float:
    began = time.perf_counter()
    await wire.call("tools/call", name="Write", arguments={"file_path": path, "content": text})
    return time.perf_counter() - began


async def fill(wire: Wire) -> None:
    each = "for f in $(seq 50); do seq 200 >d$d/f$f.ts; done"
    line = f"for d in $(seq {FILES // 50}); do mkdir -p d$d; {each}; done"
    await wire.call("tools/call", name="Bash", arguments={"command": line})
    await wire.call("turn/end")


async def turns(host: Hosting, tenant: str, count: int, command: bool) -> tuple[float, float, list[float]]:
    """Return the CPU seconds of a turn, in the container and in the gateway, and the seconds of each end.

    What goes by itself meanwhile is measured for as long before, and taken off.
    """
    async with host.gateway.wire(tenant) as wire:
        ends = []
        spent, served = 0.0, 0.0
        for number in range(count):
            if command:
                line = f"echo {number} >d1/f1.ts"
                await wire.call("tools/call", name="Bash", arguments={"command": line})
            else:
                await write(wire, "d1/f1.ts", f"turn {number}\n")
            await asyncio.sleep(0.4)  # until the shell that the call took is replaced
            before, began, gateway = cpu_of(tenant), time.perf_counter(), cpu_of_gateway(host)
            turn = (await wire.call("turn/end"))["turn"]
            ends.append(time.perf_counter() - began)
            assert turn is not None and turn["files"] == 1, turn
            spent += cpu_of(tenant) - before
            served += cpu_of_gateway(host) - gateway
        return spent / count, served / count, ends


async def writes(host: Hosting, tenant: str, count: int, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"alone": [], "beside commits": []}

    async def commit(ended: asyncio.Event) -> int:
        number = 0
        async with host.gateway.wire(tenant) as wire:
            while not ended.is_set():
                await write(wire, "d2/f2.ts", f"{time.time_ns()}\n")
                await wire.call("turn/end")
                number += 1
        return number

    async with host.gateway.wire(tenant) as wire:
        for _ in range(rounds):
            for way, times in found.items():
                ended = asyncio.Event()
                beside = asyncio.create_task(commit(ended)) if way != "alone" else None
                for number in range(count):
                    times.append(await write(wire, f"d3/f{number % 50 + 1}.ts", f"{number}\n"))
                    await asyncio.sleep(0.005)
                ended.set()
                if beside is not None:
                    print(f"  {await beside} turns beside {count} Writes")
                await wire.call("turn/end")
    return found


async def run(words: argparse.Namespace) -> None:
    settings = environment.settings()
    await asyncio.to_thread(setup, settings, lambda line: None)
    with tempfile.TemporaryDirectory(prefix="bench-history-") as folder:
        async with hosting(settings, Path(folder) / "state") as host:
            record = await host.deploy("history.example.com")
            tenant = record["tenant"]
            async with host.gateway.wire(tenant) as wire:
                await fill(wire)
            for name, command in (("a Write", False), ("a Bash", True)):
                spent, served, ends = await turns(host, tenant, words.turns, command)
                print(
                    f"a turn of {name} in {FILES} files: {spent * 1000:.1f} ms of CPU in the container, "
                    f"{served * 1000:.1f} in the gateway; turn/end p50 {percentile(ends, 50) * 1000:.0f} ms, "
                    f"p99 {percentile(ends, 99) * 1000:.0f} ms"
                )
            for way, times in (await writes(host, tenant, words.writes, words.rounds)).items():
                told = ", ".join(f"p{p} {percentile(times, p) * 1000:.2f} ms" for p in (50, 90, 99))
                print(f"Write {way}: {told} of {len(times)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--writes", type=int, default=300, help="in each phase")
    parser.add_argument("--rounds", type=int, default=4)
    asyncio.run(run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
