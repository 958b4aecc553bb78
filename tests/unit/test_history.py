"""Whose a change is, and what is made of what git prints, by values; the scripts under each `sh`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from gateway.history import repository
from gateway.history.recorder import OpenTurn, OpenTurns
from gateway.history.repository import (
    Commit,
    both,
    changes,
    clean_text,
    committed,
    conflicting,
    deployed,
    display,
    listed,
    name,
)

SHELLS = {"dash": ("dash",), "bash": ("bash", "--posix"), "busybox": ("busybox", "sh")}
BLANK = Commit("", "turn", "agent", "by", "title", 7)
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


def test_a_tenant_s_turns_remember_no_more_paths_than_are_sorted_in_a_moment() -> None:
    """Beyond that one of them may have written anything, as after a command."""
    turns = OpenTurns()
    opened = [turns.open("t", OpenTurn(number, "a", "a")) for number in range(256)]
    for turn in opened:
        for number in range(100):
            turns.wrote("t", turn, f"{turn.key}/{number}")
    assert sum(len(turn.paths) for turn in opened) == 8000
    assert not opened[0].wide and opened[-1].wide
    turns.wrote("t", opened[0], "0/0")
    assert not opened[0].wide  # it is known


def test_a_list_of_small_records_costs_no_more_than_what_was_asked_for() -> None:
    good = f"\x1e{ID}\0turn\0me\0by\x007\0title\n\0\n 1 file changed\n".encode()
    assert len(listed(good * 5000, 200)) == 200
    assert listed(b"\x1e\0\0\0\0\0\0" * 5000 + good, 200) == []
    files = b"1\t1\ta\0" * 40_000
    told = changes(files + b"\0" + good + b"\x1dpatch", 100)
    assert told is not None and len(told["changed"]) == 10_000


def test_a_forged_list_is_text_at_most() -> None:
    good = f"\x1e{ID}\0turn\0me\0by\x007\0title\n\0\n 1 file changed, 1 insertion(+)\n"
    forged = (
        f"\x1e{ID}\0root\0\x1b[2J\0b\x007\0\x1b]0;x\x07\0" + "\x1e\x1ezz\0\0\0\0\0\0" + "\x1e" + "9" * 300
    )
    found = listed((forged + good).encode(), 200)
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
    assert clean_text(" a\x00b \r\n\x1b[2J\tc\n\n", 100) == "a b\n [2J c"


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

    def run(
        self, script: str, *words: str, given: bytes = b"", times: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[int, bytes]:
        env = {
            **times,
            **repository._ENVIRONMENT,
            **repository._identity(BLANK),
            "PATH": os.environ["PATH"],
            "GIT_DIR": str(self.history),
            "GIT_WORK_TREE": str(self.work),
        }
        argv = [*self._shell, "-c", repository._SCRIPTS[script], "sh", *words]
        ended = subprocess.run(argv, input=given, stdout=subprocess.PIPE, env=env, cwd="/", timeout=30)
        return ended.returncode, ended.stdout

    def commit(self, mode: str = "all", given: bytes = b"", most: int = 1000) -> Commit | None:
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
    if shutil.which(shell[0]) is None:
        pytest.skip(f"there is no {shell[0]} here")
    return Folder(tmp_path, shell)


def test_turns_are_recorded_listed_and_gone_back_to(folder: Folder) -> None:
    folder.put(a="1", b="1")
    first = folder.commit("begin", b"b\0")
    assert first is not None and first.files == 1
    assert folder.commit("begin") is None
    folder.put(a="2", c="2")
    assert (only := folder.commit("only", b"a\0nowhere\0")) is not None and only.files == 1
    (folder.work / "a").unlink()
    but = folder.commit("but", b"c\0")
    assert but is not None and but.files == 2
    assert folder.commit() is not None and folder.commit() is None
    turns = listed(folder.run("list", "10")[1], 200)
    assert [turn.id for turn in turns[1:]] == [but.id, only.id, first.id]
    assert [turn.id for turn in listed(folder.run("list", "1", but.id)[1], 200)] == [only.id]
    assert folder.run("list", "5", first.id) == (0, b"")
    assert folder.run("restore", "before", but.id, "1", "back")[0] == 0
    assert folder.held() == {"a": "2"}


def undo(folder: Folder, turn: Commit | None, *force: str) -> tuple[Commit | None, list[str]]:
    """Take back a turn as the gateway does."""
    assert turn is not None
    code, _ = folder.run("commit", "undo", "1000", "1", "outside", turn.id)
    assert code == 0
    given = b"".join(os.fsencode(path) + b"\0" for path in force)
    code, printed = folder.run("restore", "undo", turn.id, "1", "undo", given=given)
    assert code == 0, printed
    return committed(printed, BLANK), [display(path) for path in conflicting(printed)]


LINES = "1\n2\n3\n4\n5\n6\n7\n8\n9\n"


def test_an_undo_takes_back_one_turn_and_leaves_what_came_later(folder: Folder) -> None:
    """What a person saved in the same file, recorded or not, and later turns stay."""
    folder.put(page=LINES, gone="1", other="1")
    folder.commit()
    folder.put(page=LINES.replace("2", "two"), made="1")
    (folder.work / "gone").unlink()
    turn = folder.commit()
    folder.put(page=LINES.replace("2", "two").replace("5", "five"), other="2")
    folder.commit()
    folder.put(page=LINES.replace("2", "two").replace("5", "five").replace("9", "nine"), new="1")
    undone, conflicts = undo(folder, turn)
    now = {"page": LINES.replace("5", "five").replace("9", "nine"), "gone": "1", "other": "2", "new": "1"}
    assert folder.held() == now
    assert undone is not None and undone.files == 3 and conflicts == []
    assert undo(folder, turn) == (None, []), "it is undone already"
    assert undo(folder, undone)[1] == []
    assert folder.held() == {
        **{key: text for key, text in now.items() if key != "gone"},
        **{"page": now["page"].replace("2", "two"), "made": "1"},
    }


def test_where_an_undo_overlaps_nothing_changes_unless_it_is_forced(folder: Folder) -> None:
    """A page whose lines changed since, a picture, a file that is gone, and one that was made."""
    folder.put(page=LINES, free="1", pic="\0one", gone="1", both="1")
    folder.commit()
    folder.put(page=LINES.replace("2", "two"), free="2", pic="\0two", gone="2", made="1", both="2")
    turn = folder.commit()
    later = {
        **{"page": LINES.replace("2", "zwei").replace("8", "acht"), "pic": "\0tri", "made": "2"},
        **{"free": "2", "both": "2"},
    }
    folder.put(**later)
    (folder.work / "gone").unlink()
    assert undo(folder, turn) == (None, ["gone", "made", "page", "pic"])
    assert folder.held() == later
    assert undo(folder, turn, "page", "pic", "free", "nothing") == (None, ["gone", "made"])
    assert folder.held() == later
    undone, conflicts = undo(folder, turn, "page", "pic", "gone", "made")
    assert undone is not None and conflicts == []
    assert folder.held() == {"page": LINES, "pic": "\0one", "gone": "1", "free": "1", "both": "1"}


def test_an_undo_of_modes_links_folders_and_line_ends(folder: Folder) -> None:
    """Modes are merged apart from lines; a link, and a folder in the place of a file, are whole."""
    folder.put(run=LINES, link="file", was="file", ends=LINES, empty="")
    folder.commit()
    work = folder.work
    (work / "run").chmod(0o755)
    (work / "link").unlink()
    (work / "link").symlink_to("nowhere")
    (work / "was").unlink()
    (work / "was").mkdir()
    (work / "was/deep").write_text("1")
    (work / "empty").unlink()
    (work / "ends").write_bytes(LINES.replace("\n", "\r\n").encode())
    turn = folder.commit()
    folder.put(run=LINES.replace("5", "five"))
    undone, conflicts = undo(folder, turn)
    assert conflicts == [] and undone is not None and undone.files == 6
    assert folder.held() == {
        **{"run": LINES.replace("5", "five"), "link": "file", "was": "file", "ends": LINES, "empty": ""}
    }
    assert (work / "run").stat().st_mode & 0o111 == 0
    undo(folder, undone)
    assert (work / "link").is_symlink() and (work / "was/deep").read_text() == "1"
    assert (work / "run").read_text() == LINES.replace("5", "five")
    # somebody's file is in that folder now, and the link leads elsewhere
    (work / "was/mine").write_text("mine")
    (work / "link").unlink()
    (work / "link").symlink_to("elsewhere")
    (work / "ends").write_bytes(LINES.replace("\n", "\r\n").replace("9", "nine").encode())
    assert undo(folder, turn) == (None, ["ends", "link", "was"])
    assert (work / "was/mine").read_text() == "mine" and os.readlink(work / "link") == "elsewhere"
    undone, conflicts = undo(folder, turn, "was", "link", "ends")
    assert undone is not None and conflicts == []
    assert folder.held()["was"] == "file" and not (work / "link").is_symlink()
    # what the force has taken is on record
    undo(folder, undone, "was")
    assert (work / "was/mine").read_text() == "mine"


def test_a_file_in_the_place_of_a_folder_is_a_conflict(folder: Folder) -> None:
    (folder.work / "d/e").mkdir(parents=True)
    (folder.work / "d/e/f").write_text("1")
    folder.commit()
    shutil.rmtree(folder.work / "d")
    turn = folder.commit()
    folder.put(d="mine")
    assert undo(folder, turn) == (None, ["d"])
    assert folder.held() == {"d": "mine"}
    assert undo(folder, turn, "d")[1] == []
    assert (folder.work / "d/e/f").read_text() == "1" and os.listdir(folder.work) == ["d"]


def test_what_changed_later_in_a_renamed_file_stays_with_it(folder: Folder) -> None:
    """What was made beside it stays where it is."""
    before, after = folder.work / "before", folder.work / "after"
    before.mkdir()
    folder.put(**{f"before/{name}": f"{LINES}{name}\n" for name in "abc"})
    folder.commit()
    before.rename(after)
    turn = folder.commit()
    folder.put(**{"after/a": f"{LINES.replace('5', 'five')}a\n", "after/mine": "mine"})
    assert undo(folder, turn)[1] == []
    assert (before / "a").read_text() == f"{LINES.replace('5', 'five')}a\n"
    assert (sorted(os.listdir(before)), os.listdir(after)) == ([*"abc"], ["mine"])


def test_an_undo_overwrites_nothing_that_is_ignored(folder: Folder) -> None:
    """Not what was made where a file was, nor what is in a folder that goes; however one goes back."""
    (folder.work / "d").mkdir()
    folder.put(conf="old", was="file", **{"d/e": "1"})
    folder.commit()
    for path in ("conf", "was", "d/e"):
        (folder.work / path).unlink()
    (folder.work / "d").rmdir()
    (folder.work / "was").mkdir()
    folder.put(**{".gitignore": "conf\nd\n", "was/deep": "1"})
    turn = folder.commit()
    assert turn is not None
    mine = {"conf": "a person's", "was/data.db": "a person's", "d": "a person's"}
    for path, text in mine.items():
        folder.put(**{path: text})
        for side in ("undo", "before"):
            assert folder.run("commit", side, "1000", "1", "outside", turn.id)[0] == 0
            assert folder.run("restore", side, turn.id, "1", "undo") == (65, b"")
            assert (folder.work / path).read_text() == text and (folder.work / "was/deep").exists()
        (folder.work / path).unlink()
    assert undo(folder, turn)[1] == [] and folder.held() == {"conf": "old", "was": "file"}


def test_names_that_git_takes_for_patterns_are_forced_like_any(folder: Folder) -> None:
    names = ("*", "-rf", ":(top)x", ":!y", "[a]", " b ", "a\nb", "\udcff", "conflicts", "c~d")
    folder.put(**dict.fromkeys(names, "1"), a="1")
    folder.commit()
    folder.put(**dict.fromkeys(names, "2"), a="2")
    turn = folder.commit()
    folder.put(**dict.fromkeys(names, "3"), a="3")
    conflicts = undo(folder, turn)[1]
    assert len(conflicts) == len(names) + 1
    undone, conflicts = undo(folder, turn, *names, "a")
    assert undone is not None and conflicts == [] and set(folder.held().values()) == {"1"}
    assert len(folder.held()) == len(names) + 1


def test_a_folder_that_became_a_link_is_recorded(folder: Folder) -> None:
    """And what somebody writes through it is that one's."""
    (folder.work / "d").mkdir()
    folder.put(**{"d/f": "1", "d/g": "1"}, other="1")
    folder.commit()
    (folder.work / "d").rename(folder.work / "e")
    (folder.work / "d").symlink_to("e")
    folder.put(**{"d/f": "two"})
    moved = folder.commit()
    assert moved is not None and moved.files == 5 and folder.commit() is None
    folder.put(**{"d/f": "three"}, other="2")
    (folder.work / "away").symlink_to("/")
    assert folder.commit("but", b"d/f\0") is not None
    found = folder.commit("only", b"d/f\0away/x\0")
    assert found is not None and found.files == 1 and folder.commit() is None
    assert undo(folder, moved) == (None, ["e/f"])
    assert undo(folder, moved, "e/f")[1] == []
    assert not (folder.work / "d").is_symlink() and (folder.work / "d/f").read_text() == "1"


def test_what_a_user_has_set_for_git_is_not_read(folder: Folder, tmp_path: Path) -> None:
    (place := tmp_path / "home/.config/git").mkdir(parents=True)
    (place / "ignore").write_text("mine")
    os.mkfifo(place / "attributes")
    folder.put(mine="1")
    code, printed = folder.run("commit", "all", "1000", "1", "t", times={"HOME": str(tmp_path / "home")})
    assert code == 0 and (committed(printed, BLANK) or BLANK).files == 1


def test_however_many_paths_are_others_they_are_left_out(folder: Folder) -> None:
    names = [f"d/{'long' * 20}/{number}" for number in range(4000)]
    (folder.work / names[0]).parent.mkdir(parents=True)
    folder.put(**{names[0]: "1", names[-1]: "1"}, mine="1")
    found = folder.commit("but", "".join(f"{name}\0" for name in names).encode())
    assert found is not None and found.files == 1


def test_an_undo_of_what_is_not_recorded_or_first_is_refused(folder: Folder) -> None:
    """What is in the way and not recorded stays; as does all the rest."""
    folder.put(a="1", b="1")
    first = folder.commit()
    (folder.work / "a").unlink()
    folder.put(b="2")
    turn = folder.commit()
    assert turn is not None and first is not None
    folder.put(a="x" * 2000)
    assert folder.run("commit", "undo", "1000", "1", "outside", turn.id)[0] == 0
    assert folder.run("restore", "undo", turn.id, "1", "undo")[0] == 65
    assert folder.held() == {"a": "x" * 2000, "b": "2"}
    assert folder.run("commit", "undo", "1000", "1", "outside", first.id)[0] == 67
    assert folder.run("restore", "undo", first.id, "1", "undo")[0] == 67


@contextlib.contextmanager
def killed_at(step: str, place: Path, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> Iterator[None]:
    """Have a script killed where it runs these words of git; after as many times if that is given."""
    git = place / "bin/git"
    git.parent.mkdir(exist_ok=True)
    (count := place / "times").write_text("")
    git.write_text(
        f'#!/bin/sh\ncase "$*" in {step.replace(" ", chr(92) + " ")}*) echo >>{count}\n'
        f'[ "$(wc -l <{count})" -le {after} ] || kill -9 $PPID $$ ;; esac\nexec {shutil.which("git")} "$@"\n'
    )
    git.chmod(0o755)
    with monkeypatch.context() as killing:
        killing.setenv("PATH", f"{git.parent}:{os.environ['PATH']}")
        yield


STEPS = {
    **{"commit-tree": 2, "-c merge.directoryRenames=false merge-tree": 1, "update-index": 1},
    **{"read-tree -n": 1, "read-tree -m -u": 1, "update-ref": 1, "diff-tree --no-commit-id": 1},
}


@pytest.mark.parametrize(
    ("step", "time"), [(step, time) for step, most in STEPS.items() for time in range(most)]
)
def test_a_killed_undo_has_changed_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, time: int
) -> None:
    """At once, and after the next commit; which may be killed while it carries it through."""
    folder = Folder(tmp_path, ("sh",))
    before = {"a": LINES, "b": "1", "gone": "1"}
    after = {"a": LINES.replace("2", "two"), "b": "2", "made": "1"}
    folder.put(**before)
    folder.commit()
    folder.put(**after)
    (folder.work / "gone").unlink()
    turn = folder.commit()
    assert turn is not None
    with killed_at(step, tmp_path, monkeypatch, time):
        assert folder.run("restore", "undo", turn.id, "1", "undo")[0] == -9
    assert folder.held() in (before, after)
    folder.put(b=folder.held()["b"])  # saved, but not changed
    with killed_at("read-tree -m -u", tmp_path, monkeypatch):
        folder.run("commit", "all", "1000", "1", "title")
    folder.put(other="1")
    last = folder.commit()
    assert last is not None and last.files == 1, "the undo is on record by itself, or did not happen"
    assert folder.held() in ({**before, "other": "1"}, {**after, "other": "1"})
    assert folder.commit() is None


def test_an_undo_that_was_killed_while_it_wrote_is_carried_through(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had not written is written, but for what somebody has saved since."""
    before = {"a": LINES, "b": "1", "gone": "1", "c": "1"}
    folder.put(**before)
    folder.commit()
    folder.put(a=LINES.replace("2", "two"), b="2", made="1", c="2")
    (folder.work / "gone").unlink()
    turn = folder.commit()
    assert turn is not None
    with killed_at("read-tree -m -u", tmp_path, monkeypatch):
        assert folder.run("restore", "undo", turn.id, "1", "undo")[0] == -9
    for path in ("gone", "made", "b"):
        (folder.work / path).unlink(missing_ok=True)
        if path in before:
            folder.put(**{path: before[path]})
    folder.put(c="mine")
    (folder.history / "index.lock").write_text("")
    saved = folder.commit()
    assert saved is not None and saved.files == 1
    assert folder.held() == {**before, "c": "mine"}
    assert [one.title for one in listed(folder.run("list", "2")[1], 200)] == ["title", "undo"]


@pytest.mark.parametrize("note", ["", "HEAD", ID, "-x", "../../etc/passwd\n", "an earlier turn"])
def test_a_forged_note_of_what_is_under_way_is_nothing(tmp_path: Path, note: str) -> None:
    folder = Folder(tmp_path, ("sh",))
    folder.put(a="1")
    first = folder.commit()
    folder.put(a="2")
    assert first is not None and folder.commit() is not None
    (folder.history / "turn.going").write_text(first.id if "turn" in note else note)
    folder.put(b="1")
    last = folder.commit()
    assert last is not None and last.files == 1 and folder.held() == {"a": "2", "b": "1"}
    assert not (folder.history / "turn.going").exists()


def test_an_undo_that_cannot_write_everything_takes_back_what_it_wrote(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put(a="1")
    folder.commit()
    folder.put(a="2", made="1")
    turn = folder.commit()
    assert turn is not None
    git = tmp_path / "bin/git"
    git.parent.mkdir()
    real = shutil.which("git")
    git.write_text(f'#!/bin/sh\n{real} "$@" || exit\ncase "$*" in "read-tree -m -u turns"*) exit 1 ;; esac')
    git.chmod(0o755)
    with monkeypatch.context() as failing:
        failing.setenv("PATH", f"{git.parent}:{os.environ['PATH']}")
        assert folder.run("restore", "undo", turn.id, "1", "undo") == (65, b"")
    assert folder.held() == {"a": "2", "made": "1"} and folder.commit() is None


def test_what_is_changed_while_an_undo_begins_to_write_stays(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the check or after it; then nothing at all is changed."""
    folder.put(a="1", b="1", c="1")
    folder.commit()
    folder.put(a="2", b="2", c="2")
    turn = folder.commit()
    assert turn is not None
    for step in ("read-tree -n", "read-tree -m -u"):
        git = tmp_path / "bin/git"
        git.parent.mkdir(exist_ok=True)
        git.write_text(
            f'#!/bin/sh\ncase "$*" in "{step}"*) echo {step[-1]} >{folder.work}/b ;; esac\n'
            f'exec {shutil.which("git")} "$@"\n'
        )
        git.chmod(0o755)
        with monkeypatch.context() as changing:
            changing.setenv("PATH", f"{git.parent}:{os.environ['PATH']}")
            assert folder.run("restore", "undo", turn.id, "1", "undo") == (65, b"")
        assert folder.held() == {"a": "2", "b": f"{step[-1]}\n", "c": "2"}
        folder.put(b="2")
    folder.put(b="mine")
    assert undo(folder, turn) == (None, ["b"])


def test_going_back_after_a_kill_changes_what_it_should(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killed one had gone back already, but not recorded it."""
    folder.put(a="1")
    first = folder.commit()
    folder.put(a="2", b="2")
    second = folder.commit()
    assert first is not None and second is not None
    with killed_at("update-ref", tmp_path, monkeypatch):
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
    turns = listed(folder.run("list", "10")[1], 200)
    assert len(turns) == 3
    assert folder.run("restore", "before", turns[-1].id, "1", "back")[0] == 67
    assert folder.run("restore", "after", turns[-1].id, "1", "back")[0] == 0
    assert folder.held() == {"a": "3"}
    assert folder.commit() is None
    assert folder.run("tidy", "3", "1000", "1")[0] == 0
    assert len(listed(folder.run("list", "10")[1], 200)) < 3


def test_a_history_without_words_or_git_says_which(folder: Folder, tmp_path: Path) -> None:
    for script, words in (("restore", ("before", ID, "1", "x")), ("diff", (ID, "10", "10"))):
        assert folder.run(script, *words) == (66, b"")
    assert folder.run("list", "1") == folder.run("tidy", "1", "1", "1") == (0, b"")
    folder.put(a="1")
    folder.commit()
    assert folder.run("restore", "before", ID, "1", "x") == (66, b"")
    assert folder.run("commit", "before", "1000", "1", "x", ID) == (66, b"")


def test_a_workspace_becomes_a_repository_and_stays_what_it_is(folder: Folder) -> None:
    """Its files are the first commit, but for what package managers put there."""
    folder.put(**{"index.html": "1"})
    (folder.work / "node_modules").mkdir()
    (folder.work / "node_modules" / "a").write_text("")

    def git(*words: str) -> str:
        git = ("git", "-c", "safe.directory=*", "-C", str(folder.work))
        return subprocess.run([*git, *words], check=True, capture_output=True, text=True).stdout

    now = time.time()
    times = {"TURN_TIMES": f"0 {now:.6f}", "TURN_LEFT": f"{now:.6f}"}
    code, printed = folder.run("deployed", "all", "1000", "1", "deployed", times=times)
    nobodys, found = both(printed, BLANK)
    assert code == 0 and nobodys is None and found is not None
    assert found.files == 2, "the .gitignore, which is newer than the deployment, is its own"
    assert folder.commit() is None
    said = git("log", "--format=%s by %an", "--name-only")
    assert said == "First deployment by site\n\n.gitignore\nindex.html\n" and not git("status", "--short")
    ignored = (folder.work / ".gitignore").read_text()
    assert "node_modules/" in ignored and (folder.work / ".git" / "HEAD").exists()
    folder.put(**{".gitignore": "mine"})
    shutil.rmtree(folder.work / ".git")
    (folder.work / ".git").symlink_to("nowhere")
    assert folder.run("adopt") == (0, b"")
    assert folder.held()[".gitignore"] == "mine" and (folder.work / ".git").is_symlink()
