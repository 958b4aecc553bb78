"""Detection: what a folder without a manifest is, in the words that a person reads."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from gateway.deployments.publishing import for_production
from gateway.deployments.request import PublishBody
from gateway.deployments.template import Manifest, Overrides, uploaded, written
from gateway.deployments.verify import command_text
from gateway.detection import Clues, Detection, detect
from gateway.detection.sandbox import detect_sandboxed
from gateway.errors import InvalidParams, Unavailable
from tests.archives import archive
from tests.thorough import examples

Folder = Mapping[str, str]


def package(*names: str, **more: Any) -> str:
    """Return a package.json that names these packages."""
    return json.dumps({"dependencies": dict.fromkeys(names, "1")} | more)


def found(folder: Folder) -> Detection:
    return detect(Clues.of({name: text.encode() for name, text in folder.items()}))


def scripts(**said: str) -> dict[str, Any]:
    return {"scripts": said}


VITE = package("vite", **scripts(dev="vite", build="vite build"))
EXPRESS = package("express", **scripts(start="node index.js"))
# pages and an API, started by one script in development and served by one program in production
TEMPLATE1 = {
    "package.json": package("hono", "concurrently", "vite", **{"scripts": {
        "dev": 'bun x concurrently -k -n api,vite "bun dev:api" "bun dev:client"',
        "dev:api": "API_PORT=$((${PORT:-3333} + 1000)) bun server.ts",
        "dev:client": "vite",
        "build": "vite build",
        "preview": "NODE_ENV=production bun server.ts",
    }}),
    "server.ts": "export default { port: 1, fetch: app.fetch }",
    "index.html": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "lines"),
    [
        (
            {"index.html": "", "style.css": ""},
            (
                "static files: there is index.html",
                "install nothing: files need none",
                "serve the files of the folder: the gateway's own file server",
            ),
        ),
        (
            {"package.json": VITE, "index.html": "", "package-lock.json": "{}"},
            (
                "Vite: package.json names vite",
                "install npm ci: there is package-lock.json",
                "start npm run dev -- --host 0.0.0.0 --port $PORT: its script `dev` (vite), told where to "
                "listen",
            ),
        ),
        (
            {"package.json": EXPRESS, "index.js": "", "bun.lock": ""},
            (
                "Express: package.json names express",
                "install bun install --frozen-lockfile: there is bun.lock",
                "start bun run start: its script `start` (node index.js), restarted at each edit",
            ),
        ),
        (
            {"package.json": json.dumps(scripts(start="node server.js")), "server.js": ""},
            (
                "Node: there is a package.json",
                "install nothing: package.json names no packages",
                "start bun run start: its script `start` (node server.js), restarted at each edit",
            ),
        ),
    ],
)
def test_three_lines_say_what_was_chosen_and_why(folder: Folder, lines: tuple[str, ...]) -> None:
    assert found(folder).lines() == lines


DEV = "--host 0.0.0.0 --port $PORT"


@pytest.mark.parametrize(
    ("folder", "name", "start"),
    [
        ({"package.json": package("next", "react", **scripts(dev="next dev", start="next start"))}, "next",
         "bun run dev --hostname 0.0.0.0 --port $PORT"),
        ({"package.json": package("astro", **scripts(dev="astro dev")), "pnpm-lock.yaml": ""}, "astro",
         f"pnpm run dev {DEV}"),
        ({"package.json": package("vite", "@sveltejs/kit", **scripts(dev="vite dev")), "yarn.lock": ""},
         "sveltekit", f"yarn run dev {DEV}"),
        ({"package.json": package("nuxt", **scripts(dev="nuxt dev"))}, "nuxt", f"bun run dev {DEV}"),
        ({"package.json": package("vite", "@react-router/dev", **scripts(dev="react-router dev"))},
         "react-router", f"bun run dev {DEV}"),
        ({"package.json": package("vite", "@remix-run/dev", **scripts(dev="remix vite:dev"))}, "remix",
         f"bun run dev {DEV}"),
        # what it is told of a port elsewhere would not be found
        ({"package.json": package("vite", **scripts(dev="cross-env A=1 vite --port 8080 --host --open"))},
         "vite",
         f"bunx vite --open {DEV}"),
        ({"package.json": package("next", **scripts(dev="next dev -p 4000")), "package-lock.json": ""},
         "next", "npx next dev --hostname 0.0.0.0 --port $PORT"),
        ({"package.json": package("vite", **scripts(dev="concurrently 'vite' 'tsc -w'"))}, "vite",
         "bun run dev"),
        ({"package.json": package("vite"), "index.html": ""}, "vite", f"bunx vite {DEV}"),
        # a tool of theirs, and no site of it
        ({"package.json": package("vite", "express", **scripts(start="node server.js"))}, "express",
         "bun run start"),
        ({"package.json": package("hono", **scripts(dev="bun run --hot src/index.ts"))}, "hono",
         "bun run dev"),
        ({"package.json": package("fastify", main="app.js"), "app.js": ""}, "fastify", "node app.js"),
        ({"package.json": package("fastify", **scripts(dev="fastify start -w app.js"))}, "fastify",
         "bun run dev --address 0.0.0.0 --port $PORT"),
        ({"package.json": package("@angular/core", **scripts(start="ng serve")), "package-lock.json": ""},
         "angular",
         "npm run start -- --host 0.0.0.0 --port $PORT"),
        ({"server.ts": "Bun.serve({fetch})"}, "bun", "bun server.ts"),
        ({"package.json": "{}", "index.js": "http.createServer(x).listen(1)"}, "node", "node index.js"),
        ({"package.json": package("express", **scripts(dev="nodemon a.js", start="node a.js"))}, "express",
         "bun run dev"),
        ({"package.json": "{}", "public/index.html": ""}, "static", ""),
        ({"Procfile": "worker: x\nweb: ./serve $PORT\n"}, "procfile",
         "PATH=node_modules/.bin:.venv/bin:$PATH; ./serve $PORT"),
        ({"Procfile": "web: node x.js", "package.json": EXPRESS}, "procfile",
         "PATH=node_modules/.bin:.venv/bin:$PATH; node x.js"),
        ({"Procfile": "web: vite preview", "package.json": VITE}, "vite", f"bun run dev {DEV}"),
        ({"main.py": "app = FastAPI()", "requirements.txt": "fastapi[standard]>=0.1\n"}, "fastapi",
         ".venv/bin/python -m uvicorn main:app --host 0.0.0.0 --port $PORT --reload"),
        ({"src/main.py": "api: FastAPI = FastAPI()", "pyproject.toml":
          '[project]\ndependencies = ["fastapi", "uvicorn"]', "uv.lock": ""}, "fastapi",
         ".venv/bin/python -m uvicorn main:api --app-dir src --host 0.0.0.0 --port $PORT"),
        ({"app.py": "app = Flask(__name__)", "requirements.txt": "Flask"}, "flask",
         ".venv/bin/python -m flask --app app.py:app run --host 0.0.0.0 --port $PORT --reload --no-debugger"),
        ({"manage.py": "", "requirements.txt": "django"}, "django",
         ".venv/bin/python manage.py runserver 0.0.0.0:$PORT"),
        ({"main.py": "HTTPServer(('', 1), X).serve_forever()"}, "python", "python3 main.py"),
        # as its generator makes it: `start` compiles and looks for no edits
        ({"package.json": package("@nestjs/core", **{"scripts": {"start": "nest start", "start:dev":
          "nest start --watch"}})}, "nestjs", "bun run start:dev"),
        ({"package.json": package("fastify", "fastify-cli", **scripts(start="tsc && fastify start a.js"))},
         "fastify", "env FASTIFY_ADDRESS=0.0.0.0 bun run start"),
        # without a requirement, as django-admin and the first page of Flask's documentation leave one
        ({"manage.py": "", "app/settings.py": ""}, "django",
         ".venv/bin/python manage.py runserver 0.0.0.0:$PORT"),
        ({"hello.py": "x = Flask(__name__)"}, "flask",
         ".venv/bin/python -m flask --app hello.py:x run --host 0.0.0.0 --port $PORT --reload --no-debugger"),
    ],
)  # fmt: skip
def test_a_folder_is_known_by_its_files(folder: Folder, name: str, start: str) -> None:
    """And what is written down of it as a manifest says the same."""
    detected = found(folder)
    assert (detected.name, detected.trouble) == (name, "")
    assert detected.to_dict(3000)["start"] == start
    read = Manifest.model_validate(tomllib.loads(written(detected, 3000)))
    assert (read.start or ()) == detected.start and (read.install or ()) == detected.install
    assert read.static == detected.static


@pytest.mark.parametrize(
    ("files", "more", "install"),
    [
        ({"bun.lockb": ""}, {}, "bun install --frozen-lockfile"),
        ({"package-lock.json": ""}, {}, "npm ci"),
        ({"pnpm-lock.yaml": ""}, {}, "pnpm install --frozen-lockfile"),
        ({"yarn.lock": ""}, {}, "yarn install --frozen-lockfile"),
        ({"yarn.lock": "", ".yarnrc.yml": "", ".yarn/releases/yarn-4.cjs": ""}, {},
         "yarn install --immutable"),
        ({"yarn.lock": "", ".yarnrc.yml": ""}, {},
         'npm install --global --silent --prefix "$HOME/.local" @yarnpkg/cli-dist && '
         "export PATH=$HOME/.local/bin:$PATH && yarn install --immutable"),
        ({"yarn.lock": ""}, {"packageManager": "yarn@4.18.1+sha512.0f"},
         'npm install --global --silent --prefix "$HOME/.local" @yarnpkg/cli-dist@4.18.1 && '
         "export PATH=$HOME/.local/bin:$PATH && yarn install --immutable"),
        ({"yarn.lock": ""}, {"packageManager": "yarn@1.22.22"}, "yarn install --frozen-lockfile"),
        ({}, {}, "bun install"),
        ({}, {"packageManager": "pnpm@10.1.0"}, "pnpm install"),
        ({"package-lock.json": "", "yarn.lock": ""}, {"packageManager": "npm@11"}, "npm ci"),
    ],
)  # fmt: skip
def test_a_lockfile_names_the_package_manager(files: Folder, more: dict[str, Any], install: str) -> None:
    text = package("vite", **scripts(dev="vite"), **more)
    assert found({"package.json": text, **files}).to_dict(3000)["install"] == install


def test_of_two_lockfiles_it_says_which_one_counts() -> None:
    folder = {"package.json": VITE, "bun.lock": "", "package-lock.json": ""}
    assert found(folder).installed == "there is bun.lock (and package-lock.json, which is ignored)"


@pytest.mark.parametrize("more", [{}, {"package.json": EXPRESS}, {"package.json": VITE}])
def test_processes_of_a_procfile_that_do_not_run_are_named(more: Folder) -> None:
    detected = found({"Procfile": "web: ./serve\nworker: ./work\n# old: x\nrelease : ./move\n", **more})
    assert detected.lines()[0].endswith("; `worker` and `release` of the Procfile do not run here")
    assert "do not run" not in found({"Procfile": "web: ./serve", **more}).lines()[0]


def test_what_start_needs_is_built() -> None:
    """A script that starts what a build made has it made, where nothing else starts it."""
    text = package("express", **scripts(build="tsc", start="node ./dist/index.js"))
    detected = found({"package.json": text, "package-lock.json": ""})
    assert detected.install == ("sh", "-c", "npm ci && npm run build")
    assert "since `start` needs dist/" in detected.installed


@pytest.mark.parametrize(
    ("folder", "install"),
    [
        ({"manage.py": ""}, "uv venv --quiet --allow-existing --relocatable && uv pip install 'django'"),
        ({"main.py": "app = FastAPI()"},
         "uv venv --quiet --allow-existing --relocatable && uv pip install 'fastapi[standard]'"),
        ({"app.py": "app = Flask(__name__)", "pyproject.toml": "[tool.poetry]\n", "poetry.lock": ""},
         "env POETRY_VIRTUALENVS_IN_PROJECT=1 uvx poetry install --no-root --no-interaction"),
        ({"app.py": "app = Flask(__name__)", "pyproject.toml": "[project]\n", "poetry.lock": ""},
         "env POETRY_VIRTUALENVS_IN_PROJECT=1 uvx poetry install --no-root --no-interaction"),
        ({"app.py": "app = Flask(__name__)", "Pipfile": "[packages]\nflask = '*'\n"},
         "env PIPENV_VENV_IN_PROJECT=1 uvx pipenv install"),
        ({"app.py": "app = Flask(__name__)", "Pipfile": "", "Pipfile.lock": "{}", "requirements.txt": ""},
         "env PIPENV_VENV_IN_PROJECT=1 uvx pipenv sync"),
    ],
)  # fmt: skip
def test_packages_of_python_are_installed_by_what_names_them(folder: Folder, install: str) -> None:
    """Or by what a framework's own generator leaves out."""
    detected = found(folder)
    assert (detected.to_dict(3000)["install"], detected.trouble) == (install, "")


@pytest.mark.parametrize(
    ("scripts_of", "watch"),
    [
        ({"start": "node ./bin/www"}, True),
        ({"start": "NODE_ENV=x node a.js"}, True),
        ({"start": "node --watch a.js"}, False),
        ({"dev": "tsx watch src/index.ts"}, False),
        ({"dev": "nodemon a.js"}, False),
        ({"start": "node a.js && node b.js"}, False),
    ],
)
def test_a_server_that_looks_for_no_edits_is_started_anew_by_them(
    scripts_of: Mapping[str, str], watch: bool
) -> None:
    """While somebody works on it; what was built, or is published, is not."""
    detected = found({"package.json": package("express", scripts=scripts_of)})
    assert detected.watch is watch
    manifest = Manifest.model_validate(tomllib.loads(written(detected, 3000)))
    assert manifest.watch is watch
    assert (manifest.command[:2] == ("node", "-e")) is watch
    assert manifest.command[-len(detected.start) :] == detected.start
    files = {"package.json": package("express", scripts=scripts_of).encode()}
    assert not detect(Clues.of(files, production=True)).watch


def test_pages_of_an_app_that_has_one_are_all_that_one() -> None:
    """Of one page of Vite, unless its manifest says otherwise; a folder of files has what is in it."""
    for folder, more, spa in (
        ({"package.json": VITE}, "", True),
        ({"package.json": VITE}, "spa = false\n", False),
        ({"package.json": package("astro")}, "", False),
        ({"index.html": ""}, "", False),
        ({"index.html": ""}, "spa = true\n", True),
        ({"index.html": ""}, 'static = "."\nspa = true\n', True),
    ):
        files = {**folder, "site.toml": more + ("" if "static" in more else 'mode = "production"\n')}
        data = archive(*((name, text.encode()) for name, text in files.items()), manifest=None)
        template = uploaded(data)
        assert (template.manifest.command[-1] == "spa") is spa, (folder, more)


def test_djangos_dev_server_is_told_the_domain_however_it_is_named() -> None:
    """Found, or written down; by a program of ours before it, which nobody is shown."""
    for start in (found({"manage.py": ""}).start, ("python3", "manage.py", "runserver", "0.0.0.0:$PORT")):
        command = Manifest(start=start).command
        assert command[0] == start[0] and command[1] == "-c" and command[3:] == start[1:]
        assert command_text(command) == " ".join(start)
    assert Manifest(start=("python3", "manage.py", "migrate")).command[1] == "manage.py"


@pytest.mark.parametrize(
    ("folder", "install", "start"),
    [
        ({"package.json": VITE, "package-lock.json": ""}, "npm ci && npm run build", "dist"),
        ({"package.json": package("vite")}, "bun install && bunx vite build", "dist"),
        ({"package.json": package("next", **scripts(dev="next dev", build="next build"))},
         "bun install && bun run build",
         "env NODE_ENV=production bunx next start --hostname 0.0.0.0 --port $PORT"),
        ({"package.json": package("nuxt")}, "bun install && bunx nuxt build",
         "env NODE_ENV=production node .output/server/index.mjs"),
        ({"package.json": package("astro", "@astrojs/node")}, "bun install && bunx astro build",
         "env NODE_ENV=production node dist/server/entry.mjs"),
        ({"package.json": package("@sveltejs/kit", "@sveltejs/adapter-node", **scripts(build="vite build"))},
         "bun install && bun run build", "env NODE_ENV=production node build"),
        ({"package.json": package("@remix-run/dev")}, "bun install && bunx remix vite:build",
         "env NODE_ENV=production bunx remix-serve build/server/index.js"),
        ({"package.json": package("express", **scripts(dev="nodemon a", start="node a", build="tsc"))},
         "bun install && bun run build", "env NODE_ENV=production bun run start"),
        ({"package.json": VITE, "Procfile": "web: node x"}, "bun install && bun run build",
         "PATH=node_modules/.bin:.venv/bin:$PATH; node x"),
        ({"app.py": "app = Flask(__name__)", "requirements.txt": "flask\ngunicorn"},
         "uv venv --quiet --allow-existing --relocatable && uv pip install -r requirements.txt",
         ".venv/bin/python -m gunicorn --bind 0.0.0.0:$PORT app:app"),
        ({"a/app.py": "", "app.py": "def create_app():", "requirements.txt": "flask\nwaitress"},
         "uv venv --quiet --allow-existing --relocatable && uv pip install -r requirements.txt",
         ".venv/bin/python -m waitress --listen 0.0.0.0:$PORT --call app:create_app"),
        # what its own server serves beside the pages
        (TEMPLATE1, "bun install && bun run build", "env NODE_ENV=production bun run preview"),
        ({"package.json": package("@docusaurus/core", **scripts(start="docusaurus start",
          build="docusaurus build", serve="docusaurus serve"))}, "bun install && bun run build", "build"),
        ({"package.json": package("@11ty/eleventy", **scripts(start="npx @11ty/eleventy --serve"))},
         "bun install && bunx eleventy", "_site"),
        ({"package.json": package("@angular/cli", **scripts(start="ng serve", build="ng build")),
          "angular.json": '{"version": 1,\n  "projects": {\n    "shop": {}}}'},
         "bun install && bun run build", "dist/shop/browser"),
        ({"package.json": package("vite", "nitro", "@tanstack/react-start", **scripts(dev="vite dev",
          build="vite build"))}, "bun install && bun run build",
         "env NODE_ENV=production node .output/server/index.mjs"),
        ({"package.json": package("vite", "@solidjs/start", "nitro", **scripts(dev="vite dev", build="x"))},
         "bun install && bun run build", "env NODE_ENV=production node .output/server/index.mjs"),
        ({"package.json": package("@builder.io/qwik", "vite", **scripts(dev="vite --mode ssr",
          build="qwik build", serve="node server/entry.express"))},
         "bun install && bun run build", "env NODE_ENV=production bun run serve"),
        # a program that only looks for edits beside
        ({"package.json": package("hono", **scripts(dev="bun run --hot src/index.ts")), "src/index.ts": ""},
         "bun install", "env NODE_ENV=production bun run src/index.ts"),
        ({"package.json": package("next"), "next.config.ts": "export default {\n  output: 'export',\n}"},
         "bun install && bunx next build", "out"),
        ({"package.json": package("next"), "next.config.ts": "export default {\n  // output: 'export',\n}"},
         "bun install && bunx next build",
         "env NODE_ENV=production bunx next start --hostname 0.0.0.0 --port $PORT"),
        ({"package.json": package("@react-router/dev"), "react-router.config.js": "x = { ssr: false }"},
         "bun install && bunx react-router build", "build/client"),
        ({"package.json": package("@react-router/dev"), "react-router.config.ts": "x = { ssr: true }"},
         "bun install && bunx react-router build",
         "env NODE_ENV=production bunx react-router-serve build/server/index.js"),
        ({"package.json": package("@nestjs/core", **{"scripts": {"start": "nest start", "build": "nest build",
          "start:prod": "node dist/main"}})},
         "bun install && bun run build", "env NODE_ENV=production bun run start:prod"),
        ({"manage.py": "", "shop/wsgi.py": "", "requirements.txt": "django\ngunicorn==23"},
         "uv venv --quiet --allow-existing --relocatable && uv pip install -r requirements.txt",
         ".venv/bin/python -m gunicorn shop.wsgi:application --bind 0.0.0.0:$PORT"),
        # without a watch for edits, and without the menu for developers
        ({"app.py": "import streamlit", "requirements.txt": "streamlit"},
         "uv venv --quiet --allow-existing --relocatable && uv pip install -r requirements.txt",
         ".venv/bin/python -m streamlit run app.py --server.headless true --server.address 0.0.0.0 "
         "--server.port $PORT --server.fileWatcherType none --client.toolbarMode viewer"),
        ({"index.html": ""}, "", "."),
    ],
)  # fmt: skip
def test_in_production_it_is_built_and_what_was_built_is_served(
    folder: Folder, install: str, start: str
) -> None:
    data = archive(*((name, text.encode()) for name, text in folder.items()), manifest=None)
    detected = uploaded(data, Overrides(mode="production")).detected
    assert detected is not None
    told = detected.to_dict(3000)
    assert (told["install"], told["static"] or told["start"]) == (install, start)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ({"package.json": package("express", **scripts(dev="nodemon a.js"))}, "starts nodemon, which is for"),
        ({"package.json": package("express", **scripts(start="tsx watch a.ts"))}, "starts tsx, which is for"),
        ({"package.json": package("react-scripts", **scripts(start="react-scripts start"))},
         "starts react-scripts, which is for development only: add a script `start`"),
        ({"app.py": "app = Flask(__name__)", "requirements.txt": "flask"}, "add gunicorn to its"),
        ({"manage.py": "", "requirements.txt": "django"}, "served by gunicorn or uvicorn"),
        ({"Procfile": "web: flask --app x run --port $PORT"}, "is for development only"),
        ({"Procfile": "web: npm run dev", "package.json": VITE}, "is for development only"),
        ({"package.json": package("vite", "@tanstack/react-start", **scripts(dev="vite dev --port 3000"))},
         "install `nitro` and add its plugin"),
        ({"package.json": package("vite", "@solidjs/start", **scripts(dev="vite dev"))}, "install `nitro`"),
        ({"package.json": package("vite", "@builder.io/qwik-city", **scripts(dev="vite --mode ssr"))},
         "`npm run qwik add express`"),
        # pages whose API would be missing
        ({**TEMPLATE1, "package.json": json.dumps({**json.loads(TEMPLATE1["package.json"]), "scripts": {
            "dev": "concurrently 'npm:dev:*'", "dev:api": "bun server.ts", "dev:pages": "vite",
            "preview": "vite preview"}})},
         "also runs server.ts, which is no part of the build of Vite: add a script `start`"),
    ],
)  # fmt: skip
def test_a_dev_server_is_never_what_is_published(folder: Folder, said: str) -> None:
    """It is refused with the line to write, and goes by a command that is given."""
    data = archive(*((name, text.encode()) for name, text in folder.items()), manifest=None)
    with pytest.raises(InvalidParams) as refused:
        uploaded(data, Overrides(mode="production"))
    assert said in refused.value.message and "--start" in refused.value.message
    published = for_production(data)
    template = uploaded(published, Overrides(start=("bun", "x.ts")))
    assert template.manifest.start == ("env", "NODE_ENV=production", "bun", "x.ts")
    if "package.json" in folder:
        assert template.manifest.install
    body = PublishBody(domain="a.test", start="bun x.ts", install="")
    assert body.request(b"").overrides == Overrides(start=("bun", "x.ts"), install=())
    assert b'"start":["bun","x.ts"],"install":[]' in body.deployment(b"")


def test_what_a_script_starts_goes_before_what_is_installed() -> None:
    """A site whose script starts Vite is one of Vite, though its API is made with something else."""
    detected = found(TEMPLATE1)
    assert (detected.name, detected.start, detected.watch) == ("vite", ("bun", "run", "dev"), False)
    text = package("hono", "vite", **scripts(dev="tsx watch src/index.ts"))
    assert found({"package.json": text}).name == "hono"
    text = package("hono", "vite", **scripts(dev="run-p dev:*", **{"dev:a": "tsx api.ts", "dev:b": "vite"}))
    assert found({"package.json": text}).name == "vite"


@pytest.mark.parametrize(
    ("top", "install", "start", "built", "static"),
    [
        ({"package.json": json.dumps({"workspaces": ["user"], **scripts(dev="cd user && bun run dev",
          build="cd user && bun run build")})},
         "bun install", f"cd user && exec bun run dev {DEV}", "bun install && bun run build", "user/dist"),
        ({"pnpm-workspace.yaml": "", "pnpm-lock.yaml": "",
          "package.json": json.dumps(scripts(dev="pnpm -r dev"))},
         "pnpm install --frozen-lockfile", f"cd user && exec pnpm run dev {DEV}",
         "pnpm install --frozen-lockfile && cd user && pnpm run build", "user/dist"),
        ({"package.json": json.dumps({"workspaces": ["*"], **scripts(dev="npm run dev -w @a/user")}),
          "package-lock.json": "", "api/package.json": EXPRESS},
         "npm ci", f"cd user && exec npm run dev -- {DEV}", "npm ci && cd user && npm run build",
         "user/dist"),
    ],
)  # fmt: skip
def test_the_app_that_a_workspace_starts_is_its_site(
    top: Folder, install: str, start: str, built: str, static: str
) -> None:
    """Also where it needs others of the workspace; where that starts several, they are named."""
    app = json.dumps({**json.loads(VITE), "name": "@a/user", "devDependencies": {"@a/ui": "workspace:*"}})
    folder = {**top, "user/package.json": app, "user/index.html": "", "ui/package.json": package("react")}
    detected = found(folder)
    assert (detected.title, detected.to_dict(1)["install"], detected.start[2]) == ("Vite", install, start)
    files = {name: text.encode() for name, text in folder.items()}
    made = detect(Clues.of(files, production=True))
    assert (made.to_dict(1)["install"], made.static) == (built, static)
    data = archive(*files.items(), manifest=None)
    framework, words, _ = uploaded(data).framework()
    assert framework is not None and framework.name == "vite" and "vite" in words


@pytest.mark.parametrize(
    ("folder", "what"),
    [
        ({"go.mod": "", "main.go": "", "index.html": ""}, "a Go module (there is go.mod)"),
        ({"go.mod": "", "web/package.json": VITE}, "a Go module"),
        ({"Cargo.toml": "", "src/main.rs": ""}, "a Rust crate"),
        ({"Gemfile": "", "config/application.rb": "", "package.json": VITE}, "a Ruby on Rails application"),
        ({"Gemfile": "", "config.ru": ""}, "a Ruby application"),
        ({"artisan": "", "composer.json": "", "package.json": VITE}, "a Laravel application"),
        ({"composer.json": "", "public/index.php": ""}, "a PHP application"),
        ({"pom.xml": ""}, "a Java project of Maven"),
        ({"build.gradle.kts": ""}, "a Java or Kotlin project of Gradle"),
        ({"Shop.csproj": "", "Program.cs": ""}, "a .NET project (there is Shop.csproj)"),
        ({"mix.exs": "", "assets/package.json": VITE}, "an Elixir project"),
        ({"deno.json": "", "main.ts": ""}, "a Deno project"),
    ],
)
def test_a_language_that_we_do_not_run_is_named(folder: Folder, what: str) -> None:
    """With what to do, and before anything is sent: the command line looks for itself."""
    detected = found(folder)
    assert f"this is {what}" in detected.trouble and "--start" in detected.trouble
    assert found({**folder, "Procfile": "web: ./x"}).name == "procfile"


@pytest.mark.parametrize(
    ("folder", "name", "start"),
    [
        ({"streamlit_app.py": "import streamlit as st"}, "streamlit",
         ".venv/bin/python -m streamlit run streamlit_app.py --server.headless true --server.address 0.0.0.0 "
         "--server.port $PORT"),
        ({"app.py": "import gradio as gr\n", "requirements.txt": "gradio"}, "gradio",
         "GRADIO_SERVER_NAME=0.0.0.0 GRADIO_SERVER_PORT=$PORT exec .venv/bin/python app.py"),
        ({"package.json": package("@docusaurus/core", **scripts(start="docusaurus start"))}, "docusaurus",
         f"bun run start {DEV} --no-open"),
        ({"package.json": package("@11ty/eleventy", **scripts(start="npx @11ty/eleventy --serve"))},
         "eleventy", "bun run start --port $PORT"),
        ({"package.json": package("vite", "@builder.io/qwik-city", **scripts(dev="vite --mode ssr"))}, "qwik",
         f"bun run dev {DEV}"),
        ({"package.json": package("vite", "@tanstack/react-start", **scripts(dev="vite dev --port 3000"))},
         "tanstack-start", f"bunx vite dev {DEV}"),
        ({"package.json": package("vite", packageManager="yarn@4.1.0", **scripts(dev="vite"))}, "vite",
         f"PATH=$HOME/.local/bin:$PATH exec yarn run dev {DEV}"),
    ],
)  # fmt: skip
def test_todays_frameworks_are_known(folder: Folder, name: str, start: str) -> None:
    detected = found(folder)
    assert (detected.name, detected.to_dict(3000)["start"]) == (name, start)


def test_what_has_no_production_says_so() -> None:
    text = package("@sveltejs/kit", **scripts(dev="vite dev", build="vite build"))
    data = archive(("package.json", text.encode()), manifest=None)
    with pytest.raises(InvalidParams, match="use @sveltejs/adapter-node"):
        uploaded(data, Overrides(mode="production"))
    with pytest.raises(InvalidParams, match=r"here site\.toml or `start` gives one"):
        uploaded(archive(), Overrides(mode="production"))


def test_requirements_are_installed_in_a_venv() -> None:
    detected = found({"app.py": "app = Flask(__name__)", "requirements.txt": "flask"})
    line = "uv venv --quiet --allow-existing --relocatable && uv pip install -r requirements.txt"
    assert detected.to_dict(3000)["install"] == line
    project = '[project]\nname = "x"\ndependencies = ["flask"]'
    detected = found({"app.py": "app = Flask(__name__)", "pyproject.toml": project, "uv.lock": ""})
    assert detected.install == ("uv", "sync", "--locked")


APPS = {
    "package.json": json.dumps({"workspaces": ["apps/*", "packages/*"], **scripts(dev="turbo run dev")}),
    "apps/web/package.json": package("next", **scripts(dev="next dev")),
    "apps/docs/package.json": package("astro", **scripts(dev="astro dev")),
    "apps/api/package.json": EXPRESS,
    "packages/ui/package.json": package("react", **scripts(dev="tsc -w")),
}


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        (
            {},
            "there are no files in this folder: name another one, or deploy a template "
            "(`incus-gateway templates` lists them)",
        ),
        (
            APPS,
            "this folder holds 3 apps: apps/api (Express), apps/docs (Astro), apps/web (Next.js); deploy "
            "one, as in `incus-gateway deploy DOMAIN FOLDER/apps/api`",
        ),
        (
            {"frontend/package.json": VITE, "backend/main.py": "app = FastAPI()",
             "backend/requirements.txt": "fastapi\nuvicorn"},
            "this folder holds 2 apps: backend (FastAPI), frontend (Vite); deploy one, as in "
            "`incus-gateway deploy DOMAIN FOLDER/backend`",
        ),
        (
            {"package.json": package(**scripts(build="tsc", test="vitest"))},
            "package.json has no script `dev` or `start` (its scripts: build, test), and names no known "
            "framework: add a script, or give a command with `start` (--start)",
        ),
        ({"package.json": "{"}, "package.json is not JSON, or larger than 256 KiB: correct it"),
        (
            {"package.json": json.dumps({"dependencies": {"next": "1", "@a/ui": "workspace:*"}})},
            "package.json needs @a/ui from outside this folder: deploy the folder above, and say how to "
            "start this app, as in `--start 'npm run dev --workspace apps/web'`",
        ),
        (
            {"notes.txt": "", "page.html": ""},
            "this folder has no index.html, no package.json, no Python application and no Procfile, although "
            "there is page.html: give a command with `start` (--start), or write a site.toml",
        ),
        (
            {"main.py": "app = FastAPI()", "requirements.txt": "fastapi"},
            "main.py makes a FastAPI, which needs uvicorn, and no requirement names uvicorn: add it, "
            "or give another command with `start` (--start)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_started_says_what_to_do(folder: Folder, said: str) -> None:
    data = archive(*((name, text.encode()) for name, text in folder.items()), manifest=None)
    with pytest.raises(InvalidParams) as refused:
        uploaded(data)
    assert refused.value.message == said
    assert refused.value.facts["reason"] == "undetected"


def test_a_start_that_is_given_starts_whatever_it_is() -> None:
    """What is given goes before what is found, and before the manifest; the rest is found."""
    data = archive(("package.json", package("left-pad").encode()), ("package-lock.json", b""), manifest=None)
    template = uploaded(data, Overrides(start=("node", "x.js"), port=4000))
    recipe = template.recipe()
    assert (recipe.start, recipe.install, recipe.port) == (("node", "x.js"), ("npm", "ci"), 4000)
    assert template.detected is not None
    assert template.detected.lines()[2] == "start node x.js: as the deployment says"
    manifest = archive(("index.html", b""), manifest=b'start = "bun a.ts"\nport = 5000\n')
    template = uploaded(manifest, Overrides(install=()))
    assert (template.manifest.start, template.manifest.port, template.detected) == (
        ("bun", "a.ts"),
        5000,
        None,
    )
    partly = archive(("index.html", b""), manifest=b'keep = ["data/"]\n')
    template = uploaded(partly)
    assert (template.manifest.static, template.manifest.keep) == (".", ("data/",))


def test_copies_of_a_folder_that_is_started_in_two_ways_are_two() -> None:
    data = archive(("index.html", b""), manifest=None)
    ways = (None, Overrides(start=("bun", "x")), Overrides(port=4000))
    assert len({uploaded(data, way).recipe("me").key for way in ways}) == 3


@pytest.mark.parametrize("folder", ["..", "/etc", "a/../..", "./a", ""])
def test_only_a_folder_of_the_site_is_served(folder: str) -> None:
    with pytest.raises(InvalidParams, match="static"):
        uploaded(archive(("index.html", b""), manifest=f"static = {json.dumps(folder)}".encode()))


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.text(max_size=20),
    lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(
        strategies.sampled_from(
            ("scripts", "dependencies", "dev", "start", "vite", "next", "express", "main", "workspaces", "x")
        ), inner, max_size=4
    ),
)  # fmt: skip


@settings(deadline=None, max_examples=examples(300))
@given(
    JSON,
    strategies.dictionaries(
        strategies.sampled_from(("main.py", "Procfile", "requirements.txt", "index.js", "a/package.json")),
        strategies.text(max_size=200),
    ),
)
def test_whatever_a_folder_says_ends_in_an_answer(said: Any, files: Folder) -> None:
    detected = found({"package.json": json.dumps(said), **files})
    assert bool(detected.trouble) != bool(detected.start or detected.static)
    assert all(line.isprintable() and len(line) < 4000 for line in detected.lines())


def test_a_hostile_folder_takes_a_moment() -> None:
    """Many, large and deep: what is looked at is bounded."""
    hostile: dict[str, bytes] = {f"a{n}/package.json": VITE.encode() for n in range(5000)}
    hostile |= {f"{'d/' * 30}{n}": b"" for n in range(3000)}
    hostile["package.json"] = b'{"scripts": {"dev": "' + b"vite " * 40_000 + b'"}}'
    hostile["Procfile"] = b"web :" * 50_000
    hostile["main.py"] = b"app : a.b" * 25_000
    hostile["requirements.txt"] = b"'a[" * 80_000
    began = time.process_time()
    detect(Clues.of(hostile))
    hostile.pop("package.json")
    detect(Clues.of(hostile))
    assert time.process_time() - began < 5


@pytest.mark.skipif(sys.platform != "linux", reason="what seals a process is Linux's")
def test_what_was_uploaded_is_looked_at_by_a_process_that_can_do_nothing_else() -> None:
    """It finds the same, and opens, connects, runs and signals nothing once it is sealed."""
    clues = Clues.of({"package.json": VITE.encode(), "index.html": b"", "bun.lock": b""})
    assert detect_sandboxed(clues) == detect(clues)
    tried = """
import os, signal, socket, subprocess, sys
from gateway.rootfs.confine import seal
said = seal(1 << 30, 5)
def refused(what, *given):
    try:
        what(*given)
    except OSError:
        return True
done = [refused(open, "/etc/passwd"), refused(os.listdir, "/"), refused(socket.socket), refused(os.fork),
        refused(os.kill, os.getppid(), signal.SIGKILL), refused(os.mkdir, "/tmp/x"),
        refused(os.execv, "/bin/sh", ["sh"])]
os.write(1, repr((os.getuid() != 0, said, done)).encode())
"""
    run = subprocess.run([sys.executable, "-I", "-c", tried], capture_output=True, check=True, timeout=60)
    unprivileged, layers, done = ast.literal_eval(run.stdout.decode())
    assert unprivileged and done == [True] * 7
    assert "seccomp" in layers


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"[]", b"{", b'{"name": "x"}', b"x" * 100_000,
        b'{"name": "x", "title": "\\u001b[2J", "why": "", "start": ["a"]}',
    ],
)  # fmt: skip
def test_the_answer_of_that_process_is_a_strangers(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"import sys; sys.stdout.buffer.write({answer!r})"
    monkeypatch.setattr("gateway.detection.sandbox._COMMAND", (sys.executable, "-c", said))
    with pytest.raises(Unavailable, match="cannot detect what"):
        detect_sandboxed(Clues.of({"index.html": b""}))


def test_a_process_that_spins_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.detection.sandbox._COMMAND", (sys.executable, "-c", "while True: pass"))
    monkeypatch.setattr("gateway.detection.sandbox._WAIT", 0.5)
    with pytest.raises(Unavailable, match="cannot detect what"):
        detect_sandboxed(Clues.of({"index.html": b""}))


def test_a_process_that_answers_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of it is held than an answer has."""
    endless = "import os\nwhile True: os.write(1, bytes(1 << 20))"
    monkeypatch.setattr("gateway.detection.sandbox._COMMAND", (sys.executable, "-c", endless))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Unavailable, match="cannot detect what"):
        detect_sandboxed(Clues.of({"index.html": b""}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB
