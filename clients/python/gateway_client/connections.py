"""The websockets to one tenant: opened when needed, kept for the next command, replaced when they break."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, Final

from gateway_client.connection import Connection
from gateway_client.errors import Disconnected, GatewayError, Unauthorized, Unavailable
from gateway_client.http_client import HttpClient
from gateway_client.retry import Change, Patience, State

log = logging.getLogger(__name__)

# connections kept for the next command: opening one costs more than starting the command
IDLE: Final = 4
# a connection that lasted so many seconds was a good one
LASTED: Final = 5.0
CLOSE_TIMEOUT: Final = 5.0
# requests that may be repeated, since they change nothing or the same; a tool call may, with its id
_REPEATABLE: Final = frozenset(
    {
        *("ping", "tools/list", "exec/list", "exec/wait", "exec/cancel", "exec/resize"),
        *("files/stat", "files/list", "files/read", "history/list", "history/diff"),
    }
)


class Connections:
    """The websockets to one tenant. One carries tools and control messages, and so one tool session.

    Each running command and each watch has its own: a slow reader stops reading its socket, which slows down
    that command and no other.
    """

    def __init__(
        self,
        http: HttpClient,
        tenant: str,
        initialize: Mapping[str, Any],
        *,
        ends_session: bool,
        keep: Callable[[], None],
    ) -> None:
        """`keep` is called when one has opened, since it needs newer tokens from then on."""
        self.http = http
        self.tenant = tenant
        self._initialize = initialize
        self.named = not ends_session
        self._keep = keep
        self._met = False  # whether the gateway was ever reached
        self._troubled: set[Patience] = set()
        self._told: State = "idle"
        self._main: Connection | None = None
        self._opening = asyncio.Lock()
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()

    @property
    def state(self) -> State:
        """Whether there is a connection to this tenant: `idle` if none was needed yet, or none is kept."""
        if self.http.closed:
            return "closed"
        if self._troubled:
            return "reconnecting"
        return "connected" if self.connected else "idle"

    @property
    def connected(self) -> bool:
        """Whether any connection is open."""
        return any(connection.alive for connection in self._open)

    async def request(self, method: str, params: Mapping[str, Any] | None = None) -> Any:
        """Call a method of `gateway.v1` and return its result. Raises the typed error of the answer.

        If the connection breaks, a request that may be sent twice is sent again.
        """
        repeatable = method in _REPEATABLE or (method == "tools/call" and "callId" in (params or {}))
        broken: GatewayError | None = None
        connection = self._main
        if connection is not None and connection.alive:  # the usual case, without retries
            try:
                return await connection.request(method, params)
            except Unavailable as error:
                if not repeatable or error is not connection.failure:
                    raise
                broken = error
        async with self.patience() as patience:
            if broken is not None:
                await self.pause(patience, broken)
            while True:
                connection = await self._talk(patience)
                began = time.monotonic()
                try:
                    return await connection.request(method, params)
                except Unavailable as error:
                    if not repeatable or error is not connection.failure:
                        raise
                    if time.monotonic() - began > LASTED:
                        patience.restore()
                    await self.pause(patience, error)

    async def _talk(self, patience: Patience) -> Connection:
        """Return the connection for tools and control messages."""
        connection = self._main
        if connection is None or not connection.alive:
            async with self._opening:
                connection = self._main
                if connection is None or not connection.alive:
                    if connection is not None:
                        await self.release(connection, good=False)
                    connection = self._main = await self.connect(patience, patient=False)
        return connection

    async def close(self) -> None:
        """Close all connections, and end the tool session if it has no name."""
        main, self._main = self._main, None
        if not self.named and main is not None and main.alive:
            with contextlib.suppress(GatewayError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await main.request("session/end")
        self._idle.clear()
        await asyncio.gather(*(self.release(connection, good=False) for connection in list(self._open)))
        self._tell(None)

    # --- for one operation ----------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def patience(self) -> AsyncIterator[Patience]:
        """Give the attempts of one operation, for as long as it lasts."""
        patience = Patience(self.http.retry)
        try:
            yield patience
        finally:
            self._troubled.discard(patience)
            self._tell(None)

    async def pause(self, patience: Patience, error: GatewayError) -> None:
        """Wait before the next attempt. Raises `error` if there is none."""
        pause = patience.pause() if self._met and not self.http.closed else None
        if pause is None:
            raise error.with_traceback(None)
        self._troubled.add(patience)
        self._tell(error)
        await asyncio.sleep(pause)

    async def connect(self, patience: Patience, *, patient: bool) -> Connection:
        """Open a connection; try as often as `patience` allows while the gateway cannot be reached."""
        while True:
            try:
                connection = await self._opened(patient)
            except Unavailable as error:
                await self.pause(patience, error)
            else:
                if self.http.closed:  # closed in the meantime: nothing else would close this connection
                    await connection.close()
                    raise Disconnected("this client was closed")
                self._met = True
                self._open.add(connection)
                self._troubled.discard(patience)
                self._keep()
                self.renew()  # it took its time to open
                self._tell(None)
                return connection

    async def _opened(self, patient: bool) -> Connection:
        """Open a connection with the present token, or with another one if the gateway refuses that."""
        credentials = self.http.credentials
        token = await credentials.current()
        open_ = partial(
            Connection.open,
            *(self.http.address, self.tenant),
            initialize=self._initialize,
            patient=patient,
            renewable=credentials.renewable,
        )
        try:
            connection = await open_(token=token)
        except Unauthorized:
            newer = await credentials.after(token)
            if newer is None:
                raise
            connection = await open_(token=newer)
        credentials.learn(connection.token, connection.server.get("expires"), connection.date)
        return connection

    def renew(self) -> None:
        """Give all connections the client's present token."""
        token = self.http.credentials.token
        for connection in self._open:
            if token is not None and connection.token != token and connection.alive:
                connection.renew(token, self.not_renewed)

    def not_renewed(self, error: GatewayError) -> None:
        """Report that there is no newer token; the connections last until the present one ends."""
        log.warning("cannot renew the token for tenant %s: %s", self.tenant, error.message)
        self._tell(error)

    def _tell(self, error: GatewayError | None) -> None:
        state, tell = self.state, self.http.on_change
        if tell is not None and (state != self._told or error is not None):
            self._told = state
            tell(Change(self.tenant, state, error))

    async def acquire(self, patience: Patience, *, fresh: bool = False) -> Connection:
        """Return a connection for one command."""
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.alive:
                return connection
            await self.release(connection, good=False)
        return await self.connect(patience, patient=True)

    async def release(self, connection: Connection, *, good: bool) -> None:
        """Take a connection back: keep it for the next command if it is `good`, else close it."""
        if good and connection.alive and len(self._idle) < IDLE and not self.http.closed:
            self._idle.append(connection)
            return
        self._open.discard(connection)
        with contextlib.suppress(OSError):
            await connection.close()
