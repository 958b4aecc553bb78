"""Requests to incusd: instances, operations, commands, the event stream.

Facts about incusd that shape this module (measured on 6.0.4):

- An operation's record is kept for 5 s after its end, and a plain GET of one that is just ending can crash
 incusd before 6.0.6 (lxc/incus 8d05249b9b). So `/wait` is requested as soon as the operation is known, and
 the record is read only after `/wait` has returned.
- While an instance is copied to another member (a standby copy, the rounds of a move), changes of it are
 refused; commands in it are not.
- For a failed operation, `/wait` returns an error without the operation's metadata.

In a cluster an `Incus` is that of one member: others' instances are not among its own, and where a request
would ask the other members too, of which one may be dead, only this one answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from gateway.incus.exec_sockets import ExecSockets, OperationWait, connect
from gateway.incus.inventory import Inventory, Lacks, States, start_of, touched_by
from gateway.incus.memory import ExecMemory
from gateway.incus.monitor import concerns, first_process, heard
from gateway.incus.rest import Elsewhere, IncusError, NotAwaited, Operation, Rest, instance_path, unreachable
from gateway.incus.stream_socket import OperationOver, StreamSocket

__all__ = ["Elsewhere", "Incus", "IncusError", "instance_path"]

# bytes of one instance with its state, which lists all network interfaces and addresses the tenant creates:
# ten thousand of them take 1 MB and 5 ms to parse
_STATE_MAX = 1 << 20
# in a message of internal/server/instance/operationlock: Incus refuses what it could let wait
_COPYING = 'is busy running a "migrate" operation'
_PAUSE = 0.2  # seconds between two attempts meanwhile, of which nobody tells the end
_PIDS = 4096  # instances whose init pid is cached


class Incus(Rest):
    """One incusd, within one project. An async context manager; safe for concurrent calls.

    In a cluster it makes and returns the instances of its own member only; for others' it raises `Elsewhere`.
    """

    def __init__(self, socket: Path, project: str = "default", timeout: float = 30.0) -> None:
        super().__init__(socket, project, timeout)
        self._inventory = Inventory(self._list, self._find)
        self._states = States(lambda name: self._find(name, state=True))
        self._pids: dict[str, tuple[str, int]] = {}  # by instance: id of its start, init pid
        self._member: str | None = None

    async def member(self) -> str:
        """Return the name of this server in its cluster, empty if it is in none. Asked once.

        Raises `IncusError`.
        """
        if self._member is None:
            self._member = member_of(await self.get("/1.0"))
        return self._member

    @property
    def known_member(self) -> str:
        """What `member` returned, empty before: any answer about instances comes after that."""
        return self._member or ""

    async def own(self, path: str, **query: str) -> Any:
        """Return the metadata of a GET as this member answers it for itself, without asking the others.

        Raises `IncusError`.
        """
        if not await self.member():
            return await self.get(path, **query)
        return (await self._request("GET", path, query=query, alone=True))["metadata"]

    async def names(self) -> set[str]:
        """Return the names of all instances of the project, including those of dead members.

        Raises `IncusError`, in a cluster without a quorum after a while.
        """
        found = await self.get("/1.0/instances")
        return {unquote(str(url).split("?")[0].rpartition("/")[2]) for url in found}

    async def _here(self, found: Mapping[str, Any]) -> None:
        """Raise `Elsewhere` unless an instance is on this server."""
        location = found.get("location")
        if location not in (None, "", "none") and location != await self.member():
            raise Elsewhere(str(found.get("name")), str(location))

    async def state(self, name: str) -> dict[str, Any]:
        """Return the state of an instance. Raises `IncusError`."""
        path = instance_path(name, "state")
        found: dict[str, Any] = (await self._request("GET", path, most=_STATE_MAX))["metadata"]
        return found

    async def instances(self, *, state: Lacks | None = None) -> list[dict[str, Any]]:
        """Return all instances of the project; those for which `state` returns true include their state.

        An instance being created or deleted may be missing. Each state costs incusd some 10 ms: see `states`.
        The result is shared: do not modify it.
        """
        found = await self._inventory.all()
        return found if state is None else await self._states.added(found, state)

    async def _bare(self, name: str) -> dict[str, Any]:
        """Return an instance without its state. Raises `Elsewhere` and `IncusError`."""
        found: dict[str, Any] = await self.get(instance_path(name))
        await self._here(found)
        return found

    async def _list(self) -> list[dict[str, Any]]:
        found = await self.own("/1.0/instances", recursion="1")
        # Incus 6.0.4 lists a stopping instance by its name alone, for up to a second: see `instance`.
        whole = [
            await self._find(entry["name"], state=True) if entry.get("config") is None else entry
            for entry in found
        ]
        return [entry for entry in whole if entry is not None]

    async def _find(self, name: str, *, state: bool = False) -> dict[str, Any] | None:
        try:
            found = await (self.instance(name) if state else self._bare(name))
        except Elsewhere:
            return None
        except IncusError as error:
            if error.status == 0 or (error.status != 404 and not state):
                raise
            return None
        return None if found.get("config") is None else found

    async def instance(
        self, name: str, *, state: Lacks | None = None, as_listed: bool = False
    ) -> dict[str, Any]:
        """Return an instance with its `state`, which is empty while it stops or if it is too large.

        If `state` is given and returns false for the instance, its state is not fetched, since incusd starts
        two processes for it, and is left empty. With `as_listed` the rest is what `instances` would return,
        mostly without a request: a change by others is known some milliseconds later. Raises `IncusError`.
        """
        path = instance_path(name)
        if state is not None:
            bare = await (self._inventory.one(name, self._bare) if as_listed else self._bare(name))
            if bare.get("config") is not None and not state(bare):
                return {**bare, "state": {}}
        try:
            answer = await self._request("GET", path, query={"recursion": "1"}, most=_STATE_MAX)
            found: dict[str, Any] = answer["metadata"]
        except IncusError as error:
            if error.status == 0 or (error.status == 404):
                raise
            # its init has ended but Incus does not know yet ("Invalid PID"), or the state is too large
            found = await self._bare(name)
        await self._here(found)
        return {**found, "state": found.get("state") or {}}

    async def profile(self, name: str) -> dict[str, Any]:
        """Return a profile. The result is shared: do not modify it. Raises `IncusError`."""
        return await self._inventory.profile(name, lambda: self.get(f"/1.0/profiles/{quote(name, safe='')}"))

    async def started(self, name: str) -> tuple[dict[str, Any], int]:
        """Return an instance and the host pid of its init process, 0 if it is not running.

        A change by others is known some milliseconds later. The pid is looked up once per start: on this host
        if possible (see `monitor`), else in the instance's `state`. Raises `IncusError`.
        """
        found = await self._inventory.one(name, self._bare)
        if found.get("config") is None:  # it is stopping
            return await self.instance(name), 0
        if found["status"] == "Stopped":
            return found, 0
        start = start_of(found)
        known, pid = self._pids.get(name, ("", 0))
        if known != start:
            runs = found["status"] == "Running"
            since = found.get("last_used_at") or ""
            pid = first_process(self.socket.parent, self._on_host(name), since) if runs else 0
            pid = pid or int((await self.instance(name))["state"].get("pid") or 0)
            if pid and runs:
                self._pids[name] = start, pid
                while len(self._pids) > _PIDS:
                    del self._pids[next(iter(self._pids))]
        return found, pid

    def _on_host(self, name: str) -> str:
        """Return an instance's name as it appears in host paths."""
        return name if self.project == "default" else f"{self.project}_{name}"

    async def busy(self) -> set[str]:
        """Return the names of instances with a running operation, such as the copy that creates them."""
        found: Mapping[str, Any] = await self.own("/1.0/operations", recursion="1")
        return {
            path.split("?")[0].rpartition("/")[2]
            for operation in found.get("running") or ()
            for path in (operation.get("resources") or {}).get("instances") or ()
        }

    async def operate(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float,
        if_match: str | None = None,
        target: str | None = None,
    ) -> Operation:
        """Start an operation and wait for its result. An instance is created on this server, or on `target`.

        One of an instance that is just being copied to another member begins after that. Raises `IncusError`
        if it fails or takes longer than `timeout` seconds, and with status 412 if the resource no longer has
        the ETag `if_match` that `get_tagged` returned. Raises `ValueError` for an empty limit in a change:
        incusd applies that to a running instance as no limit, whatever its profile says (measured with
        6.0.4). A limit that is left out of a PUT becomes the profile's.
        """
        making = (method, path) == ("POST", "/1.0/instances")  # a copy is made without its source's limits
        config = {} if making else (body or {}).get("config") or {}
        if empty := [key for key, value in config.items() if key.startswith("limits.") and not value]:
            raise ValueError(f"{', '.join(empty)} of {path} would be lifted; leave it out of a PUT instead")
        query = dict[str, str]()
        # else Incus chooses the member with the fewest instances, and for a copy sends the disk there
        if making and (member := target or await self.member()):
            query["target"] = member
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        while True:
            try:
                answer = await self._request(method, path, body=body, query=query, if_match=if_match)
                if answer["type"] != "async":
                    operation = Operation(ok=True, metadata=answer.get("metadata") or {})
                else:
                    operation = await self.wait(answer["metadata"]["id"], timeout=timeout)
                if operation.ok:
                    return operation
                raise IncusError(operation.error, 400)
            except IncusError as error:
                if _COPYING not in error.message or loop.time() > until:
                    raise
            finally:
                self._inventory.touched(*touched_by(path, body))
            await asyncio.sleep(_PAUSE)

    async def wait(self, operation: str, *, timeout: float | None) -> Operation:
        """Wait for an operation to end. Call it at once: the record is gone 5 s after the end.

        Raises `IncusError`: status 0 if incusd went away, 404 if the operation does not exist, 408 after
        `timeout` seconds.
        """
        path = f"/1.0/operations/{operation}/wait"
        seconds = -1 if timeout is None else max(1, int(timeout))
        limit = None if timeout is None else timeout + 5
        try:
            answer = await self._request("GET", path, query={"timeout": str(seconds)}, limit=limit)
            record = answer["metadata"] or {}
        except IncusError as error:
            if error.status in (0, 404):
                raise
            # a failed operation: its record, which is final now, has the metadata that /wait leaves out
            try:
                answer = await self._request("GET", f"/1.0/operations/{operation}")
                record = answer["metadata"] or {}
            except IncusError:
                return Operation(ok=False, error=error.message)
        if record.get("status_code") == 103:  # still running
            raise IncusError(f"the operation did not end within {seconds} s", 408)
        return Operation(
            ok=record.get("status_code") == 200,
            error=str(record.get("err") or ""),
            metadata=record.get("metadata") or {},
        )

    async def exec(
        self,
        instance: str,
        command: list[str],
        *,
        environment: Mapping[str, str] | None = None,
        pty: tuple[int, int] | None = None,
        outlive: bool = False,
    ) -> ExecSockets:
        """Start `command` as root and return its connected sockets; `pty` is (cols, rows).

        With `outlive` the sockets can be held and adopted by another process.

        Command and environment are visible in the host's process list and in Incus's events: pass secrets
        on stdin. Raises `IncusError`.
        """
        body: dict[str, Any] = {
            "command": command,
            "environment": dict(environment or {}),
            "wait-for-websocket": True,
            "interactive": pty is not None,
            "user": 0,
            "group": 0,
            "cwd": "/",
        }
        if pty is not None:
            body["width"], body["height"] = pty
        answer = await self._request("POST", instance_path(instance, "exec"), body=body)
        operation = answer["metadata"]["id"]
        fds: dict[str, str] = answer["metadata"]["metadata"]["fds"]
        memory = ExecMemory.made() if outlive else None
        sockets: dict[str, StreamSocket] = {}
        waiting = None
        try:
            # before the command starts: an operation's record is gone 5 s after its end
            waiting = await OperationWait.ask(self.socket, operation)
            sockets = await connect(self.socket, operation, fds, memory, terminal=pty is not None)
            return ExecSockets(sockets, waiting, memory, terminal=pty is not None)
        except BaseException as error:
            for stream in sockets.values():
                stream.close()
            if waiting is not None:
                waiting.close()
            if memory is not None:
                memory.close()
            if isinstance(error, OperationOver):
                raise NotAwaited from error
            if isinstance(error, OSError):
                raise unreachable(error) from error
            raise

    async def events(self, *types: str) -> AsyncGenerator[dict[str, Any], None]:
        """Yield incusd's events of our project until the stream breaks, which raises `IncusError`.

        Incus replays nothing and guarantees no order: read the state after subscribing. Events of type
        `lifecycle` keep `instances` up to date even if the caller reads them slowly. Ten thousand events may
        be queued; beyond that the stream breaks.

        In a cluster, what happens to instances of other members is left out; Incus sends that too.
        """
        member = await self.member()
        query = {"type": ",".join(types), "project": self.project}

        def wanted(event: Mapping[str, Any]) -> bool:
            return not member or concerns(member, event)

        keep = (self._inventory.noted, self._inventory.listening) if "lifecycle" in types else ()
        async with contextlib.aclosing(heard(self.session, query, wanted, *keep)) as events:
            async for event in events:
                yield event


def member_of(server: Mapping[str, Any]) -> str:
    """Return the name of a server, as `/1.0` describes it, in its cluster; empty if it is in none."""
    environment = server.get("environment") or {}
    return str(environment["server_name"]) if environment.get("server_clustered") is True else ""
