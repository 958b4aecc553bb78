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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.integration import environment
from tests.integration.conftest import make_containers
from tests.integration.hosts import Host
from tests.live import Wire

MiB = 1 << 20
PARTS = ("first-byte", "throughput", "adoption")
_EACH = 200  # commands of one tenant, which may have 400 processes


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


def cpu(host: Host) -> float:
    """Return the seconds of CPU that the gateway has taken."""
    assert host.gateway.process is not None
    fields = Path(f"/proc/{host.gateway.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def stream(host: Host, name: str, size: int) -> tuple[float, float]:
    """Return MB/s of a command that prints `size` bytes, and the gateway's CPU seconds meanwhile."""
    async with host.gateway.raw(name, Counting) as wire:
        await wire.call(
            "initialize", client={"name": "bench", "version": "1"}, token=host.gateway.token(name)
        )
        before, began = cpu(host), time.perf_counter()
        started = await wire.call("exec/start", argv=["head", "-c", str(size), "/dev/zero"])
        await wire.exited(started["exec"])
        took = time.perf_counter() - began
        counted = getattr(wire, "counted", 0)
        assert counted == size, f"{counted} bytes of {size}"
        return size / took / 1e6, cpu(host) - before


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


async def adopt(host: Host, names: Sequence[str], count: int) -> tuple[float, float, float]:
    """Have `count` commands, kill the gateway, and start another.

    Return milliseconds until that is up and until it answers with all of them, and its CPU seconds.
    """
    pids, names = dict[str, list[int]](), names[: -(-count // _EACH)]
    for place, name in enumerate(names):
        some = min(_EACH, count - place * _EACH)
        async with host.gateway.wire(name) as wire:
            for _ in range(some):
                await wire.call("exec/start", argv=["sleep", "1000"], lingerMs=-1)
            pids[name] = running(await wire.call("exec/list"))
            assert len(pids[name]) >= some
    await host.gateway.stop(signal.SIGKILL)
    began = time.perf_counter()
    await host.gateway.start()
    up, spent = (time.perf_counter() - began) * 1000, cpu(host)
    took = 0.0
    async with contextlib.AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(host.gateway.wire(name)) for name in names]
        found = [await wire.call("exec/list") for wire in wires]
        took = (time.perf_counter() - began) * 1000
        for name, wire, listed in zip(names, wires, found, strict=True):
            assert running(listed) == pids[name], "some were lost"
            for one in listed["execs"]:
                await wire.call("exec/cancel", exec=one["exec"], graceMs=0)
    return up, took, spent


async def first_bytes(hosts: Mapping[str, Host], name: str, rounds: int) -> None:
    """Print how long a command's first byte takes, ten commands of each kind in each round."""
    first = {kind: list[float]() for kind in hosts}
    async with contextlib.AsyncExitStack() as stack:
        wires = {kind: await stack.enter_async_context(hosts[kind].gateway.wire(name)) for kind in hosts}
        for wire in wires.values():
            for _ in range(5):
                await first_byte(wire)
        for _ in range(rounds):
            for kind, wire in wires.items():
                for _ in range(10):
                    first[kind].append(await first_byte(wire))
                    await asyncio.sleep(0.2)  # as an agent does: the shell that was taken is replaced
    for kind, times in first.items():
        tenth, half = statistics.quantiles(times, n=10)[0], statistics.median(times)
        print(f"first byte {kind:>8} a holder: p10 {tenth:.2f}, p50 {half:.2f} ms of {len(times)}")


async def throughput(hosts: Mapping[str, Host], name: str, rounds: int, size: int) -> None:
    """Print how fast a large output is, and the median of the ratios of each round."""
    rate = {kind: list[tuple[float, float]]() for kind in hosts}
    for turn in range(rounds):
        for kind in sorted(hosts, reverse=bool(turn % 2)):  # what is second may be slower, or faster
            rate[kind].append(await stream(hosts[kind], name, size))
    for kind, found in rate.items():
        rates, cpus = [one for one, _ in found], [two for _, two in found]
        fast, half = max(rates), statistics.median(rates)
        spent = f"CPU {min(cpus):.2f} s at best, median {statistics.median(cpus):.2f} s"
        print(f"{size >> 20} MiB {kind:>8} a holder: best {fast:.0f}, median {half:.0f} MB/s; {spent}")
    pairs = zip(rate["with"], rate["without"], strict=True)
    ratio = statistics.median(one / other for (one, _), (other, _) in pairs)
    print(f"{size >> 20} MiB with a holder over without, median of {rounds} pairs: {ratio:.0%}")


async def run(rounds: int, size: int, counts: list[int], parts: Sequence[str]) -> None:
    settings = environment.settings()
    environment.up(lambda line: None)
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        number = max(1, *(-(-count // _EACH) for count in counts)) if "adoption" in parts else 1
        tenants = await stack.enter_async_context(make_containers("bench", settings, number))
        names = [one.name for one in tenants]
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
        if "first-byte" in parts:
            await first_bytes(hosts, names[0], rounds)
        if "throughput" in parts:
            await throughput(hosts, names[0], max(2, rounds // 2), size)
        for count in counts if "adoption" in parts else ():
            up, told, seconds = await adopt(hosts["with"], names, count)
            print(
                f"killed beside {count} commands: up after {up:.0f} ms, all told after {told:.0f} ms, "
                f"CPU {seconds:.2f} s"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--commands", type=int, nargs="*", default=[1, 100, 500])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="measure no more than this")
    options = parser.parse_args()
    try:
        asyncio.run(run(options.rounds, options.megabytes * MiB, options.commands, options.only))
    except AssertionError as wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
        return 1
    return 0
