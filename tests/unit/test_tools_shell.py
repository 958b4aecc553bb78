"""The words of Bash as plain functions, and its output files in a workspace that a tenant meddles with."""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.rootfs.messages import CallLimits
from gateway.rootfs.root import Root
from gateway.rootfs.worker import Workspace
from gateway.tools import shell
from gateway.tools.outputs import OPERATIONS


@pytest.mark.parametrize(
    ("command", "meaning"),
    [
        ("grep x f", "No matches found"),
        ("cat f | grep x", "No matches found"),
        ("cat f|/usr/bin/grep x", "No matches found"),
        ("cd a && LC_ALL=C rg x", "No matches found"),
        ("cd a\ngrep x f", "No matches found"),
        ("grep 'a | b; c' f", "No matches found"),
        ("diff a b 2>/dev/null", "Files differ"),
        ("[ -e f ]", "Condition is false"),
        ("grep x f | head", None),
        ("grep x f || exit 1", None),
        ("grep x f; false", None),
        ("echo 'grep", None),
        ("", None),
        ("python grep", None),
    ],
)
def test_the_last_program_says_what_exit_code_1_means(command: str, meaning: str | None) -> None:
    assert shell.interpretation(command, 1) == meaning
    assert shell.interpretation(command, 2) is None


def printed(text: str) -> shell.Printed:
    return shell.Printed(len(text), len(text), text, text[-shell.KEPT :], True)


def words(answer: Any) -> str:
    return str(answer.content[0]["text"])


def test_a_termination_is_named_once() -> None:
    for text in ("", "Terminated\n", "bash: line 1: 7 Terminated"):
        answer = shell.finished(None, printed(text), 143, (), {})
        assert words(answer).count("Terminated") == 1 and answer.is_error


def test_a_note_comes_after_what_is_kept_of_an_error() -> None:
    answer = shell.finished(None, printed("y\n" * 20_000), 1, ("a note",), {})
    text = words(answer)
    assert text.startswith("Exit code 1\ny\n") and text.endswith("y\na note") and len(text) < 10_100
    assert answer.structured["truncated"]


def test_both_ends_of_an_error_that_is_not_all_in_memory() -> None:
    many = shell.Printed(10**9, 10**9, "head\n" * 24_000, "tail\n" * 24_000, False)
    text = words(shell.finished(None, many, 1, (), {}))
    assert text.startswith("Exit code 1\nhead\n") and text.endswith("\ntail")
    assert "... [9999" in text


def test_a_cut_of_the_latest_output_says_so() -> None:
    text = words(shell.report("running", None, {"stdout": "x" * 30_010, "stderr": " \n"}, {}))
    assert "<stdout>\n... [10 characters truncated] ...\n\nxxx" in text and "stderr" not in text


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    tree = Root(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), "/srv/site")
    yield Workspace(tree, CallLimits())
    tree.close()


def do(workspace: Workspace, what: str, name: str, data: bytes = b"", **more: Any) -> None:
    given = {"name": name, "data": base64.b64encode(data).decode(), "age": 100, "room": 10, **more}
    OPERATIONS[f"output/{what}"](workspace, given)


def test_an_output_file_is_the_users_alone_and_grows(workspace: Workspace, tmp_path: Path) -> None:
    do(workspace, "create", "a.txt", b"one")
    do(workspace, "append", "a.txt", b"two")
    file = tmp_path / ".gateway/output/a.txt"
    assert file.read_bytes() == b"onetwo"
    assert (tmp_path / ".gateway/.gitignore").read_text() == "*\n"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent, file.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]
    do(workspace, "remove", "a.txt")
    do(workspace, "remove", "a.txt")
    assert not file.exists()


def test_old_files_go_and_then_the_oldest_of_too_many(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / ".gateway/output"
    do(workspace, "create", "first.txt", b"1234")
    now = (folder / "first.txt").stat().st_mtime
    for name, age, size in (("ancient", 200, 1), ("old", 50, 5), ("older", 60, 5), ("new", 10, 5)):
        (folder / name).write_bytes(b"x" * size)
        os.utime(folder / name, (now - age, now - age))
    (folder / "first.txt").unlink()
    do(workspace, "create", "b.txt", b"1")
    assert sorted(path.name for path in folder.iterdir()) == ["b.txt", "new", "old"]


@pytest.mark.parametrize("trap", ["link", "fifo", "folder", "gone"])
def test_what_took_a_files_place_is_not_written_to(workspace: Workspace, tmp_path: Path, trap: str) -> None:
    do(workspace, "create", "a.txt", b"one")
    file, other = tmp_path / ".gateway/output/a.txt", tmp_path / "other.txt"
    other.write_text("mine")
    file.unlink()
    match trap:
        case "link":
            file.symlink_to(other)
        case "fifo":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
    with pytest.raises(GatewayError):
        do(workspace, "append", "a.txt", b"two")
    assert other.read_text() == "mine"


@pytest.mark.parametrize("part", [".gateway", ".gateway/output"])
def test_a_folder_that_is_a_link_is_not_entered(workspace: Workspace, tmp_path: Path, part: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / part).parent.mkdir(exist_ok=True)
    (tmp_path / part).symlink_to(elsewhere)
    with pytest.raises(GatewayError):
        do(workspace, "create", "a.txt", b"one")
    assert list(elsewhere.iterdir()) == []
