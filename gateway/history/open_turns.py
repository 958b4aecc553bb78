"""Which turn a change belongs to: the open turns of each tenant, and the paths that each has written."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

Mode = Literal["all", "only", "but"]

_PATHS: Final = 500  # paths that a turn remembers; one with more records every change
_BYTES: Final = 64 << 10  # bytes of these paths
_PATHS_OF_TENANT: Final = 8000  # of all open turns; to sort them takes some 5 ms of the loop


@dataclass(eq=False, slots=True)
class OpenTurn:
    """A session's work until it ends its turn or rests.

    `paths` were written by its file tools; if `wide`, a command of it may have changed any other.
    `made` are the paths that it created. `calls` counts its running calls, `tries` failed recordings. It ends
    at `rested`, of the loop's clock, if no call comes before.
    """

    key: Hashable
    agent: str
    by: str
    title: str = ""
    wide: bool = False
    calls: int = 0
    rested: float = 0.0
    paths: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)
    tries: int = 0
    _bytes: int = 0

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


class OpenTurns:
    """The open turns of all tenants."""

    def __init__(self) -> None:
        self._of: dict[str, dict[Hashable, OpenTurn]] = {}

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

    def forget(self, tenant: str) -> list[OpenTurn]:
        """Remove and return the tenant's open turns."""
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

        A path that another open turn is known to have written belongs to that one, unless both wrote it.
        """
        if not turn.wide:
            return "only", sorted(turn.paths)
        others = {
            path for other in self._of.get(tenant, {}).values() if other is not turn for path in other.paths
        }
        if not (leave := others - turn.paths):
            return "all", []
        return "but", sorted(leave)
