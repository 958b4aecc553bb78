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

Members that share a folder instead of Incus: several gateways on one machine.

Chooses the member for a tenant that does not exist yet: the same one, whichever gateway is asked.

So the gateway there sees all requests for it, and makes none of them twice. Once the tenant exists, its home
is where Incus has it.

Tokens that are revoked at all gateways of a cluster.

A revocation is first kept here. Then the other gateways are told, and it is written to a key of the cluster.
There a gateway that was away finds it: at its start, after each connection to Incus, and when keys change.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import math
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import orjson

from gateway.auth.grants import KEPT, Revocations
from gateway.auth.issuing import MAX_TTL
from gateway.errors import GatewayError, RateLimited, Unavailable
from gateway.incus import Incus, IncusError
from gateway.incus.members import NO_QUORUM, Member
from gateway.ownership.reservations import Keys

log = logging.getLogger(__name__)

PATIENCE: Final = 2.0  # seconds for a decision of the cluster, which cannot decide without a quorum
HOME_KEPT: Final = 3600.0  # seconds for which requests for a new tenant go to the member chosen first
KEYS_MAX: Final = 2000  # so that a change ends within the usual patience also on a busy machine
VALUE_MAX: Final = 1000  # characters
_KEY: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,299}")
_VALUE: Final = "user.value"  # none for a key that was removed
_AT: Final = "user.at"
_ID: Final = "user.id"  # tells it from another one with its name
_AFTER: Final = "user.after"  # the id of the one that it followed
_FOLLOWED: Final = 60.0  # seconds that a value is kept after another one followed it
_REMOVED_KEPT: Final = 3600.0  # seconds that a removed key is remembered
_SWEPT: Final = 10  # profiles that are deleted with one change
_TRIES: Final = 20  # of a change that others always come before
_PAUSE: Final = 0.02  # seconds between two tries at most, times the number of the try
_RETRY_AFTER: Final = 5
# of the project, which has nothing of its own but the keys
_FEATURES: Final = ("images", "storage.volumes", "storage.buckets", "networks", "networks.zones")


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

    def __init__(self, incus: Incus, patience: float | None = None) -> None:
        """`incus` must be open, and of the project of the keys."""
        self._incus, self._patience = incus, PATIENCE if patience is None else patience
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
            if len(versions) == 1 and versions[0].value is None and versions[0].at < now - _REMOVED_KEPT:
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
                return _versions(profiles)
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


def _versions(profiles: Sequence[Mapping[str, Any]]) -> dict[str, list[_Version]]:
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


class FolderMembers:
    """The members whose files are beside `file`, whose own name is the file's."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def own(self) -> str:
        return self._file.name

    async def members(self) -> tuple[Member, ...]:
        """Return all members by name, each with what it published."""
        return await asyncio.to_thread(self._read)

    async def names(self) -> Collection[str]:
        return {member.name for member in await self.members()}

    async def publish(self, config: Mapping[str, str]) -> None:
        """Set keys of our own member."""
        await asyncio.to_thread(self._write, config)

    def _read(self) -> tuple[Member, ...]:
        files = sorted(file for file in self._file.parent.iterdir() if not file.suffix)
        return tuple(
            Member(file.name, "127.0.0.1:0", config=orjson.loads(file.read_bytes())) for file in files
        )

    def _write(self, config: Mapping[str, str]) -> None:
        kept = orjson.loads(self._file.read_bytes()) if self._file.exists() else {}
        made = self._file.with_suffix(".new")
        made.write_bytes(orjson.dumps({**kept, **config}))
        made.rename(self._file)


class FolderKeys:
    """Implements `Keys` by a file for each, in a folder that is created with the first. Without limit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def get(self, key: str) -> str | None:
        check(key)
        return await asyncio.to_thread(self._read, key)

    async def listed(self, prefix: str) -> Mapping[str, str]:
        return await asyncio.to_thread(self._list, prefix)

    async def swap(self, key: str, before: str | None, after: str | None) -> bool:
        check(key, after)
        return await asyncio.to_thread(self._swap, key, before, after)

    def _read(self, key: str) -> str | None:
        try:
            return (self._folder / key).read_bytes().decode()
        except FileNotFoundError:
            return None

    def _list(self, prefix: str) -> Mapping[str, str]:
        names = [file.name for file in self._folder.glob("[!.]*") if file.name.startswith(prefix)]
        found = {name: self._read(name) for name in names}
        return {key: value for key, value in found.items() if value is not None}

    def _swap(self, key: str, before: str | None, after: str | None) -> bool:
        self._folder.mkdir(exist_ok=True)
        # no key's name begins with a dot
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._read(key) != before:
                return False
            if after is None:
                (self._folder / key).unlink(missing_ok=True)
            else:
                made = self._folder / ".new"
                made.write_bytes(after.encode())
                made.rename(self._folder / key)
            return True


_HOMES: Final = "home."
_PLACED_MOST: Final = 2000  # names that are chosen for and have not expired
_PLACED_SWEPT: Final = 20  # expired ones that are removed with each choice
_PLACED_TRIES: Final = 10
_PLACED_RETRY_AFTER: Final = 60
_MOVING: Final = 30 * 86_400.0  # seconds that a move's decision stands, for homes that are away meanwhile


class Placements:
    """The recent choices. `members` returns the names of the cluster's members, or raises.

    A choice stands for `HOME_KEPT` seconds, and as long as that is a member. A request that is repeated with
    its Idempotency-Key within that time finds the gateway that knows the key.
    """

    def __init__(self, keys: Keys, members: Callable[[], Awaitable[Collection[str]]]) -> None:
        self._keys, self._members = keys, members

    async def choose(self, tenant: str, wish: str) -> str:
        """Return the home of a tenant to be created: the member that was chosen before, or now `wish`.

        Raises `Unavailable` if the cluster cannot decide, and `RateLimited` if there are too many choices.
        Call it only for callers that may create the tenant.
        """
        key = _HOMES + tenant
        for _ in range(_PLACED_TRIES):
            listed, now = await self._keys.listed(_HOMES), time.time()
            found = listed.get(key)
            member, until = _choice(found)
            if until > now and (member == wish or member in await self._members()):
                return member
            expired = [(old, value) for old, value in listed.items() if _choice(value)[1] <= now]
            if len(listed) - len(expired) >= _PLACED_MOST:
                raise RateLimited(
                    f"{_PLACED_MOST} tenants were placed in {HOME_KEPT:.0f} s, which is the limit; "
                    "try again later",
                    retry_after=_PLACED_RETRY_AFTER,
                )
            for old, value in expired[:_PLACED_SWEPT]:
                if old != key:
                    await self._keys.swap(old, value, None)
            wanted = orjson.dumps([wish, round(now + HOME_KEPT)]).decode()
            if await self._keys.swap(key, found, wanted):
                return wish
        raise Unavailable(f"other members keep choosing a home for {tenant}; try again", reason="contended")

    async def move(self, tenant: str, member: str, move: str) -> None:
        """Decide that a tenant's home is another member from now on. Idempotent.

        Raises `Unavailable`: then `decided` tells whether it was, once the cluster can say.
        """
        key = _HOMES + tenant
        for _ in range(_PLACED_TRIES):
            found = await self._keys.get(key)
            if _move(found) == (member, move):
                return
            value = orjson.dumps([member, round(time.time() + _MOVING), move]).decode()
            if await self._keys.swap(key, found, value):
                return
        raise Unavailable(f"other members keep choosing a home for {tenant}; try again", reason="contended")

    async def decided(self, tenant: str, move: str) -> bool:
        """Return whether a move was decided. Raises `Unavailable` if the cluster cannot say."""
        return _move(await self._keys.get(_HOMES + tenant))[1] == move

    async def is_member(self, name: str) -> bool:
        """Return whether the cluster has a member of this name. Raises `Unavailable` if it cannot say."""
        return name in await self._members()

    async def settle(self, tenant: str, member: str, move: str) -> None:
        """Let a move's decision expire, once all members have seen where the tenant is."""
        key = _HOMES + tenant
        found = await self._keys.get(key)
        if _move(found) == (member, move):
            value = orjson.dumps([member, round(time.time() + HOME_KEPT)]).decode()
            await self._keys.swap(key, found, value)

    async def forget(self, tenant: str, member: str) -> None:
        """Take back the choice of this member, which could not create the tenant and left nothing behind."""
        key = _HOMES + tenant
        found = await self._keys.get(key)
        if found is not None and _choice(found)[0] == member:
            await self._keys.swap(key, found, None)


def _choice(value: str | None) -> tuple[str, float]:
    """Return a choice's member and end. A missing or malformed one counts as ended."""
    try:
        member, until, *_ = orjson.loads(value or "")
        return str(member), float(until)
    except (ValueError, TypeError):
        return "", 0.0


def _move(value: str | None) -> tuple[str, str]:
    """Return the decided member and its move; no move for a choice of another kind."""
    try:
        member, _, move = orjson.loads(value or "")
        return str(member), str(move)
    except (ValueError, TypeError):
        return "", ""


_REVOKED: Final = "revoked."
_ID_MAX: Final = 200  # characters, as the API takes them
_REVOKED_REST: Final = 0.2  # seconds between two looks at the keys
_REVOKED_SWEEP: Final = 3600.0  # seconds between two looks for keys that are no longer needed

Tell = Callable[[str, float], Awaitable[tuple[int, Sequence[str]]]]
"""Tells the other gateways of a token by id and `exp`, within a second.

Returns how many websockets they closed, and who did not hear it.
"""


@dataclass(frozen=True, slots=True)
class Spread:
    """The reach of a revocation: whether the cluster has it, and which members have not heard of it yet.

    `closed` counts the websockets that those closed which heard it.
    """

    recorded: bool
    unheard: Sequence[str]
    closed: int = 0


class Revoking:
    """The revocations of all gateways.

    `end` ends what is open under a token, by its id, and returns how many websockets that closed; it is
    called for each revocation that comes from elsewhere.
    """

    def __init__(self, local: Revocations, keys: Keys, end: Callable[[str], int], tell: Tell) -> None:
        self._local, self._keys, self._end, self._tell = local, keys, end, tell
        self._look = asyncio.Event()

    def look_soon(self) -> None:
        """Check the keys, which may have changed."""
        self._look.set()

    async def spread(self, token: str) -> Spread:
        """Send a stored revocation to all members. Whatever fails now is done later."""
        expires = self._local.standing().get(token, math.inf)
        told, recorded = await asyncio.gather(self._tell(token, expires), self._record(token, expires))
        closed, unheard = told
        return Spread(recorded, unheard, closed)

    async def heard(self, token: str, expires: float, by: str) -> int:
        """Take a revocation from another gateway; return how many websockets that closed.

        Raises what `Revocations.add` raises.
        """
        if token in self._local:
            return 0
        await self._local.add(token, by, expires)
        return self._end(token)

    async def follow(self) -> None:
        """Keep keys and revocations in agreement, until the cluster cannot be reached.

        Then it raises `Unavailable`.
        """
        while True:
            self._look.clear()
            await self.agree()
            await asyncio.sleep(_REVOKED_REST)  # a burst of changes is looked at together
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REVOKED_SWEEP):
                    await self._look.wait()

    async def agree(self) -> None:
        """Adopt what others have written, write what they lack, and remove what has expired."""
        now = time.time()
        listed = await self._keys.listed(_REVOKED)
        there = set[str]()
        for key, value in listed.items():
            token, expires = _revocation(value)
            if expires < now - KEPT:
                await self._keys.swap(key, value, None)
                continue
            there.add(key)
            if token:
                try:
                    await self.heard(token, expires, "cluster")
                except GatewayError as error:
                    log.warning(
                        "this member still accepts a token that was revoked on another one: %s", error.message
                    )
        for token, expires in self._local.standing().items():
            if expires >= now and _key(token) not in there:
                try:
                    await self._write(token, expires)
                except RateLimited as error:
                    log.warning("cannot tell the cluster of every revoked token: %s", error.message)
                    break

    async def _record(self, token: str, expires: float) -> bool:
        try:
            await self._write(token, expires)
        except GatewayError as error:
            log.warning("the whole cluster does not know of a revocation yet: %s", error.message)
            return False
        return True

    async def _write(self, token: str, expires: float) -> None:
        until = time.time() + MAX_TTL if expires == math.inf else expires
        key, value = _key(token), orjson.dumps({"id": token[:_ID_MAX], "expires": until}).decode()
        if not await self._keys.swap(key, None, value) and await self._keys.get(key) is None:
            raise Unavailable("other members keep changing this revocation; try again", reason="contended")


def _key(token: str) -> str:
    """Return the key of a token; an id may have any letters."""
    return _REVOKED + hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _revocation(value: str) -> tuple[str, float]:
    """Return the id and `exp` in a value. A malformed value is ignored, and stays."""
    try:
        found: Mapping[str, Any] = orjson.loads(value)
        return str(found["id"]), float(found["expires"])
    except (ValueError, TypeError, KeyError):
        return "", math.inf
