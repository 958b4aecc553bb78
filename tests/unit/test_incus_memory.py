"""A command's memory is exact whenever its gateway is killed, or else refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.incus import IncusError
from gateway.incus.exec_sockets import ExecSockets, Inlet, OperationWait, outputs
from gateway.incus.memory import SEGMENT, SEGMENTS, ExecMemory, Log, MemoryFull, Odometer
from gateway.incus.stream_socket import BINARY, TEXT, Frames, frame, header
from tests.thorough import examples

HANDSHAKE = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"


def sent(data: bytes, kind: int = BINARY) -> bytes:
    """Return a frame as a server sends it."""
    if len(data) < 126:
        return bytes([0x80 | kind, len(data)]) + data
    form, mark = ("!H", 126) if len(data) < 65536 else ("!Q", 127)
    return bytes([0x80 | kind, mark]) + struct.pack(form, len(data)) + data


@pytest.fixture
def memory() -> Iterator[ExecMemory]:
    memory = ExecMemory.made()
    yield memory
    memory.close()


def received(log: Log, own: socket.socket, frames: Frames) -> bytes:
    """Receive once into the log, and return the payload."""
    return b"".join(frames.feed(log.landed(own.recv_into(log.room()))))


def taken(log: Log, own: socket.socket, frames: Frames, size: int) -> bytes:
    """Receive some payload that is split by the end of a segment."""
    data = b""
    while len(data) < size:
        data += received(log, own, frames)
    return data


def adopted(memory: ExecMemory, own: socket.socket) -> tuple[int, bytes]:
    """Return what another process finds, with the first byte's offset, through its own memory object."""
    again = ExecMemory(os.dup(memory.descriptor))
    try:
        log = Log(again, "first", Odometer(own))
        frames = Frames(log)
        return frames.start, b"".join(b"".join(frames.feed(view)) for view in log.replay())
    finally:
        again.close()


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.integers(0, 200_000), max_size=30), st.data())
def test_another_process_finds_what_was_received_and_not_let_go_of(
    sizes: list[int], data: st.DataObject
) -> None:
    """Wherever frames and segments are split, and although the last read was never recorded."""
    ours, theirs = socket.socketpair()
    memory = ExecMemory.made()
    whole, floor = b"", 0
    try:
        theirs.setblocking(True)
        Odometer(theirs).reset()
        log = Log(memory, "first", Odometer(theirs))
        frames = Frames(log)
        log.begin(0)
        for number, size in enumerate(sizes):
            piece = bytes([number % 251]) * size
            wire = sent(piece)
            whole += piece
            for start in range(0, len(wire), 100_000):
                ours.sendall(wire[start : start + 100_000])
                left = len(wire[start : start + 100_000])
                while left:
                    before = log.raw
                    received(log, theirs, frames)
                    left -= log.raw - before
            if data.draw(st.booleans()):
                floor = data.draw(st.integers(floor, len(whole)))
                log.keep(floor)
        ours.sendall(sent(b"last"))
        if data.draw(st.booleans()):  # killed right after the call that received it
            theirs.recv_into(log.room())
        start, kept = adopted(memory, theirs)
        assert start <= floor and kept in (whole[start:], whole[start:] + b"last")
    finally:
        memory.close()
        ours.close()
        theirs.close()


def test_the_odometer_is_set_anew_before_it_ends(memory: ExecMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the process is killed before, during or after the reset."""
    monkeypatch.setattr("gateway.incus.memory._TURN", 50_000)
    ours, theirs = socket.socketpair()
    Odometer(theirs).reset()
    log = Log(memory, "first", Odometer(theirs))
    frames, whole = Frames(log), b""
    log.begin(0)
    for number in range(40):
        piece = bytes([number]) * 9_000
        ours.sendall(sent(piece))
        whole += piece
        assert taken(log, theirs, frames, len(piece)) == piece
        assert adopted(memory, theirs) == (0, whole)
    monkeypatch.setattr(Log, "_turn", lambda self, odometer: None)
    while log.raw - log._zero < 50_000:
        ours.sendall(sent(b"x" * 9_000))
        whole += b"x" * 9_000
        taken(log, theirs, frames, 9_000)
    log._turning = log._zero + log._odometer.read()  # type: ignore[union-attr]
    log._commit()
    assert adopted(memory, theirs) == (0, whole)
    log._turning = log._zero + log._odometer.read()  # type: ignore[union-attr]
    log._commit()
    Odometer(theirs).reset()
    assert adopted(memory, theirs) == (0, whole)
    ours.close()
    theirs.close()


def test_a_reader_that_is_killed_anywhere_loses_and_doubles_nothing() -> None:
    """Repeatedly, by SIGKILL, while it receives as fast as it can."""
    kills = int(os.environ.get("GATEWAY_TEST_KILLS_BARE", "8"))
    ours, theirs = socket.socketpair()
    theirs.setblocking(True)
    memory = ExecMemory.made()
    Odometer(theirs).reset()
    Log(memory, "first", Odometer(theirs)).begin(0)
    writer = os.fork()
    if writer == 0:
        with contextlib.suppress(BaseException):
            number = 0
            while True:
                number += 1
                ours.sendall(sent(b"%09d\n" % number * 300))
        os._exit(0)
    ours.close()
    checked = 0
    try:
        for _ in range(kills):
            reader = os.fork()
            if reader == 0:
                with contextlib.suppress(BaseException):
                    again = ExecMemory(os.dup(memory.descriptor))
                    log = Log(again, "first", Odometer(theirs))
                    frames = Frames(log)
                    end = frames.start + sum(len(p) for view in log.replay() for p in frames.feed(view))
                    while True:
                        end += len(received(log, theirs, frames))
                        log.keep(end - 100_000)
                os._exit(1)
            os.waitpid(-1, os.WNOHANG)
            select_time = random.uniform(0.002, 0.02)
            signal.sigtimedwait([], select_time)
            os.kill(reader, signal.SIGKILL)
            os.waitpid(reader, 0)
            start, kept = adopted(memory, theirs)
            line = start // 10
            expected = b"".join(
                b"%09d\n" % (number // 300 + 1) for number in range(line, line + len(kept) // 10 + 2)
            )
            assert kept == expected[start % 10 :][: len(kept)]
            checked = start + len(kept)
            assert len(kept) >= min(100_000, checked)  # what was not to be let go of
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        memory.close()
        theirs.close()
    assert checked > 1_000_000


async def test_a_writer_that_is_killed_anywhere_loses_and_doubles_nothing() -> None:
    """Exactly the bytes recorded as written or in transit arrive."""
    kills = int(os.environ.get("GATEWAY_TEST_KILLS_BARE", "8"))
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    memory = ExecMemory.made()
    pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    arrived = bytearray()
    loop = asyncio.get_running_loop()
    loop.add_reader(ours, lambda: arrived.extend(ours.recv(1 << 20)))
    try:
        for _ in range(kills):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    asyncio.run(_give(theirs, pipe, ExecMemory(os.dup(memory.descriptor))))
                os._exit(1)
            await asyncio.sleep(random.uniform(0.005, 0.03))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        inlet = Inlet(theirs, pipe, memory)
        await inlet.flush()
        position = inlet.position
        await inlet.write_end()
        while not arrived.endswith(b"".join(frame(TEXT, b""))):
            await asyncio.sleep(0.001)
    finally:
        loop.remove_reader(ours)
    payload, view = bytearray(), memoryview(bytes(arrived))
    while view:
        found = header(view)
        assert found is not None
        _, size, own = found
        payload += view[own + 4 : own + 4 + size]
        view = view[own + 4 + size :]
    assert len(payload) == position > 100_000
    assert payload == bytes(range(251)) * (len(payload) // 251) + bytes(range(len(payload) % 251))
    inlet.close()
    memory.close()
    ours.close()
    theirs.close()


async def _give(own: socket.socket, pipe: tuple[int, int], memory: ExecMemory) -> None:
    inlet = Inlet(own, pipe, memory)
    while True:
        start = inlet.position % 251
        await inlet.write((bytes(range(251)) * 300)[start : start + random.randint(1, 70_000)])


def test_a_long_output_has_room_for_all_that_a_socket_has(memory: ExecMemory) -> None:
    """But for once in each turn through the segments: a shorter read costs as much as a whole one."""
    log, rooms = Log(memory, "first", None), list[int]()
    log.begin(0)
    for _ in range(500):
        rooms.append(len(log.room()))
        log.landed(min(rooms[-1], 4 * 32_772))
        log.point(log.raw, log.raw)
        log.keep(log.raw - (1 << 20))
    assert max(rooms) == 256 << 10
    assert rooms.count(256 << 10) > 400


def test_a_memory_that_is_full_says_so(memory: ExecMemory) -> None:
    for _ in range(SEGMENTS - 1):  # the last is for the beginning
        memory.take()
    with pytest.raises(MemoryFull):
        memory.take()
    with pytest.raises(MemoryFull):
        memory.write_facts({"x": "y" * 60_000})


def test_what_is_let_go_of_goes_back_to_the_kernel(memory: ExecMemory) -> None:
    ours, theirs = socket.socketpair()
    Odometer(theirs).reset()
    log = Log(memory, "first", Odometer(theirs))
    frames, end = Frames(log), 0
    log.begin(0)
    for _ in range(20 * SEGMENT // 100_000):
        ours.sendall(sent(bytes(100_000)))
        left = 100_000
        while left > 0:
            got = len(received(log, theirs, frames))
            end, left = end + got, left - got
        log.keep(end)
    assert os.fstat(memory.descriptor).st_blocks * 512 <= 6 * SEGMENT
    ours.close()
    theirs.close()


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=40)), min_size=1, max_size=4))
def test_a_memory_that_was_written_over_is_read_within_bounds(
    changes: list[tuple[int, bytes]],
) -> None:
    """It never crashes, nor returns more than there is."""
    memory = ExecMemory.made()
    try:
        memory.write_facts({"format": 1})
        log = Log(memory, "first", None)
        log.begin(0)
        log.close()
        for at, data in changes:
            memory.view[at : at + len(data)] = data
        again = ExecMemory(os.dup(memory.descriptor))
        try:
            with contextlib.suppress(ValueError, struct.error, IndexError):
                found = outputs(again, terminal=False)
                assert sum(len(data) for _, data in found.values()) <= SEGMENTS * SEGMENT
            with contextlib.suppress(ValueError, struct.error):
                again.read_facts()
        finally:
            again.close()
    finally:
        memory.close()


async def test_descriptors_that_are_no_commands_are_refused_and_closed() -> None:
    def open_ones() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_ones()
    given = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
    with pytest.raises((OSError, ValueError)):
        await ExecSockets.adopted(given)
    assert open_ones() == before


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_output_that_goes_on_at_once_takes_no_memory_of_the_other(
    memory: ExecMemory, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """uvloop reads the first before the second is adopted."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(_go_on_at_once(memory))


async def _go_on_at_once(memory: ExecMemory) -> None:
    pairs = [socket.socketpair() for _ in range(5)]  # the answer, control, input and the two outputs
    logs = [Log(memory, "first", Odometer(pairs[3][1])), Log(memory, "second", Odometer(pairs[4][1]))]
    for (theirs, ours), log in zip(pairs[3:], logs, strict=True):
        Odometer(ours).reset()
        log.begin(0)
        theirs.send(sent(b"before "))
        assert received(log, ours, Frames(log)) == b"before "
    inlet = Inlet.made(pairs[2][1], memory)
    long = sent(os.urandom(SEGMENT + 1))
    pairs[3][0].send(long)
    pairs[4][0].send(sent(b"after"))
    held = [memory.descriptor, *inlet.pipe, *(ours.fileno() for _, ours in pairs)]
    again = await ExecSockets.adopted([os.dup(one) for one in held])
    first, second = b"", b""
    while len(first) < len(b"before ") + SEGMENT + 1:
        first += await again.read("1")
    while len(second) < len(b"before after"):
        second += await again.read("2")
    assert (first, second) == (b"before " + long[10:], b"before after")
    inlet.close()
    await again.aclose()
    for theirs, ours in pairs:
        theirs.close()
        ours.close()


ANSWER = b'{"type":"sync","metadata":{"status_code":200,"metadata":{"return":7}}}'
FAILED = b'{"type":"error","error":"Command not found","error_code":400}'


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize(("body", "code"), [(ANSWER, 7), (FAILED, 127)])
async def test_an_answer_waits_for_whoever_has_its_descriptor(
    tmp_path: Path, body: bytes, code: int, taken: bool
) -> None:
    """Also for a process that comes after its header was consumed."""
    ours, theirs = socket.socketpair()
    ours.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    waiting = OperationWait(theirs)
    if taken:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waiting.result(), 0.05)
    ours.sendall(b"%x\r\n%b\r\n" % (len(body), body))
    ours.sendall(b"0\r\n\r\n")
    ours.close()
    for _ in range(2):
        assert (await waiting.result()).metadata["return"] == code
    waiting.close()


async def test_an_answer_is_the_last_of_its_connection(tmp_path: Path) -> None:
    """Whoever has the descriptor could otherwise ask incusd for anything, as root."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "incusd"))
        listener.listen()
        waiting = await OperationWait.ask(tmp_path / "incusd", "1234")
        with listener.accept()[0] as asked:
            lines = asked.recv(1000).split(b"\r\n")
        waiting.close()
    assert lines[0].startswith(b"GET /1.0/operations/1234/wait") and b"Connection: close" in lines


@pytest.mark.parametrize("written", [False, True])
async def test_a_piece_that_was_written_but_not_noted_counts(memory: ExecMemory, written: bool) -> None:
    """The kill came between the write into the pipe and the note of it, or before the write."""
    ours, theirs = socket.socketpair()
    pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    memory.record("place").write(struct.pack("<QQ", 10, 1 + 15))
    if written:
        os.write(pipe[1], b"".join(frame(BINARY, b"hello")))
    inlet = Inlet(ours, pipe, memory)
    assert inlet.position == (15 if written else 10)
    inlet.close()
    ours.close()
    theirs.close()


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"ff\r\n{"])
async def test_an_answer_that_broke_off_is_none(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(said)
    ours.close()
    waiting = OperationWait(theirs)
    with pytest.raises(IncusError):
        await asyncio.wait_for(waiting.result(), 30)
    waiting.close()


def test_what_is_known_of_an_ended_command_is_small() -> None:
    """A thousand per tenant are kept, so they must not keep lists of all possible segments."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        memories = [ExecMemory.made() for _ in range(50)]
        assert (tracemalloc.get_traced_memory()[0] - before) / 50 < 2000
        for memory in memories:
            memory.close()
    finally:
        tracemalloc.stop()


def test_facts_are_read_without_taking_the_memory_that_they_may_have(memory: ExecMemory) -> None:
    """The kernel gives a page for each that is read: 500 commands would take 24 MiB at a restart."""
    memory.write_facts({"id": "x"})
    before = os.fstat(memory.descriptor).st_blocks
    again = ExecMemory(os.dup(memory.descriptor))
    assert again.read_facts() == {"id": "x"}
    again.close()
    assert os.fstat(memory.descriptor).st_blocks == before


def test_what_a_command_is_for_and_its_beginning_are_there_for_the_next(memory: ExecMemory) -> None:
    memory.write_facts({"phase": "front"}, "purpose")
    memory.write_facts({"phase": "moved"}, "purpose")
    memory.beginning[3:5] = b"xy"
    again = ExecMemory(os.dup(memory.descriptor))
    assert again.read_facts("purpose") == {"phase": "moved"}
    assert bytes(again.beginning[:6]) == b"\0\0\0xy\0"
    with pytest.raises(MemoryFull):
        memory.write_facts({"x": "y" * 4096}, "purpose")
    again.close()
