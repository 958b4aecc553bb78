"""The output of a Bash command: its file, and the part that BashOutput has not returned yet."""

from __future__ import annotations

import base64
import codecs
import contextlib
import logging
import weakref
from typing import Any, Final

from gateway.errors import GatewayError
from gateway.limits.budget import Lease, Share
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from gateway.tools import outputs, shell

log = logging.getLogger(__name__)

_LITTLE: Final = 8 << 10  # bytes if the tenant's share is full
_UNREAD: Final = 4 * shell.RESULT_MAX  # bytes of each stream kept for the next BashOutput


class OutputFile:
    """One output file of a workspace, written through the tenant's worker, up to `limit` bytes.

    `path` is None until it exists, and again after a failed write, which is the last.
    """

    def __init__(self, workers: Workers, root: FilesystemRoot, name: str, settings: Settings) -> None:
        self.path: str | None = None
        self.broken = False
        self._workers = workers
        self._root = root
        self._name = name
        self._settings = settings
        self._room = min(settings.bash_output_max, settings.write_max)

    async def create(self, data: bytes) -> None:
        await self._ask("create", data, age=int(self._settings.bash_outputs_age), room=self._others)
        if not self.broken:
            self.path = outputs.path_of(self._name, self._root.workspace)

    async def append(self, data: bytes) -> None:
        if self._room > 0 and not self.broken:
            await self._ask("append", data)

    async def remove(self) -> None:
        if self.path is not None:
            self.path = None
            with contextlib.suppress(GatewayError):
                await self._workers.call(self._root, "output/remove", {"name": self._name})

    @property
    def _others(self) -> int:
        return max(0, self._settings.bash_outputs_max - self._room)

    async def _ask(self, what: str, data: bytes, **facts: Any) -> None:
        data = data[: self._room]
        self._room -= len(data)
        given = {"name": self._name, "data": base64.b64encode(data).decode(), **facts}
        try:
            await self._workers.call(self._root, f"output/{what}", given)
        except GatewayError as error:
            # a full disk, or a tenant that removed the folder: the command itself must not suffer
            log.info("output file of %s not written: %s", self._root.tenant, error.message)
            self.path, self.broken = None, True


class Unread:
    """The part of one stream that BashOutput has not returned yet. Beyond the limit the oldest is dropped.

    It counts towards the tenant's share of kept output. If that is full, only a little is kept.
    """

    def __init__(self, share: Share) -> None:
        self._share = share
        self._lease = Lease(share)
        weakref.finalize(self, self._lease.end)  # it goes with its shell, which has no close
        self._data = bytearray()
        self._start = 0  # offsets count the stream's bytes
        self._taken = 0

    def add(self, data: bytes) -> None:
        self._data += data
        most = _UNREAD if self._share.full(len(data)) is None else _LITTLE
        if len(self._data) > 2 * most:  # not at each chunk, since it moves the rest
            self._drop(len(self._data) - most)
        self._lease.hold(len(self._data) - self._lease.size)

    def look(self, *, final: bool, lines: bool) -> tuple[str, int, int]:
        """Return the unread part as text, the offset after it, and the number of bytes lost before it.

        Unless `final`, an incomplete character, and with `lines` an incomplete line, stays for the next call.
        """
        self._drop(len(self._data) - _UNREAD)
        end = self._data.rfind(b"\n") + 1 if lines and not final else len(self._data)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(bytes(self._data[:end]), final)
        return text, self._start + end - len(decoder.getstate()[0]), self._start - self._taken

    def taken(self, offset: int) -> None:
        """Drop what lies before `offset`, since it was returned."""
        self._drop(offset - self._start)
        self._taken = max(self._taken, offset)

    def _drop(self, number: int) -> None:
        if number > 0:
            del self._data[:number]
            self._start += number
            self._lease.hold(len(self._data) - self._lease.size)
