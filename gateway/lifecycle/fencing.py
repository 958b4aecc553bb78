"""Freezes this member's tenants that others have copies of, while it has no lease to serve them.

```
lease lost ──► calls are refused, connections closed, the page of an absent site shown, containers frozen
lease back ──► thawed, and all as before
```

Nothing here asks incusd, since it does not answer on a member that is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Final, Protocol

from gateway.cluster.lease import Lease
from gateway.cluster.peers import MemberAway
from gateway.errors import GatewayError, NotFound

log = logging.getLogger(__name__)

_LOOK: Final = 1.0  # seconds between two looks for what runs although there is no lease
_WRITING: Final = 0.5  # seconds to write down what is frozen, before it is
_AT_ONCE: Final = 8  # containers that are frozen or thawed at a time
_FILE: Final = "fenced"
"""In the state dir: the tenants that were frozen, for the process that comes after."""

Page = Callable[[str, bool], None]
"""Has visitors of a domain get a page instead of its site, or no longer."""


class Hands(Protocol):
    """What freezes and thaws; see `gateway.rootfs.cutter`."""

    async def fence(self, tenant: str, *, frozen: bool) -> None: ...


class Fence:
    """The fence around the tenants of the member `own`.

    `copied` returns the tenants of this member that may have a copy elsewhere, and `domain` the domain that
    one had last. `part` closes what clients have open of a tenant. `accused` is called with a suspicion that
    stands against this member, and returns once it is certain which tenants are its own; see `Lease`. `back`
    is called whenever this member has got its lease. `left` returns other members' tenants of which something
    is still here: these stay frozen.
    """

    def __init__(
        self,
        own: str,
        lease: Lease,
        hands: Hands,
        state_dir: Path,
        copied: Callable[[], Collection[str]],
        domain: Callable[[str], str | None],
        part: Callable[[str], Awaitable[None]],
        page: Page,
        accused: Callable[[str], Awaitable[None]],
        back: Callable[[], Awaitable[None]],
        left: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._own, self._lease, self._hands, self._file = own, lease, hands, state_dir / _FILE
        self._copied, self._domain, self._part, self._page = copied, domain, part, page
        self._accused, self._back, self._left = accused, back, left
        self._lifted = asyncio.Event()
        self._frozen = _read(self._file)
        self._pages: dict[str, str] = {}  # domains with a page, by tenant
        self._renewed = asyncio.Event()
        self._few = asyncio.Semaphore(_AT_ONCE)

    def check(self, tenant: str) -> None:
        """Raise `MemberAway` for a tenant that this member may not serve now."""
        if self.holds(tenant):
            raise MemberAway(self._own)

    def holds(self, tenant: str) -> bool:
        """Return whether this member may not serve a tenant now."""
        return tenant in self._frozen or (not self._lease.held and tenant in self._copied())

    # --- the lease ----------------------------------------------------------------------------------

    async def renew(self) -> None:
        """Renew the lease, forever."""
        while True:
            await self.once()
            await asyncio.sleep(self._lease.pause if self._lease.held else min(_LOOK, self._lease.pause))

    async def once(self) -> None:
        """Try once to renew the lease."""
        had = self._lease.held
        try:
            suspicion = await self._lease.renew()
            if suspicion is not None:
                log.warning("other members suspect that this one is lost")
                await self._accused(suspicion)
                await self._lease.clear(suspicion)
                suspicion = await self._lease.renew()
        except GatewayError as error:
            log.log(logging.INFO if had else logging.DEBUG, "cannot renew the lease: %s", error.message)
        if self._lease.held:
            self._renewed.set()

    async def guard(self) -> None:
        """Freeze what runs without a lease, and thaw it with one, forever."""
        while True:
            if self._lease.held:
                self._lifted.set()
            while self._lease.held:
                if self._frozen - {*self._left()}:
                    await self._lift()
                self._renewed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._lease.left + 0.01):
                        await self._renewed.wait()
            await self._raise()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):  # something may have started them
                    await self._renewed.wait()

    async def follow(self) -> None:
        """Whenever this member regains its lease, do what is due then. Runs forever."""
        while True:
            await self._lifted.wait()
            self._lifted.clear()
            try:
                await self._back()
            except GatewayError as error:
                log.warning("cannot restore everything after the lease was lost: %s", error.message)
                self._lifted.set()
                await asyncio.sleep(_LOOK)

    async def _raise(self) -> None:
        """Make these tenants unreachable."""
        tenants = set(self._copied())
        fresh = tenants - self._frozen
        if fresh:
            log.warning("this member has no lease: %s are frozen", ", ".join(sorted(fresh)))
            self._frozen |= fresh
            await self._remember()
        await asyncio.gather(*map(self._freeze, tenants), *map(self._part, fresh))
        for tenant in tenants:
            domain = self._pages.get(tenant) or self._domain(tenant)
            if domain is not None and tenant not in self._pages:
                self._pages[tenant] = domain
                with contextlib.suppress(OSError):
                    self._page(domain, True)

    async def _remember(self) -> None:
        """Record what is frozen, unless the disk is full or slow: nothing may wait for it."""
        try:
            async with asyncio.timeout(_WRITING):
                await asyncio.to_thread(_write, self._file, frozenset(self._frozen))
        except (OSError, TimeoutError) as error:
            log.error("cannot record for the next process what is frozen: %s", error or "it takes too long")

    async def _freeze(self, tenant: str) -> None:
        async with self._few:
            try:
                await self._hands.fence(tenant, frozen=True)
            except NotFound:
                pass  # it does not run
            except GatewayError as error:
                log.error("cannot freeze %s, which still runs without a lease: %s", tenant, error.message)

    async def _lift(self) -> None:
        """Undo the fencing of these tenants."""
        await asyncio.gather(*map(self._thaw, sorted(self._frozen - {*self._left()})))
        if not self._frozen - {*self._left()}:
            log.warning("this member has its lease again: its tenants run again")
        await self._remember()

    async def _thaw(self, tenant: str) -> None:
        async with self._few:
            try:
                with contextlib.suppress(NotFound):
                    await self._hands.fence(tenant, frozen=False)
            except GatewayError as error:
                log.warning("cannot thaw %s yet: %s", tenant, error.message)
                await asyncio.sleep(_LOOK)
                return
        if (domain := self._pages.pop(tenant, None)) is not None:
            with contextlib.suppress(OSError):
                self._page(domain, False)
        self._frozen.discard(tenant)


def _read(file: Path) -> set[str]:
    try:
        return set(file.read_text().split())
    except OSError:
        return set()


def _write(file: Path, tenants: Collection[str]) -> None:
    if tenants:
        new = file.with_suffix(".new")
        new.write_text("".join(f"{tenant}\n" for tenant in sorted(tenants)))
        new.replace(file)  # a kill leaves the one or the other
    else:
        file.unlink(missing_ok=True)
