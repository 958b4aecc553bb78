"""Keys that all gateways of a cluster share, with compare-and-swap: `user.*` of an Incus project.

Incus replicates them by Raft before it answers, and refuses a change whose `If-Match` is not the present
ETag. They are for what is decided seldom, and without a quorum nothing is.

Facts about incusd that shape this module (measured on 6.0.4):

- PATCH of a project removes every key that it does not name, as PUT does. So all of them are written each
  time: with three members on one busy machine a change takes 20 ms with few keys, 30 to 50 ms with a hundred,
  150 to 270 ms with a thousand. To read them takes 4 to 8 ms.
- PATCH of the server or of a profile asks every member, and takes seconds while one is down. Of a project it
  asks none.
- `project-updated` is told to who listens to that project, on every member.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Protocol, Self
from urllib.parse import quote

from gateway.errors import RateLimited, Unavailable
from gateway.incus import Incus, IncusError

NO_QUORUM: Final = "no_quorum"
"""The `reason` of what cannot be decided, since Incus's database has no majority or does not answer."""

KEYS_MAX: Final = 4000  # so that a change ends within the usual patience also on a busy machine
VALUE_MAX: Final = 1000  # characters
_KEY: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,299}")
_PREFIX: Final = "user."
_WAITING: Final = 1000  # changes that wait at once
_TRIES: Final = 20  # of a change that others always come before
_PAUSE: Final = 0.02  # seconds between two tries at most, times the number of the try
_RETRY_AFTER: Final = 5
# shares everything with the default project: it is there for its keys alone
_FEATURES: Final = ("images", "profiles", "storage.volumes", "storage.buckets", "networks", "networks.zones")


class SharedKeys(Protocol):
    """Short texts by key, the same for all gateways of a cluster.

    Each method raises `Unavailable`, with a `reason`, within a bounded time if the cluster cannot decide.
    Then it is not known whether a swap was made: make one that can be repeated.
    """

    async def get(self, key: str) -> str | None:
        """Return the value of a key, None if there is none."""
        ...

    async def listed(self, prefix: str) -> Mapping[str, str]:
        """Return all keys that begin with `prefix`, with their values."""
        ...

    async def swap(self, key: str, before: str | None, after: str | None) -> bool:
        """Set a key if its value is `before`; return whether it was. None stands for no key.

        Raises `RateLimited` if there are too many keys.
        """
        ...

    def changes(self) -> AsyncIterator[None]:
        """Yield when the keys can be read, and after each change by anyone, until the connection breaks.

        Then it raises `Unavailable`.
        """
        ...


@dataclass(slots=True)
class _Swap:
    key: str
    before: str | None
    after: str | None
    done: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class IncusKeys:
    """Implements `SharedKeys` in an Incus project, which is made with the first key.

    Use as an async context manager. `patience` bounds each call, in seconds. Swaps that are asked for while
    another is under way are made together, in one request.
    """

    def __init__(self, incus: Incus, patience: float = 2.0) -> None:
        """`incus` must be open, and of the project of the keys."""
        self._incus, self._patience = incus, patience
        self._path = f"/1.0/projects/{quote(incus.project, safe='')}"
        self._waiting: list[_Swap] = []
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    async def get(self, key: str) -> str | None:
        check(key)
        async with self._in_time():
            config, _ = await self._read()
        return config.get(_PREFIX + key)

    async def listed(self, prefix: str) -> Mapping[str, str]:
        async with self._in_time():
            config, _ = await self._read()
        start = _PREFIX + prefix
        return {key.removeprefix(_PREFIX): value for key, value in config.items() if key.startswith(start)}

    async def swap(self, key: str, before: str | None, after: str | None) -> bool:
        check(key, after)
        if len(self._waiting) >= _WAITING:
            raise RateLimited("too many decisions of the cluster wait; ask again", retry_after=_RETRY_AFTER)
        swap = _Swap(_PREFIX + key, before, after)
        self._waiting.append(swap)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="shared keys")
        async with self._in_time():
            return await swap.done

    async def changes(self) -> AsyncIterator[None]:
        async with self._in_time():
            await self._read()  # makes the project, which nobody can listen to before
        try:
            async with contextlib.aclosing(self._incus.events("lifecycle")) as events:
                async for event in events:
                    action = (event.get("metadata") or {}).get("action")
                    if event["type"] == "connected" or action == "project-updated":
                        yield
            raise IncusError("incusd ended the stream of events", 0)
        except IncusError as error:
            raise _unavailable(error) from error

    async def _write(self) -> None:
        while self._waiting:
            swaps, self._waiting = self._waiting, []
            try:
                await self._swap_all(swaps)
            except (IncusError, Unavailable, RateLimited) as error:
                for swap in swaps:
                    if not swap.done.done():
                        known = _unavailable(error) if isinstance(error, IncusError) else error
                        swap.done.set_exception(known)

    async def _swap_all(self, swaps: Sequence[_Swap]) -> None:
        for number in range(_TRIES):
            config, tag = await self._read()
            wanted, answers = dict(config), list[tuple[_Swap, bool]]()
            for swap in swaps:
                if swap.done.done():  # nobody waits for it any more
                    continue
                same = wanted.get(swap.key) == swap.before
                answers.append((swap, same))
                if same and swap.after is None:
                    wanted.pop(swap.key, None)
                elif same and swap.after is not None:
                    wanted[swap.key] = swap.after
            if len(wanted) > max(KEYS_MAX, len(config)):
                raise RateLimited(f"the cluster shares {KEYS_MAX} keys, which is the limit")
            try:
                if wanted != config:
                    await self._incus.operate(
                        "PUT", self._path, {"config": wanted}, timeout=self._patience, if_match=tag
                    )
            except IncusError as error:
                if error.status != 412:
                    raise
            else:
                for swap, same in answers:
                    if not swap.done.done():
                        swap.done.set_result(same)
                return
            await asyncio.sleep(random.uniform(0, _PAUSE * (number + 1)))  # noqa: S311 - not a secret
        raise Unavailable("others change what the cluster shares all the time; ask again", reason="contended")

    async def _read(self) -> tuple[dict[str, str], str]:
        """Return the project's configuration and its ETag; make the project if there is none."""
        for _ in range(2):
            try:
                found, tag = await self._incus.get_tagged(self._path)
            except IncusError as error:
                if error.status != 404:
                    raise
            else:
                return found["config"], tag
            config = {f"features.{name}": "false" for name in _FEATURES}
            body: dict[str, Any] = {
                "name": self._incus.project,
                "config": config,
                "description": "what the gateways of this cluster share",
            }
            try:
                await self._incus.operate("POST", "/1.0/projects", body, timeout=self._patience)
            except IncusError as error:
                if error.status == 0:
                    raise
                failed = error  # another gateway may have made it just now
        raise failed

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._patience):
                yield
        except IncusError as error:
            raise _unavailable(error) from error
        except TimeoutError:
            raise _unavailable(IncusError("incusd did not answer in time", 0)) from None


def check(key: str, value: str | None = None) -> None:
    """Raise `ValueError` for what cannot be a shared key or its value."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key[:80]!r} is no key that gateways share")
    if value is not None and not 0 < len(value) <= VALUE_MAX:
        raise ValueError(f"a shared value has 1 to {VALUE_MAX} characters")


def _unavailable(error: IncusError) -> Unavailable:
    return Unavailable(
        "the cluster cannot decide this now: Incus's database has no majority of its members, or does not "
        "answer; ask again soon",
        reason=NO_QUORUM,
        retry_after=_RETRY_AFTER,
    )
