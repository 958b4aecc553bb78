"""A turn is recorded, whatever a tenant has made of its repository and of the history."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from gateway.history import repository
from gateway.history.repository import Commit, committed, listed
from tests.unit.test_history import BLANK, Folder

PWNED = '"touch $PWD/pwned"'
WORKSPACES = {
    ".gitignore is a pipe": "mkfifo .gitignore",
    ".gitignore is a link to what never ends": "ln -s /dev/zero .gitignore",
    ".gitignore is a folder": "mkdir .gitignore",
    ".gitignore is large": "head -c 30M /dev/zero | tr '\\0' a >.gitignore",
    ".gitattributes is a pipe": "mkfifo .gitattributes d/.gitattributes",
    ".gitattributes is a link to what never ends": "ln -s /dev/zero .gitattributes",
    ".gitattributes names a filter": "echo '* filter=x text eol=crlf' >.gitattributes",
    ".git is a file that leads elsewhere": "echo 'gitdir: /etc' >.git",
    ".git is a link": "ln -s / .git",
    ".git is a pipe": "mkfifo .git",
    ".git has a locked index": "git init -q; touch .git/index.lock .git/HEAD.lock",
    ".git names programs and other files": f"""git init -q; git config core.fsmonitor {PWNED}
        git config core.worktree /; printf '[include]\\n path=/dev/zero\\n' >>.git/config""",
    ".git has hooks": "git init -q; echo 'touch pwned' >.git/hooks/post-index-change; chmod +x .git/hooks/*",
    "a bare repository lies in it": "git init -q --bare bare",
    "a submodule": """git init -q sub; echo x >sub/x; ln -s sub/.git other
        printf '[submodule "s"]\\n path=sub\\n url=ext::touch pwned\\n' >.gitmodules""",
    "folders are deep": "mkdir -p $(seq -s/ 300); echo x >$(seq -s/ 300)/x",
}
HISTORIES = {
    "its index is locked": "touch $GIT_DIR/index.lock $GIT_DIR/HEAD.lock $GIT_DIR/refs/heads/turns.lock",
    "its index is large": "head -c 100M /dev/zero >$GIT_DIR/index",
    "its index is a pipe": "rm $GIT_DIR/index; mkfifo $GIT_DIR/index",
    "its configuration is a pipe": "rm $GIT_DIR/config; mkfifo $GIT_DIR/config",
    "its configuration never ends": "printf '[include]\\n path=/dev/zero\\n' >>$GIT_DIR/config",
    "its configuration names programs": f"""git config core.fsmonitor {PWNED}
        git config core.worktree /; git config core.hooksPath $GIT_DIR/hooks; mkdir $GIT_DIR/hooks
        echo 'touch pwned' >$GIT_DIR/hooks/reference-transaction; chmod +x $GIT_DIR/hooks/*""",
    "its filter never ends": """git config filter.x.clean 'sleep 1000'; git config filter.x.required true
        echo '* filter=x' >$GIT_DIR/info/attributes""",
    "its objects are elsewhere": "printf '/nowhere\\n/proc\\n' >$GIT_DIR/objects/info/alternates",
    "where its objects are is a pipe": "mkfifo $GIT_DIR/objects/info/alternates",
    "its head is a pipe": "rm $GIT_DIR/HEAD; mkfifo $GIT_DIR/HEAD",
    "what it leaves out is a pipe": "rm $GIT_DIR/info/exclude; mkfifo $GIT_DIR/info/exclude",
    "its lock is a pipe": "rm $GIT_DIR.lock; mkfifo $GIT_DIR.lock",
    "its lock is a folder": "rm $GIT_DIR.lock; mkdir $GIT_DIR.lock",
    "our notes in it are pipes": "cd $GIT_DIR; rm -f turn.*; mkfifo turn.changed turn.left turn.paths",
}
ANEW = {
    "it is a file": "rm -rf $GIT_DIR; echo x >$GIT_DIR",
    "it is a link": "mv $GIT_DIR ../kept; ln -s $PWD/../kept $GIT_DIR",
    "it is a pipe": "rm -rf $GIT_DIR; mkfifo $GIT_DIR",
    "its branch is one of itself": "echo 'ref: refs/heads/turns' >$GIT_DIR/refs/heads/turns",
    "its objects are a link": "rm -rf $GIT_DIR/objects; ln -s /proc $GIT_DIR/objects",
}


class Hostile(Folder):
    """A workspace with one recorded turn, to which something is done."""

    def __init__(self, place: Path) -> None:
        super().__init__(place, ("sh",))
        (self.work / "d").mkdir()
        self.put(a="1")
        first = self.commit()
        assert first is not None
        self.first = first

    def does(self, script: str) -> None:
        env = {**os.environ, "GIT_DIR": str(self.history)}
        # a word of git's own needs the workspace's repository, one of the history's the history
        if "git init" in script:
            del env["GIT_DIR"]
        subprocess.run(["bash", "-c", script], cwd=self.work, env=env, check=True)
        self.put(a="2")

    def attempt(self, seconds: float) -> Commit | None:
        """Record what changed, within a time as the gateway bounds it; None where that ran out or failed."""
        env = {
            **repository._ENVIRONMENT,
            **repository._identity(BLANK),
            "PATH": os.environ["PATH"],
            "GIT_DIR": str(self.history),
            "GIT_WORK_TREE": str(self.work),
        }
        words = ["sh", "-c", repository._SCRIPTS["commit"], "sh", "all", "8388608", "1", "title"]
        with subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env, start_new_session=True
        ) as process:
            try:
                printed, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                return None
        return committed(printed, BLANK)

    def unrecorded(self) -> set[str]:
        return {turn.id for turn in listed(self.run("list", "10")[1], 200)}


@pytest.mark.parametrize("script", WORKSPACES.values(), ids=WORKSPACES)
def test_whatever_a_workspace_is_its_turn_is_recorded(tmp_path: Path, script: str) -> None:
    """At once, and nothing that it names is run."""
    folder = Hostile(tmp_path)
    folder.does(script)
    turn = folder.attempt(30)
    assert turn is not None and folder.unrecorded() == {folder.first.id, turn.id}
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("script", HISTORIES.values(), ids=HISTORIES)
def test_whatever_a_history_is_made_the_next_attempt_has_the_turn(tmp_path: Path, script: str) -> None:
    """Where the first took too long and was ended; and the turns before are still there."""
    folder = Hostile(tmp_path)
    folder.does(script)
    turn = folder.attempt(1)
    if turn is None and not (folder.history / "turn.begun").exists():
        turn = folder.attempt(1)  # on a busy machine the first one had not even begun
    # one that was ended may have recorded it just before, so that nothing is left for the next
    turn = turn or folder.attempt(30)
    known = folder.unrecorded()
    assert len(known) == 2 and known >= {folder.first.id, *(() if turn is None else (turn.id,))}
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("script", ANEW.values(), ids=ANEW)
def test_a_history_that_is_none_begins_anew(tmp_path: Path, script: str) -> None:
    folder = Hostile(tmp_path)
    folder.does(script)
    turn = folder.attempt(30)
    assert turn is not None and folder.unrecorded() == {turn.id}


def test_a_killed_one_stands_in_nobodys_way(tmp_path: Path) -> None:
    """Wherever it is killed, the next one records the turn."""
    folder = Hostile(tmp_path)
    for number in range(8):
        folder.put(a=str(number), **{f"f{one}": str(number) for one in range(40)})
        folder.attempt(0.002 + number * 0.004)
        folder.attempt(30)
        git = {**os.environ, "GIT_DIR": str(folder.history)}
        shown = subprocess.run(["git", "show", "turns:a"], env=git, stdout=subprocess.PIPE, check=True)
        assert shown.stdout == str(number).encode(), "whichever of both recorded it"
        assert folder.attempt(30) is None, "all is on record"
