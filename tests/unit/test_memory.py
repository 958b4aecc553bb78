"""A container's memory from the kernel's counters, on hybrid and on pure hosts."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.rootfs import memory, process_tree, site_cgroup
from gateway.rootfs.memory import KernelFile, Place
from gateway.rootfs.site_cgroup import SITE

# as read on Linux 6.18 with v1 controllers, of a tenant that thrashed
PRESSURE = (
    "some avg10=60.30 avg60=25.08 avg300=6.38 total=19461259\n"
    "full avg10=60.30 avg60=25.08 avg300=6.38 total=19400002\n"
)
V1_STAT = """\
cache 22106112
workingset_refault_anon 0
workingset_refault_file 28
hierarchical_memory_limit 268435456
hierarchical_memsw_limit 268435456
total_cache 90681344
total_rss 169156608
total_shmem 4096
total_workingset_refault_anon 0
total_workingset_refault_file 5259160
total_pgmajfault 6736
"""
# in the form of Linux 6.12 with v2 alone: Documentation/admin-guide/cgroup-v2.rst
V2_STAT = """\
anon 169156608
file 90681344
kernel 155189248
shmem 4096
slab_reclaimable 151777280
slab_unreclaimable 1253376
workingset_refault_anon 12
workingset_refault_file 5259148
workingset_activate_file 120034
workingset_nodereclaim 0
pgmajfault 6736
"""


def hybrid(folder: Path, **changed: str) -> Place:
    place = Place(folder / "unified", folder / "memory")
    files = {
        "unified/memory.pressure": PRESSURE,
        "memory/memory.stat": V1_STAT,
        "memory/memory.usage_in_bytes": "267579392\n",
        "memory/memory.kmem.usage_in_bytes": "3411968\n",
        "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
    }
    return written(folder, files, changed, place)


def pure(folder: Path, **changed: str) -> Place:
    files = {
        "unified/memory.pressure": PRESSURE,
        "unified/memory.stat": V2_STAT,
        "unified/memory.current": "267579392\n",
        "unified/memory.max": "268435456\n",
        "unified/memory.events": "low 0\nhigh 0\nmax 903224\noom 3\noom_kill 3\noom_group_kill 0\n",
    }
    return written(folder, files, changed, Place(folder / "unified", None))


def written(folder: Path, files: dict[str, str], changed: dict[str, str], place: Place) -> Place:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(changed.get(path.name.replace("memory.", ""), text))
    return place


@pytest.mark.parametrize("host", [hybrid, pure])
def test_both_kinds_of_host_say_the_same(tmp_path: Path, host: object) -> None:
    assert callable(host)
    sample = memory.sample(host(tmp_path))
    assert sample is not None
    assert (sample.stalled, sample.refaults) == (19.461259, 5259160)
    assert (sample.usage, sample.limit, sample.ended) == (267579392, 256 << 20, 3)


@pytest.mark.parametrize("host", [hybrid, pure])
def test_what_the_kernel_can_take_back_is_not_private(tmp_path: Path, host: object) -> None:
    """Neither page cache nor, as far as the kernel tells it, what it knows of files that were looked at."""
    assert callable(host)
    assert memory.private(host(tmp_path)) == 169156608 + 4096 + 3411968


@pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n"])
def test_no_limit_is_none(tmp_path: Path, limit: str) -> None:
    sample = memory.sample(pure(tmp_path, max=limit))
    assert sample is not None and sample.limit is None


def test_a_kernel_before_5_9_has_one_counter(tmp_path: Path) -> None:
    sample = memory.sample(pure(tmp_path, stat="workingset_refault 7\n"))
    assert sample is not None and sample.refaults == 7


def test_without_stall_times_the_rest_is_there(tmp_path: Path) -> None:
    sample = memory.sample(pure(tmp_path, pressure=""))
    assert sample is not None and sample.stalled is None and sample.refaults == 5259160


def test_a_group_that_is_gone_has_none(tmp_path: Path) -> None:
    assert memory.sample(Place(tmp_path / "gone", None)) is None
    assert memory.stalled(Place(tmp_path / "gone", tmp_path / "gone")) is None
    assert site_cgroup.biggest(tmp_path / "gone") is None
    assert memory.private(Place(tmp_path / "gone", None)) is None
    assert memory.private(Place(tmp_path / "gone", tmp_path / "gone")) is None


def test_a_file_that_is_read_again_and_again_is_opened_once(tmp_path: Path) -> None:
    """It returns the current content, also of a recreated cgroup, and its descriptor is closed with it."""
    file = tmp_path / "cgroup.procs"
    held = KernelFile(str(file))
    before = len(os.listdir("/proc/self/fd"))
    assert held.read() == b""
    file.write_bytes(b"12\n")
    assert held.read() == b"12\n"
    file.write_bytes(b"13\n14\n")
    assert held.read() == b"13\n14\n"
    assert len(os.listdir("/proc/self/fd")) == before + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", gone := Gone(os.pread))
        assert held.read() == b"13\n14\n" and gone.told
    del held
    assert len(os.listdir("/proc/self/fd")) == before


class Gone:
    """`os.pread` on a descriptor whose cgroup was removed meanwhile: it fails once."""

    def __init__(self, pread: Callable[[int, int, int], bytes]) -> None:
        self._pread, self.told = pread, False

    def __call__(self, descriptor: int, length: int, offset: int) -> bytes:
        if not self.told:
            self.told = True
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return self._pread(descriptor, length, offset)


@pytest.mark.parametrize(
    "text", ["some total=\n", "some avg10=0.00 total=" + "9" * 30, "x" * 100_000, "\0\xff", "1 2\nfile x\n"]
)
def test_odd_files_are_as_none(tmp_path: Path, text: str) -> None:
    sample = memory.sample(pure(tmp_path, pressure=text, stat=text, current=text, max=text, events=text))
    assert sample is None or (sample.stalled, sample.refaults, sample.usage) == (None, 0, 0)


def test_v1_is_found_by_the_kernels_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container's cgroup in v1's memory is read from its init process, not derived from its v2 name."""
    told = "9:name=systemd:/x\n4:memory:/lxc.payload.shop-3/init.scope\n0::/lxc.payload.shop-3/init.scope\n"
    (tmp_path / "lxc.payload.shop-3").mkdir()
    monkeypatch.setattr(memory, "_memory_mount", lambda: "/v1")
    monkeypatch.setattr(memory, "text", lambda path: told.encode())
    monkeypatch.setattr(process_tree, "of_init", lambda pid: tmp_path / "lxc.payload.shop-3")
    assert memory.place(1) == Place(tmp_path / "lxc.payload.shop-3", Path("/v1/lxc.payload.shop-3"))
    monkeypatch.setattr(memory, "_memory_mount", lambda: None)
    assert memory.place(1) == Place(tmp_path / "lxc.payload.shop-3", None)


# its shell is the first process of a pid namespace, as a container's systemd is, and it the second
HOLD = "import sys; held = bytearray(int(sys.argv[1]) << 20); print('ready', flush=True); sys.stdin.read()"
START = 'echo $$ >"$1/cgroup.procs"; shift; exec unshare --pid --fork sh -c \'"$@" <&3 & wait\' sh "$@" 3<&0'
SMALL, LARGE = 8, 64  # MiB


@pytest.fixture
def container() -> Iterator[Path]:
    """A cgroup of this machine laid out like a container's, with a site and a command."""
    mount = process_tree.mount_point()
    if mount is None or os.getuid() != 0:
        pytest.skip("control groups are made by root")
    path = mount / f"lxc.payload.test-memory-{os.getpid()}"
    below = ("", "system.slice", SITE, "gateway", "gateway/exec")
    for group in below:
        (path / group).mkdir()
    yield path
    (path / "cgroup.kill").write_text("1")
    for group in reversed(below):
        while (path / group).exists():
            with contextlib.suppress(OSError):  # its last process is still on its way out
                (path / group).rmdir()


def held(group: Path, size: int) -> subprocess.Popen[bytes]:
    """Start a process in a cgroup that uses a number of MiB."""
    words = ("sh", "-c", START, "sh", str(group), sys.executable, "-c", HOLD, str(size))
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def test_only_the_sites_biggest_process_is_ended(container: Path) -> None:
    """Not a larger command's, nor the init of its namespace, even if nothing else is left."""
    site, command = container / SITE, container / "gateway/exec"
    with held(site, SMALL) as small, held(site, LARGE) as large, held(command, 2 * LARGE) as other:
        whole = site_cgroup.biggest(container)
        assert whole is not None and 2 * LARGE << 20 <= whole.bytes < 3 * LARGE << 20
        ended = site_cgroup.relieve(container)
        assert ended is not None and LARGE << 20 <= ended.bytes < 2 * LARGE << 20
        assert large.wait(10) is not None and small.poll() is None
        ended = site_cgroup.relieve(container)
        assert ended is not None and ended.bytes < LARGE << 20
        assert small.wait(10) is not None
        assert site_cgroup.relieve(container) is None
        assert other.poll() is None
        other.kill()
        (container / "cgroup.kill").write_text("1")


def test_a_namespaces_first_process_is_left_alone(container: Path) -> None:
    words = ("sh", "-c", 'echo $$ >"$1/cgroup.procs"; exec unshare --pid --fork sleep 60', "sh")
    with subprocess.Popen((*words, str(container / SITE))) as process:
        while len(process_tree.pids(container / SITE)) < 2:
            assert process.poll() is None
        sleeper = max(process_tree.pids(container / SITE))
        assert Path(f"/proc/{sleeper}/status").read_text().count("\nNSpid:") == 1
        assert site_cgroup.relieve(container) is None
        (container / "cgroup.kill").write_text("1")
