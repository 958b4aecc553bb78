"""Measures a burst of 10 000 events to 500 subscribers over HTTP, a tenth of which does not read.

The journal, the bus and the SSE response are the gateway's own, in a server process of their own with a
store on disk. Printed are how long publishing took, until when all readers and then all stalled ones had
every event, and the server's resident memory before, at its peak and after. Exit code 1 where an event was
missing, twice or out of order; nothing passes or fails by time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.events import Bus, Filter, StoredJournal, positions, sse
from gateway.settings import Settings
from gateway.storage.store import Store

# of each end of each connection: the kernel's own would take a whole burst, and nobody would ever stall
_BUFFER: Final = 64 << 10


def _shrink(connection: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER)


def serve(listening: socket.socket, folder: Path) -> None:
    """Serve the events of one bus, and a burst on request."""
    settings = Settings(state_dir=folder)

    async def run() -> None:
        async with (
            Store(folder) as store,
            StoredJournal(
                store,
                kept=settings.events_kept,
                kept_bytes=settings.events_bytes,
                age=settings.events_age,
            ) as journal,
        ):
            bus = Bus(journal)

            async def events(request: Request) -> Response:
                return sse.response(
                    bus, Filter(), positions.after(request.query_params.get("lastEventId")), settings
                )

            async def burst(request: Request) -> Response:
                count, began = int(request.query_params["count"]), time.perf_counter()
                for n in range(count):
                    data = {"name": "Read", "by": "agent", "ms": 0.5, "isError": False, "n": n}
                    bus.publish("tool.finished", "shop", data)
                return JSONResponse({"ms": (time.perf_counter() - began) * 1000})

            async def subscribers(request: Request) -> Response:
                return JSONResponse({"subscribers": bus.subscribers})

            routes = [
                Route("/events", events),
                Route("/burst", burst, methods=["POST"]),
                Route("/subscribers", subscribers),
            ]
            config = uvicorn.Config(Starlette(routes=routes), log_level="warning", access_log=False)
            await uvicorn.Server(config).serve(sockets=[listening])

    uvloop.run(run())


class Subscriber:
    """One SSE client that counts what it reads: ids must grow by one."""

    def __init__(self) -> None:
        self.seen = 0
        self.right = True
        self._last = 0
        self._rest = b""

    async def open(self, port: int) -> None:
        connection = socket.socket()
        _shrink(connection)
        connection.connect(("127.0.0.1", port))
        self._reader, self._writer = await asyncio.open_connection(sock=connection, limit=_BUFFER)
        self._writer.write(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        await self._reader.readuntil(b"\r\n\r\n")

    async def read(self, count: int) -> None:
        while self.seen < count:
            data = self._rest + await self._reader.read(64 << 10)
            *lines, self._rest = data.split(b"\n")
            for line in lines:
                if line.startswith(b"id: "):
                    number = int(line[4:])
                    self.right = self.right and self._last in (0, number - 1)
                    self._last = number  # the first is where the stream begins, without an event
                elif line.startswith(b"event: gap"):
                    self.right = False
                elif line.startswith(b"event: "):
                    self.seen += 1

    def close(self) -> None:
        self._writer.close()


async def ask(port: int, method: str, path: str) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    body = (await reader.read()).partition(b"\r\n\r\n")[2]
    writer.close()
    answer: dict[str, Any] = json.loads(body)
    return answer


def memory(pid: int, key: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) / 1024


async def measure(port: int, pid: int, subscribers: int, events: int) -> dict[str, Any]:
    clients = [Subscriber() for _ in range(subscribers)]
    for client in clients:
        await client.open(port)
    stalled, reading = clients[: subscribers // 10], clients[subscribers // 10 :]
    async with asyncio.timeout(30):
        while (await ask(port, "GET", "/subscribers"))["subscribers"] < subscribers:
            pass
    before, began = memory(pid, "VmRSS"), time.perf_counter()
    published = await ask(port, "POST", f"/burst?count={events}")
    await asyncio.gather(*(client.read(events) for client in reading))
    readers = time.perf_counter() - began
    during = memory(pid, "VmRSS")
    await asyncio.gather(*(client.read(events) for client in stalled))
    result = {
        "subscribers": subscribers,
        "events": events,
        "publish_ms": published["ms"],
        "readers_s": readers,
        "all_s": time.perf_counter() - began,
        "before_mib": before,
        "stalled_mib": during,
        "peak_mib": memory(pid, "VmHWM"),
        "right": all(client.right and client.seen == events for client in clients),
    }
    for client in clients:
        client.close()
    return result


def run(subscribers: int, events: int) -> dict[str, Any]:
    """Return what was measured."""
    with socket.socket() as listening, tempfile.TemporaryDirectory() as folder:
        _shrink(listening)  # what it accepts inherits that
        listening.bind(("127.0.0.1", 0))
        listening.listen(1024)
        context = multiprocessing.get_context("spawn")
        server = context.Process(target=serve, args=(listening, Path(folder)))
        server.start()
        try:
            assert server.pid is not None
            port: int = listening.getsockname()[1]
            return asyncio.run(measure(port, server.pid, subscribers, events))
        finally:
            server.terminate()
            server.join()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/bench/burst", description=__doc__)
    parser.add_argument("--subscribers", type=int, default=500)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    result = run(options.subscribers, options.events)
    if options.json:
        print(json.dumps(result))
    else:
        print(
            "{events} events published in {publish_ms:.0f} ms; all of them at every reader after "
            "{readers_s:.1f} s, at the stalled ones too after {all_s:.1f} s.\nThe server's memory with "
            "{subscribers} subscribers: {before_mib:.0f} MiB before, {stalled_mib:.0f} MiB with a tenth of "
            "them stalled, {peak_mib:.0f} MiB at its peak.".format(**result)
        )
        print("every event once and in order" if result["right"] else "WRONG: events missing or out of order")
    return 0 if result["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
