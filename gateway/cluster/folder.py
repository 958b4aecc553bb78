"""Members that find one another by files of a folder: several gateways on one machine, without Incus."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import orjson

from gateway.cluster.member import Member


class FolderMembers:
    """The members whose files are beside `file`, whose own name is the file's."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def own(self) -> str:
        return self._file.name

    async def members(self) -> tuple[Member, ...]:
        """Return all members by name, each with what it published."""
        return await asyncio.to_thread(self._read)

    async def publish(self, config: Mapping[str, str]) -> None:
        """Set keys of our own member."""
        await asyncio.to_thread(self._write, config)

    def _read(self) -> tuple[Member, ...]:
        files = sorted(file for file in self._file.parent.iterdir() if not file.suffix)
        return tuple(
            Member(file.name, "127.0.0.1:0", config=orjson.loads(file.read_bytes())) for file in files
        )

    def _write(self, config: Mapping[str, str]) -> None:
        kept = orjson.loads(self._file.read_bytes()) if self._file.exists() else {}
        made = self._file.with_suffix(".new")
        made.write_bytes(orjson.dumps({**kept, **config}))
        made.rename(self._file)
