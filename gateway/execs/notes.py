"""Records of commands, from which the next gateway process can tell how they ended."""

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

SHORT: Final = 200  # characters of a command in events and records
_UNNOTED: Final = 0.01  # seconds; the same delay as the event journal's


@dataclass(frozen=True, slots=True)
class Earlier:
    """A command of an earlier process, without its output: how it ended, or that it was `lost`."""

    tenant: str
    exec_id: str
    spec: ExecSpec
    process: Past
    asked: bytes
    ended: Ended
    lost: bool
    age: float  # seconds since it was recorded


class Notes:
    """Records of commands in the idempotency store. A failed write is only logged."""

    def __init__(self, idempotency: Idempotency) -> None:
        self._idempotency = idempotency

    async def earlier(self) -> Iterator[Earlier]:
        """Return the recorded commands of earlier processes, of each tenant the oldest first."""
        return (_earlier(key, record) for key, record in await self._idempotency.earlier("exec"))

    async def start(self, exec_: Exec, once: bool) -> None:
        """Record that a command runs, so that the next process can report it as lost.

        For a command without a caller's id the write is delayed briefly, so as not to delay its first byte;
        if it ends before that, nothing is recorded.
        """
        if not once:
            await asyncio.sleep(_UNNOTED)
            if exec_.ended.done():
                return
        try:
            await self._idempotency.note(_key(exec_), exec_.asked, orjson.dumps(_facts(exec_)))
        except StoreFailed as failed:
            log.warning("exec %s will be unknown after a restart: %s", exec_.id, failed.message)

    async def end(self, exec_: Exec) -> None:
        """Record how a command with a caller's id ended."""
        told = {**_facts(exec_), "exit": exec_.over.on_wire(exec_.id)}
        try:
            await self._idempotency.finish(_key(exec_), exec_.asked, orjson.dumps(told))
        except StoreFailed as failed:
            log.error("the end of exec %s will be unknown after a restart: %s", exec_.id, failed.message)

    async def forget(self, exec_: Exec) -> None:
        """Delete the record of an ended command that has no caller's id."""
        try:
            await self._idempotency.forget(_key(exec_))
        except StoreFailed as failed:
            log.warning("exec %s will be reported as lost after a restart: %s", exec_.id, failed.message)


def _earlier(key: Key, record: IdempotencyRecord) -> Earlier:
    tenant, _, exec_id = key
    told: Mapping[str, Any] = {} if record.result is None else orjson.loads(record.result)
    process = Past(told.get("pid", 0), told.get("startedAt", record.at))
    words = tuple(told.get("argv") or [told.get("command", "")])  # older records have only the command line
    # a command that ran when its gateway was killed counts as running until now
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
    """Return what the next process must know of a command, except its end."""
    process = exec_.process
    words = shortened(exec_.spec, SHORT)
    return {"pid": process.pid, "startedAt": process.started_at, "argv": words}
