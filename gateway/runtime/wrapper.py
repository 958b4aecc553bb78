"""Knows how a command is started inside a tenant so that its whole tree can be found and ended.

A small POSIX `sh`, as root in the container, makes a cgroup for the exec, joins it and becomes a second
one, of the command's user. That says that it is ready, and takes one line from its standard input: folder,
environment and command. So neither command line nor secrets show in the host's process list or in Incus's
operations and events before the command itself runs, and a shell can wait ready before its command is
known. With the line it enters the folder, looks whether the program exists and says so, and becomes it:
nothing else is started between the line and the command.

What the shells say goes to standard error (with a terminal, to the terminal) before the command's first
byte: lines that begin with SOH. `Preamble` takes them out of the stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from gateway.errors import ExecFailed, InvalidParams, TooLarge, Unavailable
from gateway.rootfs.trees import MARKER, PARENT
from gateway.runtime import Killed

# a hybrid host mounts the v2 tree at …/unified, a pure one at the top
_FIND_CGROUP = f"g=/sys/fs/cgroup/unified; [ -d $g ] || g=/sys/fs/cgroup; g=$g/{PARENT}/$1"

# $1 exec id; $2 how often to look, 50 ms apart, for a tree that systemd mounts only some 100 ms after a
# container's start: a command that runs before it could only be found by its marker; $3 the script that
# waits; the user's $4 name, $5 uid, $6 gid, $7 home. Without a name the user stays, one without a uid is
# looked up; a number without a passwd entry is its own group.
_START = (
    f"r=$2; while {_FIND_CGROUP}; [ ! -e ${{g%%/{PARENT}/*}}/cgroup.procs ] && "
    "[ $r -gt 0 ]; do r=$((r-1)); sleep 0.05; done; k=scan; "
    "{ mkdir -p $g && echo 0 >$g/cgroup.procs && k=cgroup; } 2>/dev/null; "
    f'export {MARKER}="$1"; y= t=; %(quiet)s'
    "w=$3 u=$4 i=$5 j=$6 h=$7 s=/bin/bash c=--init-groups; "
    'if [ -n "$u" ] && [ -z "$i" ]; then if e=$(getent passwd "$u"); then IFS=:; set -f; set -- $e; '
    "unset IFS; set +f; u=$1 i=$3 j=$4 h=$6 s=${7:-/bin/sh}; "
    "else case $u in *[!0-9]*) printf '\\001E user\\n' >&2; exit 126;; "
    "*) i=$u j=$u h=/ s=/bin/sh c=--clear-groups;; esac; fi; fi; "
    'if [ -n "$u" ]; then export HOME="$h" USER="$u" LOGNAME="$u" SHELL="$s"; '
    '[ "$i" = 0 ] || exec setpriv --reuid=$i --regid=$j $c -- /bin/sh -c "$w" sh "$k" "$y" "$t"; fi; '
    'set -- "$k" "$y" "$t"; eval "$w"'
)

START_SCRIPT: Final = _START % {"quiet": ""}
# the line must not be echoed, nor end at the terminal's 4096 bytes of canonical input
START_SCRIPT_PTY: Final = _START % {
    "quiet": "export TERM=xterm-256color; t=$(stty -g); y=$(tty); stty raw -echo; ",
}

# $1 how the tree can be found, $2 the terminal and $3 its modes, or nothing. The line calls `f FOLDER
# PROGRAM`, which looks for the program before it is run, so that "not found" (127) and "not executable"
# (126) are ours to tell from a program's own exit codes. Names of variables are such that no environment
# has them.
_WAIT: Final = (
    "__n='\n'; f() { "
    'cd -- "$1" 2>/dev/null || { printf "\\001E cwd\\n" >&2; exit 126; }; __r=127; '
    "case $2 in "
    '*/*) [ -e "$2" ] && __r=126; [ -f "$2" ] && [ -x "$2" ] && __r=0;; '
    "*) IFS=:; set -f; for __d in $PATH; do "
    'if [ -f "${__d:-.}/$2" ]; then __r=126; if [ -x "${__d:-.}/$2" ]; then __r=0; break; fi; fi; '
    "done; unset IFS; set +f;; esac; "
    "if [ $__r != 0 ]; then printf '\\001E %s\\n' $__r >&2; exit $__r; fi; }; "
    "printf '\\001R %s %s %s\\n' $$ $1 $2 >&2; "
    'IFS= read -r __l || exit 0; [ -z "$3" ] || stty "$3"; eval "$__l"'
)

# $1 exec id, $2 grace and $3 limit in ms: what `Cgroup.kill` does on the host, for where the host's
# cgroups cannot be reached, to what is in the cgroup and what carries the marker in its environment
KILL_SCRIPT: Final = (
    f"{_FIND_CGROUP}; m=cgroup; [ -e $g/cgroup.procs ] || m=scan; "
    "list() { { [ $m = cgroup ] && cat $g/cgroup.procs 2>/dev/null; "
    f'grep -lsz "^{MARKER}=$1\\$" /proc/[0-9]*/environ | while IFS=/ read -r _ _ p _; do '
    'case $(cat /proc/$p/stat 2>/dev/null) in *") Z "*|"") ;; *) echo $p;; esac; done; } | sort -u; }; '
    'a=$(list "$1"); n=$(echo $a | wc -w); x=0; '
    "[ $2 -gt 0 ] && [ $n -gt 0 ] && kill -TERM $a 2>/dev/null; "
    't=0; while [ -n "$a" ] && [ $t -lt $2 ]; do sleep 0.02; t=$((t+20)); a=$(list "$1"); done; '
    't=0; while [ -n "$a" ] && [ $t -lt $3 ]; do x=1; '
    "[ $m = cgroup ] && echo 1 >$g/cgroup.kill 2>/dev/null; kill -KILL $a 2>/dev/null; "
    'sleep 0.02; t=$((t+20)); a=$(list "$1"); done; '
    "rmdir $g 2>/dev/null; echo $n $x $(echo $a | wc -w) $m"
)

# $1 a terminal: drops what it holds and gets, until standard input ends, and leaves its modes as they were
DRAIN_SCRIPT: Final = (
    's=$(stty -g <"$1") || exit 0; stty raw -echo <"$1"; cat <"$1" >/dev/null & c=$!; '
    'printf "\\001D\\n"; read -r x; kill $c; stty "$s" <"$1"'
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
    """Who runs the command, as far as it is known without asking the container; ids None: look up."""

    name: str
    uid: int | None = None
    gid: int | None = None
    home: str | None = None


def quote(text: str) -> str:
    """Quote for the one line that the shell reads: no newline may remain in it.

    `$__n` holds a newline. Raises `InvalidParams` for NUL, which no argument can carry.
    """
    if "\0" in text:
        raise InvalidParams("arguments, environment and folders cannot contain NUL")
    return "'" + text.replace("'", "'\\''").replace("\n", "'\"$__n\"'") + "'"


def start_command(exec_id: str, account: Account | None, *, looks: int, terminal: bool) -> list[str]:
    """Return the command that makes a shell of `account` wait for its line; None stays who it is.

    `looks` is how often, 50 ms apart, it looks for a cgroup tree that is not mounted yet.
    """
    words: tuple[object, ...] = ()
    if account is not None and account.uid is None:
        words = (account.name,)
    elif account is not None:
        words = (account.name, account.uid, account.gid, account.home or "/")
    script = START_SCRIPT_PTY if terminal else START_SCRIPT
    return ["/bin/sh", "-c", script, "sh", exec_id, str(looks), _WAIT, *map(str, words)]


def command_line(argv: tuple[str, ...], *, cwd: str, env: Mapping[str, str], merged: bool = False) -> bytes:
    """Return the line, newline included, that makes the waiting shell run `argv`.

    Raises `InvalidParams` for names and texts that no environment can carry.
    """
    for name in env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InvalidParams(f"{name[:100]!r} cannot be the name of an environment variable")
    exports = {name: f"export {name}={quote(value)}; " for name, value in env.items()}
    path = exports.pop("PATH", "")  # the program is looked up in it
    rest = "".join(exports.values())
    words = " ".join(quote(word) for word in argv)
    order = f"{path}f {quote(cwd)} {quote(argv[0])}; {rest}printf '\\001K\\n' >&2; exec {words}"
    return f"{order}{' 3>&2 2>&1' if merged else ''}\n".encode("utf-8", "surrogateescape")


class Preamble:
    """Takes the shells' own lines off the front of a command's output.

    Feed it what comes; once `started` is true, `rest` is the command's own first output. Raises
    `ExecFailed` as soon as a shell says that the command cannot start, or more than `LIMIT` bytes that do not
    start it: the shell is the tenant's, and may say anything for ever.
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
    """Raise `TooLarge` where an argument or environment string has over `one` bytes, or all over `total`.

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
