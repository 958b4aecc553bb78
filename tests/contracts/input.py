"""The contract of a command's standard input over the wire. A subclass gives `gateway` and `tenant`."""

from __future__ import annotations

import asyncio
import hashlib
import io
from typing import Any

import orjson

from tests.contracts.processes import alive, mark
from tests.live import LiveGateway
from tests.waits import until

MiB = 1 << 20
PIECE = bytes(range(256)) * 1024


class InputContract:
    async def test_input_that_nobody_reads_holds_nothing_up(self, gateway: LiveGateway, tenant: str) -> None:
        """By a client that knows of no window: its signal and its cancel come behind 40 MiB, and pass."""
        async with gateway.wire(tenant) as wire:
            for method, signal in (("exec/signal", "INT"), ("exec/cancel", None)):
                started = await wire.call("exec/start", argv=["sleep", "60"], stdin=True)
                for _ in range(40 * MiB // len(PIECE)):
                    await wire.stdin(started["channel"], PIECE)
                facts = {"signal": signal} if signal else {"graceMs": 0}
                await wire.call(method, exec=started["exec"], **facts)
                exit_ = await wire.exited(started["exec"])
                assert exit_["signal"] == (signal or "KILL")

    async def test_input_that_waited_on_disk_arrives_whole(self, gateway: LiveGateway, tenant: str) -> None:
        async with gateway.wire(tenant) as wire:
            started = await wire.call("exec/start", command="sleep 1; exec sha256sum", stdin=True)
            digest = hashlib.sha256()
            for _ in range(40 * MiB // len(PIECE)):
                await wire.stdin(started["channel"], PIECE)
                digest.update(PIECE)
            await wire.call("exec/closeStdin", exec=started["exec"])
            await wire.exited(started["exec"])
            assert wire.output[started["channel"], 1].startswith(digest.hexdigest().encode())

    async def test_a_window_is_told_and_opens_as_the_command_reads(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        """A client that keeps to it is never held back, and sends everything."""
        async with gateway.wire(tenant) as wire:
            started = await wire.call("exec/start", argv=["sha256sum"], stdin=True)
            window, exec_id, channel = started["stdinWindow"], started["exec"], started["channel"]
            digest, sent = hashlib.sha256(), 0
            assert window >= 2 * len(PIECE)

            def consumed() -> int:
                told = [n.params for n in wire.notifications if n.method == "exec/stdin"]
                assert all(one["exec"] == exec_id and one["channel"] == channel for one in told)
                return int(told[-1]["consumed"]) if told else 0

            while sent < 6 * window:
                await wire.until(lambda sent=sent: sent + len(PIECE) - consumed() <= window)
                await wire.stdin(channel, PIECE)
                sent += len(PIECE)
                digest.update(PIECE)
            await wire.call("exec/closeStdin", exec=exec_id)
            await wire.exited(exec_id)
            assert wire.output[channel, 1].startswith(digest.hexdigest().encode())
            assert consumed() <= sent

    async def test_ctrl_c_passes_a_terminal_that_is_full(self, gateway: LiveGateway, tenant: str) -> None:
        """Pasted lines that nobody reads do not stand before it, and do not run afterwards."""
        seconds = mark()
        async with gateway.wire(tenant) as wire:
            started = await wire.call("exec/start", argv=["sleep", seconds], pty={"cols": 80, "rows": 24})
            await until(lambda: alive(seconds) == 1)
            for _ in range(8):
                await wire.stdin(started["channel"], b"a line that was pasted\n" * 8192)
            await wire.stdin(started["channel"], b"\x03")
            exit_ = await wire.exited(started["exec"])
            assert (exit_["exitCode"], exit_["signal"], exit_["reason"]) == (130, "INT", "exited")

    async def test_a_full_terminal_delays_no_end(self, gateway: LiveGateway, tenant: str) -> None:
        """Neither the command's own nor a cancel's."""
        async with gateway.wire(tenant) as wire:
            for argv, cancelled in ((["sleep", "0.5"], False), (["sleep", "60"], True)):
                started = await wire.call("exec/start", argv=argv, pty={"cols": 80, "rows": 24})
                await wire.stdin(started["channel"], b"a line that was pasted\n" * 65536)
                if cancelled:
                    killed = await wire.call("exec/cancel", exec=started["exec"], graceMs=0)
                    assert killed["survivors"] == 0
                exit_ = await wire.exited(started["exec"])
                expected = (137, "cancelled") if cancelled else (0, "exited")
                assert (exit_["exitCode"], exit_["reason"]) == expected

    async def test_http_input_of_any_size_arrives_or_ends_with_its_command(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        text = "é" * (6 * MiB)
        async with gateway.http(tenant) as http:
            url = f"/v1/tenants/{tenant}/exec"
            body: dict[str, Any] = {"argv": ["sha256sum"], "stdin": text}
            async with http.post(url, data=io.BytesIO(orjson.dumps(body))) as response:
                said = await response.json()
            assert said["stdout"].startswith(hashlib.sha256(text.encode()).hexdigest())
            body = {"argv": ["sleep", "60"], "stdin": text, "timeout_ms": 300}
            async with http.post(url, data=io.BytesIO(orjson.dumps(body))) as response:
                assert (await response.json())["reason"] == "timeout"

    async def test_two_writers_on_one_terminal_are_both_heard(
        self, gateway: LiveGateway, tenant: str
    ) -> None:
        # without an echo, which the kernel may put into the middle of what the program prints
        script = "stty -echo; echo ready; exec cat"
        async with gateway.wire(tenant) as one, gateway.wire(tenant) as other:
            started = await one.call("exec/start", command=script, pty={"cols": 80, "rows": 24})
            attached = await other.call("exec/attach", exec=started["exec"])
            await one.until(lambda: one.output[started["channel"], 1] == b"ready\r\n")
            for number in range(20):
                await one.stdin(started["channel"], f"one {number}\n".encode())
                await other.stdin(attached["channel"], f"two {number}\n".encode())
            for wire, channel in ((one, started["channel"]), (other, attached["channel"])):
                for who in (b"one", b"two"):
                    lines = [b"%b %d\r\n" % (who, number) for number in range(20)]
                    key = channel, 1
                    await wire.until(
                        lambda wire=wire, key=key, lines=lines: all(
                            wire.output[key].count(line) == 1 for line in lines
                        )
                    )
            assert one.output[started["channel"], 1] == other.output[attached["channel"], 1]
            await one.stdin(started["channel"], b"\x04")
            await asyncio.gather(one.exited(started["exec"]), other.exited(started["exec"]))


__all__ = ["InputContract"]
