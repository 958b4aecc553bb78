"""What connects Incus to a member that has died is cut, and nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.cluster import cluster as clusters
from gateway.cluster.cluster import DeadPeers
from gateway.cluster.identity import Identity
from gateway.cluster.peers import Peers
from gateway.errors import NotFound, Unavailable
from gateway.incus.members import Member
from gateway.rootfs.broker_client import DeadMemberCutter
from gateway.rootfs.connections import cut_off, members
from gateway.settings import Settings
from gateway.tasks import begin
from tests.waits import turn, until

needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root cuts connections, on Linux"
)


def incus(folder: Path, *addresses: str) -> Path:
    """Make a folder with the local database of a clustered incusd."""
    (folder / "database").mkdir()
    with contextlib.closing(sqlite3.connect(folder / "database" / "local.db")) as database:
        # as in Incus's internal/server/db/node/update.go
        database.execute(
            "CREATE TABLE raft_nodes (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, address TEXT NOT NULL, "
            "role INTEGER NOT NULL DEFAULT 0, name TEXT NOT NULL DEFAULT '', UNIQUE (address))"
        )
        rows = [(address,) for address in addresses]
        database.executemany("INSERT INTO raft_nodes (address) VALUES (?)", rows)
        database.commit()
    return folder


def within(folder: Path) -> Settings:
    """Return the settings of a gateway whose incusd is in a folder."""
    return Settings(incus_socket=folder / "unix.socket")


@pytest.fixture(params=["127.0.0.1", "::1"])
def listening(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    try:
        server = socket.create_server((request.param, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {request.param}")
    with server:
        yield server


def address(server: socket.socket) -> str:
    host, port = server.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def test_the_members_are_those_of_the_local_database(tmp_path: Path) -> None:
    assert members(incus(tmp_path, "10.90.0.1:8443", "[fd00::2]:8443")) == {
        "10.90.0.1:8443",
        "[fd00::2]:8443",
    }
    with pytest.raises(OSError, match="cannot be read"):
        members(tmp_path / "none")


def test_nobody_else_is_cut_off() -> None:
    with pytest.raises(NotFound):
        cut_off("192.0.2.7:22", {"192.0.2.8:8443"})


@needs_root
def test_both_directions_are_cut_and_other_ports_are_left() -> None:
    """What we asked of a member's Incus, and what it asked of ours; not what else there is between us."""
    us, them = "127.0.0.1", "127.0.0.2"
    with contextlib.ExitStack() as stack:

        def listen(host: str) -> socket.socket:
            return stack.enter_context(socket.create_server((host, 0)))

        def connect(server: socket.socket, host: str) -> socket.socket:
            return stack.enter_context(
                socket.create_connection(server.getsockname(), source_address=(host, 0))
            )

        ours, theirs, other = listen(us), listen(them), listen(them)
        asking, shell = connect(theirs, us), connect(other, us)
        asks = connect(ours, them)
        asked = stack.enter_context(ours.accept()[0])
        among = {address(ours), address(theirs)}
        assert cut_off(address(theirs), among) == 2
        for end in (asking, asked):
            end.settimeout(5)
            with pytest.raises(ConnectionAbortedError):
                end.recv(1)
        assert asks.fileno() > 0
        shell.send(b"still here")
        assert stack.enter_context(other.accept()[0]).recv(100) == b"still here"
        assert cut_off(address(theirs), among) == 0


@needs_root
def test_a_member_is_cut_off_by_either_protocol(listening: socket.socket) -> None:
    with socket.create_connection(listening.getsockname()[:2]) as asking:
        assert cut_off(address(listening), {address(listening)}) >= 1
        asking.settimeout(5)
        with pytest.raises((ConnectionAbortedError, ConnectionResetError)):
            asking.recv(1)


@needs_root
async def test_without_a_broker_root_cuts_by_itself(tmp_path: Path, listening: socket.socket) -> None:
    cutter = DeadMemberCutter(within(incus(tmp_path, address(listening))))
    with socket.create_connection(listening.getsockname()[:2]):
        assert await cutter.cut_off(address(listening)) >= 1
    with pytest.raises(Unavailable):
        await DeadMemberCutter(within(tmp_path / "none")).cut_off(address(listening))
    await cutter.aclose()


# --- whether a silent peer is dead ------------------------------------------------------------------


class Fixed:
    """One other member, whose gateway was never heard."""

    def __init__(self, incus: str) -> None:
        self._incus = incus

    async def members(self) -> tuple[Member, ...]:
        return (Member("m1", "127.0.0.1:1"), Member("m2", self._incus))

    async def publish(self, config: object) -> None:
        raise AssertionError


@pytest.fixture
def mute() -> Iterator[str]:
    """An address at which nothing answers who connects, like that of a server without power."""
    with socket.socket() as server, contextlib.ExitStack() as stack:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):  # then its queue is full, and the kernel drops what comes
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(server.getsockname())
        yield address(server)


async def test_a_silent_peer_whose_server_answers_nothing_is_cut_off_as_long_as_it_does(
    tmp_path: Path, mute: str
) -> None:
    cut = list[str]()

    async def cut_off(member: str) -> int:
        cut.append(member)
        return 1

    async with Peers("m1", Fixed(mute), Identity(tmp_path)) as peers:
        following = begin(DeadPeers(peers, cut_off).follow())
        await until(lambda: len(cut) >= 3, 20)
        assert set(cut) == {mute}
        peers.all["m2"].hear()
        following.cancel()


async def test_a_process_without_cpu_takes_nobody_for_dead(listening: socket.socket) -> None:
    """Its own timer is due as soon as it runs again, when the answer has long come."""
    asked = asyncio.ensure_future(clusters.answers(address(listening)))
    await turn()
    time.sleep(clusters._PROBE_ANSWERING + 0.3)
    assert await asked


async def test_a_server_that_is_known_by_a_name_is_not_looked_at() -> None:
    assert await clusters.answers("one.example:8443")
    with pytest.raises(NotFound):
        cut_off("one.example:8443", {"one.example:8443"})


@pytest.mark.parametrize("listens", [True, False])
async def test_a_server_that_answers_is_not_cut_off_be_it_with_a_refusal(
    tmp_path: Path, listens: bool
) -> None:
    """Its gateway is down, or being upgraded: what a look asks for is all that comes of it."""
    looked = list[str]()

    async def cut_off(member: str) -> int:
        looked.append(member)
        return 0

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.setblocking(False)
        alive = address(server)
        if not listens:
            server.close()
        peers = Peers("m1", Fixed(alive), Identity(tmp_path))
        dead = DeadPeers(peers, cut_off)
        async with peers:
            await until(lambda: "m2" in peers.all and peers.all["m2"].incus == alive, 10)
            await dead._look(peers.all["m2"])
    assert looked == []
