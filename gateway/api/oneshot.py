"""Commands as clients describe them, and those that run within one HTTP request."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Iterator, Mapping
from typing import Annotated, Final

import orjson
from pydantic import Field

from gateway import protocol
from gateway.admission import Reservation
from gateway.errors import InvalidParams, RateLimited, Unavailable
from gateway.execs import Attachment, ExecEnd, Execs
from gateway.limits.budget import Share
from gateway.protocol import types
from gateway.runtime import ExecSpec, Pty, StreamName

TIMEOUT: Final = 600.0  # seconds that a request waits for its command, unless it names a timeout
OUTPUT_MAX: Final = 8 << 20  # bytes returned of each stream; JSON makes up to 50 MiB of them
_SLICE: Final = 64 << 10  # bytes of output encoded as JSON at a time


class ExecBody(protocol.Params):
    """The body of `POST …/exec`. Names are in snake_case, as everywhere in HTTP."""

    model_config = protocol.Params.model_config | {"alias_generator": None}

    argv: types.Argv | None = None
    command: types.Command | None = None
    cwd: types.Cwd | None = None
    env: types.Variables = Field(default_factory=dict)
    user: types.User | None = None
    stdin: types.Content | None = None
    helper: bool = False
    timeout_ms: Annotated[int, Field(gt=0, le=86_400_000)] | None = None


def exec_spec(asked: protocol.ExecStart | ExecBody) -> ExecSpec:
    """Return the command to run: `argv`, or else the line `command` by bash. Raises `InvalidParams`."""
    if asked.argv is not None and not asked.argv[0]:
        raise InvalidParams("argv: the first entry, the program's name, is empty", field="argv")
    pty = asked.pty if isinstance(asked, protocol.ExecStart) else None
    return ExecSpec(
        tuple(asked.argv) if asked.argv is not None else ("/bin/bash", "-c", asked.command or ""),
        cwd=asked.cwd,
        env=dict(asked.env),
        user=asked.user,
        pty=None if pty is None else Pty(pty.cols, pty.rows),
        stdin=pty is not None or asked.stdin not in (None, False),
        work="helper" if asked.helper else "client",
    )


async def run(
    execs: Execs, tenant: str, body: ExecBody, by: str, room: Reservation[Share]
) -> Iterator[bytes]:
    """Run a command and return the parts of its answer; if the caller leaves, end its whole process tree.

    The output is counted in `room`; what does not fit is cut off.
    """
    if (body.argv is None) == (body.command is None):
        raise InvalidParams("give either argv or command")
    exec_ = await execs.start(
        tenant,
        exec_spec(body),
        timeout=TIMEOUT if body.timeout_ms is None else body.timeout_ms / 1000,
        by=by,
    )
    attachment = exec_.attach()
    try:
        if body.stdin is not None:
            # the text is within BODY_MAX, but may be more than the buffer holds: it must not wait for
            # output that is not read yet
            async with asyncio.TaskGroup() as group:
                group.create_task(_feed(attachment, body.stdin.encode()))
                collecting = group.create_task(_collect(attachment, OUTPUT_MAX, room))
            outputs = collecting.result()
        else:
            outputs = await _collect(attachment, OUTPUT_MAX, room)
        ended = await asyncio.shield(exec_.ended)
    except BaseException:
        await asyncio.shield(execs.cancel(exec_))
        raise
    finally:
        attachment.close()
    if ended.reason == "lost":
        why = {} if ended.cause is None else {"reason": ended.cause}
        raise Unavailable("the command's exit was lost: the tenant or Incus went away", exec=exec_.id, **why)
    return _ran(exec_.id, ended, outputs)


async def _feed(attachment: Attachment, data: bytes) -> None:
    await attachment.write(data)
    attachment.exec.close_stdin()


async def _collect(
    attachment: Attachment, limit: int, room: Reservation[Share]
) -> dict[str, tuple[bytes, bool]]:
    """Return each stream's first `limit` bytes and whether there was more. The rest is read and dropped."""

    async def one(name: StreamName) -> tuple[str, bytes, bool]:
        kept, cut, cursor, most = bytearray(), False, attachment.cursors[name], limit
        while parts := await cursor.next():
            for part in parts:
                some = part[: most - len(kept)]
                try:
                    room.grow(len(some))
                    kept += some
                except RateLimited:
                    most = len(kept)
                cut = cut or len(part) > len(some) or most < limit
            cursor.taken(parts)
        return name, bytes(kept), cut

    found = await asyncio.gather(*(one(name) for name in attachment.cursors))
    return {name: (data, cut) for name, data, cut in found}


def _ran(exec_id: str, ended: ExecEnd, outputs: Mapping[str, tuple[bytes, bool]]) -> Iterator[bytes]:
    """Yield the answer as JSON, encoding each part on demand.

    16 MiB of zeros, or of invalid UTF-8, become 100 MiB of JSON and take a quarter of a second.
    """
    facts = {
        "exec": exec_id,
        "exit_code": ended.code,
        "signal": ended.signal,
        "reason": ended.reason,
        "truncated": any(cut for _, cut in outputs.values()),
        "duration_ms": ended.duration_ms,
        "left": ended.left,
    }
    yield orjson.dumps(facts)[:-1]
    for name in ("stdout", "stderr"):
        yield b',"%b":"' % name.encode()
        data, decoder = outputs[name][0], codecs.getincrementaldecoder("utf-8")("replace")
        for start in range(0, len(data), _SLICE):
            text = decoder.decode(data[start : start + _SLICE], start + _SLICE >= len(data))
            yield orjson.dumps(text)[1:-1]
        yield b'"'
    yield b"}"
