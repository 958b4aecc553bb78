"""`files/watch` and `files/unwatch`: changes of files, sent as they happen."""

from __future__ import annotations

from collections.abc import Mapping

from gateway import protocol
from gateway.api.connection.family import Answer, Family, Method
from gateway.api.connection.peer import Peer
from gateway.auth.tokens import Token
from gateway.errors import Forbidden, NotFound, RateLimited
from gateway.files.watches import Watch


class WatchMethods(Family):
    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
        self._watches: dict[int, Watch | None] = {}
        self._last = 0

    @property
    def methods(self) -> Mapping[str, Method]:
        return {"files/watch": Method(self._watch), "files/unwatch": Method(self._unwatch)}

    def end_without(self, token: Token) -> list[str]:
        if token.allows("files:read"):
            return []
        told = []
        for number, watch in [(number, watch) for number, watch in self._watches.items() if watch]:
            self._hub.files.unwatch(watch)
            del self._watches[number]
            facts = {"watch": number, "changes": [], "overflow": True, "ended": Forbidden.code}
            told.append(protocol.notification("files/changed", facts))
        return told

    def close(self, *, hold: bool) -> None:
        for watch in self._watches.values():
            if watch is not None:
                self._hub.files.unwatch(watch)

    async def _watch(self, params: protocol.FilesWatch) -> Answer:
        self._peer.require("files:read")
        limit = self._hub.settings.max_watches
        if len(self._watches) >= limit:
            raise RateLimited(
                "this connection has too many file watches; end some with files/unwatch", limit=limit
            )
        self._last += 1
        number = self._last
        self._watches[number] = None  # counts from the start
        try:
            watch = await self._hub.files.watch(self._tenant, params.paths, params.ignore)
        except BaseException:
            del self._watches[number]
            raise
        self._watches[number] = watch
        answer = {"watch": number, "unwatched": watch.unwatched}
        return Answer(answer, lambda: self._follow(number, watch))

    def _follow(self, number: int, watch: Watch) -> None:
        self._end_late()
        if number in self._watches:
            self._peer.spawn(self._forward(number, watch))

    async def _forward(self, number: int, watch: Watch) -> None:
        while told := await watch.next():
            if "ended" in told:
                self._watches.pop(number, None)
            await self._peer.tell("files/changed", {"watch": number, **told})

    async def _unwatch(self, params: protocol.FilesUnwatch) -> Answer:
        watch = self._watches.get(params.watch)
        if watch is None:
            raise NotFound(f"no watch {params.watch}")
        del self._watches[params.watch]
        self._hub.files.unwatch(watch)
        return Answer({})
