"""A process inside a real container swaps paths as fast as it can, while the tools work on them.

By websocket through a live gateway, on the tenants' own pool with its idmapped mounts; the same on one of
plain folders is in `test_pool_of_folders`. `tests/unit/test_rootfs_attacks.py` has what can be laid into a
workspace layer by layer; here are the races, which need the real mounts, ids and kernel paths.
GATEWAY_TEST_RACE_SECONDS sets the seconds of each of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway.rootfs.walk import KEPT_NAMES_MAX
from gateway.settings import Settings
from tests.integration import environment
from tests.integration.conftest import Container, make_containers
from tests.integration.test_gateway_incus import live
from tests.live import LiveGateway, RpcFailure, Wire
from tests.waits import until

SECONDS = float(os.environ.get("GATEWAY_TEST_RACE_SECONDS", "0.5"))
SECRET = "host-secret-9d1f"
DEADLINE = 15.0  # seconds for every call to answer, on a machine that others use, too

# Perl is part of every Debian. Its arguments: the attack, and the number of the system call renameat2.
ATTACKER = r"""
my ($what, $renameat2) = @ARGV;
chdir "/srv/site" or die;
sub swap { my ($a, $b) = @_; syscall($renameat2, -100, $a, -100, $b, 2); }
$| = 1; print "ready\n";
while (1) {
    if ($what eq "file") { swap("prey.txt", "bait") }
    elsif ($what eq "tenant") { swap("prey.txt", "bait-tenant") }
    elsif ($what eq "folder") { swap("folder", "way-out") }
    elsif ($what eq "magic") { swap("folder", "magic") }
    elsif ($what eq "fifo") { swap("prey.txt", "pipe") }
    elsif ($what eq "dotdot") { rename("in/deep", "/srv/moved"); rename("/srv/moved", "in/deep") }
    elsif ($what eq "churn") { rename("prey.txt", "gone.txt"); rename("gone.txt", "prey.txt") }
    elsif ($what eq "workspace") { swap("/srv/site", "/srv/decoy") }
}
"""

# The attack, and the user that runs it. Some need root, which a tenant has in its container.
RACES = [
    ("file", 1000),
    ("folder", 1000),
    ("fifo", 1000),
    ("churn", 1000),
    ("tenant", 1000),
    ("magic", 1000),
    ("file", 0),
    ("folder", 0),
    ("dotdot", 0),
    ("workspace", 0),
]


@dataclass
class Arena:
    """A tenant whose workspace contains bait, the files outside, and counts of the answers."""

    container: Container
    wire: Wire
    secret: Path
    rootfs: Path
    calls: int = 0
    slowest: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)

    async def call(self, tool: str, **given: object) -> str | None:
        """Run a tool; return its error's code. Fails if the answer is late or contains the secret."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(DEADLINE):
                answer = await self.wire.call("tools/call", name=tool, arguments=given)
        except RpcFailure as error:
            text, code = str(error), error.code
        else:
            text, code = json.dumps(answer), answer["structuredContent"].get("code")
        assert SECRET not in text
        assert str(environment.INCUS_DIR) not in text and str(self.secret.parent) not in text
        if code:
            self.refused[code] = self.refused.get(code, 0) + 1
        self.calls += 1
        self.slowest = max(self.slowest, time.monotonic() - started)
        return code

    async def round(self) -> None:
        """Use every tool at least once on what is being swapped."""
        for path in ("prey.txt", "folder/secret.txt", "in/deep/back", "bait", "way-out/secret.txt"):
            await self.call("Read", file_path=path)
        await self.call("Grep", pattern="host-secret", output_mode="content")
        await self.call("Glob", pattern="**/secret.txt")
        await self.call("Write", file_path="folder/new/made.txt", content="mine")
        await self.call("Write", file_path="prey.txt", content="harmless\n")
        await self.call("Edit", file_path="prey.txt", old_string="harmless", new_string="harmless!")

    @contextmanager
    def attacked(self, what: str, user: int) -> Iterator[None]:
        """Run the attacker inside the container: one process, as the tests have one core to spare."""
        command = ["incus", "exec", self.container.name, f"--user={user}", "-T", "--", "perl", "-e", ATTACKER]
        number = {"x86_64": 316, "aarch64": 276}[os.uname().machine]
        process = subprocess.Popen(
            [*command, what, str(number)],
            env=environment.daemon().environment,
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            self.container.run("pkill", "-KILL", "perl", check=False)
            process.communicate(timeout=20)


@pytest.fixture(scope="module")
async def gateway(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveGateway]:
    async with live(incus_settings, tmp_path_factory.mktemp("attacks") / "gateway.log") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def pool(incus_settings: Settings) -> str:
    """The tenants' own pool."""
    return incus_settings.pool


@pytest.fixture(scope="module")
async def victim(pool: str, incus_settings: Settings) -> AsyncIterator[Container]:
    """A running tenant on that pool, which is attacked from inside; it is `emptied` between two attacks."""
    async with make_containers("victim", incus_settings, 1, pool=pool) as (container,):
        yield container


EMPTIED = """
awk '$2 ~ "^/srv/" { print $2 }' /proc/self/mounts | sort -r | xargs --no-run-if-empty --max-args=1 umount
if [ "$(stat -c %U /srv/site)" != site ]; then
  mv -T /srv/site /srv/other; mv -T /srv/decoy /srv/site
fi
find /srv/site -mindepth 1 -delete
find /srv -mindepth 1 -maxdepth 1 ! -name site -exec rm -rf {} +
rm -rf /etc/marker /etc/moved
[ "$(stat -c %U:%G:%a /srv/site)" = site:site:755 ]
"""


def emptied(victim: Container) -> Container:
    """Put away what an attack left in it: its workspace is as at first, and there is nothing beside it."""
    victim.sh(f"set -e{EMPTIED}")
    return victim


@pytest.fixture
async def arena(pool: str, victim: Container, gateway: LiveGateway, tmp_path: Path) -> AsyncIterator[Arena]:
    emptied(victim)
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    # So that nothing but our own care keeps a worker from it.
    for folder in (secret, *secret.parents):
        if folder != Path("/") and folder.owner() == "root":
            folder.chmod(folder.stat().st_mode | 0o055)
    victim.sh(
        f"""
        echo {SECRET} > /etc/marker; mkdir -p /srv/decoy /srv/way; echo {SECRET} > /srv/way/secret.txt
        chown site:site /srv/way /srv/way/secret.txt; ln -s {secret.parent} /srv/decoy/prey.txt
        """
    )
    victim.sh(
        f"""
        cd /srv/site; echo harmless > prey.txt; ln -s {secret} bait; ln -s ../../etc/marker bait-tenant
        mkdir -p folder in/deep; echo harmless > folder/secret.txt; ln -s {secret.parent} way-out
        ln -s /proc/self/root/etc magic; mkfifo pipe; ln -s ../../prey.txt in/deep/back
        """,
        user=1000,
    )
    async with gateway.wire(victim.name) as wire:
        arena = Arena(victim, wire, secret, environment.rootfs(victim.name, pool))

        async def seen() -> bool:  # a worker of before may still be in what the last attack put there
            return await arena.call("Read", file_path="prey.txt") is None

        await until(seen)
        arena.calls, arena.slowest, arena.refused = 0, 0.0, {}
        yield arena


@pytest.mark.timeout(300)
async def test_races(arena: Arena) -> None:
    """No attack leaks anything, hangs a call, writes outside, or leaves an unfinished file."""
    before = sorted(arena.secret.parent.rglob("*")), arena.secret.stat().st_mtime_ns
    for what, user in RACES:
        with arena.attacked(what, user):
            end = time.monotonic() + SECONDS
            enough = arena.calls + 20
            while time.monotonic() < end or arena.calls < enough:
                await arena.round()
    assert (sorted(arena.secret.parent.rglob("*")), arena.secret.stat().st_mtime_ns) == before
    assert arena.secret.read_text() == SECRET
    assert arena.container.sh("find / -xdev -name '.gateway-*' 2>/dev/null").strip() == ""
    assert arena.container.sh("cat /etc/marker /srv/way/secret.txt").split() == [SECRET, SECRET]
    print(f"{arena.calls} calls, slowest {arena.slowest * 1000:.0f} ms, refused {arena.refused}")


async def test_naive_check_leaks(arena: Arena) -> None:
    """The usual check (resolve, compare the prefix, open) does leak under the same attack."""
    site = arena.rootfs / "srv/site"

    def naive(name: str) -> str:
        try:
            path = os.path.realpath(site / name)
            if not path.startswith(str(site) + "/"):
                return ""
            return Path(path).read_text()
        except OSError:
            return ""

    def leaks() -> bool:
        return any(SECRET in naive("prey.txt") for _ in range(50_000))

    with arena.attacked("file", 1000):
        end = time.monotonic() + 30
        found = False
        while not found and time.monotonic() < end:
            found = await asyncio.to_thread(leaks)
    assert found


async def test_tenant_mounts(arena: Arena) -> None:
    """The tools do not enter what a tenant mounts over its workspace: they serve what is on disk."""
    arena.container.sh(f"mount -t tmpfs none /srv/site/folder && echo {SECRET} > /srv/site/folder/secret.txt")
    arena.container.sh("mount --bind /etc /srv/site/in")
    for path in ("folder/secret.txt", "in/marker", "in/passwd"):
        await arena.call("Read", file_path=path)
    await arena.call("Grep", pattern="host-secret")
    assert arena.container.sh("cat /srv/site/folder/secret.txt").strip() == SECRET


async def test_workers_do_not_see_each_other(arena: Arena) -> None:
    """A tenant's root cannot see, signal or trace the worker that serves its own workspace."""
    await arena.call("Read", file_path="prey.txt")
    seen = arena.container.sh("grep -l [g]ateway.rootfs /proc/[0-9]*/cmdline 2>/dev/null || true")
    assert seen.strip() == ""


# What a tenant creates by hand, as its user. %s is the host's folder with the secret.
LAY = r"""
cd /srv/site; mkdir t; cd t; echo harmless > file; mkdir dir
ln -s %s/secret.txt host; ln -s %s host-dir; ln -s ../../../etc/marker tenant; ln -s ../../way twin-dir
ln -s /proc/self/root/etc/passwd magic; ln -s /proc/self/cwd magic-dir; ln -s %s/new dangling
ln -s loop loop; ln -s b a; ln -s a b
ln -s /srv/site/t/file l0; for i in $(seq 45); do ln -s l$((i-1)) l$i; done
ln -s file inside; ln -s /srv/site/t/file inside-absolute; ln file twin; mkfifo fifo
echo suid > suid; chmod 6755 suid
perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0); bind(S, sockaddr_un("socket")) or die'
truncate -s 1T sparse.txt; yes line | head -c 2000000 > hole.txt; truncate -s 50G hole.txt
head -c 200000 /dev/zero | tr '\0' w > wide.txt; printf 'bad \377 text' > invalid.txt
touch "$(printf 'new\nline')" "$(printf 'esc\033x')" "$(printf 'bad\377')"
mkdir -p git/.git; mkfifo git/.gitignore; echo needle > git/found
perl -e 'for (1..300) { mkdir "d" x 40; chdir "d" x 40 or die }'
"""

OUT, NOT, DIR, BAD, LARGE = "outside_workspace", "not_a_file", "is_a_directory", "invalid_params", "too_large"
# The path, and the codes with which reading and writing it answer; None if it works.
TABLE: list[tuple[str, set[str | None], set[str | None]]] = [
    ("../../etc/passwd", {OUT}, {OUT}),
    ("/etc/passwd", {OUT}, {OUT}),
    ("/srv/site-evil/secret.txt", {OUT}, {OUT}),
    ("t/host", {OUT}, {NOT}),
    ("t/host-dir/secret.txt", {OUT}, {OUT}),
    ("t/host-dir/new/deeper", {OUT}, {OUT}),
    ("t/tenant", {OUT}, {NOT}),
    ("t/twin-dir/secret.txt", {OUT}, {OUT}),
    ("t/magic", {OUT}, {NOT}),
    ("t/magic-dir/x", {OUT}, {OUT}),
    ("t/dangling", {OUT}, {NOT}),
    ("t/loop", {OUT}, {NOT}),
    ("t/a/x", {OUT}, {OUT}),
    ("t/l45", {OUT}, {NOT}),
    ("t/inside", {None}, {NOT}),
    ("t/inside-absolute", {None}, {NOT}),
    ("t/fifo", {NOT}, {NOT}),
    ("t/socket", {NOT}, {NOT}),
    ("/dev/zero", {NOT}, {OUT}),
    ("t/dir", {DIR}, {DIR}),
    ("t/file/x", {NOT}, {NOT}),
    ("a\0b", {BAD}, {BAD}),
    ("", {DIR}, {DIR}),
    ("n" * 300, {BAD}, {BAD}),
    ("n/" * 3000 + "x", {BAD}, {BAD}),
    ("t/sparse.txt", {LARGE}, {None}),
    ("t/hole.txt", {LARGE}, {None}),
    ("t/wide.txt", {None}, {None}),  # its beginning
    ("t/invalid.txt", {None}, {"binary_file"}),
    ("t/twin", {None}, {None}),
    ("t/suid", {None}, {None}),
]


@pytest.mark.timeout(120)
async def test_table(arena: Arena) -> None:
    """Every path of the table is answered with its code, while paths next to it are being swapped."""
    folder = str(arena.secret.parent)
    arena.container.sh(LAY.replace("%s", folder), user=1000)
    before = arena.secret.stat().st_mtime_ns, sorted(arena.secret.parent.iterdir())
    with arena.attacked("folder", 1000):
        for path, reading, writing in TABLE:
            assert await arena.call("Read", file_path=path) in reading, path
            assert await arena.call("Write", file_path=path, content="mine") in writing, path
        assert await arena.call("Write", file_path="t/big", content="x" * (9 << 20)) == LARGE
        for call in (
            {"tool": "Read", "file_path": "t/hole.txt", "offset": 300_000, "limit": 2},
            {"tool": "Glob", "pattern": "**"},
            {"tool": "Glob", "pattern": "*a" * 60 + "b"},
            {"tool": "Glob", "pattern": "{a,b}" * 200},
            {"tool": "Grep", "pattern": "(a+)+$", "output_mode": "content", "head_limit": 0},
            {"tool": "Grep", "pattern": "needle", "path": "t/git"},
        ):
            assert await arena.call(**call) in (None, LARGE)
    assert (arena.secret.stat().st_mtime_ns, sorted(arena.secret.parent.iterdir())) == before
    told = await arena.wire.call("tools/call", name="Glob", arguments={"pattern": "*", "path": "t"})
    text = told["content"][0]["text"]
    assert all(name in text for name in ("new\\nline", "esc\\x1bx", "bad\\xff")) and "\x1b" not in text
    found = await arena.wire.call("tools/call", name="Grep", arguments={"pattern": "needle", "path": "t/git"})
    assert "git/found" in found["content"][0]["text"]
    listed = arena.container.sh("cd /srv/site/t; cat file; stat -c %a suid; find . -name '.gateway-*'")
    assert listed.split() == ["harmless", "755"]  # the twin's content, and no set-uid bit
    assert not arena.container.sh("cat /srv/way/secret.txt").replace(SECRET, "").strip()


@pytest.mark.timeout(120)
async def test_crowded_folder(arena: Arena) -> None:
    """A folder of more files than a walk remembers costs a bounded answer, and holds up no other call."""
    assert KEPT_NAMES_MAX < 120_000
    make = 'chdir "/srv/site"; mkdir "c"; chdir "c"; for (1..120_000) { open F, ">", "file$_" }'
    arena.container.run("perl", "-e", make, user=1000, timeout=100)
    searching = [
        asyncio.ensure_future(arena.wire.call("tools/call", name=tool, arguments=given))
        for tool, given in (
            ("Glob", {"pattern": "**/file77777*"}),
            ("Grep", {"pattern": "needle"}),
        )
    ]
    began = time.monotonic()
    while not all(search.done() for search in searching):
        assert await arena.call("Read", file_path="prey.txt") is None
    # one that waited for a search would take as long; a busy machine makes both slow
    assert arena.slowest < max(1.0, (time.monotonic() - began) / 4)
    for search in searching:
        if error := search.exception():  # on a busy machine it was ended, and says so
            assert isinstance(error, RpcFailure) and error.code == "timeout"
            continue
        answer = search.result()
        assert len(json.dumps(answer)) < 100_000
        assert not answer["isError"] or answer["structuredContent"]["code"] == "timeout"
    listed = await arena.wire.call("files/list", path="c")
    assert listed["truncated"] and len(listed["entries"]) <= 10_000
