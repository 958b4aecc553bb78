"""HTTP requests to a gateway with the client's current token; used by all of the client."""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TYPE_CHECKING, Any

import orjson

from gateway_client.connection import Address, refusal
from gateway_client.credentials import Credentials
from gateway_client.errors import Disconnected
from gateway_client.retry import OnChange, Retry

if TYPE_CHECKING:
    # loaded on first use: a command over a websocket takes less time than this import
    import aiohttp
    from yarl import URL


class HttpClient:
    """A gateway's address, the token for it, and an HTTP session, which is created on first use.

    `retry` and `on_change` are the client's: how connections are replaced, and what is called about it.
    """

    def __init__(
        self, address: Address, credentials: Credentials, retry: Retry | None, on_change: OnChange | None
    ) -> None:
        self.address = address
        self.credentials = credentials
        self.retry = retry
        self.on_change = on_change
        self.closed = False
        self._session: aiohttp.ClientSession | None = None

    def shut(self) -> None:
        """Start no more requests. Those under way continue until `close`."""
        self.closed = True

    async def close(self) -> None:
        """End every request. Idempotent."""
        self.shut()
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The HTTP session. Raises `Disconnected` after `close`."""
        if self.closed:
            raise Disconnected("this client was closed")
        if self._session is None:
            import aiohttp

            unix = self.address.unix
            self._session = aiohttp.ClientSession(
                # event streams and waiting execs hold their connections, so there must be no limit
                connector=aiohttp.UnixConnector(unix, limit=0) if unix else aiohttp.TCPConnector(limit=0),
                # a waiting exec may take as long as its own timeout, which the gateway enforces
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=15),
            )
        return self._session

    async def ask(
        self,
        method: str,
        url: str | URL,
        *,
        headers: Mapping[str, str] | None = None,
        data: Callable[[], Any] | None = None,
        repeatable: bool = True,
        **options: Any,
    ) -> aiohttp.ClientResponse:
        """Send one request and return its answer, which the caller closes. Raises what aiohttp raises.

        If the token is refused and there is another, a `repeatable` request is sent again.
        """

        async def asked(token: str) -> aiohttp.ClientResponse:
            given = {**(headers or {}), "Authorization": f"Bearer {token}"}
            body = None if data is None else data()
            return await self.session.request(method, url, headers=given, data=body, **options)

        token = await self.credentials.current()
        response = await asked(token)
        self.credentials.learn(token, None, response.headers.get("Date"))
        if response.status == 401 and repeatable and self.credentials.renewable:
            await response.read()
            if (newer := await self.credentials.after(token)) is not None:
                return await asked(newer)
        return response

    async def json(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Ask one HTTP route and return its JSON. Raises the typed error of the answer, or `Disconnected`."""
        import aiohttp

        # a file, because aiohttp warns about bytes over 1 MiB, which it writes at once
        text = None if body is None else orjson.dumps(body)
        data = None if text is None else lambda: io.BytesIO(text)
        headers = {**(headers or {}), **({} if body is None else {"Content-Type": "application/json"})}
        url = self.address.url + path
        try:
            async with await self.ask(method, url, data=data, headers=headers) as response:
                content = await response.read()
        except aiohttp.ClientConnectorError as error:
            raise self.address.unanswered(error.os_error) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Disconnected(f"{method} {path}: {error}") from error
        if response.status >= 400:
            raise refusal(response.status, content)
        try:
            return orjson.loads(content) if content else None
        except ValueError:
            raise Disconnected(f"{method} {path} did not answer with JSON") from None

    async def stream(self, path: str) -> AsyncGenerator[bytes, None]:
        """Yield the body of a GET as it arrives. Raises the typed error of the answer, or `Disconnected`."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None)
        try:
            async with await self.ask("GET", self.address.url + path, timeout=timeout) as response:
                if response.status >= 400:
                    raise refusal(response.status, await response.read())
                async for piece in response.content.iter_any():
                    yield piece
        except aiohttp.ClientConnectorError as error:
            raise self.address.unanswered(error.os_error) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Disconnected(f"GET {path}: {error}") from error
