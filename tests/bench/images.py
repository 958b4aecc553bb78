"""Compares what an idle tenant of the template `static` costs on several images, in one run.

Images are named by their aliases in the tests' Incus: `incus image import F.tar F.squashfs --alias NAME`
brings an older one from the cache. Memory is told in the parts of `density`, as the median of some tenants,
with the processes of the last one. Nothing passes or fails by what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Final

from gateway.host import HostError
from gateway.settings import MiB
from tests.bench.density import memory_of
from tests.bench.deploy import Wrong, one
from tests.integration import environment
from tests.integration.sites import hosting

_REST: Final = 10.0  # seconds from the last tenant's success; nobody tells when one is idle


async def measure(alias: str, tenants: int, folder: Path) -> str:
    """Deploy tenants on an image; return the line that tells what each of them costs."""
    parts: dict[str, list[int]] = defaultdict(list)
    async with hosting(environment.settings(), folder / alias, image=alias) as host:
        names = [(await one(host, f"i{n}-{alias}.test", "static"))[1]["tenant"] for n in range(tenants)]
        await asyncio.sleep(_REST)
        for name in names:
            for part, size in memory_of(name).items():
                parts[part].append(size)
        ps = await asyncio.to_thread(environment.incus, "exec", name, "--", "ps", "-e", "-o", "comm=")
    costs = ", ".join(f"{part} {median(sizes) / MiB:.1f}" for part, sizes in parts.items())
    running = " ".join(word for word in sorted(ps.stdout.decode().split()) if word != "ps")
    return f"{alias:20} MiB: {costs}; processes: {running}"


async def run(options: argparse.Namespace) -> None:
    await asyncio.to_thread(environment.up, lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        for alias in options.images:
            print(await measure(alias, options.tenants, Path(folder)), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests/bench/images", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("images", nargs="+", metavar="ALIAS")
    parser.add_argument("--tenants", type=int, default=3, help="of each image")
    try:
        asyncio.run(run(parser.parse_args()))
    except (HostError, Wrong) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0
