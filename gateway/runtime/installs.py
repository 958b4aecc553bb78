"""Tell why an install command failed, where what it said last tells it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

Cause = Literal["lockfile", "memory", "program"]

_MISSING: Final = 127  # the shell's code for a program that is not there
_KILLED: Final = 128 + 9
# the words of each package manager for a lockfile that its manifest has outgrown
_STALE: Final = (
    ("lockfile had changes, but lockfile is frozen", "bun"),
    ("npm error code EUSAGE", "npm"),
    ('Run "npm help ci"', "npm"),  # behind all of its options, which are more than is kept of an output
    ("ERR_PNPM_OUTDATED_LOCKFILE", "pnpm"),
    ("ERR_PNPM_LOCKFILE_CONFIG_MISMATCH", "pnpm"),
    ("Your lockfile needs to be updated", "yarn"),
    ("YN0028", "yarn"),
    ("needs to be updated, but `--locked`", "uv"),
)
_SHORT: Final = re.compile(
    r"heap out of memory|ERR_WORKER_OUT_OF_MEMORY|Cannot allocate memory|\bSIGKILL\b|^Killed\b", re.MULTILINE
)
_NOT_FOUND: Final = re.compile(r"(?:\d+: |line \d+: )([\w./@+-]{1,60}): (?:command )?not found\b")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why it failed, which the next run would do as well; `of` is the package manager or the program."""

    cause: Cause
    of: str = ""

    @property
    def facts(self) -> dict[str, str]:
        """What an error says of it."""
        return {"cause": self.cause} | ({"of": self.of} if self.of else {})


def failure(code: int | None, said: str) -> Failure | None:
    """Return why a command failed by its exit code and the end of what it printed; None if nothing tells."""
    for words, manager in _STALE:
        if words in said:
            return Failure("lockfile", manager)
    if code == _KILLED or _SHORT.search(said):
        return Failure("memory")
    if code == _MISSING and (found := _NOT_FOUND.search(said)) is not None:
        return Failure("program", found[1])
    return None
