"""Whose a change is, and what is made of what git prints, by values; the scripts under each `sh`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.history import repository
from gateway.history.open_turns import OpenTurn, OpenTurns
from gateway.history.reading import Turn, changes, committed, deployed, listed, name, said

SHELLS = {"dash": ("dash",), "bash": ("bash", "--posix"), "busybox": ("busybox", "sh")}
BLANK = Turn("", "turn", "agent", "by", "title", 7)
ID = "0123456789" * 4


# --- whose a change is --------------------------------------------------------------------------------


def test_file_tools_have_their_paths_and_a_command_the_rest() -> None:
    turns = OpenTurns()
    one = turns.open("t", OpenTurn("one", "a", "a"))
    other = turns.open("t", OpenTurn("other", "b", "b"))
    turns.open("u", OpenTurn("one", "c", "c")).wrote("elsewhere")
    one.wrote("x")
    one.wrote("both")
    assert turns.share("t", one) == ("only", ["both", "x"])
    other.wrote(None)
    assert turns.share("t", other) == ("but", ["both", "x"])
    other.wrote("both")
    assert turns.share("t", other) == ("but", ["x"])
    assert turns.take("t", "one") is one
    assert turns.share("t", other) == ("all", [])


def test_a_turn_of_more_paths_than_are_remembered_has_whatever_changed() -> None:
    turn = OpenTurn("one", "a", "a")
    for number in range(5000):
        turn.wrote(f"path/{number}")
    assert turn.wide and len(turn.paths) <= 500


# --- what is printed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "counts", "left"),
    [
        (b"", None, ()),
        (b"fatal: no\n", None, ()),
        (ID.encode() + b"\n 1 file changed, 2 insertions(+), 3 deletions(-)\n", (1, 2, 3), ()),
        (ID.encode() + b"\n 2 files changed, 1 deletion(-)\n", (2, 0, 1), ()),
        (ID.encode() + b"\n\nbig\0a\nb\0\xff\0cut", (0, 0, 0), ("big", "a\\nb", "\\xff")),
    ],
)
def test_a_commit_is_read(printed: bytes, counts: tuple[int, ...] | None, left: tuple[str, ...]) -> None:
    turn = committed(printed, BLANK)
    if counts is None:
        assert turn is None
    else:
        assert turn is not None and (turn.files, turn.added, turn.removed) == counts
        assert (turn.id, turn.left_out) == (ID, left)


def test_a_forged_list_is_text_at_most() -> None:
    good = f"\x1e{ID}\0turn\0me\0by\x007\0title\n\0\n 1 file changed, 1 insertion(+)\n"
    forged = (
        f"\x1e{ID}\0root\0\x1b[2J\0b\x007\0\x1b]0;x\x07\0" + "\x1e\x1ezz\0\0\0\0\0\0" + "\x1e" + "9" * 300
    )
    found = listed((forged + good).encode())
    assert [(turn.kind, turn.agent, turn.title) for turn in found] == [
        ("turn", "[2J", "]0;x"),
        ("turn", "me", "title"),
    ]
    assert changes(b"\0\0nothing", 10) is None


def test_a_diff_that_is_cut_says_so() -> None:
    record = f"\x1e{ID}\0turn\0me\0by\x007\0title\n\0\n".encode()
    shown = changes(b"1\t2\ta\tb\0-\t-\tpic\x003\t" + b"\0\0" + record + b"\x1dpatch and more", 5)
    assert shown is not None
    assert [tuple(entry.values()) for entry in shown["changed"]] == [
        ("a\\tb", 1, 2, False),
        ("pic", 0, 0, True),
    ]
    assert (shown["diff"], shown["truncated"]) == ("patch", True)


def test_names_and_titles_are_what_git_takes() -> None:
    assert name("<Claude> \n;") == "Claude"
    assert name("<>\n.") == name("") == "unknown"
    assert said(" a\x00b \r\n\x1b[2J\tc\n\n", 100) == "a b\n [2J c"


@pytest.mark.parametrize(
    ("facts", "title"),
    [
        ({"template": "static", "rollback": None, "env": None}, "Deployed the template static (d-1)"),
        ({"template": "upload"}, "Deployed an uploaded folder (d-1)"),
        ({"template": "upload", "rollback": "d-0"}, "Went back to the site of d-0 (d-1)"),
        ({"template": "static", "env": ["A", "B"]}, "Changed A, B of the environment (d-1)"),
    ],
)
def test_a_deployment_says_what_it_was_and_whose(facts: dict[str, object], title: str) -> None:
    assert deployed({"deployment": "d-1", "by": "eve", **facts}) == (title, "eve")


# --- the scripts --------------------------------------------------------------------------------------


class Folder:
    """A workspace and its history, and the scripts on them as the gateway runs them."""

    def __init__(self, place: Path, shell: tuple[str, ...]) -> None:
        self.work, self.history = place / "work", place / "state" / "history.git"
        self.work.mkdir()
        self._shell = shell

    def run(self, script: str, *words: str, given: bytes = b"") -> tuple[int, bytes]:
        env = {
            **repository._ENVIRONMENT,
            **repository._identity(BLANK),
            "PATH": os.environ["PATH"],
            "GIT_DIR": str(self.history),
            "GIT_WORK_TREE": str(self.work),
        }
        argv = [*self._shell, "-c", repository._SCRIPTS[script], "sh", *words]
        ended = subprocess.run(argv, input=given, stdout=subprocess.PIPE, env=env, cwd="/", timeout=30)
        return ended.returncode, ended.stdout

    def commit(self, mode: str = "all", given: bytes = b"", most: int = 1000) -> Turn | None:
        code, printed = self.run("commit", mode, str(most), "1", "title", given=given)
        assert code == 0, printed
        return committed(printed, BLANK)

    def put(self, **files: str) -> None:
        for path, text in files.items():
            (self.work / path).write_text(text)

    def held(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.work.iterdir() if path.is_file()}


@pytest.fixture(params=SHELLS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    shell: tuple[str, ...] = SHELLS[request.param]
    if shutil.which(shell[0]) is None or shutil.which("git") is None:
        pytest.skip(f"there is no {shell[0]} or no git here")
    return Folder(tmp_path, shell)


def test_turns_are_recorded_listed_and_gone_back_to(folder: Folder) -> None:
    folder.put(a="1", b="1")
    first = folder.commit("begin", b":(exclude,top,literal)b\0")
    assert first is not None and first.files == 1
    assert folder.commit("begin") is None
    folder.put(a="2", c="2")
    assert (only := folder.commit("only", b"a\0nowhere\0")) is not None and only.files == 1
    (folder.work / "a").unlink()
    but = folder.commit("but", b":(exclude,top,literal)c\0")
    assert but is not None and but.files == 2
    assert folder.commit() is not None and folder.commit() is None
    turns = listed(folder.run("list", "10")[1])
    assert [turn.id for turn in turns[1:]] == [but.id, only.id, first.id]
    assert [turn.id for turn in listed(folder.run("list", "1", but.id)[1])] == [only.id]
    assert folder.run("list", "5", first.id) == (0, b"")
    assert folder.run("restore", "before", but.id, "1", "back")[0] == 0
    assert folder.held() == {"a": "2"}


@contextlib.contextmanager
def killed_at(step: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have a script killed where it runs this word of git."""
    git = place / "bin/git"
    git.parent.mkdir(exist_ok=True)
    git.write_text(f'#!/bin/sh\n[ "$1" != {step} ] || kill -9 $PPID $$\nexec {shutil.which("git")} "$@"\n')
    git.chmod(0o755)
    with monkeypatch.context() as killing:
        killing.setenv("PATH", f"{git.parent}:{os.environ['PATH']}")
        yield


def test_going_back_after_a_kill_changes_what_it_should(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killed one had gone back already, but not recorded it."""
    folder.put(a="1")
    first = folder.commit()
    folder.put(a="2", b="2")
    second = folder.commit()
    assert first is not None and second is not None
    with killed_at("commit-tree", tmp_path, monkeypatch):
        assert folder.run("restore", "after", first.id, "1", "back")[0] == -9
    assert folder.held() == {"a": "1"}
    folder.put(a="2", b="2")  # as somebody made it again
    assert folder.run("restore", "after", first.id, "1", "back")[0] == 0
    assert folder.held() == {"a": "1"}


@pytest.mark.parametrize("index", ["whole", "broken"])
@pytest.mark.parametrize("step", ["write-tree", "commit-tree", "update-ref"])
def test_what_a_killed_one_was_recording_is_in_the_next_turn(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, index: str
) -> None:
    """Alone, though an index has it already, even one made anew; and going back is still possible."""
    folder.put(a="1", b="1")
    first = folder.commit()
    folder.put(a="2")
    if index == "broken":
        (folder.history / "index").write_bytes(b"\0" * 1000)
    with killed_at(step, tmp_path, monkeypatch):
        assert folder.run("commit", "all", "1000", "1", "title")[0] == -9
    assert first is not None
    turn = folder.commit()
    assert turn is not None and turn.files == 1
    assert folder.commit() is None
    assert folder.run("restore", "before", turn.id, "1", "back")[0] == 0
    assert folder.held() == {"a": "1", "b": "1"}


def test_what_is_large_or_cannot_be_read_keeps_its_last_state(folder: Folder) -> None:
    folder.put(grows="small", stays="1", goes="1")
    folder.commit()
    folder.put(grows="x" * 2000, stays="2", large="x" * 2000)
    (folder.work / "goes").unlink()
    turn = folder.commit()
    assert turn is not None and (turn.files, set(turn.left_out)) == (2, {"grows", "large"})
    # all together too large: what is not of a size that people write is left out
    folder.put(**{f"f{number}": "x" * 900 for number in range(40)})
    code, _ = folder.run("commit", "all", "1000", "1", "title")
    assert code == 68


def test_what_is_in_the_way_is_not_overwritten(folder: Folder) -> None:
    folder.put(a="1", keep="1")
    folder.commit()
    (folder.work / "a").unlink()
    turn = folder.commit()
    assert turn is not None
    folder.put(a="x" * 2000)
    folder.run("commit", "before", "1000", "1", "outside", turn.id)
    code, _ = folder.run("restore", "before", turn.id, "1", "back")
    assert code == 65 and folder.held()["a"] == "x" * 2000


def test_a_history_is_kept_small(folder: Folder) -> None:
    for number in range(6):
        folder.put(a=str(number))
        folder.commit()
    assert folder.run("tidy", "3", "100000000", "1")[0] == 0
    turns = listed(folder.run("list", "10")[1])
    assert len(turns) == 3
    assert folder.run("restore", "before", turns[-1].id, "1", "back")[0] == 67
    assert folder.run("restore", "after", turns[-1].id, "1", "back")[0] == 0
    assert folder.held() == {"a": "3"}
    assert folder.commit() is None
    assert folder.run("tidy", "3", "1000", "1")[0] == 0
    assert len(listed(folder.run("list", "10")[1])) < 3


def test_a_history_without_words_or_git_says_which(folder: Folder, tmp_path: Path) -> None:
    for script, words in (("restore", ("before", ID, "1", "x")), ("diff", (ID, "10", "10"))):
        assert folder.run(script, *words) == (66, b"")
    assert folder.run("list", "1") == folder.run("tidy", "1", "1", "1") == (0, b"")
    folder.put(a="1")
    folder.commit()
    assert folder.run("restore", "before", ID, "1", "x") == (66, b"")
    assert folder.run("commit", "before", "1000", "1", "x", ID) == (66, b"")


def test_a_workspace_becomes_a_repository_and_stays_what_it_is(folder: Folder) -> None:
    assert folder.run("adopt") == (0, b"")
    ignored = (folder.work / ".gitignore").read_text()
    assert "node_modules/" in ignored and (folder.work / ".git" / "HEAD").exists()
    folder.put(**{".gitignore": "mine"})
    shutil.rmtree(folder.work / ".git")
    (folder.work / ".git").symlink_to("nowhere")
    assert folder.run("adopt") == (0, b"")
    assert folder.held()[".gitignore"] == "mine" and (folder.work / ".git").is_symlink()
