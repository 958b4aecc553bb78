"""Clients that never pause, on tenants of all members through all gateways, while these are replaced.

Each stays with one gateway, as who knows a single address. What they see is counted: what puts a call off,
and how long nothing is answered. And each call must be made once, its end told once, each line read once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import aiohttp

from gateway_client import Change, Client
from gateway_client.errors import GatewayError
from tests.contracts.processes import mark
from tests.live import LiveGateway
from tests.waits import pause, until

_EACH: Final = 0.15  # seconds between two calls that a client begins: of three gateways one each 50 ms
_AGAIN: Final = 0.2  # seconds until one that was put off is repeated
_BASH: Final = 10  # one call of so many is a command
_COUNT: Final = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.05; done"
_PUT_OFF: Final = (429, 502, 503, 504)
_CALM: Final = 10  # answers of each tenant through each gateway before anything is done
_DECIDED: Final = 120.0  # seconds until the last call is decided and told, once all is well


class Caller:
    """Begins calls at a steady pace through one gateway, each with a key of its own, in each tenant in turn.

    Most write a file that must be new, some append a line: so to make one twice shows.
    """

    def __init__(self, at: str, gateway: LiveGateway, tenants: Sequence[str]) -> None:
        self.at, self.ending = at, False
        self.made: defaultdict[str, list[int]] = defaultdict(list)  # by tenant
        self.unknown: defaultdict[str, list[int]] = defaultdict(
            list
        )  # nobody can tell whether they were made
        self.put_off: Counter[str] = Counter()
        self.slowest = 0.0  # seconds until a call was decided
        self._gateway, self._tenants = gateway, tenants
        self._keys = f"{self.at}-{mark()}"
        self._answered: defaultdict[str, list[float]] = defaultdict(list)  # when, by tenant

    async def go(self) -> None:
        """Call until `ending`, and return once all is decided. Raises what one of the calls raises."""
        async with self._gateway.http("*", ttl=3600) as http, asyncio.TaskGroup() as group:
            for number in itertools.count():
                if self.ending:
                    return
                group.create_task(self._decide(http, number))
                await pause(_EACH)

    async def _decide(self, http: aiohttp.ClientSession, number: int) -> None:
        tenant = self._tenants[number % len(self._tenants)]
        tool, body = "Write", {"file_path": f"calls-{self._keys}/{number}", "content": "once"}
        if number % _BASH == 0:
            tool, body = "Bash", {"command": f"echo {number} >> lines-{self._keys}"}
        path, began = f"/v1/tenants/{tenant}/tools/{tool}", time.monotonic()
        while True:
            status, said = await self._ask(http, path, body, number)
            if status in (200, 410):
                break
            self.put_off[f"{status} {said.get('reason', said['code'])}" if status else said["broken"]] += 1
            assert not status or status in _PUT_OFF, (self.at, tenant, tool, status, said)
            await pause(_AGAIN)
        if status == 200:
            assert not said["isError"] and (tool == "Bash" or "created" in json.dumps(said)), (tenant, said)
        (self.made if status == 200 else self.unknown)[tenant].append(number)
        self._answered[tenant].append(time.monotonic())
        self.slowest = max(self.slowest, time.monotonic() - began)

    async def _ask(self, http: aiohttp.ClientSession, path: str, body: Any, number: int) -> tuple[int, Any]:
        """Return status and answer, or 0 and what broke the connection."""
        try:
            async with http.post(path, json=body, headers={"Idempotency-Key": self._key(number)}) as answer:
                return answer.status, json.loads(await answer.read())
        except (aiohttp.ClientError, OSError) as broken:
            return 0, {"broken": type(broken).__name__}

    def _key(self, number: int) -> str:
        return f"{self._keys}-{number}"

    @property
    def keys(self) -> set[str]:
        """The keys of the calls that were made."""
        return {self._key(number) for numbers in self.made.values() for number in numbers}

    def since(self, began: float) -> dict[str, int]:
        """Return how many calls in each tenant were answered since then."""
        return {tenant: sum(at > began for at in self._answered[tenant]) for tenant in self._tenants}

    @property
    def gap(self) -> float:
        """The longest time in seconds for which no call in one tenant was answered."""
        between = (itertools.pairwise(sorted(times)) for times in self._answered.values())
        return max(after - before for pairs in between for before, after in pairs)

    async def hold_once(self) -> None:
        """Hold that what was answered was made once, and nothing else but what nobody knows of."""
        for tenant in self._tenants:
            words = ["sh", "-c", f"ls calls-{self._keys} && cat lines-{self._keys}"]
            async with self._gateway.http(tenant) as http:
                async with http.post(f"/v1/tenants/{tenant}/exec", json={"argv": words}) as answer:
                    said = await answer.json()
            assert said["exit_code"] == 0, said
            found = Counter(map(int, said["stdout"].split()))
            made, unknown = {*self.made.get(tenant, ())}, {*self.unknown.get(tenant, ())}
            doubled = [number for number, times in found.items() if times > 1]
            lost, more = sorted(made - found.keys()), sorted(found.keys() - made - unknown)
            assert not (doubled or lost or more), f"{tenant} at {self.at}: {doubled=} {lost=} {more=}"


class Watcher:
    """Follows a command that counts, in one tenant through one gateway; begins another where it is lost."""

    def __init__(self, gateway: LiveGateway, tenant: str) -> None:
        self.tenant, self.lines, self.reconnected = tenant, 0, 0
        self.lost: list[str] = []  # how commands ended
        self._gateway = gateway

    async def go(self) -> None:
        """Follow, until cancelled. Raises `AssertionError` where a line is missing or comes twice."""

        def token() -> str:
            return self._gateway.token(self.tenant)

        async with Client(self._gateway.url, token=token, on_change=self._changed) as client:
            while True:
                try:
                    await self._follow(client)
                except GatewayError as error:
                    self.lost.append(f"{error.code} {error.message}")
                await pause(_AGAIN)

    async def _follow(self, client: Client) -> None:
        text, last = b"", 0
        async with client.tenant(self.tenant).exec(["sh", "-c", _COUNT]) as command:
            async for _, chunk in command.output():
                *whole, text = (text + chunk).split(b"\n")
                for line in whole:
                    assert int(line) == last + 1, f"{self.tenant}: {int(line)} came after {last}"
                    last += 1
                self.lines += len(whole)
            self.lost.append((await command.wait()).reason)

    def _changed(self, change: Change) -> None:
        self.reconnected += change.state == "reconnecting"


class Follower:
    """Follows how calls in all tenants end, through one gateway; the client resumes where it breaks."""

    def __init__(self, gateway: LiveGateway) -> None:
        self.told: Counter[str] = (
            Counter()
        )  # keys of calls that were made; each attempt before has an end, too
        self._seen: Counter[tuple[str, int]] = Counter()  # source and id of each event
        self.gaps: list[Any] = []
        self.reconnected = 0
        self._gateway = gateway
        self.begun = asyncio.Event()

    async def go(self) -> None:
        """Follow, until cancelled."""

        def token() -> str:
            return self._gateway.token("*")

        async with (
            Client(self._gateway.url, token=token, on_change=self._changed) as client,
            client.events(types="tool.finished") as stream,
        ):
            self.begun.set()
            async for event in stream:
                if event.type == "tool.finished":
                    self._seen[event.source, event.id] += 1
                    self.told[event.data["callId"]] += not event.data["isError"]
                elif event.type == "gap":
                    self.gaps.append(event.data)

    def _changed(self, change: Change) -> None:
        self.reconnected += change.state == "reconnecting"

    @property
    def twice(self) -> list[object]:
        """The events that came twice, and the calls that were said twice to be made."""
        counts: list[tuple[object, int]] = [*self._seen.items(), *self.told.items()]
        return [one for one, times in counts if times > 1]


class Steady:
    """What the clients see."""

    def __init__(self, gateways: Mapping[str, LiveGateway], tenants: Sequence[str]) -> None:
        self.callers = [Caller(at, gateway, tenants) for at, gateway in gateways.items()]
        entrances = [*gateways.values()]
        # each through the gateway of another member
        self.watchers = [
            Watcher(entrances[(number + 1) % len(entrances)], tenant) for number, tenant in enumerate(tenants)
        ]
        self.followers = [Follower(gateway) for gateway in entrances]
        self.calm = 0.0  # the longest gap of a caller before anything is done

    async def served(self, within: float = 120.0, answers: int = 4) -> None:
        """Return once each caller has had answers of each tenant, and each command has said more."""
        began, lines = time.monotonic(), [watcher.lines for watcher in self.watchers]

        def all_are() -> bool:
            return all(min(caller.since(began).values()) >= answers for caller in self.callers) and all(
                watcher.lines > before for watcher, before in zip(self.watchers, lines, strict=True)
            )

        try:
            await until(all_are, within, every=0.1)
        except AssertionError:
            had = {caller.at: caller.since(began) for caller in self.callers}
            raise AssertionError(f"not all is served after {within:.0f} s: {had}\n{self}") from None

    def __str__(self) -> str:
        made = sum(len(caller.keys) for caller in self.callers)
        unknown = [number for caller in self.callers for some in caller.unknown.values() for number in some]
        lines = [
            f"{made} calls made, {len(unknown)} unknown, load {os.getloadavg()[0]:.0f};"
            f" before: {self.calm:.2f} s without an answer",
            *(
                f"through {caller.at}: {caller.gap:.2f} s without an answer of a tenant at most,"
                f" the slowest call took {caller.slowest:.2f} s; put off: {dict(caller.put_off)}"
                for caller in self.callers
            ),
            *(
                f"{one.tenant}: {one.lines} lines, reconnected {one.reconnected}, commands ended: {one.lost}"
                for one in self.watchers
            ),
            *(
                f"{one.told.total()} ends told, reconnected {one.reconnected}, gaps: {one.gaps}"
                for one in self.followers
            ),
        ]
        return "\n   ".join(lines)

    async def hold(self) -> None:
        """Hold that no call was lost or doubled, nor the word of its end."""
        for caller in self.callers:
            await caller.hold_once()
        made = {key for caller in self.callers for key in caller.keys}
        for follower in self.followers:

            def untold() -> list[str]:
                return sorted(key for key in made if not follower.told[key])  # noqa: B023 - called at once

            with contextlib.suppress(AssertionError):
                await until(lambda: not untold(), _DECIDED, every=0.1)
            twice = follower.twice
            assert not (untold() or twice or follower.gaps), f"{untold()[:5]} {twice[:5]} {follower.gaps}"


@contextlib.asynccontextmanager
async def steady(gateways: Mapping[str, LiveGateway], tenants: Sequence[str]) -> AsyncIterator[Steady]:
    """Have clients work; what fails one of them fails the test at once. At the end all is held."""
    clients = Steady(gateways, tenants)
    async with asyncio.TaskGroup() as following:
        endless = [following.create_task(one.go()) for one in clients.watchers]
        endless += [following.create_task(one.go()) for one in clients.followers]
        for follower in clients.followers:
            await follower.begun.wait()
        async with asyncio.TaskGroup() as calling:
            for caller in clients.callers:
                calling.create_task(caller.go())
            await clients.served(answers=_CALM)
            clients.calm = max(caller.gap for caller in clients.callers)
            yield clients
            await clients.served()
            for caller in clients.callers:
                caller.ending = True
        print(f"   {clients}")
        await clients.hold()
        for one in endless:
            one.cancel()
