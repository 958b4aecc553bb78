"""Folders created for a file are removed if it cannot be written, unless the tenant has changed them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.rootfs import kernel
from gateway.rootfs.root import FOLDER, Root


@pytest.fixture(params=["openat2", "portable"])
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Root]:
    if request.param == "portable":
        monkeypatch.setattr(kernel, "HAS_OPENAT2", False)
    (tmp_path / "site" / "there").mkdir(parents=True)
    made = Root(os.open(tmp_path / "site", FOLDER), "/srv/site")
    yield made
    made.close()


def fails(tree: Root, meanwhile: Callable[[], object]) -> None:
    """Create folders for a file, let something happen, then let the file fail."""
    with pytest.raises(OSError, match="full"), tree.taking_back() as made:
        directory, name = tree.parent("there/a/b/c/file", create=True, made=made)
        os.close(directory)
        assert (name, [path for path, _ in made]) == ("file", ["there/a", "there/a/b", "there/a/b/c"])
        meanwhile()
        raise OSError("full")


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_was_made_goes_and_what_was_there_stays(tree: Root, tmp_path: Path) -> None:
    fails(tree, lambda: None)
    assert left(tmp_path / "site") == ["there"]
    with tree.taking_back() as made:
        os.close(tree.parent("there/a/file", create=True, made=made)[0])
    assert left(tmp_path / "site") == ["there", "there/a"]


def test_what_the_tenant_put_into_one_stays(tree: Root, tmp_path: Path) -> None:
    site = tmp_path / "site"
    fails(tree, (site / "there" / "a" / "b" / "mine").touch)
    assert left(site) == ["there", "there/a", "there/a/b", "there/a/b/mine"]


@pytest.mark.parametrize("what", ["moved", "replaced", "a link outside", "a link to a twin", "removed"])
def test_what_the_tenant_put_in_its_place_stays(tree: Root, tmp_path: Path, what: str) -> None:
    """Also if a link leads to an empty folder of the same name."""
    there, outside = tmp_path / "site" / "there", tmp_path / "outside"
    (outside / "b" / "c").mkdir(parents=True)
    (tmp_path / "site" / "twin" / "b" / "c").mkdir(parents=True)

    def swap() -> None:
        (there / "a").rename(there / "away")
        match what:
            case "replaced":
                (there / "a" / "b" / "c").mkdir(parents=True)
            case "a link outside":
                (there / "a").symlink_to(outside)
            case "a link to a twin":
                (there / "a").symlink_to("../twin")
            case "removed":
                (there / "away" / "b" / "c").rmdir()
                (there / "away" / "b").rmdir()
                (there / "away").rmdir()

    fails(tree, swap)
    assert left(outside) == ["b", "b/c"]
    assert left(tmp_path / "site" / "twin") == ["b", "b/c"]
    if what != "removed":
        assert left(there / "away") == ["b", "b/c"]
    if what == "replaced":
        assert left(there / "a") == ["b", "b/c"]
