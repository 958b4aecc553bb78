"""A cluster of three members, each with a gateway and a Caddy, and what clients ask of any of them.

Nothing here skips: where a cluster cannot be made, the tests fail and say why.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import itertools
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pytest

from gateway.host import HostError
from tests.cluster.rig import Member, Rig
from tests.live import LiveGateway
from tests.waits import until

ENDED = ("succeeded", "rolledback")

_numbers = itertools.count()


class Served(LiveGateway):
    """The gateway of a member, and its Caddy, as a client on another machine meets them."""

    def __init__(self, member: Member) -> None:
        super().__init__({}, Path("/dev/null"))
        self.member, self.url = member, member.url

    async def start(self, *before: str) -> None:
        await asyncio.to_thread(self.member.ours, "gateway")

    async def ask(
        self, method: str, path: str, body: Any = None, *, tenants: tuple[str, ...] = ("*",), **headers: str
    ) -> tuple[int, Any]:
        """Return the status and the JSON of an answer."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        async with (
            self.http(*tenants) as session,
            session.request(method, path, json=body, headers=given) as answer,
        ):
            text = await answer.read()
            return answer.status, json.loads(text) if text else None

    async def listed(self) -> dict[str, Any]:
        """Return the tenants that it lists, by name."""
        status, answer = await self.ask("GET", "/v1/tenants")
        assert status == 200, answer
        return {tenant["name"]: tenant for tenant in answer["tenants"]}

    async def deploy(self, domain: str, template: Any = "static", **more: Any) -> dict[str, Any]:
        """Deploy and return the record once it has ended."""
        status, begun = await self.ask(
            "POST", "/v1/deployments", {"domain": domain, "template": template, **more}
        )
        assert status == 202, begun
        record: dict[str, Any] = {}

        async def over() -> bool:
            record.update((await self.ask("GET", f"/v1/deployments/{begun['id']}"))[1])
            return record["state"] in ENDED

        await until(over, 110, every=0.2)
        return record

    async def visit(self, domain: str, path: str = "/") -> tuple[int, str]:
        """Ask a site at this member's Caddy."""
        words = ["curl", "--silent", "--max-time", "10", "--write-out", "\n%{http_code}"]
        said = await asyncio.to_thread(
            self.member.run, *words, "--header", f"Host: {domain}", f"http://127.0.0.1:2020{path}"
        )
        text, _, status = said.rpartition("\n")
        return int(status), text


@pytest.fixture(scope="session")
def cluster() -> Iterator[Rig]:
    """The cluster, with everything on and each member's gateway running this checkout's code."""
    rig, said = Rig(), list[str]()
    with contextlib.ExitStack() as stack:
        rig.folder.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((rig.folder / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # one run at a time
        _prepare(rig, said)
        yield rig


def _prepare(rig: Rig, said: list[str]) -> None:
    try:
        rig.up(said.append)
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(_serve_anew, rig.members):
                pass
    except HostError as error:
        said.append(error.message)
        pytest.fail("the tests' cluster cannot be prepared:\n" + "\n".join(said), pytrace=False)


def _serve_anew(member: Member) -> None:
    member.ours("ungateway")  # which may be copying one of those
    for instance in json.loads(member.incus("list", "--format=json", f"location={member.name}")):
        if instance["name"].startswith(("t-", "m-")):  # of a run that was killed
            member.incus("delete", "--force", instance["name"])
    member.ours("gateway")


@pytest.fixture
async def members(cluster: Rig) -> AsyncIterator[tuple[Member, ...]]:
    """The members, for a test that cuts their power or cables: afterwards all are as before."""
    yield cluster.members
    await asyncio.gather(*(asyncio.to_thread(heal, member) for member in cluster.members))


def slack() -> float:
    """Return how many times as long all may take, by what else this machine has to do."""
    return max(1.0, os.getloadavg()[0] / (4 * (os.cpu_count() or 1)))


def heal(member: Member) -> None:
    """Have a member on, with its cable, incusd, Caddy and gateway."""
    member.power_on()
    member.plug()
    member.ours("all")


@pytest.fixture(scope="session")
def client(cluster: Rig) -> Callable[[Member], Served]:
    """A function that gives the gateway of a member."""
    return Served


class MakeTenant(Protocol):
    def __call__(self, member: Member, *more: str) -> Awaitable[str]: ...


@pytest.fixture
async def make_tenant(cluster: Rig) -> AsyncIterator[MakeTenant]:
    """A function that makes a running tenant on a member, by Incus alone; they end with the test.

    What it is given besides are words for `incus launch`.
    """
    made: list[tuple[Member, str]] = []

    async def make(member: Member, *more: str) -> str:
        name = f"t-{os.getpid()}-{next(_numbers)}"
        made.append((member, name))
        words = ("launch", "gateway-base", name, "--profile", "gateway-tenant", "--target", member.name)
        await asyncio.to_thread(member.incus, *words, *more)
        return name

    yield make

    async def gone(member: Member, name: str) -> bool:
        try:
            await asyncio.to_thread(member.incus, "delete", "--force", name)
        except HostError as error:
            said = error.message.lower()
            # it is just being copied, or what is left of that is being sent still
            if "is busy running" in said or "send may be in progress" in said:
                return False
            assert "not found" in said, said  # a test may have destroyed it itself
        return True

    for member, name in made:
        await until(functools.partial(gone, member, name), 60, every=0.5)
