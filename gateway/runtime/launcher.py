"""Start a command inside a tenant so that its whole tree can be found and ended.

A small POSIX `sh` (`start.sh`), as root in the container, makes a cgroup for the exec, joins it and becomes
a second one (`wait.sh`), of the command's user. That says that it is ready, and takes one line from its
standard input: folder, environment and command. So neither command line nor secrets show in the host's
process list or in Incus's operations and events before the command itself runs, and a shell can wait ready
before its command is known. With the line it enters the folder, looks whether the program exists and says
so, and becomes it: nothing else is started between the line and the command. Two kinds cost a program more,
`head` to read a line of over 3 KiB, and `env` for variables that mean something to a shell.

What the shells say goes to standard error (with a terminal, to the terminal) before the command's first
byte: lines that begin with SOH. `Preamble` takes them out of the stream.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from gateway.errors import ExecFailed, InvalidParams, TooLarge, Unavailable
from gateway.runtime import Killed

START_SCRIPT: Final = Path(__file__).with_name("start.sh").read_text()
WAIT_SCRIPT: Final = Path(__file__).with_name("wait.sh").read_text()
KILL_SCRIPT: Final = Path(__file__).with_name("kill.sh").read_text()
DRAIN_SCRIPT: Final = Path(__file__).with_name("drain.sh").read_text()

_LINE: Final = 3072  # bytes of a line up to which `read`, a call for each, takes less time than a process
# What means something to a shell itself, so that it changes the value or takes none: see `command_line`.
_MEANT: Final = re.compile(
    "_|BASH.*|COMP_.*|DIRSTACK|E?UID|ENV|EPOCH.*|EXECIGNORE|FUNCNAME|FUNCNEST|GLOBIGNORE|GROUPS|HIST.*|IFS"
    "|IGNOREEOF|LINENO|MAIL.*|OLDPWD|OPT(ARG|ERR|IND)|PIPESTATUS|POSIXLY_CORRECT|PPID|PS[0-4]|PWD|S?RANDOM"
    "|SECONDS|SHELLOPTS|SHLVL|TMOUT"
)

Method = Literal["cgroup", "scan"]

PID_MAX: Final = 1 << 22  # the kernel's own limit, PID_MAX_LIMIT
_READY: Final = re.compile(rb"\x01R (\d{1,20}) (cgroup|scan) (|/dev/[a-z0-9/]{1,60}|not a tty)")
# processes that were found, whether KILL was needed, survivors, how they were found
_KILLED: Final = re.compile(rb"\s*(\d{1,7}) ([01]) (\d{1,7}) (cgroup|scan)\s*")
KILLED_MAX: Final = 256  # bytes of that


def killed(said: bytes) -> Killed:
    """Return what `KILL_SCRIPT` did, by its answer. Raises `Unavailable` for one that is not its own."""
    match = _KILLED.fullmatch(said)
    if match is None:
        raise Unavailable(
            "the tenant's shell does not say what it ended; restart the tenant to end all of its processes"
        )
    survivors = int(match[3])
    method: Method = "cgroup" if match[4] == b"cgroup" else "scan"
    return Killed(max(0, int(match[1]) - survivors), match[2] == b"1", survivors, method)


@dataclass(frozen=True, slots=True)
class Account:
    """The user that runs the command, as far as known without asking the container; ids None: look up."""

    name: str
    uid: int | None = None
    gid: int | None = None
    home: str | None = None


def quote(text: str) -> str:
    """Quote for the line that the shell reads: no newline may remain in it; `$1` of wait.sh holds one.

    Raises `InvalidParams` for NUL, which no argument can carry.
    """
    if "\0" in text:
        raise InvalidParams("arguments, environment and folders cannot contain NUL")
    return "'" + text.replace("'", "'\\''").replace("\n", "'\"$1\"'") + "'"


def start_command(exec_id: str, account: Account | None, *, looks: int, terminal: bool) -> list[str]:
    """Return the command that makes a shell of `account` wait for its line; None keeps the user.

    `looks` is how often, 50 ms apart, it looks for a cgroup tree that is not mounted yet.
    """
    words: tuple[object, ...] = ()
    if account is not None and account.uid is None:
        words = (account.name,)
    elif account is not None:
        words = (account.name, account.uid, account.gid, account.home or "/")
    asked = (exec_id, looks, "terminal" if terminal else "", WAIT_SCRIPT, *words)
    return ["/bin/sh", "-c", START_SCRIPT, "sh", *map(str, asked)]


def command_line(
    argv: tuple[str, ...],
    *,
    cwd: str,
    env: Mapping[str, str],
    merged: bool = False,
    terminal: bool = False,
) -> bytes:
    """Return what makes the waiting shell run `argv`: one line, and the rest that a long one says to read.

    On a terminal it is one line always: bash reads ahead there.

    The shell exports the environment last. Variables that mean something to a shell are passed under other
    names, and `env` restores them: as arguments of `env` they would show in the tenant's process list. Raises
    `InvalidParams` for names and texts that no environment can carry.
    """
    for name in env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InvalidParams(f"{name[:100]!r} cannot be the name of an environment variable")
    free = (name for number in itertools.count() if (name := f"_{number}") not in env)
    held = {name: next(free) for name in env if _MEANT.fullmatch(name)}
    words = [quote(word) for word in argv]
    if argv[0].startswith("-") or (held and "=" in argv[0]):
        # an option to `exec` of some shells, a variable to `env`; and dash knows no `exec --`
        words = ["/usr/bin/nice", "-n0", "--", *words]
    if held:
        names = [f"-u{place}" for place in held.values()]
        names += [f"{name}=${{{place}}}" for name, place in held.items()]
        words = ["/usr/bin/env", "-S", quote(" ".join(names)), *words]
    path = quote(env["PATH"]) if "PATH" in env else '"$PATH"'
    steps = [f"enter {quote(cwd)} {quote(argv[0])} {path}"]
    if env:
        exported = (f"{held.get(name, name)}={quote(value)}" for name, value in env.items())
        steps.append(f"export {' '.join(exported)}")
    steps.append("printf '\\001K\\n' >&2")
    steps.append(f"exec {' '.join(words)}{' 3>&2 2>&1' if merged else ''}")
    line = "; ".join(steps).encode("utf-8", "surrogateescape")
    if terminal or len(line) <= _LINE:
        return line + b"\n"
    # in braces, so that nothing of it runs where its end does not come
    line = b"{ %b\n}" % line
    return b'eval "$(head -c %d)"\n%b' % (len(line), line)


class Preamble:
    """Takes the shells' own lines off the front of a command's output.

    Feed it the output; once `started` is true, `rest` is the command's own first output. Raises `ExecFailed`
    when a shell says that the command cannot start, or prints more than `LIMIT` bytes without starting it:
    the shell is the tenant's, and may print anything forever.
    """

    LIMIT: Final = 64 * 1024  # the shells say a few hundred bytes; more is not ours
    _NOISE: Final = 500  # bytes of what others said that an error repeats

    def __init__(self) -> None:
        self.pid = 0
        self.method: Method = "scan"
        self.terminal = ""
        self.ready = False
        self.started = False
        self.rest = b""
        self._left = self.LIMIT
        self._buffer = b""
        self._names = {"cwd": "", "user": "", "argv0": ""}
        self._noise = b""

    def went(self, pid: int, method: Method, terminal: str) -> None:
        """Take over what an earlier process saw: the command runs."""
        self.pid, self.method, self.terminal = pid, method, terminal
        self.ready = self.started = True

    def asked(self, argv0: str, cwd: str, user: str) -> None:
        """Note what was asked for, for the words of an error."""
        self._names = {"cwd": cwd, "user": user, "argv0": argv0}

    def feed(self, data: bytes) -> None:
        text, start = self._buffer + data, 0
        while not self.started:
            end = text.find(b"\n", start, start + self._left)
            if end < 0:
                break
            line, self._left = text[start:end], self._left - (end + 1 - start)
            start = end + 1
            self._line(line.rstrip(b"\r"))
        if self.started:
            self.rest, self._buffer = text[start:], b""
        elif len(text) - start > self._left or not self._left:
            raise ExecFailed("the tenant's shell does not behave: the command was not started")
        else:
            self._buffer = text[start:]

    def ended(self) -> ExecFailed:
        """Return the error for an output that ended before the command had started."""
        self._hear(self._buffer)
        said = " ".join(self._noise.decode("utf-8", "replace").split("\n")).strip()
        return ExecFailed(f"the command was not started{': ' + said if said else ''}")

    def _hear(self, line: bytes) -> None:
        if line.strip() and len(self._noise) < self._NOISE:
            self._noise = (self._noise + b"\n" + line.strip())[: self._NOISE]

    def _line(self, line: bytes) -> None:
        if ready := _READY.fullmatch(line):
            self.pid, self.ready, self.terminal = int(ready[1]), True, ready[3].decode()
            self.method = "cgroup" if ready[2] == b"cgroup" else "scan"
            if not 0 < self.pid <= PID_MAX:
                raise ExecFailed("the tenant's shell does not behave: it names no process that can be")
            return
        match line[1:].decode("ascii", "replace").split(" ") if line.startswith(b"\x01") else ():
            case ["K"] if self.ready:
                self.started = True
            case ["E", "cwd"]:
                raise ExecFailed(f"no such folder: {self._names['cwd']}", reason="cwd")
            case ["E", "user"]:
                raise ExecFailed(f"no such user: {self._names['user']}", reason="user")
            case ["E", "127"]:
                raise ExecFailed(
                    f"command not found: {self._names['argv0']}", reason="not_found", exitCode=127
                )
            case ["E", "126"]:
                raise ExecFailed(
                    f"not executable: {self._names['argv0']}", reason="not_executable", exitCode=126
                )
            case _:
                self._hear(line)


def check_size(argv: tuple[str, ...], env: Mapping[str, str], *, one: int, total: int) -> None:
    """Raise `TooLarge` if an argument or environment string has over `one` bytes, or all have over `total`.

    The kernel takes 128 KiB per string (MAX_ARG_STRLEN); past that a command fails in odd ways.
    """
    sizes = [len(part.encode("utf-8", "surrogateescape")) for part in argv]
    sizes += [len(f"{name}={value}".encode("utf-8", "surrogateescape")) for name, value in env.items()]
    if max(sizes, default=0) > one:
        raise TooLarge(
            f"one argument or environment string has over {one} bytes; pass it by stdin", limit=one
        )
    if sum(sizes) > total:
        raise TooLarge(f"arguments and variables have over {total} bytes; pass them by stdin", limit=total)
