"""A command whose tree tries to get away, and the host's view of what is left of it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from tests.waits import until

_numbers = itertools.count(os.getpid() * 1000 % 900_000_000 + 10_000_000)


class Tree:
    """Six processes that each sleep for a number of seconds of this tree alone.

    A child, one in a process group of its own, a `setsid`, a `nohup`, a double-forked daemon with closed
    descriptors, and the same with a cleared environment.
    """

    SIZE = 6

    def __init__(self) -> None:
        self._mark = f"{next(_numbers)}"

    @property
    def script(self) -> str:
        sleep = f"sleep {self._mark}"
        return (
            f"{sleep} & "
            f"set -m; {sleep} & set +m; "
            f"setsid {sleep} & "
            f"nohup {sleep} >/dev/null 2>&1 & "
            f"(setsid sh -c '{sleep} & exit' <&- >&- 2>&-); "
            f"(env -i setsid sh -c '/usr/bin/{sleep} & exit' <&- >&- 2>&-); "
            "echo ready; wait"
        )

    def alive(self) -> int:
        """Count the sleepers in the host's /proc, which shows those of containers too."""
        return alive(self._mark)

    async def grown(self) -> None:
        await until(lambda: self.alive() == self.SIZE)


def mark() -> str:
    """Return a number of seconds that no other command of the tests sleeps for."""
    return f"{next(_numbers)}"


def alive(mark: str) -> int:
    found = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            found += len(words) == 3 and words[0].endswith(b"sleep") and words[1] == mark.encode()
    return found
