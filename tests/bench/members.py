"""Measures how the costs of a cluster grow with its members.

Gateways of the `local` runtime on this machine, one for each member, each with one tenant; all share its
cores. `tests/bench/members` prints for each count of members what an idle gateway costs, and for a list of
all tenants, a revocation, and an event to a client that follows all: the p50 that a client waits, and the CPU
at the gateway that is asked and at the busiest of the others. Nothing passes or fails by time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.bench.relay import MiB, busy
from tests.clusters import clustered
from tests.contracts.gateway import sse
from tests.contracts.processes import mark
from tests.live import LiveGateway


async def cost(
    what: str, gateways: list[LiveGateway], times: int, call: Callable[[], Awaitable[float]]
) -> None:
    """Print the p50 of what `call` returns in ms, and the CPU that a call takes here and elsewhere."""
    await call()
    before = [busy(one) for one in gateways]
    took = [await call() for _ in range(times)]
    here, *others = ((busy(one) - spent) / times * 1000 for one, spent in zip(gateways, before, strict=True))
    cpu = f"CPU {here:5.2f} ms here, {max(others):5.2f} ms elsewhere"
    print(f"  {what:24} {statistics.median(took):6.1f} ms   {cpu}")


async def measured(count: int, times: int) -> None:
    homes = {f"m{number}": (f"t{number}",) for number in range(count)}
    with tempfile.TemporaryDirectory() as folder:
        async with clustered(Path(folder), homes, GATEWAY_HISTORY="false") as members:
            gateways = [*members.values()]
            print(f"{count} members, load {os.getloadavg()[0]:.1f}")
            await asyncio.sleep(5)
            before, began = [busy(one) for one in gateways], time.perf_counter()
            await asyncio.sleep(20)
            spent = [busy(one) - was for one, was in zip(gateways, before, strict=True)]
            share = statistics.mean(spent) / (time.perf_counter() - began)
            memory = statistics.mean(one.memory("VmRSS") for one in gateways) / MiB
            print(f"  an idle gateway: {share:.2%} of a core, {memory:.0f} MiB")
            asked = gateways[0]
            tenants = [tenant for (tenant,) in homes.values()]
            async with asked.http("*", scopes=("admin", "exec", "files:read")) as http:

                async def timed(method: str, path: str, **given: object) -> float:
                    started = time.perf_counter()
                    async with http.request(method, path, **given) as answer:  # type: ignore[arg-type]
                        assert answer.status in (200, 201), await answer.text()
                        await answer.read()
                    return (time.perf_counter() - started) * 1000

                await cost("a list of all tenants", gateways, times, lambda: timed("GET", "/v1/tenants"))
                body = {"expires": time.time() + 600}
                await cost(
                    "a revocation",
                    gateways,
                    times,
                    lambda: timed("POST", "/v1/revocations", json={**body, "id": mark()}),
                )
                async with asked.http(*tenants) as other, other.get("/v1/events?type=exec.exited") as events:

                    async def event() -> float:
                        """Return the ms from a command's answer, at the last member, to the word of it."""
                        path = f"/v1/tenants/{tenants[-1]}/exec"
                        async with http.post(path, json={"argv": ["true"]}) as answer:
                            assert answer.status == 200
                        ended = time.perf_counter()
                        await sse(events, 1)
                        return (time.perf_counter() - ended) * 1000

                    await cost("a command and its event", gateways, times, event)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("members", type=int, nargs="*", default=[3, 10])
    parser.add_argument("--times", type=int, default=50)
    options = parser.parse_args()
    for count in options.members:
        asyncio.run(measured(count, options.times))
    return 0
