"""What deployments tell, by values alone; tests/integration/test_deployments*.py has those of real sites."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.auth import Token
from gateway.deployments import Deployments, Record, Request
from gateway.domains import Domains
from gateway.events import Bus
from gateway.settings import Settings
from gateway.store import Store

OPERATOR = Token("me", frozenset({"*"}), frozenset({"admin"}), 0, "id")


class Told:
    """A bus that keeps what is published."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def publish(self, type: str, tenant: str | None, data: Any, deployment: str | None = None) -> None:
        self.events.append((type, data))

    def of(self, type: str) -> Any:
        (found,) = (data for kind, data in self.events if kind == type)
        return found


class Nothing:
    """Sites and a Caddy with nothing to undo."""

    def url(self, domain: str) -> str:
        return f"https://{domain}"

    def unset(self, domain: str) -> None:
        pass

    async def remove(self, deployment: str) -> None:
        pass


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[tuple[Deployments, Told]]:
    settings, told = Settings(state_dir=tmp_path), Told()
    nothing = cast(Any, Nothing())
    async with Store(tmp_path) as store:
        domains = await Domains.opened(nothing, store, cast(Bus, told), settings)
        yield Deployments(nothing, nothing, nothing, domains, store, cast(Bus, told), settings), told


async def test_one_that_is_cancelled_before_it_began_says_where_it_stood(
    rig: tuple[Deployments, Told],
) -> None:
    deployments, told = rig  # not recovered yet, so that none begins
    record, _ = await deployments.begin(Request("shop.example.com", "static"), OPERATOR)
    await asyncio.sleep(0)  # until it waits: a request's cancel never comes before that
    ended = await deployments.cancel(record.id)
    assert ended.state == "rolledback"
    said = told.of("deployment.cancelled")
    assert (said["phase"], said["index"], said["of"]) == ("validate", 0, 8)
    assert said["error"]["code"] == "cancelled"


async def test_one_of_a_killed_gateway_says_where_it_stood(rig: tuple[Deployments, Told]) -> None:
    deployments, told = rig
    record = Record("shop", "shop.example.com", "https://shop.example.com", "static", "me", state="running")
    for phase, state in zip(record.phases, ("done", "done", "running"), strict=False):
        phase.state = cast(Any, state)
    await deployments._recover_one(record)
    said = told.of("deployment.failed")
    assert (said["phase"], said["index"], said["of"]) == ("push", 2, 8)
    assert told.of("deployment.rolledback")["error"]["message"] == "the gateway ended"
