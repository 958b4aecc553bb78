"""Terminals as people see them, through an emulator: after a reload, by two at once, after a loss."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pyte
import pytest

from gateway.settings import Settings
from tests.contracts.processes import mark
from tests.integration.conftest import Container
from tests.integration.test_gateway_incus import live
from tests.live import LiveGateway, Wire
from tests.waits import until

COLS, ROWS = 80, 24
PTY = {"cols": COLS, "rows": ROWS}


@pytest.fixture(scope="module")
async def gateway(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveGateway]:
    log: Path = tmp_path_factory.mktemp("terminals") / "gateway.log"
    async with live(incus_settings, log, GATEWAY_EXEC_TAIL="65536") as gateway:
        yield gateway


class Seen:
    """What one attachment shows on a screen."""

    def __init__(self, wire: Wire, channel: int) -> None:
        self.channel = channel
        self._wire = wire

    def lines(self) -> Sequence[str]:
        screen: Any = pyte.Screen(COLS, ROWS)
        pyte.ByteStream(screen).feed(bytes(self._wire.output[self.channel, 1]))
        return [line.rstrip() for line in screen.display]

    def raw(self) -> bytes:
        return bytes(self._wire.output[self.channel, 1])

    async def shows(self, text: str) -> None:
        await self._wire.until(lambda: any(text in line for line in self.lines()))

    async def same_as(self, other: Seen) -> None:
        """Wait until both show the same, and something: what one got the other may still get."""
        await until(lambda: any(self.lines()) and self.lines() == other.lines())


async def start(wire: Wire, command: str) -> tuple[str, Seen]:
    started = await wire.call("exec/start", command=command, pty=PTY)
    return started["exec"], Seen(wire, started["channel"])


async def test_an_editor_shows_its_screen_after_a_reload_and_to_a_second_viewer(
    gateway: LiveGateway, shared_tenant: Container
) -> None:
    """The alternate screen included; both type into it, and the first may go."""
    name = mark()
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(gateway.wire(shared_tenant.name))
        exec_id, first = await start(one, f"nano {name}")
        await first.shows("GNU nano")
        assert b"\x1b[?1049h" in first.raw()
        await one.stdin(first.channel, b"typed here")
        await first.shows("typed here")
        async with gateway.wire(shared_tenant.name) as two:
            attached = await two.call("exec/attach", exec=exec_id)
            second = Seen(two, attached["channel"])
            await second.shows("typed here")
            await second.same_as(first)
            await two.stdin(second.channel, b" and there")
            await first.shows("typed here and there")
            await second.same_as(first)
            await one.close()  # the page is closed: the other has the terminal to itself
            await two.stdin(second.channel, b", alone")
            await second.shows("typed here and there, alone")
        async with gateway.wire(shared_tenant.name) as again:
            attached = await again.call("exec/attach", exec=exec_id)
            reloaded = Seen(again, attached["channel"])
            await reloaded.shows("typed here and there, alone")
            await again.stdin(reloaded.channel, b"\x18n")  # leave it, and save nothing
            exit_ = await again.exited(exec_id)
            assert exit_["exitCode"] == 0
            assert b"\x1b[?1049l" in reloaded.raw()


async def test_a_screen_of_which_output_fell_out_is_drawn_anew(
    gateway: LiveGateway, shared_tenant: Container
) -> None:
    """Where the replay begins in the middle, the program is made to draw itself."""
    line = r"draw() { printf '\033[2J\033[Hthe frame'; }; trap draw WINCH; draw; "
    line += r"for i in $(seq 9000); do printf '\033[5;5Hcount %s' $i; done; while :; do sleep 0.05; done"
    async with gateway.wire(shared_tenant.name) as one, gateway.wire(shared_tenant.name) as two:
        exec_id, first = await start(one, line)
        await one.until(lambda: b"count 9000" in first.raw())
        await first.shows("the frame")
        attached = await two.call("exec/attach", exec=exec_id)
        assert attached["lost"]["stdout"] > 0
        second = Seen(two, attached["channel"])
        await second.shows("the frame")
        await second.same_as(first)
        await two.call("exec/cancel", exec=exec_id, graceMs=0)


async def test_colours_mouse_and_resize_pass_untouched(
    gateway: LiveGateway, shared_tenant: Container
) -> None:
    """Byte for byte both ways, UTF-8 cut anywhere and what is none included."""
    said = b"\x1b[1;31mred\x1b[0m\x1b[?1000h\x1b[?1006h\x1b[8;30;100t\xe2\x82\xac\xff\xfe"
    octal = "".join(f"\\{byte:03o}" for byte in said)
    async with gateway.wire(shared_tenant.name) as wire:
        line = f"stty raw -echo; printf '{octal}'; head -c 13 | od -An -tx1 -w13; stty size"
        exec_id, seen = await start(wire, line)
        await wire.until(lambda: len(seen.raw()) >= len(said))
        assert seen.raw() == said
        await wire.call("exec/resize", exec=exec_id, cols=132, rows=50)
        click = b"\x1b[<0;12;7M\xe2\x82\xac"
        assert len(click) == 13
        for byte in click:
            await wire.stdin(seen.channel, bytes([byte]))
        assert (await wire.exited(exec_id))["exitCode"] == 0
        assert click.hex(" ").encode() in seen.raw()
        assert b"50 132" in seen.raw()
