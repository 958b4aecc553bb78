"""Find out why an install command failed from the end of its output."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

Cause = Literal["lockfile", "memory", "program"]

_MISSING: Final = 127  # a shell's code for a missing program
_KILLED: Final = 128 + 9
# each package manager's words for a lockfile that does not match the manifest
_STALE: Final = (
    ("lockfile had changes, but lockfile is frozen", "bun"),
    ("npm error code EUSAGE", "npm"),
    ('Run "npm help ci"', "npm"),  # npm lists all its options first, more than is kept of the output
    ("ERR_PNPM_OUTDATED_LOCKFILE", "pnpm"),
    ("ERR_PNPM_LOCKFILE_CONFIG_MISMATCH", "pnpm"),
    ("Your lockfile needs to be updated", "yarn"),
    ("YN0028", "yarn"),
    ("needs to be updated, but `--locked`", "uv"),
    ("changed significantly since poetry.lock was last generated", "poetry"),
)
_SHORT: Final = re.compile(
    r"heap out of memory|ERR_WORKER_OUT_OF_MEMORY|Cannot allocate memory|\bSIGKILL\b|^Killed\b", re.MULTILINE
)
_NOT_FOUND: Final = re.compile(r"(?:\d+: |line \d+: )([\w./@+-]{1,60}): (?:command )?not found\b")


@dataclass(frozen=True, slots=True)
class Failure:
    """A cause that would make every retry fail too; `of` is the package manager or program."""

    cause: Cause
    of: str = ""

    @property
    def facts(self) -> dict[str, str]:
        """The facts for an error."""
        return {"cause": self.cause} | ({"of": self.of} if self.of else {})


def failure(code: int | None, said: str) -> Failure | None:
    """Return the cause of a failure from exit code and end of output, None if unknown."""
    for words, manager in _STALE:
        if words in said:
            return Failure("lockfile", manager)
    if code == _KILLED or _SHORT.search(said):
        return Failure("memory")
    if code == _MISSING and (found := _NOT_FOUND.search(said)) is not None:
        return Failure("program", found[1])
    return None
