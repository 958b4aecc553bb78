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
# each package manager's last words for a registry that does not answer, not those of a retry
_NPM: Final = re.compile(
    r"npm error code E(?:NOTFOUND|AI_AGAIN|CONN\w+|TIMEDOUT|\w+UNREACH|50\d|RR_SOCKET_TIMEOUT)"
    r"|error: (?:Connection\w+|FailedToOpenSocket|DNS\w+|Timeout) downloading"  # Bun
    r"|ERR_PNPM_META_FETCH_FAIL"
    r'|An unexpected error occurred: "https?://[^"\n]*(?:getaddrinfo|ECONN|ETIMEDOUT)'  # Yarn
)
_PYPI: Final = re.compile(r"error sending request for url|All attempts to connect to")  # uv, Poetry
_PIP: Final = ("NewConnectionError", "No matching distribution found")
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
    if _NPM.search(said) is not None:
        return Failure("registry", "the npm registry")
    if _PYPI.search(said) is not None or all(words in said for words in _PIP):
        return Failure("registry", "PyPI")
    return None
