"""A walk caches folders, and yet sees every change in them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.rootfs import walk
from gateway.rootfs.root import Root
from gateway.rootfs.walk import Walk
from gateway.tools.globs import Globs
from gateway.tools.search import GlobFilter, GrepFilter
from tests.waits import until_true


class All:
    """Chooses everything."""

    def question(self, state: Any) -> Hashable:
        return None

    def enter(self, path: str, hidden: Collection[str], state: Any) -> Any:
        return None

    def folder(self, path: str, state: Any) -> bool:
        return True

    def files(self, prefix: str, names: Sequence[str], state: Any) -> Collection[str]:
        return names


class Clock:
    """The clock that decides whether folders are old enough to be cached."""

    def __init__(self) -> None:
        self.ahead = 0
        self.monotonic = time.monotonic

    def time_ns(self) -> int:
        return time.time_ns() + self.ahead

    def settle(self, site: Path) -> None:
        """Advance the clock so that folders can be cached; later changes have a later ctime."""
        newest = max(path.stat().st_ctime_ns for path in (site, *site.rglob("*")))
        tick = site.parent / "tick"

        def ticked() -> bool:
            tick.touch()
            return tick.stat().st_ctime_ns > newest

        until_true(ticked, every=0.001)
        self.ahead = 2 * walk._SETTLED


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(walk, "time", clock)
    return clock


@pytest.fixture
def site(tmp_path: Path, clock: Clock) -> Iterator[Path]:
    """A workspace whose folders have been unchanged for long enough to be cached."""
    tmp_path /= "site"
    walk.forget()
    for name in ("a.ts", "src/b.ts", "src/deep/c.ts"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    clock.settle(tmp_path)
    yield tmp_path
    walk.forget()


def seen(site: Path, maximum: int = 1000) -> list[str]:
    tree = Root(os.open(site, os.O_RDONLY | os.O_DIRECTORY), "/srv/site")
    try:
        looked = Walk(tree, "", All(), maximum=maximum, deadline=time.monotonic() + 5, ordered=True)
        return [name for name, _ in looked]
    finally:
        tree.close()


EVERYTHING = ["a.ts", "src/b.ts", "src/deep/c.ts"]


def _new(site: Path) -> None:
    (site / "src/new.ts").touch()


def _removed(site: Path) -> None:
    (site / "src/b.ts").unlink()


def _renamed(site: Path) -> None:
    (site / "src/b.ts").rename(site / "src/d.ts")


def _set_back(site: Path) -> None:
    status = (site / "src").stat()
    (site / "src/new.ts").touch()
    os.utime(site / "src", ns=(status.st_atime_ns, status.st_mtime_ns))


def _swapped(site: Path) -> None:
    (site / "src/b.ts").unlink()
    (site / "src/b.ts").mkdir()
    (site / "src/b.ts/e.ts").touch()


def _linked(site: Path) -> None:
    (site / "src").rename(site / "lib")
    (site / "src").symlink_to("lib")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_new, [*EVERYTHING, "src/new.ts"]),
        (_removed, ["a.ts", "src/deep/c.ts"]),
        (_renamed, ["a.ts", "src/d.ts", "src/deep/c.ts"]),
        (_set_back, [*EVERYTHING, "src/new.ts"]),
        (_swapped, ["a.ts", "src/b.ts/e.ts", "src/deep/c.ts"]),
        (_linked, ["a.ts", "lib/b.ts", "lib/deep/c.ts"]),
    ],
)
def test_change_is_seen(site: Path, change: Callable[[Path], None], expected: list[str]) -> None:
    """Whatever happened to a cached folder, the next walk sees its current state."""
    assert seen(site) == EVERYTHING
    assert len(walk._kept) == 3
    assert seen(site) == EVERYTHING
    change(site)
    assert seen(site) == sorted(expected)


@pytest.mark.parametrize("name", [".gitignore", "src/.ignore", ".git/info/exclude"])
def test_change_of_an_ignore_file_is_seen(site: Path, clock: Clock, name: str) -> None:
    """The selection in a cached folder is made again if another rule applies to it."""
    (site / ".git/info").mkdir(parents=True)
    (site / name).write_text("c.ts\n")
    clock.settle(site)

    def sought() -> list[str]:
        tree = Root(os.open(site, os.O_RDONLY | os.O_DIRECTORY), "/srv/site")
        try:
            chooser = GrepFilter(tree, "", Globs(["!.git"]), None)
            deadline = time.monotonic() + 5
            looked = Walk(
                tree, "", chooser, state=chooser.above(), maximum=100, deadline=deadline, ordered=True
            )
            return [path for path, _ in looked if path.endswith(".ts")]
        finally:
            tree.close()

    assert sought() == sought() == ["a.ts", "src/b.ts"]
    with (site / name).open("r+") as rules:  # in place, so that no folder changes
        rules.write("b.ts\n")
    assert sought() == sought() == ["a.ts", "src/deep/c.ts"]
    (site / name).write_text("")
    assert sought() == EVERYTHING


def test_other_questions_get_other_answers(site: Path) -> None:
    """Several choosers get their own answers for the same cached folder."""
    for _ in range(2):
        for pattern, found in (("*.ts", EVERYTHING), ("c.ts", EVERYTHING[2:]), ("src/*", EVERYTHING[1:2])):
            tree = Root(os.open(site, os.O_RDONLY | os.O_DIRECTORY), "/srv/site")
            named = GlobFilter(Globs([pattern]), "", None, None)
            walked = Walk(tree, "", named, maximum=100, deadline=time.monotonic() + 5, ordered=True)
            assert [path for path, _ in walked] == found
            tree.close()
    for number in range(20):
        tree = Root(os.open(site, os.O_RDONLY | os.O_DIRECTORY), "/srv/site")
        named = GlobFilter(Globs([f"*{number}"]), "", None, None)
        assert not list(Walk(tree, "", named, maximum=100, deadline=time.monotonic() + 5, ordered=True))
        tree.close()
    assert all(len(listing._choices) <= walk._KEPT_CHOICES for listing in walk._kept.values())


def test_what_lies_in_a_moved_folder_is_found_there(site: Path, clock: Clock) -> None:
    """If a parent moves, a folder does not change, but its path does."""
    (site / "src/deep/down").mkdir()
    (site / "src/deep/down/d.ts").touch()
    clock.settle(site)
    assert seen(site) == seen(site) == [*EVERYTHING, "src/deep/down/d.ts"]
    (site / "src").rename(site / "lib")
    assert seen(site) == ["a.ts", "lib/b.ts", "lib/deep/c.ts", "lib/deep/down/d.ts"]


def test_young_folder_is_not_remembered(site: Path, clock: Clock) -> None:
    """A recently changed folder may change again with the same ctime, so it is read again."""
    clock.ahead = (site / "src").stat().st_ctime_ns + walk._SETTLED - 1_000_000_000 - time.time_ns()
    seen(site)
    assert len(walk._kept) == 0
    clock.settle(site)
    seen(site)
    assert len(walk._kept) == 3


def test_bound_holds_for_what_is_remembered(site: Path) -> None:
    """A cached folder counts like one that is read: the limit cuts both at the same place."""
    cut = seen(site, maximum=2)
    assert seen(site) == EVERYTHING
    assert len(seen(site, maximum=2)) == len(cut) < len(EVERYTHING)


def test_nothing_is_looked_into_beyond_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        (tmp_path / str(number)).mkdir()
    opened: list[str] = []
    monkeypatch.setattr(Root, "open_real", _noting(Root.open_real, opened))
    assert seen(tmp_path, maximum=30) == []
    assert opened == [""]


def _noting(real: Callable[..., int], opened: list[str]) -> Callable[..., int]:
    def open_real(tree: Root, path: str, flags: int) -> int:
        opened.append(path)
        return real(tree, path, flags)

    return open_real


def test_memory_is_bounded(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more names than are cached, the oldest folders are dropped and the walk is still complete."""
    monkeypatch.setattr(walk, "KEPT_NAMES_MAX", 4)
    assert seen(site) == EVERYTHING
    assert 0 < len(walk._kept) < 3
    assert seen(site) == EVERYTHING
