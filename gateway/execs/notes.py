"""Records commands, so that the next process of the gateway can say how they ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from gateway.execs.ended import Ended, Past, ended_of
from gateway.execs.exec import Exec
from gateway.execs.shown import shortened
from gateway.idempotency import Idempotency, IdempotencyRecord, Key
from gateway.runtime import ExecSpec
from gateway.storage.store import StoreFailed

log = logging.getLogger(__name__)

SHORT: Final = 200  # characters of a command where it is named
_UNNOTED: Final = 0.01  # seconds; the journal of events waits for so long too


@dataclass(frozen=True, slots=True)
class Earlier:
    """A command of an earlier process: what it was, and how it ended or that it is `lost`; without output."""

    tenant: str
    exec_id: str
    spec: ExecSpec
    process: Past
    asked: bytes
    ended: Ended
    lost: bool
    age: float  # seconds since it was noted


class Notes:
    """Records of commands in the idempotency store. One that cannot be written is a line in the log."""

    def __init__(self, idempotency: Idempotency) -> None:
        self._idempotency = idempotency

    async def earlier(self) -> Iterator[Earlier]:
        """Return the recorded commands of earlier processes."""
        return (_earlier(key, record) for key, record in await self._idempotency.earlier("exec"))

    async def start(self, exec_: Exec, once: bool) -> None:
        """Record that a command runs, so that the next process can say that it is lost.

        One without an id of its caller's has a moment for its first byte before that; what ends within it
        needs no note.
        """
        if not once:
            await asyncio.sleep(_UNNOTED)
            if exec_.ended.done():
                return
        try:
            await self._idempotency.note(_key(exec_), exec_.asked, orjson.dumps(_facts(exec_)))
        except StoreFailed as failed:
            log.warning("exec %s will not be known after this process: %s", exec_.id, failed.message)

    async def end(self, exec_: Exec) -> None:
        """Keep how a command under a caller's id ended."""
        told = {**_facts(exec_), "exit": exec_.over.on_wire(exec_.id)}
        try:
            await self._idempotency.finish(_key(exec_), exec_.asked, orjson.dumps(told))
        except StoreFailed as failed:
            log.error("the end of exec %s will not outlive this process: %s", exec_.id, failed.message)

    async def forget(self, exec_: Exec) -> None:
        """Forget a command that ended, and whose caller gave it no id to ask by."""
        try:
            await self._idempotency.forget(_key(exec_))
        except StoreFailed as failed:
            log.warning("exec %s will be lost to the next process: %s", exec_.id, failed.message)


def _earlier(key: Key, record: IdempotencyRecord) -> Earlier:
    tenant, _, exec_id = key
    told: Mapping[str, Any] = {} if record.result is None else orjson.loads(record.result)
    process = Past(told.get("pid", 0), told.get("startedAt", record.at))
    words = tuple(told.get("argv") or [told.get("command", "")])  # by its line alone in older records
    # what ran when that life was killed has run until it is given up here
    ran = max(0, int((time.time() - process.started_at) * 1000))
    exit_ = told.get("exit") or {
        "reason": "lost",
        "durationMs": ran,
        "offsets": {"stdout": 0, "stderr": 0},
    }
    ended = ended_of(exit_)
    lost, age = record.state == "begun", time.time() - record.at
    return Earlier(tenant, exec_id, ExecSpec(words), process, record.digest, ended, lost, age)


def _key(exec_: Exec) -> Key:
    return exec_.tenant, "exec", exec_.id


def _facts(exec_: Exec) -> dict[str, Any]:
    """Return the facts about a command, besides its end, for the next process."""
    process = exec_.process
    words = shortened(exec_.spec, SHORT)
    return {"pid": process.pid, "startedAt": process.started_at, "argv": words}
