"""The repositories of tenants' histories: git is run in the tenant, and what it prints is parsed.

Git runs as the site's user, on a repository separate from the site's own. The tenant controls that repository
and all that git reads: it may break it, make git hang and forge what git prints. So the host's git never
touches it, every run has a deadline, and its output is read up to a limit and parsed as untrusted text.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from gateway.bounds import Flood, first, run_in_thread
from gateway.errors import Conflict, NotFound, Timeout, TooLarge, Unavailable
from gateway.execs import Execs
from gateway.rootfs import FilesystemRoot
from gateway.rootfs.messages import RESULT_MAX
from gateway.rootfs.paths import show
from gateway.runtime import ExecSpec, Process, TenantRuntime
from gateway.settings import KiB, Settings

Mode = Literal["all", "only", "but"]
Times = Sequence[tuple[float, float]]
"""Spans of time, each from and until seconds since the epoch, in order."""

TITLE_MAX: Final = 4000  # characters
_NAME_MAX: Final = 200
CONFLICTS_MAX: Final = 1000  # paths of one undo that are listed; one that has more cannot be forced
_LEFT_MAX: Final = 20  # paths listed of those that were left out
_FILES_MAX: Final = 10_000  # files listed of one turn

KINDS: Final = frozenset({"turn", "outside", "restored", "deployed", "first"})
ID: Final = re.compile(r"[0-9a-f]{40}")
_COUNTS: Final = re.compile(
    rb"(\d{1,9}) files? changed(?:, (\d{1,9}) insertions?\(\+\))?(?:, (\d{1,9}) deletions?\(-\))?"
)


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit of the history. `added` and `removed` count lines, `at` is in seconds since the epoch.

    `kind` is `turn`; `restored` for going back; `outside` for changes found before that; `deployed` for a
    deployed site; or `first` for the workspace before the first turn. `left_out` are paths that are too
    large, or not regular files.
    """

    id: str
    kind: str
    agent: str
    by: str
    title: str
    at: int
    files: int = 0
    added: int = 0
    removed: int = 0
    left_out: tuple[str, ...] = ()

    def on_wire(self) -> dict[str, Any]:
        return {
            "turn": self.id,
            "kind": self.kind,
            "agent": self.agent,
            "by": self.by,
            "title": self.title,
            "at": self.at,
            "files": self.files,
            "added": self.added,
            "removed": self.removed,
            "leftOut": list(self.left_out),
        }


def clean_text(text: str, most: int) -> str:
    """Return text for a commit message: without control characters, and as git stores it unchanged."""
    lines = (
        line if line.isprintable() else "".join(char if char.isprintable() else " " for char in line)
        for line in text[:most].split("\n")
    )
    return "\n".join(line.rstrip() for line in lines).strip()


def name(text: str) -> str:
    """Return a name for a commit: without the characters that git strips, and never empty."""
    kept = " ".join("".join(" " if char in "<>" else char for char in clean_text(text, _NAME_MAX)).split())
    return kept.strip(".,:;\"'\\ ") or "unknown"


def deployed(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a deployment's last event says of it, as a title, and by whom it was."""
    if facts.get("rollback"):
        what = f"Went back to the site of {facts['rollback']}"
    elif facts.get("env"):
        what = f"Changed {', '.join(facts['env'])} of the environment"
    elif facts.get("template") == "upload":
        what = "Deployed an uploaded folder"
    else:
        what = f"Deployed the template {facts.get('template')}"
    return f"{what} ({facts['deployment']})", str(facts.get("by", ""))


def unattributed(at: int) -> Commit:
    """Return a commit for changes without a known author."""
    return Commit("", "outside", "nobody", "nobody", "Changed outside of turns", at)


def both(printed: bytes, turn: Commit) -> tuple[Commit | None, Commit | None]:
    """Return the two commits of commit.sh, the unattributed one and `turn`; None for one without changes."""
    word, _, rest = printed.partition(b" ")
    if word != b"outside":
        return None, committed(printed, turn)
    commit, _, rest = rest.partition(b"\n")
    counts, _, rest = rest.partition(b"\n")
    return committed(commit + b"\n" + counts + b"\n", unattributed(turn.at)), committed(rest, turn)


def committed(printed: bytes, turn: Commit) -> Commit | None:
    """Return `turn` with the output of commit.sh or restore.sh; None if nothing changed."""
    first, _, rest = printed.partition(b"\n")
    found = first.decode("ascii", "replace")
    if not ID.fullmatch(found):
        return None
    counts, _, left = rest.partition(b"\n")
    names = [display(path) for path in left.split(b"\0")[:-1][:_LEFT_MAX]]
    return replace(_counted(turn, counts), id=found, left_out=tuple(names))


def conflicting(printed: bytes) -> list[bytes]:
    """Return the paths that restore.sh printed as conflicts of an undo."""
    word, _, names = printed.partition(b"\n")
    return names.split(b"\0", CONFLICTS_MAX)[:-1][:CONFLICTS_MAX] if word == b"conflicts" else []


def display(path: bytes) -> str:
    """Return a path for a list, with escapes for unprintable characters."""
    return show(os.fsdecode(path))


def listed(printed: bytes, most: int) -> list[Commit]:
    """Parse the output of list.sh, at most `most` records."""
    found = []
    for record in printed.split(b"\x1e", most + 1)[1 : most + 1]:
        fields = record.split(b"\0", 7)
        if len(fields) != 7:
            continue
        commit, kind, agent, by, at, message = (
            field[: 4 * TITLE_MAX].decode("utf-8", "replace") for field in fields[:6]
        )
        if not ID.fullmatch(commit) or not at.isdecimal() or len(at) > 12:
            continue
        turn = Commit(
            commit,
            kind if kind in KINDS else "turn",
            clean_text(agent, _NAME_MAX),
            clean_text(by, _NAME_MAX),
            clean_text(message, TITLE_MAX),
            int(at),
        )
        found.append(_counted(turn, fields[6]))
    return found


def changes(printed: bytes, most: int) -> dict[str, Any] | None:
    """Parse the output of diff.sh: a turn with its files and at most `most` bytes of its patch."""
    names, _, rest = printed.partition(b"\0\0")
    head, _, patch = rest.partition(b"\x1d")
    turns = listed(head, 1)
    if not turns:
        return None
    files = []
    for entry in names.split(b"\0", _FILES_MAX)[:_FILES_MAX]:
        added, _, more = entry.partition(b"\t")
        removed, tab, path = more.partition(b"\t")
        if not tab:
            continue  # cut off
        binary = not (added.isdigit() and removed.isdigit() and len(added) < 10 and len(removed) < 10)
        files.append(
            {
                "path": display(path),
                "added": 0 if binary else int(added),
                "removed": 0 if binary else int(removed),
                "binary": binary,
            }
        )
    return {
        **turns[0].on_wire(),
        "changed": files,
        "diff": patch[:most].decode("utf-8", "replace"),
        "truncated": len(patch) > most,
    }


def _counted(turn: Commit, counts: bytes) -> Commit:
    if (found := _COUNTS.search(counts)) is None:
        return turn
    files, added, removed = (int(number or 0) for number in found.groups())
    return replace(turn, files=files, added=added, removed=removed)


log = logging.getLogger(__name__)

_PLACE: Final = "/home/{user}/.local/state/incus-gateway/history.git"
_NAMES_OF_SCRIPTS: Final = ("adopt", "commit", "diff", "list", "restore", "tidy", "writing")
_SCRIPTS: Final = {name: Path(__file__).with_name(f"{name}.sh").read_text() for name in _NAMES_OF_SCRIPTS}
for _name in ("commit", "restore", "tidy"):
    _SCRIPTS[_name] = f"{_SCRIPTS['writing']}\n{_SCRIPTS[_name]}"
# one script per command: starting one costs more than all that git does in it. The .gitignore that it makes
# is the deployment's too, though it is newer
_SCRIPTS["deployed"] = (
    f'made=$(\n{_SCRIPTS["adopt"]}\n) || exit\n[ -z "$made" ] || TURN_TIMES="0 $made"\n{_SCRIPTS["commit"]}'
)
_CONFIG: Final = {
    # run no program that the tenant's repository names
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    # read nothing of the user's
    "core.attributesFile": "/dev/null",
    "core.excludesFile": "/dev/null",
    # no fsync: after a crash of the host a broken history begins again
    "core.fsync": "none",
    "core.looseCompression": "1",
    "core.quotePath": "false",
    # allow names that are invalid on other systems only
    "core.protectNTFS": "false",
    "core.protectHFS": "false",
    "gc.auto": "0",
    "safe.directory": "*",
    "log.showSignature": "false",
}
_ENVIRONMENT: Final = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_ATTR_NOSYSTEM": "1",
    # the empty tree: no .gitattributes of the workspace is read, which might be a pipe
    "GIT_ATTR_SOURCE": "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_PAGER": "cat",
    "LC_ALL": "C.UTF-8",
    "GIT_CONFIG_COUNT": str(len(_CONFIG)),
    **{f"GIT_CONFIG_KEY_{number}": key for number, key in enumerate(_CONFIG)},
    **{f"GIT_CONFIG_VALUE_{number}": value for number, value in enumerate(_CONFIG.values())},
}
_SAID: Final = 8 * KiB  # bytes kept of git's errors, and of a commit's output
_PRINTED: Final = 64 << 20  # bytes that git may print before it is ended
_RECORD: Final = 16 * KiB  # bytes of one turn in a list, at most
_NAMES: Final = 256 * KiB  # bytes of the names of a diff
_PARSING: Final = 30.0  # seconds to parse what git printed; the most takes a moment
TURN_TIMEOUT: Final = 60.0  # seconds that git may take for one request
TURN_FILE_MAX: Final = 8 << 20  # bytes from which a file is not recorded
_NICE: Final = ("nice", "-n", "10", "/bin/sh", "-c")


class Repository:
    """The repositories of all tenants, each in its container."""

    def __init__(self, runtime: TenantRuntime, execs: Execs, settings: Settings) -> None:
        self._runtime, self._execs = runtime, execs
        self._settings = settings

    async def begin(self, tenant: str, made: Sequence[str], turn: Commit) -> Commit | None:
        """Record the workspace as it is, without the files in `made`, if there is no history yet."""
        return committed(await self._commit(tenant, "begin", made, turn), turn)

    async def commit(
        self,
        tenant: str,
        mode: Mode,
        paths: Sequence[str],
        turn: Commit,
        times: Times = (),
        others: Times = (),
    ) -> tuple[Commit | None, Commit | None]:
        """Commit the changes, and before them those outside of `times` and of `others`, without an author."""
        return both(await self._commit(tenant, mode, paths, turn, times=times, others=others), turn)

    async def restore(
        self, tenant: str, to: str, side: str, outside: Commit, turn: Commit
    ) -> tuple[Commit | None, Commit | None]:
        """Restore the files to `before` a turn or `after` it, as `turn`; None if nothing changes.

        Unrecorded changes in them are committed first, as `outside`, and returned too.
        """
        found = committed(await self._commit(tenant, side, (), outside, to), outside)
        printed = await self._run(
            tenant, "restore", (side, to, self._wait, turn.title), _identity(turn), _SAID, missing=to
        )
        return found, committed(printed, turn)

    async def undo(
        self, tenant: str, undone: str, force: Collection[str], outside: Commit, turn: Commit
    ) -> tuple[Commit | None, Commit | None, list[str]]:
        """Take back what one turn changed, as `turn`: a three-way merge of each file, all files or none.

        Returns what was unrecorded in these files and was committed first, as `outside`; the new turn, None
        if nothing changes; and the paths in conflict. Those in `force` become what they were before the turn.
        """
        found = committed(await self._commit(tenant, "undo", (), outside, undone), outside)

        async def merge(forced: Sequence[bytes]) -> bytes:
            words, given = ("undo", undone, self._wait, turn.title), b"".join(path + b"\0" for path in forced)
            return await self._run(
                tenant, "restore", words, _identity(turn), _NAMES, given=given, missing=undone
            )

        printed = await merge(())
        conflicts = conflicting(printed)
        if forced := [path for path in conflicts if display(path) in force]:
            printed = await merge(forced)
            conflicts = conflicting(printed)
        return found, committed(printed, turn), [display(path) for path in conflicts]

    async def deployed(self, tenant: str, mode: Mode, paths: Sequence[str], turn: Commit) -> Commit | None:
        """Make the workspace a git repository, if it is not one, and `commit`."""
        times = ((0.0, time.time()),)  # what is saved while git looks is not the deployment's
        printed = await self._commit(tenant, mode, paths, turn, script="deployed", times=times)
        return both(printed, turn)[1]

    async def tidy(self, tenant: str) -> None:
        """Compact the history."""
        settings = self._settings
        words = (str(settings.turns_kept), str(settings.history_bytes), self._wait)
        await self._run(tenant, "tidy", words, {}, _SAID)

    async def turns(self, tenant: str, most: int, before: str | None) -> list[Commit]:
        """Return the turns before a given one, latest first."""
        words = [str(most), *([before] if before else [])]
        printed = await self._run(tenant, "list", words, {}, most * _RECORD)
        return await run_in_thread(tenant, _PARSING, listed, printed, most)

    async def changes(self, tenant: str, turn: str) -> dict[str, object]:
        """Return a turn with its changes. Raises `NotFound`."""
        most = RESULT_MAX
        printed = await self._run(
            tenant,
            "diff",
            (turn, str(_NAMES), str(most + 1)),
            {},
            _NAMES + _RECORD + most + 1,
            missing=turn,
        )
        found = await run_in_thread(tenant, _PARSING, changes, printed, most)
        if found is None:
            raise NotFound(f"no turn {turn}")
        return found

    @property
    def _wait(self) -> str:
        return str(max(1, int(TURN_TIMEOUT / 2)))

    async def _commit(
        self,
        tenant: str,
        mode: str,
        given: Sequence[str],
        turn: Commit,
        of: str | None = None,
        *,
        script: str = "commit",
        times: Times = (),
        others: Times = (),
    ) -> bytes:
        words = [mode, str(TURN_FILE_MAX), self._wait, turn.title, *([of] if of else [])]
        input_ = b"".join(path.encode("utf-8", "surrogateescape") + b"\0" for path in given)
        env = _identity(turn)
        if times:
            env["TURN_TIMES"] = " ".join(f"{since:.6f} {until:.6f}" for since, until in times)
            spans = [f"{since:.6f} {until:.6f}" for since, until in others]
            env["TURN_LEFT"] = " ".join([f"{time.time():.6f}", *spans])
        return await self._run(tenant, script, words, env, _SAID, given=input_, missing=of)

    async def _run(
        self,
        tenant: str,
        script: str,
        words: Sequence[str],
        env: Mapping[str, str],
        most: int,
        *,
        given: bytes = b"",
        missing: str | None = None,
    ) -> bytes:
        """Run a script within a deadline, and return the first `most` bytes of its output.

        Scripts that record are run one at a time in each tenant, and in any case. Those that clients ask for
        raise `RateLimited` if the tenant runs too many commands.
        """
        root = await self._runtime.filesystem(tenant)
        spec = ExecSpec(
            (*_NICE, _SCRIPTS[script], "sh", *words),
            env={**_ENVIRONMENT, **self._git_paths(root), **env},
            stdin=True,
            shown=("git", script),
        )
        seconds = TURN_TIMEOUT
        always = script not in ("list", "diff")
        try:
            async with self._execs.script(tenant, spec, always=always) as process, asyncio.timeout(seconds):
                printed, complaint = await _talk(process, given, most)
                code = (await process.wait()).code
        except TimeoutError:
            raise Timeout(
                f"git took over {seconds:g} s in the workspace of {tenant} and was stopped: there is too "
                "much to look at, or a .gitignore of a folder there is a pipe or has too many patterns"
            ) from None
        except Flood:
            raise Unavailable("git printed more than the limit") from None
        if code != 0:
            self._refuse(tenant, code, complaint, missing)
        return printed

    def _git_paths(self, root: FilesystemRoot) -> dict[str, str]:
        place = _PLACE.format(user=self._settings.workspace_user)
        return {"GIT_DIR": root.prefix + place, "GIT_WORK_TREE": root.prefix + root.workspace}

    def _refuse(self, tenant: str, code: int, complaint: str, turn: str | None) -> None:
        last = complaint.strip().rpartition("\n")[2][:300]
        match code:
            case 65:
                raise Conflict(
                    "something that the history does not record is in the way, or was changed just now; "
                    f"move it and try again: {_in_the_way(complaint)}",
                    reason="in_the_way",
                )
            case 66:
                raise NotFound(f"no turn {turn}; history/list lists all")
            case 67:
                raise Conflict("nothing is recorded before this turn: it is the workspace as it was found")
            case 68:
                raise TooLarge(
                    f"more changed in {tenant} than one turn can hold; list generated files in .gitignore"
                )
            case 69:
                raise Unavailable(f"there is no git in {tenant}: history needs it", reason="no_git")
            case 75:
                raise Unavailable("another process is writing the history; try again")
        raise Unavailable(f"git failed in {tenant}: {last}" if last else f"git failed in {tenant}: {code}")


async def _talk(process: Process, given: bytes, most: int) -> tuple[bytes, str]:
    async def feed() -> None:
        if given:
            await process.write(given)
        await process.close_stdin()

    printed, complaint, _ = await asyncio.gather(
        first(lambda: process.read("stdout"), most, most=_PRINTED),
        first(lambda: process.read("stderr"), _SAID, most=_PRINTED),
        feed(),
    )
    return printed, complaint.decode("utf-8", "replace")


def _identity(turn: Commit) -> dict[str, str]:
    """Return git's variables for author and committer; the committer's name is the commit's kind."""
    return {
        "GIT_AUTHOR_NAME": turn.agent,
        "GIT_AUTHOR_EMAIL": turn.by,
        "GIT_AUTHOR_DATE": f"@{turn.at} +0000",
        "GIT_COMMITTER_NAME": turn.kind,
        "GIT_COMMITTER_EMAIL": "history",
        "GIT_COMMITTER_DATE": f"@{turn.at} +0000",
    }


def _in_the_way(complaint: str) -> str:
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    return (lines[0] if lines else "")[:300]
