"""Who lives in a `house`, and what must be true of each after a kill of the gateway: guests and residents."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytest

from gateway_client import Client, Event, Retry
from tests.integration.hosts import held
from tests.integration.house import Actor, House, dice
from tests.integration.resuming import ENDLESS, Caller, Resuming, endless_sum, sums
from tests.live import DEADLINE, RpcFailure
from tests.waits import pause, until

CODES: Final = {0: "exit 0", 3: "exit 3", 126: "exit 126", 127: "exit 127", 137: "kill -KILL $$"}
AWAY: Final = 5.0  # seconds; a gateway is not away for longer, or incusd gives up outputs that are not read
FORGOTTEN: Final = 13.0  # seconds; Incus has the record of an ended command for five


def tree_of(actor: int, trap: str = "") -> str:
    """Return a command with children that call setsid, by whose argument a process tells whose it is."""
    return f"for i in 1 2 3; do setsid sleep 100{actor} & done; {trap}echo up; while :; do sleep 0.1; done"


# --- guests -------------------------------------------------------------------------------------------------


async def ends(house: House) -> AsyncGenerator[None]:
    """Every exit that comes while nobody is there is told, with all that was printed."""
    waits = f"echo out; until [ -s {house.word} ]; do sleep 0.05; done; echo late; "
    begun = {
        code: await house.start(f"{waits}: > {house.end(str(code))}; {end}", up=True)
        for code, end in CODES.items()
    }
    yield
    for code, started in begun.items():
        exit_ = await house.ended(started["exec"])
        assert (exit_["exitCode"], exit_["reason"]) == (code, "exited")
        assert await house.printed(started["exec"]) == b"out\nlate\n"


async def cancelled(house: House) -> AsyncGenerator[None]:
    """The whole tree of an adopted command ends, with those that called setsid, and against its will."""
    tree = await house.start(tree_of(1, "trap '' TERM; "), up=True)
    yield
    killed = await house.wire.call("exec/cancel", exec=tree["exec"], graceMs=50)
    assert killed["survivors"] == 0 and killed["killed"] >= 4 and killed["escalated"]
    assert (await house.ended(tree["exec"]))["reason"] == "cancelled"


async def is_being_cancelled(house: House) -> AsyncGenerator[None]:
    """A cancel that was under way is carried through, though its grace was long and nobody asks again."""
    tree = await house.start(tree_of(2, "trap 'echo told' TERM; "), up=True)
    await house.wire.start_call("exec/cancel", exec=tree["exec"], graceMs=60_000)
    await house.wire.until(lambda: b"told" in house.wire.output[tree["channel"], 1])
    yield
    exit_ = await house.ended(tree["exec"])
    assert (exit_["reason"], exit_["left"]) == ("cancelled", 0)


async def due(house: House) -> AsyncGenerator[None]:
    """A deadline ends the tree before, amid and after the kill."""
    seconds, began = random.uniform(0.4, 2.0), time.time()
    tree = await house.start(tree_of(3), timeoutMs=int(seconds * 1000))
    yield
    assert late(tree, await house.ended(tree["exec"]), began + seconds) > -0.01


def late(started: Mapping[str, Any], exit_: Mapping[str, Any], due: float) -> float:
    """Return how many seconds after its deadline a command has ended."""
    assert exit_["reason"] == "timeout"
    ended = datetime.fromisoformat(started["startedAt"]).timestamp() + float(exit_["durationMs"]) / 1000
    return ended - due


async def lingers(house: House) -> AsyncGenerator[None]:
    """A command to which nobody comes back ends after its time, whole."""
    tree = await house.start(tree_of(4), lingerMs=random.randint(100, 800))
    yield
    assert (await house.ended(tree["exec"]))["reason"] == "cancelled"


async def signalled(house: House) -> AsyncGenerator[None]:
    """A signal reaches an adopted command, which ends as it likes."""
    trap = "trap 'echo got; exit 7' USR1; echo up; while :; do sleep 0.05; done"
    started = await house.start(trap, up=True)
    yield
    await house.wire.call("exec/signal", exec=started["exec"], signal=signal.SIGUSR1)
    exit_ = await house.ended(started["exec"])
    assert (exit_["exitCode"], await house.printed(started["exec"])) == (7, b"up\ngot\n")


async def strange(house: House) -> AsyncGenerator[None]:
    """What a gateway of another version has left nobody can follow: it is lost, and nothing of it runs."""
    tree = await house.start(tree_of(5), up=True)
    house.strangers.add(tree["exec"])
    yield
    exit_ = await house.ended(tree["exec"])
    assert (exit_["reason"], exit_["exitCode"]) == ("lost", None)
    while house.tenant.count("sleep 1005"):  # what is left of earlier processes ends meanwhile
        await pause(0.02)


async def asks(house: House) -> AsyncGenerator[None]:
    """Bash with a callId runs once and is answered once, with what came while nobody was there."""
    mark = house.end("asked")
    caller = Caller(house.host, house.tenant.name, "asks")
    waits = f"until [ -s {house.word} ]; do sleep 0.05; done"
    asking = asyncio.ensure_future(
        caller.bash(f"echo x >> {mark}-ran; echo up; {waits}; seq 1 3; : > {mark}")
    )
    ran = Path(f"/proc/{house.tenant.pid}/root{mark}-ran")
    await until(ran.exists)
    yield
    assert (await asking)[:2] == (False, "up\n1\n2\n3")
    assert ran.read_text() == "x\n", "it ran more than once"


async def kills_its_shell(house: House) -> AsyncGenerator[None]:
    """KillShell ends the tree of a background shell that is older than the gateway."""
    caller = Caller(house.host, house.tenant.name, "kills")
    _, _, facts = await caller.bash("setsid sleep 1006 & exec sleep 1006", run_in_background=True)
    yield
    said = await caller.call("KillShell", {"shell_id": facts["shellId"]})
    assert not said["isError"] and said["structuredContent"]["killed"] >= 1, said


GUESTS: Final[tuple[Actor, ...]] = (
    *(ends, cancelled, is_being_cancelled, due, lingers, signalled, strange),
    *(asks, kills_its_shell),
)


# --- residents ----------------------------------------------------------------------------------------------


async def reads_on(house: House) -> AsyncGenerator[None]:
    """Of a stream as fast as can be, with acks, every byte comes once."""
    stream = Resuming(house.host, house.tenant.name)
    await stream.start(command=ENDLESS)
    while not house.over:
        await stream.there()
        yield
    await stream.call("exec/signal", signal=signal.SIGTERM)
    exit_ = await stream.ended()
    assert (exit_["reason"], exit_["signal"]) == ("exited", "TERM")
    assert stream.sums[1].hexdigest() == await endless_sum(stream.offsets[1])
    assert stream.breaks >= len(house.host.away) > 0
    house.seen["MB"] = stream.offsets[1] // 1_000_000


async def sends_on(house: House) -> AsyncGenerator[None]:
    """Input that comes back is the same, and so is its end."""
    echo, bytes_ = Resuming(house.host, house.tenant.name), dice("bytes")
    await echo.start(command="cat; echo end >&2; exit 3", stdin=True)
    stop = asyncio.Event()

    async def feed() -> None:
        while not stop.is_set():
            if echo.sent.size - echo.offsets[1] < 2 << 20:
                await echo.write(bytes_.randbytes(bytes_.randint(1, 100_000)))
            await pause(0.005)

    feeding = asyncio.create_task(feed())
    while not house.over:
        await echo.there()
        yield
    stop.set()
    await feeding
    await echo.close_input()
    over = await echo.ended()
    assert over["exitCode"] == 3, (over, house.host.gateway.log.read_text()[-3000:])
    assert (echo.offsets[1], echo.sums[1].hexdigest()) == (echo.sent.size, echo.sent.hexdigest())
    assert echo.sums[2].hexdigest() == sums(b"end\n")
    house.seen["bytes there and back"] = echo.sent.size


async def ends_its_input(house: House) -> AsyncGenerator[None]:
    """Input whose end was told at once arrives whole, though most of it is on its way at each kill."""
    late = Resuming(house.host, house.tenant.name)
    await late.start(
        command="until [ -e /srv/site/house/go ]; do sleep 0.05; done; exec sha256sum", stdin=True
    )
    await late.write(dice("late").randbytes(3 << 20))
    await late.call("exec/closeStdin")
    while not house.over:
        await late.there()
        yield
    await asyncio.to_thread(house.tenant.sh, "touch /srv/site/house/go")
    assert (await late.ended())["exitCode"] == 0
    assert late.tails[1].decode().split()[0] == late.sent.hexdigest()


async def types(house: House) -> AsyncGenerator[None]:
    """A full-screen program that is typed into and resized has each key once, and its last size."""
    screen, sizes = Resuming(house.host, house.tenant.name), dice("sizes")
    kept, stop = "/srv/site/house/screen.json", asyncio.Event()
    await screen.start(argv=["python3", "-c", SCREEN, kept], pty={"cols": 80, "rows": 24})
    await until(lambda: screen.offsets[1] > 0)

    async def type_() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            await screen.write(b"%d," % number)
            await pause(0.004)

    async def resize() -> None:
        while not stop.is_set():
            with contextlib.suppress(Exception):  # amid a kill
                await screen.call("exec/resize", cols=sizes.randint(40, 120), rows=sizes.randint(10, 50))
            await pause(0.3)

    tasks = [asyncio.create_task(work()) for work in (type_, resize)]
    while not house.over:
        await screen.there()
        yield
    stop.set()
    await asyncio.gather(*tasks)
    await screen.call("exec/resize", cols=100, rows=30)
    typed = (screen.sent.size, screen.sent.hexdigest())
    await screen.write(b"\x11")
    assert (await screen.ended())["exitCode"] == 42
    told = json.loads(house.tenant.sh(f"cat {kept}"))
    assert (told["got"], told["keys"]) == typed
    assert (told["wrote"], told["out"]) == (screen.offsets[1], screen.sums[1].hexdigest())
    assert told["size"] == [100, 30]
    house.seen["keys"] = told["got"]


async def has_a_name(house: House) -> AsyncGenerator[None]:
    """An execId that is asked for again is the running command, and no other command's."""
    started = await house.start("sleep 2000", execId="mine", lingerMs=-1)
    while not house.over:
        yield
        again = await house.start("sleep 2000", execId="mine")
        assert (again["exec"], again["pid"]) == ("mine", started["pid"])
        with pytest.raises(RpcFailure, match="another command"):
            await house.start("sleep 2001", execId="mine")
    await house.wire.call("exec/cancel", exec="mine")
    assert house.tenant.count("sleep 200") == 0


async def is_due(house: House) -> AsyncGenerator[None]:
    """A deadline counts from the start, though there were several gateways since."""
    seconds, began = 6.0, time.time()
    tree = await house.start(tree_of(7).replace("1007", "3000"), timeoutMs=int(seconds * 1000), lingerMs=-1)
    exit_ = None
    while not house.over:
        yield
        if exit_ is None and tree["exec"] not in await house.listed():
            exit_ = await house.ended(tree["exec"])
    exit_ = exit_ or await house.ended(tree["exec"])
    # counted from each gateway's start it would only be due after the last kill
    assert -0.01 < late(tree, exit_, began + seconds) < AWAY + max(house.host.away)


async def polls(house: House) -> AsyncGenerator[None]:
    """BashOutput returns every line of a background shell once, over all kills."""
    caller = Caller(house.host, house.tenant.name, "polls")
    counts = "i=0; until [ -e house/enough ]; do i=$((i+1)); echo $i; echo e$i >&2; sleep 0.02; done"
    _, _, facts = await caller.bash(f"{counts}; echo last $i; exit 4", run_in_background=True)
    got: dict[str, list[str]] = {"stdout": [], "stderr": []}

    async def poll() -> Mapping[str, str]:
        parts, said = await caller.output(facts["shellId"], filter=".")
        assert not any(said["lost"].values())
        for name, lines in got.items():
            lines += parts.get(name, "").splitlines()
        return parts

    while not house.over:
        yield
        await poll()
    await asyncio.to_thread(house.tenant.sh, "touch /srv/site/house/enough")
    while (parts := await poll())["status"] == "running":
        await pause(0.05)
    assert (parts["status"], parts["exit_code"]) == ("failed", "4")
    last = int(got["stdout"].pop().removeprefix("last "))
    assert got["stdout"] == [str(number) for number in range(1, last + 1)]
    assert got["stderr"] == [f"e{number}" for number in range(1, last + 1)]


async def listens(house: House) -> AsyncGenerator[None]:
    """A stream of events has each start, and each end once, with no gap."""
    gateway, retry = house.host.gateway, Retry(first=0.01, most=0.2, patience=2 * DEADLINE)
    told, seen = Counter[str](), list[Event]()
    async with Client(gateway.url, token=gateway.token(house.tenant.name, ttl=86_400), retry=retry) as client:
        async with client.tenant(house.tenant.name).events() as stream:

            async def follow() -> None:
                async for event in stream:
                    seen.append(event)
                    if event.type == "exec.exited":
                        told[event.data["exec"]] += 1

            following = asyncio.create_task(follow())
            while not house.over:
                yield
            running = await house.listed()
            await house.start("exec true", execId="last")
            await until(lambda: told["last"] or following.done())
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
    assert not [event for event in seen if event.type == "gap"]
    begun = {event.data["exec"] for event in seen if event.type == "exec.started"}
    assert not [one for one, times in told.items() if times > 1], "told more than once"
    assert not begun - running.keys() - told.keys(), "not told"
    house.seen["events"] = len(seen)


async def comes_back_late(house: House) -> AsyncGenerator[None]:
    """Exits are told that another gateway finds when Incus has long forgotten them."""
    settings = house.host.settings.model_copy(update={"hold": 3600.0})
    async with held(settings, house.folder) as other:
        begun = dict[int, str]()
        async with other.gateway.wire(house.tenant.name) as wire:
            for code, end in CODES.items():
                started = await wire.call("exec/start", command=f"echo out; sleep 1; {end}")
                begun[code] = started["exec"]
                await wire.until(lambda started=started: wire.output[started["channel"], 1])
            await other.gateway.stop(signal.SIGKILL)
        killed = time.monotonic()
        while not house.over:
            yield
        await pause(max(0.0, killed + FORGOTTEN - time.monotonic()))
        await other.gateway.start()
        async with other.gateway.wire(house.tenant.name) as wire:
            for code, exec_ in begun.items():
                exit_ = await wire.call("exec/wait", exec=exec_)
                assert (exit_["exitCode"], exit_["reason"]) == (code, "exited")


RESIDENTS: Final[tuple[Actor, ...]] = (
    *(reads_on, sends_on, ends_its_input, types, has_a_name, is_due, polls),
    *(listens, comes_back_late),
)

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
