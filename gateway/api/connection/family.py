"""A family of methods of the wire, and how each is served."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.api.connection.peer import Peer
from gateway.auth.tokens import Token


@dataclass(frozen=True, slots=True)
class Answer:
    """A result, as a value or as JSON, and what to start once it has been sent."""

    value: Mapping[str, Any] | bytes
    then: Callable[[], None] | None = None


def _small(params: Any) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Method:
    """How a method is served. Each callable member takes the request's parameters.

    `most` returns how many bytes the answer may have, 0 for a small one. `fence` prevents a later request
    with the same id from doing what a cancelled one asked for. A refusal of a `decisive` method ends the
    connection.
    """

    answer: Callable[[Any], Awaitable[Answer]]
    most: Callable[[Any], int] = _small
    fence: Callable[[Any], Awaitable[None]] | None = None
    decisive: bool = False


class Family(ABC):
    """A family's methods, and what they have opened on one connection."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._hub = peer.hub
        self._tenant = peer.tenant

    @property
    @abstractmethod
    def methods(self) -> Mapping[str, Method]:
        """The methods by their names on the wire."""

    def end_without(self, token: Token) -> list[str]:
        """End what `token` has no scope for; return notifications that tell the client."""
        return []

    def _end_late(self) -> None:
        """The same for something requested before a token with fewer scopes arrived, and opened only now."""
        assert self._peer.token is not None
        self._peer.tell_soon(self.end_without(self._peer.token))

    def close(self, *, hold: bool) -> None:  # noqa: B027 - most families have nothing open
        """End what is open, since the connection has ended. With `hold` the client may be back soon."""
