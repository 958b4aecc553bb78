"""Commands outlive the gateway: whenever it is killed, each byte comes once and each exit is told.

The gateway is killed and started again beside real commands, and a client resumes as ours do: from the
offsets that it has, with the input that `stdin` says did not arrive. GATEWAY_TEST_KILLS says how often, and
GATEWAY_TEST_SEED at which moments; both are printed. GATEWAY_TEST_SECONDS ends the kills of the first test.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.holder import messages
from gateway.holder.holder import held_at
from gateway.host import holder_process
from gateway.host.gateway_process import GatewayProcess
from gateway.host.holder_process import command
from gateway.host.place import Place
from gateway.incus import Memory
from gateway.settings import Settings
from tests.integration.conftest import Container
from tests.live import DEADLINE, LiveGateway, RpcFailure, Wire, free_ports
from tests.waits import pause, until

ROOT = Path(__file__).parents[2]
ENDLESS = "exec seq 1 1000000000000"
# no more is sent ahead than can be had again, however much the kernel takes for a client that is late
READING = {"acks": True, "window": 8 << 20}
BURST, PACE = 8 << 20, 8 << 20  # bytes that are read as they come on each connection; then bytes a second
# seconds in which a ping of incusd needs room, or that output breaks: `gateway.incus.exec_sockets`
PING = 5.0
KILLS = int(os.environ.get("GATEWAY_TEST_KILLS", "20"))
SECONDS = float(os.environ.get("GATEWAY_TEST_SECONDS", "inf"))  # after which nobody is killed any more
SEED = int(os.environ.get("GATEWAY_TEST_SEED", random.randrange(1 << 32)))


class Host:
    """A gateway and its holder in one state dir; either can be killed and started again."""

    def __init__(self, settings: Settings, folder: Path, **more: str) -> None:
        self.settings = settings.model_copy(update={"state_dir": folder})
        self.gateway = LiveGateway(
            {
                "GATEWAY_INCUS_SOCKET": str(settings.incus_socket),
                "GATEWAY_NETWORK": settings.network,
                "GATEWAY_NETWORK_IPV4": settings.network_ipv4,
                "GATEWAY_POOL": settings.pool,
                "GATEWAY_STATE_DIR": str(folder),
                **more,
            },
            folder.with_suffix(".log"),
        )
        self.holder: asyncio.subprocess.Process | None = None
        self.away: list[float] = []  # seconds from each kill until a gateway was ready again

    async def hold(self) -> None:
        """Start a holder, and return once it listens."""
        self.holder = await asyncio.create_subprocess_exec(*command(self.settings))
        await until(self._holds)

    def _holds(self) -> bool:
        with contextlib.suppress(OSError):
            return held_at(self.settings.holder_socket) >= 0
        return False

    @property
    def held(self) -> int:
        """How many commands the holder has, beside the shells that wait for one."""
        return sum(one.noted for one in self.memories())

    def memories(self) -> Iterator[Memory]:
        """Yield the memory of each command and waiting shell that the holder has."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(self.settings.holder_socket))
            messages.send(connection, {"v": messages.VERSION, "list": True})
            while (received := messages.receive(connection)) is not None and "end" not in received[0]:
                memory, *others = received[1]
                messages.close(others)
                with contextlib.closing(Memory(memory)) as one:
                    yield one

    async def kill(self) -> None:
        """Kill the gateway, and start another."""
        began = time.monotonic()
        await self.gateway.stop(signal.SIGKILL)
        await self.gateway.start()
        self.away.append(time.monotonic() - began)

    def excuse(self) -> None:
        """Skip the test if a gateway was away for so long that incusd may have given an output up."""
        if (longest := max(self.away, default=0.0)) >= PING:
            pytest.skip(f"a gateway was away for {longest:.0f} s, and incusd waits {PING:.0f} s for room")

    def report(self, what: str) -> None:
        """Print what was seen over the kills, and for how long the gateway was away."""
        away = sorted(self.away) or [0.0]
        print(
            f"{len(self.away)} kills, seed {SEED}: {what}; away for {away[len(away) // 2]:.2f} s (p50), "
            f"{away[-1]:.2f} s at most; load {os.getloadavg()[0]:.0f}"
        )

    async def end_holder(self) -> None:
        """Kill the holder."""
        assert self.holder is not None
        self.holder.kill()
        await self.holder.wait()

    async def close(self) -> None:
        await self.gateway.stop()
        await self.end_holder()


@contextlib.asynccontextmanager
async def held(settings: Settings, folder: Path) -> AsyncIterator[Host]:
    """Run a gateway and its holder, which log no traceback."""
    folder.mkdir()
    host = Host(settings, folder)
    await host.hold()
    await host.gateway.start()
    try:
        yield host
    finally:
        await host.close()
    said = host.gateway.log.read_text()
    assert "Traceback" not in said, said


@pytest.fixture
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    async with held(incus_settings, tmp_path_factory.mktemp("survive") / "state") as host:
        yield host


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
        if not lost:
            self._excuse()
        assert len(self.exits) == 1 and (lost or not self.lost), (self.exits, self.lost)
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
            self._excuse()
        said = f"{self.trouble}; {self.host.gateway.log.read_text()[-10_000:]}"
        assert self._task not in done, f"{self.exec} has ended: {self.exits}, {self.lost}, {said}"
        assert connected in done, f"{self.exec} not attached to after {DEADLINE} s of {self.doing}; {said}"

    def _excuse(self) -> None:
        if any(exit_["reason"] == "lost" for exit_ in self.exits):
            self.host.excuse()

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


SCREEN = """
import fcntl, hashlib, json, os, select, signal, struct, sys, termios, tty
tty.setraw(0)
sizes, keys, out, got, wrote = [], hashlib.sha256(), hashlib.sha256(), 0, 0
def size(*_):
    rows, cols = struct.unpack("hh", fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(4)))
    sizes.append([cols, rows])
signal.signal(signal.SIGWINCH, size)
size()
number = 0
while True:
    number += 1
    drawn = (f"\\x1b[H{number} {got} {sizes[-1]}\\r\\n" + "x" * 300).encode()
    out.update(drawn)
    while drawn:
        done = os.write(1, drawn)
        wrote, drawn = wrote + done, drawn[done:]
    if select.select([0], [], [], 0.002)[0]:
        typed = os.read(0, 4096)
        end = typed.find(b"\\x11")
        typed = typed if end < 0 else typed[:end]
        keys.update(typed)
        got += len(typed)
        if end >= 0:
            break
json.dump({"keys": keys.hexdigest(), "out": out.hexdigest(), "got": got, "wrote": wrote, "size": sizes[-1]},
          open(sys.argv[1], "w"))
sys.exit(42)
"""


@pytest.mark.timeout(120 + 20 * KILLS)
async def test_every_byte_and_key_comes_once_over_kills(host: Host, shared_tenant: Container) -> None:
    """Of a stream as fast as can be, of input that comes back, and of a program that is typed into."""
    name, chance = shared_tenant.name, random.Random(SEED)
    stream, echo, screen, late = (Resuming(host, name) for _ in range(4))
    kept = "/srv/site/survive.json"
    await stream.start(command=ENDLESS)
    await echo.start(command="cat; echo end >&2; exit 3", stdin=True)
    await screen.start(argv=["python3", "-c", SCREEN, kept], pty={"cols": 80, "rows": 24})
    # its input is ended at once, of which most is still on its way at each kill
    await late.start(command="while [ ! -e go ]; do sleep 0.05; done; exec sha256sum", stdin=True)
    await late.write(random.randbytes(3 << 20))
    await late.call("exec/closeStdin")
    before = await screen.listed()
    await until(lambda: screen.offsets[1] > 0)
    stop = asyncio.Event()

    async def type_() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            await screen.write(b"%d," % number)
            await pause(0.004)

    async def feed() -> None:
        while not stop.is_set():
            if echo.sent.size - echo.offsets[1] < 2 << 20:
                await echo.write(random.randbytes(random.randint(1, 100_000)))
            await pause(0.002)

    async def resize() -> None:
        while not stop.is_set():
            with contextlib.suppress(Exception):  # amid a kill
                await screen.call("exec/resize", cols=random.randint(40, 120), rows=random.randint(10, 50))
            await pause(0.3)

    tasks = [asyncio.create_task(work()) for work in (type_, feed, resize)]
    enough = time.monotonic() + SECONDS
    for _ in range(KILLS):
        if time.monotonic() > enough:
            break
        for client in (stream, echo, screen, late):
            await client.there()
        await pause(chance.uniform(0.05, 0.6))
        await host.kill()
    for client in (stream, echo, screen, late):
        await client.there()
    stop.set()
    await asyncio.gather(*tasks)
    after = await screen.listed()
    same = ("exec", "argv", "pid", "startedAt", "pty", "state")
    assert [[one[key] for key in same] for one in after] == [[one[key] for key in same] for one in before]
    await screen.call("exec/resize", cols=100, rows=30)
    typed = (screen.sent.size, screen.sent.hexdigest())
    await screen.write(b"\x11")
    assert (await screen.ended())["exitCode"] == 42
    told = json.loads(shared_tenant.sh(f"cat {kept}"))
    assert (told["got"], told["keys"]) == typed
    assert (told["wrote"], told["out"]) == (screen.offsets[1], screen.sums[1].hexdigest())
    assert told["size"] == [100, 30]

    shared_tenant.sh("touch /srv/site/go")
    assert (await late.ended())["exitCode"] == 0
    assert late.tails[1].decode().split()[0] == late.sent.hexdigest()

    await echo.close_input()
    over = await echo.ended()
    assert over["exitCode"] == 3, (over, host.gateway.log.read_text()[-3000:])
    assert (echo.offsets[1], echo.sums[1].hexdigest()) == (echo.sent.size, echo.sent.hexdigest())
    assert echo.sums[2].hexdigest() == sums(b"end\n")

    await stream.call("exec/signal", signal=signal.SIGTERM)
    exit_ = await stream.ended()
    assert (exit_["reason"], exit_["signal"]) == ("exited", "TERM")
    assert stream.sums[1].hexdigest() == await endless_sum(stream.offsets[1])
    assert min(stream.breaks, echo.breaks, screen.breaks, late.breaks) >= len(host.away) > 0
    mb = stream.offsets[1] / 1e6
    host.report(f"{mb:.0f} MB, {echo.sent.size} bytes there and back, {told['got']} keys")
    await until(lambda: host.held <= 4)  # the ended ones, whose output is kept


async def test_what_ends_or_is_due_while_nobody_is_there(host: Host, shared_tenant: Container) -> None:
    """Every exit is told, a deadline counts from the start, and what lingers or is cancelled ends whole.

    So does a command that a gateway of another version has left, which nobody can follow.
    """
    name = shared_tenant.name
    codes = {"exit 0": 0, "exit 3": 3, "exit 126": 126, "exit 127": 127, "kill -KILL $$": 137}
    ending = [Resuming(host, name) for _ in codes]
    for client, end in zip(ending, codes, strict=True):
        await client.start(command=f"echo out; read word; {end}", stdin=True)
    tree = "for i in 1 2 3; do setsid sleep 1000 & done; trap '' TERM; echo up; while :; do sleep 1; done"
    cancelled, late, alone, known, strange = (Resuming(host, name) for _ in range(5))
    await cancelled.start(command=tree)
    started = time.monotonic()
    await late.start(command=tree, timeoutMs=4000)
    await alone.start(command=tree, lingerMs=500)
    await known.start(command="sleep 1000", execId="mine")
    await strange.start(command=tree, execId="strange")
    everyone = [*ending, cancelled, late, alone, known, strange]
    for client in (cancelled, late, alone, strange):
        await until(lambda client=client: client.offsets[1] > 0)  # type: ignore[misc]
    for client in ending:
        await client.write(b"go\n")
    await alone.call("exec/detach")
    await host.gateway.stop(signal.SIGKILL)
    await pause(1)  # in which they end
    for memory in host.memories():
        if memory.noted and (noted := dict(memory.read_facts()))["facts"]["id"] == "strange":  # type: ignore[index]
            memory.write_facts({**noted, "format": 99})
    await host.gateway.start()
    due = max(4.0, time.monotonic() - started)  # seconds; the machine may be busy
    for client, code in zip(ending, codes.values(), strict=True):
        exit_ = await client.ended()
        assert (exit_["exitCode"], exit_["reason"]) == (code, "exited")
        assert client.sums[1].hexdigest() == sums(b"out\n")
    exit_ = await strange.ended(lost=True)
    assert (exit_["reason"], exit_["exitCode"]) == ("lost", None)
    exit_ = await late.ended()
    assert exit_["reason"] == "timeout"
    assert 3.9 < exit_["durationMs"] / 1000 < due + host.settings.cancel_grace + 3

    async with host.gateway.wire(name) as wire:
        again = await wire.call("exec/start", command="sleep 1000", execId="mine")
        assert (again["exec"], again["pid"]) == ("mine", (await known.of_list())["pid"])
        with pytest.raises(RpcFailure, match="another command"):
            await wire.call("exec/start", command="sleep 1001", execId="mine")
        killed = await wire.call("exec/cancel", exec=cancelled.exec, graceMs=100)
        assert killed["survivors"] == 0 and killed["killed"] >= 4 and killed["escalated"]
        gone = await wire.call("exec/wait", exec=alone.exec)
        assert gone["reason"] == "cancelled"
        await wire.call("exec/cancel", exec="mine")
    assert (await cancelled.ended())["reason"] == "cancelled"
    assert (await known.ended())["reason"] == "cancelled"
    assert shared_tenant.sh("pgrep -c sleep", check=False).strip() == "0"
    assert len({client.exec for client in everyone}) == len(everyone)
    await alone.leave()


async def test_an_exit_is_told_when_incus_has_long_forgotten_it(host: Host, shared_tenant: Container) -> None:
    """incusd has the record of an operation for five seconds, a client may be back after ten."""
    codes = {"exit 0": 0, "exit 3": 3, "exit 126": 126, "exit 127": 127, "kill -KILL $$": 137}
    ending = [Resuming(host, shared_tenant.name) for _ in codes]
    for client, end in zip(ending, codes, strict=True):
        await client.start(command=f"sleep 3; {end}")
    await host.gateway.stop(signal.SIGKILL)
    await pause(13)
    await host.gateway.start()
    for client, code in zip(ending, codes.values(), strict=True):
        exit_ = await client.ended()
        assert (exit_["exitCode"], exit_["reason"]) == (code, "exited")


async def test_commands_end_where_no_gateway_comes(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory, shared_tenant: Container
) -> None:
    """After `GATEWAY_HOLD` seconds; the next gateway tells of them, and ends what they have left running."""

    def running() -> int:
        return int(shared_tenant.sh("pgrep -cf '[s]leep 1003'", check=False))

    settings = incus_settings.model_copy(update={"hold": 2.0})
    async with held(settings, tmp_path_factory.mktemp("alone") / "state") as host:
        client = Resuming(host, shared_tenant.name)
        await client.start(command="setsid sleep 1003 & exec sleep 1003")
        await until(lambda: running() == 2)
        await host.gateway.stop(signal.SIGKILL)
        await until(lambda: running() == 1)
        await host.gateway.start()
        exit_ = await client.ended(lost=True)
        assert (exit_["reason"], exit_["exitCode"]) == ("lost", None)
        await until(lambda: running() == 0)


async def test_the_holder_and_the_gateway_die_in_turn(host: Host, shared_tenant: Container) -> None:
    """Either has all of the other; only both at once take the commands with them, and leave nothing."""
    client, other = Resuming(host, shared_tenant.name), Resuming(host, shared_tenant.name)
    await client.start(command=ENDLESS)
    for _ in range(2):
        await host.end_holder()
        if not other.exec:
            await other.start(command="echo up; read word; exit 5", stdin=True)  # while there is none
        await host.hold()
        await until(lambda: host.held == 2)
        await host.kill()
        await client.there()
    await other.write(b"go\n")
    assert (await other.ended())["exitCode"] == 5
    await host.end_holder()
    await host.gateway.stop(signal.SIGKILL)
    await host.hold()
    await host.gateway.start()
    exit_ = await client.ended(lost=True)
    assert (exit_["reason"], exit_["exitCode"]) == ("lost", None)
    await until(lambda: shared_tenant.sh("pgrep -c seq", check=False).strip() == "0")


async def test_quickstarts_restart_leaves_commands_and_its_stop_ends_them(
    host: Host, shared_tenant: Container, tmp_path: Path
) -> None:
    """Of a gateway and a holder that it starts itself, without systemd; nothing of either is left."""
    folder = tmp_path / "state"
    settings = host.settings.model_copy(
        update={"state_dir": folder, "listen": f"127.0.0.1:{free_ports(1)[0]}"}
    )
    environment = {
        **host.gateway.environment,
        "GATEWAY_STATE_DIR": str(folder),
        "GATEWAY_LISTEN": settings.listen,
    }
    del environment["PATH"]
    folder.mkdir(mode=0o700)
    installed = Path(sys.executable).with_name("incus-gateway")
    process = GatewayProcess(settings, Place(folder), ROOT, installed, environment)
    assert (await asyncio.to_thread(process.ensure, "one")).startswith("started")
    try:
        other = Host(settings, folder)
        other.gateway.at(int(settings.listen.rpartition(":")[2]))
        client = Resuming(other, shared_tenant.name)
        await client.start(command="setsid sleep 1000 & echo up; cat", stdin=True)
        await until(lambda: client.offsets[1] > 0)
        holder = holder_process.running(settings)
        assert holder is not None
        assert (await asyncio.to_thread(process.ensure, "two")).startswith("replaced")
        assert holder_process.running(settings) == holder
        await client.write(b"still\n")
        await until(lambda: client.offsets[1] == len(b"up\nstill\n"))
        following = asyncio.ensure_future(client.ended())
        assert await asyncio.to_thread(process.stop)
        assert shared_tenant.sh("pgrep -c 'sleep|cat'", check=False).strip() == "0"
        assert holder_process.running(settings) is None and process.pid() is None
        assert client.exits and (await following)["reason"] == "cancelled"
    finally:
        await asyncio.to_thread(process.stop)
