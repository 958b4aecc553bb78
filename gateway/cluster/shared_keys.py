"""Keys that all gateways of a cluster share, with compare-and-swap: profiles of an Incus project.

Each value of a key is a profile, `KEY@NUMBER`, of which the highest number counts. Incus creates a profile
only if no other has its name, whichever members are asked: so of all who would follow one value, one does.
Values that were followed are deleted after a while, oldest first. So whoever has followed one looks whether
it is still there: if so, nobody had followed it before, however long that took and whatever the clocks say.
If it is not, the caller does not know who came first.

Facts about incusd that shape this module (measured on 6.0.4, three members):

- `If-Match` is no compare-and-swap in a cluster: two members check one ETag before either writes. Of 75
  increments that were all answered with success 35 were left.
- To change a profile or the server asks every member, and takes seconds while one is down. To create one took
  15 ms all the same. To read them takes 0.2 ms each.
- `profile-created` is told to who listens to that project, on every member.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Final, Protocol, Self
from urllib.parse import quote

from gateway.errors import RateLimited, Unavailable
from gateway.incus import Incus, IncusError

NO_QUORUM: Final = "no_quorum"
"""The `reason` of what cannot be decided, since Incus's database has no majority or does not answer."""

KEYS_MAX: Final = 2000  # so that a change ends within the usual patience also on a busy machine
VALUE_MAX: Final = 1000  # characters
_KEY: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,299}")
_VALUE: Final = "user.value"  # none for a key that was removed
_AT: Final = "user.at"
_ID: Final = "user.id"  # tells it from another one with its name
_AFTER: Final = "user.after"  # the id of the one that it followed
_FOLLOWED: Final = 60.0  # seconds that a value is kept after another one followed it
_REMOVED: Final = 3600.0  # seconds that a removed key is remembered
_SWEPT: Final = 10  # profiles that are deleted with one change
_TRIES: Final = 20  # of a change that others always come before
_PAUSE: Final = 0.02  # seconds between two tries at most, times the number of the try
_RETRY_AFTER: Final = 5
# of the project, which has nothing of its own but the keys
_FEATURES: Final = ("images", "storage.volumes", "storage.buckets", "networks", "networks.zones")


class Keys(Protocol):
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


class SharedKeys(Keys, Protocol):
    """Keys that report their changes."""

    def changes(self) -> AsyncIterator[None]:
        """Yield when the keys can be read, and after each change by anyone, until the connection breaks.

        Then it raises `Unavailable`.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Version:
    """One value of a key, None for none; `config` is its profile's, which no other one ever has.

    `at` is when it was set, in seconds since the epoch by its maker's clock: only for deleting it some time.
    """

    number: int
    value: str | None
    at: float
    config: Mapping[str, str]


class IncusKeys:
    """Implements `SharedKeys` in an Incus project, which is made with the first key.

    `patience` bounds each call, in seconds.
    """

    def __init__(self, incus: Incus, patience: float = 2.0) -> None:
        """`incus` must be open, and of the project of the keys."""
        self._incus, self._patience = incus, patience
        self._sweeps = set[asyncio.Task[None]]()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._sweeps:
            task.cancel()
        await asyncio.gather(*self._sweeps, return_exceptions=True)

    async def get(self, key: str) -> str | None:
        check(key)
        async with self._in_time():
            return _value(await self._read(), key)

    async def listed(self, prefix: str) -> Mapping[str, str]:
        async with self._in_time():
            found = await self._read()
        values = {key: _value(found, key) for key in found if key.startswith(prefix)}
        return {key: value for key, value in values.items() if value is not None}

    async def swap(self, key: str, before: str | None, after: str | None) -> bool:
        check(key, after)
        async with self._in_time():
            for attempt in range(_TRIES):
                found = await self._read()
                if _value(found, key) != before:
                    return False
                if before == after:
                    return True
                if after is not None and key not in found and len(found) >= KEYS_MAX:
                    raise RateLimited(f"the cluster shares {KEYS_MAX} keys, which is the limit")
                last = found[key][-1] if key in found else None
                number = 1 if last is None else last.number + 1
                if own := await self._follow(key, number, after, last):
                    await self._check_first(key, number, last, own)
                    self._sweep(found)
                    return True
                await asyncio.sleep(random.uniform(0, _PAUSE * (attempt + 1)))  # noqa: S311 - not a secret
        raise Unavailable(
            "other members keep changing what the cluster shares; try again", reason="contended"
        )

    async def changes(self) -> AsyncIterator[None]:
        async with self._in_time():
            await self._read()  # makes the project, which nobody can listen to before
        try:
            async with contextlib.aclosing(self._incus.events("lifecycle")) as events:
                async for event in events:
                    action = (event.get("metadata") or {}).get("action")
                    if event["type"] == "connected" or action == "profile-created":
                        yield
            raise IncusError("incusd ended the stream of events", 0)
        except IncusError as error:
            raise _unavailable(error) from error

    async def _follow(self, key: str, number: int, value: str | None, last: _Version | None) -> str:
        """Set a key's value of this number; return its id, or "" if another one has the number."""
        own = secrets.token_hex(8)
        config = {_AT: f"{time.time():.0f}", _ID: own} | ({} if value is None else {_VALUE: value})
        config |= {} if last is None else {_AFTER: last.config.get(_ID, "")}
        body: dict[str, Any] = {"name": f"{key}@{number}", "config": config, "devices": {}}
        try:
            await self._incus.operate("POST", "/1.0/profiles", body, timeout=self._patience)
        except IncusError as error:
            if "already exists" in error.message or "UNIQUE" in error.message:
                return ""
            raise
        return own

    async def _check_first(self, key: str, number: int, last: _Version | None, own: str) -> None:
        """Raise `Unavailable` unless `own`, with `number`, is certainly the first to follow `last`."""
        if last is not None and await self._is_there(key, last):
            return
        found = (await self._read()).get(key, ())
        others = [version.number for version in found if version.number != number]
        if not others and (last is None or last.value is None):
            return  # a key that was removed may be forgotten meanwhile
        if any(version.config.get(_AFTER) == own for version in found):
            return  # somebody has followed it already
        if others and max(others) < number:  # the key was forgotten, and set again: that one counts
            await self._delete([f"{key}@{number}"])
        raise Unavailable(
            "other members may have changed this while it took so long; try again", reason="contended"
        )

    async def _is_there(self, key: str, version: _Version) -> bool:
        try:
            path = f"/1.0/profiles/{quote(f'{key}@{version.number}', safe='')}"
            return bool((await self._incus.get(path))["config"] == version.config)
        except IncusError as error:
            if error.status != 404:
                raise
            return False

    def _sweep(self, found: Mapping[str, Sequence[_Version]]) -> None:
        """Delete some of what no longer counts, and do not wait for it."""
        now, old = time.time(), list[str]()
        for key, versions in found.items():
            old += [
                f"{key}@{version.number}"
                for version, next_ in pairwise(versions)
                if next_.at < now - _FOLLOWED
            ]
            if len(versions) == 1 and versions[0].value is None and versions[0].at < now - _REMOVED:
                old.append(f"{key}@{versions[0].number}")
        if old and not self._sweeps:
            task = asyncio.create_task(self._delete(old[:_SWEPT]), name="old shared keys")
            self._sweeps.add(task)
            task.add_done_callback(self._sweeps.discard)

    async def _delete(self, names: Sequence[str]) -> None:
        """Delete profiles in this order, until one cannot be: a value goes only after those before it."""
        for name in names:
            try:
                path = f"/1.0/profiles/{quote(name, safe='')}"
                await self._incus.operate("DELETE", path, timeout=self._patience)
            except IncusError as error:
                if error.status != 404:  # another gateway did
                    return

    async def _read(self) -> dict[str, list[_Version]]:
        """Return the values of each key, the last one counts; make the project if there is none."""
        for _ in range(2):
            try:
                profiles = await self._incus.get("/1.0/profiles", recursion="1")
            except IncusError as error:
                if error.status != 404:
                    raise
            else:
                return _parsed(profiles)
            config = {f"features.{name}": "false" for name in _FEATURES} | {"features.profiles": "true"}
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


def _parsed(profiles: Sequence[Mapping[str, Any]]) -> dict[str, list[_Version]]:
    found: dict[str, list[_Version]] = {}
    for profile in profiles:
        key, at, number = str(profile["name"]).rpartition("@")
        config = profile["config"]
        if at and number.isdecimal():
            version = _Version(int(number), config.get(_VALUE), float(config.get(_AT, 0)), config)
            found.setdefault(key, []).append(version)
    for versions in found.values():
        versions.sort(key=lambda version: version.number)
    return found


def _value(found: Mapping[str, Sequence[_Version]], key: str) -> str | None:
    return found[key][-1].value if key in found else None


def check(key: str, value: str | None = None) -> None:
    """Raise `ValueError` for what cannot be a shared key or its value."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key[:80]!r} is not a key that gateways share")
    if value is not None and not 0 < len(value) <= VALUE_MAX:
        raise ValueError(f"a shared value has 1 to {VALUE_MAX} characters")


def _unavailable(error: IncusError) -> Unavailable:
    return Unavailable(
        "the cluster cannot decide this now: Incus's database has no majority of its members, or does not "
        "answer; try again soon",
        reason=NO_QUORUM,
        retry_after=_RETRY_AFTER,
    )
