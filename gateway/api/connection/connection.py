"""One connection, from accept to close: joins its parts, and serves its requests.

Each request is a task, answered when it is done. Each attachment of a command is a task that copies its
output to the socket at the socket's pace. All of these end with the socket; the commands live on for their
linger time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, assert_never

from starlette.websockets import WebSocket, WebSocketDisconnect

from gateway import protocol
from gateway.admission import RETRY_AFTER, Admission, Reservation
from gateway.api.connection.client_session import (
    ClientSession,
    ClientSocket,
    Closed,
    Hub,
    IncomingMessage,
    close_code,
)
from gateway.api.connection.exec_methods import ExecMethods
from gateway.api.connection.methods import (
    EventMethods,
    FileMethods,
    HistoryMethods,
    Method,
    SessionMethods,
    ToolMethods,
    WatchMethods,
)
from gateway.auth.tokens import Token
from gateway.bounds import run_in_thread
from gateway.errors import Cancelled, GatewayError, RateLimited, TooLarge
from gateway.limits.budget import REQUEST, Share
from gateway.protocol import CloseCode, RequestId, ServerWire
from gateway.protocol.maxima import REQUESTS_MAX

log = logging.getLogger(__name__)

INITIALIZE_TIMEOUT: Final = 10.0  # seconds in which `initialize` must come: a stranger's socket holds a place
SOCKET_BYTES: Final = 32 << 20  # bytes in flight of one websocket: two of the largest messages


class _RunningRequest:
    """One request's task. It must not be cancelled before it has started: it would never answer."""

    __slots__ = ("started", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.started = False


class Requests:
    """Runs each request as a task that ends with one answer. The wire counts them and handles cancels."""

    def __init__(
        self, client: ClientSession, socket: ClientSocket, wire: ServerWire, methods: Mapping[str, Method]
    ) -> None:
        self._client = client
        self._socket = socket
        self._wire = wire
        self._methods = methods
        # calls begin in order, while the answers that they may have fit into the limit of one connection
        self._most = SOCKET_BYTES
        self._answers = Admission[None]("answers", each=self._most)
        self._running: dict[object, _RunningRequest] = {}  # by id; a request without an id by itself

    async def start(self, request: protocol.Request, size: int, lease: Reservation[Share]) -> None:
        """Start serving a request of `size` bytes. `lease` counts these and ends with the answer."""
        try:
            lease.grow(REQUEST if lease.size else REQUEST + size)
        except RateLimited as full:
            lease.release()
            self._wire.settle(request.id)
            if request.id is not None:
                await self._socket.send(protocol.failure(request.id, full))
            self._wire.sent(request.id)
            return
        running = _RunningRequest()
        key = running if request.id is None else request.id
        self._running[key] = running
        running.task = self._client.spawn(self._serve(request, key, running, lease))
        # also if it is cancelled before it begins, which it may be before Python 3.12
        running.task.add_done_callback(lambda _: lease.release())

    def cancel(self, request_id: RequestId) -> None:
        """End a pending request that the wire reports as cancelled."""
        running = self._running.get(request_id)
        if running is not None and running.started and running.task is not None:
            running.task.cancel()

    async def settled(self) -> None:
        """Wait until every request so far has its outcome."""
        await asyncio.gather(*[one.task for one in self._running.values() if one.task is not None])

    async def _serve(
        self, request: protocol.Request, key: object, running: _RunningRequest, lease: Reservation[Share]
    ) -> None:
        """Serve the request and answer it. `lease` counts its bytes, and then those of the answer."""
        with self._client.hub.doors.inside(self._client.tenant):
            await self._serve_inside(request, key, running, lease)

    async def _serve_inside(
        self, request: protocol.Request, key: object, running: _RunningRequest, lease: Reservation[Share]
    ) -> None:
        running.started = True
        request_id, method = request.id, self._methods[request.method]
        most = method.most(request.params)
        turn, then = None, None
        refused: GatewayError | None = None
        try:
            try:
                if self._wire.cancelled(request_id):
                    await self._fence(method, request.params)
                    raise Cancelled("the request was cancelled before it began")
                turn = await self._answers.acquire(None, min(most, self._most)) if most else None
                reply, then = await self._answer(request, method, most)
            except GatewayError as error:
                reply, refused = protocol.failure(request_id, error), error
            except asyncio.CancelledError:
                if not self._wire.cancelled(request_id):  # the connection is ending: nobody reads an answer
                    raise
                await self._fence(method, request.params)
                reply = protocol.failure(request_id, Cancelled("the request was cancelled"))
            except Exception:
                log.exception("%s of tenant %s failed", request.method, self._client.tenant)
                reply = protocol.error_reply(
                    request_id, -32603, "the gateway failed; its log says why", "unavailable"
                )
            finally:
                self._running.pop(key, None)
                self._wire.settle(request_id)
            del request  # sending the answer may take long
            lease.hold(REQUEST + protocol.size(reply) - lease.size)
            decided = refused if method.decisive else None
            if request_id is not None or decided is not None:
                await self._socket.send_answer(reply)
            self._wire.sent(request_id)
            if decided is not None:
                self._socket.close(close_code(decided), decided.message)
        finally:
            lease.release()
            if turn is not None:
                turn.release()
        if then is not None:
            then()

    async def _answer(
        self, request: protocol.Request, method: Method, most: int
    ) -> tuple[protocol.Message, Callable[[], None] | None]:
        answer = await method.answer(request.params)
        number, value = request.id or 0, answer.value
        reply: protocol.Message
        if isinstance(value, bytes):
            reply = protocol.encoded_result(number, value)
        else:
            reply = protocol.result(number, value)
        size = protocol.size(reply)
        share = self._socket.share
        if most and (full := (share.tenant or share).full(size)) is not None:
            raise RateLimited(
                f"{full.name} has no room for an answer of {size} bytes; read the answers that "
                "wait, then try again",
                limit=full.limit,
                retry_after=RETRY_AFTER,
            )
        return reply, answer.then

    async def _fence(self, method: Method, params: Any) -> None:
        if method.fence is None:
            return
        try:
            await method.fence(params)
        except GatewayError as error:
            log.warning("cannot record a cancellation for tenant %s: %s", self._client.tenant, error.message)


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
        share = hub.limits.bytes.tenant(tenant).within(SOCKET_BYTES)
        self._socket = ClientSocket(websocket, share)
        self._wire = protocol.ServerWire(REQUESTS_MAX)
        self._client = client = ClientSession(hub, tenant, token, address, self._socket)
        self._execs = ExecMethods(client, self._wire)
        opening = (self._execs, EventMethods(client), WatchMethods(client))
        session = SessionMethods(client, self._wire, opening)
        self._families = (*opening, session, ToolMethods(client), FileMethods(client), HistoryMethods(client))
        methods = {name: method for family in self._families for name, method in family.methods.items()}
        self._requests = Requests(client, self._socket, self._wire, methods)

    async def run(self) -> None:
        """Serve the socket until either end closes it. Raises `RateLimited` if there are too many sockets."""
        self._client.reserve_socket()
        try:
            await self._run()
        finally:
            self._client.leave()
            self._socket.release()

    async def _run(self) -> None:
        client, socket = self._client, self._socket
        await socket.accept()
        began, code, reason = time.monotonic(), 1000, ""
        self._hub.connections.add(client)
        if client.token is not None:
            client.go_by(client.token)
        reading = asyncio.create_task(self._read(), name="websocket")
        client.spawn(socket.watch_stalls())
        try:
            # the client ends the reader, we resolve `closing`
            waiting: list[asyncio.Future[Any]] = [reading, socket.closing]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            closed = socket.closing.result() if socket.closing.done() else reading.result()
            code, reason = closed.code, closed.reason
        except Exception:
            log.exception("websocket of %s failed", client.tenant)
            code, reason = 1011, "internal error"
        finally:
            self._hub.connections.discard(client)
            # concurrently, since a command that is waited for may take long to end
            ending = self._end([reading, *client.tasks], hold=code in _HELD)
            await asyncio.gather(socket.say_goodbye(code, reason), ending)
            if client.session is not None:
                await self._hub.toolbox.sessions.leave(client.session)
                self._hub.history.leave(client.tenant, client.session)
            log.info(
                "websocket of %s ended: %d, %d ms", client.tenant, code, (time.monotonic() - began) * 1000
            )

    async def _end(self, tasks: list[asyncio.Task[Any]], *, hold: bool) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for family in self._families:
            family.close(hold=hold)

    async def _read(self) -> Closed:
        """Handle messages until the end; return how it ended."""
        until = asyncio.get_running_loop().time() + INITIALIZE_TIMEOUT
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

    async def _take(self, arrived: IncomingMessage) -> None:
        """Act on a message; its lease ends with the work it began."""
        event = await self._understood(arrived)
        size, lease = arrived.size, arrived.lease
        if lease.size:
            lease.hold(size - lease.size)
        match event:
            case protocol.Request() if self._hub.doors.closed(self._client.tenant):
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

    async def _understood(self, arrived: IncomingMessage) -> protocol.ServerEvent:
        if arrived.data is not None:
            return self._wire.receive_binary(arrived.data)
        if len(arrived.text) > protocol.LIGHT:
            try:
                await run_in_thread(self._client.tenant, _WEIGHING, protocol.weigh, arrived.text)
            except TooLarge as error:
                return self._wire.refuse_heavy(arrived.text, error)
        return self._wire.receive_text(arrived.text)
