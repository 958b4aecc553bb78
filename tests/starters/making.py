"""Makes starters by their generators, in a container, and keeps what they made."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from gateway.host.toolchain import CACHE, locked_file
from gateway.settings import Settings
from tests.integration import environment
from tests.integration.conftest import BOOTED, Container
from tests.starters.table import Starter

OURS: Final = Path(__file__).parents[1] / "data" / "starters"
KEPT: Final = CACHE / "starters"
_SECONDS: Final = 180.0  # of one generator

# as the site's user, who may install nothing for everybody
_MAKE: Final = """
set -e
export HOME=/home/site CI=1
export npm_config_yes=true NEXT_TELEMETRY_DISABLED=1 ASTRO_TELEMETRY_DISABLED=1
mkdir -p /tmp/made && cd /tmp/made
( %s ) </dev/null >log 2>&1 || { tail -n 20 log >&2; exit 1; }
[ -d app ] || { tail -n 20 log >&2; exit 1; }
tar -cz -C app --exclude=node_modules --exclude=.venv --exclude=.git . | base64 -w0
"""
_REACHED: Final = "curl -sS -m 10 -o /dev/null https://codeload.github.com/ 2>&1"


class Made:
    """A starter's files, packed; `ours` is whether they are of `tests/data/starters`, and why."""

    def __init__(self, archive: bytes, ours: str = "") -> None:
        self.archive, self.ours = archive, ours

    @property
    def template(self) -> dict[str, str]:
        """Return it as a deployment takes it."""
        return {"archive": base64.b64encode(self.archive).decode()}

    def with_files(self, files: Mapping[str, str]) -> Made:
        """Return it with more files, by their names."""
        packed = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(self.archive)) as old,
            tarfile.open(fileobj=packed, mode="w") as new,
        ):
            for member in old:
                new.addfile(member, old.extractfile(member) if member.isfile() else None)
            for name, text in files.items():
                more = tarfile.TarInfo(name)
                more.size = len(text)
                new.addfile(more, io.BytesIO(text.encode()))
        return Made(packed.getvalue(), self.ours)


class World(Exception):
    """A starter cannot be made: a registry is away, or its generator is broken. Nothing of ours was tried."""


async def made(name: str, starter: Starter, settings: Settings, *, newest: bool = False) -> Made:
    """Return a starter as its generator makes it: once on each machine, for each version of its line.

    With the `newest` versions it is made anew. Raises `World`.
    """
    digest = hashlib.sha256(starter.make.encode()).hexdigest()[:16]
    file = KEPT / f"{name}-{'newest' if newest else digest}.tgz"
    if newest:
        file.unlink(missing_ok=True)
    return await asyncio.to_thread(_made, file, starter, settings, newest)


def _made(file: Path, starter: Starter, settings: Settings, newest: bool) -> Made:
    if not starter.make:
        return Made(packed(OURS / starter.ours))
    with locked_file(file):
        if not file.exists():
            with _container(settings) as container:
                if starter.ours:
                    said = _run(container, _REACHED)
                    if said.returncode != 0:
                        why = said.stdout.decode(errors="replace").strip()
                        return Made(
                            packed(OURS / starter.ours, newest), f"its templates cannot be reached: {why}"
                        )
                try:
                    done = _run(container, _MAKE % (starter.newest if newest else starter.make))
                except subprocess.TimeoutExpired:
                    raise World(f"its generator does not end in {_SECONDS:g} s") from None
            if done.returncode != 0:
                raise World(f"its generator fails: {done.stderr.decode(errors='replace')[-1500:]}")
            new = file.with_suffix(f".{os.getpid()}.new")
            new.write_bytes(base64.b64decode(done.stdout))
            new.replace(file)
            for other in KEPT.glob(f"{file.stem.rpartition('-')[0]}-*.tgz"):
                if other != file and len(other.stem) == len(file.stem):
                    other.unlink()
        return Made(file.read_bytes())


def packed(folder: Path, newest: bool = False) -> bytes:
    """Return a folder as an archive, `newest` with the latest release of each package."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(folder, place, dirs_exist_ok=True)
        manifest = Path(place, "package.json")
        if newest:
            said = json.loads(manifest.read_text())
            for kind in ("dependencies", "devDependencies"):
                for name, version in said.get(kind, {}).items():
                    # a prerelease is newer than the package's latest release
                    said[kind][name] = version if "-" in version else "latest"
            manifest.write_text(json.dumps(said))
        return subprocess.run(["tar", "-cz", "-C", place, "."], capture_output=True, check=True).stdout


def _run(container: Container, script: str) -> subprocess.CompletedProcess[bytes]:
    return container.run("sh", "-c", script, user=1000, check=False, timeout=_SECONDS)


@contextlib.contextmanager
def _container(settings: Settings) -> Iterator[Container]:
    container = Container(f"t-starters-{os.getpid()}")
    mark = f"{environment.OWNER}={environment.owner(os.getpid())}"
    words = ("--profile", settings.profile, "--config", mark, "--config", "limits.memory=2GiB")
    try:
        environment.incus("launch", settings.image, container.name, *words)
        container.sh(BOOTED)
        container.address()
        yield container
    finally:
        environment.incus("delete", "--force", container.name, check=False)
