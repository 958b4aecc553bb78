"""One connection, from accept to close: joins its parts.

Each request is a task, answered when it is done. Each attachment of a command is a task that copies its
output to the socket at the socket's pace. All of these end with the socket; the commands live on for their
linger time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final, assert_never

from starlette.websockets import WebSocket, WebSocketDisconnect

from gateway import protocol
from gateway.api.connection.client_socket import Arrived, ClientSocket, Closed
from gateway.api.connection.event_methods import EventMethods
from gateway.api.connection.exec_methods import ExecMethods
from gateway.api.connection.file_methods import FileMethods
from gateway.api.connection.history_methods import HistoryMethods
from gateway.api.connection.peer import Hub, Peer
from gateway.api.connection.requests import Requests
from gateway.api.connection.session_methods import SessionMethods
from gateway.api.connection.tool_methods import ToolMethods
from gateway.api.connection.watch_methods import WatchMethods
from gateway.auth.tokens import Token
from gateway.bounds import aside
from gateway.errors import TooLarge
from gateway.protocol import CloseCode

log = logging.getLogger(__name__)

# after these codes a client may be back soon. The first two mean that the socket just vanished (RFC 6455
# §7.1.5), the third that its token has ended
_HELD: Final = frozenset({1005, 1006, CloseCode.UNAUTHORIZED})
_WEIGHING: Final = 30.0  # seconds to check the contents of a large message; the largest takes a moment


class Connection:
    """One client of one tenant. `run` serves it from accept to close."""

    def __init__(
        self, websocket: WebSocket, tenant: str, token: Token | None, hub: Hub, address: str
    ) -> None:
        """Until there is a `token`, the socket counts towards the client's `address`."""
        self._hub = hub
        share = hub.limits.bytes.tenant(tenant).within(hub.settings.socket_bytes)
        self._socket = ClientSocket(websocket, share, hub.settings)
        self._wire = protocol.ServerWire(hub.settings.max_requests)
        self._peer = peer = Peer(hub, tenant, token, address, self._socket)
        self._execs = ExecMethods(peer, self._wire)
        opening = (self._execs, EventMethods(peer), WatchMethods(peer))
        session = SessionMethods(peer, self._wire, opening)
        self._families = (*opening, session, ToolMethods(peer), FileMethods(peer), HistoryMethods(peer))
        methods = {name: method for family in self._families for name, method in family.methods.items()}
        self._requests = Requests(peer, self._socket, self._wire, methods)

    async def run(self) -> None:
        """Serve the socket until either end closes it. Raises `RateLimited` if there are too many sockets."""
        self._peer.take_place()
        try:
            await self._run()
        finally:
            self._peer.leave()
            self._socket.release()

    async def _run(self) -> None:
        peer, socket = self._peer, self._socket
        await socket.accept()
        began, code, reason = time.monotonic(), 1000, ""
        self._hub.connections.add(peer)
        if peer.token is not None:
            peer.go_by(peer.token)
        reading = asyncio.create_task(self._read(), name="websocket")
        peer.spawn(socket.watch_stalls())
        try:
            # the client ends the reader, we resolve `closing`
            waiting: list[asyncio.Future[Any]] = [reading, socket.closing]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            closed = socket.closing.result() if socket.closing.done() else reading.result()
            code, reason = closed.code, closed.reason
        except Exception:
            log.exception("websocket of %s failed", peer.tenant)
            code, reason = 1011, "internal error"
        finally:
            self._hub.connections.discard(peer)
            # concurrently, since a command that is waited for may take long to end
            ending = self._end([reading, *peer.tasks], hold=code in _HELD)
            await asyncio.gather(socket.say_goodbye(code, reason), ending)
            if peer.session is not None:
                await self._hub.toolbox.sessions.leave(peer.session)
                self._hub.history.leave(peer.tenant, peer.session)
            log.info("websocket of %s ended: %d, %d ms", peer.tenant, code, (time.monotonic() - began) * 1000)

    async def _end(self, tasks: list[asyncio.Task[Any]], *, hold: bool) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for family in self._families:
            family.close(hold=hold)

    async def _read(self) -> Closed:
        """Handle messages until the end; return how it ended."""
        until = asyncio.get_running_loop().time() + self._hub.settings.initialize_timeout
        try:
            while not self._wire.initialized:
                async with asyncio.timeout_at(until):
                    await self._receive()
                # messages after it need its outcome, for which Incus, or a tenant that wakes, may take longer
                await self._requests.settled()
            while True:
                await self._receive()
        except TimeoutError:
            return Closed(CloseCode.UNAUTHORIZED, "initialize did not arrive in time")
        except Closed as closed:
            return closed
        except WebSocketDisconnect as gone:
            return Closed(gone.code, "")

    async def _receive(self) -> None:
        arrived = await self._socket.receive(large=self._wire.initialized)
        try:
            await self._take(arrived)
        except BaseException:
            arrived.lease.release()
            raise

    async def _take(self, arrived: Arrived) -> None:
        """Act on a message; its lease ends with the work it began."""
        event = await self._understood(arrived)
        size, lease = arrived.size, arrived.lease
        if lease.size:
            lease.hold(size - lease.size)
        match event:
            case protocol.Request() if self._hub.doors.closed(self._peer.tenant):
                pass  # unanswered: the connection is about to be closed, and the call is made at the new home
            case protocol.Request():
                await self._requests.start(event, size, lease)
                return
            case protocol.Input(channel, data):
                await self._execs.write(channel, data)
            case protocol.CancelPending(id):
                self._requests.cancel(id)
            case protocol.Refused(reply):
                await self._socket.send(reply)
            case protocol.Close(code, reason, reply):
                if reply is not None:
                    await self._socket.send(reply)
                raise Closed(code, reason)
            case protocol.Ignored():
                pass
            case _:
                assert_never(event)
        lease.release()

    async def _understood(self, arrived: Arrived) -> protocol.ServerEvent:
        if arrived.data is not None:
            return self._wire.receive_binary(arrived.data)
        if len(arrived.text) > protocol.LIGHT:
            try:
                await aside(self._peer.tenant, _WEIGHING, protocol.weigh, arrived.text)
            except TooLarge as error:
                return self._wire.refuse_heavy(arrived.text, error)
        return self._wire.receive_text(arrived.text)
