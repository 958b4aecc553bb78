"""Held commands are adopted as they were left or released, whatever their facts contain."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.errors import Conflict
from gateway.events import Bus, MemoryJournal
from gateway.execs import Execs, Reading
from gateway.holder.holder import HolderClient, held_at
from gateway.host.services import ensure_holder, stop_holder
from gateway.idempotency import Idempotency, Key
from gateway.incus import ExecMemory, Incus
from gateway.incus.memory import Log, Odometer
from gateway.incus.stream_socket import BINARY, Frames
from gateway.rootfs.workers import Workers
from gateway.runtime import Adopted
from gateway.runtime.incus import commands
from gateway.runtime.incus.commands import IncusCommands
from gateway.runtime.local import LocalRuntime
from gateway.runtime.local.commands import LocalCommands
from gateway.runtime.local.disks import LocalDisks
from gateway.settings import Settings
from gateway.shells import Shells
from gateway.shells.shell_command import BashCommand, mark
from gateway.storage.store import Store
from gateway.tools.session import ToolSession
from tests.waits import turn, until

OWN = {
    "tenant": "demo",
    "exec": "own-1/abc",
    "pid": 7,
    "started": 1_700_000_000.0,
    "terminal": False,
    "path": "",
    "method": "cgroup",
    "cgroup": "/sys/fs/cgroup/none/of/these",
    "skip": 3,
}
FACTS = {
    "id": "mine",
    "tenant": "demo",
    "argv": ["echo", "hello"],
    "asked": "00ff",
    "pty": None,
    "stdin": True,
    "linger": 60.0,
    "lingers": None,
    "deadline": None,
    "once": True,
    "ending": None,
    "owed": [[0, 5]],
    "places": [["a-1", 0, True]],
    "over": {
        "exec": "mine",
        "exitCode": 3,
        "signal": None,
        "reason": "exited",
        "durationMs": 12,
        "offsets": {"stdout": 6, "stderr": 4},
        "left": 0,
    },
}

CALL = {
    "id": "call-1",
    "digest": "00ff",
    "linger": 30.0,
    "event": "c-1",
    "by": "me",
    "began": 1_700_000_000.0,
}
PURPOSE = {
    "shell": "bash_0123abcd",
    "session": "agent",
    "cwd": None,
    "phase": "background",
    "seconds": 120.0,
    "until": 1_700_000_120.0,
    "meaning": None,
    "call": CALL,
    "notes": [],
    "offsets": {"stdout": 6, "stderr": 2},
    "size": 8,
    "characters": 8,
    "pending": "",
    "head": 0,
    "shown": False,
    "file": -1,
    "taken": {"stdout": 2, "stderr": 0},
    "last": ["0123", {"stdout": 0, "stderr": 0}],
    "killer": None,
}


class HeldCommands(LocalCommands):
    """Commands of the local runtime, but adopting held ones of containers."""

    def __init__(self, settings: Settings, disks: LocalDisks, holder: HolderClient) -> None:
        super().__init__(settings, disks)

        async def none(name: str) -> int:
            return 0

        self._held = IncusCommands(settings, Incus(Path("/nowhere"), "default", 1.0), none, holder)

    async def adopt(self) -> Sequence[Adopted]:
        return await self._held.adopt()


class Adopting(LocalRuntime):
    """The local runtime, but adopting held commands of containers."""

    def __init__(self, settings: Settings, holder: HolderClient) -> None:
        super().__init__(settings)
        self.commands = HeldCommands(settings, self.disks, holder)


@contextlib.asynccontextmanager
async def successor(settings: Settings) -> AsyncIterator[tuple[LocalRuntime, Idempotency]]:
    """Yield the runtime and the records of a gateway that starts after another."""
    async with (
        HolderClient(settings.holder_socket) as holder,
        Adopting(settings, holder) as runtime,
        Store(settings.state_dir / "records") as store,
    ):
        yield runtime, await Idempotency.opened(store, settings)


@pytest.fixture
async def settings(tmp_path: Path) -> AsyncIterator[Settings]:
    """Settings with a state dir in which a holder listens."""
    settings = Settings(runtime="local", state_dir=tmp_path)
    ensure_holder(settings, tmp_path / "log")
    yield settings
    stop_holder(settings)


def ended(facts: Any, purpose: Any = None) -> ExecMemory:
    """Return the memory of a command that has printed something and ended, of Bash if it has a purpose."""
    memory = ExecMemory.made()
    for area, printed in (("first", b"hello\n"), ("second", b"\x01K\nerr\n")):
        log = Log(memory, area, None)
        log.begin(0)
        frame = bytes([0x80 | BINARY, len(printed)]) + printed
        log.room()[: len(frame)] = frame
        Frames(log).feed(log.landed(len(frame)))
        log.close()
    memory.write_facts(facts)
    if purpose is not None:
        memory.write_facts(purpose, "purpose")
    return memory


async def put(settings: Settings, memories: Sequence[ExecMemory]) -> None:
    async with HolderClient(settings.holder_socket) as holder:
        await holder.taken_over()
        for number, memory in enumerate(memories):
            holder.put(f"command/{number}", [memory.descriptor])
        await until(lambda: held_at(settings.holder_socket) == len(memories))
    for memory in memories:
        memory.close()


async def is_whole(execs: Execs) -> None:
    """Check that the command `mine`, which has ended, has its output and its end."""
    exec_ = execs.get("demo", "mine")
    assert (exec_.over.code, exec_.over.reason) == (3, "exited")
    attachment = exec_.attach(reading=Reading())
    found = {name: b"".join(await one.next()) for name, one in attachment.cursors.items()}
    assert found == {"stdout": b"hello\n", "stderr": b"err\n"}
    attachment.close()


async def test_an_ended_command_is_kept_with_its_output_and_its_end(settings: Settings) -> None:
    await put(settings, [ended({"format": 1, "own": OWN, "facts": FACTS})])
    async with successor(settings) as (runtime, receipts):
        async with Execs(runtime.commands, Bus(MemoryJournal(100)), receipts, settings) as execs:
            await is_whole(execs)
            execs.forget_tenant("demo")
            await until(lambda: held_at(settings.holder_socket) == 0)


async def test_records_of_earlier_ends_take_no_output_from_what_is_held(settings: Settings) -> None:
    """They have none themselves, though they count as kept: as the oldest, and so go first."""
    settings = settings.model_copy(update={"exec_keep_count": 2, "exec_keep_exits": 4})
    await put(settings, [ended({"format": 1, "own": OWN, "facts": FACTS})])
    async with Store(settings.state_dir / "records") as store:
        records = await Idempotency.opened(store, settings)
        for number in range(6):
            key: Key = ("demo", "exec", f"x-{number}")
            await records.begin(key, b"asked")
            await records.finish(key, b"asked", orjson.dumps({"exit": FACTS["over"]}))
    async with successor(settings) as (runtime, records):
        async with Execs(runtime.commands, Bus(MemoryJournal(100)), records, settings) as execs:
            await is_whole(execs)
            assert [one.id for one in execs.list("demo")] == ["x-3", "x-4", "x-5", "mine"]


async def test_an_end_that_nobody_was_told_is_told_once_and_stays_on_record(settings: Settings) -> None:
    """The gateway was killed right after it had noted the end; so its caller's id is not free again."""
    key: Key = ("demo", "exec", "mine")
    asked, told = bytes.fromhex(str(FACTS["asked"])), list[int]()
    await put(settings, [ended({"format": 1, "own": OWN, "facts": FACTS})])
    async with Store(settings.state_dir / "records") as store:
        await (await Idempotency.opened(store, settings)).begin(key, asked)
    for _ in range(2):
        async with successor(settings) as (runtime, receipts):
            bus = Bus(MemoryJournal(100))
            before = bus.last
            async with Execs(runtime.commands, bus, receipts, settings) as execs:
                await is_whole(execs)
                told.append(bus.last - before)
                while receipts.begun(key, asked):  # until its event is on record
                    await turn()
                assert await receipts.result(key, asked) is not None
    assert told == [1, 0]


@pytest.mark.parametrize("before", [False, True])
async def test_an_end_is_not_told_again_after_a_kill_before_that_was_noted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """An event from before its start is of an earlier command with the same id."""
    key: Key = ("demo", "exec", "mine")
    asked = bytes.fromhex(str(FACTS["asked"]))
    await put(settings, [ended({"format": 1, "own": OWN, "facts": FACTS})])
    async with successor(settings) as (runtime, receipts):
        bus = Bus(MemoryJournal(100))
        await receipts.begin(key, asked)
        with monkeypatch.context() as patched:
            if before:
                patched.setattr("gateway.events.bus.time.time", lambda: 1_600_000_000.0)
            bus.publish("exec.exited", "demo", {"exec": "mine"})
        bus.publish("exec.exited", "demo", {"exec": "another"})
        last = bus.last
        async with Execs(runtime.commands, bus, receipts, settings):
            while receipts.begun(key, asked):  # noted now, and not told for ever
                await turn()
        assert bus.last - last == before


async def test_a_command_that_has_just_ended_is_kept_too(settings: Settings) -> None:
    """The holder still has its sockets, of which it is told to let go a moment after the end."""
    noted = {"format": 1, "own": OWN, "facts": FACTS}
    async with (
        all_left_waiting(settings, 1, noted, 0, [b"hello\n", b"\x01K\nerr\n"]) as (shell,),
        successor(settings) as (runtime, receipts),
    ):
        async with Execs(runtime.commands, Bus(MemoryJournal(100)), receipts, settings) as execs:
            await is_whole(execs)
            await until(shell.hung_up)
            assert held_at(settings.holder_socket) == 1


async def test_a_command_that_goes_on_is_sent_to_the_next_holder_alone(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that kept it has it already: a start with hundreds of commands would wait for that."""
    sent, send = list[str](), HolderClient._sent

    def noted_too(self: HolderClient, name: str) -> bool:
        sent.append(name)
        return send(self, name)

    monkeypatch.setattr(HolderClient, "_sent", noted_too)
    facts = {**FACTS, "over": None, "owed": None, "places": []}
    noted = {"format": 1, "own": {**OWN, "cgroup": None}, "facts": facts}
    async with all_left_waiting(settings, 1, noted, 0):
        sent.clear()
        async with successor(settings) as (runtime, receipts):
            async with Execs(runtime.commands, Bus(MemoryJournal(100)), receipts, settings) as execs:
                exec_ = execs.get("demo", "mine")
                assert exec_.state == "running"
                assert not sent
                stop_holder(settings)
                ensure_holder(settings, settings.state_dir / "log")
                await until(lambda: held_at(settings.holder_socket) == 1)
                await execs.leave()
                await exec_.process.aclose()


async def test_facts_of_any_kind_are_taken_over_or_let_go_of(settings: Settings) -> None:
    """None prevents the gateway from starting, or stays held without a command."""
    random.seed(5)
    whole: dict[str, Any] = {"format": 1, "own": OWN, "facts": FACTS}
    wrong: list[Any] = [None, -1, 2, "x", [], {}, [[]], [[1]], {"a": 1}, 1e300, "\x00" * 100, True]
    memories = [ended({**whole, "format": 2})]
    for number in range(150):
        told = copy.deepcopy(whole)
        part = told[random.choice(["own", "facts", "facts"])]
        for key in random.sample(sorted(part), random.randint(1, 3)):
            if random.random() < 0.3:
                del part[key]
            else:
                part[key] = random.choice(wrong)
        told["facts"].setdefault("id", f"x{number}")
        memories.append(ended(told))
    await put(settings, memories)
    before = len(os.listdir("/proc/self/fd"))
    async with HolderClient(settings.holder_socket) as holder, Adopting(settings, holder) as runtime:
        async with Store(settings.state_dir / "records") as store:
            receipts = await Idempotency.opened(store, settings)
            async with Execs(runtime.commands, Bus(MemoryJournal(1000)), receipts, settings) as execs:
                kept = sum(len(execs.list(tenant)) for tenant in {"demo", "x", "", "None"})
                assert 0 < kept < 151
        await until(lambda: held_at(settings.holder_socket) < 151)
    assert len(os.listdir("/proc/self/fd")) <= before + 151


@contextlib.asynccontextmanager
async def taken_over(settings: Settings) -> AsyncIterator[dict[str, BashCommand]]:
    """Go on with the commands of Bash that are held, as in one session; yields those by exec."""
    async with HolderClient(settings.holder_socket) as holder, Adopting(settings, holder) as runtime:
        with contextlib.suppress(Conflict):
            await runtime.tenants.create("demo")
        async with (
            Store(settings.state_dir / "records") as store,
            Workers(settings, tenants=runtime.locations) as workers,
        ):
            receipts = await Idempotency.opened(store, settings)
            async with (
                Execs(runtime.commands, Bus(MemoryJournal(1000)), receipts, settings) as execs,
                Shells(execs, workers, settings) as shells,
            ):
                session, found = ToolSession(lifetime="named", name="agent"), dict[str, BashCommand]()
                for left in shells.adopted():
                    if left.in_front:  # of a call that nobody knows
                        shells.discard(left)
                        continue
                    shells.take_over(await runtime.filesystem("demo"), session, left)
                    assert left.shell is not None
                    found[left.exec_id] = left.shell
                await asyncio.wait([asyncio.ensure_future(one.task) for one in found.values()] or [done()])
                yield found


def done() -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


class Waiting:
    """A shell that is connected and held; what `noted` says of its command was written, and so much sent.

    Of the outputs `printed` was received.
    """

    def __init__(self, noted: Any, purpose: Any, position: int, printed: Sequence[bytes] = ()) -> None:
        self.memory = ExecMemory.made()
        if noted is not None:
            self.memory.write_facts(purpose, "purpose")
            self.memory.write_facts(noted)
        self.memory.record("place").write(struct.pack("<QQ", position, 0))
        self.pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # the answer, control, input and the two outputs
        self.pairs = [socket.socketpair() for _ in range(5)]
        for _, ours in self.pairs[3:]:
            Odometer(ours).reset()
        for area, text, (theirs, ours) in zip(("first", "second"), printed, self.pairs[3:], strict=False):
            log = Log(self.memory, area, Odometer(ours))
            log.begin(0)
            theirs.send(bytes([0x80 | BINARY, len(text)]) + text)
            Frames(log).feed(log.landed(ours.recv_into(log.room())))
        self.pairs[0][0].send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(KILLED) + KILLED)

    @property
    def descriptors(self) -> list[int]:
        return [self.memory.descriptor, *self.pipe, *(ours.fileno() for _, ours in self.pairs)]

    def let_go(self) -> None:
        """Close it, as the kernel does after a kill."""
        self.memory.close()
        for descriptor in self.pipe:
            os.close(descriptor)
        for _, ours in self.pairs:
            ours.close()

    def hung_up(self) -> bool:
        """Return whether nobody has our end of its control any more."""
        with contextlib.suppress(BlockingIOError):
            while self.pairs[1][0].recv(1 << 16, socket.MSG_DONTWAIT):
                pass
            return True
        return False


KILLED = b'{"type":"sync","metadata":{"status_code":200,"metadata":{"return":137}}}'
STARTING: dict[str, Any] = {**OWN, "pid": 0, "started": 0.0, "cgroup": None, "skip": 0, "starting": 20}


@contextlib.asynccontextmanager
async def all_left_waiting(
    settings: Settings, number: int, noted: Any, position: int, printed: Sequence[bytes] = ()
) -> AsyncIterator[list[Waiting]]:
    """Have a holder keep some shells whose gateway was killed."""
    shells = [Waiting(noted, PURPOSE, position, printed) for _ in range(number)]
    async with HolderClient(settings.holder_socket) as holder:
        await holder.taken_over()
        for at, shell in enumerate(shells):
            holder.put(f"command/waiting-{at}", shell.descriptors)
        await until(lambda: held_at(settings.holder_socket) == number)
    for shell in shells:
        shell.let_go()
    try:
        yield shells
    finally:
        for theirs, _ in (pair for shell in shells for pair in shell.pairs):
            theirs.close()


@contextlib.asynccontextmanager
async def left_waiting(settings: Settings, noted: Any, position: int) -> AsyncIterator[Waiting]:
    async with all_left_waiting(settings, 1, noted, position) as (shell,):
        yield shell


@pytest.mark.parametrize("recorded", [True, False])
async def test_a_call_whose_command_had_not_begun_is_made_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """Under its own ids, wherever the kill came before the line was sent; its shell ends."""
    noted = {"format": 1, "own": STARTING, "facts": {**FACTS, "over": None, "starting": {"by": "me"}}}
    keys: list[Key] = [("demo", "exec", "mine"), ("demo", "call", "call-1")]
    asked = bytes.fromhex("00ff")
    async with Store(settings.state_dir / "records") as store:
        receipts = await Idempotency.opened(store, settings)
        for key in keys if recorded else []:
            await receipts.begin(key, asked)
    async with (
        left_waiting(settings, noted, STARTING["starting"] - 1) as shell,
        successor(settings) as (runtime, receipts),
    ):
        bus = Bus(MemoryJournal(100))
        told, forget = bus.last, receipts.forget

        async def held(key: Key) -> None:  # another kill may come before
            assert held_at(settings.holder_socket) == 1
            await forget(key)

        monkeypatch.setattr(receipts, "forget", held)
        async with Execs(runtime.commands, bus, receipts, settings) as execs:
            assert execs.list("demo") == []
            for key in keys:
                assert await receipts.result(key, asked) is None
            await until(lambda: held_at(settings.holder_socket) == 0)
            await until(shell.hung_up)
        assert bus.last == told  # nobody was told that it began


async def test_a_shell_that_waited_for_its_command_ends_without_a_word(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        left_waiting(settings, None, 0) as shell,
        HolderClient(settings.holder_socket) as holder,
        Adopting(settings, holder) as runtime,
    ):
        before = len(os.listdir("/proc/self/fd"))
        assert await runtime.commands.adopt() == []
        await until(lambda: held_at(settings.holder_socket) == 0)
        await until(shell.hung_up)
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    assert not caplog.records


async def test_shells_that_do_not_begin_hold_up_a_start_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However many a tenant has stopped after they were told what to run."""
    monkeypatch.setattr(commands, "_GO_ON", 0.5)
    noted = {"format": 1, "own": STARTING, "facts": {**FACTS, "over": None, "starting": {"by": "me"}}}
    async with (
        all_left_waiting(settings, 20, noted, STARTING["starting"]) as shells,
        HolderClient(settings.holder_socket) as holder,
        Adopting(settings, holder) as runtime,
    ):
        async with asyncio.timeout(30):
            assert await runtime.commands.adopt() == []
        await until(lambda: held_at(settings.holder_socket) == 0)
        await until(lambda: all(shell.hung_up() for shell in shells))
    assert len(caplog.records) == 20


async def test_a_background_shell_returns_what_it_has_not_returned(settings: Settings) -> None:
    """From where its last answer began for the call that may not have got it, from its end for any other."""
    for call, expected in (("another", ("llo\n", "err\n")), ("same", ("hello\n", "err\n"))):
        purpose = {**PURPOSE, "last": [mark("same"), {"stdout": 0, "stderr": 0}]}
        await put(settings, [ended({"format": 1, "own": OWN, "facts": FACTS}, purpose)])
        async with taken_over(settings) as found:
            one = found["mine"]
            one.asked(call)
            looks = {name: unread.look(final=True, lines=False) for name, unread in one.unread.items()}
            assert (looks["stdout"][0], looks["stderr"][0]) == expected
            assert (one.status, one.record.size) == ("failed", 10)
        await until(lambda: held_at(settings.holder_socket) == 0)


async def test_a_purpose_of_any_kind_is_taken_over_or_let_go_of(settings: Settings) -> None:
    """Whatever it says, the others go on, and no descriptor stays."""
    random.seed(6)
    wrong: list[Any] = [None, -1, 2, 1 << 62, "x", [], {}, [[]], {"a": 1}, {"stdout": -1}, 1e300, True]
    memories = []
    for number in range(60):  # of more the first would not be kept
        purpose = {**copy.deepcopy(PURPOSE), "shell": f"bash_{number:08x}"}
        for key in random.sample(sorted(purpose), random.randint(0, 3)):
            if random.random() < 0.2:
                del purpose[key]
            else:
                purpose[key] = random.choice(wrong)
        own = {**OWN, "merged": random.random() < 0.5}
        if random.random() < 0.1:
            own["starting"] = random.choice(wrong)
        facts = {**FACTS, "id": f"x{number}"}
        memories.append(ended({"format": 1, "own": own, "facts": facts}, purpose))
    await put(settings, memories)
    before = len(os.listdir("/proc/self/fd"))
    async with taken_over(settings) as found:
        assert 5 < len(found) < 55
    await until(lambda: held_at(settings.holder_socket) == 0)
    assert len(os.listdir("/proc/self/fd")) <= before + 8
