"""Clients at work on tenants of all members, through all gateways, while something happens to these.

Each repeats what could not be decided, at the next gateway, as behind a load balancer. `Work.check` compares
what they were told with what is in the tenants.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from tests.cluster.conftest import Served
from tests.waits import pause

_EACH: Final = 1.0  # seconds between two calls of one client
_AGAIN: Final = 0.3  # seconds until an undecided call is repeated
_ANSWER: Final = 40.0  # seconds that an answer may take at all, on a busy machine
_SILENCE: Final = aiohttp.ClientTimeout(total=None, sock_read=20)  # of a stream, which has a line each 15 s
_UNDECIDED: Final = (429, 502, 503, 504)

Answer = tuple[int, Any]


@dataclass
class Effects:
    """The numbers that one client has written to its own file, each by a call with a key of its own."""

    made: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)  # the gateway says that it cannot tell


class Work:
    """What the clients were told so far. `lists` and `calls` are how many seconds these took of late."""

    def __init__(self, gateways: Sequence[Served], tenants: Sequence[str]) -> None:
        self.gateways, self.tenants = gateways, tenants
        self.effects: dict[tuple[str, str], Effects] = {}
        self.lists: list[float] = []
        self.calls: list[tuple[float, str]] = []
        self.gaps = 0
        self.missing = ""
        """What was not well when that was looked at last."""
        self._seen: Counter[tuple[str, str]] = Counter()  # source and id of each event
        self._destroyed: list[str] = []
        self.ending = False  # the clients end what they have begun

    # --- the clients --------------------------------------------------------------------------------

    def clients(self) -> list[asyncio.Task[None]]:
        """Begin to work."""
        work = [self._follow()]
        for first, gateway in enumerate(self.gateways):
            work.append(self._list(gateway))
            work += [self._append(first, tenant) for tenant in self.tenants]
        work += [self._read(tenant) for tenant in self.tenants]
        return [asyncio.create_task(one) for one in work]

    async def _append(self, first: int, tenant: str) -> None:
        """Append numbers to a file, until the end."""
        file = f"effects-{first}"
        told = self.effects[tenant, file] = Effects()
        for number in itertools.count():
            if self.ending:
                return
            body = {"command": f"echo {number} >> /srv/site/{file}"}
            status, said = await self._decide(first, tenant, "Bash", body, f"{file} {number}")
            if status == 410:
                told.unknown.append(number)
            else:
                assert (status, said["isError"]) == (200, False), said
                told.made.append(number)
            await pause(_EACH)

    async def _read(self, tenant: str) -> None:
        """Write a file and read it back through another gateway, until the end."""
        path, before = "/srv/site/written", ""
        for number in itertools.count():
            if self.ending:
                return
            body = {"file_path": path, "content": f"number {number}."}
            status, said = await self._decide(number, tenant, "Write", body, f"write {number}")
            assert status == 410 or (status, said["isError"]) == (200, False), said
            possible = [body["content"]] if status == 200 else [before, body["content"]]
            status, said = await self._decide(number + 1, tenant, "Read", {"file_path": path}, "")
            assert status == 200 and any(one in json.dumps(said) for one in possible), (possible, said)
            before = body["content"]
            await pause(_EACH)

    async def _decide(self, first: int, tenant: str, tool: str, body: Any, key: str) -> Answer:
        """Have a tool's call answered, by whichever gateway, beginning with the one of this number."""
        for turn in itertools.count(first):
            gateway = self.gateways[turn % len(self.gateways)]
            began = time.monotonic()
            answer = await asked(gateway, "POST", f"/v1/tenants/{tenant}/tools/{tool}", body, key)
            what = f"{tool} of {tenant} at {gateway.member.name}: {answer and answer[0]}"
            self.calls.append((time.monotonic() - began, what))
            if answer is not None and not _undecided(*answer):
                assert answer[0] in (200, 410), (gateway.member.name, tenant, tool, answer)
                return answer
            await pause(_AGAIN)
        raise AssertionError

    async def _list(self, gateway: Served) -> None:
        while not self.ending:
            began = time.monotonic()
            answer = await asked(gateway, "GET", "/v1/tenants")
            if answer is not None and answer[0] == 200:
                self.lists.append(time.monotonic() - began)
                names = {tenant["name"] for tenant in answer[1]["tenants"]}
                assert names >= {*self.tenants}, (gateway.member.name, names)
            await pause(_EACH)

    async def _follow(self) -> None:
        """Follow the events of all tenants, at the next gateway where a stream ends."""
        path, last = "/v1/events?type=tenant.*,tool.*", ""
        for turn in itertools.count():
            gateway = self.gateways[turn % len(self.gateways)]
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with gateway.http("*", scopes=("admin", "events")) as session:
                    headers = {"Last-Event-ID": last} if last else {}
                    async with session.get(path, headers=headers, timeout=_SILENCE) as stream:
                        if stream.status == 200:
                            async for line in stream.content:
                                if line.startswith(b"id:"):
                                    last = line[3:].strip().decode()
                                elif line.startswith(b"data:"):
                                    self._take(json.loads(line[5:]))
            await pause(_AGAIN)

    def _take(self, event: dict[str, Any]) -> None:
        if event["type"] == "gap":
            self.gaps += 1
            return
        self._seen[event["source"], event["id"]] += 1
        if event["type"] == "tenant.destroyed" and event.get("subject") in self.tenants:
            self._destroyed.append(event["subject"])

    # --- what is looked at --------------------------------------------------------------------------

    async def is_well(self, gateways: Sequence[Served] = (), tenants: Sequence[str] = ()) -> bool:
        """Return whether these gateways, or all, are ready, list all tenants, and run commands in these."""
        looks = [
            self._lacks(gateway, tenants or self.tenants, not gateways)
            for gateway in gateways or self.gateways
        ]
        self.missing = ", ".join(filter(None, await asyncio.gather(*looks)))
        return not self.missing

    async def well(
        self, within: float, gateways: Sequence[Served] = (), tenants: Sequence[str] = ()
    ) -> float:
        """Return how many seconds it took until all is well; it must not be more than `within`."""
        began, late = time.monotonic(), ""
        while not await self.is_well(gateways, tenants):
            late = self.missing
            assert time.monotonic() - began < within, f"after {within:.0f} s: {late}"
            await pause(_AGAIN)
        if late:
            print(f"   {time.monotonic() - began:.1f} s, the last of it for {late[:300]}")
        return time.monotonic() - began

    async def _lacks(self, gateway: Served, tenants: Sequence[str], whole: bool) -> str:
        """Return what a gateway does not do yet."""
        at = gateway.member.name
        for path in ("/readyz", "/v1/tenants"):
            answer = await asked(gateway, "GET", path)
            if answer is None or answer[0] != 200:
                return f"{path} at {at}: {answer}"
            if whole and answer[1].get("unanswered"):
                return f"{path} at {at}: {answer[1]['unanswered']} did not answer"
        for tenant in tenants:
            answer = await asked(gateway, "POST", f"/v1/tenants/{tenant}/exec", {"argv": ["true"]})
            if answer is None or answer[0] != 200 or answer[1]["exit_code"] != 0:
                return f"{tenant} at {at}: {answer}"
        return ""

    def decided(self) -> int:
        """Return how many calls with an effect were decided."""
        return sum(len(one.made) + len(one.unknown) for one in self.effects.values())

    async def check(self) -> None:
        """Compare what was told with what is in the tenants: nothing lost, nothing doubled."""
        for (tenant, file), told in self.effects.items():
            path = f"/v1/tenants/{tenant}/files/{file}"
            async with self.gateways[0].http(tenant) as http, http.get(path) as answer:
                assert answer.status == 200, (tenant, file, answer.status)
                found = Counter(map(int, (await answer.text()).split()))
            doubled = [number for number, times in found.items() if times > 1]
            lost = sorted({*told.made} - found.keys())
            more = sorted(found.keys() - {*told.made, *told.unknown})
            assert not (doubled or lost or more), f"{tenant} {file}: {doubled=} {lost=} {more=}"
        assert not self._destroyed, f"destroyed: {self._destroyed}"
        twice = [event for event, times in self._seen.items() if times > 1]
        assert not twice, f"told twice: {twice[:5]}"
        assert self._seen, "no event came"

    @property
    def told(self) -> str:
        made = sum(len(one.made) for one in self.effects.values())
        unknown = sum(len(one.unknown) for one in self.effects.values())
        return f"{made} calls made, {unknown} unknown, {len(self._seen)} events, {self.gaps} gaps"


def _undecided(status: int, said: Any) -> bool:
    # of a tenant that is just being started with its server
    return status in _UNDECIDED or (status == 409 and said["code"] == "tenant_not_running")


async def asked(gateway: Served, method: str, path: str, body: Any = None, key: str = "") -> Answer | None:
    """Return the answer, None if the connection was refused or broke, or its server has no power any more.

    One that has must answer.
    """
    headers, power = {"Idempotency_Key": key} if key else {}, gateway.member.pid
    try:
        async with asyncio.timeout(_ANSWER):
            return await gateway.ask(method, path, body, tenants=("*",), **headers)
    except TimeoutError:
        if gateway.member.pid == power is not None:
            raise AssertionError(f"no answer of {gateway.member.name} to {path} for {_ANSWER} s") from None
    except (aiohttp.ClientError, OSError, json.JSONDecodeError):
        pass
    return None


@contextlib.asynccontextmanager
async def working(gateways: Sequence[Served], tenants: Sequence[str]) -> AsyncIterator[Work]:
    """Have clients at work; yield what they are told. At the end it is checked.

    What fails one of them fails the test, there and then.
    """
    work = Work(gateways, tenants)
    await work.well(90)
    clients = work.clients()
    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(_watch(clients))
            yield work
            watching.cancel()
        work.ending = True
        async with asyncio.timeout(_ANSWER + 20):
            await asyncio.gather(*clients[1:])  # without the one that follows events
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    print(work.told)
    await work.check()


async def _watch(clients: Sequence[asyncio.Task[None]]) -> None:
    done, _ = await asyncio.wait(clients, return_when=asyncio.FIRST_EXCEPTION)
    for one in done:
        one.result()
