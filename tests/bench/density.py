"""Makes as many tenants as this host holds, and measures what each costs, awake and asleep.

Memory of a tenant is told in parts: its own, the kernel's for it, that of the process by which Incus watches
it, and page cache, which the kernel takes back. On a machine where others work too, the sums of the parts
tell more than the host's own numbers, which are shown beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from gateway.host import HostError
from gateway.limits.capacity import host_memory
from tests.bench.crowd import MiB, at_rest, crowd_of, events, lists, of_the_network, told
from tests.integration.sites import Hosting

_V1: Final = Path("/sys/fs/cgroup/memory")
_V2: Final = Path("/sys/fs/cgroup")
_GOAL: Final = 29 * MiB * 2 / 3
_NEED: Final = {"static": 80 * MiB, "vite-react": 350 * MiB}


def memory_of(tenant: str) -> Mapping[str, int]:
    """Return the bytes of a running tenant by part; without one that cannot be told on this host."""
    parts: dict[str, int] = defaultdict(int)
    payload, monitor = f"lxc.payload.{tenant}", f"lxc.monitor.{tenant}"
    if (_V1 / payload).is_dir():
        facts = _facts(_V1 / payload / "memory.stat")
        parts["own"] = facts["total_rss"] + facts["total_shmem"]
        parts["page cache"] = facts["total_cache"] - facts["total_shmem"]
        parts["kernel"] = int((_V1 / payload / "memory.kmem.usage_in_bytes").read_text())
        watchers = _V1 / monitor
    else:
        facts = _facts(_V2 / payload / "memory.stat")
        parts["own"] = facts["anon"] + facts["shmem"]
        parts["page cache"] = facts["file"] - facts["shmem"]
        parts["kernel"] = facts.get("kernel", 0) or facts["slab"] + facts["kernel_stack"]
        watchers = _V2 / monitor
    for pid in (watchers / "cgroup.procs").read_text().split():
        parts["Incus's watcher"] += _private(int(pid))
    return parts


def _facts(file: Path) -> dict[str, int]:
    return {words[0]: int(words[1]) for words in map(str.split, file.read_text().splitlines())}


def _private(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    facts = {words[0]: int(words[1]) << 10 for words in map(str.split, lines)}
    return facts["Private_Dirty:"]


def _beside_cache() -> int:
    """Return the host's memory in use beside page cache and what else it takes back."""
    lines = map(str.split, Path("/proc/meminfo").read_text().splitlines())
    facts = {words[0]: int(words[1]) << 10 for words in lines}
    cache = facts["Cached:"] - facts["Shmem:"] + facts["Buffers:"] + facts["SReclaimable:"]
    return facts["MemTotal:"] - facts["MemFree:"] - cache


def _of_gateway(host: Hosting) -> Iterator[str]:
    assert host.gateway.process is not None
    process = Path(f"/proc/{host.gateway.process.pid}")
    resident = next(
        line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS")
    )
    yield f"{int(resident.split()[1]) / 1024:.0f} MiB resident"
    yield f"{len(list((process / 'fd').iterdir()))} descriptors"


async def run(options: argparse.Namespace) -> int:
    fits = int(host_memory().available * 0.8) // _NEED[options.template]
    count = of_the_network(options.tenants or fits)
    async with crowd_of(count) as crowd:
        host, deadline = crowd.host, time.monotonic() + options.minutes * 60
        await crowd.make(1, deadline, options.template)  # the golden copy is made after it
        await asyncio.sleep(20)
        before = _beside_cache()
        crowd.times.clear()
        crowd.spent.clear()
        await crowd.make(count - 1, deadline, options.template)
        await asyncio.sleep(10)
        made = len(crowd.names) - 1
        if made < 1:
            return 1
        crowd.report()
        each = (_beside_cache() - before) / made
        sums: dict[str, int] = defaultdict(int)
        for tenant in crowd.names:
            for part, size in memory_of(tenant).items():
                sums[part] += size
        print("memory a tenant, MiB: ", end="")
        print(", ".join(f"{part} {size / len(crowd.names) / MiB:.1f}" for part, size in sums.items()))
        beside = sum(size for part, size in sums.items() if part != "page cache") / len(crowd.names)
        print(
            f"beside page cache {beside / MiB:.1f} MiB, {beside / _GOAL:.2f} of the goal of {_GOAL / MiB:.1f}"
        )
        print(f"the host has {each / MiB:.1f} MiB less for each, whatever else runs there")
        share = await at_rest(host, options.rest)
        print(f"gateway: {', '.join(_of_gateway(host))}; at rest {share:.2%} of a core")
        print(f"of the goal of 0.5% for 100 tenants that is {share / 0.005 * 100 / len(crowd.names):.2f}")
        print(told("GET /v1/tenants", await lists(host), 20))
        print(told("event after incusd told it", await events(host, crowd.names), 50))
        awake = _beside_cache()
        for tenant in crowd.names:
            await host.call("POST", f"/v1/tenants/{tenant}/stop")
        await asyncio.sleep(5)
        freed = (awake - _beside_cache()) / len(crowd.names)
        print(f"asleep, the host has {freed / MiB:.1f} MiB more for each; ", end="")
        print(f"the gateway at rest takes {await at_rest(host, options.rest):.2%} of a core")
        return 1 if crowd.failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/bench/density", description=__doc__)
    parser.add_argument("--tenants", type=int, help="how many (default: as many as the free memory holds)")
    parser.add_argument("--template", choices=sorted(_NEED), default="static")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which no further one is begun")
    parser.add_argument("--rest", type=float, default=30.0, help="seconds of each look at the gateway's CPU")
    try:
        return asyncio.run(run(parser.parse_args()))
    except HostError as error:
        print(f"failed: {error.message}", file=sys.stderr)
        return 1
