"""The part of a folder from which its kind is detected: names, and a few files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson

_DEPTH: Final = 4  # folders that say nothing about the kind of site
_NAMES: Final = 1 << 20  # bytes of all names, uppermost first
_TEXT: Final = 256 << 10  # bytes of one file; longer ones are ignored
_TEXTS: Final = 200  # files
_ROOM: Final = 4 << 20  # bytes of them in all

# the only files that are read; of all others, lockfiles too, only the name counts
_MANIFESTS: Final = frozenset(
    {"package.json", "pyproject.toml", "requirements.txt", "Pipfile", "Procfile", "angular.json"}
)
_SOURCES: Final = re.compile(
    r"(?:[\w-]+/){0,2}(?:main|app|streamlit_app|server|serve|index|api|asgi|wsgi|hello|demo)\.(?:py|[mc]?[jt]s|tsx)"
)
# of frameworks that can be configured to build a site without a server
_CONFIGS: Final = re.compile(r"(?:next|react-router)\.config\.[mc]?[jt]s")


@dataclass(frozen=True, slots=True)
class Clues:
    """The `names` of a folder's files, and the content of those that show what it is.

    `empty` is whether the folder has no files, `production` whether it is to be built and then served.
    """

    names: frozenset[str]
    texts: Mapping[str, str]
    empty: bool = False
    production: bool = False

    def text(self, name: str) -> str:
        """Return the text of a file; empty if it does not exist."""
        return self.texts.get(name, "")

    @classmethod
    def of(cls, files: Mapping[str, bytes], *, production: bool = False) -> Clues:
        """Select the clues among a folder's files. Nothing is parsed here."""
        names, texts = set[str](), dict[str, str]()
        named, room = _NAMES, _ROOM
        for path, content in sorted(files.items(), key=lambda one: (one[0].count("/"), one[0])):
            if path.count("/") >= _DEPTH:
                break
            named -= len(path.encode())
            if named < 0:
                break
            names.add(path)
            if _tells(path):
                size = len(content)
                if size <= min(_TEXT, room) and len(texts) < _TEXTS:
                    texts[path] = content.decode("utf-8", "replace")
                    room -= size
        return cls(frozenset(names), texts, not files, production)

    def packed(self) -> bytes:
        """Return them for another process."""
        return orjson.dumps(
            {
                "names": sorted(self.names),
                "texts": dict(self.texts),
                "empty": self.empty,
                "production": self.production,
            }
        )

    @classmethod
    def unpacked(cls, said: bytes) -> Clues:
        clues = orjson.loads(said)
        return cls(frozenset(clues["names"]), clues["texts"], clues["empty"], clues["production"])


def _tells(path: str) -> bool:
    """Say whether the content of a file tells what the folder is."""
    return (
        path.rpartition("/")[2] in _MANIFESTS
        or _SOURCES.fullmatch(path) is not None
        or _CONFIGS.fullmatch(path) is not None
    )


Command = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Detection:
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

    def with_commands(self, start: Command | None, install: Command | None) -> Detection:
        """Return it with the commands that the deployment gave instead."""
        found = self
        if start is not None:
            found = replace(
                found, start=start, static=None, started="as the deployment says", trouble="", watch=False
            )
        if install is not None:
            found = replace(found, install=install, installed="as the deployment says")
        return found

    def inside(self, folder: str) -> Detection:
        """Return the result for the folder above the site's."""
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
