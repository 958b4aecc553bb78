"""Any interleaving of agents, people, commands, rollbacks and undos is what a list of patches says.

Git is the real one, in a folder by the `local` runtime; the model knows lines of a few small files.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest
from hypothesis import given, settings, strategies

from gateway.events import Bus
from gateway.events.journal import MemoryJournal
from gateway.execs import Execs
from gateway.history import History, outside
from gateway.history import history as history_module
from gateway.history.repository import unattributed
from gateway.rootfs import FilesystemRoot
from gateway.runtime import ExecSpec, Process
from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from gateway.tools.session import ToolSession
from tests.thorough import ALL
from tests.waits import settled

FILES: Final = ("a", "d/b")
SLOTS: Final = 3
COARSE: Final = 0.03  # seconds between two commands: the kernel's time of a change is coarse
PERSONS, NOBODYS, DEPLOYED, UNDONE = "person", "nobody", "deployed", "undone"

State = Mapping[str, tuple[str, ...] | None]
"""Of each file the values of its slots; None if there is no such file."""


def page(path: str, slots: tuple[str, ...]) -> str:
    """Return a file: lines that never change around each slot, so that slots never overlap.

    They are the file's own: none is taken for another that was renamed.
    """
    return "".join(f"top {n} of {path}\n{slot}\nend {n} of {path}\n" for n, slot in enumerate(slots))


def slots(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.splitlines() if not line.startswith(("top ", "end ")))


@dataclass
class Patch:
    """What one turn changed: of each file before and after."""

    owner: str
    before: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    after: dict[str, tuple[str, ...] | None] = field(default_factory=dict)

    def undone(self, now: State) -> tuple[dict[str, tuple[str, ...] | None], list[str]]:
        """Return the files without this patch, and the paths where that is not clear."""
        found, conflicts = dict(now), []
        for path, before in self.before.items():
            after, is_ = self.after[path], now[path]
            if is_ == after:
                found[path] = before
            elif is_ == before:
                continue
            elif is_ is None or after is None or before is None:
                conflicts.append(path)
            else:
                merged = [b if n == a else n for n, a, b in zip(is_, after, before, strict=True)]
                clear = all(n in (a, b) or a == b for n, a, b in zip(is_, after, before, strict=True))
                if clear:
                    found[path] = tuple(merged)
                else:
                    conflicts.append(path)
        return found, sorted(conflicts)


class Session:
    """What a history asks of a tool session."""

    cwd, lifetime = None, "named"


class World:
    """A history over a real folder, and the model of it."""

    def __init__(self, history: History, root: FilesystemRoot, bus: Bus, execs: list[Any]) -> None:
        self.history, self.root, self.bus, self.execs = history, root, bus, execs
        self.work = Path(root.prefix + root.workspace)
        self.sessions = {name: cast(ToolSession, Session()) for name in "AB"}
        self.begun = {"A": 0, "B": 0}
        self.touched: dict[str, set[str]] = {"A": set(), "B": set()}  # by open turns
        self.number = 0
        self.owners: dict[str, str] = {}  # whose a value is, or a file's end
        self.patches: dict[str, Patch] = {}  # by turn

    def state(self) -> dict[str, tuple[str, ...] | None]:
        return {
            path: slots(file.read_text()) if (file := self.work / path).exists() else None for path in FILES
        }

    def change(self, owner: str, path: str, slot: int | None) -> None:
        """Set a slot to a new value, make a file, or remove it."""
        self.number += 1
        value = f"{owner} {self.number}"
        self.owners[value] = owner
        file = self.work / path
        now = self.state()[path]
        if slot is None and now is not None:
            file.unlink()
            return
        file.parent.mkdir(exist_ok=True)
        one = [*(now or [f"{value} {n}" for n in range(SLOTS)])]
        one[slot or 0] = value
        new = file.with_name(f".gateway-{self.number}")  # as the gateway's own workers write
        new.write_text(page(path, tuple(one)))
        new.rename(file)

    async def agent(self, who: str, tool: str, path: str, slot: int | None) -> None:
        session, other = self.sessions[who], "B" if who == "A" else "A"
        if tool == "Bash" and path in self.touched[other]:
            await self.end(other)  # what a command changes in a file of another's open turn is not told apart
        self.touched[who].add(path)
        if not self.begun[who]:
            self.number += 1
            self.begun[who] = self.number
            await self.history.begin("t", session, f"{who} {self.number}", who, who)
        if tool == "Bash":
            await asyncio.sleep(COARSE)
        arguments = {"file_path": path} if tool == "Write" else {"command": "x"}
        async with self.history.during(self.root, session, tool, arguments, who):
            self.change(who, path, (slot or 0) if tool == "Write" else slot)

    async def end(self, who: str) -> None:
        self.begun[who] = 0
        self.touched[who].clear()
        await self.history.end("t", self.sessions[who], who)

    async def person(self, path: str, slot: int | None) -> None:
        async with self.history.saving(self.root, (path,), PERSONS):
            self.change(PERSONS, path, slot)

    async def command(self, path: str, slot: int | None, *, helper: bool) -> None:
        """A client's command, or one of a helper, in a file that no open turn has changed."""
        for who in "AB":
            if path in self.touched[who]:
                await self.end(who)
        await asyncio.sleep(COARSE)
        exec_ = SimpleNamespace(
            **{
                "id": f"x-{len(self.execs)}",
                "spec": ExecSpec(("sh",), work="helper" if helper else "client"),
            },
            **{"state": "running", "streams": SimpleNamespace(printed=0), "over": None},
            **{"process": SimpleNamespace(started_at=time.time()), "ended": asyncio.Future()},
        )
        self.execs.append(exec_)
        self.bus.publish("exec.started", "t", {"exec": exec_.id, "by": "c"})
        await settled()
        self.change(NOBODYS, path, slot)
        exec_.state = "ended"
        exec_.over = SimpleNamespace(duration_ms=(time.time() - exec_.process.started_at) * 1000)
        exec_.ended.set_result(None)
        await asyncio.sleep(COARSE)

    async def rollback(self, number: int) -> None:
        """A deployment that brings former files back; a command looks at them meanwhile."""
        ids = list(self.patches)
        former = self.patches[ids[number % len(ids)]].after if ids else {}
        self.bus.publish("deployment.started", "t", {"deployment": "d"})
        await settled()
        await self.history._recorder.idle("t")
        await asyncio.sleep(COARSE)
        for path, one in former.items():
            self.number += 1
            (self.work / path).unlink(missing_ok=True)
            if one is not None:
                (self.work / path).write_text(page(path, one))
        self.history._outside.record("t")
        facts = {"deployment": "d", "by": "eve", "rollback": "d-0"}
        self.bus.publish("deployment.succeeded", "t", facts)
        await settled()
        await self.history._recorder.idle("t")

    async def undo(self, number: int, *, force: bool) -> None:
        await self.history._settle("t")
        self.begun = dict.fromkeys("AB", 0)
        self.touched = {"A": set(), "B": set()}
        await self.look()
        if not self.patches:
            return
        turn = list(self.patches)[number % len(self.patches)]
        patch, now = self.patches[turn], self.state()
        expected, conflicts = patch.undone(now)
        done = await self.history.undo("t", turn, (), "undo")
        assert done["conflicts"] == conflicts, (patch, now)
        if not conflicts:
            assert self.state() == expected
            assert not patch.before or (done["turn"] is None) == (expected == now)
        else:
            assert self.state() == now and done["turn"] is None
            if force:
                done = await self.history.undo("t", turn, conflicts, "undo")
                assert done["conflicts"] == []
                assert self.state() == {**expected, **{path: patch.before[path] for path in conflicts}}
        await self.look()

    async def look(self) -> None:
        """Read what is on record; a turn has what its owner has changed, and nobody's at most."""
        turns = (await self.history.turns("t", 200))["turns"]
        for turn in reversed(turns[:-1]):  # nothing is before the first
            if turn["turn"] in self.patches:
                continue
            patch = Patch(owner_of(turn))
            for path in FILES:
                before, after = [await self._was(f"{turn['turn']}{side}:{path}") for side in ("^", "")]
                if before != after:
                    patch.before[path], patch.after[path] = before, after
                    self._ascribed(patch, path, before, after, turn)
            self.patches[turn["turn"]] = patch

    def _ascribed(
        self,
        patch: Patch,
        path: str,
        before: tuple[str, ...] | None,
        after: tuple[str, ...] | None,
        turn: Any,
    ) -> None:
        if patch.owner in (DEPLOYED, UNDONE):
            return
        for old, new in zip(before or ("",) * SLOTS, after or ("",) * SLOTS, strict=True):
            if new not in (old, ""):
                owner = self.owners.get(new, patch.owner)
                assert owner in (patch.owner, NOBODYS), (turn, path, old, new)

    async def _was(self, what: str) -> tuple[str, ...] | None:
        process = await asyncio.create_subprocess_exec(
            *("git", f"--git-dir={self.place}", "show", what),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        printed, _ = await process.communicate()
        return slots(printed.decode()) if process.returncode == 0 else None

    @property
    def place(self) -> str:
        return f"{self.root.prefix}/home/site/.local/state/incus-gateway/history.git"


def owner_of(turn: Mapping[str, Any]) -> str:
    match turn["kind"]:
        case "turn":
            return str(turn["title"]).partition(" ")[0]
        case "deployed":
            return DEPLOYED
        case "restored":
            return UNDONE
    return PERSONS if turn["by"] == PERSONS else NOBODYS


@contextlib.asynccontextmanager
async def made() -> AsyncIterator[World]:
    with tempfile.TemporaryDirectory() as folder:
        asked = Settings(runtime="local", state_dir=Path(folder), history=True)
        async with LocalRuntime(asked) as runtime:
            await runtime.tenants.create("t")
            bus, execs = Bus(MemoryJournal(1000), "t"), list[Any]()

            @contextlib.asynccontextmanager
            async def script(tenant: str, spec: ExecSpec, *, always: bool) -> AsyncIterator[Process]:
                process = await runtime.commands.exec(tenant, spec)
                try:
                    yield process
                finally:
                    await process.aclose()

            listed = cast(Execs, SimpleNamespace(list=lambda tenant: execs, script=script))
            async with History(runtime, listed, bus, asked) as history:
                following = asyncio.create_task(history.follow())
                await settled()
                yield World(history, await runtime.filesystem("t"), bus, execs)
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)


NOTHING: Final = unattributed(0)
path, slot = strategies.sampled_from(FILES), strategies.none() | strategies.integers(0, SLOTS - 1)
who, number = strategies.sampled_from("AB"), strategies.integers(0, 30)
step = strategies.one_of(
    strategies.tuples(strategies.just("agent"), who, strategies.sampled_from(("Write", "Bash")), path, slot),
    strategies.tuples(strategies.just("person"), path, slot),
    strategies.tuples(strategies.just("command"), path, slot, strategies.booleans()),
    strategies.tuples(strategies.just("end"), who),
    strategies.tuples(strategies.just("undo"), number, strategies.booleans()),
    strategies.tuples(strategies.just("rollback"), number),
)


@pytest.mark.timeout(1800)
@settings(max_examples=150 if ALL else 5, deadline=None)
@given(strategies.lists(step, min_size=4, max_size=14))
def test_any_interleaving_is_what_a_list_of_patches_says(steps: list[tuple[Any, ...]]) -> None:
    async def run() -> None:
        async with made() as world:
            for path in FILES:
                world.change(NOBODYS, path, None)
            for step in steps:
                match step:
                    case ("agent", who, tool, path, slot):
                        await world.agent(who, tool, path, slot)
                    case ("person", path, slot):
                        await world.person(path, slot)
                    case ("command", path, slot, helper):
                        await world.command(path, slot, helper=helper)
                    case ("end", who):
                        await world.end(who)
                    case ("undo", number, force):
                        await world.undo(number, force=force)
                    case ("rollback", number):
                        await world.rollback(number)
            await world.undo(0, force=True)
            # what is not on record yet is nobody's
            await world.history._recorder._repository.commit("t", "all", (), NOTHING)
            await world.look()

    with pytest.MonkeyPatch.context() as patient:
        for module in (outside, history_module):
            patient.setattr(module, "PATIENCE", 60.0)
        asyncio.run(asyncio.wait_for(run(), 120))
