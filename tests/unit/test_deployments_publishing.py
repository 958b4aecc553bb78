"""What of a tenant's site is published, and how."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from gateway.deployments import publishing
from gateway.deployments.archive import ArchiveEntry, packed, read_archive
from gateway.deployments.publishing import Sources
from gateway.deployments.request import DeploymentOwner
from gateway.deployments.template import MANIFEST, Manifest, read_manifest, uploaded
from gateway.errors import InvalidParams, Timeout
from tests.archives import archive

DATABASES = ("*.{db,sqlite,sqlite3}", "*.{db,sqlite,sqlite3}-*")


def manifest(text: str | None) -> Manifest:
    """Return the manifest of what is published of a site with this one."""
    entries = {"index.html": ArchiveEntry(b"x")} | (
        {} if text is None else {MANIFEST: ArchiveEntry(text.encode())}
    )
    return read_manifest(read_archive(publishing.for_production(packed(entries)))[MANIFEST])


def test_how_it_starts_for_development_is_not_how_it_is_served() -> None:
    """Where it listens, what is asked to see whether it is well, and what an update keeps stay."""
    ways = 'start = ["bun", "dev"]\ninstall = ["bun", "install"]\n'
    found = manifest(f'{ways}port = 4000\nhealth = "/up"\nkeep = ["data/**"]\nspa = false\n')
    keep = (*DATABASES, "data/**")
    assert found == Manifest(mode="production", port=4000, health="/up", keep=keep, spa=False)
    assert manifest(None) == Manifest(mode="production", keep=DATABASES)


def test_what_is_for_production_itself_stays_as_it_is() -> None:
    said = 'mode = "production"\nstatic = "."\ndescription = "a \\"shop\\" of \\\\ and é"\n'
    told = 'a "shop" of \\ and é'
    assert manifest(said) == Manifest(mode="production", static=".", description=told, keep=DATABASES)


@pytest.mark.parametrize("mode", ["production", "dev"])
def test_an_update_brings_nothing_of_what_a_production_site_keeps(mode: str) -> None:
    """Neither databases nor what the manifest names; sources with such names are none."""
    data = ["a.db", "data/deep/x", "x/data/y", "x/b.sqlite3-wal", "x/c.sqlite", "own.json"]
    source = ["data.js", "notes/data", "x/schema.sqlite.ts", "y.dbml"]
    keep = orjson.dumps([*DATABASES, "data/", "/own.json"]).decode()
    text = f'mode = "{mode}"\nstart = "x"\nkeep = {keep}\n'
    members = [(name, b"") for name in (*data, *source)]
    template = uploaded(archive(*members, manifest=text.encode()))
    update = template.update()
    wanted = {*source, MANIFEST} | (set() if mode == "production" else set(data))
    assert {path for path, entry in update.entries.items() if entry != ArchiveEntry()} == wanted
    assert read_archive(update.archive()).keys() & {*data} == wanted & {*data}
    assert {*data} <= template.entries.keys()


def test_what_is_no_manifest_is_refused() -> None:
    with pytest.raises(InvalidParams):
        manifest("start = 7")


def made(folder: Path, most: int = 1 << 20) -> dict[str, ArchiveEntry]:
    """Return what the script packs of a folder."""
    words = ["/bin/sh", "-c", publishing._SCRIPT, "sh", str(folder), str(most)]
    ran = subprocess.run(words, capture_output=True, check=True)
    return read_archive(ran.stdout)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "a site"
    for name in ("index.html", "src/-n it's", "node_modules/x/index.js", "dist/built.js"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "link").symlink_to("index.html")
    return folder


def test_without_a_repository_all_is_packed_but_what_is_made_anew(site: Path) -> None:
    assert made(site).keys() == {"index.html", "src/-n it's", "dist/built.js", "link"}


def test_of_a_repository_what_it_leaves_out_stays_behind(site: Path) -> None:
    """Also what is deleted and on record, and what was never added."""
    git = ["git", "-C", str(site), "-c", "user.name=x", "-c", "user.email=x"]
    (site / ".gitignore").write_text("node_modules/\ndist/\n")
    (site / "old.js").write_text("old")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (site / "old.js").unlink()
    (site / "new.js").write_text("new")
    assert made(site).keys() == {".gitignore", "index.html", "src/-n it's", "link", "new.js"}


def test_more_than_is_taken_is_cut_off(site: Path) -> None:
    (site / "large").write_bytes(bytes(1 << 20))
    words = ["/bin/sh", "-c", publishing._SCRIPT, "sh", str(site), "4096"]
    assert len(subprocess.run(words, capture_output=True, check=True).stdout) == 4096


# --- whose turn it is ------------------------------------------------------------------------------------


class Packing:
    """Runs the script of each tenant; that of `hostile` prints nothing. `running` has the tenants."""

    def __init__(self) -> None:
        self.running = list[str]()
        self.commands = self

    async def filesystem(self, tenant: str) -> Any:
        return SimpleNamespace(prefix="", workspace="/workspace")

    @contextlib.asynccontextmanager
    async def script(self, tenant: str, spec: object) -> AsyncIterator[Any]:
        self.running.append(tenant)
        left = [packed({"index.html": ArchiveEntry(b"x")})]

        async def read(stream: str) -> bytes:
            if tenant.startswith("hostile"):
                await asyncio.Event().wait()
            return left.pop() if left and stream == "stdout" else b""

        async def wait() -> Any:
            return SimpleNamespace(code=0)

        try:
            yield SimpleNamespace(read=read, wait=wait)
        finally:
            self.running.remove(tenant)


def owner(tenant: str) -> DeploymentOwner:
    return DeploymentOwner(frozenset({tenant}), "")


async def test_a_tar_that_hangs_holds_up_nobody_else_s_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of one owner take one place; each is given up once nothing comes, and its script ended."""
    monkeypatch.setattr(publishing, "_SILENCE", 0.2)
    packing: Any = Packing()
    sources = Sources(packing, packing)
    hanging = [asyncio.create_task(sources.of("hostile", owner("hostile"))) for _ in range(4)]
    async with asyncio.timeout(30):
        archive = await sources.of("shop", owner("shop"))
        assert not any(task.done() for task in hanging) and packing.running == ["hostile"]
        assert MANIFEST in read_archive(archive)
        with pytest.raises(Timeout, match="stood still"):
            await hanging[0]
        hanging[1].cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
    assert packing.running == [] and sources._publishes.held == sources._publishes.waiting == 0
