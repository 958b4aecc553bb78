"""Measures what file tools cost the gateway and its worker, in CPU and in time, beside another checkout.

Needs no Incus: each checkout serves the `local` runtime. Both take turns within each round, so that a noisy
machine disturbs both alike: ratios are what to look at. CPU is what the kernel's scheduler has counted for
all threads of the gateway, and of the processes below it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.live import LiveGateway, Wire, local_gateway

ROOT: Final = Path(__file__).parents[2]
TEXT: Final = "".join(f"line {number} of a file as agents read them\n" for number in range(1, 201))
CALLS: Final[Mapping[str, Mapping[str, Any]]] = {
    "Read": {"file_path": "text.txt"},
    "Read of 20 lines": {"file_path": "text.txt", "offset": 20, "limit": 20},
    "Write": {"file_path": "written.txt", "content": "x\n"},
    "Glob": {"pattern": "*.txt"},
    "Grep": {"pattern": "line 20"},
}


def cpu(pid: int) -> float:
    """Return the seconds of CPU of a process's threads: schedstat of proc(5)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def below(pid: int) -> list[int]:
    """Return the processes below one."""
    found = list[int]()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *below(child)]
    return found


@dataclass
class Side:
    """One checkout's gateway, and what calls cost: microseconds of CPU in each turn, milliseconds of each."""

    name: str
    gateway: LiveGateway
    wire: Wire
    served: dict[str, list[float]] = field(default_factory=dict)
    worked: dict[str, list[float]] = field(default_factory=dict)
    took: dict[str, list[float]] = field(default_factory=dict)

    async def turn(self, what: str, calls: int, *, counted: bool) -> None:
        assert self.gateway.process is not None
        pid, tool = self.gateway.process.pid, what.partition(" ")[0]
        workers = below(pid)
        before = cpu(pid), sum(map(cpu, workers))
        times = list[float]()
        for _ in range(calls):
            began = time.perf_counter()
            said = await self.wire.call("tools/call", name=tool, arguments=CALLS[what])
            times.append((time.perf_counter() - began) * 1000)
            assert not said["isError"], said
        self.wire.notifications.clear()
        after = cpu(pid), sum(map(cpu, workers))
        if counted:
            self.served.setdefault(what, []).append((after[0] - before[0]) / calls * 1e6)
            self.worked.setdefault(what, []).append((after[1] - before[1]) / calls * 1e6)
            self.took.setdefault(what, []).extend(times)


async def side(stack: contextlib.AsyncExitStack, name: str, checkout: Path) -> Side:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    gateway = await local_gateway(folder, "demo", PYTHONPATH=f"{checkout}:{checkout}/clients/python")
    gateway.program = (sys.executable, "-P", "-m", "gateway")  # not of the folder that we are in
    await gateway.start()
    stack.push_async_callback(gateway.stop)
    wire = await stack.enter_async_context(gateway.wire("demo"))
    await wire.call("tools/call", name="Write", arguments={"file_path": "text.txt", "content": TEXT})
    return Side(name, gateway, wire)


def quantile(times: Sequence[float], part: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * part))]


async def run(other: Path, rounds: int, calls: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        sides = [await side(stack, "before", other), await side(stack, "now", ROOT)]
        for number in range(-1, rounds):
            for what in CALLS:
                for one in sides[:: 1 if number % 2 else -1]:
                    await one.turn(what, calls, counted=number >= 0)
        for what in CALLS:
            for one in sides:
                times = one.took[what]
                served, worked = statistics.median(one.served[what]), statistics.median(one.worked[what])
                print(
                    f"{what:>16} {one.name:>6}: gateway {served:6.0f} us of CPU, worker {worked:6.0f} us; "
                    f"p50 {quantile(times, 0.5):6.2f}, p95 {quantile(times, 0.95):6.2f}, "
                    f"p99 {quantile(times, 0.99):6.2f} ms"
                )
            before, now = sides
            ratios = [
                (after, statistics.median(y / x for x, y in zip(first, second, strict=True)))
                for after, first, second in (
                    ("gateway", before.served[what], now.served[what]),
                    ("worker", before.worked[what], now.worked[what]),
                )
            ]
            ratios += [
                (f"p{int(part * 100)}", quantile(now.took[what], part) / quantile(before.took[what], part))
                for part in (0.5, 0.95, 0.99)
            ]
            print(f"{'':>16}  now / before: {', '.join(f'{name} {ratio:.2f}' for name, ratio in ratios)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("other", type=Path, help="the other checkout, `before`")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=100, help="in each turn")
    options = parser.parse_args()
    asyncio.run(run(options.other.resolve(), options.rounds, options.calls))
    return 0
