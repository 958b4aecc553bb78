"""Measures sixty agents at work: how long their calls take, and whose CPU they cost.

Each agent makes one call of each kind a second: Read, Edit, Grep and a Bash of `true`. It runs on the tests'
own Incus (GATEWAY_TEST_HOST). With another checkout, the gateways of both serve the same tenants side by side
and take turns, so that a noisy machine disturbs both alike: ratios are what to look at. CPU is what the
kernel has counted for the gateway, its workers, incusd, the processes that incusd starts for each exec, and
the tenants.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.bench.bench import percentile
from tests.bench.crowd import inside, times
from tests.bench.reads import COUNTED, GREP, READ, TEXT, Call, below, edit
from tests.integration import environment
from tests.integration.conftest import BOOTED, make_containers
from tests.integration.hosts import Host
from tests.live import Wire

ROOT: Final = Path(__file__).parents[2]
BASH: Final[Call] = "Bash", {"command": "true"}
KINDS: Final = ("Read", "Edit", "Grep", "Bash")
_PERIOD: Final = 1.0  # seconds in which an agent makes one call of each kind
_SETTLED: Final = 1.0  # seconds until what the calls led to is done: shells replaced, events written


@dataclass
class Agent:
    """One agent: a session of its own in a tenant, whose folder it works in."""

    wire: Wire
    folder: str
    edits: int = 0

    async def prepare(self) -> None:
        for path, content in (("text.txt", TEXT), (COUNTED, "<0>\n")):
            await self._call("Write", {"file_path": f"{self.folder}/{path}", "content": content})

    async def work(self, until: float, phase: float, took: dict[str, list[float]]) -> None:
        """Make calls until a time of the loop, and add the milliseconds of each to `took`."""
        loop = asyncio.get_running_loop()
        due = loop.time() + phase
        while loop.time() < until:
            for kind in KINDS:
                await asyncio.sleep(max(0.0, due - loop.time()))
                began = time.perf_counter()
                await self._call(*self._next(kind))
                took[kind].append((time.perf_counter() - began) * 1000)
                due = max(due, loop.time() - _PERIOD) + _PERIOD / len(KINDS)
            self.wire.notifications.clear()

    def _next(self, kind: str) -> Call:
        """Return the next call of a kind, in the agent's own folder."""
        if kind == "Bash":
            return BASH
        if kind == "Grep":
            return "Grep", {**GREP[1], "path": self.folder}
        if kind == "Edit":
            self.edits += 1
            arguments = edit(self.edits - 1)[1]
        else:
            arguments = READ[1]
        return kind, {**arguments, "file_path": f"{self.folder}/{arguments['file_path']}"}

    async def _call(self, tool: str, arguments: Any) -> None:
        said = await self.wire.call("tools/call", name=tool, arguments=arguments)
        assert not said["isError"], said


@dataclass
class Side:
    """One checkout's gateway and its agents; milliseconds of each call, and CPU seconds by whose they are."""

    name: str
    host: Host
    agents: list[Agent] = field(default_factory=list)
    took: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    async def turn(self, seconds: float, tenants: Sequence[str], *, counted: bool) -> None:
        """Have all agents work for some seconds."""
        took: dict[str, list[float]] = defaultdict(list) if not counted else self.took
        before, until = self._cpu(tenants), asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for number, agent in enumerate(self.agents):
                group.create_task(agent.work(until, _PERIOD * number / len(self.agents), took))
        await asyncio.sleep(_SETTLED)
        for whose, now in self._cpu(tenants).items() if counted else ():
            self.spent[whose] += now - before[whose]

    def _cpu(self, tenants: Sequence[str]) -> dict[str, float]:
        assert self.host.gateway.process is not None
        pid = self.host.gateway.process.pid
        own, ended = times(int(environment.daemon().pidfile.read_text()))
        return {
            "gateway": sum(times(pid)),
            "workers": sum(sum(times(one)) for one in below(pid) if Path(f"/proc/{one}").exists()),
            "incusd": own,
            "its processes": ended,
            "tenants": sum(map(inside, tenants)),
        }

    def report(self, turns: float) -> None:
        calls = sum(map(len, self.took.values()))
        print(f"{self.name}: {calls / turns:.0f} calls a second")
        for kind, found in self.took.items():
            said = "  ".join(f"p{part} {percentile(found, part):7.1f}" for part in (50, 95, 99))
            print(f"  {kind:5} {said} ms of {len(found)}")
        commands = len(self.took["Bash"])
        parts = ", ".join(f"{whose} {seconds / turns:.0%}" for whose, seconds in self.spent.items())
        print(f"  CPU of a core: {parts}")
        outside = sum(seconds for whose, seconds in self.spent.items() if whose not in ("gateway", "workers"))
        print(f"  CPU outside of the gateway for each command: {outside / commands * 1000:.1f} ms")


async def side(
    stack: contextlib.AsyncExitStack,
    name: str,
    checkout: Path,
    folder: Path,
    agents: int,
    tenants: Sequence[str],
) -> Side:
    folder.mkdir()
    host = Host(environment.settings(), folder, PYTHONPATH=f"{checkout}:{checkout}/clients/python")
    host.gateway.program = (sys.executable, "-P", "-m", "gateway")  # not of the folder that we are in
    await host.hold()
    stack.push_async_callback(host.end_holder)
    await host.gateway.start()
    stack.push_async_callback(host.gateway.stop)
    made = Side(name, host)
    for number in range(agents):
        wire = await stack.enter_async_context(host.gateway.wire(tenants[number % len(tenants)]))
        agent = Agent(wire, f"{name}-{number}")
        await agent.prepare()
        made.agents.append(agent)
    return made


async def run(options: argparse.Namespace) -> None:
    settings = environment.settings()
    environment.up(lambda line: None)
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made = await stack.enter_async_context(make_containers("work", settings, options.tenants))
        await asyncio.gather(*(asyncio.to_thread(one.sh, BOOTED) for one in made))
        names = [one.name for one in made]
        checkouts = (
            {"now": ROOT} if options.other is None else {"before": options.other.resolve(), "now": ROOT}
        )
        sides = [
            await side(stack, name, checkout, folder / name, options.agents, names)
            for name, checkout in checkouts.items()
        ]
        for number in range(-1, options.rounds):
            for one in sides[:: 1 if number % 2 else -1]:
                await one.turn(options.seconds if number >= 0 else 2.0, names, counted=number >= 0)
        for one in sides:
            one.report(options.rounds * options.seconds)
        if len(sides) == 2:
            before, now = sides
            for kind in KINDS:
                ratios = (
                    f"p{part} {percentile(now.took[kind], part) / percentile(before.took[kind], part):.2f}"
                    for part in (50, 95, 99)
                )
                print(f"now / before: {kind:5} {', '.join(ratios)}")
            cost = [sum(one.spent.values()) / sum(map(len, one.took.values())) for one in sides]
            print(f"now / before: CPU for each call {cost[1] / cost[0]:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("other", type=Path, nargs="?", help="another checkout, `before`")
    parser.add_argument("--agents", type=int, default=60)
    parser.add_argument("--tenants", type=int, default=20, help="that the agents share")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    try:
        asyncio.run(run(options))
    except AssertionError as wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
        return 1
    return 0
