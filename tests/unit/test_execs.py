"""The registry of commands on the `local` runtime: keeping, refusing and ending commands."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.errors import Cancelled, GatewayError, NotFound, RateLimited
from gateway.events import Bus, Filter, MemoryJournal
from gateway.execs import Exec, Execs
from gateway.execs.ended import EndedProcess
from gateway.execs.streams import READ, Cursor, Pace, Reading, Stream
from gateway.idempotency import Idempotency
from gateway.lifecycle.site_logs import Following, SiteLogs
from gateway.limits.budget import Budget, Share
from gateway.runtime import ExecSpec, Holding, Process, StreamName
from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from gateway.storage.store import Store
from tests.contracts.processes import alive, mark
from tests.waits import pause, settled, turn, until

Make = Callable[..., Awaitable[Execs]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Create a registry with these settings and the tenants `demo` and `other`; it is closed at the end."""
    opened: list[Any] = []

    async def make(**changes: Any) -> Execs:
        settings = Settings(runtime="local", state_dir=tmp_path, cancel_grace=0, **changes)
        runtime = await LocalRuntime(settings).__aenter__()
        for name in ("demo", "other"):
            await runtime.tenants.create(name)
        store = await Store(tmp_path / "records").__aenter__()
        receipts = await Idempotency.opened(store, settings)
        execs = Execs(runtime.commands, Bus(MemoryJournal(1000)), receipts, settings)
        opened.extend((runtime, store, execs))
        return execs

    yield make
    for context in reversed(opened):
        await context.__aexit__(None, None, None)


async def ended(execs: Execs, *argv: str) -> Exec:
    exec_ = await execs.start("demo", ExecSpec(argv))
    await exec_.ended
    await until(lambda: exec_.state == "ended")
    return exec_


async def test_only_so_many_ended_commands_are_kept(make: Make) -> None:
    execs = await make(exec_keep_exits=2)
    three = [await ended(execs, "echo", str(n)) for n in range(3)]
    await until(lambda: len(execs.list("demo")) == 2)
    assert execs.list("demo") == three[1:]
    with pytest.raises(NotFound):
        execs.get("demo", three[0].id)


@pytest.mark.parametrize("limit", [{"exec_keep_bytes": 100_000}, {"exec_keep_count": 1}])
async def test_of_many_ended_commands_only_the_end_is_kept(make: Make, limit: dict[str, int]) -> None:
    """Their output is reported as lost, except to current readers; nothing else keeps it in memory."""
    execs = await make(**limit)
    script = "head -c 60000 /dev/zero; exit 3"
    first = await ended(execs, "sh", "-c", script, "x" * 5000)
    reader = first.attach()
    tail = weakref.ref(first.streams["stdout"].tail)
    await ended(execs, "sh", "-c", script)
    await until(lambda: first.kept_bytes < 1000)
    assert first.over.code == 3 and len(str((await first.describe())["argv"])) < 300
    late = first.attach({"stdout": 10})
    assert late.lost == {"stdout": 59_990, "stderr": 0}
    assert late.cursors["stdout"].offset == 60_000
    assert b"".join(await reader.cursors["stdout"].next()) == bytes(60_000)
    reader.close()
    del reader
    gc.collect()
    assert tail() is None


async def test_what_is_forgotten_is_held_by_nothing(make: Make) -> None:
    execs = await make(exec_keep_exits=1)
    first = weakref.ref(await ended(execs, "true"))
    await ended(execs, "true")
    await until(lambda: len(execs.list("demo")) == 1)
    await until(lambda: gc.collect() >= 0 and first() is None)


async def test_an_ended_command_is_forgotten_in_time(make: Make) -> None:
    execs = await make(exec_keep=0.1)
    await ended(execs, "true")
    await until(lambda: execs.list("demo") == [])


async def test_an_ended_command_is_kept_while_something_of_it_runs(make: Make) -> None:
    """Neither its age nor the number of kept commands removes it while its processes can be killed."""
    execs = await make(exec_keep=0.1, exec_keep_exits=2)
    seconds = mark()
    left = await ended(execs, "sh", "-c", f"setsid sleep {seconds} >/dev/null 2>&1 </dev/null &")
    assert left.over.left == 1
    for n in range(3):
        await ended(execs, "echo", str(n))
    await until(lambda: execs.list("demo") == [left])
    assert (await execs.cancel(left)).killed == 1
    await until(lambda: execs.list("demo") == [])


async def test_what_ran_in_an_earlier_life_is_lost_and_told_once(make: Make, tmp_path: Path) -> None:
    """Also without a caller's id; commands that had already ended are forgotten."""
    execs = await make()
    over = await ended(execs, "true")
    running = await execs.start("demo", ExecSpec(("sleep", mark())))
    running.process.started_at -= 3600  # it runs for an hour
    began = running.process.started_at
    await until(lambda: len(noted(execs)) == 1)
    again = Execs(execs._commands, Bus(MemoryJournal(1000)), execs._idempotency, execs._settings)
    seen = again._bus.subscribe(Filter(), 0)
    async with again:
        found = again.get("demo", running.id)
        assert (found.over.reason, found.over.code) == ("lost", None)
        assert found.over.duration_ms == pytest.approx((time.time() - began) * 1000, abs=60_000)
        assert (await found.describe())["pid"] == running.process.pid
        with pytest.raises(NotFound):
            again.get("demo", over.id)
        again._bus.close()
        told = [event.data["exec"] async for event in seen if event.type == "exec.exited"]
    assert told == [running.id]


async def test_an_end_is_to_be_told_until_no_kill_can_lose_its_event(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    execs, written = await make(), asyncio.Event()
    monkeypatch.setattr(execs._bus, "recorded", lambda event: written.wait())
    running = await execs.start("demo", ExecSpec(("sleep", mark())))
    await until(lambda: len(noted(execs)) == 1)
    await running.cancel(0)
    await running.ended
    await settled()
    assert len(noted(execs)) == 1
    written.set()
    await until(lambda: noted(execs) == [])


async def test_a_lost_command_is_to_be_told_until_no_kill_can_lose_its_event(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    execs, written = await make(), asyncio.Event()
    await execs.start("demo", ExecSpec(("sleep", mark())))
    await until(lambda: len(noted(execs)) == 1)
    again = Execs(execs._commands, Bus(MemoryJournal(1000)), execs._idempotency, execs._settings)
    monkeypatch.setattr(again._bus, "recorded", lambda event: written.wait())
    async with again:
        await turn()
        assert [one.state for one in noted(again)] == ["begun"]
        written.set()
        await until(lambda: [one.state for one in noted(again)] != ["begun"])


async def test_what_has_ended_by_then_is_not_noted(make: Make) -> None:
    execs = await make()
    exec_ = await ended(execs, "true")
    await until(lambda: execs._runner.resting)
    await execs._notes.start(exec_, once=False)
    assert noted(execs) == []


def noted(execs: Execs) -> list[Any]:
    shelf = execs._idempotency._shelf(("demo", "exec", ""))
    return [receipt for receipt in shelf.records.values() if receipt.size]


async def test_a_second_start_of_the_same_id_survives_the_first_ones_cancel(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller waiting for a cancelled start gets an answer and may start again."""
    execs = await make()
    entered = asyncio.Event()
    real = execs._commands.exec

    async def slow(name: str, spec: ExecSpec) -> Process:
        entered.set()
        await asyncio.Event().wait()
        return await real(name, spec)

    monkeypatch.setattr(execs._commands, "exec", slow)
    first = asyncio.create_task(execs.start("demo", ExecSpec(("true",)), exec_id="same"))
    await entered.wait()
    second = asyncio.create_task(execs.start("demo", ExecSpec(("true",)), exec_id="same"))
    await turn()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(Cancelled):
        await second
    monkeypatch.undo()
    assert (await execs.start("demo", ExecSpec(("true",)), exec_id="same")).id == "same"


async def test_leaving_ends_what_runs_and_what_was_left_behind(make: Make) -> None:
    execs = await make()
    runs, left = mark(), mark()
    await execs.start("demo", ExecSpec(("sleep", runs)))
    await ended(execs, "sh", "-c", f"setsid sleep {left} </dev/null >/dev/null 2>&1 & exit 0")
    await until(lambda: alive(runs) == alive(left) == 1)
    await execs.end_all()
    assert alive(runs) == alive(left) == 0
    assert execs.running == 0


async def test_leaving_does_not_wait_for_what_has_ended_whole(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of such commands may be kept, and clients wait for the next process."""
    execs, killed = await make(), list[float]()
    over = await ended(execs, "true")

    async def kill(grace: float) -> None:
        killed.append(grace)

    monkeypatch.setattr(over.process, "kill", kill)
    await execs.end_all()
    assert not killed


async def test_the_life_of_a_command_is_told_once(make: Make) -> None:
    execs = await make()
    following = execs._bus.subscribe(Filter(types=("exec.*",)))
    exec_ = await execs.start("demo", ExecSpec(("sleep", "60")), by="me")
    for _ in range(2):
        await execs.cancel(exec_)
    await exec_.ended  # a killed one's state says so before its exit is known
    await ended(execs, "true")
    execs._bus.close()
    told = [(event.type, event.data["exec"] == exec_.id) async for event in following]
    assert sorted(told[:3]) == [("exec.cancelled", True), ("exec.exited", True), ("exec.started", True)]
    assert told[3:] == [("exec.started", False), ("exec.exited", False)]


async def test_a_reader_of_text_gets_whole_characters_from_pieces_of_any_size() -> None:
    """Also if a piece is as large as one read and follows the first byte of a character."""
    stream, text = Stream("stdout", 4 << 20, Pace(1 << 20, 1, 0, 0), roomy()), "€" * 200_000
    data = text.encode()
    for piece in (data[:1], data[1 : 256 << 10], data[256 << 10 :]):
        stream.tail.append(piece)
    cursor, _ = stream.attach(0, Reading(text=True))
    read = ""
    while len(read) < len(text):
        async with asyncio.timeout(30):
            parts = await cursor.next()
        read += b"".join(parts).decode()
        cursor.taken(parts)
    assert read == text
    waiting = asyncio.create_task(cursor.next())
    await turn()
    assert not waiting.done()  # for more: an empty part is none
    waiting.cancel()


async def test_a_window_is_kept_to_by_text_too() -> None:
    """With one byte of room, at most one character is sent."""
    stream = Stream("stdout", 4 << 20, Pace(1 << 20, 1, 0, 1 << 20), roomy())
    stream.tail.append("€".encode() * 100_000)
    cursor, _ = stream.attach(0, Reading(text=True, acks=True, window=7))
    async with asyncio.timeout(30):
        for size in (6, 3):
            parts = await cursor.next()
            assert b"".join(parts) == "€".encode() * (size // 3)
            cursor.taken(parts)


# --- readers at different paces -----------------------------------------------------------------------

CHUNK = 10_000


class Printing(EndedProcess):
    """A process that prints `chunks` numbered chunks as fast as it is read; `printed` counts them."""

    def __init__(self, chunks: int) -> None:
        super().__init__(1, 0.0)
        self.chunks = chunks
        self.printed = 0

    async def read(self, stream: StreamName) -> bytes:
        await turn()
        if self.printed == self.chunks:
            return b""
        self.printed += 1
        return self.whole(self.printed)[-CHUNK:]

    @staticmethod
    def whole(chunks: int) -> bytes:
        return b"".join(b"%9d\n" % number * (CHUNK // 10) for number in range(1, chunks + 1))


async def read(cursor: Cursor) -> bytes:
    """Read a stream to its end; each lost byte is replaced by a zero at the front."""
    found = b""
    while parts := await cursor.next():
        found += bytes(cursor.lost)
        cursor.lost = 0
        found += b"".join(parts)
        cursor.taken(parts)
    return found


async def stopped(process: Printing) -> int:
    """Wait until printing stops; return the number of chunks printed."""
    before = -1
    while before != process.printed:
        before = process.printed
        await settled()
    return before


def roomy(limit: int = 1 << 30) -> Share:
    """Return a tenant's share of `size` bytes."""
    return Budget(limit, limit).tenant("demo")


def printing(patience: float = 60.0, share: Share | None = None) -> tuple[Stream, Printing]:
    """Return a stream that keeps 50 kB, lets a reader lag by 30 kB and keeps 100 kB for one left behind."""
    pace = Pace(window=3 * CHUNK, patience=patience, lag=10 * CHUNK, unacked=5 * CHUNK)
    return Stream("stdout", 5 * CHUNK, pace, share or roomy()), Printing(100)


async def test_a_command_waits_for_its_only_reader_and_loses_nothing() -> None:
    stream, process = printing(patience=0)
    cursor, _ = stream.attach(0, Reading(viewer=True))
    pumping = asyncio.create_task(stream.pump(process))
    assert await stopped(process) == 4
    async with asyncio.timeout(30):
        assert await read(cursor) == process.whole(100)
        await pumping


class Breakable(Printing):
    """A process whose output must not stay unread for long."""

    patience = 0.01

    def take(self, stream: StreamName) -> bytes:
        self.printed = min(self.printed + 1, self.chunks)
        return self.whole(self.printed)[-CHUNK:]


async def test_what_outlives_the_gateway_counts_twice() -> None:
    """Its log uses memory in addition to the tail, from the same share."""
    share = roomy(12 * CHUNK)
    stream, process = printing(share=share)
    logs = list[int]()

    def keep(name: StreamName, offset: int) -> int:
        logs.append((process.printed + 3) * CHUNK - offset)  # whole segments: some of what is before it, too
        return logs[-1]

    process.holding = cast(Holding, SimpleNamespace(keep=keep))
    await stream.pump(process)
    assert logs[-1] == 8 * CHUNK and share.held == 13 * CHUNK
    assert share.full(1) is not None
    stream.release()
    assert share.held == 0


async def test_what_stands_behind_a_reader_is_taken_in_up_to_the_lag() -> None:
    """It is not lost, and no more than the lag is kept."""
    stream, _ = printing()
    process = Breakable(100)
    cursor, _ = stream.attach(0, Reading(viewer=True))
    pumping = asyncio.create_task(stream.pump(process))
    await until(lambda: process.printed >= 10)
    await pause(0.2)  # in which more would be taken
    assert process.printed == 10
    async with asyncio.timeout(30):
        assert await read(cursor) == process.whole(100)
        await pumping


async def test_nothing_is_taken_in_where_the_tenants_share_is_full() -> None:
    stream, _ = printing(share=roomy(READ))
    process = Breakable(100)
    cursor, _ = stream.attach(0, Reading(viewer=True))
    pumping = asyncio.create_task(stream.pump(process))
    await until(lambda: process.printed >= 4)
    await pause(0.2)
    assert process.printed == 4
    async with asyncio.timeout(30):
        assert await read(cursor) == process.whole(100)
        await pumping


async def test_a_viewer_that_stands_still_holds_another_up_for_a_moment_only() -> None:
    """After that it is told how much it has missed, and gets the latest output."""
    stream, process = printing(patience=0.2)
    still, _ = stream.attach(0, Reading(viewer=True))
    other, _ = stream.attach(0, Reading(viewer=True))
    parts = await asyncio.gather(still.next(), stream.pump(process), read(other))
    whole = process.whole(100)
    assert parts[2] == whole
    assert stream.tail.end - stream.tail.start <= 11 * CHUNK
    still.taken(parts[0])
    had = sum(map(len, parts[0]))
    missed = stream.tail.start - had
    assert await read(still) == bytes(missed) + whole[had + missed :]


async def test_who_catches_up_counts_again() -> None:
    stream, process = printing(patience=0)
    slow, _ = stream.attach(0, Reading(viewer=True))
    other, _ = stream.attach(0, Reading(viewer=True))
    pumping = asyncio.create_task(stream.pump(process))
    reading = asyncio.create_task(read(other))
    assert await stopped(process) == 100
    assert slow.behind
    rest = await read(slow)
    assert len(rest) == 100 * CHUNK
    assert not slow.behind
    await asyncio.gather(pumping, reading)


async def test_two_that_both_move_lose_nothing_at_the_slower_ones_pace() -> None:
    stream, process = printing()
    one, _ = stream.attach(0, Reading(viewer=True))
    other, _ = stream.attach(0, Reading(viewer=True))

    async def slowly(cursor: Cursor) -> bytes:
        found = b""
        while parts := await cursor.next():
            for _ in range(5):
                await turn()
            cursor.taken(parts)
            found += b"".join(parts)
        return found

    async with asyncio.timeout(30):
        results = await asyncio.gather(slowly(one), read(other), stream.pump(process))
    assert results[0] == results[1] == process.whole(100)


async def test_who_is_no_viewer_is_never_left_behind() -> None:
    """A tool must get the complete output, whoever else is watching."""
    stream, process = printing(patience=0)
    tool, _ = stream.attach(0, Reading())
    viewer, _ = stream.attach(0, Reading(viewer=True))
    pumping = asyncio.create_task(stream.pump(process))
    reading = asyncio.create_task(read(viewer))
    assert await stopped(process) == 4
    async with asyncio.timeout(30):
        assert await read(tool) == process.whole(100)
        await asyncio.gather(pumping, reading)


async def test_a_reader_with_a_window_is_sent_no_more_than_it_acknowledges() -> None:
    stream, process = printing()
    cursor, _ = stream.attach(0, Reading(viewer=True, acks=True, window=2 * CHUNK + 5))
    pumping = asyncio.create_task(stream.pump(process))
    found = b""
    async with asyncio.timeout(30):
        while len(found) < 100 * CHUNK:
            reading = asyncio.create_task(read(cursor))
            await stopped(process)
            sent = cursor.offset
            assert 0 < sent - len(found) <= 2 * CHUNK + 5
            reading.cancel()
            await asyncio.wait([reading])
            found = process.whole(100)[:sent]
            cursor.ack(sent)
        assert await read(cursor) == b""
        await pumping


# --- a tenant's share of memory -----------------------------------------------------------------------


async def test_streams_of_a_tenant_keep_a_little_where_its_share_is_full() -> None:
    """Many printing commands use no more than the share and a little each."""
    share = roomy(300_000)
    streams = [printing(share=share) for _ in range(50)]
    for stream, process in streams:
        await stream.pump(Printing(20))
        assert stream.tail.end == 20 * CHUNK and process.printed == 0
    held = sum(stream.tail.end - stream.tail.start for stream, _ in streams)
    assert held == share.held <= 300_000 + 50 * (5 * CHUNK)
    assert all(stream.tail.end > stream.tail.start for stream, _ in streams)
    for stream, _ in streams:
        stream.release()
    assert share.held == 0


async def test_reader_loses_nothing_that_it_was_not_sent_where_the_share_is_full() -> None:
    """Sent but unacknowledged output is dropped instead."""
    share = roomy(1)
    share.hold(1)
    stream, process = printing(share=share)
    cursor, _ = stream.attach(0, Reading(viewer=True, acks=True))
    pumping = asyncio.create_task(stream.pump(process))
    async with asyncio.timeout(30):
        assert await read(cursor) == process.whole(100)
        await pumping
    assert stream.tail.end - stream.tail.start <= 64 << 10
    late, lost = stream.attach(0, Reading())
    assert lost >= 100 * CHUNK - (64 << 10)
    late.detach()


async def test_output_of_ended_commands_gives_way_to_what_runs(make: Make) -> None:
    """The oldest first, of the same tenant; what printed nothing stays as it is."""
    execs = await make(exec_tenant_bytes=1 << 20)
    theirs = await execs.start("other", ExecSpec(("sh", "-c", "head -c 400000 /dev/zero")))
    await theirs.ended
    silent = await ended(execs, "true", "x" * 5000)
    first, second = [await ended(execs, "sh", "-c", "head -c 400000 /dev/zero") for _ in range(2)]
    await until(lambda: second in execs._kept._whole.get("demo", {}))
    assert first.streams.kept == 400_000
    last = await ended(execs, "sh", "-c", "head -c 500000 /dev/zero")
    assert [one.streams.kept for one in (first, second, last)] == [0, 400_000, 500_000]
    assert theirs.streams.kept == 400_000
    assert len(str((await silent.describe())["argv"])) > 4000
    late = first.attach()
    assert late.lost == {"stdout": 400_000, "stderr": 0}
    late.close()


async def test_what_is_still_read_counts_until_its_last_reader_leaves(make: Make) -> None:
    """Else a tenant could keep any amount: readers that stand still, on commands whose output is dropped."""
    execs = await make(exec_keep_count=2, exec_tenant_bytes=1 << 20)
    first, second = [await ended(execs, "sh", "-c", "head -c 400000 /dev/zero") for _ in range(2)]
    readers = [first.attach(), second.attach()]
    third = await ended(execs, "sh", "-c", "head -c 300000 /dev/zero")
    await until(lambda: first.streams.kept == 0)
    assert second.streams.kept == 400_000, "what is read does not give way: it would free nothing"
    assert third.streams.kept < 200_000
    assert execs.held == 800_000 + third.streams.kept
    readers[0].close()
    assert execs.held == 400_000 + third.streams.kept
    readers[1].close()
    assert execs.held == 400_000 + third.streams.kept


async def test_ended_commands_of_one_tenant_push_out_their_own_output_first(make: Make) -> None:
    execs = await make(exec_keep_bytes=100_000)
    theirs = await execs.start("other", ExecSpec(("sh", "-c", "printf %02000d 1")))
    await theirs.ended
    mine = [await ended(execs, "sh", "-c", "printf %050000d 1") for _ in range(4)]
    await until(lambda: mine[-1] in execs._kept._whole.get("demo", {}))
    assert [*execs._kept._whole["other"]] == [theirs]
    assert [*execs._kept._whole["demo"]] == mine[-1:]
    assert execs.held <= 100_000


async def test_commands_of_the_gateway_itself_count_too_and_end_with_who_asked(make: Make) -> None:
    """However many begin at once; what must not be lost runs beyond the limit."""
    execs = await make(max_execs=4)
    began, asked = list[Process](), ExecSpec(("sleep", "1000"))

    async def hang(tenant: str) -> None:
        async with execs.script(tenant, asked) as process:
            began.append(process)
            await process.wait()

    hanging = [asyncio.create_task(hang("demo")) for _ in range(20)]
    await until(lambda: sum(task.done() for task in hanging) == 16)
    assert all(isinstance(task.exception(), RateLimited) for task in hanging if task.done())
    with pytest.raises(RateLimited, match="too many running commands"):
        await execs.start("demo", asked)
    async with execs.script("demo", ExecSpec(("true",)), always=True) as process:
        await process.wait()
    await (await execs.start("other", ExecSpec(("true",)))).ended
    await until(lambda: len(began) == 4)
    for task in hanging:
        task.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)
    assert execs.running_in("demo") == 0
    assert not [process.pid for process in began if Path(f"/proc/{process.pid}").exists()]
    await ended(execs, "true")


async def test_a_slot_is_free_once_a_command_is_killed_has_ended_or_did_not_start(make: Make) -> None:
    execs = await make(max_execs=1)
    for _ in range(3):
        exec_ = await execs.start("demo", ExecSpec(("sleep", "1000")))
        with pytest.raises(RateLimited):
            await execs.start("demo", ExecSpec(("true",)))
        await execs.cancel(exec_)
        await ended(execs, "true")
        await until(lambda: execs.running_in("demo") == 0)
        with pytest.raises(GatewayError):
            await execs.start("demo", ExecSpec(("/nowhere",), cwd="/nowhere"))
    assert execs.running_in("demo") == 0


async def test_followers_of_a_log_count_before_they_begin(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.lifecycle.site_logs.FOLLOWERS", 3)
    execs = await make()
    logs = SiteLogs(execs, execs._commands)
    opened = await asyncio.gather(
        *(logs.open("demo", 1, follow=True) for _ in range(20)), return_exceptions=True
    )
    following = [one for one in opened if isinstance(one, Following)]
    assert len(following) == 3 == execs.running_in("demo")
    assert sum(isinstance(one, RateLimited) for one in opened) == 17

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def nobody(message: Any) -> None:
        pass

    for one in following:
        await one({"type": "http"}, gone, nobody)
    assert execs.running_in("demo") == 0
    (again := await logs.open("demo", 1, follow=True)).end()
    await again({"type": "http"}, gone, nobody)
