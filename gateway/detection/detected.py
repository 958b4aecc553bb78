"""The result of the detection, as a value and in words."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import Any

Command = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Detected:
    """What a folder is: `name` for programs, `title` for people, and each choice with its reason.

    If it cannot be started it has neither `start` nor `static`, but `trouble`: the error for the client.
    `static` is a folder whose files are the site, and `spa` whether they are one app that answers all paths
    itself. `watch` is whether an edit of a source restarts it.
    """

    name: str
    title: str
    why: str
    install: Command = ()
    installed: str = ""
    start: Command = ()
    started: str = ""
    static: str | None = None
    trouble: str = ""
    watch: bool = False
    spa: bool = False

    def told(self, start: Command | None, install: Command | None) -> Detected:
        """Return it with the commands that the deployment gave instead."""
        found = self
        if start is not None:
            found = replace(
                found, start=start, static=None, started="as the deployment says", trouble="", watch=False
            )
        if install is not None:
            found = replace(found, install=install, installed="as the deployment says")
        return found

    def inside(self, folder: str) -> Detected:
        """Return it for the folder above, of which the site is one folder."""
        line = line_of(self.start)
        start = (
            "sh",
            "-c",
            f"cd {shlex.quote(folder)} && {'' if self.start[:1] == ('sh',) else 'exec '}{line}",
        )
        static = (
            self.static
            if self.static is None
            else folder
            if self.static == "."
            else f"{folder}/{self.static}"
        )
        return replace(self, start=start if self.start else (), static=static)

    def lines(self) -> tuple[str, str, str]:
        """Return the choices and reasons, one a line: what it is, its install, its start."""
        if self.static is not None:
            serves = "the files of the folder" if self.static == "." else f"the files of {self.static}/"
        else:
            serves = line_of(self.start)
        how = (
            ", restarted at each edit"
            if self.watch
            else ", which takes other paths for index.html"
            if self.spa
            else ""
        )
        return (
            f"{self.title}: {self.why}",
            f"install {line_of(self.install) or 'nothing'}: {self.installed}",
            f"{'serve' if self.static is not None else 'start'} {serves}: {self.started}{how}",
        )

    def to_dict(self, port: int) -> dict[str, Any]:
        """Return it as a deployment's record shows it."""
        return {
            "name": self.name,
            "title": self.title,
            "install": line_of(self.install),
            "start": line_of(self.start),
            "static": self.static,
            "port": port,
            "lines": list(self.lines()),
        }


def line_of(command: Command) -> str:
    """Return a command as a manifest's line."""
    if len(command) == 3 and command[:2] == ("sh", "-c"):
        return command[2]
    return " ".join(
        word if word == "$PORT" or word.endswith(":$PORT") else shlex.quote(word) for word in command
    )
