"""Knows how a command is started inside a tenant so that its whole tree can be found and ended.

A small POSIX `sh`, as root in the container, makes a cgroup for the exec, joins it, says that it is
ready, and takes one line from its standard input: environment, user, folder and command. So neither
command line nor secrets show in the host's process list or in Incus's operations and events before
the command itself runs, and a shell can wait ready before its command is known. Then a second `sh`, as
the command's user, enters the folder, looks whether the program exists and says so, and becomes it.

What the shells say goes to standard error (with a terminal, to the terminal) before the command's first
byte: lines that begin with SOH. `Preamble` takes them out of the stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from gateway.errors import ExecFailed, InvalidParams, TooLarge
from gateway.rootfs.trees import MARKER, PARENT

# a hybrid host mounts the v2 tree at …/unified, a pure one at the top
_FIND_CGROUP = f"g=/sys/fs/cgroup/unified; [ -d $g ] || g=/sys/fs/cgroup; g=$g/{PARENT}/$1"

# finds an account that the gateway does not know by itself; a number without a passwd entry is its own group
_LOOK_UP = (
    'w() { u=$1; if e=$(getent passwd "$u"); then IFS=:; set -f; set -- $e; unset IFS; set +f; '
    "u=$1 i=$3 j=$4 h=$6 s=$7 c=--init-groups; "
    "else case $u in *[!0-9]*) printf '\\001E user\\n' >&2; exit 126;; "
    "*) i=$u j=$u h=/ s=/bin/sh c=--clear-groups;; esac; fi; }; "
)

# $2 is how often to look, 50 ms apart, for a tree that systemd mounts only some 100 ms after a
# container's start: a command that runs before it could only be found by its marker
_START = (
    f"{_LOOK_UP}r=$2; while {_FIND_CGROUP}; [ ! -e ${{g%%/{PARENT}/*}}/cgroup.procs ] && "
    "[ $r -gt 0 ]; do r=$((r-1)); sleep 0.05; done; k=scan; "
    "{ mkdir -p $g && echo 0 >$g/cgroup.procs && k=cgroup; } 2>/dev/null; "
    "%(quiet)s"
    "printf '\\001R %%s %%s %%s\\n' $$ $k $y >&2; "
    "n='\n'; IFS= read -r l || exit 0; "
    "%(restore)s"
    'eval "$l"'
)

START_SCRIPT: Final = _START % {"quiet": "y=; ", "restore": ""}
# the line must not be echoed, nor end at the terminal's 4096 bytes of canonical input
START_SCRIPT_PTY: Final = _START % {
    "quiet": "t=$(stty -g); y=$(tty); stty raw -echo; ",
    "restore": 'stty "$t"; ',
}

# $1 folder, $2 "merged" or nothing, the rest the command. A program is looked up before it is run, so that
# "not found" (127) and "not executable" (126) are ours to tell from a program's own exit codes.
_ENTER = (
    'cd -- "$1" 2>/dev/null || { printf "\\001E cwd\\n" >&2; exit 126; }; m=$2; shift 2; r=127; '
    "case $1 in "
    '*/*) p=$1; [ -e "$p" ] && r=126; [ -f "$p" ] && [ -x "$p" ] && r=0;; '
    "*) IFS=:; set -f; for d in $PATH; do "
    'if [ -f "${d:-.}/$1" ]; then r=126; if [ -x "${d:-.}/$1" ]; then r=0; break; fi; fi; '
    "done; unset IFS; set +f;; esac; "
    'if [ $r != 0 ]; then printf "\\001E %s\\n" $r >&2; exit $r; fi; '
    'printf "\\001K\\n" >&2; [ -z "$m" ] || exec "$@" 3>&2 2>&1; exec "$@"'
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


@dataclass(frozen=True, slots=True)
class Account:
    """Who runs the command, as far as it is known without asking the container; ids None: look up."""

    name: str
    uid: int | None = None
    gid: int | None = None
    home: str | None = None


def quote(text: str) -> str:
    """Quote for the one line that the shell reads: no newline may remain in it.

    `$n` holds a newline. Raises `InvalidParams` for NUL, which no argument can carry.
    """
    if "\0" in text:
        raise InvalidParams("arguments, environment and folders cannot contain NUL")
    return "'" + text.replace("'", "'\\''").replace("\n", "'\"$n\"'") + "'"


def command_line(
    argv: tuple[str, ...],
    *,
    exec_id: str,
    cwd: str,
    env: Mapping[str, str],
    account: Account | None,
    terminal: bool,
    merged: bool = False,
) -> bytes:
    """Return the line, newline included, that makes the waiting shell run `argv`.

    `account` None runs as whoever the shell is. Raises `InvalidParams` for names and texts that no
    environment can carry.
    """
    parts: list[str] = []
    exports = {MARKER: exec_id, **({"TERM": "xterm-256color"} if terminal else {})}
    words = (cwd, "merged" if merged else "", *argv)
    enter = f"/bin/sh -c {quote(_ENTER)} sh " + " ".join(quote(word) for word in words)
    if account is None:
        become = ""
    elif account.uid is None or account.gid is None:
        parts.append(f"w {quote(account.name)}; ")
        parts.append('export HOME="$h" USER="$u" LOGNAME="$u" SHELL="${s:-/bin/sh}"; ')
        become = "setpriv --reuid=$i --regid=$j $c -- "
    else:
        exports |= {"USER": account.name, "LOGNAME": account.name, "HOME": account.home or "/"}
        exports["SHELL"] = "/bin/bash"
        become = (
            ""
            if account.uid == 0
            else f"setpriv --reuid={account.uid} --regid={account.gid} --init-groups -- "
        )
    for name in env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InvalidParams(f"{name[:100]!r} cannot be the name of an environment variable")
    for name, value in {**exports, **env}.items():
        parts.append(f"export {name}={quote(value)}; ")
    return ("".join(parts) + f"exec {become}{enter}\n").encode("utf-8", "surrogateescape")


class Preamble:
    """Takes the shells' own lines off the front of a command's output.

    Feed it what comes; once `started` is true, `rest` is the command's own first output. Raises
    `ExecFailed` as soon as a shell says that the command cannot start.
    """

    LIMIT: Final = 64 * 1024  # the shells say a few hundred bytes; more is not ours

    def __init__(self) -> None:
        self.pid = 0
        self.method: Method = "scan"
        self.terminal = ""
        self.ready = False
        self.started = False
        self.rest = b""
        self._buffer = b""
        self._names = {"cwd": "", "user": "", "argv0": ""}
        self._noise: list[str] = []

    def asked(self, argv0: str, cwd: str, user: str) -> None:
        """Note what was asked for, for the words of an error."""
        self._names = {"cwd": cwd, "user": user, "argv0": argv0}

    def feed(self, data: bytes) -> None:
        self._buffer += data
        while not self.started:
            line, newline, rest = self._buffer.partition(b"\n")
            if not newline:
                break
            self._buffer = rest
            self._line(line.rstrip(b"\r"))
        if self.started:
            self.rest, self._buffer = self._buffer, b""
        elif len(self._buffer) > self.LIMIT:
            raise ExecFailed("the tenant's shell does not behave: the command was not started")

    def ended(self) -> ExecFailed:
        """Return the error for an output that ended before the command had started."""
        self._noise.append(self._buffer.decode("utf-8", "replace"))
        said = " ".join(part.strip() for part in self._noise if part.strip())[:500]
        return ExecFailed(f"the command was not started{': ' + said if said else ''}")

    def _line(self, line: bytes) -> None:
        if not line.startswith(b"\x01"):
            self._noise.append(line.decode("utf-8", "replace"))
            return
        words = line[1:].decode("ascii", "replace").split(" ")
        match words:
            case ["R", pid, "cgroup" | "scan" as method, terminal] if pid.isdigit():
                self.pid, self.method, self.ready = int(pid), method, True
                self.terminal = terminal
            case ["K"]:
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
                self._noise.append(line.decode("utf-8", "replace"))


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
