"""Retries: how long to wait after a failure, when to give up, and which state to report."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gateway_client.errors import GatewayError

State = Literal["idle", "connected", "reconnecting", "closed"]


@dataclass(frozen=True, slots=True)
class Retry:
    """How a client reconnects after a break: at once, then after pauses that double up to `most` seconds.

    A part of each pause is random, so that many clients of one gateway do not reconnect together. After
    `patience` seconds without a gateway the failure is raised; the default is how long a command outlives its
    last reader. Only a client that was connected before tries again: a wrong address raises at once.
    """

    first: float = 0.1
    most: float = 5.0
    patience: float = 60.0


@dataclass(frozen=True, slots=True)
class Change:
    """A change of state of the connection to a tenant or, if that is None, of an event stream.

    While `reconnecting`, `error` is the last failure; while `connected`, why its token could not be renewed.
    """

    tenant: str | None
    state: State
    error: GatewayError | None = None


OnChange = Callable[[Change], None]


class Patience:
    """The attempts of one operation. Call `restore` after progress."""

    def __init__(self, retry: Retry | None) -> None:
        self._retry = retry
        self._attempts = 0
        self._end = 0.0

    def pause(self) -> float | None:
        """Return the seconds to wait before the next attempt, None if there is none."""
        retry, now = self._retry, time.monotonic()
        if retry is None:
            return None
        if self._attempts == 0:
            self._end = now + retry.patience
        self._attempts += 1
        if self._attempts == 1:
            return 0.0
        if now >= self._end:
            return None
        longest = min(retry.most, retry.first * 2.0 ** min(self._attempts - 2, 32))
        # no secret depends on it
        return min(longest * random.uniform(0.5, 1.0), max(0.0, self._end - now))  # noqa: S311

    def restore(self) -> None:
        self._attempts = 0
