"""Measures rollbacks and changes of the environment of a site with many files, beside visitors.

Three visitors ask all the while, one request after the other each. `served` is the seconds from the request
of the change until a visitor has what it asks for, `ended` until its deployment has ended, `failed` which
requests had no 200. The exit code is 1 where a request failed; nothing passes or fails by time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Final

from gateway.host import HostError
from tests.archives import archive
from tests.bench.deploy import Wrong
from tests.integration import environment
from tests.integration.sites import Hosting, hosting

DOMAIN: Final = "many.example.com"
TENANT: Final = "many-example-com"
VISITORS: Final = 3
SERVER: Final = """const page = await Bun.file("page").text();
Bun.serve({port: process.env.PORT, hostname: "0.0.0.0",
  fetch: () => new Response(`${page} ${process.env.ROUND ?? 0}`)});
"""
# as packages lie: a hundred to a folder, of one to some KiB
FILES: Final = """
for folder in $(seq $(($1 / 100))); do
  mkdir -p node_modules/package$folder && cd node_modules/package$folder
  head -c $((3000 + folder % 7 * 100)) /dev/zero | tr '\\0' x >file0
  for file in $(seq 99); do echo "$folder $file" | cat - file0 >file$file; done
  cd ../..
done
"""


def site(page: str, files: int) -> dict[str, str]:
    manifest = f'start = ["bun", "serve.ts"]\ninstall = ["sh", "-e", "install.sh", "{files}"]\n'
    texts = {"serve.ts": SERVER, "page": page, "install.sh": FILES, "site.toml": manifest}
    members = [(name, text.encode()) for name, text in texts.items()]
    return {"archive": base64.b64encode(archive(*members, manifest=None)).decode()}


class Visitors:
    """Ask all the while; `seen` is when an answer came first."""

    def __init__(self, host: Hosting) -> None:
        self._host = host
        self.asked, self.failed = 0, list[str]()
        self.seen: dict[str, float] = {}

    async def ask(self) -> None:
        while True:
            try:
                status, text = await self._host.visit(DOMAIN)
            except OSError as error:
                status, text = 0, type(error).__name__
            self.asked += 1
            if status == 200:
                self.seen.setdefault(text, time.monotonic())
            else:
                self.failed.append(f"{status} {text[:100]}")


async def change(host: Hosting, visitors: Visitors, method: str, what: str, body: Any, then: str) -> Any:
    visitors.seen.clear()
    asked, failed, began = visitors.asked, len(visitors.failed), time.monotonic()
    status, begun, _ = await host.call(method, f"/v1/tenants/{TENANT}/{what}", body)
    if status != 202:
        raise Wrong(str(begun))
    record = await host.ended(begun["id"], 200)
    ended = time.monotonic() - began
    if record["state"] != "succeeded" or then not in visitors.seen:
        raise Wrong(f"{record['state']}, {record['error']}; seen: {list(visitors.seen)}, not {then}")
    return {
        "change": what,
        "served": round(visitors.seen[then] - began, 2),
        "ended": round(ended, 2),
        "asked": visitors.asked - asked,
        "failed": visitors.failed[failed:],
        "phases": {phase["name"]: phase["ms"] for phase in record["phases"]},
    }


async def run(words: argparse.Namespace) -> int:
    await asyncio.to_thread(environment.up, lambda line: print(line, file=sys.stderr))
    found = []
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        base = environment.settings(state_dir=Path(folder) / "state")
        async with hosting(base, Path(folder) / "state-rollback", settle_time=3.0) as host:
            for page in ("one", "two"):
                record = await host.deploy(DOMAIN, site(page, words.files), size="medium")
                if record["state"] != "succeeded":
                    raise Wrong(str(record["error"]))
            visitors = Visitors(host)
            async with asyncio.TaskGroup() as group:
                visiting = [group.create_task(visitors.ask()) for _ in range(VISITORS)]
                for number in range(words.rounds):
                    page = ("one", "two")[number % 2]
                    found.append(await change(host, visitors, "POST", "rollback", {}, f"{page} 0"))
                    print(json.dumps(found[-1]), flush=True)
                for number in range(1, words.rounds // 2 + 1):
                    body = {"env": {"ROUND": str(number)}}
                    found.append(await change(host, visitors, "PATCH", "env", body, f"{page} {number}"))
                    print(json.dumps(found[-1]), flush=True)
                for task in visiting:
                    task.cancel()
    for what in ("rollback", "env"):
        served = [one["served"] for one in found if one["change"] == what]
        ended = [one["ended"] for one in found if one["change"] == what]
        print(
            f"{what}: served p50 {median(served):.2f} s, most {max(served):.2f}; "
            f"ended p50 {median(ended):.2f}, most {max(ended):.2f}; load {os.getloadavg()[0]:.1f}"
        )
    failed = [why for one in found for why in one["failed"]]
    print(f"{len(failed)} of {sum(one['asked'] for one in found)} requests failed: {failed[:5]}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=28_000)
    parser.add_argument("--rounds", type=int, default=10)
    try:
        return asyncio.run(run(parser.parse_args()))
    except HostError as error:
        print(f"failed: {error.message}", file=sys.stderr)
        return 1
