"""Find processes of tenants that were killed for lack of memory in the kernel log.

One log covers all containers with either cgroup version. Counters of cgroups would have to be polled, and
vanish with a command's cgroup.
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
_PAUSE: Final = 1.0  # seconds between two reports about the same container
_RECORDS: Final = 1000  # records per pass, at 2 us each; the rest follows in the next
_RECORD: Final = 8192  # bytes of the longest record, see the kernel's Documentation/ABI/testing/dev-kmsg
_CONTAINER: Final = re.compile(r"/lxc\.payload\.([^/,\s]+)")
_PROCESS: Final = re.compile(r",task=(.*),pid=\d+,uid=\d+$")


def victim(record: str) -> tuple[str, str] | None:
    """Return the container, as named by its cgroup, and the process that a record reports as killed.

    A tenant chooses the names of cgroups in its container, and could use another container's name: a record
    with more than one container is ignored.
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
    """Yield container, name of a killed process and number of them, from now on; ends if unreadable."""
    try:
        descriptor = os.open(_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        log.info("cannot read the kernel log, so tenant.oom is not reported: %s", error.strerror)
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
            # a tenant that keeps running out of memory gets one event per second
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
            continue  # some records were overwritten; the next read continues after them
        if not record:
            return
        yield record.decode("utf-8", "replace")
