"""`files/watch` and `files/unwatch`: changes of files, sent as they happen."""

from __future__ import annotations

from collections.abc import Mapping

from gateway import protocol
from gateway.admission import Reservation
from gateway.api.connection.family import Answer, Family, Method
from gateway.api.connection.peer import Peer
from gateway.auth.tokens import Token
from gateway.errors import Forbidden, NotFound
from gateway.files.files import Watch


class WatchMethods(Family):
    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
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

    async def _watch(self, params: protocol.FilesWatch) -> Answer:
        self._peer.require("files:read")
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
        return Answer(answer, lambda: self._follow(number, watch))

    def _follow(self, number: int, watch: Watch) -> None:
        self._end_late()
        if number in self._watches:
            self._peer.spawn(self._forward(number, watch))

    async def _forward(self, number: int, watch: Watch) -> None:
        while told := await watch.next():
            if "ended" in told and number in self._watches:
                self._end(number)
            await self._peer.tell("files/changed", {"watch": number, **told})

    async def _unwatch(self, params: protocol.FilesUnwatch) -> Answer:
        if self._watches.get(params.watch, (None, None))[1] is None:
            raise NotFound(f"no watch {params.watch}")
        self._end(params.watch)
        return Answer({})
