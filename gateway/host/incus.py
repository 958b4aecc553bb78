"""Client of incusd for preparing a host: pylxd's raw API, with its errors mapped to ours.

pylxd's models lack network ACLs and warn about fields added by Incus; its raw nodes do neither.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from pylxd import Client
from pylxd.exceptions import ClientConnectionFailed, LXDAPIException
from pylxd.exceptions import NotFound as LXDNotFound

from gateway.host import HostError
from gateway.incus import member_of
from gateway.incus.rest import NOTIFIER


class Missing(HostError):
    """The object does not exist in Incus."""

    code = "not_found"
    http_status = 404


@contextmanager
def _mapped(what: str) -> Iterator[None]:
    try:
        yield
    except LXDNotFound as error:
        raise Missing(f"{what}: not found") from error
    except LXDAPIException as error:
        raise HostError(f"{what}: Incus reports: {error}") from error
    except (requests.RequestException, ClientConnectionFailed) as error:
        raise HostError(f"{what}: incusd does not answer ({error}); is it running?") from error


class IncusAdmin:
    """A connection to one incusd, within one project. Values are the API's own JSON objects."""

    def __init__(self, sock: Path, project: str = "default", timeout: float = 120.0) -> None:
        with _mapped(f"connecting to {sock}"):
            self._api = Client(endpoint=str(sock), project=project, timeout=timeout).api

    def _node(self, *path: str) -> Any:
        node = self._api
        for segment in path:
            node = node[quote(segment, safe="")]
        return node

    def get(self, *path: str, target: str = "") -> dict[str, Any]:
        """Return an object, as the member `target` of a cluster has it. Raises `Missing` if there is none."""
        with _mapped(f"reading {'/'.join(path)}"):
            asked = {"params": {"target": target}} if target else {}
            metadata: dict[str, Any] = self._node(*path).get(**asked).json()["metadata"]
            return metadata

    def find(self, *path: str) -> dict[str, Any] | None:
        """Return an object, or None if it does not exist."""
        try:
            return self.get(*path)
        except Missing:
            return None

    def names(self, *path: str) -> builtins.list[str]:
        """Return the names of a collection's objects."""
        with _mapped(f"listing {'/'.join(path)}"):
            return [
                url.split("?")[0].rpartition("/")[2] for url in self._node(*path).get().json()["metadata"]
            ]

    def list(self, *path: str) -> builtins.list[dict[str, Any]]:
        """Return a collection's objects."""
        with _mapped(f"listing {'/'.join(path)}"):
            objects = self._node(*path).get(params={"recursion": 1}).json()["metadata"]
            return [*(objects or ())]  # Incus answers null where there is none

    def instances(self) -> builtins.list[dict[str, Any]]:
        """Return this server's instances; in a cluster the other members are not asked for theirs."""
        alone = {"headers": {"User-Agent": NOTIFIER}} if member_of(self.get()) else {}
        with _mapped("listing instances"):
            found = self._node("instances").get(params={"recursion": 1}, **alone).json()["metadata"]
            return [*(found or ())]

    def post(self, *path: str, **request: Any) -> dict[str, Any]:
        """Create an object. Returns the finished operation if there is one, else {}."""
        with _mapped(f"creating in {'/'.join(path)}"):
            return self._wait(self._node(*path).post(**request))

    def put(self, *path: str, **request: Any) -> None:
        """Replace an object's writable fields."""
        with _mapped(f"changing {'/'.join(path)}"):
            self._wait(self._node(*path).put(**request))

    def patch(self, *path: str, **request: Any) -> None:
        """Change some fields of an object."""
        with _mapped(f"changing {'/'.join(path)}"):
            self._wait(self._node(*path).patch(**request))

    def delete(self, *path: str, **request: Any) -> None:
        """Delete an object. Raises `Missing` if it does not exist."""
        with _mapped(f"removing {'/'.join(path)}"):
            self._wait(self._node(*path).delete(**request))

    def _wait(self, response: Any) -> dict[str, Any]:
        # Request /wait directly: a plain GET of an operation that is just ending, with which pylxd's
        # wait_for_operation begins, can crash incusd before 6.0.6.
        answer = response.json()
        if answer.get("type") != "async":
            return {}
        identity = answer["operation"].rpartition("/")[2]
        done: dict[str, Any] = self._node("operations", identity, "wait").get().json()["metadata"]
        if done["status_code"] >= 400:
            raise HostError(f"Incus reports: {done['err']}")
        return done
