"""The Python client as a distribution of its own: what it needs, and that it works with nothing else."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gateway_client import Client

ROOT = Path(__file__).parents[2]
GATEWAY: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLIENT: dict[str, Any] = tomllib.loads((ROOT / "clients/python/pyproject.toml").read_text())["project"]


def test_the_gateway_asks_for_all_that_its_client_does() -> None:
    """Its wheel holds the client's files: the same version, packages and extras."""
    assert CLIENT["version"] == GATEWAY["version"]
    assert set(CLIENT["dependencies"]) < set(GATEWAY["dependencies"])
    assert len(CLIENT["dependencies"]) <= 4
    for extra, needed in CLIENT["optional-dependencies"].items():
        assert needed == GATEWAY["optional-dependencies"][extra]
    assert (ROOT / "clients/python/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


distributions = functools.cache(importlib.metadata.packages_distributions)


def imported(module: Path) -> set[str]:
    """Return the packages of others that a module imports anywhere, also only for its types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        match node:
            case ast.Import(names=names):
                found |= {name.name.partition(".")[0] for name in names}
            case ast.ImportFrom(module=str(name), level=0):
                found.add(name.partition(".")[0])
    return found - sys.stdlib_module_names - {"gateway_client"}


@pytest.mark.parametrize(
    "module", sorted((ROOT / "clients/python/gateway_client").rglob("*.py")), ids=lambda path: path.stem
)
def test_what_a_module_imports_is_asked_for(module: Path) -> None:
    """By the distribution itself, or by the extra that is named as the module."""
    extra = CLIENT["optional-dependencies"].get(module.stem, [])
    asked = {canonicalize_name(Requirement(word).name) for word in (*CLIENT["dependencies"], *extra)}
    for name in imported(module):
        assert asked & {canonicalize_name(one) for one in distributions()[name]}, f"{name} is not asked for"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the client's wheel and what it asks for, linked from ours."""
    folder = tmp_path_factory.mktemp("client")
    build = (sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    made = subprocess.run(build, cwd=ROOT / "clients/python", capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "environment", symlinks=True)
    (packages,) = (folder / "environment").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert {name.partition("/")[0] for name in inside} == {"gateway_client"}
        assert "gateway_client/py.typed" in inside
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
        archive.extractall(packages)
    for word in CLIENT["dependencies"]:
        distribution = importlib.metadata.distribution(Requirement(word).name)
        for top in {
            path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")
        }:
            (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder / "environment" / "bin" / "python"


def run(python: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-I", "-c", program], cwd=python.parent, capture_output=True, text=True, timeout=60
    )


def test_alone_it_is_imported_within_a_fifth_of_a_second(python: Path) -> None:
    """In CPU seconds, the start of Python left out; nothing of the gateway is there."""
    measured = (
        "import time; begun = time.process_time();"
        "from gateway_client import Client; Client('http://127.0.0.1:1', token='none');"
        "print(time.process_time() - begun); import importlib.util as u; print(u.find_spec('gateway'))"
    )
    taken, others = [], set()
    for _ in range(3):
        answer = run(python, measured)
        assert answer.returncode == 0, answer.stderr
        seconds, gateway = answer.stdout.split()
        taken.append(float(seconds))
        others.add(gateway)
    assert others == {"None"}
    assert min(taken) <= 0.2


@pytest.mark.parametrize("extra", CLIENT["optional-dependencies"])
def test_a_missing_extra_says_what_to_install(python: Path, extra: str) -> None:
    answer = run(python, f"import gateway_client.{extra}")
    assert answer.returncode != 0
    said = answer.stderr.strip().splitlines()[-1]
    assert said.startswith(f"ImportError: gateway_client.{extra} needs more packages")
    _, _, advice = said.partition("pip install ")
    for word in CLIENT["optional-dependencies"][extra]:
        assert Requirement(word).name in advice


def test_the_environment_names_gateway_and_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given wins; without either the error says what to set."""
    monkeypatch.setenv("GATEWAY_URL", "http://127.0.0.1:2")
    monkeypatch.setenv("GATEWAY_TOKEN", "of the environment")
    client = Client()
    assert (client.address.url, client.credentials.token) == ("http://127.0.0.1:2", "of the environment")
    client = Client("http://127.0.0.1:1", token="given")
    assert (client.address.url, client.credentials.token) == ("http://127.0.0.1:1", "given")
    monkeypatch.delenv("GATEWAY_TOKEN")
    with pytest.raises(ValueError, match="token= to Client, or set GATEWAY_TOKEN"):
        Client()
    monkeypatch.setenv("GATEWAY_URL", "")
    with pytest.raises(ValueError, match="url= to Client, or set GATEWAY_URL"):
        Client(token="given")


def test_no_page_installs_by_a_name_that_no_index_has() -> None:
    """Ours are installed from files until they are published; a stranger could take the name meanwhile."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    pages += [*(ROOT / "clients").glob("*/README.md"), *(ROOT / "gateway").rglob("*.py")]
    by_name = re.compile(
        r"(?:install|(?:pnpm|bun|yarn|uv) add)\s+(?:-\S+\s+)*['\"]?(?:incus-gateway(?!/)|@incus-gateway/)\S*"
    )
    assert by_name.search("pip install -U 'incus-gateway[mcp]'") and by_name.search(
        "npm install @incus-gateway/client"
    )
    found = [f"{page}: {hit[0]}" for page in pages for hit in by_name.finditer(page.read_text())]
    assert found == []
