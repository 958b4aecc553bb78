"""Measures what it costs that commands outlive the gateway: with and without a holder, in one run.

On the tests' own Incus (GATEWAY_TEST_HOST). Both gateways run side by side and take turns within each round,
so that a noisy machine disturbs both alike: ratios are what to look at. Then the one with a holder is killed
while commands run, and the time is taken until it answers `exec/list` with all. The exit code is 1 where
a byte or a command is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.integration import environment
from tests.integration.conftest import make_containers
from tests.integration.test_survive import Host
from tests.live import Wire

MiB = 1 << 20


async def first_byte(wire: Wire) -> float:
    """Return milliseconds from the request to a command's first output."""
    began = time.perf_counter()
    started = await wire.call("exec/start", argv=["/bin/echo", "x"])
    await wire.until(lambda: wire.output[started["channel"], 1])
    took = (time.perf_counter() - began) * 1000
    await wire.exited(started["exec"])
    wire.output.clear()
    wire.notifications.clear()
    return took


async def stream(host: Host, name: str, size: int) -> tuple[float, float]:
    """Return MB/s of a command that prints `size` bytes, and the gateway's CPU seconds meanwhile."""
    assert host.gateway.process is not None
    stat = Path(f"/proc/{host.gateway.process.pid}/stat")

    def cpu() -> float:
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    async with host.gateway.raw(name, Counting) as wire:
        await wire.call(
            "initialize", client={"name": "bench", "version": "1"}, token=host.gateway.token(name)
        )
        before, began = cpu(), time.perf_counter()
        started = await wire.call("exec/start", argv=["head", "-c", str(size), "/dev/zero"])
        await wire.exited(started["exec"])
        took = time.perf_counter() - began
        counted = getattr(wire, "counted", 0)
        assert counted == size, f"{counted} bytes of {size}"
        return size / took / 1e6, cpu() - before


class Counting(Wire):
    """A websocket whose output is counted and not kept."""

    counted = 0

    async def _read(self) -> None:
        async for message in self.socket:
            if isinstance(message, bytes):
                self.counted += len(message) - 5
            else:
                self._text(message)
            async with self._grown:
                self._grown.notify_all()


def running(listed: Mapping[str, Any]) -> list[int]:
    return sorted(one["pid"] for one in listed["execs"] if one["state"] == "running")


async def adopt(host: Host, name: str, count: int) -> tuple[float, float]:
    """Return milliseconds until a killed gateway is up again, and answers with all of `count` commands."""
    async with host.gateway.wire(name) as wire:
        for _ in range(count):
            await wire.call("exec/start", argv=["sleep", "1000"], lingerMs=-1)
        pids = running(await wire.call("exec/list"))
        assert len(pids) >= count
    await host.gateway.stop(signal.SIGKILL)
    began = time.perf_counter()
    await host.gateway.start()
    up = (time.perf_counter() - began) * 1000
    async with host.gateway.wire(name) as wire:
        found = await wire.call("exec/list")
        took = (time.perf_counter() - began) * 1000
        assert running(found) == pids, "some were lost"
        for one in found["execs"]:
            await wire.call("exec/cancel", exec=one["exec"], graceMs=0)
    return up, took


async def run(rounds: int, size: int, counts: list[int]) -> None:
    settings = environment.settings()
    environment.up(lambda line: None)
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (tenant,) = await stack.enter_async_context(make_containers("bench", settings, 1))
        hosts: dict[str, Host] = {}
        for kind in ("without", "with"):
            (folder / kind).mkdir()
            more = {"GATEWAY_MAX_EXECS": "1000"}
            hosts[kind] = host = Host(settings, folder / kind, **more)
            if kind == "with":
                await host.hold()
                stack.push_async_callback(host.end_holder)
            await host.gateway.start()
            stack.push_async_callback(host.gateway.stop)
        first = {kind: list[float]() for kind in hosts}
        rate = {kind: list[tuple[float, float]]() for kind in hosts}
        async with (
            hosts["without"].gateway.wire(tenant.name) as one,
            hosts["with"].gateway.wire(tenant.name) as other,
        ):
            wires = {"without": one, "with": other}
            for wire in wires.values():
                for _ in range(5):
                    await first_byte(wire)
            for _ in range(rounds):
                for kind, wire in wires.items():
                    for _ in range(10):
                        first[kind].append(await first_byte(wire))
                        await asyncio.sleep(0.2)  # as an agent does: the shell that was taken is replaced
        for _ in range(max(2, rounds // 2)):
            for kind, host in hosts.items():
                rate[kind].append(await stream(host, tenant.name, size))
        for kind, times in first.items():
            tenth, half = statistics.quantiles(times, n=10)[0], statistics.median(times)
            print(f"first byte {kind:>8} a holder: p10 {tenth:.2f}, p50 {half:.2f} ms of {len(times)}")
        for kind, found in rate.items():
            rates, cpus = [one for one, _ in found], [two for _, two in found]
            fast, half = max(rates), statistics.median(rates)
            spent = f"CPU {min(cpus):.2f} s at best, median {statistics.median(cpus):.2f} s"
            print(f"{size >> 20} MiB {kind:>8} a holder: best {fast:.0f}, median {half:.0f} MB/s; {spent}")
        for count in counts:
            up, took = await adopt(hosts["with"], tenant.name, count)
            print(
                f"killed beside {count} commands: up after {up:.0f} ms, all of them told after {took:.0f} ms"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--commands", type=int, nargs="*", default=[1, 100])
    options = parser.parse_args()
    try:
        asyncio.run(run(options.rounds, options.megabytes * MiB, options.commands))
    except AssertionError as wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
        return 1
    return 0
