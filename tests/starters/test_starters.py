"""Each framework's starter, as its own generator makes it, is a site in development and in production."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from playwright.async_api import Browser

from gateway.settings import MiB, Settings
from tests.bench.frameworks import Meter
from tests.integration import environment
from tests.integration.sites import Hosting
from tests.starters.making import World, made
from tests.starters.table import STARTERS
from tests.starters.trial import changed, published, refused, stays, tried

TODAY = bool(os.environ.get("GATEWAY_TEST_TODAY"))  # the newest versions, not those of the table
TIMES = int(os.environ.get("GATEWAY_TEST_UPDATES", "1"))  # that each is updated
# of what package.json names, also in the folders of a workspace; of all in .venv
_VERSIONS = """
cd /srv/site
for file in package.json */package.json */*/package.json; do [ ! -e "$file" ] || echo "$file"; done |
  grep -v node_modules | xargs -r node -e '
    for (const file of process.argv.slice(1)) {
      const said = require(`/srv/site/${file}`)
      for (const name of Object.keys({ ...said.dependencies, ...said.devDependencies }))
        for (const folder of [file.replace("package.json", ""), ""])
          try {
            console.log(name, require(`/srv/site/${folder}node_modules/${name}/package.json`).version)
          } catch {}
    }'
[ ! -d .venv ] || uv pip list --quiet --format=freeze | tr -s = ' '
"""

_JOURNAL = ("journalctl", "--unit=site.service", "--unit=site-next.service", "--lines=60", "--no-pager")


@pytest.mark.timeout(600 + 150 * TIMES)
@pytest.mark.parametrize("name", STARTERS)
async def test_a_starter_is_a_site(
    name: str,
    browser: Browser,
    host: Hosting,
    incus_settings: Settings,
    record_property: Callable[[str, object], None],
) -> None:
    """An edit shows in its page; it is published while its dev server goes on, updated and rolled back."""
    starter, tenants = STARTERS[name], (f"{name}-example-com", f"{name}-built-example-com")
    told = list[str]()
    try:
        began = time.monotonic()
        files = await made(name, starter, incus_settings, newest=TODAY)
        told.append(f"made in {time.monotonic() - began:.1f} s")
        with Meter(tenants[0]).running() as meter:
            record = await tried(browser, host, name, starter, files, busy())
            await stays(host, tenants[0])
        record_property("versions", versions(tenants[0]))
        told += [row(name, record, meter), f"edits were seen within {record['edits']} s"]
        if files.ours:
            told.append(f"OF OUR OWN PAGES, not of its generator's: {files.ours}")
        if starter.refused:
            await refused(host, name, starter, tenants[0])
        else:
            with Meter(tenants[1]).running() as meter:
                record = await published(browser, host, name, starter, tenants[0])
                await stays(host, tenants[1])
            told.append(row(name, record, meter))
        with Meter(tenants[0]).running() as meter:
            record = await changed(host, name, starter, files, TIMES)
        told.append(f"updated in {record['ms'] / 1000:.1f} s, {round(meter.peak / MiB)} MiB at its peak")
    except World as error:
        pytest.fail(f"THE WORLD, not the gateway: {error}", pytrace=False)
    except Exception:
        for tenant in tenants:
            told.append(environment.incus("exec", tenant, "--", *_JOURNAL, check=False).stdout.decode())
        raise
    finally:
        print("\n".join(told))
        for tenant in tenants:  # also after a failure: the next starters need their memory
            await host.call("DELETE", f"/v1/tenants/{tenant}")


def busy() -> float:
    """Return how many programs want each CPU, at least 1: as many times as long an edit may take."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def row(name: str, record: Mapping[str, Any], meter: Meter) -> str:
    """Return what a deployment took, as `docs/deployments.md` has it: seconds and MiB."""
    peak, rest = (round(size / MiB) for size in (meter.peak, meter.rest))
    seconds, files = record["ms"] / 1000, disk(record["tenant"])
    facts = f"{seconds:.1f} s, {peak} MiB at its peak, {rest} at rest, {files} on disk"
    phases = ", ".join(f"{phase['name']} {phase['ms'] / 1000:.1f}" for phase in record["phases"])
    return "\n  ".join((f"{name}: {facts}", phases, *record["detected"]["lines"]))


def disk(tenant: str) -> int:
    return int(environment.incus("exec", tenant, "--", "du", "-sxm", "/srv/site").stdout.split()[0])


def versions(tenant: str) -> dict[str, str]:
    """Return the versions of what was installed, by name."""
    said = environment.incus("exec", tenant, "--", "sh", "-c", _VERSIONS, check=False).stdout.decode()
    found = (line.partition(" ") for line in said.splitlines())
    return {name: version for name, _, version in found if version}
