"""Detect how a Python site is installed and started."""

from __future__ import annotations

import re
import shlex
from typing import Final

from gateway.detection.clues import Clues, Command, Detected

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
# of programs that run the file of an app, on an address that they are told
_SCRIPTS: Final = re.compile(r"^(?:import|from)[ \t]+(streamlit|gradio)\b", re.MULTILINE)
_WATCHING: Final = frozenset({"watchfiles", "uvicorn[standard]", "fastapi[standard]", "fastapi[all]"})
_SERVES: Final = re.compile(r"\b(?:HTTPServer|TCPServer|serve_forever|make_server|uvicorn\.run|\.run)\b")
_RUN: Final = ".venv/bin"
_VENV: Final = "uv venv --quiet --allow-existing --relocatable"
_POETRY: Final = ("uvx", "poetry", "install", "--no-root", "--no-interaction")
_LISTEN: Final = ("--host", "0.0.0.0", "--port", "$PORT")  # noqa: S104 - of the container


def detect(clues: Clues) -> Detected | None:
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
    if "manage.py" in clues.names:
        return _django(packages, install, installed, clues)
    for name in sorted(sources, key=lambda name: name.count("/")):
        if (found := _SCRIPTS.search(clues.text(name))) is not None and not _APP.search(clues.text(name)):
            return _script(name, found[1], install, installed, clues)
    for name in sorted(sources, key=lambda name: name.count("/")):
        found = _APP.search(clues.text(name))
        if found is not None and found[2] == "Flask":
            return _flask(name, found[1], packages, install, installed, clues)
        if found is not None:
            return _asgi(name, found[1], found[2], packages, install, installed, clues)
    if "flask" in packages:
        for name in sources:
            if _FACTORY.search(clues.text(name)):
                return _flask(name, "create_app", packages, install, installed, clues)
    for name in sources:
        if "/" not in name and _SERVES.search(clues.text(name)):
            start = (*_program(install, "python"), name)
            return Detected(
                *("python", "Python", f"{name} is a server", install, installed, start, "it is run"),
                watch=not clues.production,
            )
    if manifest is None:
        return None
    return Detected(
        "python",
        "Python",
        f"there is {manifest}",
        install,
        installed,
        trouble="no FastAPI, Flask or Django application was found in main.py, app.py, server.py or the "
        "like: give a command with `start` (--start), or in a Procfile",
    )


def _django(packages: frozenset[str], install: Command, installed: str, clues: Clues) -> Detected:
    start: Command
    if not clues.production:
        start = (*_program(install, "python"), "manage.py", "runserver", "0.0.0.0:$PORT")
        started = "manage.py starts its dev server"
        return Detected("django", "Django", "there is a manage.py", install, installed, start, started)
    served = "it serves its asgi.py or wsgi.py"
    for server, kind in (("gunicorn", "wsgi"), ("uvicorn", "asgi"), ("uvicorn[standard]", "asgi")):
        module = min((name for name in clues.names if name.endswith(f"/{kind}.py")), default="")
        if server in packages and module:
            application = module.removesuffix(".py").replace("/", ".")
            program = _program(install, server.partition("[")[0])
            where = ("--bind", "0.0.0.0:$PORT") if kind == "wsgi" else _LISTEN
            start = (*program, f"{application}:application", *where)
            return Detected("django", "Django", "there is a manage.py", install, installed, start, served)
    return Detected(
        *("django", "Django", "there is a manage.py", install, installed),
        trouble="for production Django is served by gunicorn or uvicorn, and no requirement names one of "
        "them: add it, or give another command with `start` (--start)",
    )


def _script(name: str, kind: str, install: Command, installed: str, clues: Clues) -> Detected:
    why = f"{name} imports {kind}"
    python = _program(install, "python")
    start: Command
    if kind == "streamlit":
        words = "--server.headless true --server.address 0.0.0.0 --server.port $PORT"
        if clues.production:  # no watch for edits, and no menu for developers
            words += " --server.fileWatcherType none --client.toolbarMode viewer"
        start = (*python, "-m", "streamlit", "run", name, *words.split())
        return Detected("streamlit", "Streamlit", why, install, installed, start, f"Streamlit runs {name}")
    line = f"GRADIO_SERVER_NAME=0.0.0.0 GRADIO_SERVER_PORT=$PORT exec {shlex.join((*python, name))}"
    return Detected(
        *("gradio", "Gradio", why, install, installed, ("sh", "-c", line), "it is run"),
        watch=not clues.production,
    )


def _imported(clues: Clues, sources: list[str]) -> str:
    """Return the package of the framework that a folder is made with, of which no requirement tells."""
    if "manage.py" in clues.names:
        return "django"
    kinds = {found[2] for name in sources if (found := _APP.search(clues.text(name))) is not None}
    if kinds:
        return "fastapi[standard]" if "FastAPI" in kinds else "flask" if "Flask" in kinds else ""
    return next((found[1] for name in sources if (found := _SCRIPTS.search(clues.text(name)))), "")


def _flask(
    name: str, app: str, packages: frozenset[str], install: Command, installed: str, clues: Clues
) -> Detected:
    why, started = f"{name} makes a Flask", f"`{app}` of {name}"
    start: Command
    if not clues.production:
        # without the debugger, which would run code that any visitor sends
        words = ("run", *_LISTEN, "--reload", "--no-debugger")
        start = (*_program(install, "flask"), "--app", f"{name}:{app}", *words)
        return Detected("flask", "Flask", why, install, installed, start, started)
    module = name.removesuffix(".py").replace("/", ".")
    for server, listen in (("gunicorn", "--bind"), ("waitress", "--listen")):
        if server in packages:
            factory = app == "create_app"
            call = ("--call",) if factory and server == "waitress" else ()
            what = f"{module}:{app}()" if factory and server == "gunicorn" else f"{module}:{app}"
            start = (*_program(install, server), listen, "0.0.0.0:$PORT", *call, what)
            return Detected("flask", "Flask", why, install, installed, start, f"{started}, by {server}")
    return Detected(
        *("flask", "Flask", why, install, installed),
        trouble="for production Flask is served by gunicorn or waitress, and no requirement names one of "
        "them: add gunicorn to its requirements, or give another command with `start` (--start)",
    )


def _asgi(
    name: str,
    app: str,
    kind: str,
    packages: frozenset[str],
    install: Command,
    installed: str,
    clues: Clues,
) -> Detected:
    module = name.removesuffix(".py").replace("/", ".")
    inside: Command = ()
    if module.startswith("src."):
        module, inside = module.removeprefix("src."), ("--app-dir", "src")
    start = (
        *_program(install, "uvicorn"),
        f"{module}:{app}",
        *inside,
        *_LISTEN,
    )
    # without watchfiles it would check every file in .venv four times a second
    reload = not packages.isdisjoint(_WATCHING)
    if not clues.production and reload:
        start += ("--reload",)
    why = f"{name} makes a {kind}"
    if packages.isdisjoint(
        {"uvicorn", "uvicorn[standard]", "fastapi[standard]", "fastapi[all]", "fastapi-cli"}
    ):
        return Detected(
            *("fastapi", kind, why, install, installed),
            trouble=f"{name} makes a {kind}, which needs uvicorn, and no requirement names uvicorn: "
            "add it, or give another command with `start` (--start)",
        )
    started = f"`{app}` of {name}, by uvicorn"
    watch = not clues.production and not reload
    return Detected("fastapi", kind, why, install, installed, start, started, watch=watch)


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
    """Return how a program is started: with the Python of `.venv` if there is one.

    Always as a module: the scripts in a venv contain its path, and an update is moved after its install.
    """
    python = f"{_RUN}/python" if install else "python3"
    return (python,) if name == "python" else (python, "-m", name)
