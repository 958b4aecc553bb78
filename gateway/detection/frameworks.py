"""Recognise the framework of a site, and hold what is known about each.

`TABLE` is the data of `frameworks.toml`: how a framework is started, built and served. A project's
packages are read from its package.json, which is untrusted: a bounded part of it, and only names.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import orjson

Mode = Literal["dev", "production"]
Work = Literal["dev", "production", "build"]

_MANIFEST_MAX: Final = 256 << 10  # bytes of a package.json; a larger one is ignored
_PACKAGES: Final = 2000  # packages in it
_SCRIPTS: Final = 200
_NAME: Final = 214  # characters of a package's name, npm's own limit
_SCRIPT: Final = 2000  # characters of a script that are read
_WORDS: Final = 256  # words of a command with those of its scripts
_DEPTH: Final = 4  # depth of scripts that run scripts
_DEPENDENCIES: Final = ("dependencies", "devDependencies")
_LINKS: Final = ("workspace:", "link:", "portal:", "file:..")  # versions outside the folder
_SHELLS: Final = frozenset({"sh", "bash", "dash"})
_RUNNERS: Final = frozenset({"bun", "npm", "pnpm", "yarn"})
# of npm-run-all, which run each script that is named, as `dev:*` too; concurrently names them `npm:dev:*`
_TOGETHER: Final = frozenset({"npm-run-all", "run-p", "run-s"})
_NAMED: Final = re.compile(r"(?:npm|pnpm|yarn|bun):(.+)")
_WORD: Final = re.compile(r"[^\s;&|()'\"]+")
# subcommands that do something else than run the dev server
_OTHER: Final = frozenset(
    ("add", "build", "check", "export", "generate", "info", "lint", "optimize", "prepare", "preview")
) | {"serve", "start", "sync", "telemetry", "typegen"}
_BUILDS: Final = frozenset({"build", "generate"})
_WORKS: Final[Mapping[Work, str]] = {
    "dev": "the dev server of",
    "production": "a site made with",
    "build": "building",
}


TOOLS: Final[Mapping[str, Any]] = tomllib.loads(Path(__file__).with_name("tools.toml").read_text())
"""Package managers, servers and languages; `tools.toml` says what each is."""


@dataclass(frozen=True, slots=True)
class BuildOutput:
    """What a build makes: `serve` is the command that serves it, or `output` the folder with its files.

    Only where `package` is installed and `config` found in the framework's configuration.
    """

    serve: str = ""
    output: str = ""
    package: str = ""
    config: str = ""
    spa: bool = False


@dataclass(frozen=True, slots=True)
class Framework:
    """One framework; `frameworks.toml` says what each field is. Node and Bun have no `packages`.

    `title` is its name for people. Their `listen` is code of a site that has no framework.
    """

    name: str
    title: str
    programs: tuple[str, ...]
    packages: frozenset[str] = frozenset()
    serving: frozenset[str] = frozenset()
    needed: str = ""
    ports: frozenset[int] = frozenset()
    listen: str = "--host 0.0.0.0 --port $PORT"
    dev: str = ""
    build: str = ""
    made: tuple[BuildOutput, ...] = ()
    lacks: str = ""
    needs: Mapping[Work, int] = field(default_factory=dict)


def _read() -> Iterator[Framework]:
    kinds = {"programs": tuple, "packages": frozenset, "serving": frozenset, "ports": frozenset}
    for name, said in tomllib.loads(Path(__file__).with_name("frameworks.toml").read_text()).items():
        made = tuple(BuildOutput(**one) for one in said.pop("made", ()))
        yield Framework(
            name,
            made=made,
            **{key: kinds.get(key, lambda as_it_is: as_it_is)(value) for key, value in said.items()},
        )


TABLE: Final[tuple[Framework, ...]] = (
    *_read(),
    # before Bun, which may only run the script that starts it
    Framework("node", "Node", ("node",), listen='server.listen(process.env.PORT, "0.0.0.0")'),
    Framework("bun", "Bun", ("bun",), listen='Bun.serve({hostname: "0.0.0.0", port: process.env.PORT})'),
)


@dataclass(frozen=True, slots=True)
class Project:
    """The contents of a package.json: its packages and scripts.

    `linked` are packages elsewhere in a larger repository, `manager` is its `packageManager`, `workspaces` is
    whether it is the top of such a repository. One that is not `readable` is empty.
    """

    packages: frozenset[str] = frozenset()
    scripts: Mapping[str, str] = field(default_factory=dict)
    linked: frozenset[str] = frozenset()
    name: str = ""
    manager: str = ""
    main: str = ""
    workspaces: bool = False
    readable: bool = True


def project(manifest: bytes | None) -> Project:
    """Parse a package.json; what is missing, too large or malformed is empty. Call it off the event loop."""
    if manifest is None:
        return Project()
    if len(manifest) > _MANIFEST_MAX:
        return Project(readable=False)
    try:
        said = orjson.loads(manifest)
    except orjson.JSONDecodeError:  # too deep nesting included
        return Project(readable=False)
    packages, linked = set[str](), set[str]()
    for kind in _DEPENDENCIES:
        for name, version in _items(said, kind)[: _PACKAGES - len(packages)]:
            if 0 < len(name) <= _NAME and name.isprintable():
                packages.add(name)
                if isinstance(version, str) and version.startswith(_LINKS):
                    linked.add(name)
    scripts = {
        name: script[:_SCRIPT]
        for name, script in _items(said, "scripts")[:_SCRIPTS]
        if isinstance(script, str) and len(name) <= _NAME
    }
    return Project(
        frozenset(packages),
        scripts,
        frozenset(linked),
        _text(said, "name"),
        _text(said, "packageManager"),
        _text(said, "main"),
        isinstance(said, dict) and "workspaces" in said,
        isinstance(said, dict),
    )


def expanded(start: Sequence[str], project: Project) -> tuple[str, ...]:
    """Return the words of a command, followed by those of the scripts that it runs.

    `bun run dev` becomes `bun run dev vite --open`. Words are split at spaces and at a shell's operators,
    also in the argument of `sh -c`.
    """
    words = list(start[:_WORDS])
    if len(words) > 2 and program(words[0]) in _SHELLS and words[1] == "-c":
        words += _WORD.findall(words[2][:_SCRIPT])[: _WORDS - len(words)]
    piece, seen = words, set[str]()
    for _ in range(_DEPTH):
        names = [name for name in dict.fromkeys(_ran(piece, project)) if name not in seen]
        seen.update(names)
        piece = [word for name in names for word in _WORD.findall(project.scripts[name])]
        piece = piece[: _WORDS - len(words)]
        words += piece
    return tuple(words)


def recognise(start: Sequence[str], packages: Collection[str]) -> Framework | None:
    """Return the framework of a site, from the words that start it (`expanded`) and its packages.

    A framework whose program starts it takes precedence; a build is started by plain `bun` or `node`.
    """
    # a program that only runs a script is not the server
    ran = len(start) > 2 and program(start[0]) in _RUNNERS and start[1] == "run" and "." not in start[2]
    programs = {program(word) for word in start[1 if ran else 0 :]}
    named = [framework for framework in TABLE if not framework.packages.isdisjoint(packages)]
    started = [framework for framework in named if not programs.isdisjoint(framework.programs)]
    own = [framework for framework in TABLE if framework.programs[0] in programs]
    unnamed = [framework for framework in own if framework.packages]
    return next(iter((*started, *unnamed, *named, *own)), None)


def mode(framework: Framework, start: Sequence[str]) -> Mode:
    """Return whether the words that start a site (`expanded`) start a dev server, not a build."""
    if framework.packages:
        for at, word in enumerate(start):
            name = program(word)
            if name in framework.programs and not name.endswith("-serve"):
                command = start[at + 1] if at + 1 < len(start) else ""
                if framework.needed and framework.needed not in start[at:]:
                    continue
                if command not in _OTHER or command in framework.serving:
                    return "dev"
    return "production"


def builds(framework: Framework, install: Sequence[str]) -> bool:
    """Return whether the words that install a site (`expanded`) build it too."""
    return any(
        program(word) in framework.programs and command in _BUILDS
        for word, command in itertools.pairwise(install)
    )


def shortage(
    framework: Framework | None, start: Sequence[str], memory: int, install: Sequence[str] = ()
) -> str:
    """Return a warning if a tenant's memory, in bytes, is too small to start or build a site this way."""
    if framework is None:
        return ""
    works: list[Work] = [mode(framework, start)]
    if framework.packages and builds(framework, install):
        works.append("build")
    work = max(works, key=lambda one: framework.needs.get(one, 0))
    needs, has = framework.needs.get(work, 0), memory >> 20
    if has >= needs:
        return ""
    return (
        f"{_WORKS[work]} {framework.name} is known to need {needs} MiB, and the tenant has {has}: the kernel "
        "may kill it; give the tenant a larger size"
    )


def listening(framework: Framework | None, start: Sequence[str]) -> str:
    """Return advice: how to make a site started by these words (`expanded`) serve on 0.0.0.0:$PORT."""
    if framework is not None:
        if not framework.packages:
            return f"with {framework.name}, {framework.listen}"
        if not {program(word) for word in start}.isdisjoint(framework.programs):
            return f"with {framework.name}, add `{framework.listen}` to its command in `start`"
    return "pass $PORT to it in `start`, or let it read the variable PORT"


def program(word: str) -> str:
    """Return the program that a word may refer to: `vite` for `node_modules/vite/bin/vite.js`."""
    name = word[-_NAME:].rpartition("/")[2]
    return name.removesuffix(".js").removesuffix(".mjs")


def _ran(words: Sequence[str], project: Project) -> Iterator[str]:
    """Yield the scripts that these words run: `bun run dev`, `npm start`, `concurrently npm:dev:*`."""
    for at, word in enumerate(words):
        if program(word) in _RUNNERS:
            yield from (name for name in words[at + 1 : at + 5] if name in project.scripts)
        elif program(word) in _TOGETHER:
            yield from (name for pattern in words[at + 1 : at + 9] for name in _matching(pattern, project))
        elif (named := _NAMED.fullmatch(word)) is not None:
            yield from _matching(named[1], project)


def _matching(pattern: str, project: Project) -> Iterator[str]:
    beginning = pattern.removesuffix("*")
    for name in project.scripts:
        if name == pattern or (beginning != pattern and name.startswith(beginning)):
            yield name


def _text(said: Any, key: str) -> str:
    found = said.get(key) if isinstance(said, dict) else None
    return found[:_NAME] if isinstance(found, str) and found.isprintable() else ""


def _items(said: Any, key: str) -> list[tuple[str, Any]]:
    inner = said.get(key) if isinstance(said, dict) else None
    return list(inner.items()) if isinstance(inner, dict) else []
