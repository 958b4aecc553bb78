"""Frameworks: recognised by how a site is started and what it depends on; no package.json is believed."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from gateway.detection.frameworks import (
    TABLE,
    Project,
    expanded,
    listening,
    mode,
    project,
    recognise,
    shortage,
)

VITE = {"vite", "react"}


@pytest.mark.parametrize(
    ("start", "packages", "name", "how"),
    [
        ("bun --bun vite", VITE, "vite", "dev"),
        ("vite dev --port 3000", VITE, "vite", "dev"),
        ("vite serve", VITE, "vite", "dev"),
        ("vite preview --host", VITE, "vite", "production"),
        ("vite build && vite preview", VITE, "vite", "production"),
        ("./node_modules/.bin/vite --host", VITE, "vite", "dev"),
        ("node node_modules/vite/bin/vite.js", VITE, "vite", "dev"),
        ("vite", set(), "vite", "dev"),
        ("next dev --turbopack", {"next", "react"}, "next", "dev"),
        ("next start -p 3000", {"next"}, "next", "production"),
        ("node .next/standalone/server.js", {"next"}, "next", "production"),
        ("bunx nuxi dev", {"nuxt"}, "nuxt", "dev"),
        ("node .output/server/index.mjs", {"nuxt"}, "nuxt", "production"),
        ("vite dev", {"@sveltejs/kit", "vite"}, "sveltekit", "dev"),
        ("node build", {"@sveltejs/kit", "vite"}, "sveltekit", "production"),
        ("astro dev --host 0.0.0.0", {"astro", "vite"}, "astro", "dev"),
        ("astro preview", {"astro"}, "astro", "production"),
        ("react-router dev", {"@react-router/dev", "vite"}, "react-router", "dev"),
        ("react-router-serve ./build/server/index.js", {"@react-router/dev"}, "react-router", "production"),
        ("remix vite:dev", {"@remix-run/dev", "vite"}, "remix", "dev"),
        ("bun server.ts", set(), "bun", "production"),
        ("node server.js", {"express"}, "node", "production"),
        ("python3 -m http.server", set(), None, None),
        ("", set(), None, None),
    ],
)
def test_a_framework_is_recognised(start: str, packages: set[str], name: str | None, how: str | None) -> None:
    words = start.split()
    framework = recognise(words, packages)
    assert (framework and framework.name) == name
    if framework is not None:
        assert mode(framework, words) == how


def test_every_framework_of_the_table_is_found_by_its_packages() -> None:
    for framework in TABLE:
        for package in framework.packages:
            assert recognise(["node", "build"], {package}) is framework
    assert len({framework.name for framework in TABLE}) == len(TABLE)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("bun run dev", "bun run dev next dev"),
        ("npm start", "npm start bun run --bun dev next dev"),
        ("yarn --silent dev", "yarn --silent dev next dev"),
        ("bun run both", "bun run both next dev bun api.ts"),
        ("bun run missing", "bun run missing"),
        ("bun server.ts", "bun server.ts"),
    ],
)
def test_a_script_is_looked_up(start: str, words: str) -> None:
    scripts = {"dev": "next dev", "start": "bun run --bun dev", "both": "(next dev & bun api.ts)"}
    assert " ".join(expanded(start.split(), Project(scripts=scripts))) == words


def test_scripts_that_run_each_other_come_to_an_end() -> None:
    scripts = {"a": "bun run b " * 200, "b": "bun run a " * 200}
    began = time.process_time()
    assert len(expanded(["bun", "run", "a"], Project(scripts=scripts))) <= 256
    assert time.process_time() - began < 1


def test_a_manifest_is_read() -> None:
    said = {"dependencies": {"next": "16"}, "devDependencies": {"vite": "8"}, "scripts": {"dev": "next dev"}}
    read = project(json.dumps(said).encode())
    assert read.packages == {"next", "vite"}
    assert read.scripts == {"dev": "next dev"}


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        b"",
        b"\xff",
        b"[]",
        b"null",
        b'"vite"',
        b"[" * 100_000,
        b'{"dependencies":' * 10_000,
        b'{"dependencies": ["vite"], "devDependencies": "vite", "scripts": 7}',
        b'{"dependencies": null, "scripts": {"dev": ["vite"]}}',
        b'{"a":' + b"9" * 200_000 + b"}",
        b'{"dependencies": {"vite": "8"}, "description": "' + b"x" * (256 << 10) + b'"}',
        b'{"dependencies": {"\\u001b[31m": "8", "' + b"x" * 300 + b'": "8", "": "1"}}',
    ],
)
def test_what_is_no_manifest_says_nothing(manifest: bytes | None) -> None:
    began = time.process_time()
    assert replace(project(manifest), readable=True) == Project()
    assert time.process_time() - began < 1


def test_a_manifest_of_many_names_is_read_in_part() -> None:
    many = {f"p{number}": "1" for number in range(6000)}
    read = project(
        json.dumps({"dependencies": many, "devDependencies": {"vite": "8"}, "scripts": many}).encode()
    )
    assert 0 < len(read.packages) <= 2000
    assert len(read.scripts) <= 200


@pytest.mark.parametrize(
    ("start", "packages", "said"),
    [
        (["bunx", "astro", "dev"], {"astro"}, "with astro, add `--host 0.0.0.0 --port $PORT` to its command"),
        (["next", "dev"], {"next"}, "with next, add `--hostname 0.0.0.0 --port $PORT` to its command"),
        (["vite"], {"vite", "@sveltejs/kit"}, "with sveltekit, add `--host 0.0.0.0"),
        # what was built takes no arguments of the program that built it
        (["node", "build"], {"vite", "@sveltejs/kit"}, "pass $PORT to it in `start`"),
        (["bun", "serve.ts"], set(), "with bun, Bun.serve("),
        (["python3", "-m", "http.server"], set(), "pass $PORT to it in `start`"),
    ],
)
def test_each_is_told_in_its_own_way_where_to_listen(start: list[str], packages: set[str], said: str) -> None:
    assert listening(recognise(start, packages), start).startswith(said)


@pytest.mark.parametrize(
    ("name", "start", "memory", "said"),
    [
        ("sveltekit", ["vite", "dev"], 512, "704 MiB, and the tenant has 512"),
        ("sveltekit", ["vite", "dev"], 704, ""),
        ("sveltekit", ["node", "build"], 512, ""),
        ("sveltekit", ["node", "build"], 128, "a site made with sveltekit"),
        ("next", ["next", "dev"], 512, "the dev server of next"),
        ("next", ["next", "start"], 64, "a site made with next"),
        ("next", ["next", "start"], 128, ""),
        ("remix", ["remix-serve"], 16, ""),  # nobody knows
        ("bun", ["bun", "server.ts"], 16, ""),
    ],
)
def test_who_is_too_small_is_told_so(name: str, start: list[str], memory: int, said: str) -> None:
    framework = next(one for one in TABLE if one.name == name)
    found = shortage(framework, start, memory << 20)
    assert said in found and bool(found) is bool(said)
    assert shortage(None, start, memory << 20) == ""


@pytest.mark.parametrize(
    ("name", "start", "install", "memory", "said"),
    [
        ("nuxt", "node .output/server/index.mjs", "bun install && bun run build", 512, "building nuxt"),
        ("nuxt", "node .output/server/index.mjs", "bun install && bunx nuxt generate", 512, "building nuxt"),
        ("nuxt", "node .output/server/index.mjs", "bun install && bun run build", 640, ""),
        ("nuxt", "node .output/server/index.mjs", "bun install", 512, ""),
        ("nuxt", "node .output/server/index.mjs", "bun run build", 64, "building nuxt is known to need 640"),
        ("next", "next start", "bun run build", 512, "building next is known to need 640 MiB"),
        ("sveltekit", "vite dev", "bun run build", 512, "the dev server of sveltekit"),
        ("bun", "bun build.ts", "bun build index.ts", 16, ""),
    ],
)
def test_a_build_that_will_not_fit_is_told(
    name: str, start: str, install: str, memory: int, said: str
) -> None:
    """Of what the install command builds and what then runs, the one that needs more."""
    framework = next(one for one in TABLE if one.name == name)
    scripts = {"build": f"{framework.programs[-1]} build"}
    words = expanded(["sh", "-c", install], Project(scripts=scripts))
    found = shortage(framework, start.split(), memory << 20, words)
    assert said in found and bool(found) is bool(said)


def test_what_a_shell_is_given_is_looked_at() -> None:
    scripts = {"dev": "vite dev"}
    for line in ("node migrate.js && exec vite dev", "node migrate.js; bun run dev"):
        words = expanded(["sh", "-c", line], Project(frozenset(VITE), scripts))
        framework = recognise(words, VITE)
        assert framework is not None and (framework.name, mode(framework, words)) == ("vite", "dev"), line
