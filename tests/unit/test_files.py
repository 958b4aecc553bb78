"""The parts of the editor's calls without I/O: merging and filtering changes, conditions, ranges."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from starlette.datastructures import Headers

from gateway.errors import Conflict, InvalidParams
from gateway.files.changes import Change, Changes, Wish
from gateway.files.http import StalePrecondition, UnsatisfiableRange, failed_condition, span, tags
from gateway.rootfs import file_calls


@pytest.mark.parametrize(
    ("together", "told"),
    [
        ("created created", "created"),
        ("created changed", "created"),
        # also what was not there before: who made it is not always known
        ("created removed", "removed"),
        ("changed created", "changed"),
        ("changed changed", "changed"),
        ("changed removed", "removed"),
        ("removed created", "changed"),
        ("removed changed", "changed"),
        ("removed removed", "removed"),
        # whoever shows what there is has never heard of it
        ("created removed created", "created"),
        ("created removed created changed", "created"),
        ("removed created removed", "removed"),
        ("changed removed created", "changed"),
        ("removed created removed created", "changed"),
    ],
)
@pytest.mark.parametrize("passed", range(5))
def test_changes_of_one_path_are_told_as_one(together: str, told: Change, passed: int) -> None:
    """Also if the first ones were passed on before the others arrived."""
    kinds: list[Any] = together.split()
    first, second = Changes(10), Changes(10)
    for number, kind in enumerate(kinds):
        if number == passed:
            for change in first.pass_on()["changes"]:
                second.add(**change)
        first.add("a", kind)
        first.add("b", "changed")
    for change in first.pass_on()["changes"]:
        second.add(**change)
    assert second.take() == {
        "changes": [{"path": "a", "change": told}, {"path": "b", "change": "changed"}],
        "overflow": False,
    }


@pytest.mark.parametrize(
    ("before", "after", "overflow"),
    [("file", "file", False), ("file", "folder", True), ("folder", "file", True), ("folder", "folder", True)],
)
def test_a_folder_in_the_place_of_another_is_an_overflow(before: str, after: str, overflow: bool) -> None:
    """The contents of the first are not reported, so a client must list again; a file needs no listing."""
    first, second = Changes(10), Changes(10)
    for passed in (False, True):
        first.add("a", "removed", folder=before == "folder")
        if passed:
            told = first.pass_on()
            assert not told["overflow"]
            for change in told["changes"]:
                second.add(**change)
        first.add("a", "created", folder=after == "folder")
        told = first.pass_on()
        for change in told["changes"]:
            second.add(**change)
        second.overflow |= told["overflow"]
        assert second.take() == {"changes": [{"path": "a", "change": "changed"}], "overflow": overflow}


def test_a_new_folder_in_the_place_of_a_new_one_is_a_new_one() -> None:
    """Nobody knows of the first, and "created" covers everything in a folder."""
    changes = Changes(10)
    kinds: tuple[Change, ...] = ("created", "removed", "created")
    for change in kinds:
        changes.add("a", change, folder=True)
    assert changes.take() == {"changes": [{"path": "a", "change": "created"}], "overflow": False}


def test_long_paths_are_an_overflow_sooner() -> None:
    """Pending changes of a watch are also limited in characters, and sending them makes room again."""
    changes = Changes(10)
    for _ in range(2):
        for number in range(10):
            changes.add(f"{number}" * 1000, "created")
        told = changes.take()
        assert told["overflow"] and len(told["changes"]) == 2


def test_more_changes_than_fit_are_an_overflow() -> None:
    """Known paths are still merged; taking the changes starts over."""
    changes = Changes(2)
    assert not changes
    for path in ("a", "b", "a"):
        changes.add(path, "changed")
    assert changes and not changes.overflow
    changes.add("c", "created")
    changes.add("b", "removed")
    told = changes.take()
    assert told["overflow"] and told["changes"][1] == {"path": "b", "change": "removed"}
    assert len(told["changes"]) == 2
    assert not changes and changes.take() == {"changes": [], "overflow": False}


@pytest.mark.parametrize(
    ("roots", "ignore", "path", "sees", "enters"),
    [
        ([""], [], "a/b", True, True),
        ([""], ["b"], "a/b", False, False),
        ([""], ["b"], "a/bb", True, True),
        (["a/b"], [], "a/b", True, True),
        (["a/b"], [], "a/b/c/d", True, True),
        (["a/b"], [], "a/bc", False, False),
        (["a/b"], [], "a", False, True),
        (["a/b"], [], "c", False, False),
        (["a/node_modules"], ["node_modules"], "a/node_modules/x", True, True),
        (["a/node_modules"], ["node_modules"], "a/node_modules/x/node_modules/y", False, False),
        (["a", "a/.git"], [".git"], "a/.git/index", True, True),
    ],
)
def test_a_watch_sees_what_it_asked_for(
    roots: list[str], ignore: list[str], path: str, sees: bool, enters: bool
) -> None:
    wish = Wish(roots, ignore)
    assert (wish.sees(path), wish.enters(path)) == (sees, enters)
    assert wish.enters("")


def test_events_of_the_kernel_are_told_apart() -> None:
    """One with a padded name, one without, in the layout of inotify(7)."""
    first = struct.pack("iIII8s", 1, file_calls.IN_CREATE, 0, 8, b"a\xff")
    second = struct.pack("iIII", -1, file_calls.IN_Q_OVERFLOW, 0, 0)
    assert list(file_calls.inotify_events(first + second)) == [
        (1, file_calls.IN_CREATE, 0, b"a\xff"),
        (-1, file_calls.IN_Q_OVERFLOW, 0, b""),
    ]


@pytest.mark.parametrize(
    ("header", "weak", "found"),
    [
        (None, True, None),
        ('"a"', False, ["a"]),
        ('"a", "b,c" ,W/"d"', True, ["a", "b,c", "d"]),
        ('"a", W/"d"', False, ["a"]),
        ("*", False, ["*"]),
        ("a-1-2", False, ["a-1-2"]),
        ('""', False, [""]),
    ],
)
def test_a_condition_is_a_list_of_etags(header: str | None, weak: bool, found: list[str] | None) -> None:
    assert tags(header, weak=weak) == found


@pytest.mark.parametrize("header", ["", " ", '"', '"a', '"a" "b"', ",", '"a",,'])
def test_a_malformed_condition_is_refused(header: str) -> None:
    """It never counts as no condition: a write that was meant to be careful must not succeed."""
    with pytest.raises(InvalidParams):
        tags(header, weak=False)


@pytest.mark.parametrize(
    ("header", "size", "found"),
    [
        ("", 10, None),
        ("bytes=0-0", 10, (0, 0)),
        ("bytes=2-", 10, (2, 9)),
        ("bytes=2-99", 10, (2, 9)),
        ("bytes=-3", 10, (7, 9)),
        ("bytes=-99", 10, (0, 9)),
        ("bytes=5-2", 10, None),
        ("bytes=-", 10, None),
        ("bytes=0-1,3-4", 10, None),
        ("bytes=1e3-", 10, None),
        ("pages=1-2", 10, None),
        ("bytes=" + "9" * 40 + "-", 10, None),
    ],
)
def test_a_range_is_one_part_or_the_whole(header: str, size: int, found: tuple[int, int] | None) -> None:
    assert span(Headers({"range": header}), "tag", size) == found


@pytest.mark.parametrize(("header", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0)])
def test_a_range_behind_the_end_cannot_be_had(header: str, size: int) -> None:
    with pytest.raises(UnsatisfiableRange):
        span(Headers({"range": header}), "tag", size)


@pytest.mark.parametrize(
    ("wanted", "found"), [('"tag"', (0, 1)), ('"other"', None), ('W/"tag"', None), ("Tue, 1 Jan", None)]
)
def test_a_range_of_another_file_is_the_whole_of_this_one(wanted: str, found: tuple[int, int] | None) -> None:
    assert span(Headers({"range": "bytes=0-1", "if-range": wanted}), "tag", 9) == found


def test_only_a_failed_condition_is_412() -> None:
    assert isinstance(failed_condition(Conflict("x", reason="stale", etag="e")), StalePrecondition)
    full = Conflict("x", reason="not_empty")
    assert failed_condition(full) is full
