"""Tool sessions: their lifetime, working directory, and the last seen state of each file."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Final, Literal, Protocol

from gateway.admission import Admission, Reservation
from gateway.errors import GatewayError, InvalidParams
from gateway.storage.store import Statement, Store, StoreFailed
from gateway.tools.call import Seen

# ======== gateway/tools/session.py ========
# bytes kept for a file besides its path
_SEEN: Final = 200
SESSIONS: Final = 4096  # named sessions of all tenants: they use at most 1 GiB
TENANT_SESSIONS: Final = 256  # of them for one tenant
SESSION_IDLE: Final = 3600.0  # seconds after which an unused session ends: an agent's longest pause
SESSION_BYTES: Final = 256 << 10  # that a session may use to remember the files that it read
_RETRY_AFTER: Final = 30  # seconds in which a session that is in use may have become idle


class ToolSession:
    """What the calls of one agent share.

    `cwd` is absolute as the tenant sees it; None is the workspace. With `read_before_write` an existing file
    must be read before it is changed. At most `maximum` files in `kept_bytes` are remembered: the least
    recently used is forgotten first, and then counts as not read. `last_used` is in seconds of
    `time.monotonic`. `lifetime` says when the session ends: with its call, with its connection or, if it has
    a name, after disuse. `holders` counts the connections and calls that use a named one.
    """

    def __init__(
        self,
        *,
        lifetime: Literal["call", "connection", "named"] = "call",
        read_before_write: bool = False,
        cwd: str | None = None,
        name: str | None = None,
        maximum: int = 2000,
        kept_bytes: int = 1 << 20,
    ) -> None:
        self.lifetime = lifetime
        self.name = name
        self.ended = False
        self.holders = 0
        self.slot: Reservation[str] | None = None
        self.cwd = cwd
        self.read_before_write = read_before_write
        self.last_used = time.monotonic()
        self._maximum, self._kept_bytes = maximum, kept_bytes
        self._bytes = 0
        self._seen: OrderedDict[str, Seen] = OrderedDict()

    def seen(self, path: str) -> Seen | None:
        found = self._seen.get(path)
        if found is not None:
            self._seen.move_to_end(path)
        return found

    def remember(self, path: str, seen: Seen) -> None:
        """Record the state of a file that was just seen."""
        if path not in self._seen:
            self._bytes += _SEEN + len(path)
        self._seen[path] = seen
        self._seen.move_to_end(path)
        while len(self._seen) > self._maximum or self._bytes > self._kept_bytes:
            self._bytes -= _SEEN + len(self._seen.popitem(last=False)[0])


class Background(Protocol):
    """The background commands of sessions; `gateway.shells` implements it."""

    def busy(self, session: ToolSession) -> bool:
        """Return whether anything of a session runs."""
        ...

    async def end(self, session: ToolSession) -> None:
        """End everything that a session left running, and wait for it."""
        ...


class Sessions:
    """The named tool sessions of all tenants. Used from the event loop only.

    A tenant has at most `TENANT_SESSIONS` and the gateway `SESSIONS`. At the limit, the least
    recently used session ends: the tenant's own or, for the gateway's limit, one of the tenant with most. One
    in use never does. Use as an async context manager: unused sessions end while it is open. Sessions whose
    folder is in `folders` continue from an earlier process.
    """

    def __init__(self, background: Background, folders: SessionFolders | None = None) -> None:
        self._background = background
        self._folders = folders
        # by tenant, least recently used first
        self._of: defaultdict[str, OrderedDict[str, ToolSession]] = defaultdict(OrderedDict)
        self._slots = Admission[str](
            "tool sessions in use",
            each=TENANT_SESSIONS,
            total=SESSIONS,
            hint="end one with session/end",
            retry_after=_RETRY_AFTER,
        )
        self._sweeper: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Sessions:
        for (tenant, name), folder in list(self._folders.kept.items()) if self._folders else ():
            await self._continue(tenant, name, folder)
        self._sweep()
        return self

    async def recall(self, tenant: str) -> None:
        """Continue the tenant's stored sessions, which have been replaced; end the others."""
        if self._folders is None:
            return
        await self._folders.recall(tenant)
        there = {name: folder for (of, name), folder in self._folders.kept.items() if of == tenant}
        for name in [name for name in self._of.get(tenant, ()) if name not in there]:
            self._end(tenant, name)
        for name, folder in there.items():
            await self._continue(tenant, name, folder)

    async def _continue(self, tenant: str, name: str, folder: str) -> None:
        try:
            self.open(tenant, name, False).cwd = folder
        except GatewayError:  # no room for more
            await self._forget(tenant, name)

    async def __aexit__(self, *_: object) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)

    def open(
        self, tenant: str, name: str | None, read_before_write: bool, *, lasting: bool = False
    ) -> ToolSession:
        """Return the tenant's session of that name, or a new one for a caller without a name.

        An unnamed one is for a single call or, if `lasting`, until its owner calls `leave`. Raises
        `RateLimited` if there is no room for another named one.
        """
        if name is None:
            lifetime: Literal["call", "connection"] = "connection" if lasting else "call"
            return self._new(lifetime, read_before_write)
        if not 0 < len(name) <= 128:
            raise InvalidParams("a session's name must have 1 to 128 characters")
        now = time.monotonic()
        found = self._of[tenant].get(name) if tenant in self._of else None
        if found is None or self._unused(found, now):
            self._expire(now)
            self._make_room(tenant)
            found = self._of[tenant][name] = self._new("named", read_before_write, name)
            found.slot = self._slots.hold(tenant)
        self._of[tenant].move_to_end(name)
        found.holders += lasting
        found.read_before_write = read_before_write
        found.last_used = now
        return found

    async def leave(self, session: ToolSession) -> None:
        """End a session with its connection; a named one stays until it has been unused for long."""
        if session.lifetime == "named":
            session.holders -= 1
            session.last_used = time.monotonic()
        else:
            await self._background.end(session)

    async def end(self, session: ToolSession) -> None:
        """End a session and all that it runs. Its name then opens a new one."""
        for tenant, named in list(self._of.items()):
            for name in [name for name, one in named.items() if one is session]:
                self._take(tenant, name)
                await self._forget(tenant, name)
        await self._background.end(session)

    async def keep(self, tenant: str, session: ToolSession) -> None:
        """Store a named session's folder for the gateway's next process."""
        if self._folders is not None and session.name is not None and not session.ended:
            await self._folders.keep(tenant, session.name, session.cwd)

    async def end_named(self, tenant: str, name: str) -> None:
        """End the tenant's session of that name, if it exists."""
        if tenant in self._of and (session := self._of[tenant].get(name)) is not None:
            await self.end(session)

    def forget(self, tenant: str) -> None:
        """Forget a destroyed tenant, so that the next one of its name has no sessions."""
        for name in list(self._of.get(tenant, ())):
            self._end(tenant, name)

    def _new(
        self,
        lifetime: Literal["call", "connection", "named"],
        read_before_write: bool,
        name: str | None = None,
    ) -> ToolSession:
        return ToolSession(
            lifetime=lifetime, read_before_write=read_before_write, name=name, kept_bytes=SESSION_BYTES
        )

    def _make_room(self, tenant: str) -> None:
        """End idle sessions until one more fits. Raises `RateLimited` if all are in use."""
        while (full := self._slots.full(tenant)) is not None:
            # from the tenant with most, so that no tenant is left without because of another
            most = sorted(self._of, key=self._slots.of, reverse=True) if full.of == "all" else [tenant]
            if not any(map(self._drop, most)):
                raise self._slots.refusal(full)

    def _drop(self, tenant: str) -> bool:
        """End the tenant's least recently used session; return False if all are in use."""
        for name, session in self._of.get(tenant, OrderedDict()).items():
            if not session.holders and not self._background.busy(session):
                self._end(tenant, name)
                return True
        return False

    def _sweep(self) -> None:
        self._expire(time.monotonic())
        pause = min(SESSION_IDLE / 4, 30.0)
        self._sweeper = asyncio.get_running_loop().call_later(pause, self._sweep)

    def _expire(self, now: float) -> None:
        """End the sessions that have not been used for long."""
        for tenant, named in list(self._of.items()):
            for name in [name for name, session in named.items() if self._unused(session, now)]:
                self._end(tenant, name)

    def _unused(self, session: ToolSession, now: float) -> bool:
        return not session.holders and session.last_used < now - SESSION_IDLE

    def _take(self, tenant: str, name: str) -> ToolSession:
        session = self._of[tenant].pop(name)
        if session.slot is not None:
            session.slot.release()
        if not self._of[tenant]:
            del self._of[tenant]
        return session

    def _end(self, tenant: str, name: str) -> None:
        task = asyncio.create_task(self._ended(tenant, name, self._take(tenant, name)))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _ended(self, tenant: str, name: str, session: ToolSession) -> None:
        await self._forget(tenant, name)
        await self._background.end(session)

    async def _forget(self, tenant: str, name: str) -> None:
        if self._folders is not None:
            await self._folders.forget(tenant, name)


# ======== gateway/tools/session.py ========
log = logging.getLogger(__name__)


class SessionFolders:
    """The sessions' folders by tenant and name, except the workspace itself. Created by `opened`."""

    def __init__(self, store: Store, kept: dict[tuple[str, str], str]) -> None:
        self._store = store
        self._kept = kept

    @classmethod
    async def opened(cls, store: Store) -> SessionFolders:
        """Open what earlier processes have stored."""
        await store.settled()
        rows = await store.read(
            lambda connection: connection.execute("SELECT tenant, session, folder FROM folders").fetchall()
        )
        return cls(store, {(tenant, session): folder for tenant, session, folder in rows})

    async def recall(self, tenant: str) -> None:
        """Read a tenant's folders again, since those in the store have been replaced."""
        rows = await self._store.read(
            lambda connection: connection.execute(
                "SELECT session, folder FROM folders WHERE tenant = ?", (tenant,)
            ).fetchall()
        )
        for key in [key for key in self._kept if key[0] == tenant]:
            del self._kept[key]
        self._kept |= {(tenant, session): folder for session, folder in rows}

    @property
    def kept(self) -> Mapping[tuple[str, str], str]:
        """All stored folders."""
        return self._kept

    async def keep(self, tenant: str, session: str, folder: str | None) -> None:
        """Store a session's folder; None is the workspace. A failed write is only logged."""
        if folder is None:
            await self.forget(tenant, session)
        elif self._kept.get((tenant, session)) != folder:
            self._kept[tenant, session] = folder
            await self._note((_INSERT, (tenant, session, folder)))

    async def forget(self, tenant: str, session: str) -> None:
        """Remove the folder of a session that has ended."""
        if self._kept.pop((tenant, session), None) is not None:
            await self._note(("DELETE FROM folders WHERE tenant = ? AND session = ?", (tenant, session)))

    async def _note(self, statement: Statement) -> None:
        try:
            await self._store.note(statement)
        except StoreFailed as failed:
            log.warning("a session's folder will not be known after this process: %s", failed.message)


_INSERT = "INSERT INTO folders VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET folder = excluded.folder"
