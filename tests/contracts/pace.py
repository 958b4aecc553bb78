"""The contract of output at different paces over the wire. A subclass gives `gateway` and `tenant`.

GATEWAY_TEST_STALL is for how many seconds a reader stands still, GATEWAY_TEST_STREAM how many MiB its command
prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from gateway import protocol
from tests.live import LiveGateway, Wire
from tests.waits import pause, standstill

MiB = 1 << 20
STALL = float(os.environ.get("GATEWAY_TEST_STALL", "3"))
STREAM = int(os.environ.get("GATEWAY_TEST_STREAM", "64")) * MiB
# random bytes, so that none can be missing or doubled unseen; their hash comes by the other stream
PRINT = (
    'd=$(mktemp -d); cd "$d"; mkfifo f; sha256sum <f >&2 & head -c %d /dev/urandom | tee f; wait; rm -r "$d"'
)
ON_THE_WAY = 32 * MiB  # what kernels, daemon, gateway and client can hold of an output
GROWTH = 48 * MiB  # of a gateway's memory, where what it holds is bounded


class Digested(bytearray):
    """Output that is not kept: its size and hash, and its first bytes as text."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self.text = ""
        self.digest = hashlib.sha256()

    def __iadd__(self, data: Any) -> Digested:  # type: ignore[override, misc, unused-ignore]
        if self.size < 100:
            self.text += data[:100].decode("ascii", "replace")
        self.size += len(data)
        self.digest.update(data)
        return self


class Still(Wire):
    """A client that reads its socket only while it `may`, and keeps no output."""

    def __init__(self, socket: Any) -> None:
        self.may = asyncio.Event()
        self.may.set()
        self._recv = socket.recv
        socket.recv = self._allowed  # what the library's own iteration calls
        super().__init__(socket)
        self.output = defaultdict(Digested)

    async def _allowed(self) -> Any:
        await self.may.wait()
        return await self._recv()

    def out(self, started: Mapping[str, Any]) -> Digested:
        """Return what came of a command's stdout."""
        out = self.output[started["channel"], 1]
        assert isinstance(out, Digested)
        return out

    def whole(self, started: Mapping[str, Any]) -> bool:
        """Return whether the command's stdout has the hash that the command has told."""
        told = self.output[started["channel"], 2]
        assert isinstance(told, Digested)
        return told.text.partition(" ")[0] == self.out(started).digest.hexdigest()


@contextlib.asynccontextmanager
async def still(gateway: LiveGateway, tenant: str) -> AsyncIterator[Still]:
    async with gateway.raw(tenant, Still) as wire:
        assert isinstance(wire, Still)
        await wire.call("initialize", client={"name": "t", "version": "1"}, token=gateway.token(tenant))
        try:
            yield wire
        finally:
            wire.may.set()


async def offset(wire: Wire, exec_id: str) -> int:
    """Return how many bytes of a command's stdout were read so far."""
    execs = (await wire.call("exec/list"))["execs"]
    return int(next(one["offsets"]["stdout"] for one in execs if one["exec"] == exec_id))


class PaceContract:
    @pytest.mark.timeout(STALL + 400)
    async def test_a_reader_that_stands_still_stops_its_own_command_only(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """The gateway's memory stays, others run on, and when it reads again every byte arrives."""
        async with still(gateway, tenant) as wire, gateway.wire(tenant) as other:
            gateway.reset_peak()
            before = gateway.memory("VmHWM")
            started = await wire.call("exec/start", command=PRINT % STREAM)
            wire.may.clear()
            end = asyncio.get_running_loop().time() + STALL
            while asyncio.get_running_loop().time() < end:
                exit_, output, _ = await other.run(command="echo goes on")
                assert (exit_["exitCode"], output) == (0, b"goes on\n")
                await pause(STALL / 10)
            # a command that a busy machine holds up looks as if it stood still: what counts is how far it got
            held = await standstill(lambda: offset(other, started["exec"]))
            assert held < ON_THE_WAY < STREAM
            wire.may.set()
            await wire.until(lambda: wire.notified("exec/exited"), deadline=300)
            assert wire.out(started).size == STREAM and wire.whole(started)
            grown = gateway.memory("VmHWM") - before
            print(
                f"{STREAM >> 20} MiB, still for {STALL:.0f} s: held at {held >> 10} KiB, +{grown >> 10} KiB"
            )
            assert grown < GROWTH

    async def test_a_second_viewer_goes_on_beside_one_that_stands_still(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """That one is told how many bytes it has missed, once it reads again."""
        size = 64 * MiB
        async with still(gateway, tenant) as first, still(gateway, tenant) as second:
            # nothing is printed before both are there: what the first takes, nobody keeps for the second
            started = await first.call("exec/start", command=f"read go; {PRINT % size}", stdin=True)
            exec_id = started["exec"]
            first.may.clear()
            attached = await second.call("exec/attach", exec=exec_id)
            await first.stdin(started["channel"], b"go\n")
            exit_ = await second.until(lambda: second.notified("exec/exited"), deadline=60)
            assert (exit_["exitCode"], attached["lost"]["stdout"]) == (0, 0)
            assert second.out(attached).size == size and second.whole(attached)
            first.may.set()
            await first.until(lambda: first.notified("exec/exited"), deadline=60)
            lost = [n.params for n in first.notifications if n.method == "exec/lost"]
            assert lost
            assert {(one["exec"], one["stream"]) for one in lost} == {(exec_id, "stdout")}
            assert first.out(started).size + sum(one["bytes"] for one in lost) == size

    async def test_a_window_lets_one_command_of_a_socket_stand_still_alone(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """The socket is read on: all else on it goes on, and nothing is lost."""
        window, size = 300_000, 24 * MiB
        async with still(gateway, tenant) as wire:
            started = await wire.call("exec/start", command=PRINT % size, window=window)
            out = wire.out(started)
            await wire.until(lambda: out.size == window)
            assert await standstill(lambda: offset(wire, started["exec"])) < ON_THE_WAY
            assert (await wire.run(command="true"))[0]["exitCode"] == 0
            assert out.size == window
            await taking(wire, started, 0, window)
            assert out.size == size and wire.whole(started)

    async def test_the_end_of_a_cancelled_command_waits_for_no_reader(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """Who stands still gets what there is and the exit when it goes on; who asks is told at once."""
        window = 300_000
        async with still(gateway, tenant) as wire, gateway.wire(tenant) as other:
            started = await wire.call("exec/start", command="yes", window=window)
            exec_id, out = started["exec"], wire.out(started)
            await wire.until(lambda: out.size == window)
            assert (await other.call("exec/cancel", exec=exec_id))["survivors"] == 0
            exit_ = await other.call("exec/wait", exec=exec_id)
            assert exit_["reason"] == "cancelled" and out.size == window
            await taking(wire, started, 0, window)
            assert wire.notified("exec/exited", exec=exec_id) == exit_
            assert out.size == exit_["offsets"]["stdout"]

    async def test_a_held_command_goes_on_for_who_takes_the_place(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        window, size = 100_000, 12 * MiB
        async with gateway.wire(tenant) as old, still(gateway, tenant) as new:
            started = await old.call("exec/start", command=PRINT % size, window=window)
            seen = old.output[started["channel"], 1]
            await old.until(lambda: len(seen) == window)
            asked = {"exec": started["exec"], "resume": started["attachment"], "window": 2 * window}
            attached = await new.call("exec/attach", **asked, **{"from": {"stdout": window, "stderr": 0}})
            assert (attached["from"]["stdout"], attached["lost"]["stdout"]) == (window, 0)
            await taking(new, attached | {"exec": started["exec"]}, window, 2 * window)
            out = new.out(attached)
            assert out.size == size - window


async def taking(wire: Still, started: Mapping[str, Any], before: int, window: int) -> None:
    """Acknowledge what comes, from offset `before` on, until the command's exit."""
    out, exec_id, seen = wire.out(started), started["exec"], 0

    def more() -> bool:
        return out.size > seen or wire.notified("exec/exited", exec=exec_id) is not None

    while wire.notified("exec/exited", exec=exec_id) is None:
        seen = out.size
        ack = {"exec": exec_id, "stdout": before + seen, "stderr": 0}
        await wire.send(protocol.notification("exec/ack", ack))
        await wire.until(more)
        assert out.size - seen <= window
