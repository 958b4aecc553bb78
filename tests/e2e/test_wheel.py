"""The wheel: what is in it is all that a gateway needs, in an environment with nothing else of ours."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import aiohttp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gateway.api.editor import STATIC
from tests.live import LiveGateway

CHECKOUT = Path(__file__).parents[2]


def built(folder: Path) -> Path:
    if not (STATIC / "index.html").is_file():
        pytest.fail("the editor is not built: run deploy/build-web, as `tests/run e2e` does")
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir")
    made = subprocess.run([*command, str(folder), str(CHECKOUT)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("incus_gateway-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"))


def needed(name: str) -> set[str]:
    """Return the names of all distributions that one needs, itself left out, by what each says of itself."""
    found: set[str] = set()
    asked: set[tuple[str, str]] = set()  # a distribution and an extra of it, or none
    pending = [(name, "")]
    while pending:
        if (which := pending.pop()) in asked:
            continue
        asked.add(which)
        for line in importlib.metadata.requires(which[0]) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": which[1]}):
                other = canonicalize_name(requirement.name)
                found.add(other)
                pending += [(other, ""), *((other, extra) for extra in requirement.extras)]
    return found


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, and beside it only what the wheel says it needs.

    That is linked from the environment of the tests: an index would give the same, later.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--no-deps")
    subprocess.run([*pip, "--quiet", "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in needed("incus-gateway"):
        distribution = importlib.metadata.distribution(name)
        tops = {path.parts[0] for path in distribution.files or () if path.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder / "bin"


def test_it_holds_everything_of_ours_that_is_read_at_run_time(wheel: Path) -> None:
    """Built files of the editor, templates, scripts, what Caddy is given; both packages with their types."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())

    def files(folder: Path) -> set[PurePosixPath]:
        found = {PurePosixPath(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return {path for path in found if "node_modules" not in path.parts}

    assert {path.suffix for path in files(STATIC)} >= {".html", ".js", ".css", ".woff2", ".br", ".gz"}
    assert {f"gateway/static/{path}" for path in files(STATIC)} <= inside
    for shipped in ("caddy", "deploy/templates"):
        assert {f"gateway/shipped/{shipped}/{path}" for path in files(CHECKOUT / shipped)} <= inside
    assert {f"gateway/shipped/caddy/{name}" for name in ("Caddyfile", "site.caddy")} <= inside
    read = {path for path in files(CHECKOUT / "gateway") if path.suffix not in (".py", ".pyc")}
    assert {".sh", ".service", ".network", ".conf"} <= {path.suffix for path in read}
    assert {f"gateway/{path}" for path in read} <= inside
    assert {"gateway/py.typed", "gateway_client/py.typed"} <= inside
    ours = {path for path in inside if ".dist-info/" not in path}
    assert {path.partition("/")[0] for path in ours} == {"gateway", "gateway_client"}
    assert not [path for path in ours if "node_modules" in path or "__pycache__" in path]


async def test_alone_it_serves_the_editor_and_has_its_templates(programs: Path, tmp_path: Path) -> None:
    """`incus-gateway --help`, then `serve`: the page with its policy, every file of it, the templates."""
    command = str(programs / "incus-gateway")
    state = tmp_path / "state"
    gateway = LiveGateway(
        {"GATEWAY_RUNTIME": "local", "GATEWAY_STATE_DIR": str(state)}, tmp_path / "gateway.log"
    )

    async def run(*words: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *words, cwd=tmp_path, env=gateway.environment, stdout=asyncio.subprocess.PIPE
        )
        printed, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0
        return printed.decode()

    assert "serve" in await run(command, "--help")
    where = await run(str(programs / "python"), "-c", "import gateway; print(gateway.__file__)")
    assert Path(where.strip()).is_relative_to(programs.parent)

    gateway.program = (command,)
    await gateway.start()
    try:
        async with aiohttp.ClientSession(gateway.url) as session, session.get("/") as answer:
            assert answer.status == 200
            page = await answer.text()
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            files = re.findall(r'(?:src|href)="(/[^"]+)"', page)
            assert {PurePosixPath(path).suffix for path in files} >= {".js", ".css", ".svg"}
            for path in files:
                async with session.get(path) as file:
                    assert file.status == 200 and await file.read(), path
        async with gateway.http("*") as session, session.get("/v1/templates") as answer:
            said: dict[str, Any] = json.loads(await answer.read())
        templates = {entry["name"]: entry for entry in said["templates"]}
        assert templates.keys() == {"static", "vite-react"}
        assert all("error" not in entry for entry in templates.values()), templates
    finally:
        assert await gateway.stop() == 0
    caddy = "import sys; from gateway.caddy import shipped; print(shipped('caddy/Caddyfile').read_text())"
    assert "admin" in await run(str(programs / "python"), "-c", caddy)
