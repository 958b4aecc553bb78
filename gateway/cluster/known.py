"""What gateways report to one another about their tenants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

MOST: Final = 10_000
"""Tenants of one member that are kept; more are not told."""
_TOGETHER: Final = 100  # tenants in one line
_TEXT: Final = 300  # characters of one member; a domain has at most 253


@dataclass(frozen=True, slots=True)
class Known:
    """One tenant as its home reports it. `instance` is the id that no later tenant of its name has."""

    name: str
    domain: str | None = None
    status: str = "stopped"
    asleep: bool = False
    instance: str | None = None
    created: str | None = None

    @classmethod
    def parse(cls, told: object) -> Known:
        """Return a tenant from a peer's line. Raises `ValueError` if it is malformed."""
        match told:
            case {"name": str(name), "status": str(status), "asleep": bool(asleep), **more}:
                domain, instance, created = (
                    _text(more.get(key)) for key in ("domain", "instance", "created")
                )
                return cls(str(_text(name)), domain, str(_text(status)), asleep, instance, created)
        raise ValueError("not a tenant")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _text(told: object) -> str | None:
    if told is None or (isinstance(told, str) and len(told) <= _TEXT):
        return told
    raise ValueError("not a property of a tenant")


def lines(before: Mapping[str, Known], now: Mapping[str, Known]) -> Iterator[dict[str, Any]]:
    """Yield the difference between two states, in lines of bounded size."""
    gone = [name for name in before if name not in now]
    told = [known for name, known in now.items() if before.get(name) != known]
    for start in range(0, max(len(gone), len(told)), _TOGETHER):
        part = slice(start, start + _TOGETHER)
        yield {"tenants": [known.to_dict() for known in told[part]], "gone": gone[part]}


def apply(line: Mapping[str, Any], tenants: dict[str, Known]) -> bool:
    """Apply one of these lines; return whether it changed anything. Raises `ValueError`."""
    gone, told = line.get("gone", ()), line.get("tenants", ())
    if not isinstance(gone, list | tuple) or not isinstance(told, list | tuple):
        raise ValueError("not a line of tenants")
    for name in gone:
        tenants.pop(name, None)
    for known in map(Known.parse, told):
        if known.name in tenants or len(tenants) < MOST:
            tenants[known.name] = known
    return bool(gone or told)


def first(tenants: Iterable[Known]) -> dict[str, Known]:
    """Return the tenants by name, at most `MOST`."""
    return {known.name: known for known, _ in zip(tenants, range(MOST), strict=False)}
