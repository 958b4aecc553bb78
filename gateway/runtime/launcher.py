"""Start a command inside a tenant so that its whole process tree can be found and killed.

A small POSIX shell script (`start.sh`), run as root in the container, creates a cgroup for the exec, joins it
and becomes a second script (`wait.sh`) under the command's user. That reports that it is ready and reads one
line from stdin: folder, environment and command. So neither the command line nor secrets appear in the host's
process list or in Incus's operations and events before the command itself runs, and a shell can be kept ready
before its command is known. Given the line, the script enters the folder, checks that the program exists,
reports the result, and becomes the program without starting anything else in between. There are two
exceptions with one more program: `head` reads a line of over 3 KiB, and `env` sets variables special to a
shell.

The scripts' messages are lines beginning with SOH on stderr (with a terminal, on the terminal) before the
command's first byte. `Preamble` takes them out of the stream.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from gateway.errors import ExecFailed, InvalidParams, TooLarge, Unavailable
from gateway.runtime import ARGUMENT_MAX, ARGUMENTS_MAX, KillResult, Pty

START_SCRIPT: Final = Path(__file__).with_name("start.sh").read_text()
WAIT_SCRIPT: Final = Path(__file__).with_name("wait.sh").read_text()
KILL_SCRIPT: Final = Path(__file__).with_name("kill.sh").read_text()
DRAIN_SCRIPT: Final = Path(__file__).with_name("drain.sh").read_text()

_LINE: Final = 3072  # bytes of a line up to which `read`, a system call per byte, is faster than a process
# Variables special to a shell, which it would alter or refuse: see `command_line`.
_MEANT: Final = re.compile(
    "_|BASH.*|COMP_.*|DIRSTACK|E?UID|ENV|EPOCH.*|EXECIGNORE|FUNCNAME|FUNCNEST|GLOBIGNORE|GROUPS|HIST.*|IFS"
    "|IGNOREEOF|LINENO|MAIL.*|OLDPWD|OPT(ARG|ERR|IND)|PIPESTATUS|POSIXLY_CORRECT|PPID|PS[0-4]|PWD|S?RANDOM"
    "|SECONDS|SHELLOPTS|SHLVL|TMOUT"
)

Method = Literal["cgroup", "scan"]

PID_MAX: Final = 1 << 22  # the kernel's limit, PID_MAX_LIMIT
_READY: Final = re.compile(rb"\x01R (\d{1,20}) (cgroup|scan) (|/dev/[a-z0-9/]{1,60}|not a tty)")
# processes found, whether KILL was needed, survivors, how they were found
_KILLED: Final = re.compile(rb"\s*(\d{1,7}) ([01]) (\d{1,7}) (cgroup|scan)\s*")
KILLED_MAX: Final = 256  # bytes of that


def killed(said: bytes) -> KillResult:
    """Parse the output of `KILL_SCRIPT`. Raises `Unavailable` if it is not valid."""
    match = _KILLED.fullmatch(said)
    if match is None:
        raise Unavailable(
            "the tenant's shell did not report what it ended; restart the tenant to end all its processes"
        )
    survivors = int(match[3])
    method: Method = "cgroup" if match[4] == b"cgroup" else "scan"
    return KillResult(max(0, int(match[1]) - survivors), match[2] == b"1", survivors, method)


@dataclass(frozen=True, slots=True)
class Account:
    """The user to run a command as. If the ids are None, they are looked up in the container."""

    name: str
    uid: int | None = None
    gid: int | None = None
    home: str | None = None


def quote(text: str) -> str:
    """Quote for the shell's command line. Newlines are replaced by `$1`, which is one in wait.sh.

    Raises `InvalidParams` for NUL, which no argument can contain.
    """
    if "\0" in text:
        raise InvalidParams("arguments, environment and folders cannot contain NUL")
    return "'" + text.replace("'", "'\\''").replace("\n", "'\"$1\"'") + "'"


def start_command(exec_id: str, account: Account | None, *, looks: int, terminal: bool) -> list[str]:
    """Return the command that starts a waiting shell as `account`; None keeps the user.

    `looks` is the number of attempts, 50 ms apart, to find a cgroup tree that may not be mounted yet.
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
    pty: Pty | None = None,
) -> bytes:
    """Return the input that makes a waiting shell run `argv`: one line, which if long reads the rest itself.

    On a terminal it is always one line, because bash reads ahead there; the shell gives it the size `pty`.

    The shell exports the environment last. Variables special to a shell are passed under other names, and
    `env` restores them; as arguments of `env` they would appear in the tenant's process list. Raises
    `InvalidParams` for names and values that an environment cannot contain.
    """
    for name in env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InvalidParams(f"{name[:100]!r} cannot be the name of an environment variable")
    free = (name for number in itertools.count() if (name := f"_{number}") not in env)
    held = {name: next(free) for name in env if _MEANT.fullmatch(name)}
    words = [quote(word) for word in argv]
    if argv[0].startswith("-") or (held and "=" in argv[0]):
        # it would be an option to some shells' `exec`, or a variable to `env`; and dash has no `exec --`
        words = ["/usr/bin/nice", "-n0", "--", *words]
    if held:
        names = [f"-u{place}" for place in held.values()]
        names += [f"{name}=${{{place}}}" for name, place in held.items()]
        words = ["/usr/bin/env", "-S", quote(" ".join(names)), *words]
    path = quote(env["PATH"]) if "PATH" in env else '"$PATH"'
    size = "" if pty is None else f" {pty.rows} {pty.cols}"
    steps = [f"enter {quote(cwd)} {quote(argv[0])} {path}{size}"]
    if env:
        exported = (f"{held.get(name, name)}={quote(value)}" for name, value in env.items())
        steps.append(f"export {' '.join(exported)}")
    steps.append("printf '\\001K\\n' >&2")
    steps.append(f"exec {' '.join(words)}{' 3>&2 2>&1' if merged else ''}")
    line = "; ".join(steps).encode("utf-8", "surrogateescape")
    if pty is not None or len(line) <= _LINE:
        return line + b"\n"
    # in braces, so that nothing runs if the end is missing
    line = b"{ %b\n}" % line
    return b'eval "$(head -c %d)"\n%b' % (len(line), line)


class Preamble:
    """Parser of the scripts' messages, which precede the command's own output.

    Feed it the output; once `started` is true, `rest` is the beginning of the command's own output. Raises
    `ExecFailed` if a script reports that the command cannot start, or prints more than `LIMIT` bytes before
    it: the shell belongs to the tenant and may print anything forever.
    """

    LIMIT: Final = 64 * 1024  # our scripts print a few hundred bytes
    _NOISE: Final = 500  # bytes of other output to repeat in an error

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

    def asked(self, argv0: str, cwd: str, user: str) -> None:
        """Set the names to use in error messages."""
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
            raise ExecFailed("the tenant's shell misbehaves: the command was not started")
        else:
            self._buffer = text[start:]

    def ended(self) -> ExecFailed:
        """Return the error for output that ended before the command started."""
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
                raise ExecFailed("the tenant's shell misbehaves: it reported an impossible pid")
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


def check_size(argv: tuple[str, ...], env: Mapping[str, str]) -> None:
    """Raise `TooLarge` if an argument or environment string, or all of them together, are too large.

    The kernel accepts 128 KiB per string (MAX_ARG_STRLEN); beyond that commands fail in confusing ways.
    """
    sizes = [len(part.encode("utf-8", "surrogateescape")) for part in argv]
    sizes += [len(f"{name}={value}".encode("utf-8", "surrogateescape")) for name, value in env.items()]
    if max(sizes, default=0) > ARGUMENT_MAX:
        raise TooLarge(
            f"an argument or environment string exceeds {ARGUMENT_MAX} bytes; pass it on stdin",
            limit=ARGUMENT_MAX,
        )
    if sum(sizes) > ARGUMENTS_MAX:
        raise TooLarge(
            f"arguments and environment exceed {ARGUMENTS_MAX} bytes; pass them on stdin", limit=ARGUMENTS_MAX
        )
