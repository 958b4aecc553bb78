"""Measures deployments of a template on the tests' Incus: from the warm pool, from a golden copy, cold.

Each way is a gateway of its own with a Caddy of its own. The time is from POST until `deployment.succeeded`
is read from the event stream; phases are the gateway's own times. Each deployment has a new tenant, destroyed
after it, and the next one begins once the pool is full again. `dir` is a pool of plain folders, where a copy
copies every byte. Nothing passes or fails by time; the exit code is 1 where a deployment did not succeed, or
was not made from what was to be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

import orjson

from gateway.host import HostError
from gateway.host.requirements import setup
from gateway.settings import Settings
from tests.integration import environment
from tests.integration.sites import Hosting, hosting

WAYS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "warm": ("pool", {"golden": True, "warm_pool": 1}),
    "golden": ("golden", {"golden": True, "warm_pool": 0}),
    "cold": ("image", {"golden": False, "warm_pool": 0}),
}
SEED: Final = "the seed needed about 10 s cold"


class Wrong(Exception):
    """A deployment that is not what was to be measured."""


def ready(source: str) -> bool:
    """Say whether the next deployment can be made from `source`."""
    if source == "image":
        return True
    found = environment.instances()
    if source == "pool":  # it is whole once it is listed with its configuration
        return any(e["config"].get("user.gateway.role") == "pool" for e in found)
    golden = [e for e in found if e["config"].get("user.gateway.role") == "golden"]
    whole = any(e["status"] == "Stopped" and environment.snapshots(e["name"]) for e in golden)
    return whole and not _busy(golden)


def _busy(instances: list[dict[str, Any]]) -> bool:
    """Say whether something is done to one of them: Incus lists a snapshot that is still being made."""
    said = json.loads(environment.incus("query", "/1.0/operations?recursion=1").stdout)
    names = {path.rpartition("/")[2] for one in said.get("running") or () for path in _named(one)}
    return any(e["name"] in names for e in instances)


def _named(operation: dict[str, Any]) -> list[str]:
    return (operation.get("resources") or {}).get("instances") or []


async def one(host: Hosting, domain: str, template: str) -> tuple[float, dict[str, Any]]:
    """Deploy; return the seconds until its success was told, and its record."""
    timeout = 300.0
    async with host.gateway.http("*") as session, asyncio.timeout(timeout):
        async with session.get("/v1/events?type=deployment.succeeded,deployment.rolledback") as events:
            began = time.perf_counter()
            async with session.post(
                "/v1/deployments", json={"domain": domain, "template": template}
            ) as answer:
                begun = await answer.json()
            if answer.status != 202:
                raise Wrong(str(begun))
            async for line in events.content:
                if line.startswith(b"data: ") and orjson.loads(line[6:])["data"]["deployment"] == begun["id"]:
                    break
            seconds = time.perf_counter() - began
    _, record, _ = await host.call("GET", f"/v1/deployments/{begun['id']}")
    if record["state"] != "succeeded":
        raise Wrong(str(record["error"]))
    return seconds, record


async def measure(base: Settings, way: str, template: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Deploy `rounds` times in one way; return p50 and slowest in seconds, and each phase's p50 in ms."""
    source, changes = WAYS[way]
    seconds, records = list[float](), list[dict[str, Any]]()
    async with hosting(base, folder / way, verify_timeout=120.0, **changes) as host:
        if source != "image":  # the first one is what the others are copied from
            await one(host, "first-bench.test", template)
        for number in range(rounds):
            async with asyncio.timeout(300):
                while not await asyncio.to_thread(ready, source):
                    await asyncio.sleep(0.2)  # nobody tells when a pool is full
            took, record = await one(host, f"b{number}-bench.test", template)
            if record["source"] != source:
                raise Wrong(f"made from {record['source']}, not from {source}")
            seconds.append(took)
            records.append(record)
            await host.call("DELETE", f"/v1/tenants/{record['tenant']}")
    phases = {
        phase["name"]: round(median(record["phases"][index]["ms"] for record in records))
        for index, phase in enumerate(records[0]["phases"])
    }
    return {
        "way": way,
        "n": rounds,
        "p50_s": round(median(seconds), 2),
        "slowest_s": round(max(seconds), 2),
        "phases_ms": phases,
    }


@contextlib.asynccontextmanager
async def pool(kind: str) -> AsyncIterator[Settings]:
    """Give settings of the tests' own pool, or of one of plain folders that ends with this."""
    if kind == "btrfs":
        yield environment.settings()
        return
    settings = environment.settings(pool="gwbench-dir", profile="gwbench-dir")
    environment.incus("storage", "create", settings.pool, "dir", check=False)
    try:
        await asyncio.to_thread(setup, settings, lambda line: None)
        yield settings
    finally:
        for entry in environment.instances():
            if settings.profile in entry["profiles"]:
                environment.incus("delete", "--force", entry["name"], check=False)
        environment.incus("profile", "delete", settings.profile, check=False)
        environment.incus("storage", "delete", settings.pool, check=False)


async def run(words: argparse.Namespace) -> list[dict[str, Any]]:
    await asyncio.to_thread(environment.up, lambda line: print(line, file=sys.stderr))
    results = []
    for kind in words.pool:
        async with pool(kind) as settings:
            for way in words.way:
                with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
                    result = await measure(settings, way, words.template, words.rounds, Path(folder))
                results.append({"pool": kind, **result})
                if not words.json:
                    show(results[-1])
    return results


def show(result: dict[str, Any]) -> None:
    phases = "  ".join(f"{name} {ms}" for name, ms in result["phases_ms"].items() if ms)
    beside = f"  ({SEED})" if result["way"] == "cold" else ""
    print(
        f"{result['pool']:6} {result['way']:7} p50 {result['p50_s']:6.2f} s"
        f"  slowest {result['slowest_s']:6.2f} s  n={result['n']}{beside}\n    ms by phase: {phases}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--template", default="vite-react")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pool", nargs="+", choices=("btrfs", "dir"), default=["btrfs", "dir"])
    parser.add_argument("--way", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    try:
        results = asyncio.run(run(words))
    except (Wrong, HostError) as error:
        print(f"wrong: {error}", file=sys.stderr)
        return 1
    if words.json:
        print(json.dumps(results, indent=2))
    return 0
