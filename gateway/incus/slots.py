"""Which of this server's instances are in a second project.

A name is unique within an Incus project, even while the cluster member with the instance is away. So a tenant
that is brought back in the meantime gets its name in another project. Requests about an instance by its name
then go to that project.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote


class Slots:
    """The projects of one server's instances: the `first`, and the `second` of those that are in `names`.

    There is no second one while `second` is empty. `names` is None while it is not known.
    """

    def __init__(self, first: str) -> None:
        self.first, self.second = first, ""
        self.names: set[str] | None = None

    def of(self, name: str) -> str:
        """Return the project of an instance."""
        return self.second if self.names and name in self.names else self.first

    def holds(self, event: Mapping[str, Any]) -> bool:
        """Return whether an event is of one of the projects, or of none."""
        return event.get("project") in (None, "", self.first, self.second)

    def noted(self, event: Mapping[str, Any]) -> None:
        """Process one lifecycle event of this server's instances."""
        metadata = event.get("metadata") or {}
        action, name = str(metadata.get("action", "")), str(metadata.get("name", ""))
        if not self.second or event.get("project") != self.second or self.names is None or not name:
            return
        if action in ("instance-created", "instance-renamed"):
            self.names.add(name)
        if action == "instance-deleted":
            self.names.discard(name)
        if action == "instance-renamed":
            self.names.discard(str((metadata.get("context") or {}).get("old_name", "")))

    def did(self, method: str, path: str, body: Mapping[str, Any] | None, project: str | None) -> None:
        """Record what this process has done to an instance of this server, before Incus reports it."""
        if self.names is None:
            return
        given, name = str((body or {}).get("name", "")), named(path)
        match method, path.count("/"):
            case "POST", 2 if path == "/1.0/instances":
                (self.names.add if project and project == self.second else self.names.discard)(given)
            case "POST", 3 if name in self.names and given:
                self.names.discard(name)
                self.names.add(given)
            case "DELETE", 3:
                self.names.discard(name)


def named(path: str) -> str:
    """Return the name of the instance that an API path is about, empty for any other path."""
    match path.split("/", 4):
        case ["", "1.0", "instances", name, *_]:
            return unquote(name)
    return ""
