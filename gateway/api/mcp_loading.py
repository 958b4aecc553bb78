"""Loads the MCP endpoint at its first request: importing `mcp` would take a third of the gateway's start."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Final

from starlette.types import Receive, Scope, Send

from gateway.auth.tokens import Token
from gateway.bounds import run_in_thread
from gateway.errors import Unavailable
from gateway.history import History
from gateway.settings import Settings
from gateway.tools.toolbox import Toolbox

if TYPE_CHECKING:
    from gateway.api.mcp import Mcp

_LOADING: Final = 60.0  # seconds


class McpEndpoint:
    """The endpoint of all tenants; see `gateway.api.mcp`. Use as an async context manager."""

    def __init__(self, toolbox: Toolbox, history: History, settings: Settings) -> None:
        self._toolbox, self._history, self._settings = toolbox, history, settings
        self._ends = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._endpoint: asyncio.Future[Mcp]

    async def __aenter__(self) -> McpEndpoint:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        if self._task is not None:
            await self._task

    async def serve(
        self, tenant: str, token: Token, body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer one request whose caller was verified and whose body was read.

        Raises `InvalidParams`, and `Unavailable` if the package cannot be loaded.
        """
        if self._task is None or self._task.done():
            self._endpoint = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._run(self._endpoint), name="mcp")
        endpoint = await asyncio.shield(self._endpoint)
        await endpoint.serve(tenant, token, body, scope, receive, send)

    async def _run(self, endpoint: asyncio.Future[Mcp]) -> None:
        """Keep the endpoint open; the task that opened it must close it."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                module = await run_in_thread("mcp", _LOADING, import_module, "gateway.api.mcp")
                # the imported objects stay, so exclude them from collections, as at the gateway's start
                gc.freeze()
                endpoint.set_result(
                    await stack.enter_async_context(module.Mcp(self._toolbox, self._history, self._settings))
                )
            except (ImportError, TimeoutError) as error:
                why = "in time" if isinstance(error, TimeoutError) else f"here: {error}"
                endpoint.set_exception(Unavailable(f"the package mcp cannot be loaded {why}"))
                endpoint.exception()  # retrieved, or asyncio would log it
                return
            await self._ends.wait()
