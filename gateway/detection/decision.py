"""Decide from its clues what a folder is."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from gateway.detection import node, python
from gateway.detection.clues import Clues
from gateway.detection.detected import Detected
from gateway.detection.monorepo import several
from gateway.rootfs.paths import show

_BUILT: Final = ("public", "dist", "build", "_site", "out", "www", "site", "docs")
_WEB: Final = re.compile(r"^web[ \t]*:[ \t]*(\S[^\r\n]{0,2000})$", re.MULTILINE)
# its other processes, of which so many are named
_OTHERS: Final = re.compile(r"^(?!web[ \t]*:)([\w-]{1,40})[ \t]*:", re.MULTILINE | re.ASCII)
_NAMED: Final = 3
_LOCAL: Final = "PATH=node_modules/.bin:.venv/bin:$PATH"

_DEVELOPS: Final = re.compile(
    r"\b(?:flask(?: .{0,200})? run|manage\.py runserver|fastapi dev|nodemon|(?:vite|next|nuxt|astro|run) dev)"
    r"\b|--(?:reload|hot|watch)\b|\bvite(?: --|$)"
)
# files of what is started by no command of ours; those of the first table also beside a package.json
_FOREIGN: Final = {
    "artisan": ("a Laravel application", "php"),
    "bin/rails": ("a Ruby on Rails application", "ruby"),
    "config/application.rb": ("a Ruby on Rails application", "ruby"),
    "mix.exs": ("an Elixir project", "mix"),
}
_LANGUAGES: Final = {
    "go.mod": ("a Go module", "go"),
    "Cargo.toml": ("a Rust crate", "cargo"),
    "Gemfile": ("a Ruby application", "ruby"),
    "config.ru": ("a Ruby application", "ruby"),
    "composer.json": ("a PHP application", "php"),
    "index.php": ("a PHP application", "php"),
    "public/index.php": ("a PHP application", "php"),
    "pom.xml": ("a Java project of Maven", "mvn"),
    "build.gradle": ("a Java or Kotlin project of Gradle", "gradle"),
    "build.gradle.kts": ("a Java or Kotlin project of Gradle", "gradle"),
    "build.sbt": ("a Scala project", "sbt"),
    "deno.json": ("a Deno project", "deno"),
    "deno.jsonc": ("a Deno project", "deno"),
    "deno.lock": ("a Deno project", "deno"),
    "pubspec.yaml": ("a Dart or Flutter project", "dart"),
    "Package.swift": ("a Swift package", "swift"),
    "gleam.toml": ("a Gleam project", "gleam"),
    "project.clj": ("a Clojure project", "lein"),
    "deps.edn": ("a Clojure project", "clojure"),
    "build.zig": ("a Zig project", "zig"),
    "stack.yaml": ("a Haskell project", "stack"),
}
_DOTNET: Final = re.compile(r"(?:[^/]+/)?[^/]+\.(?:cs|fs|vb)proj|[^/]+\.slnx?")

_EMPTY: Final = (
    "there are no files in this folder: name another one, or deploy a template "
    "(`incus-gateway templates` lists them)"
)
_HOW: Final = "give a command with `start` (--start), or write a site.toml"


def detect(clues: Clues) -> Detected:
    """Return what a folder is; with `trouble` if there is no way to start it."""
    found = _detected(clues)
    if found.trouble or not (others := _OTHERS.findall(clues.text("Procfile"))[:_NAMED]):
        return found
    names = " and ".join(f"`{name}`" for name in others)
    do = "does" if len(others) == 1 else "do"
    return replace(found, why=f"{found.why}; {names} of the Procfile {do} not run here")


def _detected(clues: Clues) -> Detected:
    if clues.empty:
        return Detected("empty", "an empty folder", "it has no files", trouble=_EMPTY)
    web = _WEB.search(clues.text("Procfile"))
    known = clues.names & {"package.json", *python.MANIFESTS}
    if (foreign := _foreign(clues, known=bool(known))) is not None and web is None:
        return foreign
    if foreign is None and (apps := several(clues)) is not None:
        return apps
    found = (node.detect(clues) or python.detect(clues)) if foreign is None else None
    if (
        found is not None
        and (found.start or found.static)
        and (web is None or (found.name in _ON_THEIR_OWN and not clues.production))
    ):
        return found
    if web is not None and clues.production and _DEVELOPS.search(web[1]):
        return Detected(
            "procfile",
            "Procfile",
            "it names a process `web`",
            install=found.install if found is not None else (),
            trouble=f"`web` of the Procfile ({show(web[1].strip()[:100])}) is for development only: write "
            "there what serves the site, or give it with `start` (--start)",
        )
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
    if known and (foreign := _foreign(clues, known=False)) is not None:
        return foreign
    told = found is not None and (found.name not in ("node", "python") or node.scripted(clues))
    if not told and (static := _static(clues)) is not None:
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


def _foreign(clues: Clues, *, known: bool) -> Detected | None:
    """Return the result for a folder in a language that we do not run; `known` if there is one that we do."""
    files = _FOREIGN if known else _FOREIGN | _LANGUAGES
    file = next((name for name in files if name in clues.names), None)
    what, program = files[file] if file is not None else ("a .NET project", "dotnet")
    if file is None:
        file = next(iter(sorted(name for name in clues.names if _DOTNET.fullmatch(name))), None)
        if known or file is None:
            return None
    return Detected(
        *("foreign", what, f"there is {show(file)}"),
        trouble=f"this is {what} (there is {show(file)}), which is not started by itself: give its commands "
        f"with `install` and `start` (--install, --start), or in a site.toml. The image has no {program}: "
        "`install` must bring it, or the gateway's operator adds it by `incus-gateway image build`",
    )


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
