"""When a service is told to listen in vain, and when to be unsteady; by values alone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterable

import pytest
from hypothesis import given, strategies

from gateway.deployments.listeners import Misplaced
from gateway.deployments.verify import unsteady
from gateway.runtime.incus import service
from gateway.runtime.listening import Listener, in_table, listener, of_tree
from gateway.runtime.sites import Service

PORT, AT = 3000, "10.83.3.7"


def told(looks: Iterable[tuple[float, float, str]], usual: tuple[int, ...] = ()) -> list[str | None]:
    """Return what each look finds: when, how much was computed by then, and where it listened."""
    misplaced, found = Misplaced(PORT, (AT,), usual), []
    for now, cpu, where in looks:
        ends = (one.rpartition(":") for one in where.split())
        listens = frozenset(Listener(address, int(port)) for address, _, port in ends)
        one = misplaced.look(Service("running", cpu=cpu, listens=listens), now)
        found.append(None if one is None else str(one))
    return found


@pytest.mark.parametrize("where", ["127.0.0.1:3000", "::1:3000", "10.83.3.9:3000"])
def test_the_right_port_of_a_wrong_address_is_told_soon(where: str) -> None:
    *early, late = told([(0.0, 0, ""), (0.7, 1, where), (1.5, 2, where), (2.3, 3, where)])
    assert early == [None] * 3
    assert late == where.replace("::1", "[::1]")


def test_a_right_port_that_is_of_those_for_others_is_told_too() -> None:
    for port in (9229, 41_000):
        misplaced = Misplaced(port, (AT,))
        service = Service("running", listens=frozenset({Listener("127.0.0.1", port)}))
        assert [misplaced.look(service, now) for now in (0.0, 2.0)] == [None, Listener("127.0.0.1", port)]


@pytest.mark.parametrize("where", ["0.0.0.0:3000", ":::3000", f"{AT}:3000", "127.0.0.1:3000 0.0.0.0:3000"])
def test_what_will_be_reached_is_never_told(where: str) -> None:
    assert told([(now, 0, f"{where} 127.0.0.1:8000") for now in range(60)]) == [None] * 60


def test_another_port_is_told_once_the_service_rests() -> None:
    """But where its framework serves by default: that is nothing of its own."""
    busy = [(now, now * 0.9, "0.0.0.0:8000") for now in (1.0, 2.0, 3.0, 4.0)]
    rests = [(5.0, 3.7, "0.0.0.0:8000")]
    assert told(busy + rests) == [None] * 4 + ["0.0.0.0:8000"]
    assert told(busy, usual=(8000,)) == [None] * 2 + ["0.0.0.0:8000"] * 2


@pytest.mark.parametrize("where", ["127.0.0.1:9229", "0.0.0.0:24678", "127.0.0.1:5432", "127.0.0.1:41000"])
def test_what_a_site_needs_for_itself_is_never_told(where: str) -> None:
    assert told([(now, 0, where) for now in range(60)]) == [None] * 60


def test_a_site_that_listens_elsewhere_first_has_a_moment() -> None:
    looks = [(0.0, 0.0, "127.0.0.1:8000"), (1.4, 0.0, "127.0.0.1:8000"), (2.2, 0.0, "0.0.0.0:3000")]
    assert told(looks) == [None] * 3
    # and one that comes and goes begins anew
    again = [(0.0, 0, "127.0.0.1:8000"), (1.0, 0, ""), (2.0, 0, "127.0.0.1:8000"), (3.0, 0, "127.0.0.1:8000")]
    assert told(again) == [None] * 4


def test_unsteady_is_what_nobody_asked_for() -> None:
    before = Service("running", restarts=1, started=10.0)
    assert unsteady(before, before, answered=12.0) == ""
    assert "again (2 times" in unsteady(before, Service("running", restarts=2, started=13.0), answered=12.0)
    # somebody started it again: its count begins anew
    assert unsteady(before, Service("running", restarts=0, started=13.0), answered=12.0) == ""
    killed = Service("running", restarts=1, started=10.0, oom_kills=1)
    assert "memory" in unsteady(before, killed, answered=12.0)
    assert unsteady(killed, killed, answered=12.0) == ""
    assert unsteady(before, None, answered=12.0) == ""


def test_a_service_is_read_from_what_its_container_tells() -> None:
    said = (
        "NRestarts=2\nExecMainStartTimestampMonotonic=13351533966\nActiveState=active\nSubState=running\n"
        "OomKills=1\nComputed=1500000\nListen=0100007F:1F40\nListen=" + "0" * 24 + "01000000:0BB8\n"
    )
    listens = {Listener("127.0.0.1", 8000), Listener("::1", 3000)}
    assert service.read(said) == Service("running", 2, 13351.533966, 1, 1.5, frozenset(listens))
    waits = service.read("ActiveState=activating\nSubState=auto-restart\n")
    assert waits is not None and waits.state == "ended"
    assert service.read("") is None
    assert service.read("ActiveState=\x1b[2J\nNRestarts=" + "9" * 5000 + "\nListen=x\n") == Service("ended")


@given(strategies.text())
def test_whatever_a_container_tells_is_a_service_or_none(said: str) -> None:
    service.read(said)
    service.read(f"ActiveState={said}\nNRestarts={said}\nListen={said}")
    listener(said)


def test_a_table_is_read_as_the_kernel_writes_it() -> None:
    line = "0: {}:1F40 00000000:0000 {} 00000000:00000000 00:00000000 00000000 1000 0 {} 1 0 100 0 0 10 0"
    mapped = "0000000000000000FFFF00000100007F"
    lines = ["sl local_address", line.format("00000000", "0A", 7), line.format(mapped, "0A", 8)]
    lines += [line.format("0100007F", "0A", 9), line.format("0100007F", "01", 7), "", "x" * 1000]
    assert [*in_table(lines, {"7", "8"})] == [Listener("0.0.0.0", 8000), Listener("127.0.0.1", 8000)]


async def test_a_process_tree_is_asked_where_it_listens() -> None:
    """Also one that a shell started; what others have is not told."""
    code = "import socket, sys; s = socket.create_server((sys.argv[1], 0)); sum(range(5_000_000)); "
    code += "print(s.getsockname()[1]); sys.stdin.read()"
    with subprocess.Popen(
        ["sh", "-c", f'"{sys.executable}" -uc "{code}" 127.0.0.1; true'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as shell:
        assert shell.stdin is not None and shell.stdout is not None
        port = int(await asyncio.to_thread(shell.stdout.readline))
        listens, cpu = of_tree(shell.pid)
        assert listens == {Listener("127.0.0.1", port)}
        assert cpu > 0
        shell.stdin.close()
    assert of_tree(shell.pid) == (frozenset(), 0.0)
