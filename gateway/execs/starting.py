"""What is recorded about a command before it begins, from which the next gateway process can continue it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.execs.shown import listed
from gateway.runtime import ExecSpec, Holding


@dataclass(frozen=True, slots=True)
class Starting:
    """A command that is being started; see `Execs.start`. `deadline` is in seconds since the epoch."""

    exec_id: str
    tenant: str
    spec: ExecSpec
    deadline: float | None
    linger: float
    by: str
    once: bool
    purpose: Mapping[str, Any] | None
    before: Callable[[], Awaitable[None]] | None

    async def note(self, holding: Holding | None) -> None:
        """Record the command, before anything of it has happened.

        What is held comes first, so that of whatever `before` recorded the next process can tell whether it
        has begun.
        """
        if holding is not None:
            self._note(holding)
        if self.before is not None:
            await self.before()

    def _note(self, holding: Holding) -> None:
        if self.purpose is not None:
            holding.note_purpose(self.purpose)
        holding.note(
            {
                "starting": {"by": self.by},
                **{"id": self.exec_id, "tenant": self.tenant},
                "argv": listed(self.spec),
                "asked": self.spec.digest().hex(),
                "pty": None if self.spec.pty is None else [self.spec.pty.cols, self.spec.pty.rows],
                **{"stdin": self.spec.stdin, "work": self.spec.work},
                **{"linger": self.linger, "lingers": None},
                **{"deadline": self.deadline, "once": self.once},
                **{"ending": None, "owed": None, "places": [], "over": None},
            }
        )
