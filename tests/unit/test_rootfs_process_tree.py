"""Searching a tenant's processes, with real ones of this machine that have hostile environments."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.rootfs import command_cgroup, process_tree


@contextlib.contextmanager
def process(environment: dict[str, str]) -> Iterator[int]:
    ready, told = os.pipe()
    script = f"printf r >&{told}; exec sleep 600"
    child = subprocess.Popen(["/bin/bash", "-c", script], env=environment, pass_fds=[told])
    os.close(told)
    try:
        assert os.read(ready, 1) == b"r"
        deadline = time.monotonic() + 30
        place = Path(f"/proc/{child.pid}")
        # its name is there a moment before its environment
        while (place / "cmdline").read_bytes() != b"sleep\x00600\0" or (
            environment and not (place / "environ").read_bytes()
        ):
            assert time.monotonic() < deadline
        yield child.pid
    finally:
        os.close(ready)
        child.kill()
        child.wait()


def carries(pid: int, name: bytes) -> bool:
    return process_tree._carries(pid, name, time.monotonic() + 30)


@pytest.mark.parametrize("before", [0, 1, 65_520, 65_536, 100_000])
def test_a_groups_name_is_found_wherever_it_stands(before: int) -> None:
    environment = {"A": "x" * before, "GATEWAY_EXEC": "own/exec1", "Z": "x" * 100_000}
    with process(environment) as pid:
        assert carries(pid, b"GATEWAY_EXEC=own/exec1")
        assert carries(pid, b"GATEWAY_EXEC=own")
        assert not carries(pid, b"GATEWAY_EXEC=own/exec")
        assert not carries(pid, b"GATEWAY_EXEC=wn/exec1")
        assert not carries(pid, b"ATEWAY_EXEC=own/exec1")


def test_an_environment_that_holds_another_name_in_a_value() -> None:
    with process({"A": "GATEWAY_EXEC=own/exec1"}) as pid:
        assert not carries(pid, b"GATEWAY_EXEC=own/exec1")


def test_a_large_environment_takes_a_moment() -> None:
    with process({f"A{n}": "\n" * 60_000 for n in range(30)}) as pid:
        began = time.process_time()
        for _ in range(40):
            assert not carries(pid, b"GATEWAY_EXEC=own/exec1")
        assert time.process_time() - began < 2
        assert not process_tree._carries(pid, b"A", 0), "its time has passed"


def test_a_process_that_is_gone() -> None:
    assert not carries(2**22, b"GATEWAY_EXEC=own/exec1")
    assert process_tree.of_init(2**22) is None
    assert process_tree.stat(2**22) is None


def test_groups_below_are_looked_through_up_to_a_limit(tmp_path: Path) -> None:
    for number in range(1200):
        (tmp_path / f"{number}" / "below").mkdir(parents=True)
    found = process_tree.folders(tmp_path)
    assert len(found) == 1000 and found[0] == tmp_path
    (tmp_path / "7" / "cgroup.procs").write_text("1\n2\n")
    (tmp_path / "cgroup.procs").write_text("3\n" * 1_000_000)
    numbers = process_tree.pids(tmp_path)
    assert set(numbers) <= {1, 2, 3} and 100_000 < len(numbers) < 200_000


async def test_a_gateways_lives_are_those_whose_names_can_be(tmp_path: Path) -> None:
    for name in ("own-1", "own-2/below", "other-1", "own-x y", "own-é", "own-\x1b[2J", "own-" + "x" * 200):
        (tmp_path / "gateway" / name).mkdir(parents=True)
    assert sorted(await command_cgroup.lives(tmp_path, "own")) == ["own-1", "own-2"]
    for number in range(100):
        (tmp_path / "gateway" / f"own-n{number}").mkdir()
    assert len(await command_cgroup.lives(tmp_path, "own")) == 32
    assert await command_cgroup.lives(tmp_path / "nowhere", "own") == []


def test_what_a_process_calls_itself() -> None:
    with process({}) as pid:
        path = Path(f"/proc/{pid}")
        assert command_cgroup._INNER.search((path / "status").read_bytes()) is not None
        name = command_cgroup._NAME.search((path / "status").read_bytes())
        assert name is not None and name[1] == b"sleep"
