"""Recognise a folder that holds several apps and is not a site itself."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from gateway.detection import node, python
from gateway.detection.clues import Clues
from gateway.detection.detected import Detected, line_of
from gateway.detection.frameworks import Project

_TOPS: Final = frozenset({"pnpm-workspace.yaml", "turbo.json", "nx.json", "lerna.json"})
_APPS: Final = frozenset({"package.json", "pyproject.toml", "requirements.txt"})
_WORD: Final = re.compile(r"[\w@./-]{1,200}")
_NAMED: Final = 10  # apps listed in the message


def several(clues: Clues) -> Detected | None:
    """Return the result for a folder with apps below it; None for any other."""
    top = node.project_of(clues)
    workspace = top.workspaces or not clues.names.isdisjoint(_TOPS)
    packages = dict[str, str]()  # names of the apps' packages
    if node.serves(top) or (not workspace and not clues.names.isdisjoint({*_APPS, "index.html", "Procfile"})):
        return None
    apps = dict[str, tuple[str, bool]]()
    for name in sorted(clues.names):
        folder, _, file = name.rpartition("/")
        if not folder or file not in _APPS or folder in apps:
            continue
        inner = below(clues, folder)
        if file == "package.json":
            project = node.project_of(inner)
            if not node.serves(project) and "start" not in project.scripts:
                continue
            title, linked, packages[folder] = node.title(project), bool(project.linked), project.name
        else:
            found = python.detect(inner)
            if found is None or not found.start:
                continue
            title, linked = found.title, False
        apps[folder] = (title, linked)
    if not apps:
        return None
    if workspace and (folder := _meant(top, apps, packages)) and (app := _app(clues, folder)) is not None:
        return app
    named = ", ".join(f"{folder} ({title})" for folder, (title, _) in list(apps.items())[:_NAMED])
    count = "one app" if len(apps) == 1 else f"{len(apps)} apps"
    more = f" and {len(apps) - _NAMED} more" if len(apps) > _NAMED else ""
    alone = next((folder for folder, (_, linked) in apps.items() if not linked), None)
    if alone is not None:
        which = "it" if len(apps) == 1 else "one"
        how = f"deploy {which}, as in `incus-gateway deploy DOMAIN FOLDER/{alone}`"
    else:
        how = "they need each other: say which one to start, as in " + _whole(clues, next(iter(apps)))
    return Detected(
        "monorepo",
        "a folder of apps",
        f"it holds {count}",
        install=node.install_of(clues, top)[0],
        installed=node.install_of(clues, top)[1],
        trouble=f"this folder holds {count}: {named}{more}; {how}",
    )


def _meant(top: Project, apps: Mapping[str, object], packages: Mapping[str, str]) -> str:
    """Return the folder of the app that the top's own script starts, or of the only one; else ""."""
    for script in ("dev", "start"):
        words = set(_WORD.findall(top.scripts.get(script, "")))
        found = [folder for folder in apps if {folder, f"./{folder}", packages.get(folder) or folder} & words]
        if len(found) == 1:
            return found[0] if found[0] in packages else ""
    return next(iter(apps)) if len(apps) == 1 == len(packages) else ""


def _app(clues: Clues, folder: str) -> Detected | None:
    """Return how one app of a workspace is installed with the whole, and started by itself."""
    found = node.detect(below(clues, folder), clues)
    if found is None:
        return None
    top = node.project_of(clues)
    install, _ = node.install_of(clues, top)
    if found.install:  # its build
        build = shlex.join((node.manager_of(clues, top)[0], "run", "build"))
        if "build" not in top.scripts:
            build = f"cd {shlex.quote(folder)} && {line_of(found.install)}"
        install = ("sh", "-c", f"{line_of(install)} && {build}" if install else build)
    return replace(
        found.inside(folder), install=install, installed=found.installed, why=f"{found.why}, in {folder}"
    )


def below(clues: Clues, folder: str) -> Clues:
    """Return the clues of a subfolder."""
    start = f"{folder}/"
    return Clues(
        frozenset(name.removeprefix(start) for name in clues.names if name.startswith(start)),
        {name.removeprefix(start): text for name, text in clues.texts.items() if name.startswith(start)},
        production=clues.production,
    )


def _whole(clues: Clues, folder: str) -> str:
    manager = node.manager_of(clues, node.project_of(clues))[0]
    run = {
        "npm": f"npm run dev --workspace {folder}",
        "pnpm": f"pnpm --dir {folder} run dev",
        "yarn": f"yarn --cwd {folder} run dev",
    }.get(manager, f"bun run --cwd {folder} dev")
    return f"`--start '{run}'`"
