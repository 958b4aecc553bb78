"""Deploys many static sites on the tests' Incus, four at a time, and measures the gateway with all of them.

Every deployment must succeed; no time passes or fails, but each that has a goal is shown as a ratio of it.
Times grow with whatever else the machine does; the CPU seconds of a deployment, by whose they are, hardly do.
Tenants beyond `--awake` are stopped, the eldest first, where memory asks for it: after every twenty, while no
deployment is under way, and what that costs is not counted. The host of a virtual machine may take back what
memory is free, and the first use of a page is slow then: `--touch` uses so much of it once before, as on a
server of its own. It ends after `--minutes` whatever is done by then, says how far it came, and removes what
it made.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import mmap
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import aiohttp
import orjson

from gateway.host import HostError
from gateway.incus import Incus, IncusError
from gateway.incus.client import instance_path
from gateway.limits.capacity import host_memory
from tests.integration import environment
from tests.integration.sites import ENDED, Hosting, hosting

MiB: Final = 1 << 20
_EACH: Final = 80 * MiB  # memory of one that is awake, with room
_HERTZ: Final = os.sysconf("SC_CLK_TCK")
_TOUCHES: Final = 40
_TOLD: Final = 20  # deployments, or removals, between two lines of progress
_LONGEST: Final = 300.0  # seconds of one of either
_REMOVALS: Final = 8  # at once


@contextlib.contextmanager
def touched(mebibytes: int) -> Iterator[None]:
    """Use so much memory once and free it, but for a page of each MiB: the host takes back whole blocks."""
    if not mebibytes:
        yield
        return
    with mmap.mmap(-1, mebibytes * MiB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for start in range(0, len(memory), MiB):
            memory[start : start + MiB] = b"x" * MiB
        for start in range(0, len(memory), MiB):
            memory.madvise(mmap.MADV_DONTNEED, start + mmap.PAGESIZE, MiB - mmap.PAGESIZE)
        print(f"{mebibytes} MiB of memory were used once", flush=True)
        yield


def at(values: Sequence[float], share: float) -> float:
    """Return the value below which that share of all lies."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


def told(what: str, values: Sequence[float], goal: float | None = None) -> str:
    """Return what was measured in milliseconds, beside its goal."""
    said = (
        f"{what:<28} p50 {at(values, 0.5):7.1f}  p95 {at(values, 0.95):7.1f}  p99 {at(values, 0.99):7.1f} ms"
    )
    return said if goal is None else f"{said}  p50 is {at(values, 0.5) / goal:.2f} of the goal of {goal:g}"


def cpu(pid: int) -> float:
    """Return the CPU seconds of a process and of its children that have ended."""
    return sum(times(pid))


def own_cpu(host: Hosting) -> float:
    """Return the CPU seconds of the gateway."""
    assert host.gateway.process is not None
    return cpu(host.gateway.process.pid)


def spent(host: Hosting, tenants: Sequence[str]) -> dict[str, float]:
    """Return the CPU seconds so far of what has a part in a deployment."""
    assert host.caddy.process is not None
    own, ended = times(int(environment.daemon().pidfile.read_text()))
    return {
        "tenants": sum(map(inside, tenants)),
        "incusd": own,
        "its commands": ended,
        "gateway": own_cpu(host),
        "Caddy": cpu(host.caddy.process.pid),
        "this": sum(os.times()[:4]),
    }


def inside(tenant: str) -> float:
    """Return the CPU seconds of a tenant's processes since its start; 0 if it does not run."""
    for tree in ("unified", "."):
        with contextlib.suppress(OSError):
            said = Path(f"/sys/fs/cgroup/{tree}/lxc.payload.{tenant}/cpu.stat").read_text()
            return int(said.split()[1]) / 1e6  # usage_usec
    return 0.0


def times(pid: int) -> tuple[float, float]:
    """Return the CPU seconds of a process, and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / _HERTZ, sum(map(int, fields[13:15])) / _HERTZ


class Crowd:
    """Tenants that one gateway deploys; `names` has them in the order of their making."""

    def __init__(self, host: Hosting, client: aiohttp.ClientSession, awake: int, at_once: int = 4) -> None:
        self.host, self._client = host, client
        self._awake, self._slots = awake, asyncio.Semaphore(at_once)
        self.names: list[str] = []
        self._next = 0
        self._running: deque[str] = deque()
        self.times: list[float] = []
        self.phases: defaultdict[str, list[float]] = defaultdict(list)  # milliseconds, by name
        self.spent: list[dict[str, float]] = []  # CPU seconds so far, at the end of each deployment
        self._apart = defaultdict[str, float](float)  # those that are not counted
        self.sources: Counter[str] = Counter()
        self.failed: list[Any] = []
        self._recorded: set[str] = set()  # tenants whose history has begun
        self._ends: defaultdict[str, asyncio.Future[None]] = defaultdict(
            asyncio.get_running_loop().create_future
        )

    async def _hear(self, subscribed: asyncio.Event) -> None:
        """Hear how deployments end. To ask for it again and again would cost what is measured here."""
        async with self._client.get("/v1/events?type=deployment.*,turn.committed") as stream:
            subscribed.set()
            async for line in stream.content:
                if line.startswith(b"data:"):
                    event = orjson.loads(line[5:])
                    if event["type"] == "turn.committed":
                        self._recorded.add(event["subject"])
                    elif event["type"].rpartition(".")[2] in ENDED:
                        self._ends[event["data"]["deployment"]].set_result(None)

    async def make(self, count: int, deadline: float, template: str = "static") -> None:
        """Deploy so many, or as many as are begun before the deadline."""
        numbers = range(self._next, self._next + count)
        self._next += count
        subscribed = asyncio.Event()
        hearing = asyncio.create_task(self._hear(subscribed))
        try:
            await asyncio.wait_for(subscribed.wait(), _LONGEST)
            self.spent.append(self._spent())
            together = count if count <= self._awake else _TOLD
            for first in range(0, count, together):
                part = numbers[first : first + together]
                await asyncio.gather(*(self._one(number, deadline, template) for number in part))
                await self._lay_to_rest()
            await self._all_recorded()
        finally:
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)

    def _spent(self) -> dict[str, float]:
        return {who: seconds - self._apart[who] for who, seconds in spent(self.host, self.names).items()}

    async def _lay_to_rest(self) -> None:
        """Stop the eldest beyond those that may be awake."""
        before = self._spent()
        while len(self._running) > self._awake:
            await self.host.call("POST", f"/v1/tenants/{self._running.popleft()}/stop")
        after = self._spent()
        for who in after:
            self._apart[who] += after[who] - before[who]

    async def _all_recorded(self) -> None:
        """Wait until the history of each tenant that is awake has begun, which waits for deployments."""
        began, left = time.monotonic(), {*self._running} - self._recorded
        print(f"{len(left)} histories had not begun at the end", end="", flush=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST):
                while {*self._running} - self._recorded:
                    await asyncio.sleep(0.1)
        left = {*self._running} - self._recorded
        print(f"; {len(left)} have not {time.monotonic() - began:.0f} s later", flush=True)

    async def _one(self, number: int, deadline: float, template: str) -> None:
        async with self._slots:
            if time.monotonic() > deadline:
                return
            began = time.monotonic()
            record = await self._deployed({"domain": f"crowd{number}.test", "template": template})
            self.times.append((time.monotonic() - began) * 1000)
            self.spent.append(self._spent())
            self.sources[record["source"]] += 1
            for phase in record["phases"]:
                self.phases[phase["name"]].append(phase["ms"] or 0)
            if record["state"] != "succeeded":
                self.failed.append(record["error"])
                print(f"FAILED  {record['domain']}: {record['error']}", flush=True)
                return
            self.names.append(record["tenant"])
            self._running.append(record["tenant"])
            if len(self.names) % _TOLD == 0:
                last = f"of the last {_TOLD} p50 {median(self.times[-_TOLD:]):.0f} ms"
                print(f"{len(self.names)} tenants; {last}; {costs(self.spent[-_TOLD - 1 :])}", flush=True)

    async def _deployed(self, request: dict[str, str]) -> dict[str, Any]:
        """Deploy, and return the record once it is over."""
        async with self._client.post("/v1/deployments", json=request) as answer:
            begun = await answer.json()
            assert answer.status == 202, begun
        async with asyncio.timeout(_LONGEST):
            await self._ends[begun["id"]]
        async with self._client.get(f"/v1/deployments/{begun['id']}") as answer:
            record: dict[str, Any] = await answer.json()
            return record

    @property
    def awake(self) -> list[str]:
        return [*self._running]

    def report(self) -> None:
        shares = ", ".join(f"{name} {median(times):.0f}" for name, times in self.phases.items())
        quarter = max(1, len(self.times) // 4)
        first, last = median(self.times[:quarter]), median(self.times[-quarter:])
        print(f"{len(self.names)} tenants, {len(self._running)} awake; {len(self.failed)} failed")
        print(told("deployment", self.times, 2000), dict(self.sources))
        print(f"p50 of its phases in ms: {shares}")
        print(f"first quarter p50 {first:.0f} ms, last {last:.0f} ms: {last / first:.2f} times as long")
        print(f"first quarter: {costs(self.spent[: quarter + 1])}")
        print(f"last quarter:  {costs(self.spent[-quarter - 1 :])}", flush=True)


def costs(spent: Sequence[dict[str, float]]) -> str:
    """Return the CPU seconds of a deployment between the first and the last of these."""
    count = max(1, len(spent) - 1)
    parts = {who: (spent[-1][who] - spent[0][who]) / count for who in spent[0]}
    return f"CPU s each {sum(parts.values()):.2f}: " + ", ".join(f"{w} {s:.3f}" for w, s in parts.items())


async def lists(host: Hosting, count: int = 50) -> list[float]:
    """Return the milliseconds of lists of the first page of tenants."""
    times = []
    headers = {"Authorization": f"Bearer {host.gateway.token('*')}"}
    # not the gateway's own client, which checks each answer against the schema: that takes 0.1 ms a tenant
    async with aiohttp.ClientSession(host.url, headers=headers) as session:
        for _ in range(count):
            began = time.perf_counter()
            async with session.get("/v1/tenants") as answer:
                assert answer.status == 200
                await answer.read()
            times.append((time.perf_counter() - began) * 1000)
    return times


async def events(host: Hosting, tenants: Sequence[str], count: int = _TOUCHES) -> list[float]:
    """Return the milliseconds by which a subscriber hears of a change later than who asks incusd."""
    heard: dict[str, asyncio.Future[float]] = {}
    later: dict[str, asyncio.Future[float]] = {}
    loop = asyncio.get_running_loop()

    def note(where: dict[str, asyncio.Future[float]], name: str) -> None:
        if name in where and not where[name].done():
            where[name].set_result(time.perf_counter())

    async def of_incus() -> None:
        async with Incus(host.settings.incus_socket) as incus:
            async for event in incus.events("lifecycle"):
                facts = event.get("metadata") or {}
                if event["type"] == "connected":
                    ready.set()
                elif facts.get("action") == "instance-updated":
                    note(heard, str(facts.get("name")))

    async def of_gateway() -> None:
        async with host.gateway.http("*") as session:
            async with session.get("/v1/events?type=incus.instance-updated") as stream:
                subscribed.set()
                async for line in stream.content:
                    if line.startswith(b"data:"):
                        note(later, str(orjson.loads(line[5:]).get("subject")))

    ready, subscribed = asyncio.Event(), asyncio.Event()
    listening = [asyncio.create_task(of_incus()), asyncio.create_task(of_gateway())]
    times = []
    try:
        async with asyncio.timeout(120):
            await asyncio.gather(ready.wait(), subscribed.wait())
            for number in range(count):
                name = tenants[number % len(tenants)]
                heard[name], later[name] = loop.create_future(), loop.create_future()
                await asyncio.to_thread(environment.configure, name, "user.bench", str(number))
                times.append((await later[name] - await heard[name]) * 1000)
    finally:
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, return_exceptions=True)
    return times


async def at_rest(host: Hosting, seconds: float) -> float:
    """Return the share of a core that the gateway takes while nobody asks anything."""
    before = own_cpu(host)
    await asyncio.sleep(seconds)
    return (own_cpu(host) - before) / seconds


@contextlib.asynccontextmanager
async def crowd_of(awake: int | None, *, full_quotas: bool = False, **changes: Any) -> AsyncIterator[Crowd]:
    """Give a gateway with room for a crowd; what it made is removed at the end."""
    environment.up(lambda line: None)
    if full_quotas:
        environment.with_full_quotas()
    with tempfile.TemporaryDirectory(prefix="crowd-") as folder:
        state = Path(folder) / "state"
        fields = {"golden": True, "warm_pool": 2, **changes}
        async with hosting(environment.settings(state_dir=state), state, **fields) as host:
            room = host_memory().available // 2 // _EACH
            async with host.gateway.http("*", ttl=86400) as client:
                crowd = Crowd(host, client, room if awake is None else awake)
                try:
                    yield crowd
                finally:
                    await _destroy(crowd)


async def _destroy(crowd: Crowd) -> None:
    """Destroy the tenants, some at a time: incusd does hardly more of them at once."""
    assert crowd.host.gateway.process is not None
    await crowd.host.gateway.stop()  # it would look after each of them
    began, slots, left = time.monotonic(), asyncio.Semaphore(_REMOVALS), len(crowd.names)

    async def one(incus: Incus, name: str) -> None:
        nonlocal left
        path = instance_path(name)
        async with slots:
            with contextlib.suppress(IncusError):
                stop = {"action": "stop", "timeout": -1, "force": True}
                await incus.operate("PUT", f"{path}/state", stop, timeout=_LONGEST)
            with contextlib.suppress(IncusError):
                await incus.operate("DELETE", path, timeout=_LONGEST)
            left -= 1
            if left % _TOLD == 0:
                print(f"{left} tenants to destroy, {time.monotonic() - began:.0f} s", flush=True)

    async with Incus(crowd.host.settings.incus_socket) as incus:
        await asyncio.gather(*(one(incus, name) for name in crowd.names))


def of_the_network(wanted: int) -> int:
    """Return how many of these have an address on the tests' bridge, with what is kept ready."""
    return min(wanted, 240)


async def run(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.minutes * 60
    async with crowd_of(options.awake, full_quotas=options.full_quotas) as crowd:
        await crowd.make(of_the_network(options.tenants), deadline)
        crowd.report()
        await asyncio.sleep(5)  # what was begun for the next ones ends
        print(told("GET /v1/tenants", await lists(crowd.host), 20))
        if crowd.awake:
            print(told("event after incusd told it", await events(crowd.host, crowd.awake), 50))
        share = await at_rest(crowd.host, options.rest)
        print(f"gateway at rest with its health looks: {share:.2%} of a core, {share / 0.01:.2f} of the goal")
        short = len(crowd.names) < of_the_network(options.tenants)
        if short:
            print(f"after {options.minutes:g} minutes there were {len(crowd.names)} of {options.tenants}")
        return 1 if crowd.failed or not crowd.names else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/bench/crowd", description=__doc__)
    parser.add_argument("--tenants", type=int, default=200, help="sites to deploy (default: 200)")
    parser.add_argument("--awake", type=int, help="that run at a time (default: by the memory that is free)")
    parser.add_argument("--full-quotas", action="store_true", help="instead of simple ones")
    parser.add_argument("--touch", type=int, default=0, metavar="MIB", help="memory to use once before")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which no further one is begun")
    parser.add_argument("--rest", type=float, default=30.0, help="seconds of the look at the gateway's CPU")
    try:
        options = parser.parse_args()
        with touched(options.touch):
            return asyncio.run(run(options))
    except HostError as error:
        print(f"failed: {error.message}", file=sys.stderr)
        return 1
