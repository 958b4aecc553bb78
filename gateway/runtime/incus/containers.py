"""Where the tenants' containers are on this host: their files, and their init processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.errors import NotFound, Unavailable
from gateway.incus import Incus
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.instance_record import is_tenant
from gateway.runtime.incus.errors import translated
from gateway.runtime.incus.records import disk_state
from gateway.settings import Settings


@dataclass(frozen=True, slots=True)
class _Container:
    root: FilesystemRoot
    init_pid: int


class Containers:
    """The containers of one Incus project's tenants.

    What is found is kept while `standing` returns true, that is, as long as the event stream would report a
    change; `forget` then drops it.
    """

    def __init__(self, settings: Settings, incus: Incus, standing: Callable[[], bool]) -> None:
        self._settings, self._incus, self._standing = settings, incus, standing
        self._found: dict[str, _Container] = {}
        self.leaving: set[str] = set()
        """Tenants on their way to another member: nothing of them is touched, and their end is no event."""

    async def filesystem(self, name: str) -> FilesystemRoot:
        """Return where the tenant's files are, also for a stopped tenant."""
        return (await self._find(name)).root

    async def init_pid(self, name: str) -> int:
        """Return the current host pid of the container's init process, 0 if it is not running."""
        return (await self._find(name)).init_pid

    def forget(self, name: str | None) -> None:
        """Drop what is kept of a tenant that may have changed, or of all."""
        if name is None:
            self._found.clear()
        else:
            self._found.pop(name, None)

    async def _find(self, name: str) -> _Container:
        if name in self.leaving:
            raise Unavailable(f"tenant {name} is moving to another server; try again", reason="moving")
        if (found := self._found.get(name)) is not None:
            return found
        standing = self._standing()  # or a change during the lookup could be missed
        with translated(name):
            instance, init_pid = await self._incus.started(name)
        if not is_tenant(instance):
            raise NotFound(f"no tenant {name}")
        found = _Container(FilesystemRoot(name, self._settings.workspace, disk_state(instance)), init_pid)
        if standing and self._standing():
            self._found[name] = found
        return found
