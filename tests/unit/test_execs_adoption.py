"""Held commands are adopted as they were left or released, whatever their facts contain."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.events import Bus, MemoryJournal
from gateway.execs import Execs, Reading
from gateway.holder.holder import Holder, held_at
from gateway.host import holder_process
from gateway.idempotency import Idempotency
from gateway.incus import Incus, Memory
from gateway.incus.frames import BINARY, Frames
from gateway.incus.memory import Log
from gateway.runtime import Adopted
from gateway.runtime.incus.commands import Commands
from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from gateway.storage.store import Store
from tests.waits import until

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


class Adopting(LocalRuntime):
    """The local runtime, but adopting held commands of containers."""

    def __init__(self, settings: Settings, holder: Holder) -> None:
        super().__init__(settings)

        async def none(name: str) -> int:
            return 0

        self._held = Commands(settings, Incus(Path("/nowhere"), "default", 1.0), none, holder)

    async def adopt(self) -> Sequence[Adopted]:
        return await self._held.adopt()


@pytest.fixture
async def settings(tmp_path: Path) -> AsyncIterator[Settings]:
    """Settings with a state dir in which a holder listens."""
    settings = Settings(runtime="local", state_dir=tmp_path)
    holder_process.ensure(settings, tmp_path / "log")
    yield settings
    holder_process.stop(settings)


def ended(facts: Any) -> Memory:
    """Return the memory of a command that has printed something and ended."""
    memory = Memory.made()
    for area, printed in (("first", b"hello\n"), ("second", b"\x01K\nerr\n")):
        log = Log(memory, area, None)
        log.begin(0)
        frame = bytes([0x80 | BINARY, len(printed)]) + printed
        log.room()[: len(frame)] = frame
        Frames(log).feed(log.landed(len(frame)))
        log.close()
    memory.write_facts(facts)
    return memory


async def put(settings: Settings, memories: Sequence[Memory]) -> None:
    async with Holder(settings.holder_socket) as holder:
        await holder.taken_over()
        for number, memory in enumerate(memories):
            holder.put(f"command/{number}", [memory.descriptor])
        await until(lambda: held_at(settings.holder_socket) == len(memories))
    for memory in memories:
        memory.close()


async def test_an_ended_command_is_kept_with_its_output_and_its_end(settings: Settings) -> None:
    await put(settings, [ended({"format": 1, "own": OWN, "facts": FACTS})])
    async with Holder(settings.holder_socket) as holder, Adopting(settings, holder) as runtime:
        async with Store(settings.state_dir / "records") as store:
            receipts = await Idempotency.opened(store, settings)
            async with Execs(runtime, Bus(MemoryJournal(100)), receipts, settings) as execs:
                exec_ = execs.get("demo", "mine")
                assert (exec_.over.code, exec_.over.reason) == (3, "exited")
                attachment = exec_.attach(reading=Reading())
                found = {name: b"".join(await one.next()) for name, one in attachment.cursors.items()}
                assert found == {"stdout": b"hello\n", "stderr": b"err\n"}
                attachment.close()
                execs.forget_tenant("demo")
                await until(lambda: held_at(settings.holder_socket) == 0)


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
    async with Holder(settings.holder_socket) as holder, Adopting(settings, holder) as runtime:
        async with Store(settings.state_dir / "records") as store:
            receipts = await Idempotency.opened(store, settings)
            async with Execs(runtime, Bus(MemoryJournal(1000)), receipts, settings) as execs:
                kept = sum(len(execs.list(tenant)) for tenant in {"demo", "x", "", "None"})
                assert 0 < kept < 151
        await until(lambda: held_at(settings.holder_socket) < 151)
    assert len(os.listdir("/proc/self/fd")) <= before + 151
