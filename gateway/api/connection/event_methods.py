"""`events/…`: the tenant's events, sent as they are recorded."""

from __future__ import annotations

from collections.abc import Mapping

from gateway import protocol
from gateway.api.connection.family import Answer, Family, Method
from gateway.api.connection.peer import Peer
from gateway.auth.tokens import Token
from gateway.errors import Forbidden, NotFound, RateLimited
from gateway.events import Filter, Subscription, positions
from gateway.limits.budget import RETRY_AFTER


class EventMethods(Family):
    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
        self._subscriptions = peer.subscriptions
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
        for number, subscription in self._subscriptions.items():
            subscription.close()
            facts = {"subscription": number, "reason": Forbidden.code}
            told.append(protocol.notification("events/ended", facts))
        self._subscriptions.clear()
        return told

    def close(self, *, hold: bool) -> None:
        for subscription in self._subscriptions.values():
            subscription.close()

    async def _subscribe(self, params: protocol.EventsSubscribe) -> Answer:
        token = self._peer.require("events")
        if len(self._subscriptions) >= self._hub.settings.max_subscriptions:
            raise RateLimited(
                "this connection has too many event subscriptions; end some with events/unsubscribe"
            )
        # every event of any tenant wakes each of them
        most, of = self._hub.settings.max_tenant_subscriptions, self._tenant
        if sum(len(peer.subscriptions) for peer in self._hub.connections if peer.tenant == of) >= most:
            raise RateLimited(
                "this tenant has too many event subscriptions; end some with events/unsubscribe",
                limit=most,
                retry_after=RETRY_AFTER,
            )
        after = self._hub.resumed(self._tenant, params.last_event_id)
        only = frozenset({self._tenant})
        types = None if params.types is None else tuple(params.types)
        subscription = self._hub.bus.subscribe(Filter(only, only, None, types, since=token.issued), after)
        self._last += 1
        number = self._last
        self._subscriptions[number] = subscription
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
        subscription = self._subscriptions.pop(params.subscription, None)
        if subscription is None:
            raise NotFound(f"no subscription {params.subscription}")
        subscription.close()
        return Answer({})
