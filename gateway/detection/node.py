"""Detect how a project with a package.json, or a single JavaScript server, is installed and started."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from gateway.detection.clues import Clues, Command, Detection, line_of
from gateway.detection.frameworks import (
    TABLE,
    TOOLS,
    BuildOutput,
    Framework,
    Project,
    expanded,
    mode,
    program,
    project,
    recognise,
)
from gateway.rootfs.paths import show

DEV_SERVERS: Final = frozenset(framework.name for framework in TABLE if framework.packages)

_SERVERS: Final = tuple(TOOLS["servers"].items())  # package and title, in order of precedence
_LOCKFILES: Final = tuple(
    (file, name) for name, one in TOOLS["managers"].items() for file in one["lockfiles"]
)
_LOCKED: Final = {name: tuple(one["locked"].split()) for name, one in TOOLS["managers"].items()}
_EXECUTE: Final = {name: tuple(one["execute"].split()) for name, one in TOOLS["managers"].items()}
_PRODUCTION: Final = ("env", "NODE_ENV=production")
_SCRIPTS: Final = ("dev", "start:dev", "develop", "start", "serve")
# of what was built the first that is no dev server; of a script for development its program alone
_FINISHED: Final = ("start:prod", "start", "serve", "preview", "develop", "dev")
_ENTRIES: Final = tuple(
    f"{folder}{name}.{kind}"
    for folder in ("", "src/")
    for name in ("server", "serve", "index", "app", "main")
    for kind in ("ts", "js", "mjs", "cjs", "tsx")
)
_SERVES: Final = re.compile(r"Bun\.serve\s*\(|\.listen\s*\(|\bcreateServer\s*\(|\bserve\s*\(")
_BUN: Final = re.compile(r"\bBun\.|from [\"']bun[\"':]")
_OPERATORS: Final = re.compile(r"[|&;<>()`$\n]")
# options that say where a program listens
_WHERE: Final = frozenset({"--host", "--port", "--hostname", "-p", "-H"})
# programs that run a file once, and words by which they look for edits themselves
_PLAIN: Final = frozenset({"node", "bun", "tsx", "ts-node"})
_LOOKS: Final = frozenset({"watch", "--watch", "--hot"})
# programs that are for development only, always or by one of these words
_DEVELOP: Final = {
    **{name: frozenset(words) for name, words in TOOLS["develop"]["by"].items()},
    **dict.fromkeys(TOOLS["develop"]["always"]),
}
# servers that a script runs together with a dev server: by their program, or their file's name or content
_SERVING: Final = frozenset({"nodemon", "uvicorn", "gunicorn", "flask", "fastapi"})
_SERVER: Final = re.compile(r"(?:.*/)?(?:server|serve|api|backend)(?:/.*)?(?:\.\w+)?")
# for its program where it is started by a script among others, which takes no arguments
_FASTIFY: Final = ("env", "FASTIFY_ADDRESS=0.0.0.0")
_MADE: Final = re.compile(r"(?:^|[\s=\"'])(?:\./)?(dist|build|out|\.output|\.next|lib)/")
# a line of a framework's configuration that is not a comment
_SETTING: Final = r"(?m)^(?![ \t]*[/*]).*(?:%s)"
# Yarn since 2, which is no program of the image: from npm's registry, whose name for it this is
_BERRY: Final = re.compile(r"yarn@([2-9]\.[\w.-]{1,40}|[1-9][0-9]\.[\w.-]{1,40})")
_OWN: Final = "PATH=$HOME/.local/bin:$PATH"
_PROJECT: Final = re.compile(r'"projects"\s{0,99}:\s{0,99}\{\s{0,99}"([\w@/.-]{1,99})"')
_LINE: Final = "give a command that does with `start` (--start)"
_ASSIGNED: Final = re.compile(r"[A-Za-z_]\w*=\S*|cross-env(?:-shell)?|env")


def project_of(clues: Clues) -> Project:
    """Return the folder's package.json."""
    if "package.json" in clues.names and "package.json" not in clues.texts:
        return Project(readable=False)
    text = clues.texts.get("package.json")
    return project(None if text is None else text.encode())


def framework_of(said: Project) -> Framework | None:
    """Return the framework whose dev server a script starts, or the one among a project's packages."""
    for script in _SCRIPTS:
        words = expanded(("sh", "-c", said.scripts.get(script, "")), said)
        found = recognise(words, said.packages)
        if found is not None and mode(found, words) == "dev":
            return found
    found = recognise((), said.packages)
    return found if found is not None and found.packages else None


def serves(said: Project) -> bool:
    """Return whether a project's packages include a framework or a server."""
    return framework_of(said) is not None or any(package in said.packages for package, _ in _SERVERS)


def scripted(clues: Clues) -> bool:
    """Return whether a folder's package.json says how it is started."""
    return not project_of(clues).scripts.keys().isdisjoint(_SCRIPTS)


def title(said: Project) -> str:
    """Return the name, for people, of what a project is made with."""
    framework = framework_of(said)
    if framework is not None:
        return framework.title
    return next((title for package, title in _SERVERS if package in said.packages), "Node")


def detect(clues: Clues, above: Clues | None = None) -> Detection | None:
    """Return how a project is installed and started; None if it is not JavaScript.

    One of a workspace is installed from the folder `above`, and only its build is its own `install`.
    """
    said = project_of(clues)
    found = Detection("node", "Node", "there is a package.json")
    if not said.readable:
        return replace(found, trouble="package.json is not JSON, or larger than 256 KiB: correct it")
    top, whole = (clues, said) if above is None else (above, project_of(above))
    manager, _ = manager_of(top, whole)
    install, installed = install_of(top, whole)
    found = replace(found, install=install if above is None else (), installed=installed)
    if said.linked and above is None:
        return replace(
            found,
            title=title(said),
            trouble=f"package.json needs {show(min(said.linked))} from outside this folder: deploy the "
            "folder above, and say how to start this app, as in `--start 'npm run dev --workspace apps/web'`",
        )
    site = _detected(clues, said, manager, found)
    if site is not None and manager == "yarn" and _berry(top, whole):
        site = replace(site, start=site.start and ("sh", "-c", f"{_OWN} exec {line_of(site.start)}"))
    return site


def _detected(clues: Clues, said: Project, manager: str, found: Detection) -> Detection | None:
    framework = framework_of(said)
    if framework is None:
        return _server(clues, said, manager, found)
    named: dict[str, Any] = {"name": framework.name, "title": framework.title, "why": _named(framework, said)}
    if clues.production:
        if not _serves_itself(framework, said):
            return _built(framework, clues, said, manager, replace(found, **named))
        own = _server(clues, said, manager, found)
        return own and replace(own, **named)
    if (how := _dev_server(framework, said, manager)) is not None:
        return replace(found, **named, start=how[0], started=how[1])
    return _server(clues, said, manager, found)


def _named(framework: Framework, said: Project) -> str:
    named = framework.packages & said.packages
    return f"package.json names {min(named)}" if named else f"a script starts {framework.programs[0]}"


def _serves_itself(framework: Framework, said: Project) -> bool:
    """Return whether a project is served by its own server, not by what its framework makes."""
    for script in ("start:prod", "start", "serve", "preview"):
        words = expanded(("sh", "-c", said.scripts.get(script, "")), said)[3:]
        if _develops(framework, words):
            continue
        if any(name in _PLAIN for name, _ in _files(words)):
            return True
        if script == "start" and words and not {program(word) for word in words} & {*framework.programs}:
            return any(package in said.packages for package, _ in _SERVERS)
    return False


def _files(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the programs among these words that run a file, and that file."""
    for at, word in enumerate(words):
        if (name := program(word)) in {*_PLAIN, "python", "python3"}:
            following = (
                word for word in words[at + 1 : at + 6] if not word.startswith("-") and word != "run"
            )
            file = next(following, "")
            if ("." in file or "/" in file) and "node_modules" not in file:
                yield name, file.removeprefix("./")


def _develops(framework: Framework | None, words: Sequence[str]) -> str:
    """Return the program among the words of a command (`expanded`) that is a dev server, or ""."""
    for at, word in enumerate(words):
        name = program(word)
        by = _DEVELOP.get(name, frozenset())
        if by is None or not by.isdisjoint(words[at + 1 : at + 5]):
            return name
    return framework.programs[0] if framework is not None and mode(framework, words) == "dev" else ""


def _beside(clues: Clues, said: Project) -> str:
    """Return a server that the script for development runs together with the dev server, or ""."""
    script = next((said.scripts[name] for name in _SCRIPTS if said.scripts.get(name, "").strip()), "")
    words = expanded(("sh", "-c", script), said)[3:]
    beside = next((program(word) for word in words if program(word) in _SERVING), "")
    for _, file in _files(words):
        if _SERVER.fullmatch(file) or _SERVES.search(clues.text(file)):
            return file
    return beside


def _built(framework: Framework, clues: Clues, said: Project, manager: str, found: Detection) -> Detection:
    """Return how a project is built and served."""
    has = "build" in said.scripts
    build = _run(manager, "build") if has else (*_EXECUTE[manager], *framework.build.split())
    found = replace(
        found, install=_then(found.install, build), installed=f"{found.installed}, and it is built"
    )
    made = next((made for made in framework.made if _applies(made, framework, clues, said)), None)
    if made is None:
        lacks = framework.lacks or f"nothing tells how a build of {framework.title} is served"
        return replace(found, trouble=f"{lacks}; or {_LINE}")
    if beside := _beside(clues, said):
        return replace(
            found,
            trouble=f"the script for development also runs {show(beside)}, which is no part of the build of "
            f"{framework.title}: add a script `start` to package.json that serves both, or {_LINE}",
        )
    angular = _PROJECT.search(clues.text("angular.json"))
    served = (made.output or made.serve).replace("{project}", "app" if angular is None else angular[1])
    if made.output:
        return replace(found, static=served, started="the gateway's own file server", spa=made.spa)
    words = served.split()
    start = (*_PRODUCTION, *(() if words[0] == "node" else _EXECUTE[manager]), *words)
    return replace(found, start=start, started=f"what the build of {framework.title} made")


def _applies(made: BuildOutput, framework: Framework, clues: Clues, said: Project) -> bool:
    if made.package and made.package not in said.packages:
        return False
    if not made.config:
        return True
    setting = re.compile(_SETTING % made.config)
    kinds = (f"{module}{language}" for module in ("", "m", "c") for language in ("ts", "js"))
    return any(setting.search(clues.text(f"{framework.name}.config.{kind}")) is not None for kind in kinds)


def _then(install: Command, build: Command) -> Command:
    line = shlex.join(build)
    return ("sh", "-c", f"{line_of(install)} && {line}" if install else line)


def _server(clues: Clues, said: Project, manager: str, found: Detection) -> Detection | None:
    """Return how a server is started: by a script, or directly by its file."""
    package, kind = next((server for server in _SERVERS if server[0] in said.packages), (None, "Node"))
    why = f"package.json names {package}" if package else "there is a package.json"
    found = replace(found, name=kind.lower(), title=kind, why=why)
    order = [
        name for name in (_FINISHED if clues.production else _SCRIPTS) if said.scripts.get(name, "").strip()
    ]
    if order:
        return _scripted(clues, said, manager, found, order)
    entry = _entry(clues, said, serving=package is not None)
    if entry is not None:
        text = clues.text(entry)
        bun = entry.endswith(("ts", "tsx")) or bool(_BUN.search(text))
        if package is None and "Bun.serve" in text:
            found = replace(found, name="bun", title="Bun.serve", why=f"{entry} calls it")
        elif package is None:
            found = replace(found, why=f"{entry} is a server")
        started = f"{entry}, since there is no script for it"
        start = ("bun" if bun else "node", entry)
        return replace(found, start=start, started=started, watch=not clues.production)
    if "package.json" not in clues.names:
        return None
    others = ", ".join(show(script) for script in list(said.scripts)[:8]) or "none"
    return replace(
        found,
        trouble=f"package.json has no script `dev` or `start` (its scripts: {others}), and names no "
        "known framework: add a script, or give a command with `start` (--start)",
    )


def _scripted(clues: Clues, said: Project, manager: str, found: Detection, order: Sequence[str]) -> Detection:
    """Return how the first of these scripts that serves the site is started."""
    script, words, develops = _finished(order, said) if clues.production else (order[0], (), "")
    text = said.scripts[script]
    if develops:
        return replace(
            found,
            trouble=f"its script `{script}` ({_short(text)}) starts {show(develops)}, which is for "
            f"development only: add a script `start` to package.json that serves the site, or {_LINE}",
        )
    lacks = _unbuilt(text, clues)
    if "build" in said.scripts and (lacks or clues.production):
        why = f", and `build`, since `{script}` needs {lacks}/" if lacks else ", and it is built"
        found = replace(
            found, install=_then(found.install, _run(manager, "build")), installed=found.installed + why
        )
    start = words or _run(manager, script, *_listen_arguments(text))
    if clues.production:
        start = (*_PRODUCTION, *start)
    if "fastify-cli" in said.packages and start[-1] != "$PORT":
        start = (*_FASTIFY, *start)
    started = f"its script `{script}` ({_short(text)})"
    watch = not clues.production and _plain_program(text)
    return replace(found, start=start, started=started, watch=watch)


def _finished(order: Sequence[str], said: Project) -> tuple[str, Command, str]:
    """Return the script that serves a site, or its program's words alone; else the dev server it starts."""
    develops = ""
    for script in order:
        words = expanded(("sh", "-c", said.scripts[script]), said)[3:]
        if not (develops := _develops(recognise(words, said.packages), words)):
            return script, (), ""
    own = said.scripts[script]
    if program(own.split()[0]) in ("node", "bun") and not _OPERATORS.search(own):
        return script, tuple(word for word in own.split() if word not in _LOOKS), ""
    return order[0], (), develops


def manager_of(clues: Clues, said: Project) -> tuple[str, str]:
    """Return the package manager, and why."""
    named = said.manager.partition("@")[0]
    found = [(file, manager) for file, manager in _LOCKFILES if file in clues.names]
    if named in _LOCKED:
        return named, f"`packageManager` of package.json says {named}"
    if found:
        file, manager = found[0]
        others = [other for other, kind in found[1:] if kind != manager]
        return manager, f"there is {file}" + (
            f" (and {', '.join(others)}, which is ignored)" if others else ""
        )
    return "bun", "there is no lockfile"


def install_of(clues: Clues, said: Project) -> tuple[Command, str]:
    """Return the command that installs a project's packages, and the reason."""
    workspace = said.workspaces or "pnpm-workspace.yaml" in clues.names
    if "package.json" not in clues.names and not workspace:
        return (), "there is no package.json"
    if not said.packages and not workspace:
        return (), "package.json names no packages"
    manager, why = manager_of(clues, said)
    locked = any(file in clues.names for file, kind in _LOCKFILES if kind == manager)
    if manager == "yarn" and (".yarnrc.yml" in clues.names or _BERRY.match(said.manager)):
        command: Command = ("yarn", "install", "--immutable") if locked else ("yarn", "install")
        if package := _berry(clues, said):
            own = f'npm install --global --silent --prefix "$HOME/.local" {package}'
            line = f"{own} && export {_OWN} && {shlex.join(command)}"
            return ("sh", "-c", line), f"{why}, which is not in the image"
        return command, why
    return (_LOCKED[manager] if locked else (manager, "install")), why


def _berry(clues: Clues, said: Project) -> str:
    """Return the package of Yarn since 2 that a project needs and does not bring along, or ""."""
    found = _BERRY.match(said.manager)
    rc = ".yarnrc.yml" in clues.names and (found is not None or not said.manager)
    if (found is None and not rc) or any(name.startswith(".yarn/releases/") for name in clues.names):
        return ""
    return f"@yarnpkg/cli-dist@{found[1]}" if found is not None else "@yarnpkg/cli-dist"


def _dev_server(framework: Framework, said: Project, manager: str) -> tuple[Command, str] | None:
    """Return how a framework's dev server is started, and why; None if a script starts something else."""
    listen = tuple(framework.listen.split())
    for script in _SCRIPTS:
        text = said.scripts.get(script, "")
        words = expanded(("sh", "-c", text), said)
        started = mode(framework, words) == "dev"
        if not text or not started:
            continue
        told = f"its script `{script}` ({_short(text)})"
        if not _plain(framework, text):
            return _run(manager, script), f"{told}, as it is: it does more than start {framework.title}"
        own = _words(text)
        if any(word.partition("=")[0] in _WHERE for word in own):
            start = (*_EXECUTE[manager], *_without_address(own), *listen)
            return start, f"{told}, on the port given here"
        return _run(manager, script, *listen), f"{told}, told where to listen"
    if any(script in said.scripts for script in ("dev", "start")):
        return None
    start = (*_EXECUTE[manager], *framework.dev.split(), *listen)
    return start, "no script starts it, so its own command does"


def _words(text: str) -> list[str]:
    """Return the words of a script from its program on; none if it is more than one plain command."""
    if _OPERATORS.search(text):
        return []
    try:
        words = shlex.split(text)
    except ValueError:
        return []
    return list(itertools.dropwhile(_ASSIGNED.fullmatch, words))


def _plain(framework: Framework, text: str) -> bool:
    """Return whether a script is just the framework's command, so that appended arguments go to it."""
    own = [word for word in _words(text) if not _ASSIGNED.fullmatch(word)]
    return bool(own) and (
        program(own[program(own[0]) in ("npx", "bunx") if len(own) > 1 else 0]) in framework.programs
    )


def _listen_arguments(text: str) -> tuple[str, ...]:
    """Return the arguments to append to a script to say where it listens, if it takes any."""
    words = _words(text)
    if not words or any(word.partition("=")[0] in _WHERE for word in words):
        return ()
    return tuple(TOOLS["listen"].get(program(words[0]), "").split())


def _plain_program(text: str) -> bool:
    """Return whether a script is one program that starts a file, and does not itself look for edits."""
    words = _words(text)
    return bool(words) and program(words[0]) in _PLAIN and not _LOOKS.intersection(words)


def _without_address(words: Sequence[str]) -> tuple[str, ...]:
    """Return the words of a command without the options that say where it listens."""
    kept, skip = list[str](), False
    for word, following in itertools.pairwise([*words, "-"]):
        name, equals, _ = word.partition("=")
        if not skip and name not in _WHERE:
            kept.append(word)
        skip = not skip and name in _WHERE and not equals and not following.startswith("-")
    return tuple(kept)


def _run(manager: str, script: str, *arguments: str) -> Command:
    # npm alone takes arguments after a script as its own, up to `--`
    between = ("--",) if arguments and manager == "npm" else ()
    return (manager, "run", script, *between, *arguments)


def _unbuilt(script: str, clues: Clues) -> str:
    """Return the build folder that a script needs and the project lacks."""
    found = _MADE.search(script)
    if found is None or any(name.startswith(f"{found[1]}/") for name in clues.names):
        return ""
    return found[1]


def _entry(clues: Clues, said: Project, *, serving: bool) -> str | None:
    main = said.main.removeprefix("./")
    for name in (main, *_ENTRIES):
        if name in clues.names and (serving or _SERVES.search(clues.text(name))):
            return name
    return None


def _short(text: str) -> str:
    return show(text if len(text) <= 60 else f"{text[:57]}…")
