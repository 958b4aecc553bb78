"""Opening the outputs of a command by way of incusd's helper, which a tenant may imitate.

`tests/integration/test_runtime_incus.py` does it with the real one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.rootfs import process_tree

# it has the descriptors that it is given as 4 and 5, and a child that is the command
HELPER = """
import os, subprocess, sys
out, err = (os.dup2(int(word), 100 + number) for number, word in enumerate(sys.argv[2:]))
for number, own in ((4, out), (5, err)):
    os.dup2(own, number)
command = subprocess.Popen(["sleep", "60"])
print(command.pid, flush=True)
sys.stdin.read()
command.kill()
"""
Starts = Callable[..., int]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


@pytest.fixture
def starts(tmp_path: Path) -> Iterator[Starts]:
    """Starts a helper with an output and an error; returns its command's pid."""
    helpers: list[subprocess.Popen[bytes]] = []

    def start(out: int, err: int, word: str = "forkexec") -> int:
        # the second word of an interpreter's command line is its script
        argv = [sys.executable, word, "", str(out), str(err)]
        (tmp_path / word).write_text(HELPER)
        helper = subprocess.Popen(
            argv, cwd=tmp_path, pass_fds=(out, err), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        helpers.append(helper)
        assert helper.stdout is not None
        return int(helper.stdout.readline())

    yield start
    for helper in helpers:
        helper.communicate(b"")


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    """A folder in place of a command's cgroup, of which only the list of processes is read."""
    folder = tmp_path / "cgroup"
    folder.mkdir()
    return folder


def lists(cgroup: Path, *pids: int) -> None:
    (cgroup / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))


def test_the_reading_ends_are_those_of_the_helper(starts: Starts, cgroup: Path) -> None:
    """Whatever else is in the cgroup, and whoever has ended."""
    out, err = os.pipe(), os.pipe()
    try:
        lists(cgroup, 1 << 22, os.getpid(), starts(out[1], err[1]))
        opened = process_tree.output_pipes(cgroup)
        try:
            os.write(out[1], b"out")
            os.write(err[1], b"err")
            assert [os.read(descriptor, 100) for descriptor in opened] == [b"out", b"err"]
            for descriptor in opened:
                assert not os.get_blocking(descriptor) and not os.get_inheritable(descriptor)
        finally:
            for descriptor in opened:
                os.close(descriptor)
    finally:
        for descriptor in (*out, *err):
            os.close(descriptor)


@pytest.mark.parametrize("kind", ["other program", "file", "named pipe", "device", "socket"])
def test_nothing_else_is_opened(starts: Starts, cgroup: Path, tmp_path: Path, kind: str) -> None:
    """And what was opened before it was seen is closed."""
    own = os.pipe()
    match kind:
        case "file":
            other = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        case "named pipe":
            os.mkfifo(tmp_path / "pipe")
            other = os.open(tmp_path / "pipe", os.O_RDWR)
        case "device":
            other = os.open("/dev/null", os.O_RDWR)
        case "socket":
            other = socket.socket().detach()
        case _:
            other = os.dup(own[1])
    try:
        lists(cgroup, starts(own[1], other, "other" if kind == "other program" else "forkexec"))
        before = os.listdir("/proc/self/fd")
        assert process_tree.output_pipes(cgroup) == []
        assert os.listdir("/proc/self/fd") == before
    finally:
        for descriptor in (*own, other):
            os.close(descriptor)


@pytest.mark.parametrize("there", [True, False])
def test_a_command_that_has_ended_has_none(cgroup: Path, there: bool) -> None:
    if there:
        lists(cgroup)
    assert process_tree.output_pipes(cgroup) == []


def test_only_the_first_of_many_processes_are_looked_at(starts: Starts, cgroup: Path) -> None:
    out, into = os.pipe()
    try:
        lists(cgroup, *[1 << 22] * 100_000, starts(into, into))
        assert process_tree.output_pipes(cgroup) == []
    finally:
        os.close(out)
        os.close(into)
