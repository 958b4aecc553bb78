"""One deployment from the client's side: its events and its end."""

from __future__ import annotations

import asyncio
import base64
import io
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from gateway_client.errors import GatewayError, from_wire
from gateway_client.events import Event, EventStream, event_query
from gateway_client.http_client import HttpClient

if TYPE_CHECKING:
    import tarfile

# the last events of a deployment
_ENDS: Final = ("deployment.succeeded", "deployment.rolledback")
_ENDED: Final = ("succeeded", "rolledback")
# seconds to wait for the stored events of an ended deployment
SETTLE: Final = 5.0
# left out by the gateway too, so not worth sending
_LEFT_OUT: Final = frozenset({"node_modules", ".venv", "__pycache__", ".git", ".DS_Store"})


@dataclass(frozen=True, slots=True)
class Phase:
    """One step of a deployment; `ms` once it is done."""

    name: str
    state: Literal["waiting", "running", "done", "failed", "undone"]
    ms: int | None


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """A deployment's current state. `error` is why it failed; `all` has every member."""

    id: str
    tenant: str
    domain: str
    url: str
    kind: Literal["create", "update"]
    state: Literal["waiting", "running", "succeeded", "undoing", "rolledback"]
    phases: Sequence[Phase]
    ms: int | None
    error: GatewayError | None
    all: Mapping[str, Any]

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> DeploymentRecord:
        phases = [Phase(one["name"], one["state"], one.get("ms")) for one in value["phases"]]
        error = None
        if told := value.get("error"):
            facts = {name: fact for name, fact in told.items() if name not in ("code", "message")}
            error = from_wire(told["code"], told["message"], facts)
        return cls(
            value["id"],
            value["tenant"],
            value["domain"],
            value["url"],
            value["kind"],
            value["state"],
            phases,
            value.get("ms"),
            error,
            value,
        )


@dataclass(frozen=True, slots=True)
class History:
    """A tenant's deployments, newest first; `live` is the one served, `kept` those it can go back to.

    `live` and `kept` are ids of deployments; `live` is None where it is not known.
    """

    deployments: Sequence[DeploymentRecord]
    live: str | None
    kept: Sequence[str]
    all: Mapping[str, Any]

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> History:
        records = [DeploymentRecord.parse(record) for record in value["deployments"]]
        return cls(records, value["live"], [one["id"] for one in value["kept"]], value)


class Deployment:
    """One attempt to deploy a site. Made by `Client.deploy` or `Client.deployment`.

    It runs in the gateway, with or without a client.
    """

    def __init__(self, http: HttpClient, deployment_id: str) -> None:
        self.id = deployment_id
        self._http = http
        self._path = f"/v1/deployments/{deployment_id}"

    async def record(self) -> DeploymentRecord:
        """Return its current state."""
        return DeploymentRecord.parse(await self._http.json("GET", self._path))

    async def cancel(self) -> DeploymentRecord:
        """Cancel it and return once it is undone; one that has ended stays as it is."""
        return DeploymentRecord.parse(await self._http.json("DELETE", self._path))

    async def wait(self) -> DeploymentRecord:
        """Wait for its end and return it. Raises the typed error of a failure, once all is undone."""
        while (record := await self.record()).state not in _ENDED:
            async for _ in self.events():
                pass
        if record.error is not None:
            raise record.error
        return record

    async def events(self) -> AsyncIterator[Event]:
        """Yield its events from the first to the last, including past ones.

        Needs the scope `events`. If some are no longer kept, a `gap` comes in their place.
        """
        begun = False
        missing: Event | None = None  # a gap that may not be one: nothing precedes the first event
        deadline: float | None = None
        query = event_query(types="deployment.*", deployment=self.id)
        async with EventStream(self._http, query, last_event_id=0) as stream:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        event = await anext(stream, None)
                except TimeoutError:  # its last event is no longer stored
                    event = None
                if event is None:
                    if missing is not None:
                        yield missing
                    return
                if event.type == "gap":
                    missing = event
                    # its end may be missing too: then only the record shows it
                    if (await self.record()).state in _ENDED:
                        deadline = asyncio.get_running_loop().time() + SETTLE
                    continue
                if missing is not None and (begun or event.type != "deployment.started"):
                    yield missing
                missing, begun = None, True
                yield event
                if event.type in _ENDS:
                    return


def template_body(template: str | bytes | os.PathLike[str]) -> str | dict[str, str]:
    """Return a template for a request: a name unchanged, a folder or a tar as an archive."""
    if isinstance(template, str):
        return template
    archive = template if isinstance(template, bytes) else _packed(Path(template))
    return {"archive": base64.b64encode(archive).decode()}


def _packed(folder: Path) -> bytes:
    """Return a tar of what is in a folder, without what its .gitignore files leave out."""
    import tarfile

    from gateway_client.ignored import Ignored

    ignored = Ignored(folder)

    def chosen(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        left_out = entry.name.rpartition("/")[2] in _LEFT_OUT or ignored(entry.name, is_folder=entry.isdir())
        return None if left_out else entry

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        for entry in sorted(folder.iterdir()):
            archive.add(entry, entry.name, filter=chosen)
    return buffer.getvalue()
