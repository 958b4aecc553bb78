"""Measures what file tools cost the gateway and its worker, in CPU and in time, beside another checkout.

Needs no Incus: each checkout serves the `local` runtime. Both take turns every few calls, so that a noisy
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.live import LiveGateway, Wire, local_gateway

ROOT: Final = Path(__file__).parents[2]
Call = tuple[str, Mapping[str, Any]]
TEXT: Final = "".join(f"line {number} of a file as agents read them\n" for number in range(1, 201))
# seconds until what calls lead to has been done: events are written in groups, at the latest after 0.2 s, and
# are a cost of the calls that they are about, not of those that come next
SETTLED: Final = 0.5
BURST: Final = 5  # calls of one side before the other's
READ: Final = "Read", {"file_path": "text.txt"}
WRITE: Final = "Write", {"file_path": "written.txt", "content": "x\n"}
GLOB: Final = "Glob", {"pattern": "*.txt"}
GREP: Final = "Grep", {"pattern": "line 20"}
COUNTED: Final = "counted.txt"


def edit(number: int) -> Call:
    """Return an edit of a file that holds the number; it then holds the next one."""
    return "Edit", {"file_path": COUNTED, "old_string": f"<{number}>", "new_string": f"<{number + 1}>"}


def eight(number: int) -> Sequence[Call]:
    """Return the calls of an agent that makes a small change, as in bench.py."""
    counted = "Read", {"file_path": COUNTED}
    return counted, READ, GLOB, ("Read", {"file_path": "written.txt"}), GREP, WRITE, edit(number), counted


CASES: Final[Mapping[str, Callable[[int], Sequence[Call]]]] = {
    "Read": lambda _: [READ],
    "Read of 20 lines": lambda _: [("Read", {"file_path": "text.txt", "offset": 20, "limit": 20})],
    "Write": lambda _: [WRITE],
    "Edit": lambda number: [edit(number)],
    "Glob": lambda _: [GLOB],
    "Grep": lambda _: [GREP],
    "eight calls": eight,
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
    edits: int = 0

    def spent(self) -> tuple[float, float]:
        """Return the seconds of CPU of the gateway until now, and of the processes below it."""
        assert self.gateway.process is not None
        pid = self.gateway.process.pid
        return cpu(pid), sum(map(cpu, below(pid)))

    async def burst(self, what: str, times: list[float]) -> None:
        for _ in range(BURST):
            case = CASES[what](self.edits)
            began = time.perf_counter()
            answers = [await self.call(*call) for call in case]
            times.append((time.perf_counter() - began) * 1000)
            for said in answers:
                assert not said["isError"], said
            self.edits += sum(tool == "Edit" for tool, _ in case)
        self.wire.notifications.clear()

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Any:
        return await self.wire.call("tools/call", name=tool, arguments=arguments)


async def side(stack: contextlib.AsyncExitStack, name: str, checkout: Path) -> Side:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    gateway = await local_gateway(folder, "demo", PYTHONPATH=f"{checkout}:{checkout}/clients/python")
    gateway.program = (sys.executable, "-P", "-m", "gateway")  # not of the folder that we are in
    await gateway.start()
    stack.push_async_callback(gateway.stop)
    wire = await stack.enter_async_context(gateway.wire("demo"))
    made = Side(name, gateway, wire)
    for path, content in (("text.txt", TEXT), (COUNTED, f"<{made.edits}>\n"), ("written.txt", "x\n")):
        await made.call("Write", {"file_path": path, "content": content})
    return made


def quantile(times: Sequence[float], part: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * part))]


async def turn(sides: Sequence[Side], what: str, bursts: int, *, counted: bool) -> None:
    """Make bursts of calls by turns, and count what they and what they led to has cost each side."""
    times: list[list[float]] = [[] for _ in sides]
    before = [one.spent() for one in sides]
    for number in range(bursts):
        for one, took in list(zip(sides, times, strict=True))[:: 1 if number % 2 else -1]:
            await one.burst(what, took)
    await asyncio.sleep(SETTLED)
    if not counted:
        return
    for one, took, (served, worked) in zip(sides, times, before, strict=True):
        now = one.spent()
        one.served.setdefault(what, []).append((now[0] - served) / len(took) * 1e6)
        one.worked.setdefault(what, []).append((now[1] - worked) / len(took) * 1e6)
        one.took.setdefault(what, []).extend(took)


async def run(other: Path, cases: Sequence[str], rounds: int, calls: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        sides = [await side(stack, "before", other), await side(stack, "now", ROOT)]
        for number in range(-1, rounds):
            for what in cases:
                await turn(sides, what, -(-calls // BURST), counted=number >= 0)
        for what in cases:
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
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=100, help="in each turn")
    options = parser.parse_args()
    asyncio.run(run(options.other.resolve(), options.cases or list(CASES), options.rounds, options.calls))
    return 0
