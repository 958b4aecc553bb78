"""Measures what a starter of each framework takes: to be deployed in each way, of memory and of disk.

Each is a template without a start, made by its own generator (`tests/starters`). It is deployed from the
image, from its golden copy and from the pool, by a gateway with a Caddy; then it is published. Times are from
the gateway's record, in seconds, with `GATEWAY_SETTLE_TIME` where a deployment waits for it; memory is what
cannot be given back, of the whole container, in MiB, at the peak of the first deployment and some seconds
after it. Nothing passes or fails by time; the exit code is 1 where something does not work.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from gateway.host import HostError
from gateway.settings import MiB, Settings
from tests.bench.deploy import Wrong, ready
from tests.bench.frameworks import Meter
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.starters.making import Made, made
from tests.starters.table import STARTERS
from tests.starters.trial import GATEWAY, SIZE

REST: Final = 4.0  # seconds until memory is at rest


async def deployed(host: Hosting, name: str, source: str) -> tuple[dict[str, Any], Meter]:
    """Deploy a template to a new tenant; return the record and what its container took."""
    tenant = f"{name}-{source}"
    with Meter(tenant).running() as meter:
        record = await host.deploy(f"{tenant}.example.com", name, tenant=tenant, size=SIZE)
        if record["state"] != "succeeded":
            raise Wrong(str(record["error"]))
        if record["source"] != source:
            raise Wrong(f"made from {record['source']}, not from {source}")
        if source == "image":
            await asyncio.sleep(REST)
    return record, meter


async def until_ready(source: str) -> None:
    async with asyncio.timeout(300):
        while not await asyncio.to_thread(ready, source):
            await asyncio.sleep(0.2)  # nobody tells when a copy is ready


def disk(tenant: str) -> int:
    words = ("exec", tenant, "--", "du", "-sxm", "/srv/site")
    return int(environment.incus(*words).stdout.split()[0])


async def measure(base: Settings, name: str, files: Made, folder: Path, *, publish: bool) -> dict[str, Any]:
    place = folder / "templates" / name
    place.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(files.archive)) as tar:
        tar.extractall(place, filter="data")
    (place / "site.toml").write_text('description = "a starter"\n')
    changes = {**GATEWAY, "golden": True, "warm_pool": 0, "templates_dir": place.parent}
    found: dict[str, Any] = {"starter": name, "load": round(os.getloadavg()[0], 1)}
    async with hosting(base, folder / f"state-{name}", **changes) as host:
        record, meter = await deployed(host, name, "image")
        found |= {"first_s": seconds(record), "peak": mib(meter.peak), "rest": mib(meter.rest)}
        found["disk"] = disk(record["tenant"])
        if publish and not STARTERS[name].refused:
            domain = f"{name}-built.example.com"
            with Meter(f"{name}-built").running() as meter:
                body = {"domain": domain, "tenant": f"{name}-built", "size": SIZE}
                status, begun, _ = await host.call("POST", f"/v1/tenants/{record['tenant']}/publish", body)
                if status != 202:
                    raise Wrong(str(begun))
                built = await host.ended(begun["id"], 300)
                if built["state"] != "succeeded":
                    raise Wrong(str(built["error"]))
                await asyncio.sleep(REST)
            found |= {"built_s": seconds(built), "built_peak": mib(meter.peak), "built_rest": mib(meter.rest)}
            await host.call("DELETE", f"/v1/tenants/{name}-built")
        await host.call("DELETE", f"/v1/tenants/{record['tenant']}")
        await until_ready("golden")
        await host.gateway.stop()
        host.gateway.environment["GATEWAY_WARM_POOL"] = "1"
        await host.gateway.start()
        record, _ = await deployed(host, name, "golden")
        found["golden_s"] = seconds(record)
        await host.call("DELETE", f"/v1/tenants/{record['tenant']}")
        await until_ready("pool")  # which is filled after a deployment
        record, _ = await deployed(host, name, "pool")
        found["warm_s"] = seconds(record)
    return found


def seconds(record: dict[str, Any]) -> float:
    return round(float(record["ms"]) / 1000, 1)


def mib(size: int) -> int:
    return round(size / MiB)


async def run(words: argparse.Namespace) -> int:
    await asyncio.to_thread(environment.up, lambda line: print(line, file=sys.stderr))
    failed = 0
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        base = environment.settings(state_dir=Path(folder) / "state")
        for name in words.starters:
            began = time.monotonic()
            try:
                files = await made(name, STARTERS[name], base)
                found = await measure(base, name, files, Path(folder) / name, publish=not words.copies)
                found["ours"] = bool(files.ours)
            except (Wrong, AssertionError, TimeoutError) as error:
                found, failed = {"starter": name, "wrong": str(error)[:1000]}, failed + 1
            print(json.dumps(found), flush=True)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure deployments of each framework's starter.")
    parser.add_argument("starters", nargs="*", default=list(STARTERS), choices=list(STARTERS), metavar="NAME")
    parser.add_argument("--copies", action="store_true", help="publish none of them")
    try:
        return asyncio.run(run(parser.parse_args()))
    except HostError as error:
        print(f"failed: {error.message}", file=sys.stderr)
        return 1
