"""Finds in the kernel's log which tenants' processes it killed for lack of memory.

One log covers all containers under either version of control groups. Their counters would have to be polled,
and go when a command's group does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncGenerator, Iterator
from typing import Final

log = logging.getLogger(__name__)

_LOG: Final = "/dev/kmsg"
_PAUSE: Final = 1.0  # seconds between two words about the same container
_RECORDS: Final = 1000  # records of one look, at 2 us each; the rest comes with the next
_RECORD: Final = 8192  # bytes of the longest, see the kernel's Documentation/ABI/testing/dev-kmsg
_CONTAINER: Final = re.compile(r"/lxc\.payload\.([^/,\s]+)")
_PROCESS: Final = re.compile(r",task=(.*),pid=\d+,uid=\d+$")


def victim(record: str) -> tuple[str, str] | None:
    """Return the container, as its control group is called, and the process that a record says was killed.

    A tenant names the groups in its container, and could name another's container there: a record with more
    than one counts for none.
    """
    message = record.partition("\n")[0].partition(";")[2]
    if not message.startswith("oom-kill:"):
        return None
    containers = set(_CONTAINER.findall(message))
    process = _PROCESS.search(message)
    if len(containers) != 1 or process is None:
        return None
    return containers.pop(), process[1]


async def ooms() -> AsyncGenerator[tuple[str, str, int]]:
    """Yield container, a killed process and how many were, from now on; end where the log is unreadable."""
    try:
        descriptor = os.open(_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        log.info("the kernel's log cannot be read, so that no tenant.oom is told: %s", error.strerror)
        return
    try:
        os.lseek(descriptor, 0, os.SEEK_END)
        while True:
            await _readable(descriptor)
            found: dict[str, tuple[str, int]] = {}
            for record in _records(descriptor):
                if (one := victim(record)) is not None:
                    found[one[0]] = (one[1], found.get(one[0], ("", 0))[1] + 1)
            for container, (process, count) in found.items():
                yield container, process, count
            # a tenant that dies again and again is worth one event a second
            await asyncio.sleep(_PAUSE)
    finally:
        os.close(descriptor)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def _records(descriptor: int) -> Iterator[str]:
    for _ in range(_RECORDS):
        try:
            record = os.read(descriptor, _RECORD)
        except BlockingIOError:
            return
        except BrokenPipeError:
            continue  # some were overwritten before we came: the next read goes on behind them
        if not record:
            return
        yield record.decode("utf-8", "replace")
