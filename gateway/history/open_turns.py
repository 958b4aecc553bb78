"""Which turn a change belongs to: the open turns of each tenant, and the paths that each has written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Mode = Literal["all", "only", "but"]

_PATHS: Final = 500  # paths that a turn remembers; one with more records every change
_BYTES: Final = 64 << 10  # bytes of these paths
_PATHS_OF_TENANT: Final = 8000  # of all open turns; to sort them takes some 5 ms of the loop
_TIMES: Final = 32  # spans of time that a turn remembers; the two eldest of more become one
COARSE: Final = 0.02  # seconds by which the kernel's time of a change may be too early

Times = Sequence[tuple[float, float]]
"""Spans of time, each from and until seconds since the epoch, in order."""


@dataclass(eq=False, slots=True)
class OpenTurn:
    """A session's work until it ends its turn or rests.

    `paths` were written by its file tools; if `wide`, a command of it may have changed any other.
    `made` are the paths that it created. `calls` counts its running calls, `changing` those that may change
    something, and `times` says when there were any; a command in the background lasts until the turn ends.
    `parted` are paths at which all that it has done is on record. `tries` counts failed recordings, of which
    `ending` is the first. It ends at `rested`, of the loop's clock, if no call comes before.
    """

    key: Hashable
    agent: str
    by: str
    title: str = ""
    wide: bool = False
    calls: int = 0
    changing: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)
    rested: float = 0.0
    paths: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)
    parted: set[str] = field(default_factory=set)
    tries: int = 0
    ending: asyncio.Task[Any] | None = None
    _bytes: int = 0
    _since: float | None = None

    @property
    def changed(self) -> bool:
        """Whether anything may have changed."""
        return self.wide or bool(self.paths)

    def wrote(self, path: str | None) -> None:
        """Note a path below the workspace; None stands for any."""
        if path is None:
            self.wide = True
        elif path not in self.paths:
            self._bytes += len(path) + 1
            if len(self.paths) >= _PATHS or self._bytes > _BYTES:
                self.wide = True
            else:
                self.paths.add(path)

    def touches(self, path: str) -> bool:
        """Whether it is known to have changed a path, or something below it or around it."""
        return path in self.paths or any(
            one.startswith(f"{path}/") or path.startswith(f"{one}/") for one in self.paths
        )

    def begin(self, *, lasting: bool = False) -> None:
        """Note that a call begins that may change something."""
        self.changing += 1 + lasting  # one in the background does not end
        self.parted.clear()
        if self._since is None:
            self._since = time.time() - COARSE

    def end(self) -> None:
        """Note that such a call has ended."""
        self.changing -= 1
        if not self.changing and self._since is not None:
            self.worked(self._since, time.time())
            self._since = None

    def worked(self, since: float, until: float) -> None:
        """Note when something of it was at work."""
        self.times.append((since, until))
        if len(self.times) > _TIMES:
            self.times[:2] = [(self.times[0][0], self.times[1][1])]

    def at_work(self) -> Times:
        """Return when something of it was at work, until now."""
        return self.times if self._since is None else [*self.times, (self._since, time.time())]


def without(times: Times, others: Times) -> list[tuple[float, float]]:
    """Return what is left of spans of time without others."""
    left = sorted(times)
    for since, until in others:
        pieces = (piece for a, b in left for piece in ((a, min(b, since)), (max(a, until), b)))
        left = [(a, b) for a, b in pieces if a < b]
    return left


class OpenTurns:
    """The open turns of all tenants, and other changes that are known and not on record yet."""

    def __init__(self) -> None:
        self._of: dict[str, dict[Hashable, OpenTurn]] = {}
        self._waiting: dict[str, set[OpenTurn]] = {}

    def get(self, tenant: str, key: Hashable) -> OpenTurn | None:
        return self._of.get(tenant, {}).get(key)

    def open(self, tenant: str, turn: OpenTurn) -> OpenTurn:
        """Return the session's open turn, or open `turn` if there is none."""
        return self._of.setdefault(tenant, {}).setdefault(turn.key, turn)

    def wrote(self, tenant: str, turn: OpenTurn, path: str | None) -> None:
        """Note a path that a turn wrote; one too many for the tenant stands for any."""
        full = sum(len(one.paths) for one in self._of.get(tenant, {}).values()) >= _PATHS_OF_TENANT
        turn.wrote(None if full and path not in turn.paths else path)

    def take(self, tenant: str, key: Hashable) -> OpenTurn | None:
        """Remove and return the session's open turn."""
        of = self._of.get(tenant, {})
        turn = of.pop(key, None)
        if turn is not None and not of:
            del self._of[tenant]
        return turn

    def wait(self, tenant: str, turn: OpenTurn) -> None:
        """Note a change that is known and not on record yet: a turn that has ended, or what was saved."""
        self._waiting.setdefault(tenant, set()).add(turn)

    def recorded(self, tenant: str, turn: OpenTurn) -> None:
        """Forget such a change."""
        if (waiting := self._waiting.get(tenant)) is not None:
            waiting.discard(turn)
            if not waiting:
                del self._waiting[tenant]

    def waiting(self, tenant: str) -> list[OpenTurn]:
        """Return these changes."""
        return list(self._waiting.get(tenant, ()))

    def known(self, tenant: str) -> list[OpenTurn]:
        """Return the tenant's open turns, and the other changes that are known and not on record yet."""
        return [*self._of.get(tenant, {}).values(), *self._waiting.get(tenant, ())]

    def others_at_work(self, tenant: str, turn: OpenTurn) -> Times:
        """Return when commands of other turns were at work that are not on record yet."""
        others = (one for one in self.known(tenant) if one is not turn and one.wide)
        return [span for one in others for span in one.at_work()]

    def forget(self, tenant: str) -> list[OpenTurn]:
        """Remove and return the tenant's open turns."""
        self._waiting.pop(tenant, None)
        return list(self._of.pop(tenant, {}).values())

    def of(self, tenant: str) -> list[OpenTurn]:
        """Return the tenant's open turns."""
        return list(self._of.get(tenant, {}).values())

    def all(self) -> Iterator[tuple[str, OpenTurn]]:
        """Yield each open turn with its tenant."""
        for tenant, of in list(self._of.items()):
            for turn in list(of.values()):
                yield tenant, turn

    def made(self, tenant: str) -> list[str]:
        """Return the paths that open turns are known to have created."""
        return sorted({path for turn in self._of.get(tenant, {}).values() for path in turn.made})

    def share(self, tenant: str, turn: OpenTurn) -> tuple[Mode, list[str]]:
        """Return which changes belong to `turn`: `only` these paths, all `but` these, or `all`.

        A path that another is known to have written belongs to that one, unless both wrote it.
        """
        if not turn.wide:
            return "only", sorted(turn.paths)
        others = {path for other in self.known(tenant) if other is not turn for path in other.paths}
        if not (leave := others - turn.paths):
            return "all", []
        return "but", sorted(leave)
