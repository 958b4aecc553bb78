"""Uploads in a worker: unnamed until they are complete, if the kernel supports it; remains are swept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.errors import Conflict, NotFound
from gateway.files import opening, operations
from gateway.rootfs import file_calls
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.root import Root
from gateway.rootfs.worker import Passing, Workspace

OPERATIONS = operations.OPERATIONS | opening.OPERATIONS | operations.OPERATIONS


class Site:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tree = Root(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), "/srv/site")
        self.workspace = Workspace(tree, CallLimits())

    def call(self, name: str, **given: Any) -> Any:
        reply = OPERATIONS[name](self.workspace, given)
        assert isinstance(reply, bytes)
        return orjson.loads(reply)

    def create(self, path: str) -> tuple[dict[str, Any], int]:
        passing = opening.OPERATIONS["files/create"](self.workspace, {"path": path})
        assert isinstance(passing, Passing)
        return orjson.loads(passing.reply), passing.descriptor

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob("*"))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.call("files/releaseAll")
    site.workspace.root.close()


@pytest.mark.parametrize("nameless", [None, False])
@pytest.mark.parametrize("old", [b"old", None])
def test_upload(
    site: Site, nameless: bool | None, old: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both forms end with the file in its place and nothing else."""
    monkeypatch.setattr(file_calls, "_names_files", nameless)
    if old is not None:
        (site.folder / "a.txt").write_bytes(old)
        (site.folder / "a.txt").chmod(0o640)
    before = site.names()
    told, descriptor = site.create("a.txt")
    assert (site.names() == before) is (file_calls._names_files is True)
    os.write(descriptor, b"new")
    os.close(descriptor)
    site.call("files/finish", token=told["token"])
    place = {key: told[key] for key in ("folder", "temporary", "inode")}
    assert site.call("files/commit", path="a.txt", **place)["created"] is (old is None)
    site.call("files/release", token=told["token"])
    assert site.names() == ["a.txt"]
    assert (site.folder / "a.txt").read_bytes() == b"new"
    assert (site.folder / "a.txt").stat().st_mode & 0o777 == (0o644 if old is None else 0o640)


@pytest.mark.parametrize("folder", ["", "deep/"])
def test_folder_replaced(site: Site, folder: str) -> None:
    """An upload whose folder was replaced meanwhile is a conflict, and does not create an unwanted file."""
    (site.folder / "deep").mkdir()
    told, descriptor = site.create(f"{folder}a.txt")
    os.close(descriptor)
    site.call("files/finish", token=told["token"])
    place = {key: told[key] for key in ("folder", "temporary", "inode")}
    (site.folder / folder / told["temporary"]).rename(site.folder / "elsewhere")
    if folder:
        (site.folder / "deep").rename(site.folder / "old")
    with pytest.raises(Conflict, match="send it again"):
        site.call("files/commit", path=f"{folder}a.txt", **place)


@pytest.mark.parametrize("nameless", [None, False])
def test_given_up(site: Site, nameless: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A released upload leaves nothing behind, whether or not it was complete."""
    monkeypatch.setattr(file_calls, "_names_files", nameless)
    for finish in (False, True):
        told, descriptor = site.create("new/deep/file")
        os.close(descriptor)
        if finish:
            site.call("files/finish", token=told["token"])
        site.call("files/release", token=told["token"])
        assert site.names() == []
    with pytest.raises(NotFound):
        site.call("files/finish", token=told["token"])


def test_sweep(site: Site, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Abandoned files go, at any depth, but no folders, recent files, other names or outside files."""
    stray, large = ".gateway-1f-0123456789ab", ".gateway-1f-0123456789abcdef"
    outside = tmp_path_factory.mktemp("outside")
    (outside / stray).touch()
    (site.folder / "deep/er").mkdir(parents=True)
    (site.folder / "way-out").symlink_to(outside)
    for path in (stray, f"deep/er/{large}", ".gateway-notes", ".gateway-1f-0123", "deep/x" + stray):
        (site.folder / path).touch()
    (site.folder / "deep" / stray).mkdir()
    (site.folder / "deep/er" / stray).symlink_to(outside / stray)
    assert site.call("files/sweep", before=0)["removed"] == 0
    now = max(path.lstat().st_ctime for path in site.folder.rglob("*"))
    assert site.call("files/sweep", before=now + 1)["removed"] == 2
    assert site.names() == sorted(
        ["deep", "er", "way-out", ".gateway-notes", ".gateway-1f-0123", "x" + stray, stray, stray]
    )
    assert (outside / stray).exists()
