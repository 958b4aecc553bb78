"""Knows how to see from outside whether something in a tenant answers, without running anything in it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

_PAUSE: Final = 0.015  # seconds between two looks; there is nothing to wait on but the network itself
_CONNECT: Final = 0.1  # seconds of one try; before the network is up the kernel would wait a whole one
_DISCARD: Final = 9  # a port at which nothing listens (RFC 863)


async def network_up(address: str, timeout: float) -> None:
    """Return once an address refuses or takes a connection. Raises `TimeoutError`."""
    async with asyncio.timeout(timeout):
        while True:
            try:
                _, writer = await asyncio.wait_for(asyncio.open_connection(address, _DISCARD), _CONNECT)
                writer.close()
                return
            except ConnectionRefusedError:
                return
            except (OSError, TimeoutError):
                await asyncio.sleep(_PAUSE)


async def answer(address: str, port: int, path: str, timeout: float) -> int:
    """Ask a site until it answers with success or elsewhere, return the status. Raises `TimeoutError`."""
    async with asyncio.timeout(timeout):
        while True:
            with contextlib.suppress(OSError, ValueError):
                status = await ask(address, port, path)
                if status < 400:
                    return status
            await asyncio.sleep(_PAUSE)


async def ask(address: str, port: int, path: str, connect: float = _CONNECT) -> int:
    """Ask once; return the status. Raises `OSError`, `TimeoutError` among them, and `ValueError`."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(address, port), connect)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        line = await asyncio.wait_for(reader.readline(), 10.0)
    finally:
        writer.close()
    if not line.startswith(b"HTTP/1."):
        raise ValueError("no HTTP")
    return int(line.split()[1])
