"""Asks Caddy's admin API, by TCP or a unix socket.

Caddy replaces that API whenever it gets another configuration, from whomever: what is asked just then is cut
off. All that the gateway asks may be asked twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
from typing import Any, Final

import aiohttp
import orjson

from gateway.caddy.errors import CaddyFailed

_TIMEOUT: Final = aiohttp.ClientTimeout(total=10)
_TRIES: Final = 3
_PAUSE: Final = 0.1  # seconds between two


class Admin:
    """The admin API at `address`. Open it before the first question, and close it after the last."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        path = socket_of(self.address)
        # a connection that is kept would be to the API before
        connector = (
            aiohttp.TCPConnector(force_close=True)
            if path is None
            else aiohttp.UnixConnector(path, force_close=True)
        )
        self._session = aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, method: str, path: str, body: str | dict[str, Any] | None = None) -> Any:
        """Return the JSON of an answer. A `body` of text is sent as a Caddyfile. Raises `CaddyFailed`."""
        address = self.address
        unix = socket_of(address) is not None
        url = ("http://caddy" if unix else address.rstrip("/")) + path
        # on a unix socket Caddy wants no origin and takes any host
        headers = {"Content-Type": "text/caddyfile" if isinstance(body, str) else "application/json"}
        data = body if body is None or isinstance(body, str) else orjson.dumps(body)
        if unix:
            headers["Host"] = ""
        try:
            status, said = await self._answer(method, url, data, headers)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if getattr(error, "errno", None) == errno.EACCES:
                raise CaddyFailed(
                    f"the gateway's user may not use Caddy's admin API at {address}", reason="caddy_denied"
                ) from error
            raise CaddyFailed(
                f"Caddy's admin API at {address} does not answer; start Caddy "
                "(systemctl start incus-gateway-caddy, or deploy/quickstart), or set GATEWAY_CADDY_ADMIN",
                reason="caddy_down",
            ) from error
        if status >= 400:
            reason = said.decode(errors="replace")[:500]
            raise CaddyFailed(f"Caddy refuses the gateway's configuration: {reason}", reason="caddy_refused")
        try:
            return orjson.loads(said) if said.strip() else None
        except ValueError:
            return None

    async def _answer(
        self, method: str, url: str, data: str | bytes | None, headers: dict[str, str]
    ) -> tuple[int, bytes]:
        assert self._session is not None
        for _ in range(_TRIES - 1):
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with self._session.request(method, url, data=data, headers=headers) as answer:
                    return answer.status, await answer.read()
            await asyncio.sleep(_PAUSE)
        async with self._session.request(method, url, data=data, headers=headers) as answer:
            return answer.status, await answer.read()


def socket_of(address: str) -> str | None:
    """Return the path of a unix socket in `/PATH`, `unix:/PATH` or Caddy's `unix//PATH`."""
    if address.startswith("/"):
        return address
    match = re.fullmatch(r"unix(?::(?://)?|/)(/.+)", address)
    return None if match is None else match[1]
