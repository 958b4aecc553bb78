"""Detect how a Python site is installed and started."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from typing import Final

from gateway.detection.clues import Clues, Command, Detection

DEV_SERVERS: Final = frozenset({"fastapi", "flask", "django"})

MANIFESTS: Final = ("pyproject.toml", "requirements.txt", "Pipfile")
# a requirement, at the beginning of a line or in quotes: name and extras
_NAMED: Final = re.compile(
    r"(?:^|[\"'])[ \t]*([A-Za-z0-9][\w.-]{0,100}(?:\[[\w ,.-]{1,100}\])?)", re.MULTILINE
)
_APP: Final = re.compile(
    r"^(\w{1,60})[ \t]*(?::[ \t]*[\w.]+[ \t]*)?=[ \t]*(?:\w+\.)?(FastAPI|Starlette|Flask)\(", re.MULTILINE
)
_FACTORY: Final = re.compile(r"^def create_app\(", re.MULTILINE)
# libraries whose apps are run as a file, on an address that arguments or variables give
_SCRIPTS: Final = re.compile(r"^(?:import|from)[ \t]+(streamlit|gradio)\b", re.MULTILINE)
_WATCHING: Final = frozenset({"watchfiles", "uvicorn[standard]", "fastapi[standard]", "fastapi[all]"})
_UVICORN: Final = _WATCHING - {"watchfiles"} | {"uvicorn", "fastapi-cli"}
_SERVES: Final = re.compile(r"\b(?:HTTPServer|TCPServer|serve_forever|make_server|uvicorn\.run|\.run)\b")
_RUN: Final = ".venv/bin"
_VENV: Final = "uv venv --quiet --allow-existing --relocatable"
_POETRY: Final = ("uvx", "poetry", "install", "--no-root", "--no-interaction")
_LISTEN: Final = ("--host", "0.0.0.0", "--port", "$PORT")  # noqa: S104 - of the container


def detect(clues: Clues) -> Detection | None:
    """Return how a site is installed and started; None if it is not Python."""
    sources = sorted(name for name in clues.texts if name.endswith(".py"))
    manifest = next((name for name in MANIFESTS if name in clues.names), None)
    if manifest is None and "manage.py" not in clues.names and not any("/" not in name for name in sources):
        return None
    packages = _packages(clues)
    install, installed = _install(clues)
    if not install and (missing := _imported(clues, sources)):
        packages = frozenset({missing})
        install = ("sh", "-c", f"{_VENV} && uv pip install '{missing}'")
        installed = f"nothing names its packages: the latest {missing}"
    found = Detection("python", "Python", f"there is {manifest}", install, installed)
    if "manage.py" in clues.names:
        return _django(found, packages, clues)
    uppermost = sorted(sources, key=lambda name: name.count("/"))
    for name in uppermost:
        if (script := _SCRIPTS.search(clues.text(name))) is not None and not _APP.search(clues.text(name)):
            return _script(found, name, script[1], production=clues.production)
    for name in uppermost:
        if (app := _APP.search(clues.text(name))) is not None:
            if app[2] == "Flask":
                return _flask(found, name, app[1], packages, production=clues.production)
            return _asgi(found, name, app[1], app[2], packages, production=clues.production)
    if "flask" in packages:
        for name in sources:
            if _FACTORY.search(clues.text(name)):
                return _flask(found, name, "create_app", packages, production=clues.production)
    for name in sources:
        if "/" not in name and _SERVES.search(clues.text(name)):
            start, why = (*_program(install, "python"), name), f"{name} is a server"
            return replace(found, why=why, start=start, started="it is run", watch=not clues.production)
    if manifest is None:
        return None
    return replace(
        found,
        trouble="no FastAPI, Flask or Django application was found in main.py, app.py, server.py or the "
        "like: give a command with `start` (--start), or in a Procfile",
    )


def _django(found: Detection, packages: frozenset[str], clues: Clues) -> Detection:
    found = replace(found, name="django", title="Django", why="there is a manage.py")
    if not clues.production:
        start = (*_program(found.install, "python"), "manage.py", "runserver", "0.0.0.0:$PORT")
        return replace(found, start=start, started="manage.py starts its dev server")
    for server, kind in (("gunicorn", "wsgi"), ("uvicorn", "asgi"), ("uvicorn[standard]", "asgi")):
        module = min((name for name in clues.names if name.endswith(f"/{kind}.py")), default="")
        if server in packages and module:
            program = _program(found.install, server.partition("[")[0])
            where = ("--bind", "0.0.0.0:$PORT") if kind == "wsgi" else _LISTEN
            start = (*program, f"{_module(module)}:application", *where)
            return replace(found, start=start, started="it serves its asgi.py or wsgi.py")
    return replace(
        found,
        trouble="for production Django is served by gunicorn or uvicorn, and no requirement names one of "
        "them: add it, or give another command with `start` (--start)",
    )


def _script(found: Detection, name: str, kind: str, *, production: bool) -> Detection:
    found = replace(found, name=kind, title=kind.title(), why=f"{name} imports {kind}")
    python = _program(found.install, "python")
    if kind == "streamlit":
        words = "--server.headless true --server.address 0.0.0.0 --server.port $PORT"
        if production:  # no watch for edits, and no menu for developers
            words += " --server.fileWatcherType none --client.toolbarMode viewer"
        start = (*python, "-m", "streamlit", "run", name, *words.split())
        return replace(found, start=start, started=f"Streamlit runs {name}")
    line = f"GRADIO_SERVER_NAME=0.0.0.0 GRADIO_SERVER_PORT=$PORT exec {shlex.join((*python, name))}"
    return replace(found, start=("sh", "-c", line), started="it is run", watch=not production)


def _imported(clues: Clues, sources: list[str]) -> str:
    """Return the package of the framework that a folder is made with, of which no requirement tells."""
    if "manage.py" in clues.names:
        return "django"
    kinds = {found[2] for name in sources if (found := _APP.search(clues.text(name))) is not None}
    if kinds:
        return "fastapi[standard]" if "FastAPI" in kinds else "flask" if "Flask" in kinds else ""
    return next((found[1] for name in sources if (found := _SCRIPTS.search(clues.text(name)))), "")


def _flask(found: Detection, name: str, app: str, packages: frozenset[str], *, production: bool) -> Detection:
    started = f"`{app}` of {name}"
    found = replace(found, name="flask", title="Flask", why=f"{name} makes a Flask", started=started)
    if not production:
        # without the debugger, which would run code that any visitor sends
        words = ("run", *_LISTEN, "--reload", "--no-debugger")
        return replace(found, start=(*_program(found.install, "flask"), "--app", f"{name}:{app}", *words))
    for server, listen in (("gunicorn", "--bind"), ("waitress", "--listen")):
        if server in packages:
            factory = app == "create_app"
            call = ("--call",) if factory and server == "waitress" else ()
            what = f"{_module(name)}:{app}" + ("()" if factory and server == "gunicorn" else "")
            start = (*_program(found.install, server), listen, "0.0.0.0:$PORT", *call, what)
            return replace(found, start=start, started=f"{started}, by {server}")
    return replace(
        found,
        started="",
        trouble="for production Flask is served by gunicorn or waitress, and no requirement names one of "
        "them: add gunicorn to its requirements, or give another command with `start` (--start)",
    )


def _asgi(
    found: Detection, name: str, app: str, kind: str, packages: frozenset[str], *, production: bool
) -> Detection:
    found = replace(found, name="fastapi", title=kind, why=f"{name} makes a {kind}")
    if packages.isdisjoint(_UVICORN):
        return replace(
            found,
            trouble=f"{name} makes a {kind}, which needs uvicorn, and no requirement names uvicorn: "
            "add it, or give another command with `start` (--start)",
        )
    module = _module(name)
    inside = ("--app-dir", "src") if module.startswith("src.") else ()
    start = (*_program(found.install, "uvicorn"), f"{module.removeprefix('src.')}:{app}", *inside, *_LISTEN)
    # without watchfiles it would check every file in .venv four times a second
    reload = not packages.isdisjoint(_WATCHING)
    if not production and reload:
        start += ("--reload",)
    started, watch = f"`{app}` of {name}, by uvicorn", not production and not reload
    return replace(found, start=start, started=started, watch=watch)


def _module(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def _packages(clues: Clues) -> frozenset[str]:
    found = set[str]()
    for manifest in MANIFESTS:
        for name in _NAMED.findall(clues.text(manifest)):
            plain = name.lower().replace(" ", "")
            found |= {plain, plain.partition("[")[0]}
    return frozenset(found)


def _install(clues: Clues) -> tuple[Command, str]:
    """Return the command that creates `.venv` with all requirements, and the reason."""
    said = clues.text("pyproject.toml")
    if "pyproject.toml" in clues.names and "[project]" in said and "poetry.lock" not in clues.names:
        if "uv.lock" in clues.names:
            return ("uv", "sync", "--locked"), "there is uv.lock"
        return ("uv", "sync"), "there is pyproject.toml, and no lockfile"
    if "poetry.lock" in clues.names or "[tool.poetry" in said:
        why = "poetry.lock" if "poetry.lock" in clues.names else "pyproject.toml of Poetry"
        return ("env", "POETRY_VIRTUALENVS_IN_PROJECT=1", *_POETRY), f"there is {why}"
    if "Pipfile" in clues.names:
        locked = "Pipfile.lock" in clues.names
        command = ("uvx", "pipenv", "sync" if locked else "install")
        return ("env", "PIPENV_VENV_IN_PROJECT=1", *command), f"there is Pipfile{'.lock' if locked else ''}"
    if "requirements.txt" in clues.names:
        return ("sh", "-c", f"{_VENV} && uv pip install -r requirements.txt"), "there is requirements.txt"
    return (), "nothing tells of packages"


def _program(install: Command, name: str) -> Command:
    """Return how a program is started: with the Python of `.venv` if it exists.

    Always as a module: the scripts in a venv contain its path, and an update is moved after its install.
    """
    python = f"{_RUN}/python" if install else "python3"
    return (python,) if name == "python" else (python, "-m", name)
