"""Members that share a folder instead of Incus: several gateways on one machine."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Collection, Mapping
from pathlib import Path

import orjson

from gateway.cluster.member import Member
from gateway.cluster.shared_keys import check


class FolderMembers:
    """The members whose files are beside `file`, whose own name is the file's."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def own(self) -> str:
        return self._file.name

    async def members(self) -> tuple[Member, ...]:
        """Return all members by name, each with what it published."""
        return await asyncio.to_thread(self._read)

    async def names(self) -> Collection[str]:
        return {member.name for member in await self.members()}

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


class FolderKeys:
    """Implements `Keys` by a file for each, in a folder that is created with the first. Without limit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def get(self, key: str) -> str | None:
        check(key)
        return await asyncio.to_thread(self._read, key)

    async def listed(self, prefix: str) -> Mapping[str, str]:
        return await asyncio.to_thread(self._list, prefix)

    async def swap(self, key: str, before: str | None, after: str | None) -> bool:
        check(key, after)
        return await asyncio.to_thread(self._swap, key, before, after)

    def _read(self, key: str) -> str | None:
        try:
            return (self._folder / key).read_bytes().decode()
        except FileNotFoundError:
            return None

    def _list(self, prefix: str) -> Mapping[str, str]:
        names = [file.name for file in self._folder.glob("[!.]*") if file.name.startswith(prefix)]
        found = {name: self._read(name) for name in names}
        return {key: value for key, value in found.items() if value is not None}

    def _swap(self, key: str, before: str | None, after: str | None) -> bool:
        self._folder.mkdir(exist_ok=True)
        # no key's name begins with a dot
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._read(key) != before:
                return False
            if after is None:
                (self._folder / key).unlink(missing_ok=True)
            else:
                made = self._folder / ".new"
                made.write_bytes(after.encode())
                made.rename(self._folder / key)
            return True
