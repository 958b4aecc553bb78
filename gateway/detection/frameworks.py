"""Recognise the framework that a site is made with, and say what is known of each.

`TABLE` is data: what starts a framework, and what it needs to work here. What a project is made of is read
from its package.json, which is whatever a tenant wrote: a bounded part of it, and only names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import orjson

Mode = Literal["dev", "production"]
Work = Literal["dev", "production", "build"]

_MANIFEST_MAX: Final = 256 << 10  # bytes of a package.json that are read; larger ones are none
_PACKAGES: Final = 2000  # that one may name
_SCRIPTS: Final = 200
_NAME: Final = 214  # characters of a package's name, npm's own limit
_SCRIPT: Final = 2000  # characters of a script that are looked at
_WORDS: Final = 256  # of a command, once its scripts are looked up
_DEPTH: Final = 4  # of scripts that run scripts
_DEPENDENCIES: Final = ("dependencies", "devDependencies")
_LINKS: Final = ("workspace:", "link:", "portal:", "file:..")  # versions of what lies outside of a folder
_SHELLS: Final = frozenset({"sh", "bash", "dash"})
_RUNNERS: Final = frozenset({"bun", "npm", "pnpm", "yarn"})
_WORD: Final = re.compile(r"[^\s;&|()'\"]+")
# what a framework's program does instead of serving while somebody works on the site
_OTHER: Final = frozenset(
    ("add", "build", "check", "export", "generate", "info", "lint", "optimize", "prepare", "preview")
) | {"serve", "start", "sync", "telemetry", "typegen"}
_BUILDS: Final = frozenset({"build", "generate"})
_WORKS: Final[Mapping[Work, str]] = {
    "dev": "the dev server of",
    "production": "a site made with",
    "build": "building",
}

_HOST_AND_PORT: Final = "--host 0.0.0.0 --port $PORT"
_VITE: Final = frozenset({5173, 4173})  # its dev server's, its preview's


@dataclass(frozen=True, slots=True)
class Framework:
    """What is known of one framework. `title` is what people call it, `dev` starts its dev server.

    `serve` starts what its build made, or `output` is the folder of it whose files are the site.

    It is recognised by one of its `packages` and by the `programs` that start it, of which the first is its
    own and the others may start others too. `serving` are subcommands that start its dev server although
    others use that word for something else. `ports` are where it serves if nobody says where, and `listen`
    how it is told to serve on 0.0.0.0:$PORT: arguments of its program, or code of a site without one.
    `needs` is the memory in MiB that a tenant must have for a starter of it (`tests/bench/frameworks`).
    """

    name: str
    title: str
    programs: tuple[str, ...] = ()
    packages: frozenset[str] = frozenset()
    serving: frozenset[str] = frozenset()
    ports: frozenset[int] = frozenset()
    listen: str = _HOST_AND_PORT
    dev: tuple[str, ...] = ()
    serve: tuple[str, ...] = ()
    output: str = ""
    needs: Mapping[Work, int] = field(default_factory=dict)


# what is a plugin of another, and started by its program, stands before it
TABLE: Final[tuple[Framework, ...]] = (
    Framework(
        "next",
        "Next.js",
        ("next",),
        frozenset({"next"}),
        ports=frozenset({3000}),
        listen="--hostname 0.0.0.0 --port $PORT",
        dev=("next", "dev"),
        serve=("next", "start", "--hostname", "0.0.0.0", "--port", "$PORT"),  # noqa: S104
        needs={"dev": 640, "production": 128, "build": 640},
    ),
    Framework(
        "nuxt",
        "Nuxt",
        ("nuxt", "nuxi"),
        frozenset({"nuxt"}),
        ports=frozenset({3000}),
        dev=("nuxt", "dev"),
        serve=("node", ".output/server/index.mjs"),
        needs={"dev": 640, "production": 128, "build": 640},
    ),
    Framework(
        "sveltekit",
        "SvelteKit",
        ("svelte-kit", "vite"),
        frozenset({"@sveltejs/kit"}),
        ports=_VITE,
        dev=("vite", "dev"),
        needs={"dev": 704, "production": 256, "build": 448},
    ),
    Framework(
        "astro",
        "Astro",
        ("astro",),
        frozenset({"astro"}),
        ports=frozenset({4321}),
        dev=("astro", "dev"),
        output="dist",
        needs={"dev": 512, "production": 128, "build": 256},
    ),
    Framework(
        "react-router",
        "React Router",
        ("react-router", "react-router-serve", "vite"),
        frozenset({"@react-router/dev"}),
        ports=_VITE,
        dev=("react-router", "dev"),
        serve=("react-router-serve", "build/server/index.js"),
    ),
    Framework(
        "remix",
        "Remix",
        ("remix", "remix-serve", "vite"),
        frozenset({"@remix-run/dev"}),
        ports=_VITE,
        dev=("remix", "vite:dev"),
        serve=("remix-serve", "build/server/index.js"),
    ),
    Framework(
        "vite",
        "Vite",
        ("vite",),
        frozenset({"vite"}),
        serving=frozenset({"serve"}),
        ports=_VITE,
        dev=("vite",),
        output="dist",
        needs={"dev": 256, "build": 192},
    ),
    # before Bun, which may only have run the script that starts it
    Framework("node", "Node", ("node",), listen='server.listen(process.env.PORT, "0.0.0.0")'),
    Framework("bun", "Bun", ("bun",), listen='Bun.serve({hostname: "0.0.0.0", port: process.env.PORT})'),
)


@dataclass(frozen=True, slots=True)
class Project:
    """What a package.json says: which packages it names, and its scripts.

    `linked` are those of its packages that lie elsewhere in a larger tree, `manager` is its `packageManager`,
    `workspaces` whether it is the top of such a tree. One that is not `readable` says nothing.
    """

    packages: frozenset[str] = frozenset()
    scripts: Mapping[str, str] = field(default_factory=dict)
    linked: frozenset[str] = frozenset()
    manager: str = ""
    main: str = ""
    workspaces: bool = False
    readable: bool = True


def project(manifest: bytes | None) -> Project:
    """Read a package.json; what is missing, too large or no such thing says nothing. Do it off the loop."""
    if manifest is None:
        return Project()
    if len(manifest) > _MANIFEST_MAX:
        return Project(readable=False)
    try:
        said = orjson.loads(manifest)
    except orjson.JSONDecodeError:  # nesting included
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
        _text(said, "packageManager"),
        _text(said, "main"),
        isinstance(said, dict) and "workspaces" in said,
        isinstance(said, dict),
    )


def expanded(start: Sequence[str], project: Project) -> tuple[str, ...]:
    """Return the words of a command with those of the scripts that it runs behind them.

    `bun run dev` becomes `bun run dev vite --open`; words are parted by spaces and what a shell parts by. So
    are those that a shell is given by `-c`.
    """
    words = list(start[:_WORDS])
    if len(words) > 2 and program(words[0]) in _SHELLS and words[1] == "-c":
        words += _WORD.findall(words[2][:_SCRIPT])[: _WORDS - len(words)]
    at, left = 0, _DEPTH
    while left and (script := _script(words[at:], project)) is not None:
        at, left = len(words), left - 1
        words += _WORD.findall(script)[: _WORDS - len(words)]
    return tuple(words)


def recognise(start: Sequence[str], packages: Collection[str]) -> Framework | None:
    """Return the framework of a site by the words that start it (`expanded`) and the packages that it names.

    One whose program starts it comes first; what a build made is started by a plain `bun` or `node`.
    """
    # who only runs a script is not what serves
    ran = len(start) > 2 and program(start[0]) in _RUNNERS and start[1] == "run" and "." not in start[2]
    programs = {program(word) for word in start[1 if ran else 0 :]}
    named = [framework for framework in TABLE if not framework.packages.isdisjoint(packages)]
    started = [framework for framework in named if not programs.isdisjoint(framework.programs)]
    own = [framework for framework in TABLE if framework.programs[0] in programs]
    unnamed = [framework for framework in own if framework.packages]
    return next(iter((*started, *unnamed, *named, *own)), None)


def mode(framework: Framework, start: Sequence[str]) -> Mode:
    """Say whether the words that start a site (`expanded`) start a dev server, or what was built before."""
    if framework.packages:
        for at, word in enumerate(start):
            name = program(word)
            if name in framework.programs and not name.endswith("-serve"):
                command = start[at + 1] if at + 1 < len(start) else ""
                if command not in _OTHER or command in framework.serving:
                    return "dev"
    return "production"


def builds(framework: Framework, install: Sequence[str]) -> bool:
    """Say whether the words that install a site (`expanded`) build it, too."""
    return any(
        program(word) in framework.programs and command in _BUILDS
        for word, command in itertools.pairwise(install)
    )


def shortage(
    framework: Framework | None, start: Sequence[str], memory: int, install: Sequence[str] = ()
) -> str:
    """Say that a tenant of so many bytes is too small to start a site by these words, or to build it."""
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
        "may end it; give the tenant a larger size"
    )


def listening(framework: Framework | None, start: Sequence[str]) -> str:
    """Say how a site that these words start (`expanded`) is told to serve on 0.0.0.0:$PORT."""
    if framework is not None:
        if not framework.packages:
            return f"with {framework.name}, {framework.listen}"
        if not {program(word) for word in start}.isdisjoint(framework.programs):
            return f"with {framework.name}, `{framework.listen}` behind its command in `start`"
    return "give it $PORT in `start`, or have it read the variable PORT"


def program(word: str) -> str:
    """Return the program that a word may name: `vite` for `node_modules/vite/bin/vite.js`."""
    name = word[-_NAME:].rpartition("/")[2]
    return name.removesuffix(".js").removesuffix(".mjs")


def _script(words: Sequence[str], project: Project) -> str | None:
    """Return the script that the first words run: `bun run dev`, `npm start`, `yarn dev`."""
    for at, word in enumerate(words):
        if program(word) in _RUNNERS:
            for name in words[at + 1 : at + 5]:
                if name in project.scripts:
                    return project.scripts[name]
    return None


def _text(said: Any, key: str) -> str:
    found = said.get(key) if isinstance(said, dict) else None
    return found[:_NAME] if isinstance(found, str) and found.isprintable() else ""


def _items(said: Any, key: str) -> list[tuple[str, Any]]:
    inner = said.get(key) if isinstance(said, dict) else None
    return list(inner.items()) if isinstance(inner, dict) else []
