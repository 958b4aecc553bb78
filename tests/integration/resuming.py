"""Clients that go on over any number of connections, as ours do: of one command, and of the tools."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import secrets
import time
from typing import Any

from tests import thorough
from tests.integration.hosts import Host
from tests.live import DEADLINE, RpcFailure, Wire
from tests.waits import pause

ENDLESS = "exec seq 1 1000000000000"
# no more is sent ahead than can be had again, however much the kernel takes for a client that is late
READING = {"acks": True, "window": 8 << 20}
# bytes that are read as they come on each connection; then bytes a second
BURST, PACE = (8 << 20, 8 << 20) if thorough.ALL else (4 << 20, 2 << 20)


class Sent:
    """What was sent to a command: its size and sum, and the bytes that are not known to have arrived.

    Not all of it, which in hours of kills is more than a test can copy without being late for what it tests.
    """

    def __init__(self) -> None:
        self.size = 0
        self._sum = hashlib.sha256()
        self._left, self._start = bytearray(), 0

    def add(self, data: bytes) -> None:
        self.size += len(data)
        self._sum.update(data)
        self._left += data

    def arrived(self, size: int) -> None:
        """Let go of what has arrived."""
        assert self._start <= size <= self.size
        del self._left[: size - self._start]
        self._start = size

    def after(self, size: int) -> bytes:
        return bytes(self._left[size - self._start :])

    def hexdigest(self) -> str:
        return self._sum.hexdigest()


class Resuming:
    """A client of one command, which follows it over any number of connections."""

    def __init__(self, host: Host, tenant: str) -> None:
        self.host = host
        self.tenant = tenant
        self.offsets = {1: 0, 2: 0}
        self.sums = {1: hashlib.sha256(), 2: hashlib.sha256()}
        self.tails = {1: b"", 2: b""}
        self.lost: list[Any] = []
        self.exits: list[Any] = []
        self.breaks = 0
        self.exec = ""
        self.channel = 0
        self.attachment = ""
        self.sent = Sent()
        self.closed = False
        self.connected = asyncio.Event()
        self.over = asyncio.Event()
        self.wire: Wire | None = None
        self.doing = "nothing"
        self.trouble = ""  # the last thing that went wrong
        self._task: asyncio.Task[None] | None = None

    async def start(self, **params: Any) -> None:
        """Start the command, and follow it from now on."""
        started: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run({**READING, "lingerMs": -1, **params}, started))
        done = asyncio.ensure_future(started)
        await asyncio.wait([done, self._task], return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self._task.result()

    async def ended(self, *, lost: bool = False) -> Any:
        """Return the exit, before which no output is lost unless it may be."""
        assert self._task is not None
        await asyncio.wait_for(self._task, 2 * DEADLINE)
        away = f"{max(self.host.away, default=0):.1f} s away at most"
        assert len(self.exits) == 1 and (lost or not self.lost), (self.exits, self.lost, away)
        return self.exits[0]

    async def there(self) -> None:
        """Wait until it is connected. Raises what ended it instead, and says what it waits for."""
        assert self._task is not None
        connected = asyncio.ensure_future(self.connected.wait())
        done, _ = await asyncio.wait(
            [connected, self._task], timeout=DEADLINE, return_when=asyncio.FIRST_COMPLETED
        )
        connected.cancel()
        if self._task in done:
            self._task.result()
        said = f"{self.trouble}; {self.host.gateway.log.read_text()[-10_000:]}"
        assert self._task not in done, f"{self.exec} has ended: {self.exits}, {self.lost}, {said}"
        assert connected in done, f"{self.exec} not attached to after {DEADLINE} s of {self.doing}; {said}"

    async def write(self, data: bytes) -> None:
        self.sent.add(data)
        if self.connected.is_set():
            await self._give(data)

    async def close_input(self) -> None:
        self.closed = True
        if self.connected.is_set():
            await self._give(b"")

    async def _give(self, data: bytes) -> None:
        assert self.wire is not None
        with contextlib.suppress(Exception):  # sent again after the break
            if data:
                await self.wire.stdin(self.channel, data)
            if self.closed:
                await self.wire.start_call("exec/closeStdin", exec=self.exec)

    async def call(self, method: str, **params: Any) -> Any:
        await self.there()
        assert self.wire is not None
        return await self.wire.call(method, exec=self.exec, **params)

    async def of_list(self) -> Any:
        """Return what `exec/list` says of this command."""
        return next(one for one in await self.listed() if one["exec"] == self.exec)

    async def leave(self) -> None:
        """Follow it no longer."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def listed(self) -> list[Any]:
        """Return what `exec/list` says of all commands."""
        await self.there()
        assert self.wire is not None
        found = await self.wire.call("exec/list")
        return sorted(found["execs"], key=lambda one: str(one["exec"]))

    async def _run(self, params: dict[str, Any], started: asyncio.Future[Any]) -> None:
        resume = {"resume": ""}
        given_up = time.monotonic() + 2 * DEADLINE
        while not self.over.is_set():
            resume = resume and {"resume": self.attachment}
            try:
                self.doing = "connecting"
                async with self.host.gateway.wire(self.tenant) as wire:
                    self.wire = wire
                    self.doing = "attaching"
                    if not self.exec:
                        answer = await wire.call("exec/start", **params)
                        self.exec = answer["exec"]
                        started.set_result(None)
                    else:
                        offsets = {"stdout": self.offsets[1], "stderr": self.offsets[2]}
                        answer = await wire.call(
                            "exec/attach",
                            exec=self.exec,
                            **READING,
                            **resume,
                            **{"from": offsets},
                        )
                        if any(answer["lost"].values()):
                            self.lost.append(answer["lost"])
                        self.lost += [] if answer["from"] == offsets else [answer["from"]]
                    self.channel, self.attachment = answer["channel"], answer["attachment"]
                    self.doing = "sending its input again"
                    given = answer.get("stdin", self.sent.size)
                    self.sent.arrived(given)
                    while given < self.sent.size:  # what `write` adds meanwhile too
                        missing = self.sent.after(given)
                        given += len(missing)
                        await self._give(missing)
                    if self.closed:
                        await self._give(b"")
                    self.doing = "following"
                    self.connected.set()
                    given_up = time.monotonic() + 2 * DEADLINE
                    await self._follow(wire)
            except RpcFailure as failure:
                self.trouble = f"{self.doing}: {failure}"
                if failure.code == "unavailable" and time.monotonic() < given_up:
                    self.connected.clear()  # Incus is slow; our clients ask again too
                    await pause(0.1)
                    continue
                if failure.code != "not_found" or not resume:
                    raise
                resume = {}  # the gateway knows no more than that it was lost
            except (OSError, ConnectionError, asyncio.IncompleteReadError, Exception) as error:
                if isinstance(error, AssertionError) or time.monotonic() > given_up:
                    raise
                self.trouble = f"{self.doing}: {error!r}"
                self.connected.clear()
                self.breaks += 1
                await pause(0.01)
        self.connected.clear()

    async def _follow(self, wire: Wire) -> None:
        acked = began = sum(self.offsets.values())
        while True:
            exit_ = wire.notified("exec/exited", exec=self.exec)
            for stream in (1, 2):
                arrived = wire.output[self.channel, stream]
                if arrived:
                    data = bytes(arrived)
                    del arrived[:]
                    self.sums[stream].update(data)
                    self.offsets[stream] += len(data)
                    self.tails[stream] = (self.tails[stream] + data)[-4096:]
            if exit_ is not None:
                self.exits.append(exit_)
                self.over.set()
                return
            if (new := sum(self.offsets.values()) - acked) >= 1 << 18:
                acked += new
                had = self.offsets
                await wire.notify("exec/ack", exec=self.exec, stdout=had[1], stderr=had[2])
                if acked - began > BURST:  # what an endless command prints is all counted again at the end
                    with contextlib.suppress(TimeoutError):
                        await wire.closed(new / PACE)
            await wire.until(
                lambda: (
                    wire.notified("exec/exited", exec=self.exec)
                    or wire.output[self.channel, 1]
                    or wire.output[self.channel, 2]
                )
            )


def sums(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def endless_sum(size: int) -> str:
    """Return the SHA-256 of the first `size` bytes of what `ENDLESS` prints."""
    counting = f"{ENDLESS.removeprefix('exec ')} | head -c {size} | sha256sum"
    process = await asyncio.create_subprocess_shell(counting, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    return said.decode().split()[0]


class Caller:
    """A client of the tools, which repeats a call with its id until it is answered."""

    def __init__(self, host: Host, tenant: str, session: str | None = None) -> None:
        self.host = host
        self.tenant = tenant
        self.session = {} if session is None else {"session": session}
        self.breaks = 0

    async def call(self, name: str, arguments: dict[str, Any], **more: Any) -> Any:
        params = {"name": name, "arguments": arguments, "callId": secrets.token_hex(8), **more}
        while True:
            try:
                async with self.host.gateway.wire(self.tenant, **self.session) as wire:
                    return await wire.call("tools/call", **params)
            except RpcFailure:
                raise
            except (AssertionError, TimeoutError):
                raise
            except Exception:  # the socket broke off, or nobody is there
                self.breaks += 1
                await pause(0.01)

    async def bash(self, command: str, **given: Any) -> tuple[bool, str, Any]:
        said = await self.call("Bash", {"command": command, **given})
        return said["isError"], said["content"][0]["text"], said["structuredContent"]

    async def output(self, shell_id: str, **given: Any) -> tuple[dict[str, str], Any]:
        """Return what BashOutput says of each output, and its facts."""
        said = await self.call("BashOutput", {"bash_id": shell_id, **given})
        text = said["content"][0]["text"]
        assert not said["isError"], text
        parts = dict(re.findall(r"<(\w+)>\n?(.*?)\n?</\1>", text, re.DOTALL))
        return parts, said["structuredContent"]
