"""The part of a folder from which its kind is detected: names, and a few files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

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
# of frameworks that build a site without a server where their configuration says so
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
