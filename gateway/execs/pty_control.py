"""Controls the terminal of one command: its size, a Ctrl-C that must get through, redrawing."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from gateway.errors import GatewayError
from gateway.execs.input import Input
from gateway.runtime import Process, Pty

_CTRL_C: Final = b"\x03"
_TAKES: Final = 0.05  # seconds within which a terminal takes a byte, if it takes any
_SEES: Final = 0.15  # seconds within which a program sees that its terminal has another size


class PtyControl:
    """Control of a command's terminal; of a command without one it does nothing. Close it at the end."""

    def __init__(self, process: Process, input_: Input, size: Pty | None, exec_id: str) -> None:
        self._process = process
        self._input = input_
        self._size = size
        self._exec_id = exec_id
        self._interrupting: asyncio.Task[None] | None = None
        self._redrawing: asyncio.Task[None] | None = None

    def typed(self, data: bytes) -> None:
        """Let a Ctrl-C through to a terminal that takes no input.

        It holds some 4 KiB that no program reads, and the byte waits behind all that was typed or pasted. As
        a terminal does by itself at Ctrl-C, what waits is dropped.
        """
        if data == _CTRL_C and self._size is not None:
            self._interrupting = asyncio.create_task(self._interrupt(), name=f"interrupt {self._exec_id}")

    async def _interrupt(self) -> None:
        await asyncio.sleep(_TAKES)
        if self._input.waiting or self._process.unsent:
            self._input.discard()
            with contextlib.suppress(GatewayError, TimeoutError):
                await self._process.flush()
                await self._process.write(_CTRL_C)
                self._input.accounts.other(len(_CTRL_C))

    async def resize(self, cols: int, rows: int) -> None:
        """Give the terminal another size."""
        self._size = Pty(cols, rows)
        await self._process.resize(cols, rows)

    @property
    def size(self) -> Pty | None:
        return self._size

    def redraw(self) -> None:
        """Have a full-screen program redraw its terminal, for a reader that lacks its earlier output."""
        if self._size is not None and self._redrawing is None:
            self._redrawing = asyncio.create_task(self._redraw(self._size), name=f"redraw {self._exec_id}")

    async def _redraw(self, size: Pty) -> None:
        # a terminal tells its program only of a change, and two within a moment may be none to it
        try:
            await self._process.resize(size.cols, max(1, size.rows - 1))
            await asyncio.sleep(_SEES)
            assert self._size is not None
            await self._process.resize(self._size.cols, self._size.rows)
        finally:
            self._redrawing = None

    async def close(self) -> None:
        """Give up what is under way."""
        tasks = [task for task in (self._interrupting, self._redrawing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
