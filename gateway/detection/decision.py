"""Decide from its clues what a folder is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from gateway.detection import node, python
from gateway.detection.clues import Clues, Detection, line_of
from gateway.detection.frameworks import TOOLS, Project
from gateway.rootfs.paths import show

_BUILT: Final = ("public", "dist", "build", "_site", "out", "www", "site", "docs")
_WEB: Final = re.compile(r"^web[ \t]*:[ \t]*(\S[^\r\n]{0,2000})$", re.MULTILINE)
# its other processes, and how many of them the result names
_OTHERS: Final = re.compile(r"^(?!web[ \t]*:)([\w-]{1,40})[ \t]*:", re.MULTILINE | re.ASCII)
_NAMED: Final = 3
_LOCAL: Final = "PATH=node_modules/.bin:.venv/bin:$PATH"

_DEVELOPS: Final = re.compile(
    r"\b(?:flask(?: .{0,200})? run|manage\.py runserver|fastapi dev|nodemon|(?:vite|next|nuxt|astro|run) dev)"
    r"\b|--(?:reload|hot|watch)\b|\bvite(?: --|$)"
)
_DOTNET: Final = re.compile(r"(?:[^/]+/)?[^/]+\.(?:cs|fs|vb)proj|[^/]+\.slnx?")

_EMPTY: Final = (
    "there are no files in this folder: name another one, or deploy a template "
    "(`incus-gateway templates` lists them)"
)
_HOW: Final = "give a command with `start` (--start), or write a site.toml"


def detect(clues: Clues) -> Detection:
    """Return what a folder is; with `trouble` if there is no way to start it."""
    found = _detected(clues)
    if found.trouble or not (others := _OTHERS.findall(clues.text("Procfile"))[:_NAMED]):
        return found
    names = " and ".join(f"`{name}`" for name in others)
    do = "does" if len(others) == 1 else "do"
    return replace(found, why=f"{found.why}; {names} of the Procfile {do} not run here")


def _detected(clues: Clues) -> Detection:
    if clues.empty:
        return Detection("empty", "an empty folder", "it has no files", trouble=_EMPTY)
    web = _WEB.search(clues.text("Procfile"))
    known = bool(clues.names & {"package.json", *python.MANIFESTS})
    if (foreign := _foreign(clues, known=known)) is not None and web is None:
        return foreign
    found = None
    if foreign is None:
        if (apps := several(clues)) is not None:
            return apps
        found = node.detect(clues) or python.detect(clues)
    alone = found is not None and found.name in _ON_THEIR_OWN and not clues.production
    if found is not None and (found.start or found.static) and (web is None or alone):
        return found
    if web is not None:
        return _procfile(web[1].strip(), found, production=clues.production)
    if known and (foreign := _foreign(clues, known=False)) is not None:
        return foreign
    tells = found is not None and (found.name not in ("node", "python") or node.scripted(clues))
    if not tells and (static := _static(clues)) is not None:
        return static
    if found is not None:
        return found
    pages = sorted(name for name in clues.names if name.endswith(".html"))
    more = f", although there is {pages[0]}" if pages else ""
    return Detection(
        "unknown",
        "an unknown kind of folder",
        "nothing tells what it is",
        installed="nothing tells of packages",
        trouble="this folder has no index.html, no package.json, no Python application and no Procfile"
        f"{more}: {_HOW}",
    )


def _procfile(web: str, found: Detection | None, *, production: bool) -> Detection:
    """Return the result for a Procfile whose process `web` is this command; `found` is the rest."""
    site = Detection(
        "procfile", "Procfile", "it names a process `web`", install=() if found is None else found.install
    )
    if production and _DEVELOPS.search(web):
        return replace(
            site,
            trouble=f"`web` of the Procfile ({show(web[:100])}) is for development only: write there what "
            "serves the site, or give it with `start` (--start)",
        )
    installed = "nothing tells of packages" if found is None else found.installed
    start = ("sh", "-c", f"{_LOCAL}; {web}")
    return replace(site, installed=installed, start=start, started="`web` of the Procfile")


_ON_THEIR_OWN: Final = node.DEV_SERVERS | python.DEV_SERVERS


def _foreign(clues: Clues, *, known: bool) -> Detection | None:
    """Return the result for a folder in a language that we do not run; `known` if there is one that we do."""
    files = TOOLS["foreign"] if known else TOOLS["foreign"] | TOOLS["languages"]
    file = next((name for name in files if name in clues.names), None)
    what, program = files[file] if file is not None else ("a .NET project", "dotnet")
    if file is None:
        file = next(iter(sorted(name for name in clues.names if _DOTNET.fullmatch(name))), None)
        if known or file is None:
            return None
    return Detection(
        *("foreign", what, f"there is {show(file)}"),
        trouble=f"this is {what} (there is {show(file)}), which is not started by itself: give its commands "
        f"with `install` and `start` (--install, --start), or in a site.toml. The image has no {program}: "
        "`install` must bring it, or the gateway's operator adds it by `incus-gateway image build`",
    )


def _static(clues: Clues) -> Detection | None:
    for folder in (".", *_BUILT):
        page = "index.html" if folder == "." else f"{folder}/index.html"
        if page in clues.names:
            return Detection(
                "static",
                "static files",
                f"there is {page}",
                installed="files need none",
                static=folder,
                started="the gateway's own file server",
            )
    return None


_TOPS: Final = frozenset({"pnpm-workspace.yaml", "turbo.json", "nx.json", "lerna.json"})
_APPS: Final = frozenset({"package.json", "pyproject.toml", "requirements.txt"})
_WORD: Final = re.compile(r"[\w@./-]{1,200}")
_LISTED: Final = 10  # apps listed in the message


def several(clues: Clues) -> Detection | None:
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
    named = ", ".join(f"{folder} ({title})" for folder, (title, _) in list(apps.items())[:_LISTED])
    count = "one app" if len(apps) == 1 else f"{len(apps)} apps"
    more = f" and {len(apps) - _LISTED} more" if len(apps) > _LISTED else ""
    alone = next((folder for folder, (_, linked) in apps.items() if not linked), None)
    if alone is not None:
        which = "it" if len(apps) == 1 else "one"
        how = f"deploy {which}, as in `incus-gateway deploy DOMAIN FOLDER/{alone}`"
    else:
        how = "they need each other: say which one to start, as in " + _whole(clues, next(iter(apps)))
    return Detection(
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


def _app(clues: Clues, folder: str) -> Detection | None:
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
