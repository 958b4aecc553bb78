"""Measures the file tools on a tree as large as a site's with its packages: 60 000 files, 140 tracked.

The tree lies in a real container. Searches go through the websocket, and beside them `rg`, `fd` and `git` are
spawned for each call on the same folder from the host, as root and unconfined: what one would do without the
gateway (and should not, since they follow the tenant's races out of it). One that is not installed is left
out. A git command that greps sees tracked files alone.

Then what a tenant's neighbour feels of a heavy Grep, and what an idle worker costs. As in `bench`, ways take
turns, ratios are what to look at, and nothing passes or fails by time.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from gateway.rootfs import FilesystemRoot, IdMap, kernel
from gateway.rootfs.locations import Folders, found_by
from gateway.rootfs.workers import Workers
from gateway.runtime.incus import IncusRuntime
from gateway.settings import Settings, load
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import FileTools
from gateway_client import Tenant
from tests.bench import bench
from tests.bench.bench import CLI, GATEWAY, PROJECT, SOCKET, USER, WORKSPACE, Case, Way, check

FD: Final = shutil.which("fdfind") or shutil.which("fd")
PACKAGES, PER_PACKAGE = 600, 100
WORKERS: Final = 30
READ, READ_BYTES = "src/ten.txt", 10_240
NEEDLE = "onSubmit=.handleSubmit"
NOWHERE = "zzz[a-z]+qq"  # a literal and a class, as most patterns are; no file has it
READ_ALONE = "src/App.tsx"  # the neighbour's own
READS_PER_SECOND = 400
IDLE = 7.0  # seconds; a worker lets go of what it kept after 5


# --- the tree -----------------------------------------------------------------------------------------


def packages() -> Iterator[tuple[str, str]]:
    """Yield path and text of the files of 600 packages, the same in every run: half a gigabyte, 8 KB each."""
    chance = random.Random(7)
    words = ("value", "handler", "props", "state", "render", "module", "exports", "require", "options")
    lines = [
        " ".join(chance.choice(words) + chance.choice("(.=;,{ }") for _ in range(chance.randint(3, 11)))
        for _ in range(5000)
    ]
    for package in range(PACKAGES):
        for number in range(PER_PACKAGE):
            folder = ("dist", "dist/esm", "lib", "lib/internal", "types")[number // 10 % 5]
            suffix = ("js", "js", "js", "d.ts", "map")[number % 5]
            left = min(200_000, int(chance.lognormvariate(8.2, 1.2)))
            text: list[str] = []
            while left > 0:
                text.append(chance.choice(lines))
                left -= len(text[-1]) + 1
            yield f"node_modules/dep-{package}/{folder}/part{number}.{suffix}", "\n".join(text) + "\n"


def fill(name: str) -> None:
    """Unpack the packages and a file of 10 KB in a container, and commit what is tracked."""
    into = ("exec", name, "--user", USER, "--group", USER, "--cwd", WORKSPACE, "--", "sh", "-c")
    script = "tar xf - && git init -q && git add -A && git -c user.name=b -c user.email=b@b commit -qm all"
    environment = {"INCUS_DIR": str(Path(SOCKET).parent), "INCUS_PROJECT": PROJECT, "PATH": "/usr/bin:/bin"}
    command = ["incus", *into, "export HOME=/tmp; " + script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        with tarfile.open(fileobj=process.stdin, mode="w|") as tar:
            for path, text in [(READ, _ten()), *packages()]:
                entry = tarfile.TarInfo(path)
                entry.size, entry.mode = len(text), 0o644
                tar.addfile(entry, io.BytesIO(text.encode()))
        process.stdin.close()
        check(process.wait(300) == 0, "the tree could not be made")


def _ten() -> str:
    line = "A line of text that is as long as lines of source code usually are, more or less.\n"
    return (line * 200)[: READ_BYTES - 1] + "\n"


# --- searches -----------------------------------------------------------------------------------------


def searches(shop: Tenant, folder: str) -> Iterator[Case]:
    """Yield the searches. `folder` is the workspace's path on the host."""

    def spawned(wanted: bytes, *command: str, codes: tuple[int, ...] = (0,)) -> Way:
        async def call() -> None:
            done = await bench.spawned(*command, cwd=folder, stdin=subprocess.DEVNULL)
            check(done.returncode in codes and wanted in done.stdout, f"{command[0]} found something else")

        return call

    def others(rg: Way | None, fd: Way | None, git: Way | None) -> dict[str, Way]:
        ways = {"rg": (rg, shutil.which("rg")), "fd": (fd, FD), "git": (git, shutil.which("git"))}
        return {name: way for name, (way, there) in ways.items() if way is not None and there}

    git = ("git", "-c", "safe.directory=*")
    every = ("--no-ignore", "--hidden")

    def glob(pattern: str, wanted: str) -> Way:
        async def call() -> None:
            check(wanted in (await shop.glob(pattern)).text, "Glob found something else")

        return call

    def grep(pattern: str, path: str | None, wanted: str) -> Way:
        async def call() -> None:
            check(wanted in (await shop.grep(pattern, path)).text, "Grep found something else")

        return call

    yield Case(
        "Glob source",
        {GATEWAY: glob("src/**/*.tsx", "part7.tsx")}
        | others(
            spawned(b"part7.tsx", "rg", "--files", *every, "--sort=modified", "-g", "*.tsx", "src"),
            spawned(b"part7.tsx", FD or "fd", *every, "-e", "tsx", ".", "src"),
            spawned(b"part7.tsx", *git, "ls-files", "src/**/*.tsx"),
        ),
    )
    yield Case(
        "Glob all",
        {GATEWAY: glob("**/*.tsx", "part7.tsx")}
        | others(
            spawned(b"part7.tsx", "rg", "--files", *every, "--sort=modified", "-g", "*.tsx"),
            spawned(b"part7.tsx", FD or "fd", *every, "-e", "tsx"),
            spawned(b"part7.tsx", *git, "ls-files", "--cached", "--others", "*.tsx"),
        ),
        series=3,
    )
    yield Case(
        "Grep source",
        {GATEWAY: grep(NEEDLE, None, "part7.tsx")}
        | others(
            spawned(b"part7.tsx", "rg", "-l", NEEDLE),
            None,
            spawned(b"part7.tsx", *git, "grep", "-lE", NEEDLE),
        ),
    )
    yield Case(
        "Grep packages",
        {GATEWAY: grep(NOWHERE, "node_modules", "No files found")}
        | others(
            spawned(b"", "rg", "-l", NOWHERE, "node_modules", codes=(0, 1)),
            None,
            None,
        ),
        series=1,
    )


# --- the neighbour ------------------------------------------------------------------------------------


async def neighbour(busy: Tenant, calm: Tenant, rounds: int) -> dict[str, Any]:
    """Read at a fixed rate in one tenant, with and without a Grep of all packages in the other.

    Returns milliseconds of all reads, and the middle of the rounds' ratios of p99: one round in which the
    machine had something else to do does not decide it.
    """
    # The client stands for one on another machine: its own wait for a CPU is not what is measured.
    kernel.take_turns(short=True)

    async def reads(go_on: Callable[[], bool]) -> list[float]:
        taken: list[float] = []
        due = time.perf_counter()
        while go_on():
            due = max(due + 1 / READS_PER_SECOND, time.perf_counter() - 0.01)
            await asyncio.sleep(due - time.perf_counter())
            began = time.perf_counter()
            await calm.read(READ_ALONE)
            taken.append(time.perf_counter() - began)
        return taken

    alone: list[float] = []
    beside: list[float] = []
    ratios: list[float] = []
    greps: list[float] = []
    for _ in range(rounds):
        until = time.perf_counter() + 1.5
        before = await reads(lambda until=until: time.perf_counter() < until)  # type: ignore[misc]
        during: list[float] = []
        while len(during) < 400:
            began = time.perf_counter()
            grep = asyncio.ensure_future(busy.grep(NOWHERE, "node_modules"))
            during += await reads(lambda grep=grep: not grep.done())  # type: ignore[misc]
            await grep
            greps.append(time.perf_counter() - began)
        ratios.append(bench.percentile(during, 99) / bench.percentile(before, 99))
        alone += before
        beside += during
    spread = {
        name: {f"p{p}_ms": round(bench.percentile(taken, p) * 1000, 3) for p in (50, 95, 99)}
        for name, taken in (("alone", alone), ("beside a Grep", beside))
    }
    return spread | {
        "p99_ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "grep_s": round(statistics.median(greps), 2),
    }


# --- memory -------------------------------------------------------------------------------------------


async def memory(settings: Settings, home: Path) -> dict[str, Any]:
    """Return kilobytes of private memory of idle workers that have read, edited and rested."""
    idmap = (IdMap(True, True, 0, 1_000_000, 65_536),)
    for number in range(WORKERS):
        (home / str(number)).mkdir()
        (home / str(number) / "ten.txt").write_text("?" + _ten())
        for path in (home / str(number), home / str(number) / "ten.txt"):
            os.chown(path, settings.workspace_uid, settings.workspace_uid)
    places = Folders(str(home), "", settings.workspace_uid, idmap)
    async with Workers(settings, places.to_dict()) as workers:
        tools = FileTools(workers, settings)
        for number in range(WORKERS):
            one, session = FilesystemRoot(str(number), "/"), ToolSession()
            edit = {"file_path": "ten.txt", "old_string": "?", "new_string": "!"}
            await tools.call(one, session, "Read", {"file_path": "ten.txt"})
            await tools.call(one, session, "Edit", edit)
        await asyncio.sleep(IDLE)
        process = workers.broker._process
        assert process is not None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        *children, spare = children  # the last waits for its turn
        check(len(children) == WORKERS, "some workers are not there")
        private = [_private(pid) for pid in children]
        return {
            "workers": len(private),
            "private_kb": round(statistics.mean(private)),
            "private_kb_max": max(private),
            "spare_kb": _private(spare),
            "broker_kb": _private(str(process.pid)),
        }


def _private(pid: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


# --- the run ------------------------------------------------------------------------------------------


async def measure_all(quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything. Bounded: a case ends after its share of time even with rounds left."""
    rounds, seconds = (6, 8.0) if quick else (30, 30.0)
    results: dict[str, Any] = {}
    async with (
        asyncio.timeout(900),
        bench.container(say) as bare,
        bench.container(say, "-calm") as other,
        bench.gateway(say, bare.name, other.name) as client,
    ):
        say(f"unpacking {PACKAGES * PER_PACKAGE} files")
        await asyncio.to_thread(fill, bare.name)
        settings: Settings = load()
        disk = found_by(IncusRuntime(settings).locations).disk(bare.name, WORKSPACE)
        shop, calm = client.tenant(bare.name), client.tenant(other.name)

        async def gateway_read() -> None:
            check(len((await shop.read(READ)).text) > READ_BYTES, "Read")

        async def cli_read() -> None:
            options = ("--user", USER, "--group", USER, "--cwd", WORKSPACE)
            check(len(await bench.incus("exec", bare.name, *options, "--", "cat", READ)) == READ_BYTES, "cat")

        eight = [case for case in bench.cases(shop, bare) if case.name == "eight calls"]
        read = Case("Read 10 KB", {GATEWAY: gateway_read, CLI: cli_read}, series=20)
        for case in [*searches(shop, f"{disk.path}{WORKSPACE}"), read, *eight]:
            say(f"measuring {case.name}")
            await bench.measure(case, rounds, time.monotonic() + seconds)
            results[case.name] = case.report()
        say("measuring the neighbour")
        beside = await neighbour(shop, calm, 4 if quick else 15)
        say(f"measuring {WORKERS} idle workers")
        with tempfile.TemporaryDirectory() as home:
            idle = await memory(settings, Path(home))
    return {"machine": bench.machine(), "cases": results, "neighbour": beside, "memory": idle}


def table(result: Mapping[str, Any]) -> str:
    """Return the result for a person."""
    lines = [*bench.rows(result["cases"]), ""]
    beside, idle = result["neighbour"], result["memory"]
    for name in ("alone", "beside a Grep"):
        numbers = "  ".join(f"{key[:-3]} {value} ms" for key, value in beside[name].items())
        lines.append(f"another tenant's Read {name:14} {numbers}")
    ratio, seconds = beside["p99_ratio"], beside["grep_s"]
    lines.append(f"p99 {ratio} times as long beside a Grep of {seconds} s (aim: below 2)")
    each, most = idle["private_kb"], idle["private_kb_max"]
    lines.append(f"{idle['workers']} idle workers: {each} kB private each, {most} at most (aim: below 4096)")
    return "\n".join(lines)


def main() -> int:
    return bench.run("tests/bench/files", __doc__, measure_all, table)
