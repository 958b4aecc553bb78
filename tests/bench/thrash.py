"""Measures what a tenant that thrashes does to a neighbour's reads and to its own commands.

Phases alternate, so that what else the machine does is in both. The neighbour reads a file every 10 ms in
each, and in the other tenant commands are started one after another, while all is calm and while its site
wants half as much memory again as the tenant has. Printed are the reads and the commands of all phases of a
kind, and how many times as long reads took. Nothing passes or fails by time.
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
from gateway.host.setup import setup
from gateway.rootfs import memory
from gateway.runtime.incus.resizing import APPLY
from gateway.settings import Settings
from tests.archives import archive
from tests.bench.bench import percentile
from tests.bench.deploy import Wrong
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.integration.test_pressure import DOMAIN, MEMORY, NEXT_DOMAIN, NEXT_DOOR, SITE, TENANT, place
from tests.neighbour import reading

_THRASHES: Final = 1000  # pages a second that are read back
_BEGINS: Final = 90.0  # seconds until it does


async def thrash(host: Hosting) -> asyncio.Task[Any]:
    """Have the site thrash; return once it does."""
    visiting = asyncio.create_task(host.visit(DOMAIN, "/thrash"))  # it may never be answered
    async with asyncio.timeout(_BEGINS):
        while True:
            before = memory.sample(place().below(memory.SITE))
            await asyncio.sleep(1)
            now = memory.sample(place().below(memory.SITE))
            if before is not None and now is not None and now.refaults - before.refaults >= _THRASHES:
                return visiting


async def calm(host: Hosting) -> None:
    """Have the site start anew; return once it answers."""
    environment.incus("exec", TENANT, "--", "systemctl", "restart", "site.service")
    async with asyncio.timeout(_BEGINS):
        while (await host.visit(DOMAIN))[0] != 200:
            await asyncio.sleep(0.2)


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
    reads: dict[str, list[float]] = {"calm": [], "beside": []}
    took: dict[str, list[float]] = {"calm": [], "beside": []}
    with tempfile.TemporaryDirectory() as folder:
        async with hosting(settings, Path(folder) / "state", pressure_patience=0.0) as host:
            for domain, what in ((DOMAIN, template), (NEXT_DOMAIN, "static")):
                record = await host.deploy(domain, what)
                if record["state"] != "succeeded":
                    raise Wrong(f"{domain}: {record['error']}")
            environment.configure(TENANT, "limits.memory", f"{MEMORY}MiB")
            environment.incus("exec", TENANT, "--", *APPLY)
            for _ in range(words.rounds):
                for kind in reads:
                    visiting = await thrash(host) if kind == "beside" else None
                    async with reading(host.gateway, NEXT_DOOR, "index.html") as seen:
                        if words.reads:
                            await asyncio.sleep(words.seconds)
                        else:
                            took[kind] += await commands(host, words.seconds)
                    reads[kind] += seen.seconds
                    if visiting is not None:
                        visiting.cancel()
                        await asyncio.gather(visiting, return_exceptions=True)
                        await calm(host)
    found = {kind: {"reads": summary(reads[kind])} for kind in reads}
    for kind, seconds in took.items():
        found[kind] |= {"commands": summary(seconds)} if seconds else {}
    calm_, beside = found["calm"]["reads"], found["beside"]["reads"]
    ratio = {at: beside[at] / calm_[at] for at in ("p50", "p95", "p99")}
    return {**found, "ratio of reads": ratio}


def show(results: dict[str, Any]) -> None:
    for kind in ("calm", "beside"):
        for what, found in results[kind].items():
            numbers = ", ".join(f"{at} {found[at]:.1f}" for at in ("p50", "p95", "p99", "worst"))
            print(f"{kind:>7} {what:>8}: {found['count']:5}, ms: {numbers}")
    print(
        "reads beside it took " + ", ".join(f"{at} {by:.2f}x" for at, by in results["ratio of reads"].items())
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=4, help="of a calm phase and one with thrashing")
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
