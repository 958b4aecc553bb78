"""The working directories of named tool sessions, kept across restarts of the gateway."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from gateway.storage.store import Statement, Store, StoreFailed

log = logging.getLogger(__name__)


class Folders:
    """The sessions' folders by tenant and name, except the workspace itself. Created by `opened`."""

    def __init__(self, store: Store, kept: dict[tuple[str, str], str]) -> None:
        self._store = store
        self._kept = kept

    @classmethod
    async def opened(cls, store: Store) -> Folders:
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
