"""Connections to a site are found in the kernel's tables."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path

import pytest

from gateway.runtime import listening, probe
from gateway.runtime.listening import TenantPort, visited
from tests.waits import pause, until


def _ages(port: int) -> float | None:
    return visited({"site": TenantPort(port, "127.0.0.1")}).get("site")


def test_a_connection_is_seen_while_it_is_open_and_a_minute_after() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert _ages(port) is None, "to listen is no visit"
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        assert _ages(port) == 0
        accepted.close()
        assert client.recv(1) == b""
        client.close()
        # the kernel's clock for it ticks about once in a second
        deadline = time.monotonic() + 10
        while (age := _ages(port)) is None or age == 0:
            assert time.monotonic() < deadline
        assert 0 < age < 12


def test_a_site_that_listens_by_ipv6_is_seen_too() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            assert _ages(port) == 0
            accepted.close()


def test_the_network_of_a_process_is_looked_at_by_the_sites_own_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            assert visited({"a": TenantPort(port, pid=os.getpid())}) == {"a": 0}
            assert visited({"a": TenantPort(9, pid=os.getpid())}) == {}


async def test_the_gateways_own_probes_are_no_visits() -> None:
    answered = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        await answered.wait()
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    asking = asyncio.create_task(probe.ask("127.0.0.1", port, "/", 30, 30))
    async with server:
        await until(lambda: any(map(probe.ours, list(probe._ports))), every=0)
        assert _ages(port) is None
        answered.set()
        assert await asking == 200
        assert _ages(port) is None


def test_a_tenant_with_more_connections_than_are_looked_through_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            monkeypatch.setattr("gateway.runtime.listening._BYTES", 10)
            assert visited({"a": TenantPort(9, pid=os.getpid())}) == {"a": 0}
            assert visited({"a": TenantPort(9, "127.0.0.1")}) == {}
            monkeypatch.setattr("gateway.runtime.listening._HOST_BYTES", 10)
            assert visited({"a": TenantPort(9, "127.0.0.1"), "b": TenantPort(9)}) == {"a": 0}


def test_a_table_of_many_connections_takes_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "%4d: 0100007F:%04X 0200007F:1F90 01 00000000:00000000 00:00000000 00000000  1000 0 1 1 00 20 4\n"
    folder = tmp_path / "self" / "net"
    folder.mkdir(parents=True)
    (folder / "tcp").write_text("head\n" + "".join(line % (n, n & 0xFFF) for n in range(200_000)))
    monkeypatch.setattr(
        "gateway.runtime.listening.Path", lambda path: tmp_path if path == "/proc" else Path(path)
    )
    began = time.process_time()
    assert visited({"a": TenantPort(0x7FF, "127.0.0.1"), "b": TenantPort(0xFFFF, "127.0.0.1")}) == {"a": 0}
    assert time.process_time() - began < 3


async def test_a_site_has_rested_only_once_nobody_waits_for_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection on which all is answered does not count, and time runs out."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, server.accept()[0] as accepted:
            client.send(b"GET /")
            resting = asyncio.create_task(listening.drained("127.0.0.1", port))
            await pause(3 * listening._ON_THE_WAY)
            assert not resting.done()
            accepted.send(b"answer")
            answered = time.monotonic()
            assert await resting
            assert time.monotonic() - answered >= listening._ON_THE_WAY - 2 * listening._LOOK, (
                "one may be on its way"
            )
            await pause(0.01)  # for the kernel all within a millisecond is at once
            client.send(b"GET /")
            monkeypatch.setattr(listening, "_DRAIN", 0.1)
            assert not await listening.drained("127.0.0.1", port)
