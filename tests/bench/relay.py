"""Measures what it costs to ask a gateway for another member's tenant: direct and relayed, in turns.

Two gateways of the `local` runtime on this machine; the connection between them is by TLS, and all ends share
its cores. `tests/bench/relay` prints p50 and p95 of a ping by websocket and of a request by HTTP; the
throughput of a command's output, an upload and a download, and of each pair of runs, one after the other, the
share that the relay keeps: in half of the pairs, in 95 and in 99 of 100. The CPU that the gateways use for it
says more on a busy machine. The last line is what a gateway with an idle peer costs. Nothing passes or fails
by time; the exit code is 1 if bytes are missing, or are others than were sent.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from tests.clusters import known, relayed
from tests.live import LiveGateway, Wire

MiB = 1 << 20
TENANT = "demo"


async def timed(call: Callable[[], Awaitable[Any]], times: list[float]) -> None:
    began = time.perf_counter()
    await call()
    times.append((time.perf_counter() - began) * 1000)


def told(what: str, found: dict[str, list[float]]) -> None:
    """Print p50 and p95 of each way in ms, and what the relay adds to the first."""
    parts = []
    for way, times in found.items():
        p95 = statistics.quantiles(times, n=20)[-1]
        parts.append(f"{way} {statistics.median(times):.2f} / {p95:.2f}")
    direct, far = (statistics.median(times) for times in found.values())
    print(f"{what:32} {'   '.join(parts)} ms p50 / p95   {far - direct:+.2f} ms")


async def latencies(ways: dict[str, LiveGateway], rounds: int) -> None:
    pings: dict[str, list[float]] = {way: [] for way in ways}
    asks: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, gateway in ways.items():
            async with gateway.wire(TENANT) as wire:
                await wire.call("ping")
                for _ in range(50):
                    await timed(lambda: wire.call("ping"), pings[way])
            token = gateway.token(TENANT)
            headers = {"Authorization": f"Bearer {token}"}
            async with aiohttp.ClientSession(gateway.url, headers=headers) as http:

                async def ask() -> None:
                    async with http.get(f"/v1/tenants/{TENANT}/files/small") as answer:
                        assert len(await answer.read()) == 1000

                await ask()
                for _ in range(20):
                    await timed(ask, asks[way])
    told("ping by websocket", pings)
    told("GET of a file of 1 kB", asks)


class Counting(Wire):
    """Counts output and keeps none."""

    count = 0  # bytes

    def took(self, message: bytes) -> None:
        """Look at a message of output, if a subclass wants to."""

    async def _read(self) -> None:
        async for message in self.socket:
            if isinstance(message, bytes):
                self.count += len(message) - 5
                self.took(message)
            else:
                self._text(message)
            async with self._grown:
                self._grown.notify_all()


async def output(gateway: LiveGateway, size: int) -> float:
    """Return MiB/s of a command's output."""
    async with gateway.raw(TENANT, Counting) as wire:
        assert isinstance(wire, Counting)
        await wire.call("initialize", client={}, token=gateway.token(TENANT))
        began = time.perf_counter()
        await wire.call("exec/start", argv=["head", "-c", str(size), "/dev/zero"])
        await wire.until(lambda: wire.count >= size, 300)
        seconds = time.perf_counter() - began
        assert wire.count == size, f"{wire.count} of {size} bytes came"
        return size / MiB / seconds


async def download(gateway: LiveGateway, size: int) -> float:
    headers = {"Authorization": f"Bearer {gateway.token(TENANT)}"}
    async with aiohttp.ClientSession(gateway.url, headers=headers, read_bufsize=MiB) as http:
        began, came = time.perf_counter(), 0
        async with http.get(f"/v1/tenants/{TENANT}/files/large") as answer:
            async for part in answer.content.iter_any():
                came += len(part)
        assert came == size, f"{came} of {size} bytes came"
        return size / MiB / (time.perf_counter() - began)


async def upload(gateway: LiveGateway, size: int) -> float:
    async def body() -> Any:
        for _ in range(size // MiB):
            yield bytes(MiB)

    headers = {"Authorization": f"Bearer {gateway.token(TENANT)}", "Content-Length": str(size)}
    async with aiohttp.ClientSession(gateway.url, headers=headers) as http:
        began = time.perf_counter()
        async with http.put(f"/v1/tenants/{TENANT}/files/large", data=body()) as answer:
            assert answer.status in (200, 201) and (await answer.json())["size"] == size
        return size / MiB / (time.perf_counter() - began)


def pattern(number: int) -> bytes:
    """Return the MiB of this number, unlike any other."""
    return number.to_bytes(16) * (MiB // 16)


class Hashing(Counting):
    """Hashes what a command prints."""

    def __init__(self, *given: Any) -> None:
        self.hash = hashlib.sha256()
        super().__init__(*given)

    def took(self, message: bytes) -> None:
        self.hash.update(memoryview(message)[5:])


async def whole(gateway: LiveGateway, size: int) -> None:
    """Send and read back bytes that differ everywhere, and compare their SHA-256 each time."""
    sent = hashlib.sha256()

    async def body() -> Any:
        for number in range(size // MiB):
            part = pattern(number)
            sent.update(part)
            yield part

    token = gateway.token(TENANT)
    headers = {"Authorization": f"Bearer {token}", "Content-Length": str(size)}
    async with aiohttp.ClientSession(gateway.url, headers=headers) as http:
        async with http.put(f"/v1/tenants/{TENANT}/files/whole", data=body()) as answer:
            assert answer.status == 201, await answer.text()
    async with gateway.http(TENANT) as session, session.get(f"/v1/tenants/{TENANT}/files/whole") as answer:
        came = hashlib.sha256()
        async for part in answer.content.iter_any():
            came.update(part)
    assert came.digest() == sent.digest(), "a download is not what was uploaded"
    async with gateway.raw(TENANT, Hashing) as wire:
        assert isinstance(wire, Hashing)
        await wire.call("initialize", client={}, token=token)
        await wire.call("exec/start", command="cat whole; rm whole")
        await wire.until(lambda: wire.count >= size, 300)
        assert wire.hash.digest() == sent.digest(), "a command's output is not what was uploaded"
    print(f"{size // MiB} MiB up, down and as output of a command: whole by SHA-256")


async def throughputs(
    ways: dict[str, LiveGateway], gateways: Sequence[LiveGateway], rounds: int, size: int, only: str
) -> None:
    all_ = {"output": output, "upload": upload, "download": download}
    works = {what: work for what, work in all_.items() if only in ("", what)}
    await upload(ways["direct"], size)
    for what, work in works.items():
        found: dict[str, list[float]] = {way: [] for way in ways}
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            for way, gateway in sorted(ways.items(), reverse=bool(number % 2)):
                before = sum(map(busy, gateways))
                found[way].append(await work(gateway, size))
                spent[way].append((sum(map(busy, gateways)) - before) / (size / MiB) * 1000)
        direct, far = (statistics.median(rates) for rates in found.values())
        here, there = (statistics.median(times) for times in spent.values())
        shares = sorted(far / direct for direct, far in zip(*found.values(), strict=True))
        kept = " ".join(f"{shares[int(rounds * part)]:.0%}" for part in (0.5, 0.05, 0.01))
        shown = f"direct {direct:.0f}   relayed {far:.0f} MiB/s   {kept}"
        print(f"{what:24} {shown}   CPU {here:.2f}, {there:.2f} ms/MiB ({rounds} x {size // MiB} MiB)")


def busy(gateway: LiveGateway) -> float:
    """Return seconds of CPU that a gateway has used."""
    assert gateway.process is not None
    stat = Path(f"/proc/{gateway.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


async def idle(gateway: LiveGateway, seconds: float) -> None:
    began = busy(gateway)
    await asyncio.sleep(seconds)
    used = (busy(gateway) - began) / seconds
    print(f"{'an idle gateway with a peer':32} {used:.2%} of a core")


async def measured(rounds: int, size: int, only: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gateway = await relayed(Path(folder), TENANT, GATEWAY_HISTORY="false")
        await gateway.start()
        try:
            await known(gateway, [TENANT])
            ways = {"direct": gateway.home, "relayed": gateway}
            async with gateway.http(TENANT) as http:
                async with http.put(f"/v1/tenants/{TENANT}/files/small", data=bytes(1000)) as answer:
                    assert answer.status == 201
            print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
            if rounds and not only:
                await latencies(ways, rounds)
            if rounds:
                await throughputs(ways, (gateway.entry, gateway.home), rounds, size, only)
            if rounds and not only:
                await idle(gateway.entry, 20)
            await whole(gateway, size)
            print(f"load {os.getloadavg()[0]:.1f}")
        finally:
            await gateway.stop()
            await gateway.entry.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="0: only look whether all bytes come")
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--only", default="", help="output, upload or download")
    options = parser.parse_args()
    try:
        asyncio.run(measured(options.rounds, options.mib * MiB, options.only))
    except AssertionError as error:
        print(f"wrong: {error}")
        return 1
    return 0
