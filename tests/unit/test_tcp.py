"""Unread requests are found in the kernel's tables."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator

import pytest

from gateway.rootfs import connections
from gateway.rootfs.connections import End
from tests.waits import until_true

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tables are Linux's")
NETWORK = "127.0.0.1/8"


@contextlib.contextmanager
def server(family: socket.AddressFamily = socket.AF_INET) -> Iterator[tuple[socket.socket, End]]:
    v6 = family == socket.AF_INET6
    with socket.create_server(
        ("::" if v6 else "127.0.0.1", 0), family=family, dualstack_ipv6=v6
    ) as listening:
        yield listening, (socket.inet_aton("127.0.0.1"), listening.getsockname()[1])


def at(end: End) -> list[connections.TcpConnection]:
    return [one for one in connections.waiting(NETWORK, 0.0) if one.remote == end]


def unread(there: int, end: End, pid: int) -> set[End]:
    """Wait for a number of unread requests, as the kernel takes a moment, and return them."""
    until_true(lambda: len(connections.unread(pid, end)) == there, every=0.001)
    return connections.unread(pid, end)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_request_is_unread_until_its_server_reads_it(family: socket.AddressFamily) -> None:
    """Also before the server has accepted the connection, and if it listens on IPv6."""
    with server(family) as (listening, end), socket.create_connection(("127.0.0.1", end[1])) as client:
        local = (socket.inet_aton("127.0.0.1"), client.getsockname()[1])
        assert connections.unread(os.getpid(), end) == set(), "it has sent nothing"
        client.send(b"GET /")
        assert unread(1, end, os.getpid()) == {local}
        taken, _ = listening.accept()
        assert unread(1, end, os.getpid()) == {local}
        with taken:
            assert taken.recv(100) == b"GET /"
            assert unread(0, end, os.getpid()) == set()
            assert [one.local for one in at(end)] == [local], "its answer is waited for all the same"


def test_who_has_an_answer_waits_no_longer() -> None:
    with server() as (listening, end), socket.create_connection(("127.0.0.1", end[1])) as client:
        taken, _ = listening.accept()
        with taken:
            client.send(b"GET /")
            until_true(lambda: [one for one in at(end) if one.seconds >= 0.01] != [], every=0.001)
            waits = at(end)
            assert len(waits) == 1 and 0.01 <= waits[0].seconds < 5
            assert [one for one in connections.waiting(NETWORK, 4.0) if one.remote == end] == []
            assert [one for one in connections.waiting("10.0.0.0/8", 0.0) if one.remote == end] == []
            assert taken.recv(100) and taken.send(b"HTTP/1.1 200 OK") and client.recv(100)
            assert at(end) == []


def test_a_table_that_is_not_there_is_empty() -> None:
    assert connections.unread(0, (b"\x7f\0\0\1", 80)) == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root breaks off connections")
def test_only_what_is_unread_is_broken_off() -> None:
    with server() as (listening, end), contextlib.ExitStack() as stack:
        read, lost, left = (
            stack.enter_context(socket.create_connection(("127.0.0.1", end[1]))) for _ in range(3)
        )
        for one in (read, lost, left):
            one.send(b"GET /")
            one.settimeout(5)
        taken = stack.enter_context(listening.accept()[0])
        assert taken.recv(100) == b"GET /"
        unread(2, end, os.getpid())
        assert connections.break_off(os.getpid(), "127.0.0.1", end[1], {left.getsockname()[1]}) == 1
        with pytest.raises(ConnectionAbortedError):
            lost.recv(1)
        taken.send(b"late")
        assert read.recv(100) == b"late"
        assert unread(1, end, os.getpid()) == {(socket.inet_aton("127.0.0.1"), left.getsockname()[1])}
