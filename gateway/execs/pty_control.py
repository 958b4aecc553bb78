"""A command's terminal: its input with a Ctrl-C that must get through, its size, its redraw."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from gateway.errors import GatewayError
from gateway.execs.input import Input, Sender
from gateway.runtime import Process, Pty

_CTRL_C: Final = b"\x03"
_TAKES: Final = 0.05  # seconds in which a terminal accepts a byte, if it accepts any
_SEES: Final = 0.15  # seconds in which a program notices that its terminal was resized


class PtyControl:
    """Control of a command's terminal. A command without one only has its input. Close it at the end.

    `resized` is called after each change of the size.
    """

    def __init__(
        self, process: Process, input_: Input, size: Pty | None, exec_id: str, resized: Callable[[], None]
    ) -> None:
        self._process = process
        self._input = input_
        self._size = size
        self._exec_id = exec_id
        self._resized = resized
        self._closed = False
        self._interrupting: asyncio.Task[None] | None = None
        self._redrawing: asyncio.Task[None] | None = None

    async def write(self, data: bytes, by: Sender) -> None:
        """Queue input; see `Input.put`. A Ctrl-C gets through even to a terminal that accepts no input.

        If the terminal's buffer of some 4 KiB is full, the byte would wait behind everything typed or pasted.
        That input is dropped, as a terminal itself does on Ctrl-C.
        """
        await self._input.put(data, by)
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
        """Resize the terminal."""
        self._size = Pty(cols, rows)
        await self._process.resize(cols, rows)
        self._resized()

    @property
    def size(self) -> Pty | None:
        return self._size

    def redraw(self) -> None:
        """Make a full-screen program redraw, for a reader that lacks the earlier output."""
        if not (self._size is None or self._closed or self._redrawing):
            self._redrawing = asyncio.create_task(self._redraw(self._size), name=f"redraw {self._exec_id}")

    async def _redraw(self, size: Pty) -> None:
        # a program is signalled only if the size changes, and may miss two changes in quick succession
        try:
            await self._process.resize(size.cols, max(1, size.rows - 1))
            await asyncio.sleep(_SEES)
            assert self._size is not None
            await self._process.resize(self._size.cols, self._size.rows)
        finally:
            self._redrawing = None

    async def close(self) -> None:
        """Cancel pending work. Idempotent."""
        self._closed = True
        tasks = [task for task in (self._interrupting, self._redrawing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
