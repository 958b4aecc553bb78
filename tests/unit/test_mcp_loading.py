"""The MCP endpoint is there from its first request on; the real one is in the contracts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.api import mcp_loading
from gateway.api.mcp_loading import McpEndpoint
from gateway.errors import Unavailable
from tests.waits import turn

GIVEN: Any = ("shop", None, b"{}", {}, None, None)


class Endpoint:
    """Stands for `gateway.api.mcp.Mcp`: must be closed by the task that opened it."""

    made: list[Endpoint]

    def __init__(self, *given: object) -> None:
        self.served = 0
        self.opened: Any = None
        self.closed = False
        self.made.append(self)

    async def __aenter__(self) -> Endpoint:
        self.opened = asyncio.current_task()
        return self

    async def __aexit__(self, *error: object) -> None:
        assert asyncio.current_task() is self.opened
        self.closed = True

    async def serve(self, *given: object) -> None:
        assert given == GIVEN and not self.closed
        self.served += 1


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """How loading ends, each time; None for well."""
    ends: list[BaseException | None] = []
    Endpoint.made = []

    def load(name: str) -> Any:
        if (error := ends.pop(0)) is not None:
            raise error
        return SimpleNamespace(Mcp=Endpoint)

    monkeypatch.setattr(mcp_loading, "import_module", load)
    return ends


async def test_it_is_loaded_once_for_all_who_come_at_first(loads: list[BaseException | None]) -> None:
    loads.append(None)
    async with McpEndpoint(*(None, None, None)) as mcp:  # type: ignore[arg-type]
        assert not Endpoint.made
        await asyncio.gather(*(mcp.serve(*GIVEN) for _ in range(5)))
        await mcp.serve(*GIVEN)
        (made,) = Endpoint.made
        assert made.served == 6 and not made.closed
    assert made.closed


async def test_what_cannot_be_loaded_is_told_and_tried_again(loads: list[BaseException | None]) -> None:
    loads += [ImportError("No module named 'mcp_types'"), None]
    async with McpEndpoint(*(None, None, None)) as mcp:  # type: ignore[arg-type]
        with pytest.raises(Unavailable, match="mcp_types"):
            await mcp.serve(*GIVEN)
        await mcp.serve(*GIVEN)
    assert [(made.served, made.closed) for made in Endpoint.made] == [(1, True)]


async def test_who_leaves_takes_nothing_from_the_others(loads: list[BaseException | None]) -> None:
    loads.append(None)
    async with McpEndpoint(*(None, None, None)) as mcp:  # type: ignore[arg-type]
        first = asyncio.create_task(mcp.serve(*GIVEN))
        await turn()
        first.cancel()
        await mcp.serve(*GIVEN)
    assert first.cancelled() and Endpoint.made[0].served == 1


def test_a_gateway_starts_without_what_few_need() -> None:
    """What speaks MCP, and what drives Incus to prepare a host: together half of a start."""
    script = (
        "import sys, gateway.server; print(*{'mcp', 'mcp_types', 'pylxd', 'requests'} & sys.modules.keys())"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
