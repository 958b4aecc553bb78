"""The requests of one connection that are being served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from gateway import protocol
from gateway.admission import RETRY_AFTER, Admission, Reservation
from gateway.api.connection.client_socket import ClientSocket
from gateway.api.connection.family import Method
from gateway.api.connection.peer import Peer, close_code
from gateway.errors import Cancelled, GatewayError, RateLimited
from gateway.limits.budget import REQUEST, Share
from gateway.protocol import RequestId, ServerWire

log = logging.getLogger(__name__)


class _Running:
    """One request's task. It must not be cancelled before it has started: it would never answer."""

    __slots__ = ("started", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.started = False


class Requests:
    """Runs each request as a task that ends with one answer. The wire counts them and handles cancels."""

    def __init__(
        self, peer: Peer, socket: ClientSocket, wire: ServerWire, methods: Mapping[str, Method]
    ) -> None:
        self._peer = peer
        self._socket = socket
        self._wire = wire
        self._methods = methods
        # calls begin in order, while the answers that they may have fit into the limit of one connection
        self._most = peer.hub.settings.socket_bytes
        self._answers = Admission[None]("answers", each=self._most)
        self._running: dict[object, _Running] = {}  # by id; a request without an id by itself

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
        running = _Running()
        key = running if request.id is None else request.id
        self._running[key] = running
        running.task = self._peer.spawn(self._serve(request, key, running, lease))
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
        self, request: protocol.Request, key: object, running: _Running, lease: Reservation[Share]
    ) -> None:
        """Serve the request and answer it. `lease` counts its bytes, and then those of the answer."""
        with self._peer.hub.doors.inside(self._peer.tenant):
            await self._serve_inside(request, key, running, lease)

    async def _serve_inside(
        self, request: protocol.Request, key: object, running: _Running, lease: Reservation[Share]
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
                log.exception("%s of tenant %s failed", request.method, self._peer.tenant)
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
            log.warning("cannot record a cancellation for tenant %s: %s", self._peer.tenant, error.message)
