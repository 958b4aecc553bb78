"""Detect how a project with a package.json, or a single JavaScript server, is installed and started."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from typing import Final

from gateway.detection.clues import Clues
from gateway.detection.detected import Command, Detected
from gateway.detection.frameworks import (
    TABLE,
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

# packages that are servers, in order of precedence
_SERVERS: Final = (
    ("@nestjs/core", "NestJS"),
    ("fastify", "Fastify"),
    ("hono", "Hono"),
    ("elysia", "Elysia"),
    ("koa", "Koa"),
    ("express", "Express"),
)
# by name alone, as in Netlify's build-info; the first that exists counts
_LOCKFILES: Final = (
    ("bun.lock", "bun"),
    ("bun.lockb", "bun"),
    ("pnpm-lock.yaml", "pnpm"),
    ("yarn.lock", "yarn"),
    ("package-lock.json", "npm"),
    ("npm-shrinkwrap.json", "npm"),
)
_MANAGERS: Final = frozenset(manager for _, manager in _LOCKFILES)
_LOCKED: Final = {
    "bun": ("bun", "install", "--frozen-lockfile"),
    "npm": ("npm", "ci"),
    "pnpm": ("pnpm", "install", "--frozen-lockfile"),
    "yarn": ("yarn", "install", "--frozen-lockfile"),
}
_EXECUTE: Final = {"bun": ("bunx",), "npm": ("npx",), "pnpm": ("pnpm", "exec"), "yarn": ("yarn",)}
_PRODUCTION: Final = ("env", "NODE_ENV=production")
_SCRIPTS: Final = ("dev", "start:dev", "develop", "start", "serve")
# the first of what serves what was built
_FINISHED: Final = ("start:prod", "start", "develop", "serve", "dev")
_ENTRIES: Final = tuple(
    f"{folder}{name}.{kind}"
    for folder in ("", "src/")
    for name in ("server", "serve", "index", "app", "main")
    for kind in ("ts", "js", "mjs", "cjs", "tsx")
)
_SERVES: Final = re.compile(r"Bun\.serve\s*\(|\.listen\s*\(|\bcreateServer\s*\(|\bserve\s*\(")
_BUN: Final = re.compile(r"\bBun\.|from [\"']bun[\"':]")
_OPERATORS: Final = re.compile(r"[|&;<>()`$\n]")
# options that say where it listens, with the number of words that follow
_WHERE: Final = {"--host": 1, "--port": 1, "--hostname": 1, "-p": 1, "-H": 1}
# servers that take their address by arguments, not from PORT and HOST
_TOLD: Final = {
    "fastify": "--address 0.0.0.0 --port $PORT",
    "live-server": "--host=0.0.0.0 --port=$PORT",
    "eleventy": "--port $PORT",
    "gatsby": "--host 0.0.0.0 --port $PORT",
    "ng": "--host 0.0.0.0 --port $PORT",
    **dict.fromkeys(("docusaurus", "vitepress", "vinxi", "vue-cli-service"), "--host 0.0.0.0 --port $PORT"),
}
# programs that run a file once, and words by which they look for edits themselves
_PLAIN: Final = frozenset({"node", "bun", "tsx", "ts-node"})
_LOOKS: Final = frozenset({"watch", "--watch", "--hot"})
# for its program where it is started by a script among others, which takes no arguments
_FASTIFY: Final = ("env", "FASTIFY_ADDRESS=0.0.0.0")
_MADE: Final = re.compile(r"(?:^|[\s=\"'])(?:\./)?(dist|build|out|\.output|\.next|lib)/")
# settings of a configuration by which what is built has no server; not in a comment
_EXPORTED: Final = re.compile(r"^(?![ \t]*[/*]).*\boutput[ \t]*:[ \t]*[\"']export[\"']", re.MULTILINE)
_SERVERLESS: Final = re.compile(r"^(?![ \t]*[/*]).*\bssr[ \t]*:[ \t]*false\b", re.MULTILINE)
_ASSIGNED: Final = re.compile(r"[A-Za-z_]\w*=\S*|cross-env(?:-shell)?|env")


def project_of(clues: Clues) -> Project:
    """Return the folder's package.json."""
    if "package.json" in clues.names and "package.json" not in clues.texts:
        return Project(readable=False)
    text = clues.texts.get("package.json")
    return project(None if text is None else text.encode())


def framework_of(said: Project) -> Framework | None:
    """Return the framework with a dev server among a project's packages."""
    found = recognise((), said.packages)
    return found if found is not None and found.packages else None


def serves(said: Project) -> bool:
    """Return whether a project's packages include a framework or a server."""
    return framework_of(said) is not None or any(package in said.packages for package, _ in _SERVERS)


def title(said: Project) -> str:
    """Return the name, for people, of what a project is made with."""
    framework = framework_of(said)
    if framework is not None:
        return framework.title
    return next((title for package, title in _SERVERS if package in said.packages), "Node")


def detect(clues: Clues) -> Detected | None:
    """Return how a project is installed and started; None if it is not JavaScript."""
    said = project_of(clues)
    if not said.readable:
        return Detected(
            "node",
            "Node",
            "there is a package.json",
            trouble="package.json is not JSON, or larger than 256 KiB: correct it",
        )
    manager, _ = manager_of(clues, said)
    install, installed = install_of(clues, said)
    if said.linked:
        name = min(said.linked)
        return Detected(
            "node",
            title(said),
            "there is a package.json",
            install,
            installed,
            trouble=f"package.json needs {show(name)} from outside this folder: deploy the folder above, "
            "and say how to start this app, as in `--start 'npm run dev --workspace apps/web'`",
        )
    framework = framework_of(said)
    if framework is not None and clues.production and not _serves_itself(said):
        return _built(framework, clues, said, manager, install, installed)
    if framework is not None and (found := _dev_server(framework, said, manager)) is not None:
        start, started = found
        package = min(framework.packages & said.packages)
        return Detected(
            framework.name,
            framework.title,
            f"package.json names {package}",
            install,
            installed,
            start,
            started,
        )
    return _server(clues, said, manager, install, installed)


def _serves_itself(said: Project) -> bool:
    """Return whether a project has its own server beside its framework."""
    return any(package in said.packages for package, _ in _SERVERS) and "start" in said.scripts


def _built(
    framework: Framework, clues: Clues, said: Project, manager: str, install: Command, installed: str
) -> Detected:
    """Return how a project is built and served."""
    serve, output = framework.serve, framework.output
    spa = framework.name == "vite"  # as its own preview does
    if framework.name == "astro" and "@astrojs/node" in said.packages:
        serve, output = ("node", "dist/server/entry.mjs"), ""
    elif framework.name == "sveltekit" and "@sveltejs/adapter-node" in said.packages:
        serve = ("node", "build")
    elif framework.name == "sveltekit" and "@sveltejs/adapter-static" in said.packages:
        output = "build"
    elif framework.name == "next" and _configured(clues, "next", _EXPORTED):
        output = "out"
    elif framework.name == "react-router" and _configured(clues, "react-router", _SERVERLESS):
        output, spa = "build/client", True
    work = framework.dev[-1].replace("dev", "build") if len(framework.dev) > 1 else "build"
    build = (
        _run(manager, "build") if "build" in said.scripts else (*_EXECUTE[manager], framework.dev[0], work)
    )
    found = Detected(
        framework.name,
        framework.title,
        f"package.json names {min(framework.packages & said.packages)}",
        _then(install, build),
        f"{installed}, and it is built",
    )
    if output:
        return replace(found, static=output, started="the gateway's own file server", spa=spa)
    if not serve:
        return replace(
            found,
            trouble="SvelteKit's build here is not a server: use @sveltejs/adapter-node or "
            "@sveltejs/adapter-static, or deploy its dev server",
        )
    words = serve if serve[0] == "node" else (*_EXECUTE[manager], *serve)
    return replace(found, start=(*_PRODUCTION, *words), started=f"what the build of {framework.title} made")


def _configured(clues: Clues, name: str, setting: re.Pattern[str]) -> bool:
    """Say whether a framework's configuration has a setting, as far as a look at its lines tells."""
    kinds = (f"{module}{language}" for module in ("", "m", "c") for language in ("ts", "js"))
    return any(setting.search(clues.text(f"{name}.config.{kind}")) is not None for kind in kinds)


def _then(install: Command, build: Command) -> Command:
    line = shlex.join(build)
    return ("sh", "-c", f"{shlex.join(install)} && {line}" if install else line)


def _server(clues: Clues, said: Project, manager: str, install: Command, installed: str) -> Detected | None:
    """Return how a server is started: by a script, or directly by its file."""
    package, kind = next((server for server in _SERVERS if server[0] in said.packages), (None, "Node"))
    name = kind.lower()
    why = f"package.json names {package}" if package else "there is a package.json"
    order = _FINISHED if clues.production else _SCRIPTS
    script = next((script for script in order if said.scripts.get(script, "").strip()), None)
    if script is not None:
        text = said.scripts[script]
        lacks = _unbuilt(text, clues)
        if "build" in said.scripts and (lacks or clues.production):
            install = _then(install, _run(manager, "build"))
            installed += f", and `build`, since `{script}` needs {lacks}/" if lacks else ", and it is built"
        started = f"its script `{script}` ({_short(text)})"
        if clues.production:
            start = (*_PRODUCTION, *_run(manager, script, *_told(text)))
        else:
            start = _run(manager, script, *_told(text))
        if "fastify-cli" in said.packages and start[-1] != "$PORT":
            start = (*_FASTIFY, *start)
        watch = not clues.production and _plain_program(text)
        return Detected(name, kind, why, install, installed, start, started, watch=watch)
    entry = _entry(clues, said, serving=package is not None)
    if entry is not None:
        text = clues.text(entry)
        bun = entry.endswith(("ts", "tsx")) or bool(_BUN.search(text))
        if package is None and "Bun.serve" in text:
            name, kind, why = "bun", "Bun.serve", f"{entry} calls it"
        elif package is None:
            why = f"{entry} is a server"
        start = ("bun" if bun else "node", entry)
        started = f"{entry}, since there is no script for it"
        return Detected(name, kind, why, install, installed, start, started, watch=not clues.production)
    if "package.json" not in clues.names:
        return None
    others = ", ".join(show(script) for script in list(said.scripts)[:8]) or "none"
    return Detected(
        name,
        kind,
        why,
        install,
        installed,
        trouble=f"package.json has no script `dev` or `start` (its scripts: {others}), and names no "
        "known framework: add a script, or give a command with `start` (--start)",
    )


def manager_of(clues: Clues, said: Project) -> tuple[str, str]:
    """Return the package manager, and why."""
    named = said.manager.partition("@")[0]
    found = [(file, manager) for file, manager in _LOCKFILES if file in clues.names]
    if named in _MANAGERS:
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
    if "package.json" not in clues.names:
        return (), "there is no package.json"
    if not said.packages and not said.workspaces:
        return (), "package.json names no packages"
    manager, why = manager_of(clues, said)
    locked = any(file in clues.names for file, kind in _LOCKFILES if kind == manager)
    if manager == "yarn" and (
        ".yarnrc.yml" in clues.names or said.manager.startswith(("yarn@2", "yarn@3", "yarn@4"))
    ):
        return (("yarn", "install", "--immutable") if locked else ("yarn", "install")), why
    return (_LOCKED[manager] if locked else (manager, "install")), why


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
        own = shlex.split(text)
        if any(word.partition("=")[0] in _WHERE for word in own):
            return (
                *_EXECUTE[manager],
                *_elsewhere(own),
                *listen,
            ), f"{told}, on the port given here"
        return _run(manager, script, *listen), f"{told}, told where to listen"
    if any(script in said.scripts for script in ("dev", "start")):
        return None
    return (*_EXECUTE[manager], *framework.dev, *listen), "no script starts it, so its own command does"


def _plain(framework: Framework, text: str) -> bool:
    """Return whether a script is just the framework's command, so that appended arguments go to it."""
    if _OPERATORS.search(text):
        return False
    try:
        words = shlex.split(text)
    except ValueError:
        return False
    first = next((word for word in words if not _ASSIGNED.fullmatch(word)), "")
    return program(first) in framework.programs


def _told(text: str) -> tuple[str, ...]:
    """Return the arguments to append to a script to say where it listens, if it takes any."""
    words = text.split()
    first = next((word for word in words if not _ASSIGNED.fullmatch(word)), "")
    if _OPERATORS.search(text) or any(word.partition("=")[0] in _WHERE for word in words):
        return ()
    return tuple(_TOLD.get(program(first), "").split())


def _plain_program(text: str) -> bool:
    """Say whether a script is one program that starts a file, and does not itself look for edits."""
    if _OPERATORS.search(text):
        return False
    words = [word for word in text.split() if not _ASSIGNED.fullmatch(word)]
    return bool(words) and program(words[0]) in _PLAIN and not _LOOKS.intersection(words)


def _elsewhere(words: list[str]) -> tuple[str, ...]:
    """Return the words of a command without the options that say where it listens."""
    kept, skip = list[str](), False
    for at, word in enumerate(words):
        if skip:
            skip = False
            continue
        name, equals, _ = word.partition("=")
        if name in _WHERE and not _ASSIGNED.fullmatch(word):
            following = words[at + 1] if at + 1 < len(words) else "-"
            skip = not equals and not following.startswith("-")
            continue
        kept.append(word)
    first = next((at for at, word in enumerate(kept) if not _ASSIGNED.fullmatch(word)), 0)
    return tuple(kept[first:])


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
