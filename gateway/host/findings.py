"""What a check of the host finds, and the Incus client with which it looks without changing anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NoReturn

from gateway.host import HostError
from gateway.host.incus import Incus

SETUP: Final = "run `incus-gateway setup`"
"""What to do about most of what is missing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check; `detail` says what was found, or what is wrong and what to do.

    A hint is no problem, but something that could be better.
    """

    what: str
    ok: bool
    detail: str
    hint: bool = False

    def __str__(self) -> str:
        word = "problem" if not self.ok else "hint" if self.hint else "ok"
        return f"{word:<8} {self.what}: {self.detail}"


class Hint(Exception):
    """Raised by a check that found no problem but has a suggestion."""


class Looking(Incus):
    """A read-only Incus client: an attempted change is reported as a need for setup."""

    def _refuse(self, *path: str, **request: Any) -> NoReturn:
        raise HostError(f"missing or not as it should be; {SETUP}")

    post = put = patch = delete = _refuse
