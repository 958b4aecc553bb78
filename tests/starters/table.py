"""Which starters there are: how each is made, what it is found to be, and an edit that shows in its page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Shows = Literal["at once", "by a reload", "after a restart", "after a slow restart", "on a visit"]


@dataclass(frozen=True, slots=True)
class Starter:
    """One starter. `make` is a line of shell that puts it into the folder `app`, at a pinned version.

    `title` is what it is found to be. `edit` is a file of it with a text and what takes its place, and `says`
    what its page shows before, and `then` after that. `shows` is what the page does of itself: a dev server
    replaces a part of it, or has it loaded anew; of a server without one, which starts anew or reads its file
    at each visit, it is for the visitor to ask again: in its answer, or in the page that its scripts make.

    Where `templates` of the generator lie on GitHub and that cannot be reached, `ours` is what is deployed: a
    folder of `tests/data/starters` with the same packages and fewer pages; without `make` it is always that,
    and not today's. `refused` is what its publication says where it cannot be built for production as it is,
    `throws` an error of its page that is its makers' fault, and `path` where the page is.
    """

    make: str
    title: str
    edit: tuple[str, str, str]
    says: str
    then: str
    shows: Shows = "at once"
    ours: str = ""
    refused: str = ""
    throws: str = ""
    path: str = "/"

    @property
    def newest(self) -> str:
        """The same line of shell with the newest versions."""
        return _PINNED.sub(lambda found: "@latest" if found[0].startswith("@") else "", self.make)


_PINNED: Final = re.compile(r"(?<=[\w-])(?:@|==)\d[\w.]*")


def _vite(template: str, lock: str = "") -> str:
    made = f"npm create -y vite@9.3.0 app -- --template {template} --no-interactive"
    return f"{made} && {lock}" if lock else made


_NPM: Final = "(cd app && npm install --package-lock-only --ignore-scripts)"
_PNPM: Final = "(cd app && pnpm install --lockfile-only --ignore-scripts)"
_YARN: Final = "(cd app && yarn install --ignore-scripts --non-interactive && rm -rf node_modules)"
_BUN: Final = "(cd app && bun install --lockfile-only)"
_SEEN: Final = "Seen at once"
_FLASK: Final = (
    "printf '%s\\n' 'from flask import Flask' '' 'app = Flask(__name__)' '' '@app.route(\"/\")' "
    "'def hello_world():' '    return \"<p>Hello, World!</p>\"' >app/hello.py"
)
_EXPRESS: Final = (
    "import express from 'express'; const app = express(); "
    "app.get('/', (request, answer) => answer.send('Hello World!')); app.listen(3000)"
)
_URLS: Final = (
    "from django.http import HttpResponse\n"
    'urlpatterns = [path("", lambda request: HttpResponse(f"<h1>Seen at {request.get_host()}</h1>")),'
)

STARTERS: Final[Mapping[str, Starter]] = {
    "vite-react": Starter(
        _vite("react-ts", _NPM), "Vite", ("src/App.tsx", "Get started", _SEEN), "Get started", _SEEN
    ),
    "vite-vue": Starter(
        _vite("vue-ts", _PNPM),
        "Vite",
        ("src/components/HelloWorld.vue", "Get started", _SEEN),
        "Get started",
        _SEEN,
    ),
    "vite-svelte": Starter(
        _vite("svelte-ts", _YARN), "Vite", ("src/App.svelte", "Get started", _SEEN), "Get started", _SEEN
    ),
    # its other template asks Google for fonts, also while it answers
    "next": Starter(
        "npx -y create-next-app@16.4.3 app --yes --empty --skip-install --disable-git --use-npm",
        "Next.js",
        ("app/page.tsx", "Hello world!", _SEEN),
        "Hello world!",
        _SEEN,
    ),
    "sveltekit": Starter(
        "npx -y sv@0.17.1 create app --template minimal --types ts --no-add-ons --no-install",
        "SvelteKit",
        ("src/routes/+page.svelte", "Welcome to SvelteKit", _SEEN),
        "Welcome to SvelteKit",
        _SEEN,
        refused="use @sveltejs/adapter-node",  # without an adapter: what is built is no server
    ),
    "sveltekit-node": Starter(
        "npx -y sv@0.17.1 create app --template minimal --types ts --no-install "
        "--add sveltekit-adapter=adapter:node",
        "SvelteKit",
        ("src/routes/+page.svelte", "Welcome to SvelteKit", _SEEN),
        "Welcome to SvelteKit",
        _SEEN,
    ),
    "astro": Starter(
        "npm create -y astro@5.2.4 app -- --template minimal --no-install --no-git --skip-houston --yes",
        "Astro",
        ("src/pages/index.astro", "<h1>Astro</h1>", f"<h1>{_SEEN}</h1>"),
        "Astro",
        _SEEN,
        "by a reload",
        ours="astro",
    ),
    "nuxt": Starter(
        "npx -y create-nuxt@3.37.0 app --template minimal --no-install --no-gitInit --packageManager npm",
        "Nuxt",
        ("app/app.vue", "<NuxtWelcome />", f"<h1>{_SEEN}</h1>"),
        "Get started",
        _SEEN,
        ours="nuxt",
    ),
    "react-router": Starter(
        "npx -y create-react-router@8.4.0 app --yes --no-install --no-git-init",
        "React Router",
        ("app/welcome/welcome.tsx", "What&apos;s next?", _SEEN),
        "What's next?",
        _SEEN,
        ours="react-router",
    ),
    "hono": Starter(
        "npm create -y hono@0.19.5 app -- --template nodejs --pm npm --install",
        "Hono",
        ("src/index.ts", "Hello Hono!", _SEEN),
        "Hello Hono!",
        _SEEN,
        "after a restart",
        ours="hono",
    ),
    "express": Starter(
        f"npx -y express-generator@4.16.1 --no-view app && {_YARN}",
        "Express",
        ("routes/users.js", "'respond with a resource'", f"'{_SEEN}'"),
        "respond with a resource",
        _SEEN,
        "after a restart",
        path="/users",
    ),
    # the first page of its documentation, which has the port in its code
    "express-hello": Starter(
        f'mkdir app && cd app && echo "{_EXPRESS}" >app.js && npm init -y >/dev/null && npm pkg set '
        "type=module main=app.js scripts.start='node app.js' && "
        "npm install --package-lock-only express@5.2.1",
        "Express",
        ("app.js", "Hello World!", _SEEN),
        "Hello World!",
        _SEEN,
        "after a restart",
    ),
    "fastify": Starter(
        f"npx -y fastify-cli@8.0.2 generate app --lang=js && {_BUN}",
        "Fastify",
        ("routes/root.js", "{ root: true }", f'{{ root: "{_SEEN}" }}'),
        '"root":true',
        _SEEN,
        "after a restart",
    ),
    # the TypeScript 6 that it asks for refuses its configuration (TS5011) without this line
    "fastify-ts": Starter(
        "npx -y fastify-cli@8.0.2 generate app --lang=ts && "
        'sed -i \'s/"outDir"/"rootDir": "src", &/\' app/tsconfig.json',
        "Fastify",
        ("src/routes/root.ts", "{ root: true }", f'{{ root: "{_SEEN}" }}'),
        '"root":true',
        _SEEN,
        "after a restart",
    ),
    "nest": Starter(
        "npx -y @nestjs/cli@12.0.8 new app --skip-install --skip-git --package-manager npm",
        "NestJS",
        ("src/app.service.ts", "Hello World!", _SEEN),
        "Hello World!",
        _SEEN,
        "after a restart",
    ),
    "django": Starter(
        "uv tool run --from django==6.1.3 django-admin startproject app",
        "Django",
        ("app/urls.py", "urlpatterns = [", _URLS),
        "The install worked successfully",
        "Seen at django.example.com",
        "after a restart",
        refused="served by gunicorn or uvicorn",
    ),
    # with what it needs for production
    "django-gunicorn": Starter(
        "uv tool run --from django==6.1.3 django-admin startproject app && "
        "sed -i 's/^ALLOWED_HOSTS = .*/ALLOWED_HOSTS = [\".example.com\"]/' app/app/settings.py && "
        "printf 'django==6.1.3\\ngunicorn==27.0.1\\n' >app/requirements.txt",
        "Django",
        ("app/urls.py", "urlpatterns = [", _URLS),
        "The install worked successfully",
        "Seen at django-gunicorn.example.com",
        "after a restart",
    ),
    "fastapi": Starter(
        "uv tool run fastapi-new@0.0.7 app && rm -rf app/.venv",
        "FastAPI",
        ("main.py", "Hello World", _SEEN),
        '"message":"Hello World"',
        _SEEN,
        "after a restart",
    ),
    # there is no generator of Flask: this is the first page of its documentation
    "flask": Starter(
        f"mkdir app && printf 'flask==3.1.2\\ngunicorn==27.0.1\\n' >app/requirements.txt && {_FLASK}",
        "Flask",
        ("hello.py", "Hello, World!", _SEEN),
        "Hello, World!",
        _SEEN,
        "after a restart",
    ),
    "flask-poetry": Starter(
        f"mkdir app && {_FLASK} && cd app && "
        # else the author is git's, who may have an address that it refuses
        "uvx poetry==2.5.1 init --no-interaction --name site --author 'Site <site@example.com>' && "
        # its own way to ask PyPI is one that mirrors do not have
        "uvx poetry==2.5.1 source add --priority=primary simple https://pypi.org/simple/ && "
        "uvx poetry==2.5.1 add --lock flask==3.1.2",
        "Flask",
        ("hello.py", "Hello, World!", _SEEN),
        "Hello, World!",
        _SEEN,
        "after a restart",
        refused="add gunicorn to its requirements",
    ),
    "flask-pipenv": Starter(
        f"mkdir app && {_FLASK} && cd app && "
        "PIPENV_VENV_IN_PROJECT=1 uvx pipenv==2026.10.3 install flask==3.1.2",
        "Flask",
        ("hello.py", "Hello, World!", _SEEN),
        "Hello, World!",
        _SEEN,
        "after a restart",
        refused="add gunicorn to its requirements",
    ),
    # pages and an API beside Vite, in the folder of a workspace, as Alive's sites are made
    "template1": Starter(
        "", "Vite", ("user/src/App.tsx", "Get started", _SEEN), "API: ok", _SEEN, ours="template1"
    ),
    "qwik": Starter(
        "npm create -y qwik@1.20.1 empty ./app",
        "Qwik",
        ("src/routes/index.tsx", "Happy coding.", _SEEN),
        "Happy coding.",
        _SEEN,
        "by a reload",
        refused="`npm run qwik add express`",
    ),
    "tanstack-start": Starter(
        "npm create -y @tanstack/start@0.59.43 app -- --package-manager npm --no-install --no-git --yes",
        "TanStack Start",
        ("src/routes/index.tsx", "Start simple, ship quickly.", _SEEN),
        "Start simple, ship quickly.",
        _SEEN,
    ),
    "solid-start": Starter(
        "npm create -y solid@0.12.0 app -- --solidstart --v2 --ts --template basic",
        "SolidStart",
        ("src/routes/index.tsx", "Hello Solid", _SEEN),
        "Hello Solid",
        _SEEN,
        ours="solid-start",
        # its toolbar for development imports packages that Vite has not prepared
        throws="/@jridgewell/resolve-uri/dist/resolve-uri.umd.js",
    ),
    "docusaurus": Starter(
        "npx -y create-docusaurus@3.10.2 app classic --typescript --skip-install",
        "Docusaurus",
        ("src/pages/index.tsx", "Docusaurus Tutorial - 5min ⏱️", _SEEN),
        "Docusaurus Tutorial - 5min",
        _SEEN,
    ),
    "angular": Starter(
        "npx -y @angular/cli@22.2.7 new app --defaults --skip-install --skip-git",
        "Angular",
        ("src/app/app.html", "Hello, {{ title() }}", _SEEN),
        "Hello, app",
        _SEEN,
    ),
    # there is no generator of these: the first page of their documentation
    "eleventy": Starter(
        "mkdir app && cd app && npm init -y && npm pkg set type=module "
        "'scripts.start=npx @11ty/eleventy --serve' && echo '# Heading' >index.md && "
        "npm install --package-lock-only --ignore-scripts @11ty/eleventy@3.1.8",
        "Eleventy",
        ("index.md", "# Heading", f"# {_SEEN}"),
        "Heading",
        _SEEN,
        "at once",
    ),
    "streamlit": Starter(
        "mkdir app && echo streamlit==1.67.0 >app/requirements.txt && "
        "printf 'import streamlit as st\\n\\nst.write(\"Hello world\")\\n' >app/streamlit_app.py",
        "Streamlit",
        ("streamlit_app.py", "Hello world", _SEEN),
        "Hello world",
        _SEEN,
        "on a visit",
    ),
    "gradio": Starter(
        "mkdir app && echo gradio==6.31.0 >app/requirements.txt && printf '%s\\n' 'import gradio as gr' "
        '\'demo = gr.Interface(fn=lambda name: name, inputs=["text"], outputs=["text"], title="Greeter")\' '
        "'demo.launch()' >app/app.py",
        "Gradio",
        ("app.py", "Greeter", _SEEN),
        "Greeter",
        _SEEN,
        "after a slow restart",
    ),
    "pnpm-workspace": Starter(
        "mkdir -p app/packages/ui app/apps && "
        "(cd app/apps && npm create -y vite@9.3.0 web -- --template react-ts --no-interactive) && cd app && "
        "printf 'packages:\\n  - apps/*\\n  - packages/*\\n' >pnpm-workspace.yaml && "
        """echo '{"private": true, "scripts": {"dev": "pnpm --filter web dev"}}' >package.json && """
        """echo '{"name": "@app/ui", "version": "1.0.0", "main": "index.js"}' >packages/ui/package.json && """
        "echo 'export const ui = 1' >packages/ui/index.js && "
        "(cd apps/web && npm pkg set 'dependencies.@app/ui=workspace:*') && "
        "pnpm install --lockfile-only --ignore-scripts",
        "Vite",
        ("apps/web/src/App.tsx", "Get started", _SEEN),
        "Get started",
        _SEEN,
    ),
    "yarn-berry": Starter(
        _vite("react-ts") + " && cd app && touch yarn.lock && "
        "npm pkg set packageManager=yarn@$(npm view @yarnpkg/cli-dist@4.18.1 version) && "
        "npx -y @yarnpkg/cli-dist@4.18.1 install --mode=update-lockfile && "
        # with a TypeScript that Yarn cannot patch for Plug'n'Play it is built nowhere
        "cp -r . /tmp/built && cd /tmp/built && npx -y @yarnpkg/cli-dist@4.18.1 install >&2 && "
        "npx -y @yarnpkg/cli-dist@4.18.1 run build >&2",
        "Vite",
        ("src/App.tsx", "Get started", _SEEN),
        "Get started",
        _SEEN,
    ),
}
