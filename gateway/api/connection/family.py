"""Methods of the wire that belong together, and how one of them is served."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.api.connection.peer import Peer
from gateway.auth.tokens import Token


@dataclass(frozen=True, slots=True)
class Answer:
    """A result, as a value or as JSON, and what starts only after it was sent."""

    value: Mapping[str, Any] | bytes
    then: Callable[[], None] | None = None


def _small(params: Any) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Method:
    """How a method is served; every member that is called takes the request's parameters.

    `most` returns how many bytes the answer may have, 0 for one that is small. `fence` sees to it that what a
    cancelled request asked for is not made by another of its id. Where a method is `decisive` its refusal
    ends the connection.
    """

    answer: Callable[[Any], Awaitable[Answer]]
    most: Callable[[Any], int] = _small
    fence: Callable[[Any], Awaitable[None]] | None = None
    decisive: bool = False


class Family(ABC):
    """Methods that belong together, and what they have opened on one connection."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._hub = peer.hub
        self._tenant = peer.tenant

    @property
    @abstractmethod
    def methods(self) -> Mapping[str, Method]:
        """How each method is served, by its name on the wire."""

    def end_without(self, token: Token) -> list[str]:
        """End what `token` has no scope for; return the notifications that tell the client."""
        return []

    def _end_late(self) -> None:
        """Do so with what was asked for before a token with fewer scopes came, and is there only now."""
        assert self._peer.token is not None
        self._peer.tell_soon(self.end_without(self._peer.token))

    def close(self, *, hold: bool) -> None:  # noqa: B027 - most families have nothing open
        """End what is open: the connection has ended. With `hold` the client may be back soon."""
