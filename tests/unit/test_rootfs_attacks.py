"""Nothing that a hostile tenant puts into its workspace reaches files outside, hangs calls or breaks answers.

Each attack runs in three ways: through a worker (confined if this process is root), on the safe paths alone,
and on their portable form without openat2, so each layer is known to hold without the others. The
integration tests do the same from inside a real container.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.rootfs import kernel
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.root import Root
from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from gateway.tools import grep
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import EncodedResult, FileTools
from tests.unit.test_rootfs_workers import USER, LaidRoot, folders, make_root, needs_root
from tests.unit.test_tools_conformance import HereWorkers

SECRET = "host-secret-9d1f"
OUTSIDE = "outside-name.txt"  # of a file on the host
PATIENCE = 60.0  # seconds of a call, on a machine that an attack keeps busy
RACE_SECONDS = float(os.environ.get("GATEWAY_TEST_RACE_SECONDS", "0.3"))


class Target:
    """A tenant's workspace, files outside that must stay unreachable, and the tools."""

    def __init__(self, folder: Path, root: LaidRoot, tools: FileTools) -> None:
        self.root = root
        self.site = root.path / "srv" / "site"
        self.host = folder / "host"
        self.host.mkdir()
        (self.host / "secret.txt").write_text(SECRET)
        (self.host / OUTSIDE).write_text(SECRET)
        # The tenant's own, but outside its workspace; and a folder that shares the workspace's beginning.
        (root.path / "etc").mkdir()
        (root.path / "etc" / "passwd").write_text(SECRET)
        (root.path / "srv" / "site-evil").mkdir()
        (root.path / "srv" / "site-evil" / "secret.txt").write_text(SECRET)
        self._before = self._state()
        self.tools = tools

    def _state(self) -> dict[str, bytes]:
        places = (self.host, self.root.path / "etc", self.root.path / "srv" / "site-evil")
        return {
            str(path): path.read_bytes() if path.is_file() else b""
            for place in places
            for path in place.rglob("*")
        }

    def own(self) -> None:
        """Give the workspace to the tenant's user."""
        if os.getuid() == 0:
            for folder, names, files in os.walk(self.site):
                for path in (folder, *(os.path.join(folder, name) for name in names + files)):
                    os.chown(path, USER, USER, follow_symlinks=False)

    async def call(self, tool: str, within: float = PATIENCE + 1, **given: Any) -> EncodedResult:
        async with asyncio.timeout(within):
            result = await self.tools.call(self.root, ToolSession(), tool, given)
        json.loads(result.encoded.decode("utf-8"))
        assert SECRET not in result.encoded.decode()
        assert OUTSIDE not in result.encoded.decode()
        assert str(self.root.path) not in result.encoded.decode()
        return result

    def check_host(self) -> None:
        """Check that nothing outside has changed and no unfinished file is left."""
        assert self._state() == self._before
        assert [path for path in self.site.rglob(".gateway-*") if not path.is_symlink()] == []


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Workers]:
    places = folders(tmp_path_factory.getbasetemp(), "tenant")
    async with Workers(Settings(tool_timeout=PATIENCE), places) as workers:
        yield workers


@pytest.fixture(params=["worker", "here", "portable"])
async def target(
    request: pytest.FixtureRequest, tmp_path: Path, running: Workers, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Target]:
    root = replace(make_root(tmp_path, "tenant"), tenant=tmp_path.name)
    if request.param == "worker":
        target = Target(tmp_path, root, FileTools(running, Settings()))
        yield target
        await running.forget(root.tenant)
    else:
        if request.param == "portable":
            monkeypatch.setattr(kernel, "HAS_OPENAT2", False)
        limits = CallLimits(tool_timeout=PATIENCE)
        here = HereWorkers(root.path / "srv" / "site", limits=limits)
        target = Target(tmp_path, root, FileTools(here, Settings()))  # type: ignore[arg-type]  # stand-in
        yield target
        here.close()
    target.check_host()


Lay = Callable[[Target], object]

# What lies in the workspace as `x` (or is only asked for), the path that is read and then written, and the
# codes that reading and writing may answer with.
PATHS: dict[str, tuple[Lay | None, str, set[str], set[str]]] = {
    "dotdot": (None, "../../etc/passwd", {"outside_workspace"}, {"outside_workspace"}),
    "dotdot-hidden": (None, "/srv/site/a/../../../etc/passwd", {"outside_workspace"}, {"outside_workspace"}),
    "absolute": (None, "/etc/passwd", {"outside_workspace"}, {"outside_workspace"}),
    "prefix-twin": (None, "/srv/site-evil/secret.txt", {"outside_workspace"}, {"outside_workspace"}),
    "parent": (None, "/srv", {"outside_workspace"}, {"outside_workspace"}),
    "device": (None, "/dev/zero", {"not_a_file"}, {"outside_workspace"}),
    "process-memory": (None, "/proc/self/mem", {"not_a_file"}, {"outside_workspace"}),
    "link-to-host": (
        lambda t: (t.site / "x").symlink_to(t.host / "secret.txt"),
        "x",
        {"outside_workspace"},
        {"not_a_file"},
    ),
    "relative-link-to-tenant": (
        lambda t: (t.site / "x").symlink_to("../../etc/passwd"),
        "x",
        {"outside_workspace"},
        {"not_a_file"},
    ),
    "folder-link-to-host": (
        lambda t: (t.site / "x").symlink_to(t.host),
        "x/secret.txt",
        {"outside_workspace"},
        {"outside_workspace"},
    ),
    "folder-link-to-new": (
        lambda t: (t.site / "x").symlink_to(t.host),
        "x/new/deeper/file.txt",
        {"outside_workspace"},
        {"outside_workspace"},
    ),
    "relative-folder-link": (
        lambda t: (t.site / "x").symlink_to("../site-evil"),
        "x/secret.txt",
        {"outside_workspace"},
        {"outside_workspace"},
    ),
    "link-to-twin": (
        lambda t: (t.site / "x").symlink_to("/srv/site-evil/secret.txt"),
        "x",
        {"outside_workspace"},
        {"not_a_file"},
    ),
    "magic-link": (
        lambda t: (t.site / "x").symlink_to("/proc/self/root/etc/passwd"),
        "x",
        {"outside_workspace"},
        {"not_a_file"},
    ),
    "magic-folder-link": (
        lambda t: (t.site / "x").symlink_to("/proc/self/cwd"),
        "x/secret.txt",
        {"outside_workspace"},
        {"outside_workspace"},
    ),
    "dangling-link": (
        lambda t: (t.site / "x").symlink_to(t.host / "new"),
        "x",
        {"outside_workspace"},
        {"not_a_file"},
    ),
    "dangling-folder-link": (
        lambda t: (t.site / "x").symlink_to("nowhere"),
        "x/new.txt",
        {"not_found"},
        {"conflict", "not_found", "outside_workspace", "not_a_file"},
    ),
    "loop": (lambda t: (t.site / "x").symlink_to("x"), "x", {"outside_workspace"}, {"not_a_file"}),
    "folder-loop": (
        lambda t: [(t.site / a).symlink_to(b) for a, b in ("xy", "yx")],  # type: ignore[func-returns-value]
        "x/file",
        {"outside_workspace"},
        {"outside_workspace"},
    ),
    "fifo": (lambda t: os.mkfifo(t.site / "x"), "x", {"not_a_file"}, {"not_a_file"}),
    "socket": (
        lambda t: os.mknod(t.site / "x", stat.S_IFSOCK | 0o666),
        "x",
        {"not_a_file"},
        {"not_a_file"},
    ),
    "folder-as-file": (lambda t: (t.site / "x").mkdir(), "x", {"is_a_directory"}, {"is_a_directory"}),
    "file-as-folder": (lambda t: (t.site / "x").touch(), "x/y", {"not_a_file"}, {"not_a_file"}),
    "workspace": (None, "/srv/site", {"is_a_directory"}, {"is_a_directory"}),
    "nul": (None, "a\0b", {"invalid_params"}, {"invalid_params"}),
    "empty": (None, "", {"is_a_directory"}, {"is_a_directory"}),
    "long-name": (None, "n" * 300, {"invalid_params"}, {"invalid_params"}),
    "long-path": (None, "n/" * 3000 + "x", {"invalid_params"}, {"invalid_params"}),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", PATHS)
async def test_path(target: Target, name: str) -> None:
    """Reads and writes are refused at once, with the right code."""
    lay, path, reading, writing = PATHS[name]
    if lay is not None:
        lay(target)
        target.own()
    read = await target.call("Read", file_path=path)
    assert read.is_error, read.data()
    assert read.code in reading
    write = await target.call("Write", file_path=path, content="pwned")
    assert write.is_error, write.data()
    assert write.code in writing
    edit = await target.call("Edit", file_path=path, old_string="a", new_string="pwned")
    assert edit.is_error


async def test_many_links(target: Target) -> None:
    """More links than the kernel follows are an immediate error; a few inside the workspace work."""
    (target.site / "l0").symlink_to("/srv/site/a.txt")
    for i in range(50):
        (target.site / f"l{i + 1}").symlink_to(f"/srv/site/l{i}")
    target.own()
    assert not (await target.call("Read", file_path="l5")).is_error
    assert (await target.call("Read", file_path="l45")).code == "outside_workspace"


async def test_links_inside(target: Target) -> None:
    """Links that stay inside are followed, relative or absolute; folders are created below them."""
    (target.site / "real" / "deep").mkdir(parents=True)
    (target.site / "real" / "f.txt").write_text("inside\n")
    (target.site / "absolute").symlink_to("/srv/site/real")
    (target.site / "relative").symlink_to("real")
    (target.site / "real" / "deep" / "up").symlink_to("../../real/f.txt")
    target.own()
    for path in ("absolute/f.txt", "relative/f.txt", "real/deep/up", "absolute/deep/up"):
        assert "inside" in (await target.call("Read", file_path=path)).encoded.decode()
    assert not (await target.call("Write", file_path="absolute/new/g.txt", content="g")).is_error
    assert (target.site / "real" / "new" / "g.txt").read_text() == "g"


@needs_root
@pytest.mark.parametrize("number", [(1, 3), (1, 5), (5, 0)])
async def test_device_node(target: Target, number: tuple[int, int]) -> None:
    """A planted device is opened neither for reading nor for writing."""
    os.mknod(target.site / "x", 0o020666, os.makedev(*number))
    target.own()
    # On the nodev mount of a worker the kernel itself refuses.
    assert (await target.call("Read", file_path="x")).code in ("not_a_file", "forbidden")
    assert (await target.call("Write", file_path="x", content="x")).code == "not_a_file"
    assert not (await target.call("Grep", pattern="root")).is_error


async def test_hard_link(target: Target) -> None:
    """Writing onto a hard link leaves its twin alone."""
    os.link(target.site / "a.txt", target.site / "twin.txt")
    assert not (await target.call("Write", file_path="a.txt", content="new")).is_error
    assert (target.site / "twin.txt").read_text() == "alpha\n"


async def test_set_user_id(target: Target) -> None:
    """A set-uid bit does not survive new content."""
    (target.site / "a.txt").chmod(0o6755)
    assert not (await target.call("Edit", file_path="a.txt", old_string="alpha", new_string="x")).is_error
    assert (target.site / "a.txt").stat().st_mode & 0o7777 == 0o755


async def test_large(target: Target) -> None:
    """Sparse, endless and huge content is limited, and the answer says so."""
    with open(target.site / "sparse.txt", "wb") as file:
        file.truncate(1 << 40)
    with open(target.site / "hole.txt", "wb") as file:
        file.write(b"line\n" * 400_000)
        file.seek(50 << 30)
        file.write(b"end\n")
    (target.site / "wide.txt").write_text("w" * 200_000)
    target.own()
    assert (await target.call("Read", file_path="sparse.txt")).code == "too_large"
    assert (await target.call("Read", file_path="sparse.txt", offset=1, limit=1)).code == "too_large"
    assert not (await target.call("Read", file_path="hole.txt", offset=399_999, limit=1)).is_error
    past = await target.call("Read", file_path="hole.txt", offset=400_002, limit=1)
    assert "400002" in past.encoded.decode()
    assert (await target.call("Read", file_path="hole.txt", offset=400_001, limit=1)).code == "too_large"
    wide = await target.call("Read", file_path="wide.txt")
    assert not wide.is_error and len(wide.encoded) < 150_000  # its beginning
    assert not (await target.call("Grep", pattern="w+", output_mode="content")).is_error
    assert (await target.call("Edit", file_path="sparse.txt", old_string="a", new_string="b")).is_error
    result = await target.call("Write", file_path="big.txt", content="x" * (9 << 20))
    assert result.code == "too_large"
    assert not (target.site / "big.txt").exists()


async def test_names(target: Target) -> None:
    """Names with newlines, escapes and invalid UTF-8 are returned escaped, one per line, in valid JSON."""
    for name in (
        b"new\nline.txt",
        b"esc\x1b[31m.txt",
        b"bad\xff\xfe.txt",
        b"\xed\xa0\x80.txt",
        "r‮l.txt".encode(),
    ):
        with open(os.path.join(os.fsencode(target.site), name), "w") as file:
            file.write("needle\n")
    target.own()
    for result in (
        await target.call("Glob", pattern="*.txt"),
        await target.call("Grep", pattern="needle"),
        await target.call("Grep", pattern="needle", output_mode="content"),
        await target.call("Grep", pattern="needle", output_mode="count"),
    ):
        text = result.data()["content"][0]["text"]
        assert "new\\nline.txt" in text
        assert "bad\\xff\\xfe.txt" in text
        assert "\x1b" not in text
        assert "‮" not in text
    assert (await target.call("Read", file_path="new.txt")).is_error
    missing = await target.call("Read", file_path="no\x1b[31m.txt")
    assert "\x1b" not in missing.data()["content"][0]["text"]


async def test_ignore_files(target: Target) -> None:
    """Ignore files that are FIFOs, links or bombs do not hang, leak or slow down a search."""
    for name in ("fifo", "link", "bomb"):
        folder = target.site / name
        (folder / ".git" / "info").mkdir(parents=True)
        (folder / ("a" * 200)).write_text("needle")
    os.mkfifo(target.site / "fifo" / ".gitignore")
    os.mkfifo(target.site / "fifo" / ".git" / "info" / "exclude")
    (target.site / "link" / ".gitignore").symlink_to(target.host / "secret.txt")
    (target.site / "bomb" / ".gitignore").write_text("*a" * 40 + "b\n" + "{a,{b,{c,\n[\n\\\n" + "**/" * 600)
    target.own()
    result = await target.call("Grep", pattern="needle", within=10)
    assert result.data()["structuredContent"]["total"] == 3


async def test_patterns(target: Target) -> None:
    """Patterns designed to explode are answered in time."""
    (target.site / "a.txt").write_text("a" * 50_000)
    (target.site / ("a" * 250)).touch()
    target.own()
    for pattern in ("(a+)+$", "(a|a)*b", "(.*)*x", "a{1000}{1000}", "(?:(?:a{100}){100}){100}"):
        await target.call("Grep", pattern=pattern, within=10)
        await target.call("Grep", pattern=pattern, multiline=True, within=10)
    for glob in ("*a" * 50 + "b", "{a,b}" * 200, "**/" * 100 + "*", "[a-z]*" * 60, "{" * 50, "x" * 5000):
        await target.call("Glob", pattern=glob, within=10)
        await target.call("Grep", pattern="a", glob=glob, within=10)
    assert (await target.call("Grep", pattern="(?=a)")).code == "invalid_params"


async def test_deep_tree(target: Target) -> None:
    """A tree too deep for a path is searched as far as paths reach."""
    place = os.open(target.site, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d" * 40, dir_fd=place)
        if os.getuid() == 0:
            os.chown("d" * 40, USER, USER, dir_fd=place)
        below = os.open("d" * 40, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = below
    os.close(os.open("deep.txt", os.O_CREAT | os.O_WRONLY, dir_fd=place))
    os.close(place)
    assert not (await target.call("Glob", pattern="**/*.txt")).is_error
    assert not (await target.call("Grep", pattern="alpha")).is_error
    # Python's own removal stops at names over PATH_MAX.
    subprocess.run(["rm", "-rf", str(target.site / ("d" * 40))], check=True)


async def test_crowded_folder(target: Target) -> None:
    """A folder with too many entries is searched up to the limit, and the answer says so."""
    here: Any = target.tools._workers
    if not isinstance(here, HereWorkers):
        pytest.skip("the bound is the same code; once is enough")
    here._workspace = type(here._workspace)(here._workspace.root, type(here._workspace.limits)(visit_max=500))
    for i in range(1000):
        (target.site / f"f{i}").touch()
    result = await target.call("Glob", pattern="*")
    text = result.data()["content"][0]["text"]
    assert "stopped after 500" in text
    assert result.data()["structuredContent"]["truncated"] is True


# Races

# Runs as a process of its own and swaps as fast as it can until it is killed; argv: what, workspace, outside.
ATTACKER = r"""
import ctypes, os, sys
what, site, outside = sys.argv[1:]
os.chdir(site)
libc = ctypes.CDLL(None, use_errno=True)
def exchange(a, b):
    if libc.renameat2(-100, a, -100, b, 2): raise OSError(ctypes.get_errno(), "renameat2")
def quietly(call, *arguments):
    try: call(*arguments)
    except OSError: pass
print("ready", flush=True)
while True:
    if what == "file": exchange(b"prey.txt", b"bait")
    elif what == "folder": exchange(b"folder", b"way-out")
    elif what == "fifo": exchange(b"prey.txt", b"pipe")
    elif what == "dotdot":
        quietly(os.rename, "in/deep", outside + "/moved"); quietly(os.rename, outside + "/moved", "in/deep")
    elif what == "churn":
        quietly(os.rename, "prey.txt", "gone.txt"); quietly(os.rename, "gone.txt", "prey.txt")
"""


def arena(target: Target) -> None:
    site, host = target.site, target.host
    (site / "prey.txt").write_text("harmless\n")
    (site / "bait").symlink_to(host / "secret.txt")
    (site / "folder").mkdir()
    (site / "folder" / "secret.txt").write_text("harmless\n")
    (site / "way-out").symlink_to(host)
    os.mkfifo(site / "pipe")
    (site / "in" / "deep").mkdir(parents=True)
    (site / "in" / "deep" / "back").symlink_to("../../prey.txt")
    target.own()


def naive(site: Path, name: str) -> str:
    """Read as a naive gateway would: resolve, compare the prefix, open."""
    try:
        path = os.path.realpath(site / name)
        if not path.startswith(str(site) + "/"):
            return ""
        return Path(path).read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("what", ["file", "folder", "fifo", "dotdot", "churn"])
async def test_race(target: Target, what: str) -> None:
    """While the tenant swaps paths as fast as it can, nothing leaks, hangs, or lands outside."""
    if what in ("file", "folder", "fifo") and sys.platform != "linux":
        pytest.skip("the attack needs renameat2")
    arena(target)
    attacker = subprocess.Popen(
        [sys.executable, "-c", ATTACKER, what, str(target.site), str(target.root.path / "srv")],
        stdout=subprocess.PIPE,
    )
    try:
        assert attacker.stdout is not None
        await asyncio.to_thread(attacker.stdout.readline)
        until = time.monotonic() + RACE_SECONDS
        rounds = 0
        while time.monotonic() < until or rounds < 10:
            rounds += 1
            for path in ("prey.txt", "folder/secret.txt", "in/deep/back", "in/deep/../deep/back"):
                await target.call("Read", file_path=path)
            await target.call("Grep", pattern="host-secret", output_mode="content")
            await target.call("Glob", pattern="**/secret.txt")
            await target.call("Write", file_path="folder/new/made.txt", content="mine")
            await target.call("Write", file_path="prey.txt", content="harmless\n")
            await target.call("Edit", file_path="prey.txt", old_string="harmless", new_string="harmless!")
    finally:
        attacker.kill()
        attacker.wait()
        attacker.stdout and attacker.stdout.close()


async def test_naive_check_leaks(tmp_path: Path, running: Workers) -> None:
    """The same race against the usual check does leak, so the races above are effective."""
    target = Target(tmp_path, make_root(tmp_path, "tenant"), FileTools(running, Settings()))
    arena(target)
    with subprocess.Popen(
        [sys.executable, "-c", ATTACKER, "file", str(target.site), "/"], stdout=subprocess.PIPE
    ) as attacker:
        try:
            assert attacker.stdout is not None
            attacker.stdout.readline()
            until = time.monotonic() + 20
            leaked = False
            while not leaked and time.monotonic() < until:
                leaked = SECRET in naive(target.site, "prey.txt")
        finally:
            attacker.kill()
    assert leaked


# Large trees, which Grep has looked through by `scanning`

# As the attacker above, all at once; argv: workspace, a folder of the tenant outside of it.
SWAPPER = r"""
import ctypes, fcntl, os, signal, sys
site, outside = sys.argv[1:]
os.chdir(site)
signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel's word that somebody wants the leased file
libc = ctypes.CDLL(None, use_errno=True)
def exchange(a, b):
    if libc.renameat2(-100, a, -100, b, 2): raise OSError(ctypes.get_errno(), "renameat2")
def quietly(call, *arguments):
    try: call(*arguments)
    except OSError: pass
def go(away, back):
    quietly(os.rename, away, back); quietly(os.rename, back, away)
writer = os.open("lair/held-pipe", os.O_RDWR | os.O_NONBLOCK)
grows = os.open("many/grows.txt", os.O_WRONLY | os.O_APPEND)
leased = os.open("many/leased.txt", os.O_RDWR)
quietly(fcntl.fcntl, leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
pairs = [(b"many/" + name, b"lair/" + name) for name in map(os.fsencode, os.listdir("lair"))]
pairs = [pair for pair in pairs if os.path.lexists(pair[0])]
print("ready", flush=True)
while True:
    for pair in pairs: exchange(*pair)
    exchange(b"quiet", b"way-out")
    go("up/and/down", "down"); go("up/and", "and"); go("up", outside + "/moved")
    os.write(grows, b"host-secret: harmless\n" * 3000)
    if os.fstat(grows).st_size > 20 << 20: os.ftruncate(grows, 0)
    quietly(fcntl.fcntl, leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
"""
MODES = ("files_with_matches", "content", "count")


def lair(target: Target) -> None:
    """Create more files than a short Grep reads, and files to swap; only outside files match in `quiet…`."""
    site, host = target.site, target.host
    for folder in ("many", "lair", "quiet", "up/and/down"):
        (site / folder).mkdir(parents=True)
    for number in range(1200):
        (site / "many" / f"f{number:04}.txt").write_text("host-secret: harmless\n" if number % 9 else "no\n")
    for name in ("prey.txt", "pipe", "held-pipe", "socket", "device", "grows.txt", "leased.txt"):
        (site / "many" / name).write_text("host-secret: harmless\n")
    (site / "up/and/down/f.txt").write_text("host-secret: harmless\n")
    for name in ("many/quiet.txt", "quiet/secret.txt", "quiet/" + OUTSIDE.replace("outside", "inside")):
        (site / name).write_text("nothing\n")
    with open(site / "many" / "sparse.txt", "wb") as file:
        file.truncate(1 << 40)
    (site / "lair" / "prey.txt").symlink_to(host / "secret.txt")
    (site / "lair" / "quiet.txt").symlink_to(host / "secret.txt")
    (site / "way-out").symlink_to(host)
    os.mkfifo(site / "lair" / "pipe")
    os.mkfifo(site / "lair" / "held-pipe")
    os.mknod(site / "lair" / "socket", stat.S_IFSOCK | 0o666)  # a bound one's path may have 107 bytes
    if os.getuid() == 0:
        os.mknod(site / "lair" / "device", 0o020666, os.makedev(1, 5))
    target.own()


@contextmanager
def swapped(target: Target) -> Iterator[None]:
    """Swap the files of `lair` as fast as possible."""
    with subprocess.Popen(
        [sys.executable, "-c", SWAPPER, str(target.site), str(target.root.path / "srv")],
        stdout=subprocess.PIPE,
    ) as attacker:
        try:
            assert attacker.stdout is not None
            assert attacker.stdout.readline() == b"ready\n"
            yield
            assert attacker.poll() is None
        finally:
            attacker.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="the attack needs renameat2")
async def test_race_of_large_searches(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a large tree are opened by name while they are replaced by links, pipes, devices, or moved."""
    lair(target)
    workers = target.tools._workers
    if isinstance(workers, HereWorkers):
        workers._large = True
    found: list[bytes | None] = []
    scan = workers.scan

    async def seen(*arguments: Any) -> bytes | None:
        found.append(await scan(*arguments))
        return found[-1]

    monkeypatch.setattr(workers, "scan", seen)
    asked = 0
    with swapped(target):
        until = time.monotonic() + 5 * RACE_SECONDS
        while time.monotonic() < until or asked < 6:
            mode = MODES[asked % 3]
            asked += 1
            result = await target.call("Grep", pattern="host-secret", output_mode=mode, head_limit=0)
            assert not result.is_error, result.data()
            # whether a link's target matches, is told by no name
            assert "quiet" not in result.encoded.decode()
    # it was the way of large trees each time, and what it says was not sorted out only later
    assert len(found) == asked
    assert all(names and b"many/f0001.txt" in names and b"quiet" not in names for names in found)


@pytest.mark.skipif(sys.platform != "linux", reason="the attack needs renameat2")
@pytest.mark.parametrize("without", ["O_NOFOLLOW", "open_real"])
async def test_naive_scan_leaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    """The same scan without precautions does find files outside, so the race above is effective."""
    here = HereWorkers((root := make_root(tmp_path, "tenant")).path / "srv" / "site", large=True)
    target = Target(tmp_path, root, FileTools(here, Settings()))  # type: ignore[arg-type]  # stand-in
    lair(target)
    if without == "O_NOFOLLOW":
        monkeypatch.setattr(grep, "_FLAGS", grep._FLAGS & ~os.O_NOFOLLOW)
    else:
        monkeypatch.setattr(
            Root,
            "open_real",
            lambda tree, path, flags: os.open(path or ".", flags, dir_fd=tree.descriptor),
        )
    asked = {"input": {"pattern": "host-secret"}, "cwd": "/srv/site"}
    with swapped(target):
        until = time.monotonic() + 20
        while b"quiet" not in (await here.scan(root, asked, 3) or b"") and time.monotonic() < until:
            pass
    here.close()
    assert b"quiet" in (here.scanned or b"")
