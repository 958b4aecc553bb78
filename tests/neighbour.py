"""A tenant's client that reads a file again and again, in a process of its own, and says how long each took.

What a test does to the gateway meanwhile must not slow down the clock that it is measured by.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from websockets.sync.client import connect

from gateway import protocol

if TYPE_CHECKING:
    from tests.live import LiveGateway  # a second of CPU, for nothing that this process needs


class Beside:
    """What a neighbour saw: the seconds of each Read, in order."""

    def __init__(self) -> None:
        self.seconds: Sequence[float] = ()

    @property
    def worst(self) -> float:
        return max(self.seconds)

    @property
    def p99(self) -> float:
        return self.at(0.99)

    def at(self, share: float) -> float:
        """Return the seconds within which this share of the Reads was answered."""
        return sorted(self.seconds)[int(len(self.seconds) * share)]

    def __str__(self) -> str:
        return f"{len(self.seconds)} reads, p99 {self.p99 * 1000:.1f} ms, worst {self.worst * 1000:.1f} ms"


@contextlib.asynccontextmanager
async def reading(
    gateway: LiveGateway, tenant: str, path: str, *, every: float = 0.01
) -> AsyncIterator[Beside]:
    """Have a neighbour read every few seconds while the context is open; what it saw is there afterwards."""
    url = f"ws://127.0.0.1:{gateway.port}/v1/tenants/{tenant}/ws"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.neighbour", url, gateway.token(tenant), path, str(every)),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=16 << 20,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    beside = Beside()
    try:
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"ready\n"
        yield beside
        process.stdin.close()
        async with asyncio.timeout(60):
            beside.seconds = json.loads(await process.stdout.readline())
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def main(url: str, token: str, path: str, every: str) -> None:
    import select

    with connect(url, subprotocols=[protocol.SUBPROTOCOL], proxy=None, max_size=None) as socket:  # type: ignore[list-item]

        def call(number: int, method: str, **params: object) -> None:
            socket.send(protocol.request(number, method, params))
            while True:
                said = protocol.decode_server_text(str(socket.recv(60)))
                if isinstance(said, protocol.Reply):
                    assert said.id == number and said.error is None, said
                    return

        call(1, "initialize", token=token, client={"name": "neighbour", "version": "1"})
        number = 2
        for number in range(2, 30):  # until its worker is there
            call(number, "tools/call", name="Read", arguments={"file_path": path})
        print("ready", flush=True)
        seconds, due = [], time.monotonic()
        while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
            number += 1
            began = time.monotonic()
            call(number, "tools/call", name="Read", arguments={"file_path": path})
            seconds.append(time.monotonic() - began)
            due = max(due + float(every), time.monotonic())
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
