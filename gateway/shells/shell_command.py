"""One Bash command, in the foreground or background: its output and status."""

from __future__ import annotations

import asyncio
import base64
import codecs
import contextlib
import hashlib
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from gateway.admission import Reservation
from gateway.errors import GatewayError
from gateway.execs import Attachment, Cursor, Exec, ExecEnd
from gateway.limits.budget import Share
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.workers import Workers
from gateway.runtime import StreamName
from gateway.settings import Settings
from gateway.tools import outputs, shell
from gateway.tools.session import ToolSession
from gateway.tools.shell import KEPT
from gateway.tools.toolbox import LastingCall

Count = Annotated[int, Field(ge=0)]
Short = Annotated[str, Field(max_length=512)]

_MOST: Final = 3000  # bytes of texts chosen by the caller; more would leave no room for the rest


@dataclass(slots=True)
class BashRecord:
    """One Bash command. Its caller waits in front of it until the time `until`; then it is `moved`.

    `offsets` say how much of each output has been copied, `file` how much of that is in the output file: None
    if there is no file, -1 if it could not be written. `taken` is how much BashOutput has returned, `last`
    its last call and the offsets at which that began. The first `head` bytes are kept while `shown`.
    """

    shell: Annotated[str, Field(pattern=r"^bash_[0-9a-f]{8}$")]
    session: Annotated[str, Field(max_length=128)] | None
    cwd: str | None
    phase: Literal["front", "moved", "background"]
    seconds: float
    until: float
    meaning: Short | None
    call: LastingCall | None
    notes: list[str] = field(default_factory=list)
    offsets: dict[StreamName, Count] = field(default_factory=dict)
    size: Count = 0
    characters: Count = 0
    pending: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){0,3}$")] = ""
    head: Annotated[int, Field(ge=0, le=KEPT)] = 0
    shown: bool = True
    file: Annotated[int, Field(ge=-1)] | None = None
    taken: dict[StreamName, Count] = field(default_factory=dict)
    last: tuple[str, dict[StreamName, Count]] | None = None
    killer: str | None = None

    def facts(self) -> Mapping[str, Any]:
        """Return the record as a JSON object."""
        return {name: getattr(self, name) for name in _NAMES}

    @property
    def lasting(self) -> bool:
        """Whether the next process should continue it: somebody may ask for it, and the record fits."""
        said = [self.cwd or "", self.session or "", *self.notes]
        if self.call is not None:
            said += [self.call.id, self.call.by]
        if self.session is None and (self.call is None or self.phase == "background"):
            return False
        return len(orjson.dumps("".join(said).encode(errors="replace").decode())) < _MOST


_NAMES: Final = tuple(one.name for one in fields(BashRecord))
_RECORD: Final = TypeAdapter(BashRecord)


def parsed(found: Mapping[str, Any]) -> BashRecord:
    """Return the record that an earlier process wrote. Raises `ValueError`."""
    try:
        return _RECORD.validate_python(found, strict=False)
    except ValidationError as error:
        raise ValueError(f"not a command's record: {error.error_count()} faults") from None


def mark(call_id: str | None) -> str | None:
    """Return a short digest of a call's id, which may be long."""
    return None if call_id is None else hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:24]


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


class BashCommand:
    """One Bash command, in the foreground or background, and its output.

    `ended` resolves to its end once all output has been copied here; the exec's own copy is dropped then.
    If the command is held, `record` tells the gateway's next process how much has been copied.
    """

    def __init__(self, record: BashRecord, command: str, exec_: Exec, file: OutputFile, limit: int) -> None:
        self.id = record.shell
        self.record = record
        self.command = command
        self.tenant = exec_.tenant
        self.exec_id = exec_.id
        self.file = file
        self.over = exec_.ended
        self.ended: ExecEnd | None = None
        self.report = b""
        self.flooded = False
        self.left = False  # to the next process
        self.timer: asyncio.TimerHandle | None = None
        self._limit = limit
        self._purpose = exec_.purpose
        self._head = bytearray(self._purpose.beginning(record.head))
        self._lease = exec_.share.reserve()  # for the beginning, if it is kept for the next process too
        weakref.finalize(self, self._lease.release)
        self._tail = bytearray()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.setstate((bytes.fromhex(record.pending), 0))
        self._again = record.last  # a BashOutput call that an earlier process may not have answered
        self._known = dict(record.offsets)  # how much an earlier process had copied
        self._behind = {name for name, offset in self._known.items() if offset and name in exec_.streams}
        self._caught_up = asyncio.Event()
        before = record.taken if record.last is None else record.last[1]
        self.unread = {name: Unread(exec_.share, before.get(name, 0)) for name in exec_.streams}
        self._writing = asyncio.Lock()
        reader, exec_.reader = exec_.reader or exec_.attach(), None
        self.task = asyncio.create_task(self._carry(exec_, reader), name=f"shell {exec_.id}")

    def occupy(self, slot: Reservation[ToolSession]) -> None:
        """Keep a place among its session's commands until it has ended."""
        self.task.add_done_callback(lambda _: slot.release())

    async def _carry(self, exec_: Exec, attachment: Attachment) -> None:
        """Copy all output, then resolve `ended`."""
        try:
            self._look_for_flood(exec_)
            async with asyncio.TaskGroup() as group:
                for name, cursor in attachment.cursors.items():
                    group.create_task(self._take(exec_, name, cursor))
            self.ended = await asyncio.shield(exec_.ended)
            self.report = exec_.process.report
        finally:
            attachment.close()
            if self.timer is not None:
                self.timer.cancel()

    async def _take(self, exec_: Exec, name: StreamName, cursor: Cursor) -> None:
        while parts := await cursor.next():
            data = b"".join(parts)
            async with self._writing:
                self.unread[name].add(data, cursor.offset)
                known = min(len(data), max(0, self._known.get(name, 0) - cursor.offset))
                if known and self.record.shown:
                    self._end_with(data[:known])
                if cursor.offset + len(data) >= self._known.get(name, 0):
                    self._behind.discard(name)
                    self._caught_up.set()
                if data := data[known:]:
                    await self._keep(data)
                    self.record.offsets[name] = cursor.offset + known + len(data)
                    self.note()
            cursor.taken(parts)
            self._look_for_flood(exec_)

    async def _keep(self, data: bytes) -> None:
        """Keep the output's beginning and end; the file gets what does not fit into the beginning."""
        record, head = self.record, len(self._head)
        record.size += len(data)
        record.characters += len(self._decoder.decode(data))
        record.pending = self._decoder.getstate()[0].hex()
        beyond = b""
        if record.shown:
            beyond = data[shell.KEPT - head :]
            self._head += data[: len(data) - len(beyond)]
            if self._purpose.held:
                self._purpose.begin_with(head, bytes(self._head[head:]))
                self._lease.hold(len(self._head) - head)
            record.head = len(self._head)
            self._end_with(data)
        if self.file.path is not None:
            await self.file.append(data)
        elif beyond and not self.file.broken:  # from here on, memory has only part of it
            await self.file.create(bytes(self._head) + beyond)

    def _end_with(self, data: bytes) -> None:
        self._tail += data
        if len(self._tail) > 2 * shell.KEPT:  # not for each chunk, since it moves the rest
            del self._tail[: -shell.KEPT]

    def _look_for_flood(self, exec_: Exec) -> None:
        if self.record.size > self._limit and not self.flooded:
            self.flooded = True
            exec_.end("cancelled", 0)

    def note(self) -> None:
        """Record the progress of everything for the next process."""
        self.record.file = -1 if self.file.broken else self.file.size
        if self._purpose.held:
            self._purpose.note(self.record.facts())

    async def save(self) -> None:
        """Write the output to a file from now on, unless that has begun or failed before."""
        async with self._writing:
            if self.file.path is None and not self.file.broken:
                await self.file.create(bytes(self._head))
                self.note()

    def let_go(self) -> None:
        """Drop beginning and end; of a background command only the unread part is shown."""
        self.record.shown, self.record.head = False, 0
        self._head.clear()
        self._tail.clear()
        self.note()

    def printed(self) -> shell.Printed:
        record = self.record
        return shell.Printed(
            record.size,
            record.characters,
            self._head.decode("utf-8", "replace"),
            self._tail[-shell.KEPT :].decode("utf-8", "replace"),
            record.size == len(self._head),
            self.file.path,
        )

    @property
    def held(self) -> bool:
        """Whether the next process can continue it."""
        return self._purpose.held

    async def caught_up(self) -> None:
        """Wait until everything that an earlier process had copied has been copied again."""
        while self._behind and not self.task.done():
            self._caught_up.clear()
            looking = asyncio.ensure_future(self._caught_up.wait())
            await asyncio.wait([looking, self.task], return_when=asyncio.FIRST_COMPLETED)
            looking.cancel()

    # --- what BashOutput returns ------------------------------------------------------------------------

    def asked(self, call_id: str | None) -> dict[StreamName, int]:
        """Return the offsets from which a BashOutput call returns the outputs.

        A call that an earlier process may not have answered returns the same output again, and what followed.
        """
        again, self._again = self._again, None
        if again is not None and again[0] != mark(call_id):
            for name, offset in self.record.taken.items():
                self.unread[name].taken(offset)
        return {name: unread.returned for name, unread in self.unread.items()}

    def answered(self, call_id: str | None, began: dict[StreamName, int], upto: Mapping[str, int]) -> None:
        """Record that a BashOutput call has returned the outputs up to these offsets."""
        for name, unread in self.unread.items():
            unread.taken(upto[name])
        self.record.taken = {name: unread.returned for name, unread in self.unread.items()}
        told = mark(call_id)
        self.record.last = None if told is None else (told, began)
        self.note()

    @property
    def status(self) -> Literal["running", "completed", "failed", "killed"]:
        ended = self.ended
        if ended is None:
            return "failed" if self.task.done() else "running"
        if ended.reason in ("cancelled", "timeout"):
            return "killed"
        return "completed" if ended.code == 0 else "failed"

    def facts(self) -> dict[str, Any]:
        """Return the fields that every command has in `structuredContent`."""
        ended = self.ended
        facts: dict[str, Any] = {"exec": self.exec_id, "status": self.status}
        if ended is not None:
            facts |= {"exitCode": ended.code, "signal": ended.signal, "reason": ended.reason}
            facts |= {"durationMs": ended.duration_ms, "left": ended.left}
        return facts
