"""Measures an agent's day with a dev server: deploy, look, edit, update; two templates of Vite and React.

`full` is tests/data/full-template, uploaded as a folder as a customer does it; `vite-react` is the one that
is built in, by its name. Each deployment is a new tenant, on which pages are loaded: the document with all
that it names and that these import, some by Chromium. On the last one an agent edits, and Chromium shows
when the page has changed; then it is updated while a visitor asks all the while. Exit code 1 where a
deployment did not succeed, a site did not stay up, a request failed or the page did not change; times alone
fail nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import re
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
from playwright.async_api import Browser, BrowserContext, Page, async_playwright

from gateway.host import HostError
from gateway.host.requirements import setup
from gateway.settings import Settings
from tests.bench.bench import percentile
from tests.bench.deploy import Wrong, ready
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.live import Wire

ROOT: Final = Path(__file__).parents[2]
TEMPLATES: Final = {
    "full": (ROOT / "tests/data/full-template", "src/pages/home.tsx", "mark 0"),
    "vite-react": (ROOT / "deploy/templates/vite-react", "src/app.tsx", "Your site is live."),
}
PACE: Final = 0.25  # seconds between two edits, as an agent makes them at most
CHROMIUM: Final = "/usr/bin/chromium-headless-shell"
_NAMED: Final = re.compile(r"""(?:src|href)="(/[^"]+)\"""")
_IMPORT: Final = re.compile(r"""\b(?:from|import)\s*\(?\s*["'](/[^"']+)["']""")
# tells of each change of the page that shows what is waited for, as soon as it shows
WATCH: Final = """
() => {
  const look = () => {
    const shown = window.awaited && document.body.innerText.includes(window.awaited)
    if (shown) { const text = window.awaited; window.awaited = ""; window.shown(text) }
  }
  new MutationObserver(look).observe(document, { childList: true, characterData: true, subtree: true })
}
"""


def packed(folder: Path, *more: tuple[str, bytes]) -> dict[str, str]:
    """Return a folder as it is uploaded, with more files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, ".", filter=lambda member: None if "node_modules" in member.name else member)
        for name, content in more:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return {"archive": base64.b64encode(buffer.getvalue()).decode()}


async def load(session: aiohttp.ClientSession, domain: str, port: int) -> int:
    """Load a page with all that it names and that these import; return how many requests it took."""
    seen, pending = {"/"}, ["/"]
    while pending:
        path = pending.pop()
        kind = "text/html" if path == "/" else "*/*"
        async with session.get(
            f"http://127.0.0.1:{port}{path}", headers={"Host": domain, "Accept": kind}
        ) as answer:
            text = await answer.text(errors="replace")
            if answer.status != 200:
                raise Wrong(f"{path} of {domain} answers {answer.status}: {text[:200]}")
        found = (_NAMED if path == "/" else _IMPORT).findall(text)
        fresh = [name for name in dict.fromkeys(found) if name not in seen]
        seen.update(fresh)
        pending += fresh
    return len(seen)


class Shown:
    """A page of a site in Chromium that says when a text shows."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self._came: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def open(self, url: str, text: str) -> None:
        await self.page.expose_function("shown", self._shown)
        await self.page.goto(url)
        await self.page.get_by_text(text, exact=False).first.wait_for(timeout=60_000)
        await self.page.evaluate(WATCH)
        # its socket for updates may come after the first paint
        await self.page.wait_for_timeout(1000)

    def _shown(self, text: str) -> None:
        if not self._came.done():
            self._came.set_result(time.perf_counter())

    async def edit(self, wire: Wire, path: str, old: str, new: str) -> float:
        """Have an agent edit a file; return the seconds from its answer until the page shows the new text."""
        self._came = asyncio.get_running_loop().create_future()
        await self.page.evaluate("text => { window.awaited = text }", new)
        arguments = {"file_path": f"/srv/site/{path}", "old_string": old, "new_string": new}
        said = await wire.call("tools/call", name="Edit", arguments=arguments)
        answered = time.perf_counter()
        if said.get("isError"):
            raise Wrong(str(said))
        try:
            async with asyncio.timeout(30):
                return max(0.0, await self._came - answered)
        except TimeoutError:
            raise Wrong(f"the page did not show {new!r} within 30 s of the edit's answer") from None


async def edits(
    browser: Browser | BrowserContext,
    host: Hosting,
    url: str,
    tenant: str,
    file: tuple[str, str],
    rounds: int,
) -> list[float]:
    """Edit a file of a tenant so many times; return for each the seconds until the page at `url` changed."""
    path, text = file
    page = await browser.new_page()
    took = []
    try:
        shown = Shown(page)
        await shown.open(url, text)
        async with host.gateway.wire(tenant) as wire:
            await wire.call("tools/call", name="Read", arguments={"file_path": f"/srv/site/{path}"})
            now = text
            for number in range(rounds):
                # chokidar, which Vite watches by, takes no notice of a change within 50 ms of another one
                await asyncio.sleep(PACE)
                new = f"changed {number} times"
                took.append(await shown.edit(wire, path, now, new))
                now = new
            await asyncio.sleep(PACE)
            await shown.edit(wire, path, now, text)
    finally:
        await page.close()
    return took


async def updated(host: Hosting, domain: str, template: Any) -> dict[str, Any]:
    """Update a site while a visitor asks all the while; return the times and what the visitor met."""
    met, port, over = Counter[str](), host.settings.caddy_http, asyncio.Event()

    async def visitor() -> None:
        async with aiohttp.ClientSession() as session:
            while not over.is_set():
                for path in ("/", "/src/main.tsx", "/api/health"):
                    try:
                        async with session.get(
                            f"http://127.0.0.1:{port}{path}",
                            headers={"Host": domain, "Accept": "text/html" if path == "/" else "*/*"},
                        ) as answer:
                            await answer.read()
                            met[str(answer.status)] += 1
                    except aiohttp.ClientError as error:
                        met[type(error).__name__] += 1

    asking = asyncio.create_task(visitor())
    try:
        record = await host.deploy(domain, template)
        await asyncio.sleep(1)  # the old one is let go only now
    finally:
        over.set()
        await asyncio.wait([asking], timeout=30)
    if record["state"] != "succeeded":
        raise Wrong(str(record["error"]))
    failed = {why: count for why, count in met.items() if why != "200"}
    if failed:
        raise Wrong(f"of {met.total()} requests during an update some failed: {failed}")
    return {"update_s": round(record["ms"] / 1000, 1), "visits": met.total(), "failed": 0}


def unwell(tenant: str) -> str:
    """Return what happened to a tenant's site that must not; empty for nothing."""
    script = (
        "systemctl show --property=NRestarts --value site.service; "
        "cat /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control 2>/dev/null || :"
    )
    said = environment.incus("exec", tenant, "--", "sh", "-c", script).stdout.decode().splitlines()
    restarts = said[0].strip()
    ooms = [line for line in said[1:] if line.startswith("oom_kill ") and line.split()[1] != "0"]
    return "" if restarts == "0" and not ooms else f"{restarts} restarts, {ooms or 'no OOM'}"


def last_said(tenant: str, log: Path) -> str:
    """Return what a tenant's site and Caddy said last, and how much memory the tenant had left."""
    script = (
        "journalctl --unit=site --lines=15 --output=short-precise --no-pager; grep -E '^Mem' /proc/meminfo; "
        "systemctl show --property=NRestarts,ActiveEnterTimestamp,Result site.service"
    )
    said = environment.incus("exec", tenant, "--", "sh", "-c", script, check=False).stdout.decode()
    return "\n".join((said, *log.read_text(errors="replace").splitlines()[-5:]))


async def measure(host: Hosting, browser: Browser, name: str, words: argparse.Namespace) -> dict[str, Any]:
    folder, path, text = TEMPLATES[name]
    template: Any = name if name != "full" else packed(folder)
    seconds, loads, sources, requests = list[float](), list[float](), Counter[str](), 0
    domain = tenant = ""
    for number in range(words.rounds):
        before, domain = tenant, f"{name}-{number}.localhost"
        body = {"size": words.size} if words.size else {}
        record = await host.deploy(domain, template, **body)
        if record["state"] != "succeeded":
            raise Wrong(f"deployment {number} of {name}: {record['error']}")
        tenant = record["tenant"]
        seconds.append(record["ms"] / 1000)
        sources[record["source"]] += 1
        if number == 0:  # the first one is what the others are copied from
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(300):
                    while not await asyncio.to_thread(ready, "golden"):
                        await asyncio.sleep(0.5)  # nobody tells when a golden copy is whole
        if before:  # only now: the golden copy of an upload ends with the last tenant of it
            await host.call("DELETE", f"/v1/tenants/{before}")
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=6)) as session:
            for _ in range(words.loads):
                began = time.perf_counter()
                try:
                    requests += await load(session, domain, host.settings.caddy_http)
                except Wrong as error:
                    said = await asyncio.to_thread(last_said, tenant, host.caddy.folder / "log")
                    raise Wrong(f"load {len(loads)}: {error}; {unwell(tenant)}\n{said}") from None
                loads.append(time.perf_counter() - began)
        for _ in range(words.windows):
            page = await browser.new_page()
            await page.goto(f"http://{domain}:{host.settings.caddy_http}/")
            await page.get_by_text(text).first.wait_for(timeout=60_000)
            await page.close()
        if why := await asyncio.to_thread(unwell, tenant):
            raise Wrong(f"the site of deployment {number} did not stay up: {why}")
        print(f"  {name} {number}: {record['source']} {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    url = f"http://{domain}:{host.settings.caddy_http}/"
    hot = await edits(browser, host, url, tenant, (path, text), words.edits)
    change: Any = packed(folder, ("public/new.txt", b"new"))
    update = await updated(host, domain, change)
    return {
        "template": name,
        "deployments": words.rounds,
        "from": dict(sources),
        "deploy_s": _spread(seconds, 1),
        "loads": len(loads),
        "requests_a_load": round(requests / max(1, len(loads))),
        "load_ms": _spread([took * 1000 for took in loads] or [0.0]),
        "edit_to_dom_ms": _spread([took * 1000 for took in hot]),
        **update,
    }


def _spread(samples: Sequence[float], digits: int = 0) -> dict[str, float]:
    found = {f"p{percent}": round(percentile(samples, percent), digits) for percent in (50, 95, 99)}
    return found | {"max": round(max(samples), digits)}


@contextlib.asynccontextmanager
async def shipped() -> AsyncIterator[Settings]:
    """Give settings of the tests' Incus whose tenants are as large as an operator's are by default."""
    default = {name: Settings.model_fields[name].default for name in ("tenant_memory", "tenant_disk")}
    settings = environment.settings(profile="gwbench-vite", **default)
    await asyncio.to_thread(setup, settings, lambda line: None)
    try:
        yield settings
    finally:
        for entry in environment.instances():
            if settings.profile in entry["profiles"]:
                environment.incus("delete", "--force", entry["name"], check=False)
        environment.incus("profile", "delete", settings.profile, check=False)


async def run(words: argparse.Namespace) -> list[dict[str, Any]]:
    await asyncio.to_thread(environment.up, lambda line: print(line, file=sys.stderr))
    results = []
    flags = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(flags))
        with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
            async with (
                shipped() as settings,
                hosting(
                    settings,
                    Path(folder) / "state",
                    **{"golden": True, "warm_pool": words.pool, "verify_timeout": 120.0},
                ) as host,
            ):
                for name in words.template:
                    results.append(await measure(host, browser, name, words))
                    if not words.json:
                        print(json.dumps(results[-1], indent=2), flush=True)
        await browser.close()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--template", nargs="+", choices=tuple(TEMPLATES), default=list(TEMPLATES))
    parser.add_argument("--rounds", type=int, default=20, help="deployments of each template")
    parser.add_argument("--loads", type=int, default=50, help="page loads of each deployment")
    parser.add_argument("--windows", type=int, default=2, help="page loads by Chromium beside them")
    parser.add_argument("--edits", type=int, default=30)
    parser.add_argument("--pool", type=int, default=0, help="instances kept ready of the built-in template")
    parser.add_argument("--size", default="", help="of the tenants; the default one if not given")
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
