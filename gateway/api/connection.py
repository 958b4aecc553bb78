"""Knows one websocket: who it is, what it asked, which commands and events it follows.

Frames go through `protocol.ServerWire`; each request is a task, answered whenever it is done; each
attachment of a command is a task that copies its output to the socket at the socket's pace. When the
socket ends, all of them end, and the commands live on for their linger time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from gateway import __version__, protocol
from gateway.auth.grants import Grant, Grants
from gateway.auth.tokens import Token
from gateway.bounds import aside
from gateway.errors import (
    Cancelled,
    Conflict,
    Forbidden,
    GatewayError,
    InvalidParams,
    NotFound,
    RateLimited,
    Timeout,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from gateway.events import Bus, Filter, Subscription
from gateway.execs import Attachment, Cursor, Exec, Execs, Reading, started_at
from gateway.files.files import Files
from gateway.files.watches import Watch
from gateway.lifecycle.idle import Idle
from gateway.limits.budget import REQUEST, RETRY_AFTER, Budget, Lease, Places, Share, Turns
from gateway.protocol import CloseCode, RequestId, StreamId
from gateway.runtime import ExecSpec, Pty, StreamName, TenantRuntime
from gateway.settings import Settings
from gateway.tasks import begin
from gateway.tools.toolbox import Toolbox, ToolSession
from gateway.transport.websocket import COMING, FLOW, LARGE, PARTS, SIZE

log = logging.getLogger(__name__)

_STREAMS: Final[Mapping[StreamName, StreamId]] = {"stdout": StreamId.STDOUT, "stderr": StreamId.STDERR}

# after these a client may be back soon. The first two say that the socket went without a word (RFC 6455
# §7.1.5), the third that its token has ended
_HELD: Final = frozenset({1005, 1006, CloseCode.UNAUTHORIZED})

_ENTRY: Final = 400  # bytes of one entry of `files/list`, on the whole
_WEIGHING: Final = 30.0  # seconds until it is known what a large message holds; the largest takes a moment

CLOSE_CODES: Final[Mapping[type[GatewayError], int]] = {
    Unauthorized: CloseCode.UNAUTHORIZED,
    Forbidden: CloseCode.FORBIDDEN,
    NotFound: CloseCode.UNKNOWN_TENANT,
    RateLimited: CloseCode.TOO_MANY,
    Unavailable: CloseCode.TRY_LATER,
    Timeout: CloseCode.TRY_LATER,
}


@dataclass
class Hub:
    """What every connection shares. `verify` turns a raw token into a `Token` or raises `Unauthorized`."""

    runtime: TenantRuntime
    execs: Execs
    toolbox: Toolbox
    files: Files
    bus: Bus
    idle: Idle
    settings: Settings
    budget: Budget
    places: Places
    verify: Callable[[str | None], Token]
    grants: Grants
    connections: set[Connection] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A result, and what starts only after it was sent."""

    value: Mapping[str, Any] | bytes
    then: Callable[[], None] | None = None


@dataclass(slots=True)
class _Pending:
    """One request in flight."""

    task: asyncio.Task[None] | None = None
    started: bool = False
    cancelled: bool = False


class _Closed(Exception):
    """The connection is to be closed with this code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Connection:
    """One client of one tenant. `run` carries it from accept to close."""

    def __init__(
        self, websocket: WebSocket, tenant: str, token: Token | None, hub: Hub, address: str
    ) -> None:
        """`address` is whose the socket is, as long as no `token` says so."""
        self._socket = websocket
        self._address = address
        self._tenant = tenant
        self._token = token
        self._hub = hub
        self._wire = protocol.ServerWire()
        self._parts = PARTS in websocket.scope.get("extensions", {})
        self._flow: Mapping[str, Callable[[], Any]] = websocket.scope.get("extensions", {}).get(FLOW, {})
        self._share: Share = hub.budget.tenant(tenant).within(hub.settings.socket_bytes)
        self._turns = Turns(hub.settings.socket_bytes)
        self._arriving: deque[Lease] = deque()  # of large messages that are on their way
        self._leave: Callable[[], None] = lambda: None  # gives the socket's place back
        self._session: ToolSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending: dict[RequestId, _Pending] = {}
        self._unsent = 0  # answers that are being sent
        self._attachments: dict[int, Attachment] = {}
        # since when output of a channel, or a large answer, waits for the client
        self._sending: dict[int, float] = {}
        self._channels: dict[str, int] = {}
        self._subscriptions: dict[int, Subscription] = {}
        self._last_subscription = 0
        self._watches: dict[int, Watch | None] = {}
        self._last_watch = 0
        self._expecting = contextlib.ExitStack()
        self._expecting_execs = contextlib.ExitStack()
        self._grant: Grant | None = None
        self._closing: asyncio.Future[_Closed] = asyncio.get_running_loop().create_future()
        self._methods: dict[str, Callable[[Any], Awaitable[_Answer]]] = {
            "initialize": self._initialize,
            "ping": self._ping,
            "tools/list": self._tools_list,
            "tools/call": self._tools_call,
            "tools/cancel": self._tools_cancel,
            "session/end": self._session_end,
            "session/renew": self._session_renew,
            "exec/start": self._exec_start,
            "exec/attach": self._exec_attach,
            "exec/ack": self._exec_ack,
            "exec/detach": self._exec_detach,
            "exec/closeStdin": self._exec_close_stdin,
            "exec/resize": self._exec_resize,
            "exec/signal": self._exec_signal,
            "exec/cancel": self._exec_cancel,
            "exec/list": self._exec_list,
            "exec/wait": self._exec_wait,
            **{method: partial(self._files, method) for method in Files.SCOPES},
            "files/watch": self._files_watch,
            "files/unwatch": self._files_unwatch,
            "events/subscribe": self._events_subscribe,
            "events/unsubscribe": self._events_unsubscribe,
        }

    async def run(self) -> None:
        """Serve the socket until either end closes it. Raises `RateLimited` where it has no place."""
        if self._token is not None:
            self._leave = self._hub.places.customer(self._tenant)
        else:
            self._leave = self._hub.places.stranger(self._address, self._displaced)
        try:
            await self._run()
        finally:
            self._leave()
            for lease in self._arriving:
                lease.end()

    def _displaced(self) -> None:
        self.close(CloseCode.TOO_MANY, "too many connections without a token; say initialize sooner")

    async def _run(self) -> None:
        offered = self._socket.scope.get("subprotocols") or []
        chosen = protocol.SUBPROTOCOL if protocol.SUBPROTOCOL in offered else None
        await self._socket.accept(subprotocol=chosen)
        began, code, reason = time.monotonic(), 1000, ""
        self._hub.connections.add(self)
        if self._token is not None:
            self._go_by(self._token)
        reading = asyncio.create_task(self._read(), name="websocket")
        self._spawn(self._watch_stalls())
        try:
            # the reader ends by the client's will, `_closing` by ours
            waiting: list[asyncio.Future[Any]] = [reading, self._closing]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            closed = self._closing.result() if self._closing.done() else reading.result()
            code, reason = closed.code, closed.reason
        except Exception:
            log.exception("websocket of %s failed", self._tenant)
            code, reason = 1011, "internal error"
        finally:
            self._hub.connections.discard(self)
            if self._grant is not None:
                self._grant.close()
            # at the same time: a command that is waited for may take its time to end
            ending = self._end([reading, *self._tasks], hold=code in _HELD)
            await asyncio.gather(self._say_goodbye(code, reason), ending)
            if self._session is not None:
                await self._hub.toolbox.sessions.leave(self._session)
            log.info(
                "websocket of %s ended: %d, %d ms", self._tenant, code, (time.monotonic() - began) * 1000
            )

    @property
    def token(self) -> Token | None:
        """Who is connected; None until `initialize` said so."""
        return self._token

    def announce_draining(self, retry_after_ms: int) -> None:
        """Tell the client that the gateway is about to end."""
        text = protocol.notification("server/draining", {"retryAfterMs": retry_after_ms})
        self._spawn(self._send(text))

    def close(self, code: int, reason: str) -> None:
        """End the connection with this code, soon. The first reason counts."""
        if not self._closing.done():
            self._closing.set_result(_Closed(code, reason))

    # --- the socket ---------------------------------------------------------------------------------

    async def _read(self) -> _Closed:
        """Take frames until the end; return how it ended."""
        try:
            async with asyncio.timeout(self._hub.settings.initialize_timeout):
                while not self._wire.initialized:
                    await self._receive()
                    await self._settle_initialize()
            while True:
                await self._receive()
        except TimeoutError:
            return _Closed(CloseCode.UNAUTHORIZED, "initialize did not come in time")
        except _Closed as closed:
            return closed
        except WebSocketDisconnect as gone:
            return _Closed(gone.code, "")

    async def _settle_initialize(self) -> None:
        """Wait for a pending `initialize`: what follows it needs its outcome."""
        tasks = [pending.task for pending in self._pending.values() if pending.task is not None]
        await asyncio.gather(*tasks)

    async def _receive(self) -> None:
        message = await (self._rest() if self._arriving else self._socket.receive())
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        if COMING in message:
            await self._admit(message[COMING])
            return
        size = message.get(SIZE, 0)
        lease = self._arriving.popleft() if size > LARGE and self._arriving else Lease(self._share)
        try:
            await self._take(message, size, lease)
        except BaseException:
            lease.end()
            raise

    async def _admit(self, size: int) -> None:
        """Let a large message come once there is room for it; nothing more is read until then."""
        if not self._wire.initialized:
            raise _Closed(CloseCode.FRAME_TOO_LARGE, f"before initialize a message has at most {LARGE} bytes")
        self._arriving.append(await self._share.wait(size))
        self._flow["admit"]()

    async def _rest(self) -> Message:
        """Return the next message, the rest of which must keep coming."""
        patience = self._hub.settings.body_timeout
        while True:
            received = self._flow["received"]()
            try:
                async with asyncio.timeout(patience):
                    return await self._socket.receive()
            except TimeoutError:
                if self._flow["received"]() == received:
                    raise _Closed(
                        CloseCode.TOO_MANY, f"nothing came of a message for {patience:.0f} s"
                    ) from None

    async def _take(self, message: Message, size: int, lease: Lease) -> None:
        """Do what a message says; `lease` is of its bytes, and ended with what it began."""
        data = message.get("bytes")
        event = await self._understood(message["text"]) if data is None else self._wire.receive_binary(data)
        lease.hold(size - lease.size if lease.size else 0)
        match event:
            case protocol.Request():
                await self._start(event, size, lease)
                return
            case protocol.Input(channel, data):
                await self._attachments[channel].write(data)
            case protocol.CancelPending(id):
                self._cancel_pending(id)
            case protocol.Refused(reply):
                await self._send(reply)
            case protocol.Close(code, reason, reply):
                if reply is not None:
                    await self._send(reply)
                raise _Closed(code, reason)
            case protocol.Ignored():
                pass
        lease.end()

    async def _understood(self, text: str) -> protocol.ServerEvent:
        if len(text) > protocol.LIGHT:
            try:
                await aside(self._tenant, _WEIGHING, protocol.weigh, text)
            except TooLarge as error:
                return self._wire.refuse_heavy(text, error)
        return self._wire.receive_text(text)

    async def _send(self, text: str) -> None:
        """Send one frame at the client's pace; a client that is gone ends the connection elsewhere."""
        await self._send_message({"type": "websocket.send", "text": text})

    async def _send_bytes(self, *parts: bytes) -> None:
        """Send one binary frame made of `parts`."""
        whole = {"parts": parts} if self._parts else {"bytes": b"".join(parts)}
        await self._send_message({"type": "websocket.send", **whole})

    async def _send_message(self, message: Message) -> None:
        try:
            await self._socket.send(message)
        except (WebSocketDisconnect, RuntimeError):
            # starlette raises RuntimeError for a send after the close was seen
            self.close(1006, "")

    async def _say_goodbye(self, code: int, reason: str) -> None:
        if code in (1005, 1006):
            return
        try:
            async with asyncio.timeout(2):
                await self._socket.close(code=code, reason=reason[:100])
        except (RuntimeError, WebSocketDisconnect, TimeoutError):
            pass  # it is gone already

    async def _end(self, tasks: list[asyncio.Task[Any]], *, hold: bool) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for attachment in list(self._attachments.values()):
            if hold and attachment.acking:
                attachment.hold(self._hub.settings.exec_hold)
            else:
                attachment.close()
        for subscription in self._subscriptions.values():
            subscription.close()
        for watch in self._watches.values():
            if watch is not None:
                self._hub.files.unwatch(watch)
        self._expecting_execs.close()
        self._expecting.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = begin(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of a websocket of %s failed", self._tenant, exc_info=error)
            self.close(1011, "internal error")

    # --- requests -----------------------------------------------------------------------------------

    async def _start(self, request: protocol.Request, size: int, lease: Lease) -> None:
        error: GatewayError | None = None
        limit = self._hub.settings.max_requests
        if request.id is not None and request.id in self._pending:
            error = InvalidParams(f"request {request.id} is still pending")
        elif len(self._pending) + self._unsent >= limit:
            error = RateLimited("too many requests in flight", limit=limit, retry_after=RETRY_AFTER)
        else:
            try:
                lease.grow(REQUEST if lease.size else REQUEST + size)
            except RateLimited as full:
                error = full
        if error is not None:
            lease.end()
            if request.id is not None:
                await self._send(protocol.failure(request.id, error))
            return
        pending = _Pending()
        key: RequestId = request.id if request.id is not None else f"\0{id(pending)}"
        self._pending[key] = pending
        pending.task = self._spawn(self._answer(request, key, pending, lease))

    def _cancel_pending(self, request_id: RequestId) -> None:
        pending = self._pending.get(request_id)
        if pending is None or pending.cancelled or pending.task is None:
            return
        pending.cancelled = True
        if pending.started:  # a task that has not begun would never answer: it looks at the flag itself
            pending.task.cancel()

    async def _answer(
        self, request: protocol.Request, key: RequestId, pending: _Pending, lease: Lease
    ) -> None:
        """Do what is asked and answer it. `lease` is of what it brought, and then of the answer."""
        pending.started = True
        wanted, method, most = request.id, request.method, self._most(request)
        turn, then = 0, None
        try:
            try:
                if pending.cancelled:
                    await self._fence(request)
                    raise Cancelled("the request was cancelled before it began")
                turn = await self._turns.enter(most) if most else 0
                answer = await self._methods[method](request.params)
                reply, then = protocol.result(wanted or 0, answer.value), answer.then
                del answer
                if most and (full := self._share.above.full(len(reply))) is not None:
                    raise RateLimited(
                        f"{full.name} has no room for an answer of {len(reply)} bytes; take those that wait, "
                        "then ask again",
                        limit=full.limit,
                        retry_after=RETRY_AFTER,
                    )
            except GatewayError as error:
                reply = protocol.failure(wanted, error)
                if method == "initialize":
                    code = CLOSE_CODES.get(type(error), 1011)
                    await self._send(reply)
                    self.close(code, error.message)
                    return
            except asyncio.CancelledError:
                if not pending.cancelled:  # the connection ends: nobody reads an answer
                    raise
                await self._fence(request)
                reply = protocol.failure(wanted, Cancelled("the request was cancelled"))
            except Exception:
                log.exception("%s of tenant %s failed", method, self._tenant)
                reply = protocol.error_reply(
                    wanted, -32603, "the gateway failed; its log says why", "unavailable"
                )
            finally:
                self._pending.pop(key, None)
            del request  # the answer may take long to go out
            lease.hold(REQUEST + len(reply) - lease.size)
            if wanted is not None:
                self._unsent += 1
                if len(reply) > LARGE:
                    # a slow client takes 16 KiB a second
                    self._sending[-id(pending)] = asyncio.get_running_loop().time() + len(reply) / (16 << 10)
                await self._send(reply)
                self._sending.pop(-id(pending), None)
                self._unsent -= 1
        finally:
            lease.end()
            self._turns.leave(turn)
        if then is not None:
            then()

    def _most(self, request: protocol.Request) -> int:
        """Return how many bytes a call may answer that reads; of others the answer is small."""
        settings = self._hub.settings
        match request.params:
            case protocol.ToolsCall(name="Read" | "Grep" | "Glob"):
                return settings.result_max
        match request.method:
            case "files/read":
                return settings.write_max * 4 // 3
            case "files/list":
                return settings.list_max * _ENTRY
            case _:
                return 0

    async def _fence(self, request: protocol.Request) -> None:
        """See to it that what a cancelled request asked for is not made by another of its id."""
        try:
            match request.params:
                case protocol.ToolsCall(call_id=str(call_id)):
                    await self._hub.toolbox.fence(self._tenant, call_id)
                case protocol.ExecStart(exec_id=str(exec_id)):
                    await self._hub.execs.fence(self._tenant, exec_id)
        except GatewayError as error:
            log.warning("a cancel of tenant %s could not be noted: %s", self._tenant, error.message)

    async def _initialize(self, params: protocol.Initialize) -> _Answer:
        hub = self._hub
        token = hub.verify(params.token) if params.token is not None or self._token is None else self._token
        self._go_by(token)  # it may end while something is waited for
        if not token.covers(self._tenant):
            raise NotFound(f"no tenant {self._tenant}")
        await hub.runtime.get(self._tenant)
        self._expecting.enter_context(hub.idle.using(self._tenant))
        await hub.idle.awake(self._tenant)
        if self._token is None:
            place = hub.places.customer(self._tenant)
            self._leave()
            self._leave = place
        self._token = token
        self._session = hub.toolbox.sessions.open(
            self._tenant, params.session, params.read_before_write, lasting=True
        )
        self._expect_execs(token)
        self._wire.initialized = True
        settings = hub.settings
        return _Answer(
            {
                "server": {"name": "incus-gateway", "version": __version__},
                "protocol": protocol.VERSION,
                "tenant": self._tenant,
                "workspace": settings.workspace,
                "user": settings.workspace_user,
                "scopes": sorted(token.scopes),
                "expires": token.expires,
                "limits": {
                    "maxFrame": settings.max_frame,
                    "maxRequests": settings.max_requests,
                    "maxExecs": settings.max_execs,
                    "execTail": settings.exec_tail,
                    "maxArgument": settings.max_argument,
                },
            }
        )

    def _go_by(self, token: Token) -> None:
        """Have the socket closed when this token ends, and not when the one before does."""
        if self._grant is None:
            self._grant = self._hub.grants.hold(token, partial(self.close, CloseCode.UNAUTHORIZED))
        else:
            self._grant.renew(token)

    def _expect_execs(self, token: Token) -> None:
        self._expecting_execs.close()
        if token.allows("exec"):
            self._expecting_execs.enter_context(self._hub.runtime.expect(self._tenant))

    async def _ping(self, params: protocol.NoParams) -> _Answer:
        return _Answer({})

    def _require(self, scope: str) -> Token:
        assert self._token is not None  # initialize came first: the wire sees to it
        self._token.require(scope)
        return self._token

    # --- tools --------------------------------------------------------------------------------------

    async def _tools_list(self, params: protocol.NoParams) -> _Answer:
        return _Answer({"tools": self._hub.toolbox.descriptions()})

    async def _tools_call(self, params: protocol.ToolsCall) -> _Answer:
        assert self._session is not None
        token = self._require(self._hub.toolbox.scope(params.name))
        result = await self._hub.toolbox.call(
            self._tenant,
            self._session,
            params.name,
            params.arguments,
            by=token.subject,
            call_id=params.call_id,
            linger=None if params.linger_ms is None else params.linger_ms / 1000,
        )
        return _Answer(result.encoded)

    async def _tools_cancel(self, params: protocol.ToolsCancel) -> _Answer:
        assert self._token is not None
        if not any(map(self._token.allows, self._hub.toolbox.SCOPES)):
            self._require("files:read")
        await self._hub.toolbox.fence(self._tenant, params.call_id)
        return _Answer({})

    async def _session_end(self, params: protocol.NoParams) -> _Answer:
        assert self._session is not None
        await self._hub.toolbox.sessions.end(self._session)
        return _Answer({})

    async def _session_renew(self, params: protocol.SessionRenew) -> _Answer:
        """Go on by another token of the same subject; what that one does not allow ends."""
        assert self._token is not None
        token = self._hub.verify(params.token)
        if token.subject != self._token.subject:
            raise Forbidden("this token is another subject's; open a websocket of its own with it")
        if not token.covers(self._tenant):
            raise Forbidden(
                "this token does not cover the tenant of this websocket; renew with one that does"
            )
        before, self._token = self._token, token
        self._go_by(token)
        if before.allows("exec") != token.allows("exec"):
            self._expect_execs(token)
        told = self._end_what_lacks(token)  # at once; the answer comes first all the same
        return _Answer(
            {"expires": token.expires, "scopes": sorted(token.scopes)}, lambda: self._send_soon(told)
        )

    def _end_what_lacks(self, token: Token) -> list[str]:
        """End what the token has no scope for; return what the client is to be told of it."""
        told = []
        if not token.allows("exec"):
            for channel, attachment in list(self._attachments.items()):
                self._detach(channel)
                facts = {"exec": attachment.exec.id, "channel": channel, "reason": Forbidden.code}
                told.append(protocol.notification("exec/detached", facts))
        if not token.allows("events"):
            for number, subscription in self._subscriptions.items():
                subscription.close()
                facts = {"subscription": number, "reason": Forbidden.code}
                told.append(protocol.notification("events/ended", facts))
            self._subscriptions.clear()
        if not token.allows("files:read"):
            for number, watch in [(number, watch) for number, watch in self._watches.items() if watch]:
                self._hub.files.unwatch(watch)
                del self._watches[number]
                facts = {"watch": number, "changes": [], "overflow": True, "ended": Forbidden.code}
                told.append(protocol.notification("files/changed", facts))
        return told

    def _end_what_came_late(self) -> None:
        """Do so with what was asked for before a token with fewer scopes came, and is there only now."""
        assert self._token is not None
        self._send_soon(self._end_what_lacks(self._token))

    def _send_soon(self, texts: Sequence[str]) -> None:
        if texts:
            self._spawn(self._send_all(texts))

    async def _send_all(self, texts: Sequence[str]) -> None:
        for text in texts:
            await self._send(text)

    # --- commands -----------------------------------------------------------------------------------

    async def _exec_start(self, params: protocol.ExecStart) -> _Answer:
        token = self._require("exec")
        exec_ = await self._hub.execs.start(
            self._tenant,
            spec_of(
                params.argv, params.command, params.cwd, params.env, params.user, params.pty, params.stdin
            ),
            exec_id=params.exec_id,
            once=params.exec_id is not None,
            timeout=None if params.timeout_ms is None else params.timeout_ms / 1000,
            linger=None if params.linger_ms is None else max(-1.0, params.linger_ms / 1000),
            by=token.subject,
        )
        channel, attachment = self._attach(exec_, {}, params)
        answer = {
            "exec": exec_.id,
            "channel": channel,
            "pid": exec_.process.pid,
            "startedAt": started_at(exec_.process),
            "attachment": attachment.id,
            "stdinWindow": exec_.stdin_window,
        }
        return _Answer(answer, lambda: self._follow(channel, attachment))

    async def _exec_attach(self, params: protocol.ExecAttach) -> _Answer:
        exec_ = self._exec(params.exec)
        offsets = {"stdout": params.from_.stdout, "stderr": params.from_.stderr}
        channel, attachment = self._attach(exec_, offsets, params, params.resume)
        if attachment.lost["stdout"]:
            exec_.redraw()
        begin = {name: cursor.offset for name, cursor in attachment.cursors.items()}
        answer = {
            "channel": channel,
            "from": {"stdout": 0, "stderr": 0, **begin},
            "lost": attachment.lost,
            "state": exec_.state,
            "attachment": attachment.id,
            "stdin": attachment.taken,
            "stdinWindow": exec_.stdin_window,
        }
        return _Answer(answer, lambda: self._follow(channel, attachment))

    async def _exec_ack(self, params: protocol.ExecAck) -> _Answer:
        attachment = self._attachments.get(self._channels.get(self._exec(params.exec).id, 0))
        if attachment is not None:
            for name, cursor in attachment.cursors.items():
                cursor.ack(getattr(params, name))
        return _Answer({})

    async def _exec_detach(self, params: protocol.ExecRef) -> _Answer:
        channel = self._channels.get(self._exec(params.exec).id)
        if channel is not None:
            self._detach(channel)
        return _Answer({})

    async def _exec_close_stdin(self, params: protocol.ExecRef) -> _Answer:
        self._exec(params.exec).close_stdin()
        return _Answer({})

    async def _exec_resize(self, params: protocol.ExecResize) -> _Answer:
        exec_ = self._exec(params.exec)
        if exec_.spec.pty is None:
            raise Conflict(f"exec {exec_.id} has no terminal", exec=exec_.id)
        await exec_.resize(params.cols, params.rows)
        return _Answer({})

    async def _exec_signal(self, params: protocol.ExecSignal) -> _Answer:
        await self._exec(params.exec).process.signal(params.signal)
        return _Answer({})

    async def _exec_cancel(self, params: protocol.ExecCancel) -> _Answer:
        grace = None if params.grace_ms is None else params.grace_ms / 1000
        try:
            exec_ = self._exec(params.exec)
        except NotFound:
            if len(params.exec) > protocol.MAX_EXEC_ID:
                raise
            starting = await self._hub.execs.fence(self._tenant, params.exec)  # it may still be on the way
            if starting is None:
                raise
            exec_ = starting
        killed = await self._hub.execs.cancel(exec_, grace)
        answer = {"killed": killed.killed, "escalated": killed.escalated, "survivors": killed.survivors}
        return _Answer({**answer, "method": killed.method})

    async def _exec_list(self, params: protocol.NoParams) -> _Answer:
        self._require("exec")
        return _Answer({"execs": [await exec_.describe() for exec_ in self._hub.execs.list(self._tenant)]})

    async def _exec_wait(self, params: protocol.ExecRef) -> _Answer:
        exec_ = self._exec(params.exec)
        ended = await asyncio.shield(exec_.ended)
        return _Answer(ended.on_wire(exec_.id))

    def _exec(self, exec_id: str) -> Exec:
        self._require("exec")
        return self._hub.execs.get(self._tenant, exec_id)

    def _attach(
        self,
        exec_: Exec,
        offsets: Mapping[str, int],
        wanted: protocol.Reader,
        resume: str | None = None,
    ) -> tuple[int, Attachment]:
        """Attach anew; the connection's earlier attachment of the same command ends."""
        # more than can be had again after a break is not sent ahead
        unacked = self._hub.settings.exec_unacked
        window = None if wanted.window is None else max(1, min(wanted.window, unacked))
        acks = unacked > 0 and (wanted.acks or window is not None)
        reading = Reading(viewer=True, acks=acks, window=window, text=wanted.encoding == "utf-8")
        # before the old one ends, so that nothing falls between
        attachment = exec_.attach(offsets, resume=resume, reading=reading)
        old = self._channels.get(exec_.id)
        if old is not None:
            self._detach(old)
        channel = self._wire.open_channel()
        self._attachments[channel] = attachment
        self._channels[exec_.id] = channel
        return channel, attachment

    def _follow(self, channel: int, attachment: Attachment) -> None:
        self._end_what_came_late()
        if channel in self._attachments:  # not detached meanwhile
            self._spawn(self._forward(channel, attachment))
            if attachment.exec.spec.stdin:
                self._spawn(self._tell_consumed(channel, attachment))

    async def _tell_consumed(self, channel: int, attachment: Attachment) -> None:
        """Let the client send more input as the command takes it."""
        while (consumed := await attachment.more_consumed()) is not None:
            told = {"exec": attachment.exec.id, "channel": channel, "consumed": consumed}
            await self._send(protocol.notification("exec/stdin", told))

    def _detach(self, channel: int) -> None:
        attachment = self._attachments.pop(channel, None)
        if attachment is not None:
            attachment.close()
            self._wire.close_channel(channel)
            if self._channels.get(attachment.exec.id) == channel:
                del self._channels[attachment.exec.id]

    async def _forward(self, channel: int, attachment: Attachment) -> None:
        """Copy a command's output to the socket, then tell its exit: after its last byte."""
        exec_ = attachment.exec
        async with asyncio.TaskGroup() as group:
            for name, cursor in attachment.cursors.items():
                group.create_task(self._copy(channel, name, attachment, cursor))
        ended = await asyncio.shield(exec_.ended)
        if channel in self._attachments:
            self._detach(channel)
            await self._send(protocol.notification("exec/exited", ended.on_wire(exec_.id)))

    async def _copy(self, channel: int, name: StreamName, attachment: Attachment, cursor: Cursor) -> None:
        header = protocol.frame_header(_STREAMS[name], channel)
        while (parts := await cursor.next()) and channel in self._attachments:
            if cursor.lost:
                told = {"exec": attachment.exec.id, "channel": channel, "stream": name, "bytes": cursor.lost}
                cursor.lost = 0
                await self._send(protocol.notification("exec/lost", told))
            self._sending.setdefault(channel, asyncio.get_running_loop().time())
            await self._send_bytes(header, *parts)
            self._sending.pop(channel, None)
            if self._closing.done():
                return  # it may not have gone out
            cursor.taken(parts)

    async def _watch_stalls(self) -> None:
        """End the connection where a send of output has not returned for too long."""
        stall, loop = self._hub.settings.exec_stall, asyncio.get_running_loop()
        while True:
            await asyncio.sleep(stall / 4)
            if any(loop.time() - since > stall for since in self._sending.values()):
                # nothing can be said to a socket that takes nothing; the client resumes from its offset
                self.close(CloseCode.TOO_MANY, f"no output taken for {stall:.0f} s")

    # --- files --------------------------------------------------------------------------------------

    async def _files(self, method: str, params: protocol.Params) -> _Answer:
        token = self._require(Files.SCOPES[method])
        given = params.model_dump(by_alias=True)
        return _Answer(await self._hub.files.call(self._tenant, method, given, by=token.subject))

    async def _files_watch(self, params: protocol.FilesWatch) -> _Answer:
        self._require("files:read")
        limit = self._hub.settings.max_watches
        if len(self._watches) >= limit:
            raise RateLimited("too many file watches on this connection", limit=limit)
        self._last_watch += 1
        number = self._last_watch
        self._watches[number] = None  # counts while it begins
        try:
            watch = await self._hub.files.watch(self._tenant, params.paths, params.ignore)
        except BaseException:
            del self._watches[number]
            raise
        self._watches[number] = watch
        answer = {"watch": number, "unwatched": watch.unwatched}
        return _Answer(answer, lambda: self._see(number, watch))

    def _see(self, number: int, watch: Watch) -> None:
        self._end_what_came_late()
        if number in self._watches:
            self._spawn(self._show(number, watch))

    async def _show(self, number: int, watch: Watch) -> None:
        while told := await watch.next():
            if "ended" in told:
                self._watches.pop(number, None)
            await self._send(protocol.notification("files/changed", {"watch": number, **told}))

    async def _files_unwatch(self, params: protocol.FilesUnwatch) -> _Answer:
        watch = self._watches.get(params.watch)
        if watch is None:
            raise NotFound(f"no watch {params.watch}")
        del self._watches[params.watch]
        self._hub.files.unwatch(watch)
        return _Answer({})

    # --- events -------------------------------------------------------------------------------------

    async def _events_subscribe(self, params: protocol.EventsSubscribe) -> _Answer:
        token = self._require("events")
        if len(self._subscriptions) >= self._hub.settings.max_subscriptions:
            raise RateLimited("too many subscriptions on this connection")
        # each is woken by whatever happens to anybody
        most, of = self._hub.settings.max_tenant_subscriptions, self._tenant
        if sum(len(one._subscriptions) for one in self._hub.connections if one._tenant == of) >= most:
            raise RateLimited(
                "too many event subscriptions of this tenant; end some by events/unsubscribe",
                limit=most,
                retry_after=RETRY_AFTER,
            )
        only = frozenset({self._tenant})
        types = None if params.types is None else tuple(params.types)
        subscription = self._hub.bus.subscribe(
            Filter(only, only, None, types, since=token.issued), params.last_event_id
        )
        self._last_subscription += 1
        number = self._last_subscription
        self._subscriptions[number] = subscription
        answer = {"subscription": number, "lastEventId": subscription.last_id}
        return _Answer(answer, lambda: self._listen(subscription))

    def _listen(self, subscription: Subscription) -> None:
        self._spawn(self._tell(subscription))

    async def _tell(self, subscription: Subscription) -> None:
        async for event in subscription:
            await self._send(protocol.notification("event", event.encoded))

    async def _events_unsubscribe(self, params: protocol.EventsUnsubscribe) -> _Answer:
        subscription = self._subscriptions.pop(params.subscription, None)
        if subscription is None:
            raise NotFound(f"no subscription {params.subscription}")
        subscription.close()
        return _Answer({})


def spec_of(
    argv: list[str] | None,
    command: str | None,
    cwd: str | None,
    env: Mapping[str, str],
    user: str | int | None,
    pty: protocol.PtySize | None,
    stdin: bool,
) -> ExecSpec:
    """Return the command that a request describes; a `command` line is run by bash."""
    if argv is not None and not argv[0]:
        raise InvalidParams("argv: the program's name is empty", field="argv")
    words = tuple(argv) if argv is not None else ("/bin/bash", "-c", command or "")
    size = None if pty is None else Pty(pty.cols, pty.rows)
    return ExecSpec(words, cwd=cwd, env=dict(env), user=user, pty=size, stdin=stdin or pty is not None)
