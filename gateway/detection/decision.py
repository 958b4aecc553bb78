"""Decide from its clues what a folder is."""

from __future__ import annotations

import re
from typing import Final

from gateway.detection import node, python
from gateway.detection.clues import Clues
from gateway.detection.detected import Detected
from gateway.detection.monorepo import several

_BUILT: Final = ("public", "dist", "build", "_site", "out", "www", "site", "docs")
_WEB: Final = re.compile(r"^web[ \t]*:[ \t]*(\S[^\r\n]{0,2000})$", re.MULTILINE)
_LOCAL: Final = "PATH=node_modules/.bin:.venv/bin:$PATH"

_EMPTY: Final = (
    "there are no files in this folder: name another one, or deploy a template "
    "(`incus-gateway templates` lists them)"
)
_HOW: Final = "give a command with `start` (--start), or write a site.toml"


def detect(clues: Clues) -> Detected:
    """Return what a folder is; with `trouble` if there is no way to start it."""
    if clues.empty:
        return Detected("empty", "an empty folder", "it has no files", trouble=_EMPTY)
    if (apps := several(clues)) is not None:
        return apps
    web = _WEB.search(clues.text("Procfile"))
    found = node.detect(clues) or python.detect(clues)
    if (
        found is not None
        and (found.start or found.static)
        and (web is None or (found.name in _ON_THEIR_OWN and not clues.production))
    ):
        return found
    if web is not None:
        return Detected(
            "procfile",
            "Procfile",
            "it names a process `web`",
            install=found.install if found is not None else (),
            installed=found.installed if found is not None else "nothing tells of packages",
            start=("sh", "-c", f"{_LOCAL}; {web[1].strip()}"),
            started="`web` of the Procfile",
        )
    if (static := _static(clues)) is not None:
        return static
    if found is not None:
        return found
    pages = sorted(name for name in clues.names if name.endswith(".html"))
    more = f", although there is {pages[0]}" if pages else ""
    return Detected(
        "unknown",
        "an unknown kind of folder",
        "nothing tells what it is",
        installed="nothing tells of packages",
        trouble="this folder has no index.html, no package.json, no Python application and no Procfile"
        f"{more}: {_HOW}",
    )


_ON_THEIR_OWN: Final = node.DEV_SERVERS | python.DEV_SERVERS


def _static(clues: Clues) -> Detected | None:
    for folder in (".", *_BUILT):
        page = "index.html" if folder == "." else f"{folder}/index.html"
        if page in clues.names:
            return Detected(
                "static",
                "static files",
                f"there is {page}",
                installed="files need none",
                static=folder,
                started="the gateway's own file server",
            )
    return None
