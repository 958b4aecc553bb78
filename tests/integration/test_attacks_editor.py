"""A process inside a real container swaps paths as fast as it can, while an editor works on them.

As in `test_attacks`, but from outside: by websocket and HTTP through a live gateway, with the calls that move
more than a text: streams both ways, removing of whole folders, watching.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import Any

import aiohttp
import pytest

from tests.integration.test_attacks import (
    DEADLINE,
    RACES,
    SECONDS,
    SECRET,
    Arena,
    arena,
    gateway,
    pool,
    victim,
)
from tests.live import LiveGateway, RpcFailure, Wire

__all__ = ["arena", "gateway", "pool", "victim"]


class Editor:
    """Asks for what is being swapped; whatever is answered, it comes in time and without the secret."""

    def __init__(self, wire: Wire, http: aiohttp.ClientSession, tenant: str) -> None:
        self.wire = wire
        self.http = http
        self.base = f"/v1/tenants/{tenant}/files"
        self.answers: Counter[str] = Counter()
        self.slowest = 0.0

    def _note(self, code: str, text: str, began: float) -> None:
        assert SECRET not in text
        assert "storage-pools" not in text and "/tmp/" not in text
        self.answers[code] += 1
        self.slowest = max(self.slowest, time.monotonic() - began)

    async def call(self, method: str, **params: Any) -> None:
        began = time.monotonic()
        async with asyncio.timeout(DEADLINE):
            try:
                self._note("done", json.dumps(await self.wire.call(method, **params)), began)
            except RpcFailure as error:
                self._note(error.code, str(error), began)

    async def ask(self, method: str, path: str, data: bytes | None = None) -> None:
        began = time.monotonic()
        async with asyncio.timeout(DEADLINE):
            try:
                async with self.http.request(method, f"{self.base}/{path}", data=data) as response:
                    body = (await response.read()).decode(errors="replace")
                    self._note(str(response.status), body, began)
            except aiohttp.ClientPayloadError:
                self._note("broken off", "", began)  # the file shrank while it was sent

    async def round(self) -> None:
        for path in (
            "prey.txt",
            "folder/secret.txt",
            "in/deep/back",
            "bait",
            "way-out/secret.txt",
            "magic/passwd",
        ):
            await self.call("files/read", path=path)
            await self.call("files/stat", path=path)
            await self.ask("GET", path)
        await self.call("files/list", path=".", depth=4)
        await self.call("files/list", path="folder")
        for path in ("folder/up/deep/file", "folder/put.txt", "prey.txt", "in/deep/put.txt"):
            await self.ask("PUT", path, b"mine")
        await self.call("files/mkdir", path="folder/made/deeper")
        await self.call("files/write", path="folder/made/text", text="mine", createDirs=True)
        await self.call("files/move", **{"from": "folder/made", "to": "in/made", "overwrite": True})
        await self.call("files/move", **{"from": "folder/put.txt", "to": "folder/moved.txt"})
        await self.call("files/remove", path="folder/up", recursive=True)
        await self.call("files/remove", path="in/made", recursive=True)
        await self.ask("DELETE", "folder/moved.txt")


@pytest.mark.timeout(300)
async def test_races(arena: Arena, gateway: LiveGateway) -> None:
    """Nothing leaks, hangs or changes outside, nothing unfinished is left, and what is told is bounded."""
    name, folder = arena.container.name, arena.secret.parent
    (folder / "up").mkdir()
    (folder / "up" / "kept").write_text("kept")
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    calls: Counter[str] = Counter()
    async with gateway.http(name) as http:
        for what, user in RACES:
            async with gateway.wire(name) as wire:
                editor = Editor(wire, http, name)
                await editor.call("files/watch", paths=["."])
                with arena.attacked(what, user):
                    until = time.monotonic() + SECONDS
                    while time.monotonic() < until or editor.answers.total() < 60:
                        await editor.round()
                calls += editor.answers
                told = [said.params for said in wire.notifications if said.method == "files/changed"]
                assert SECRET not in json.dumps(told)
                assert all(len(params["changes"]) <= 1000 for params in told)
                print(f"{what} {user}: slowest {editor.slowest * 1000:.0f} ms, told {len(told)} times")
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before
    assert arena.secret.read_text() == SECRET
    assert min(calls["done"], calls["200"]) > calls.total() / 20  # the races were no mere refusals
    print(dict(calls))
    async with asyncio.timeout(10):
        while arena.container.sh("find / -xdev -name '.gateway-*' 2>/dev/null").strip():
            pass
    assert arena.container.sh("cat /etc/marker /srv/way/secret.txt").split() == [SECRET, SECRET]


async def test_a_hostile_tree_cannot_exhaust_the_watching(arena: Arena, gateway: LiveGateway) -> None:
    """A tree deeper than a path, folders without end, names that are no text: told, and the watch lives."""
    name = arena.container.name
    deep = 'chdir "/srv/site"; for (1..300) { mkdir "d" x 20; chdir "d" x 20 or die }'
    arena.container.run("perl", "-e", deep, user=1000)
    async with gateway.wire(name) as wire:
        said = await wire.call("files/watch", paths=["."])
        assert said["unwatched"] > 0  # what lies deeper than a path can name
        arena.container.sh("cd /srv/site; mkdir w; cd w; seq -f w%g 9000 | xargs mkdir", user=1000)
        await wire.until(lambda: any(n.params.get("overflow") for n in wire.notifications))
        async with gateway.wire(name) as other:
            with pytest.raises(RpcFailure) as caught:
                await other.call("files/watch", paths=["."])
        assert caught.value.code == "rate_limited" and "folders" in caught.value.message
        arena.container.sh(r"cd /srv/site; rm -r w; touch $(printf 'bad\377') $(printf 'e\033x')", user=1000)

        def names() -> set[str]:
            told = [n.params for n in wire.notifications if n.method == "files/changed"]
            return {change["path"] for params in told for change in params["changes"]}

        async def touched() -> None:
            number = 0
            while not {"bad\\xff", "e\x1bx"} <= names():
                number += 1
                touch = r"cd /srv/site; echo > $(printf 'bad\377'); echo > $(printf 'e\033x')"
                await asyncio.to_thread(arena.container.sh, touch, 1000)

        await asyncio.wait_for(touched(), 20)
