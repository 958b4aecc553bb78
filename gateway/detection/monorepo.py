"""Recognise a folder that holds several apps and is not a site itself."""

from __future__ import annotations

from typing import Final

from gateway.detection import node, python
from gateway.detection.clues import Clues
from gateway.detection.detected import Detected

_TOPS: Final = frozenset({"pnpm-workspace.yaml", "turbo.json", "nx.json", "lerna.json"})
_APPS: Final = frozenset({"package.json", "pyproject.toml", "requirements.txt"})
_NAMED: Final = 10  # apps listed in the message


def several(clues: Clues) -> Detected | None:
    """Return the result for a folder with apps below it; None for any other."""
    top = node.project_of(clues)
    workspace = top.workspaces or not clues.names.isdisjoint(_TOPS)
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
            title, linked = node.title(project), bool(project.linked)
        else:
            found = python.detect(inner)
            if found is None or not found.start:
                continue
            title, linked = found.title, False
        apps[folder] = (title, linked)
    if not apps:
        return None
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


def below(clues: Clues, folder: str) -> Clues:
    """Return the clues of a subfolder."""
    start = f"{folder}/"
    return Clues(
        frozenset(name.removeprefix(start) for name in clues.names if name.startswith(start)),
        {name.removeprefix(start): text for name, text in clues.texts.items() if name.startswith(start)},
    )


def _whole(clues: Clues, folder: str) -> str:
    manager = node.manager_of(clues, node.project_of(clues))[0]
    run = {
        "npm": f"npm run dev --workspace {folder}",
        "pnpm": f"pnpm --dir {folder} run dev",
        "yarn": f"yarn --cwd {folder} run dev",
    }.get(manager, f"bun run --cwd {folder} dev")
    return f"`--start '{run}'`"
