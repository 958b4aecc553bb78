"""The output of a Bash command: its file, and the part that BashOutput has not returned yet."""

from __future__ import annotations

import base64
import codecs
import contextlib
import logging
import weakref
from typing import Any, Final

from gateway.errors import GatewayError
from gateway.limits.budget import Share
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.workers import Workers
from gateway.settings import Settings
from gateway.tools import outputs, shell

log = logging.getLogger(__name__)

_LITTLE: Final = 8 << 10  # bytes if the tenant's share is full
_UNREAD: Final = 4 * shell.RESULT_MAX  # bytes of each stream kept for the next BashOutput


class OutputFile:
    """One output file of a workspace, written through the tenant's worker, up to `limit` bytes.

    `path` is None until it exists, and again after a failed write, which is the last. `size` counts its
    bytes, None while there is no file.
    """

    def __init__(self, workers: Workers, root: FilesystemRoot, name: str, settings: Settings) -> None:
        self.path: str | None = None
        self.size: int | None = None
        self.broken = False
        self._earlier = False  # an earlier process may have written more than `size`
        self._workers = workers
        self._root = root
        self._name = name
        self._settings = settings
        self._most = min(settings.bash_output_max, settings.write_max)

    def take_over(self, size: int | None) -> None:
        """Continue after the bytes that an earlier process has written; -1 if it could not write."""
        self._earlier = True
        self.broken = size == -1
        if size is not None and not self.broken:
            self._exists(size)

    async def create(self, data: bytes) -> None:
        if self._earlier:  # it was killed while writing
            await self.remove()
        data = data[: self._most]
        await self._ask("create", data, age=int(self._settings.bash_outputs_age), room=self._others)
        if not self.broken:
            self._exists(len(data))

    async def append(self, data: bytes) -> None:
        if self.size is None or self.size >= self._most or self.broken:
            return
        data = data[: self._most - self.size]
        at = {"at": self.size} if self._earlier else {}
        await self._ask("append", data, **at)
        self._earlier = False
        if not self.broken:
            self.size += len(data)

    def _exists(self, size: int) -> None:
        self.size = size
        self.path = outputs.path_of(self._name, self._root.workspace)

    async def remove(self) -> None:
        if self.path is not None or self._earlier:
            self.path, self._earlier = None, False
            with contextlib.suppress(GatewayError):
                await self._workers.call(self._root, "output/remove", {"name": self._name})

    @property
    def _others(self) -> int:
        return max(0, self._settings.bash_outputs_max - self._most)

    async def _ask(self, what: str, data: bytes, **facts: Any) -> None:
        given = {"name": self._name, "data": base64.b64encode(data).decode(), **facts}
        try:
            await self._workers.call(self._root, f"output/{what}", given)
        except GatewayError as error:
            # a full disk, or a tenant that removed the folder: the command itself must not suffer
            log.info("cannot write the output file of %s: %s", self._root.tenant, error.message)
            self.path, self.broken = None, True


class Unread:
    """The part of one stream that BashOutput has not returned yet. Beyond the limit the oldest is dropped.

    It counts towards the tenant's share of kept output. If that is full, only a little is kept. It begins at
    the offset up to which an earlier process has returned the stream.
    """

    def __init__(self, share: Share, start: int = 0) -> None:
        self._share = share
        self._lease = share.reserve()
        weakref.finalize(self, self._lease.release)  # ends with its shell, which has no close
        self._data = bytearray()
        self._start = start  # an offset in the stream
        self.returned = start  # the offset up to which the stream has been returned

    def add(self, data: bytes, at: int) -> None:
        """Add bytes at an offset, ignoring those before the start."""
        end = self._start + len(self._data)
        if at > end:
            self._drop(at - self._start)
        self._data += data[max(0, end - at) :]
        most = _UNREAD if self._share.full(len(data)) is None else _LITTLE
        if len(self._data) > 2 * most:  # not for each chunk, since it moves the rest
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
        return text, self._start + end - len(decoder.getstate()[0]), self._start - self.returned

    def taken(self, offset: int) -> None:
        """Drop what lies before `offset`: it has been returned."""
        self._drop(offset - self._start)
        self.returned = max(self.returned, offset)

    def _drop(self, number: int) -> None:
        if number > 0:
            del self._data[:number]
            self._start += number
            self._lease.hold(len(self._data) - self._lease.size)
