"""Large Greps of a real container's workspace, while its root swaps, moves and grows what they look into.

`tests/unit/test_rootfs_attacks.py` has the same over the safe paths alone. Here the mounts and ids are real,
and what is outside is the container's as well as the host's.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.rootfs import FilesystemRoot
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.root import Root
from gateway.rootfs.worker import Workspace
from gateway.rootfs.workers import Workers
from gateway.runtime.incus import IncusRuntime
from gateway.settings import Settings
from gateway.tools import grep
from gateway.tools.session import ToolSession
from gateway.tools.toolbox import FileTools
from tests.integration import environment
from tests.integration.conftest import Container
from tests.integration.test_attacks import SECONDS, SECRET, emptied, pool, victim

__all__ = ["pool", "victim"]  # fixtures

OUTSIDE = "outside-name.txt"  # of a file beside the secrets

# What `quiet…` holds does not match: only what is outside would have it named. %s is the host's folder.
LAY = r"""
cd /srv/site; mkdir many lair quiet quiet-too up up/and up/and/down
for i in $(seq 1200); do echo host-secret: harmless > many/f$i.txt; done
for f in prey pipe held-pipe socket grows; do echo host-secret: harmless > many/$f; done
echo host-secret: harmless > up/and/down/f.txt
for f in many/quiet many/quiet-too quiet/marker quiet-too/secret.txt; do echo nothing > $f; done
truncate -s 1T many/sparse
ln -s %s/secret.txt lair/prey; ln -s %s/secret.txt lair/quiet; ln -s ../../../etc/marker lair/quiet-too
ln -s ../../etc way-etc; ln -s %s way-host; mkfifo lair/pipe lair/held-pipe
perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0); bind(S, sockaddr_un("lair/socket")) or die'
"""

ATTACKER = r"""
use Fcntl;
my ($renameat2) = @ARGV;
chdir "/srv/site" or die;
sub swap { my ($a, $b) = @_; syscall($renameat2, -100, $a, -100, $b, 2); }
sub go { my ($a, $b) = @_; rename($a, $b); rename($b, $a); }
sysopen(my $writer, "lair/held-pipe", O_RDWR | O_NONBLOCK) or die;
open(my $grows, ">>", "many/grows") or die;
my @names = ("prey", "quiet", "quiet-too", "pipe", "held-pipe", "socket");
$| = 1; print "ready\n";
while (1) {
    swap("many/$_", "lair/$_") for @names;
    swap("quiet", "way-etc"); swap("quiet-too", "way-host");
    go("up/and/down", "down"); go("up/and", "and"); go("up", "/srv/moved"); go("quiet", "/etc/moved");
    syswrite($grows, "host-secret: harmless\n" x 3000);
    truncate($grows, 0) if -s $grows > 20 << 20;
}
"""
MODES = ("files_with_matches", "content", "count")


@contextmanager
def attacked(tenant: Container) -> Iterator[None]:
    number = {"x86_64": 316, "aarch64": 276}[os.uname().machine]
    process = subprocess.Popen(
        ["incus", "exec", tenant.name, "-T", "--", "perl", "-e", ATTACKER, str(number)],
        env=environment.daemon().environment,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
        assert process.poll() is None
    finally:
        tenant.run("pkill", "-KILL", "perl", check=False)
        process.communicate(timeout=20)


@pytest.fixture
async def workers(incus_settings: Settings) -> AsyncIterator[Workers]:
    async with Workers(incus_settings, IncusRuntime(incus_settings).locations) as running:
        yield running


@pytest.fixture
async def tenant(victim: Container, tmp_path: Path) -> AsyncIterator[Container]:
    tenant = emptied(victim)
    for name in ("secret.txt", OUTSIDE):
        (tmp_path / name).write_text(SECRET)
    # So that nothing but our own care keeps a worker from it.
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/") and folder.owner() == "root":
            folder.chmod(folder.stat().st_mode | 0o055)
    tenant.sh(f"for f in marker {OUTSIDE}; do echo {SECRET} > /etc/$f; done")
    laid = tenant.run("sh", "-ec", LAY.replace("%s", str(tmp_path)), user=1000)
    assert laid.stderr == b""
    yield tenant
    tenant.sh(f"rm /etc/{OUTSIDE}")


@pytest.mark.timeout(120)
async def test_races(
    pool: str,
    tenant: Container,
    workers: Workers,
    incus_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In every mode nothing from outside is told, not even that it matches; nothing hangs."""
    before = sorted(tmp_path.rglob("*")), (tmp_path / "secret.txt").stat()
    root, tools = FilesystemRoot(tenant.name, incus_settings.workspace), FileTools(workers, incus_settings)
    named: list[bytes | None] = []
    scan = workers.scan

    async def seen(*arguments: Any) -> bytes | None:
        named.append(await scan(*arguments))
        return named[-1]

    monkeypatch.setattr(workers, "scan", seen)
    asked, slowest = 0, 0.0
    with attacked(tenant):
        until = time.monotonic() + 2 * SECONDS
        while time.monotonic() < until or asked < 6:
            given = {"pattern": "host-secret", "output_mode": MODES[asked % 3], "head_limit": 0}
            began = time.monotonic()
            async with asyncio.timeout(60):
                result = await tools.call(root, ToolSession(), "Grep", given)
            slowest = max(slowest, time.monotonic() - began)
            asked += 1
            text = result.encoded.decode()
            assert not result.is_error, text[:1000]
            for outside in (SECRET, OUTSIDE, "quiet", str(tmp_path)):
                assert outside not in text
    # it was the way of large trees each time, and what it says was not sorted out only later
    assert len(named) == asked
    assert all(names and b"many/f77.txt" in names and b"quiet" not in names for names in named)
    status = (tmp_path / "secret.txt").stat()
    assert (sorted(tmp_path.rglob("*")), status.st_mtime_ns) == (before[0], before[1].st_mtime_ns)
    rootfs = environment.rootfs(tenant.name, pool)
    assert (rootfs / "etc/marker").read_text() == SECRET + "\n"
    assert list(rootfs.rglob(".gateway-*")) == []
    print(f"{asked} searches, slowest {slowest * 1000:.0f} ms")


@pytest.mark.parametrize("careful", [True, False])
async def test_without_a_worker(tenant: Container, careful: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the host's root, who may read all of it, our way of opening alone keeps out; any other leaks."""
    site = environment.rootfs(tenant.name, environment.settings().pool) / "srv/site"
    if not careful:
        monkeypatch.setattr(grep, "_FLAGS", grep._FLAGS & ~os.O_NOFOLLOW)
    tree = Root(os.open(site, os.O_RDONLY | os.O_DIRECTORY), "/srv/site")
    asked = {"input": {"pattern": "host-secret"}, "cwd": "/srv/site", "share": [0, 1]}

    def leaks() -> bool:
        named = grep.scan(Workspace(tree, CallLimits()), asked)
        assert b"many/f77.txt" in named
        return b"quiet" in named

    with attacked(tenant):
        until = time.monotonic() + (SECONDS if careful else 30)
        found = False
        while not found and time.monotonic() < until:
            found = await asyncio.to_thread(leaks)
    tree.close()
    assert found is not careful
