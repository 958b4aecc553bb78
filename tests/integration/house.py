"""A house of commands of all kinds, over whose heads the gateway is killed again and again.

Each actor is a generator: what it has before a kill, a `yield` over which the gateway is killed and another
one is started, and what must be true then. A guest comes anew before each kill and has one `yield`; a
resident stays over all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tests.integration.conftest import Container
from tests.integration.hosts import SEED, Host
from tests.live import Wire
from tests.waits import pause, until

SAME: Final = ("argv", "pid", "startedAt", "pty", "state")


Actor = Callable[["House"], AsyncGenerator[None]]
HOLDERS: Final = 0.3  # of the kills of the gateway, so many come right after one of the holder


class House:
    """The commands of one tenant, and what the actors share. `over` says that no kill comes any more."""

    wire: Wire  # of all actors, a new one after each kill

    def __init__(self, host: Host, tenant: Container, folder: Path) -> None:
        self.host, self.tenant = host, tenant
        self.folder = folder  # for another gateway's state
        self.over = False
        self.strangers: set[str] = set()
        self.seen = dict[str, Any]()  # what residents tell in the end
        self._path = Path(f"/proc/{tenant.pid}/root/srv/site/house")
        self._word = ""
        self._ends: list[Path] = []

    async def live(
        self, residents: Sequence[Actor], guests: Sequence[Actor], kills: int, until_: float
    ) -> None:
        """Have everybody live over so many kills, or those until a time; some follow one of the holder."""
        chance = dice("kills")
        async with contextlib.AsyncExitStack() as stack:
            staying = [await stack.enter_async_context(contextlib.aclosing(one(self))) for one in residents]
            wires = await stack.enter_async_context(contextlib.AsyncExitStack())
            self.wire = await wires.enter_async_context(self.host.gateway.wire(self.tenant.name))
            for number in range(kills):
                if time.monotonic() > until_:
                    break
                await self._begin(number)
                visiting = [one(self) for one in guests]
                await _together(_arrive(one) for one in [*staying, *visiting])
                before = await self.listed()
                if chance.random() < HOLDERS:
                    await self._replace_the_holder(chance.uniform(0, 0.3), set(before))
                await pause(chance.uniform(0.05, 0.6))
                await self.host.kill(self._alone)
                await wires.aclose()
                self.wire = await wires.enter_async_context(self.host.gateway.wire(self.tenant.name))
                after = await self.listed()
                for exec_ in before.keys() & after.keys():
                    had, has = before[exec_], after[exec_]
                    assert [has[key] for key in SAME] == [had[key] for key in SAME]
                    assert all(has["offsets"][name] >= had["offsets"][name] for name in had["offsets"])
                await _together(_leave(one) for one in visiting)
                assert self.tenant.count("sleep 100") == 0, "of a tree something is left"
            self.over = True
            await _together(_leave(one) for one in staying)

    async def _replace_the_holder(self, seconds: float, running: set[str]) -> None:
        """Kill the holder, and start one soon, which the gateway gives everything."""
        self.seen["holders"] = self.seen.get("holders", 0) + 1
        await self.host.end_holder()
        await pause(seconds)
        await self.host.hold()
        await until(lambda: running <= self.host.noted())

    async def _begin(self, number: int) -> None:
        """Begin another round."""
        self._word, self._ends, self.strangers = f"word-{number}", [], set()
        await asyncio.to_thread(self.tenant.sh, f": > {self.word}")  # nobody else can make a file there

    @property
    def word(self) -> str:
        """A file in the container that is empty until there is no gateway."""
        return f"/srv/site/house/{self._word}"

    def end(self, name: str) -> str:
        """Return a file to be made by a command that ends while there is no gateway."""
        self._ends.append(self._path / f"{self._word}-{name}")
        return f"{self.word}-{name}"

    async def _alone(self) -> None:
        """Do what happens while there is no gateway."""
        (self._path / self._word).write_text("now")
        await until(lambda: all(end.exists() for end in self._ends))
        for memory in self.host.memories():
            noted: Any = memory.read_facts() if memory.noted else None
            if noted is not None and noted["facts"]["id"] in self.strangers:
                memory.write_facts({**noted, "format": 99})

    async def start(self, command: str, *, up: bool = False, **params: Any) -> Any:
        """Start a command, and return it, with `up` once it has said something."""
        started = await self.wire.call("exec/start", command=command, **params)
        if up:
            await self.wire.until(lambda: self.wire.output[started["channel"], 1])
        return started

    async def ended(self, exec_: str) -> Any:
        return await self.wire.call("exec/wait", exec=exec_)

    async def printed(self, exec_: str) -> bytes:
        """Return the whole output of an ended command."""
        found = await self.wire.call("exec/attach", exec=exec_)
        await self.wire.exited(exec_)
        return bytes(self.wire.output[found["channel"], 1])

    async def listed(self) -> dict[str, Any]:
        """Return what `exec/list` says of the running commands."""
        found = await self.wire.call("exec/list")
        return {one["exec"]: one for one in found["execs"] if one["state"] == "running"}


def dice(name: str) -> random.Random:
    return random.Random(f"{SEED} {name}")


async def _together(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all at once; if one fails, the others end before anything else does."""
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(work)


async def _arrive(actor: AsyncGenerator[None]) -> None:
    """Have an actor go on to where it waits for a kill."""
    await anext(actor)


async def _leave(actor: AsyncGenerator[None]) -> None:
    """Have an actor go on to its end."""
    async for _ in actor:
        raise AssertionError(f"{actor} waits for another kill")
