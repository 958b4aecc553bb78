"""The room that a member has for new tenants, as its gateway reports it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from gateway.cluster.known import Known


@dataclass(frozen=True, slots=True)
class Room:
    """`takes` is how many tenants of the usual size its memory suffices for, None if that is not known.

    `running` counts those that run there.
    """

    running: int
    takes: int | None = None

    @classmethod
    def parse(cls, told: object, tenants: Iterable[Known]) -> Room:
        """Parse a peer's report; what an older peer does not report is counted from its `tenants`."""
        match told:
            case {"running": int(running), "takes": int() | None as takes}:
                return cls(running, takes)
        return cls(sum(one.status == "running" for one in tenants))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def used(self, usual: int) -> tuple[bool, float, int]:
        """Return what the member with most room has the least of; `usual` stands for an unknown `takes`.

        It is the share of its memory, so that a larger server gets more, in per cent: less is noise.
        """
        takes = usual if self.takes is None else self.takes
        return takes <= 0, round(self.running / max(1, self.running + takes), 2), self.running
