"""`files/…` except watching: single files and folders of the workspace."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from gateway import protocol
from gateway.api.connection.family import Answer, Family, Method
from gateway.files.files import Files

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

    async def _call(self, method: str, params: protocol.Params) -> Answer:
        token = self._peer.require(Files.SCOPES[method])
        given = params.model_dump(by_alias=True)
        return Answer(await self._hub.files.call(self._tenant, method, given, by=token.subject))


def _constant(size: int, params: protocol.Params) -> int:
    return size
