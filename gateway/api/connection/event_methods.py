"""`events/…`: the tenant's events, sent as they are recorded."""

from __future__ import annotations

from collections.abc import Mapping

from gateway import protocol
from gateway.admission import Reservation
from gateway.api.connection.family import Answer, Family, Method
from gateway.api.connection.peer import Peer
from gateway.auth.tokens import Token
from gateway.errors import Forbidden, NotFound
from gateway.events import Filter, Subscription, positions


class EventMethods(Family):
    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
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

    async def _subscribe(self, params: protocol.EventsSubscribe) -> Answer:
        token = self._peer.require("events")
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
        return Answer(answer, lambda: self._follow(subscription))

    def _follow(self, subscription: Subscription) -> None:
        self._peer.spawn(self._forward(subscription))

    async def _forward(self, subscription: Subscription) -> None:
        async for event in subscription:
            await self._peer.tell("event", event.encoded)

    async def _unsubscribe(self, params: protocol.EventsUnsubscribe) -> Answer:
        if params.subscription not in self._subscriptions:
            raise NotFound(f"no subscription {params.subscription}")
        self._end(params.subscription)
        return Answer({})
