"""Measures what a tenant that thrashes does to a neighbour's reads and to its own commands.

Phases alternate, so that what else the machine does is in all kinds. The neighbour reads a file every 10 ms,
and in the other tenant commands are started one after another: while all is calm; while its site wants half
as much memory again as the tenant has; and while it only computes, for as much CPU time as it took when it
thrashed. Printed are the reads and commands of all phases of a kind, and how many times as long reads took:
what thrashing does beyond the CPU that it takes is in the ratio to `computing`. Nothing passes or fails by
time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gateway.host import HostError
from gateway.host.requirements import setup
from gateway.rootfs import memory, site_cgroup
from gateway.runtime.incus.resizing import APPLY
from gateway.settings import Settings
from tests.archives import archive
from tests.bench.bench import percentile
from tests.bench.deploy import Wrong
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.integration.test_pressure import (
    DOMAIN,
    MEMORY,
    NEXT_DOMAIN,
    NEXT_DOOR,
    SITE,
    TENANT,
    place,
    written,
)
from tests.neighbour import reading

KINDS: Final = ("calm", "thrashing", "computing")
_THRASHES: Final = 1000  # pages a second that are read back
_BEGINS: Final = 90.0  # seconds until it does


async def thrash(host: Hosting) -> asyncio.Task[Any]:
    """Have the site thrash; return once it does."""
    await written(host)
    visiting = asyncio.create_task(host.visit(DOMAIN, "/thrash"))  # it may never be answered
    async with asyncio.timeout(_BEGINS):
        while True:
            before = memory.sample(place().below(site_cgroup.SITE))
            await asyncio.sleep(1)
            now = memory.sample(place().below(site_cgroup.SITE))
            if before is not None and now is not None and now.refaults - before.refaults >= _THRASHES:
                return visiting


async def calm(host: Hosting) -> None:
    """Have the site start anew; return once it answers."""
    environment.incus("exec", TENANT, "--", "systemctl", "restart", "site.service")
    async with asyncio.timeout(_BEGINS):
        while (await host.visit(DOMAIN))[0] != 200:
            await asyncio.sleep(0.2)


def computed() -> float:
    """Return the CPU seconds of the tenant so far."""
    state = json.loads(environment.incus("query", f"/1.0/instances/{TENANT}/state").stdout)
    return float(state["cpu"]["usage"]) / 1e9


async def commands(host: Hosting, seconds: float) -> list[float]:
    """Start commands one after another; return what each took until its exit."""
    took, until = [], time.monotonic() + seconds
    async with host.gateway.wire(TENANT) as agent:
        while (began := time.monotonic()) < until:
            exit_, out, _ = await agent.run(argv=["sh", "-c", "echo here | cat"])
            if (exit_["exitCode"], out) != (0, b"here\n"):
                raise Wrong(f"a command ended with {exit_}")
            took.append(time.monotonic() - began)
    return took


def summary(seconds: Sequence[float]) -> dict[str, float]:
    found = {f"p{at}": percentile(seconds, at) * 1000 for at in (50, 95, 99)}
    return {"count": len(seconds), **found, "worst": max(seconds) * 1000}


async def run(words: argparse.Namespace) -> dict[str, Any]:
    settings: Settings = environment.settings()
    setup(settings, lambda line: None)
    template = {"archive": base64.b64encode(archive(("serve.ts", SITE))).decode()}
    reads: dict[str, list[float]] = {kind: [] for kind in KINDS}
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        async with hosting(
            settings, Path(folder) / "state", constants={"gateway.limits.pressure.PATIENCE": 0.0}
        ) as host:
            for domain, what in ((DOMAIN, template), (NEXT_DOMAIN, "static")):
                record = await host.deploy(domain, what)
                if record["state"] != "succeeded":
                    raise Wrong(f"{domain}: {record['error']}")
            environment.configure(TENANT, "limits.memory", f"{MEMORY}MiB")
            environment.incus("exec", TENANT, "--", *APPLY)
            for _ in range(words.rounds):
                for kind in KINDS:
                    visiting = await thrash(host) if kind == "thrashing" else None
                    if kind == "computing":
                        await host.visit(DOMAIN, f"/compute?share={min(1.0, cpu['thrashing'][-1]):.2f}")
                    began, before = time.monotonic(), computed()
                    async with reading(host.gateway, NEXT_DOOR, "index.html") as seen:
                        if words.reads:
                            await asyncio.sleep(words.seconds)
                        else:
                            took[kind] += await commands(host, words.seconds)
                    reads[kind] += seen.seconds
                    cpu[kind].append((computed() - before) / (time.monotonic() - began))
                    if visiting is not None:
                        visiting.cancel()
                        await asyncio.gather(visiting, return_exceptions=True)
                    if kind != "calm":
                        await calm(host)
    found = {kind: {"reads": summary(reads[kind])} for kind in KINDS}
    for kind, seconds in took.items():
        found[kind] |= {"commands": summary(seconds)} if seconds else {}
    beside = found["thrashing"]["reads"]
    ratios = {
        kind: {at: beside[at] / found[kind]["reads"][at] for at in ("p50", "p95", "p99")}
        for kind in ("calm", "computing")
    }
    return {
        **found,
        "ratios of reads": ratios,
        "cpu": {kind: sum(cpu[kind]) / len(cpu[kind]) for kind in KINDS},
    }


def show(results: dict[str, Any]) -> None:
    for kind in KINDS:
        for what, found in results[kind].items():
            numbers = ", ".join(f"{at} {found[at]:.1f}" for at in ("p50", "p95", "p99", "worst"))
            print(f"{kind:>9} {what:>8}: {found['count']:5}, ms: {numbers}")
        print(f"{kind:>9} {'CPU':>8}: {results['cpu'][kind]:.2f} of a core by the tenant")
    for kind, ratio in results["ratios of reads"].items():
        said = ", ".join(f"{at} {by:.2f}x" for at, by in ratio.items())
        print(f"reads beside thrashing took {said} of those beside {kind}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=4, help="of one phase of each kind")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase")
    parser.add_argument("--reads", action="store_true", help="start no commands, only read")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    try:
        results = asyncio.run(run(words))
    except (Wrong, HostError) as error:
        print(f"wrong: {error}", file=sys.stderr)
        return 1
    if words.json:
        print(json.dumps(results, indent=2))
    else:
        show(results)
    return 0
