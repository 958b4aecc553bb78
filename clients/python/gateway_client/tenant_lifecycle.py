"""A tenant's state over HTTP: start and stop, size, domain, snapshots."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, Final, Literal

from gateway_client.errors import NotFound, Unavailable
from gateway_client.http_client import HttpClient

_LOOK: Final = 0.25  # seconds between two looks at a move


class TenantLifecycle:
    """The part of `Tenant` that manages the tenant as a whole."""

    name: str
    _http: HttpClient

    @property
    def _path(self) -> str:
        return f"/v1/tenants/{self.name}"

    async def info(self) -> Mapping[str, Any]:
        """Return the tenant's state, address and limits."""
        answer: Mapping[str, Any] = await self._http.json("GET", self._path)
        return answer

    async def metrics(self) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = await self._http.json("GET", f"{self._path}/metrics")
        return answer

    async def start(self) -> None:
        await self._http.json("POST", f"{self._path}/start")

    async def stop(self) -> None:
        await self._http.json("POST", f"{self._path}/stop")

    async def sleep(self) -> None:
        """Stop the tenant until it is used again. Raises `Conflict` if it is in use."""
        await self._http.json("POST", f"{self._path}/sleep")

    async def restart(self) -> None:
        await self._http.json("POST", f"{self._path}/restart")

    async def rename(self, domain: str | None) -> None:
        """Change the tenant's domain, or remove it; its name stays."""
        await self._http.json("PATCH", self._path, {"domain": domain})

    async def resize(self, size: Literal["small", "medium", "large"]) -> Mapping[str, Any]:
        """Change the tenant's limits to those of another size while it runs, and return the tenant.

        Raises `Conflict` if it uses more disk or memory than that size has.
        """
        answer: Mapping[str, Any] = await self._http.json("PATCH", self._path, {"size": size})
        return answer

    async def move(self, member: str | None = None, *, drained: bool = False) -> Mapping[str, Any]:
        """Move the tenant to another server of the cluster and return once it runs there.

        `member` names the server, by default the one with most room; `drained` remembers the one that it
        leaves. Calls wait for some seconds, and running commands end. For operators. Raises
        `Unavailable` with the reason if the tenant stays where it is.
        """
        body: dict[str, Any] = {} if member is None else {"member": member}
        if drained:
            body["drained"] = True
        begun: Mapping[str, Any] = await self._http.json("POST", f"{self._path}/move", body)
        last = begun
        while last["id"] != begun["id"] or last["state"] not in ("moved", "failed"):
            await asyncio.sleep(_LOOK)
            with contextlib.suppress(Unavailable, NotFound):  # it may be on its way right now
                last = await self.last_move()
        if last["state"] == "failed":
            raise Unavailable(last["error"]["message"], reason=last["error"].get("reason"))
        return last

    async def last_move(self) -> Mapping[str, Any]:
        """Return the move that is under way, or the last one. Raises `NotFound` if there was none."""
        answer: Mapping[str, Any] = await self._http.json("GET", f"{self._path}/move")
        return answer

    async def delete(self) -> None:
        """Destroy the tenant with all its files and snapshots."""
        await self._http.json("DELETE", self._path)

    # --- snapshots ------------------------------------------------------------------------------------

    async def snapshots(self) -> list[Mapping[str, Any]]:
        """Return name, time and size of each, oldest first."""
        return list((await self._http.json("GET", f"{self._path}/snapshots"))["snapshots"])

    async def snapshot(self, name: str | None = None) -> Mapping[str, Any]:
        """Make a snapshot of the disk; without a name it is named after the time."""
        body = {} if name is None else {"name": name}
        answer: Mapping[str, Any] = await self._http.json("POST", f"{self._path}/snapshots", body)
        return answer

    async def restore(self, snapshot: str) -> None:
        """Restore the disk from a snapshot: stops the tenant, and starts it again if it ran."""
        await self._http.json("POST", f"{self._path}/snapshots/{snapshot}/restore")

    async def delete_snapshot(self, snapshot: str) -> None:
        await self._http.json("DELETE", f"{self._path}/snapshots/{snapshot}")
