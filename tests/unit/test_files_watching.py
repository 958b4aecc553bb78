"""File watching on a host without free watches, and a watcher on a real tree."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.errors import NotFound, RateLimited, Unavailable
from gateway.files.files import Watch
from gateway.files.watcher import Watcher
from gateway.rootfs import file_calls
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.root import Root
from gateway.rootfs.worker import Workspace

pytestmark = pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="inotify is Linux's")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A workspace with `a/b`; this process acts as a worker, which changes its working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site" / "a" / "b").mkdir(parents=True)
    tree = Root(os.open(tmp_path / "site", os.O_RDONLY), "/srv/site")
    yield Workspace(tree, CallLimits(watch_folders=4, watch_changes=3))
    tree.close()


@pytest.fixture
def watcher(workspace: Workspace) -> Iterator[Watcher]:
    watcher = Watcher(workspace)
    yield watcher
    os.close(watcher.descriptor)


def wish(watch: int = 1, *paths: str) -> dict[str, Any]:
    return {"watch": watch, "paths": list(paths) or ["."], "ignore": ["skip"]}


def told(watcher: Watcher) -> list[dict[str, Any]]:
    """Return what would be sent once everything due is done."""
    watcher.read()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        while (wait := watcher.due()) is not None:
            select.select((), (), (), wait)
            watcher.tell(theirs)
        theirs.close()
        data, found = ours.recv(1 << 20), []
    while data:
        (length,) = struct.unpack_from(">I", data)
        found.append(orjson.loads(data[5 : 4 + length]))
        data = data[4 + length :]
    return found


def changes(notice: dict[str, Any]) -> list[tuple[str, str]]:
    return [(change["path"], change["change"]) for change in notice["changes"]]


def test_changes_are_told_to_who_sees_them(watcher: Watcher, workspace: Workspace, tmp_path: Path) -> None:
    watcher.watch(workspace, wish(1))
    watcher.watch(workspace, wish(2, "a/b"))
    site = tmp_path / "site"
    (site / "a" / "b" / "f").write_text("x")
    (site / "a" / "g").write_text("x")
    (site / "skip").mkdir()
    found = {notice["watch"]: notice for notice in told(watcher)}
    assert set(changes(found[1])) == {("a/b/f", "created"), ("a/g", "created")}
    assert [change["path"] for change in found[2]["changes"]] == ["a/b/f"]
    assert not found[1]["overflow"] and not found[2]["overflow"]
    watcher.unwatch(workspace, wish(1))
    (site / "a" / "g").write_text("y")
    assert told(watcher) == []


async def test_a_file_that_is_made_anew_is_changed(
    watcher: Watcher, workspace: Workspace, tmp_path: Path
) -> None:
    """As written by `git checkout` and many editors: in one message, or in two not read in between."""
    watch = Watch(1, "demo", 10)
    old, new = tmp_path / "site" / "a" / "old", tmp_path / "site" / "a" / "new"
    old.touch()
    watcher.watch(workspace, wish())

    def tell() -> None:
        for notice in told(watcher):
            watch.feed(notice["changes"], notice["overflow"])

    async def seen() -> Any:
        tell()
        return await asyncio.wait_for(watch.next(), 30)

    for apart in (False, True):
        old.unlink()
        if apart:
            tell()
        old.write_text("anew")
        assert await seen() == {"changes": [{"path": "a/old", "change": "changed"}], "overflow": False}
        new.touch()
        if apart:
            tell()
        new.unlink()
        if apart:
            tell()
        new.write_text("x")
        assert await seen() == {"changes": [{"path": "a/new", "change": "created"}], "overflow": False}
        new.unlink()
        assert (await seen())["changes"] == [{"path": "a/new", "change": "removed"}]


def test_a_root_that_is_a_file_comes_back_with_its_folder(
    watcher: Watcher, workspace: Workspace, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    (site / "a" / "f").touch()
    watcher.watch(workspace, wish(1, "a/f"))
    (site / "a").rename(tmp_path / "away")
    (site / "a").mkdir()
    (site / "a" / "f").touch()
    (notice,) = told(watcher)
    assert changes(notice) == [("a/f", "changed")] and not notice["overflow"]


@pytest.mark.parametrize("again", ["mkdir", "rename"])
def test_a_folder_that_replaces_another_is_an_overflow(
    watcher: Watcher, workspace: Workspace, tmp_path: Path, again: str
) -> None:
    """Moved away and recreated, or renamed over an empty one: only that tells clients to list it again."""
    site = tmp_path / "site"
    (site / "a" / "b" / "old").touch()
    if again == "rename":
        (site / "c").mkdir()
    watcher.watch(workspace, wish())
    if again == "mkdir":
        (site / "a" / "b").rename(tmp_path / "away")
        (site / "a" / "b").mkdir()
    else:
        (site / "a" / "b").rename(site / "c")
    (notice,) = told(watcher)
    assert notice["overflow"]
    (site / "a").chmod(0o700)
    (notice,) = told(watcher)
    assert changes(notice) == [("a", "changed")] and not notice["overflow"]


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files always have names here")
def test_a_file_without_a_name_is_no_change(watcher: Watcher, workspace: Workspace, tmp_path: Path) -> None:
    """Writes to an unnamed file are not reported; a real name of the same form is."""
    watcher.watch(workspace, wish(1))
    site = tmp_path / "site"
    descriptor = os.open(site, os.O_TMPFILE | os.O_WRONLY)
    os.write(descriptor, b"x")
    os.fchmod(descriptor, 0o600)
    assert told(watcher) == []
    os.close(descriptor)
    (site / "#1").write_text("x")
    assert [change["path"] for change in told(watcher)[0]["changes"]] == ["#1"]
    (site / "#1").write_text("y")
    assert changes(told(watcher)[0]) == [("#1", "changed")]
    for name in (".gateway-1f-0123456789ab", ".gateway-mine"):
        (site / name).write_text("x")
    assert [change["path"] for change in told(watcher)[0]["changes"]] == [".gateway-mine"]


def test_a_root_goes_with_a_folder_above_it(watcher: Watcher, workspace: Workspace, tmp_path: Path) -> None:
    watcher.watch(workspace, wish(1, "a/b"))
    (tmp_path / "site" / "a").rename(tmp_path / "gone")
    (notice,) = told(watcher)
    assert changes(notice) == [("a/b", "removed")]
    with pytest.raises(NotFound):
        watcher.watch(workspace, wish(2, "a"))


def test_a_folder_over_the_limit_is_an_overflow(
    watcher: Watcher, workspace: Workspace, tmp_path: Path
) -> None:
    """A new watch that needs too many folders is refused; an existing one continues."""
    watcher.watch(workspace, wish(1))
    for name in ("c", "d"):
        (tmp_path / "site" / name).mkdir()
    (notice,) = told(watcher)
    assert notice["overflow"]
    with pytest.raises(RateLimited, match="more than 4 folders"):
        watcher.watch(workspace, wish(2))
    told(watcher)
    (tmp_path / "site" / "a" / "b" / "f").write_text("x")
    (notice,) = told(watcher)
    assert changes(notice) == [("a/b/f", "created")] and not notice["overflow"]


def test_what_the_kernel_lost_is_told_and_the_tree_read_anew(
    watcher: Watcher, workspace: Workspace, tmp_path: Path
) -> None:
    watcher.watch(workspace, wish(1))
    (tmp_path / "site" / "new").mkdir()
    os.read(watcher.descriptor, 1 << 16)  # lost
    watcher.lost()
    (notice,) = told(watcher)
    assert notice["overflow"] and notice["changes"] == []
    (tmp_path / "site" / "new" / "f").write_text("x")
    (notice,) = told(watcher)
    assert changes(notice) == [("new/f", "created")]


def test_a_workspace_that_is_moved_is_gone(watcher: Watcher, workspace: Workspace, tmp_path: Path) -> None:
    watcher.watch(workspace, wish(1))
    (tmp_path / "site").rename(tmp_path / "other")
    watcher.read()
    assert watcher.gone


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [(errno.EMFILE, RateLimited, "max_user_instances"), (errno.ENOSYS, Unavailable, "support watching")],
)
def test_a_host_without_instances_says_so(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], words: str
) -> None:
    def refuse() -> int:
        raise OSError(number, "refused")

    monkeypatch.setattr(file_calls, "inotify", refuse)
    with pytest.raises(error, match=words):
        Watcher(workspace)


def test_a_host_without_watches_says_so(
    watcher: Watcher, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, mask: int) -> int:
        raise OSError(errno.ENOSPC, "refused")

    monkeypatch.setattr(file_calls, "inotify_add", refuse)
    with pytest.raises(RateLimited, match="max_user_watches"):
        watcher.watch(workspace, wish(1))
