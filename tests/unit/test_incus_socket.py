"""The reader of Incus exec sockets, with a real websocket server and with frames split anywhere."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.server import ServerConnection, unix_serve

from gateway.errors import Unavailable
from gateway.incus import exec_sockets
from gateway.incus.exec_sockets import ExecSockets, connect, outputs
from gateway.incus.memory import ExecMemory
from gateway.incus.stream_socket import Lost, StreamSocket
from tests.thorough import examples
from tests.waits import turn, until


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[tuple[Path, asyncio.Queue[ServerConnection]]]:
    """A websocket server of another library; yields its path and each connection."""
    came: asyncio.Queue[ServerConnection] = asyncio.Queue()

    async def serve(connection: ServerConnection) -> None:
        came.put_nowait(connection)
        await connection.wait_closed()

    async with unix_serve(serve, str(tmp_path / "s"), compression=None, max_size=None, ping_interval=None):
        yield tmp_path / "s", came


async def whole(stream: StreamSocket) -> bytes:
    found = b""
    while data := await stream.read():
        found += data
    return found


async def test_frames_of_every_size_arrive_in_order_and_end(peer: Any) -> None:
    path, came = peer
    stream = await StreamSocket.connect(path, "/x?secret=y")
    server = await came.get()
    assert server.request.path == "/x?secret=y"
    sent = [bytes([n % 251]) * n for n in (1, 125, 126, 65535, 65536, 300_000, 7)]
    reading = asyncio.create_task(whole(stream))
    for piece in sent:
        await server.send(piece)
        await server.ping()
    await server.send("")
    assert await reading == b"".join(sent)
    assert await stream.read() == b""
    stream.close()


async def test_what_is_written_arrives_unmasked_at_the_other_end(peer: Any) -> None:
    path, came = peer
    stream = await StreamSocket.connect(path, "/")
    server = await came.get()
    for size in (0, 5, 125, 126, 65535, 65536, 3_000_000):
        writing = asyncio.create_task(stream.write(b"\x00\xffa"[:1] + b"b" * size))
        assert await server.recv() == b"\x00" + b"b" * size
        await writing
    await stream.write_end()
    assert await server.recv() == ""
    stream.close()
    await server.wait_closed()
    await stream.write(b"late")  # dropped


async def test_a_peer_that_hangs_up_loses_the_stream_but_not_what_had_come(peer: Any) -> None:
    path, came = peer
    stream = await StreamSocket.connect(path, "/")
    server = await came.get()
    await server.send(b"before")
    server.transport.close()
    assert await stream.read() == b"before"
    with pytest.raises(Lost):
        await stream.read()
    stream.close()


async def test_what_is_no_websocket_is_refused(tmp_path: Path) -> None:
    answers = [b"HTTP/1.1 404 Not Found\r\n\r\n", b"", b"x" * 20_000]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers.pop(0))
        writer.close()

    async with await asyncio.start_unix_server(serve, str(tmp_path / "s")):
        for error in (ConnectionRefusedError, ConnectionResetError, ConnectionRefusedError):
            with pytest.raises(error):
                await StreamSocket.connect(tmp_path / "s", "/")
    with pytest.raises(OSError, match="No such file"):
        await StreamSocket.connect(tmp_path / "none", "/")


async def test_a_stream_that_nobody_reads_is_held_back(peer: Any) -> None:
    path, came = peer
    stream = await StreamSocket.connect(path, "/")
    server = await came.get()

    async def send() -> None:
        for _ in range(64):
            await server.send(b"x" * 65536)
        await server.send("")

    sending = asyncio.create_task(send())
    try:
        await asyncio.wait([sending], timeout=0.3)
        # what there may be unread, and what came with the last read of the kernel
        assert not sending.done() and stream._size <= 256 * 1024 + 256 * 1024
        assert len(await whole(stream)) == 64 * 65536
        await sending
    finally:
        stream.close()
        sending.cancel()


async def test_what_stands_unread_is_taken_to_the_last_byte_at_once(peer: Any) -> None:
    """Including bytes still in the kernel; the stream continues after them."""
    path, came = peer
    stream = await StreamSocket.connect(path, "/")
    server = await came.get()
    try:
        assert stream.take() == b""
        sent = bytes(400_000)
        sending = asyncio.create_task(server.send(sent))
        await until(lambda: stream._paused)
        taken = b""
        async with asyncio.timeout(30):
            while not sending.done() or len(taken) < len(sent):
                taken += stream.take()
                await turn()
        assert taken == sent
        await server.send(b"more")
        await server.send("")
        assert await whole(stream) == b"more"
    finally:
        stream.close()


def frame(kind: int, data: bytes, final: bool = True) -> bytes:
    size = len(data)
    head = bytes([kind | (0x80 if final else 0)])
    if size < 126:
        return head + bytes([size]) + data
    form, mark = ("!H", 126) if size < 65536 else ("!Q", 127)
    return head + bytes([mark]) + struct.pack(form, size) + data


class Still:
    """A transport that does nothing."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@settings(max_examples=examples(200))
@given(st.lists(st.binary(max_size=400), max_size=12), st.data())
async def test_frames_cut_anywhere_are_the_same_bytes(pieces: list[bytes], data: st.DataObject) -> None:
    stream: Any = StreamSocket()
    stream._transport = Still()
    sent = b"HTTP/1.1 101 Switching Protocols\r\nA: b\r\n\r\n"
    for piece in pieces:
        cut = data.draw(st.integers(0, len(piece)))
        whole_one = data.draw(st.booleans())
        sent += (
            frame(2, piece)
            if whole_one
            else frame(2, piece[:cut], False) + frame(9, b"p") + frame(0, piece[cut:])
        )
    sent += frame(1, b"")
    while sent:
        size = data.draw(st.integers(1, len(sent)))
        buffer = stream.get_buffer(-1)
        buffer[:size] = sent[:size]
        stream.buffer_updated(size)
        sent = sent[size:]
    assert stream._upgraded.done()
    assert await whole(stream) == b"".join(pieces)


async def test_what_is_written_after_the_end_leaves_no_trace_in_the_loop(peer: Any) -> None:
    """The descriptor number of a lost connection is reused by the next one."""
    path, came = peer
    for _ in range(20):
        stream = await StreamSocket.connect(path, "/")
        server = await came.get()
        server.transport.abort()
        stream._transport.abort()  # lost, and the loop has not told it yet
        await stream.write(b"late")
        stream.close()
        again = await StreamSocket.connect(path, "/")
        await (await came.get()).send(b"hello")
        async with asyncio.timeout(30):
            assert await again.read() == b"hello"
        again.close()


class Waits:
    """In place of the wait for an operation, which no test here needs."""

    def close(self) -> None: ...


async def command(
    peer: Any, memory: ExecMemory | None, *, terminal: bool = False
) -> tuple[ExecSockets, dict[str, ServerConnection]]:
    """Return the sockets of a command, and incusd's ends of them."""
    path, came = peer
    names = ("control", "0") if terminal else ("control", "0", "1", "2")
    opened = await connect(path, "op", {name: name for name in names}, memory, terminal=terminal)
    ends = [await came.get() for _ in names]
    by_name = {end.request.path.rpartition("=")[2]: end for end in ends if end.request is not None}
    waits: Any = Waits()
    return ExecSockets(opened, waits, memory, terminal=terminal), by_name


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("size", [0, 5, 65_536, 400_000])
async def test_what_incusd_left_in_a_pipe_follows_what_it_sent(
    peer: Any, monkeypatch: pytest.MonkeyPatch, held: bool, size: int
) -> None:
    """And is kept with it for the next process; the pipes are closed then."""
    monkeypatch.setattr(exec_sockets, "_OPENING", 0.0)
    memory = ExecMemory.made() if held else None
    sockets, ends = await command(peer, memory)
    pipes = {name: os.pipe2(os.O_NONBLOCK) for name in ("1", "2")}
    left = os.urandom(size)

    async def opened() -> list[int]:
        return [out for out, _ in pipes.values()] if next(looks) else []

    looks = iter([False, True])  # at first the shell does not run yet
    sockets.open_pipes(opened)
    await until(lambda: bool(sockets._pipes))
    if size > 65_536:
        fcntl.fcntl(pipes["1"][1], fcntl.F_SETPIPE_SZ, 1 << 20)
    if left:
        assert os.write(pipes["1"][1], left) == size
    for name in ("1", "2"):
        await ends[name].send(name.encode() * 3)
        await ends[name].send("")
    found = {"1": b"", "2": b""}
    for name in found:
        while data := await sockets.read(name):
            found[name] += data
        assert await sockets.read(name) == b""
    assert found == {"1": b"111" + left, "2": b"222"}
    for out, into in pipes.values():
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(out)
        os.close(into)
    sockets.ended()
    await sockets.aclose()
    if memory is not None:
        again = memory.reopened()
        assert outputs(again, terminal=False) == {name: (0, data) for name, data in found.items()}
        again.close()


@pytest.mark.parametrize("way", ["soon", "asking", "opened", "left", "refused", "none", "terminal"])
async def test_pipes_are_opened_once_and_always_closed(
    peer: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(exec_sockets, "_OPENING", 60.0 if way == "soon" else 0.0)
    sockets, _ = await command(peer, None, terminal=way == "terminal")
    asked, answer, cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()
    out, into = ([*ends] for ends in zip(os.pipe(), os.pipe(), strict=True))

    async def opened() -> list[int]:
        asked.set()
        if way == "asking":
            try:
                await answer.wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise
        if way == "refused":
            raise Unavailable("no broker")
        return [] if way == "none" else out

    sockets.open_pipes(opened)
    if way in ("soon", "terminal"):
        assert (sockets._timer is None) == (way == "terminal") and not asked.is_set()
    else:
        await asked.wait()
        await turn()
    if way == "left":
        sockets.leave()
    await sockets.aclose()
    await sockets.aclose()
    if way == "soon":
        assert sockets._timer is not None and sockets._timer.cancelled()
    if way == "asking":
        await asyncio.wait_for(cancelled.wait(), 10)
    taken = way in ("opened", "left")
    for descriptor in out if taken else ():
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    for descriptor in into if taken else (*out, *into):
        os.close(descriptor)


async def test_a_pipe_that_a_tenant_reads_too_is_taken_for_empty(
    peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exec_sockets, "in_pipe", lambda pipe: 5)  # what it had is gone when it is read
    sockets, ends = await command(peer, None)
    out, into = os.pipe2(os.O_NONBLOCK)
    sockets._pipes["1"] = out
    await ends["1"].send("")
    assert await sockets.read("1") == b""
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(out)
    os.close(into)
    await sockets.aclose()


async def test_what_is_added_after_the_end_pauses_nothing() -> None:
    """The connection is closed by then, and some loops refuse it."""

    class Closed:
        def pause_reading(self) -> None:
            raise RuntimeError("closed")

    stream: Any = StreamSocket()
    stream._transport = Closed()
    sent = b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + frame(1, b"")
    stream.get_buffer(-1)[: len(sent)] = sent
    stream.buffer_updated(len(sent))
    stream.add(bytes(1 << 20))
    assert await whole(stream) == bytes(1 << 20)
