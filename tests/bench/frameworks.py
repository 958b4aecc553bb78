"""Measures what frameworks need of a tenant: dev server and production, memory, tasks, disk, smallest memory.

Each framework's starter is made and installed in a container of the tests' Incus with the profile of tenants,
and its site runs in a unit with the limits of a site's. `natural` has a limit that it does not reach: `peak`
and `rest` are the memory that cannot be given back (anonymous, shared, the kernel's), sampled 20 times a
second; `cache` is the page cache in use at that peak. Then the memory is made smaller, and from cold caches
grows step by step, until a first page comes whole, a second one at once, and the kernel ends no process.

With GATEWAY_TEST_HOST it uses that Incus. Nothing passes or fails by time; the exit code is 1 where something
does not work without a limit either.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from gateway.deployments.browser import Browser
from gateway.host import HostError
from gateway.settings import MiB
from tests.integration import environment

NAME: Final = "bench-frameworks"
PORT: Final = 3000
NATURAL: Final = 3072  # MiB
STEPS: Final = (128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 2048)  # MiB
ROOT: Final = Path(__file__).resolve().parents[2]
PATIENCE: Final = 600.0  # without a limit: of a first page, and of a build
SLOWER: Final = 3.0  # times as long as without a limit is no life
LEAST: Final = 30.0
SECOND_SECONDS: Final = 5.0  # a page that was shown before
REST: Final = 5.0
CACHES: Final = "node_modules/.vite node_modules/.cache .next .nuxt .output .svelte-kit .astro dist build"


class Wrong(Exception):
    """Something that does not work without any limit."""


@dataclass(frozen=True)
class Starter:
    """How a framework's starter is made, and run in development and production."""

    make: str
    dev: str
    build: str
    serve: str
    files: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None


def package(**dependencies: str) -> str:
    return json.dumps(
        {"name": "site", "private": True, "type": "module", "dependencies": dependencies}, indent=2
    )


VITE: Final = "bun --bun vite --host 0.0.0.0 --port $PORT"
PREVIEW: Final = "bun --bun vite preview --host 0.0.0.0 --port $PORT"
INSTALL: Final = "bun install"
# Next's own without the fonts that it asks a server of Google for while it builds
LAYOUT: Final = (
    'import "./globals.css"; export default function Layout({ children }: { children: React.ReactNode }) '
    '{ return <html lang="en"><body>{children}</body></html> }'
)
STARTERS: Final[Mapping[str, Starter]] = {
    "vite": Starter(
        f"bunx create-vite@9.3.0 site --template react-ts --no-interactive && mv site/* . && {INSTALL}",
        VITE,
        "bun --bun vite build",
        PREVIEW,
    ),
    "vite-react": Starter(
        f"{INSTALL} --frozen-lockfile",
        VITE,
        "bun --bun vite build",
        PREVIEW,
        folder=ROOT / "deploy/templates/vite-react",
    ),
    "next": Starter(
        "bunx create-next-app@16.4.3 site --yes --use-bun --skip-install --disable-git && mv site/* . && "
        f"printf '%s' '{LAYOUT}' > app/layout.tsx && {INSTALL}",
        "bun --bun next dev --hostname 0.0.0.0 --port $PORT",
        "bun --bun next build",
        "bun --bun next start --hostname 0.0.0.0 --port $PORT",
    ),
    "nuxt": Starter(
        INSTALL,
        "bun --bun nuxt dev --no-fork --host 0.0.0.0 --port $PORT",
        "bun --bun nuxt build",
        "bun .output/server/index.mjs",
        files={
            "package.json": package(nuxt="4.5.2", vue="3.5.45", **{"vue-router": "5.5.1"}),
            "nuxt.config.ts": "export default defineNuxtConfig({ telemetry: false });\n",
            "app/app.vue": "<template><div><NuxtRouteAnnouncer /><NuxtWelcome /></div></template>\n",
        },
    ),
    "sveltekit": Starter(
        "bunx sv@0.17.1 create site --template minimal --types ts --no-add-ons --no-install && "
        f"mv site/* . && {INSTALL}",
        VITE,
        "bun --bun vite build",
        PREVIEW,
    ),
    "astro": Starter(
        INSTALL,
        "bun --bun astro dev --host 0.0.0.0 --port $PORT",
        "bun --bun astro build",
        "bun --bun astro preview --host 0.0.0.0 --port $PORT",
        files={
            "package.json": package(astro="7.3.5"),
            "astro.config.mjs": "export default {};\n",
            "src/pages/index.astro": "<html><head></head><body><h1>Astro</h1></body></html>\n",
        },
    ),
}


@dataclass
class Meter:
    """Samples a container's memory and tasks, also of one made later, from the host's cgroups in a thread."""

    name: str = NAME
    peak: int = 0
    cache: int = 0
    tasks: int = 0
    rest: int = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[Meter]:
        over = threading.Event()

        def sample() -> None:
            while not over.wait(0.05):
                with contextlib.suppress(OSError):
                    private, cache = memory(self.name)
                    self.rest = private
                    if private > self.peak:
                        self.peak, self.cache = private, cache
                    self.tasks = max(self.tasks, int(control("pids", "pids.current", self.name).read_text()))

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()


def control(controller: str, file: str, name: str = NAME) -> Path:
    """Return a file of the container's group, on hosts with one tree or with one for each controller."""
    old = Path("/sys/fs/cgroup") / controller
    return (old if old.is_dir() else Path("/sys/fs/cgroup")) / f"lxc.payload.{name}" / file


def facts(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}


def memory(name: str = NAME) -> tuple[int, int]:
    """Return the bytes that cannot be given back, and those of the page cache that are in use."""
    stat = facts(control("memory", "memory.stat", name))
    if "total_rss" in stat:  # v1
        kernel = int(control("memory", "memory.kmem.usage_in_bytes", name).read_text())
        return stat["total_rss"] + stat.get("total_shmem", 0) + kernel, stat["total_active_file"]
    return stat["anon"] + stat["shmem"] + stat.get("kernel", 0), stat["active_file"]


def ooms() -> int:
    v1 = control("memory", "memory.oom_control")
    return facts(v1 if v1.exists() else control("memory", "memory.events"))["oom_kill"]


def limit(mebibytes: int) -> None:
    try:
        environment.configure(NAME, "limits.memory", f"{mebibytes}MiB")
    except AssertionError as error:  # the kernel does not take back what is in use
        raise Wrong(str(error)) from None


def command(line: str, *, seconds: float, root: bool = False) -> str:
    """Run a line in the container, as the site's user in its folder; raise `Wrong` where it fails."""
    who = (
        ()
        if root
        else ("--user=1000", "--group=1000", "--cwd=/srv/site", "--env=HOME=/home/site", "--env=CI=1")
    )
    telemetry = ("--env=NEXT_TELEMETRY_DISABLED=1", "--env=ASTRO_TELEMETRY_DISABLED=1")
    words = ("exec", NAME, *who, *telemetry, "--", "timeout", "-k1", str(seconds), "bash", "-c", line)
    try:
        done = environment.incus(*words, check=False, timeout=seconds + 30)
    except subprocess.TimeoutExpired:
        raise Wrong(f"{line}: no end") from None
    if done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace")
        raise Wrong(f"{line}: {done.returncode}: {said[-1500:]}")
    return done.stdout.decode(errors="replace")


def start(line: str, mode: str) -> None:
    """Start a site as its unit does (`gateway/runtime/incus/site.service`)."""
    properties = "User=site WorkingDirectory=/srv/site MemoryHigh=90% TasksMax=85% OOMScoreAdjust=300"
    options = " ".join(f"--property={entry}" for entry in [*properties.split(), "OOMPolicy=continue"])
    variables = f"PORT={PORT} HOST=0.0.0.0 NODE_ENV={mode} NEXT_TELEMETRY_DISABLED=1"
    words = " ".join(f"--setenv={entry}" for entry in [*variables.split(), "ASTRO_TELEMETRY_DISABLED=1"])
    stopped = "systemctl stop site 2>/dev/null; systemctl reset-failed site 2>/dev/null"
    command(
        f"{stopped}; systemd-run --quiet --unit=site {options} {words} bash -c 'exec {line}'",
        seconds=30,
        root=True,
    )


async def page(address: str, seconds: float) -> float:
    """Return after how many seconds the site's page was there, whole. Raises `Wrong`."""
    began, why = time.monotonic(), "no answer"
    async with Browser(address, PORT, address) as browser:
        while (left := began + seconds - time.monotonic()) > 0:
            try:
                found = await browser.look("/", left)
                if found.status < 400 and not found.missing:
                    await browser.follow(found.scripts, min(15.0, left))
                    return time.monotonic() - began
                why = f"status {found.status}, missing {dict(found.missing)}"
            except (OSError, ValueError, TimeoutError) as error:
                why = str(error) or "no answer"
            await asyncio.sleep(0.2)
    raise Wrong(f"no whole page within {seconds:.0f} s: {why}")


def log() -> str:
    with contextlib.suppress(Wrong):
        return command("journalctl -u site -n 15 -o cat --no-pager", seconds=15, root=True)
    return ""


@dataclass
class Found:
    """What one run took; sizes in MiB."""

    peak: int
    cache: int
    rest: int
    tasks: int
    page_s: float
    build_s: float = 0.0
    build_peak: int = 0


def address() -> str:
    shown = json.loads(environment.incus("query", f"/1.0/instances/{NAME}/state").stdout)
    state = shown["network"]["eth0"]
    return next(str(one["address"]) for one in state["addresses"] if one["family"] == "inet")


def visit(where: str, seconds: float) -> float:
    """Have the first page, and a second one that must come at once."""
    took = asyncio.run(page(where, seconds))
    time.sleep(REST)
    asyncio.run(page(where, SECOND_SECONDS))
    return took


def attempt(starter: Starter, mode: str, natural: Found | None = None) -> Found:
    """Run a starter in development or production at the limit there is. Raises `Wrong`."""
    command(f"systemctl stop site 2>/dev/null; cd /srv/site && rm -rf {CACHES}; sync", seconds=60, root=True)
    with contextlib.suppress(OSError):
        control("memory", "memory.force_empty").write_text("0")
    before, where, building = ooms(), address(), Meter()
    took = 0.0
    times = (PATIENCE, PATIENCE) if natural is None else (natural.build_s * SLOWER, natural.page_s * SLOWER)
    building_seconds, page_seconds = (max(LEAST, seconds) for seconds in times)
    if mode == "production":
        began = time.monotonic()
        with building.running():
            command(f"NODE_ENV=production {starter.build}", seconds=building_seconds)
        took = time.monotonic() - began
    with Meter().running() as meter:
        start(starter.dev if mode == "development" else starter.serve, mode)
        try:
            shown = visit(where, page_seconds)
        except Wrong as error:
            raise Wrong(f"{error}\n{log()}") from None
    if command("systemctl is-active site || :", seconds=30, root=True).strip() != "active":
        raise Wrong("the site ended after it had answered")
    if ooms() != before:
        raise Wrong("the kernel ended a process")
    peak, cache, rest = (round(value / MiB) for value in (meter.peak, meter.cache, meter.rest))
    return Found(peak, cache, rest, meter.tasks, round(shown, 1), round(took, 1), round(building.peak / MiB))


def prepared(starter: Starter) -> None:
    command("systemctl stop site 2>/dev/null; rm -rf /srv/site/* /srv/site/.[!.]*", seconds=60, root=True)
    files = {path: text.encode() for path, text in starter.files.items()}
    if starter.folder is not None:
        files |= {
            str(path.relative_to(starter.folder)): path.read_bytes()
            for path in starter.folder.rglob("*")
            if path.is_file() and "node_modules" not in path.parts
        }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    unpack = ("exec", NAME, "--user=1000", "--group=1000", "--cwd=/srv/site", "--", "tar", "-x")
    environment.incus(*unpack, stdin=archive.getvalue())
    command(starter.make, seconds=240)


def smallest(starter: Starter, mode: str, natural: Found) -> tuple[int | None, Found | None, list[str]]:
    """Return the smallest step in which it lives, what it took there, and why the one below did not do."""
    why: list[str] = []
    most = max(natural.peak, natural.build_peak)
    lives: tuple[int | None, Found | None] = (None, None)
    above = [step for step in STEPS if step >= most * 0.7]
    for step in above:
        command("systemctl stop site 2>/dev/null || :", seconds=30, root=True)  # it would not fit
        try:
            limit(step)
            return step, attempt(starter, mode, natural), why
        except Wrong as error:
            why.append(f"{step}: {str(error)[:300]}")
            # nothing of it runs on into the next step
            limit(NATURAL)
            environment.incus("restart", "--force", NAME, timeout=120)
            networked()
    return *lives, why


def networked() -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(StopIteration, KeyError, TypeError):
            address()
            command("systemctl is-system-running --wait >/dev/null || :", seconds=30, root=True)
            return
        time.sleep(0.3)
    raise Wrong("the container has no address")


def measure(name: str, modes: Sequence[str], *, search: bool) -> dict[str, Any]:
    starter = STARTERS[name]
    limit(NATURAL)
    prepared(starter)
    result: dict[str, Any] = {"name": name}
    result["packages"] = int(
        command("find node_modules -name package.json -path '*node_modules/*' | wc -l", seconds=60)
    )
    for mode in modes:
        limit(NATURAL)
        natural = attempt(starter, mode)
        result[mode] = {"natural": asdict(natural)}
        if search:
            step, found, why = smallest(starter, mode, natural)
            result[mode] |= {"smallest": step, "there": None if found is None else asdict(found), "why": why}
        print(json.dumps({name: {mode: result[mode]}}), file=sys.stderr, flush=True)
    result["disk"] = int(command("du -sm --apparent-size /srv/site | cut -f1", seconds=60))
    return result


def show(result: Mapping[str, Any]) -> None:
    for mode in ("development", "production"):
        if mode not in result:
            continue
        natural, least = result[mode]["natural"], result[mode].get("smallest", "-")
        print(
            f"{result['name']:11} {mode:12} peak {natural['peak']:5} rest {natural['rest']:5} MiB"
            f"  build {natural['build_peak']:5} MiB {natural['build_s']:6.1f} s"
            f"  tasks {natural['tasks']:4}  page {natural['page_s']:5.1f} s  disk {result['disk']:5} MiB"
            f"  smallest {least}",
            flush=True,
        )


def run(words: argparse.Namespace) -> list[dict[str, Any]]:
    environment.up(lambda line: print(line, file=sys.stderr))
    environment.incus("delete", "--force", NAME, check=False)
    settings = environment.settings()
    options = ("-c", f"limits.cpu={words.cpu}", "-c", f"limits.memory={NATURAL}MiB")
    disk = ("-d", "root,size=8GiB", "-c", "limits.processes=2000")
    environment.incus(
        "launch", settings.image, NAME, "-p", settings.profile, *options, *disk, "--quiet", timeout=120
    )
    results = []
    try:
        networked()
        for name in words.frameworks:
            try:
                results.append(measure(name, words.mode, search=not words.natural))
            except Wrong as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                results.append({"name": name, "error": str(error)})
                continue
            if not words.json:
                show(results[-1])
    finally:
        environment.incus("delete", "--force", NAME, check=False)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frameworks", nargs="+", choices=tuple(STARTERS), default=list(STARTERS))
    parser.add_argument(
        "--mode", nargs="+", choices=("development", "production"), default=["development", "production"]
    )
    parser.add_argument("--natural", action="store_true", help="leave out the search for the smallest memory")
    parser.add_argument("--cpu", default="1", help="limits.cpu of the container")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    try:
        results = run(words)
    except (Wrong, HostError) as error:
        print(f"wrong: {error}", file=sys.stderr)
        return 1
    if words.json:
        print(json.dumps(results, indent=2))
    return int(any("error" in result for result in results))
