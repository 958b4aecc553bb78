"""Find out why an install command failed from the end of its output."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

Cause = Literal["lockfile", "memory", "killed", "program", "registry"]

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
_SHORT: Final = re.compile(r"heap out of memory|ERR_WORKER_OUT_OF_MEMORY|Cannot allocate memory")
_SIGKILL: Final = re.compile(r"\bSIGKILL\b|^Killed\b", re.MULTILINE)
# a registry's name, and each package manager's words for one that does not answer
_AWAY: Final = (
    (
        "the npm registry",
        re.compile(
            r"npm error code E(?:NOTFOUND|AI_AGAIN|CONN\w+|TIMEDOUT|\w+UNREACH|50\d|RR_SOCKET_TIMEOUT)"
            r"|(?:Connection\w+|FailedToOpenSocket|DNS\w+|Timeout) downloading"  # Bun
            r"|ERR_PNPM_META_FETCH_FAIL|trouble with your network connection"
        ),
    ),
    ("PyPI", re.compile(r"NewConnectionError|error sending request for url|All attempts to connect to")),
)
_NOT_FOUND: Final = re.compile(r"(?:\d+: |line \d+: )([\w./@+-]{1,60}): (?:command )?not found\b")


@dataclass(frozen=True, slots=True)
class Failure:
    """The cause of a failure; `of` is the package manager, program or registry. Only the last may come back.

    Whether it was `killed` for lack of memory the kernel tells; see `Pressure.has_killed`.
    """

    cause: Cause
    of: str = ""

    @property
    def facts(self) -> dict[str, str]:
        """The facts for an error."""
        return {"cause": self.cause} | ({"of": self.of} if self.of else {})


def failure(code: int | None, said: str) -> Failure | None:
    """Return the cause of a failure from exit code and end of output, None if unknown."""
    for stale, manager in _STALE:
        if stale in said:
            return Failure("lockfile", manager)
    if _SHORT.search(said):
        return Failure("memory")
    if code == _KILLED or _SIGKILL.search(said):
        return Failure("killed")
    if code == _MISSING and (found := _NOT_FOUND.search(said)) is not None:
        return Failure("program", found[1])
    for registry, words in _AWAY:
        if words.search(said):
            return Failure("registry", registry)
    return None
