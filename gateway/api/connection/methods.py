"""The methods of the wire, in families: all but `exec/…`, which `exec_methods` has."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from gateway import __version__, protocol
from gateway.admission import Reservation
from gateway.api.connection.client_session import ClientSession
from gateway.auth.tokens import Token
from gateway.errors import Forbidden, NotFound
from gateway.events import Filter, Subscription, positions
from gateway.files.files import Files, Watch
from gateway.protocol import maxima
from gateway.rootfs.messages import RESULT_MAX
from gateway.runtime import ARGUMENT_MAX
from gateway.tools.toolbox import HandedOver


@dataclass(frozen=True, slots=True)
class MethodAnswer:
    """A result, as a value or as JSON, and what to start once it has been sent."""

    value: Mapping[str, Any] | bytes
    then: Callable[[], None] | None = None


def _small(params: Any) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Method:
    """How a method is served. Each callable member takes the request's parameters.

    `most` returns how many bytes the answer may have, 0 for a small one. `fence` prevents a later request
    with the same id from doing what a cancelled one asked for. A refusal of a `decisive` method ends the
    connection.
    """

    answer: Callable[[Any], Awaitable[MethodAnswer]]
    most: Callable[[Any], int] = _small
    fence: Callable[[Any], Awaitable[None]] | None = None
    decisive: bool = False


class Family(ABC):
    """A family's methods, and what they have opened on one connection."""

    def __init__(self, client: ClientSession) -> None:
        self._client = client
        self._hub = client.hub
        self._tenant = client.tenant

    @property
    @abstractmethod
    def methods(self) -> Mapping[str, Method]:
        """The methods by their names on the wire."""

    def end_without(self, token: Token) -> list[str]:
        """End what `token` has no scope for; return notifications that tell the client."""
        return []

    def _end_late(self) -> None:
        """The same for something requested before a token with fewer scopes arrived, and opened only now."""
        assert self._client.token is not None
        self._client.tell_soon(self.end_without(self._client.token))

    def close(self, *, hold: bool) -> None:  # noqa: B027 - most families have nothing open
        """End what is open, since the connection has ended. With `hold` the client may be back soon."""


# --- initialize, ping, session/… -----------------------------------------------------------------------


class SessionMethods(Family):
    """`opening` are the families that keep things open and need a scope for that."""

    def __init__(self, client: ClientSession, wire: protocol.ServerWire, opening: Sequence[Family]) -> None:
        super().__init__(client)
        self._wire = wire
        self._opening = opening
        self._using = contextlib.ExitStack()  # keeps the tenant awake
        self._expecting = contextlib.ExitStack()  # keeps warm shells for it

    @property
    def methods(self) -> Mapping[str, Method]:
        return {
            "initialize": Method(self._initialize, decisive=True),
            "ping": Method(self._ping),
            "session/end": Method(self._end),
            "session/renew": Method(self._renew),
        }

    def close(self, *, hold: bool) -> None:
        self._expecting.close()
        self._using.close()

    async def _initialize(self, params: protocol.Initialize) -> MethodAnswer:
        hub, client, before = self._hub, self._client, self._client.token
        token = hub.verify(params.token) if params.token is not None or before is None else before
        client.go_by(token)  # it may end during a wait below
        if not token.covers(self._tenant):
            raise NotFound(f"no tenant {self._tenant}")
        client.become(token)  # before the waits too: no stranger takes its place
        if before is None:  # else the route has looked, before it accepted the socket
            try:
                await hub.runtime.tenants.get(self._tenant)
            except NotFound:
                hub.elsewhere(self._tenant)
                raise
        self._using.enter_context(hub.idle.using(self._tenant))
        await hub.idle.awake(self._tenant)
        client.session = hub.toolbox.sessions.open(
            self._tenant, params.session, params.read_before_write, lasting=True
        )
        self._expect_execs(token)
        self._wire.initialize()
        settings = hub.settings
        return MethodAnswer(
            {
                "server": {"name": "incus-gateway", "version": __version__},
                "protocol": protocol.VERSION,
                "tenant": self._tenant,
                "workspace": settings.workspace,
                "user": settings.workspace_user,
                "scopes": sorted(token.scopes),
                "expires": token.expires,
                **({} if hub.home is None else {"home": hub.home}),
                "limits": {
                    "maxFrame": maxima.FRAME_MAX,
                    "maxRequests": maxima.REQUESTS_MAX,
                    "maxExecs": settings.max_execs,
                    "execTail": settings.exec_tail,
                    "maxArgument": ARGUMENT_MAX,
                },
            }
        )

    def _expect_execs(self, token: Token) -> None:
        self._expecting.close()
        if token.allows("exec"):
            self._expecting.enter_context(self._hub.runtime.commands.expect(self._tenant))

    async def _ping(self, params: protocol.NoParams) -> MethodAnswer:
        return MethodAnswer({})

    async def _end(self, params: protocol.NoParams) -> MethodAnswer:
        assert self._client.session is not None
        await self._hub.toolbox.sessions.end(self._client.session)
        return MethodAnswer({})

    async def _renew(self, params: protocol.SessionRenew) -> MethodAnswer:
        """Continue with another token of the same subject; end what that one does not allow."""
        client, before = self._client, self._client.token
        assert before is not None
        token = self._hub.verify(params.token)
        if token.subject != before.subject:
            raise Forbidden("this token belongs to another subject; open a separate websocket with it")
        if not token.covers(self._tenant):
            raise Forbidden(
                "this token does not cover the tenant of this websocket; renew with one that does"
            )
        client.token = token
        client.go_by(token)
        if before.allows("exec") != token.allows("exec"):
            self._expect_execs(token)
        # at once; the answer is sent first all the same
        told = [text for family in self._opening for text in family.end_without(token)]
        return MethodAnswer(
            {"expires": token.expires, "scopes": sorted(token.scopes)}, lambda: client.tell_soon(told)
        )


# --- tools/… -------------------------------------------------------------------------------------------


class ToolMethods(Family):
    @property
    def methods(self) -> Mapping[str, Method]:
        return {
            "tools/list": Method(self._list),
            "tools/call": Method(self._call, most=self._most, fence=self._fence),
            "tools/cancel": Method(self._cancel),
        }

    async def _list(self, params: protocol.NoParams) -> MethodAnswer:
        return MethodAnswer({"tools": self._hub.toolbox.descriptions()})

    async def _call(self, params: protocol.ToolsCall) -> MethodAnswer:
        session = self._client.session
        assert session is not None
        token = self._client.require(self._hub.toolbox.scope(params.name))
        try:
            result = await self._hub.toolbox.call(
                self._tenant,
                session,
                params.name,
                params.arguments,
                by=token.subject,
                call_id=params.call_id,
                linger=None if params.linger_ms is None else params.linger_ms / 1000,
            )
        except HandedOver:  # send no answer: the socket is about to close, and clients then ask again
            await asyncio.get_running_loop().create_future()
            raise
        return MethodAnswer(result.encoded)

    def _most(self, params: protocol.ToolsCall) -> int:
        return RESULT_MAX if params.name in ("Read", "Grep", "Glob") else 0

    async def _fence(self, params: protocol.ToolsCall) -> None:
        if params.call_id is not None:
            await self._hub.toolbox.fence(self._tenant, params.call_id)

    async def _cancel(self, params: protocol.ToolsCancel) -> MethodAnswer:
        token = self._client.token
        assert token is not None
        if not any(map(token.allows, self._hub.toolbox.SCOPES)):
            self._client.require("files:read")
        await self._hub.toolbox.fence(self._tenant, params.call_id)
        return MethodAnswer({})


# --- files/… -------------------------------------------------------------------------------------------


_ENTRY: Final = 400  # bytes of one entry of `files/list`, on average


class FileMethods(Family):
    @property
    def methods(self) -> Mapping[str, Method]:
        settings = self._hub.settings
        most = {"files/read": settings.write_max * 4 // 3, "files/list": settings.list_max * _ENTRY}
        return {
            name: Method(partial(self._call, name), most=partial(_constant, most.get(name, 0)))
            for name in Files.SCOPES
        }

    async def _call(self, method: str, params: protocol.Params) -> MethodAnswer:
        token = self._client.require(Files.SCOPES[method])
        given = params.model_dump(by_alias=True)
        return MethodAnswer(await self._hub.files.call(self._tenant, method, given, by=token.subject))


def _constant(size: int, params: protocol.Params) -> int:
    return size


# --- turn/…, history/… ---------------------------------------------------------------------------------


class HistoryMethods(Family):
    @property
    def methods(self) -> Mapping[str, Method]:
        return {
            "turn/begin": Method(self._begin),
            "turn/end": Method(self._end),
            "history/list": Method(self._list),
            "history/diff": Method(self._diff, most=self._most),
            "history/restore": Method(self._restore),
            "history/undo": Method(self._undo),
        }

    async def _begin(self, params: protocol.TurnBegin) -> MethodAnswer:
        token, session = self._client.require("files:write"), self._client.session
        assert session is not None
        before = await self._hub.history.begin(
            self._tenant, session, params.title, params.agent, token.subject
        )
        return MethodAnswer({"before": None if before is None else before.on_wire()})

    async def _end(self, params: protocol.NoParams) -> MethodAnswer:
        token, session = self._client.require("files:write"), self._client.session
        assert session is not None
        turn = await self._hub.history.end(self._tenant, session, token.subject)
        return MethodAnswer({"turn": None if turn is None else turn.on_wire()})

    async def _list(self, params: protocol.HistoryList) -> MethodAnswer:
        self._client.require("files:read")
        return MethodAnswer(await self._hub.history.turns(self._tenant, params.limit, params.before))

    async def _diff(self, params: protocol.HistoryTurn) -> MethodAnswer:
        self._client.require("files:read")
        return MethodAnswer(await self._hub.history.changes(self._tenant, params.turn))

    def _most(self, params: protocol.HistoryTurn) -> int:
        return RESULT_MAX

    async def _restore(self, params: protocol.HistoryRestore) -> MethodAnswer:
        token = self._client.require("files:write")
        turn = await self._hub.history.restore(self._tenant, params.turn, params.to, token.subject)
        return MethodAnswer({"turn": None if turn is None else turn.on_wire()})

    async def _undo(self, params: protocol.HistoryUndo) -> MethodAnswer:
        token = self._client.require("files:write")
        return MethodAnswer(
            await self._hub.history.undo(self._tenant, params.turn, params.force, token.subject)
        )


# --- files/watch, files/unwatch ------------------------------------------------------------------------


class WatchMethods(Family):
    def __init__(self, client: ClientSession) -> None:
        super().__init__(client)
        self._watches: dict[int, tuple[Reservation[str], Watch | None]] = {}  # None while it is being started
        self._last = 0

    @property
    def methods(self) -> Mapping[str, Method]:
        return {"files/watch": Method(self._watch), "files/unwatch": Method(self._unwatch)}

    def end_without(self, token: Token) -> list[str]:
        if token.allows("files:read"):
            return []
        told = []
        for number in [number for number, (_, watch) in self._watches.items() if watch]:
            self._end(number)
            facts = {"watch": number, "changes": [], "overflow": True, "ended": Forbidden.code}
            told.append(protocol.notification("files/changed", facts))
        return told

    def close(self, *, hold: bool) -> None:
        for number in list(self._watches):
            self._end(number)

    def _end(self, number: int) -> None:
        slot, watch = self._watches.pop(number)
        slot.release()
        if watch is not None:
            self._hub.files.unwatch(watch)

    async def _watch(self, params: protocol.FilesWatch) -> MethodAnswer:
        self._client.require("files:read")
        slot = self._hub.limits.watches.reserve(self._tenant, part=self)
        self._last += 1
        number = self._last
        self._watches[number] = slot, None
        try:
            watch = await self._hub.files.watch(self._tenant, params.paths, params.ignore)
        except BaseException:
            self._watches.pop(number, None)
            slot.release()
            raise
        self._watches[number] = slot, watch
        answer = {"watch": number, "unwatched": watch.unwatched}
        return MethodAnswer(answer, lambda: self._follow(number, watch))

    def _follow(self, number: int, watch: Watch) -> None:
        self._end_late()
        if number in self._watches:
            self._client.spawn(self._forward(number, watch))

    async def _forward(self, number: int, watch: Watch) -> None:
        while told := await watch.next():
            if "ended" in told and number in self._watches:
                self._end(number)
            await self._client.tell("files/changed", {"watch": number, **told})

    async def _unwatch(self, params: protocol.FilesUnwatch) -> MethodAnswer:
        if self._watches.get(params.watch, (None, None))[1] is None:
            raise NotFound(f"no watch {params.watch}")
        self._end(params.watch)
        return MethodAnswer({})


# --- events/… ------------------------------------------------------------------------------------------


class EventMethods(Family):
    def __init__(self, client: ClientSession) -> None:
        super().__init__(client)
        self._subscriptions: dict[int, tuple[Subscription, Reservation[str]]] = {}
        self._last = 0

    @property
    def methods(self) -> Mapping[str, Method]:
        return {
            "events/subscribe": Method(self._subscribe),
            "events/unsubscribe": Method(self._unsubscribe),
        }

    def end_without(self, token: Token) -> list[str]:
        if token.allows("events"):
            return []
        told = []
        for number in list(self._subscriptions):
            self._end(number)
            facts = {"subscription": number, "reason": Forbidden.code}
            told.append(protocol.notification("events/ended", facts))
        return told

    def close(self, *, hold: bool) -> None:
        for number in list(self._subscriptions):
            self._end(number)

    def _end(self, number: int) -> None:
        subscription, slot = self._subscriptions.pop(number)
        subscription.close()
        slot.release()

    async def _subscribe(self, params: protocol.EventsSubscribe) -> MethodAnswer:
        token = self._client.require("events")
        slot = self._hub.limits.subscriptions.reserve(self._tenant, part=self)
        try:
            after = self._hub.resumed(self._tenant, params.last_event_id)
            only = frozenset({self._tenant})
            types = None if params.types is None else tuple(params.types)
            subscription = self._hub.bus.subscribe(Filter(only, only, None, types, since=token.issued), after)
        except BaseException:
            slot.release()
            raise
        self._last += 1
        number = self._last
        self._subscriptions[number] = subscription, slot
        last = subscription.last_id
        position = positions.of(last, self._hub.bus.member)
        answer = {"subscription": number, "lastEventId": last, "position": position}
        return MethodAnswer(answer, lambda: self._follow(subscription))

    def _follow(self, subscription: Subscription) -> None:
        self._client.spawn(self._forward(subscription))

    async def _forward(self, subscription: Subscription) -> None:
        async for event in subscription:
            await self._client.tell("event", event.encoded)

    async def _unsubscribe(self, params: protocol.EventsUnsubscribe) -> MethodAnswer:
        if params.subscription not in self._subscriptions:
            raise NotFound(f"no subscription {params.subscription}")
        self._end(params.subscription)
        return MethodAnswer({})
