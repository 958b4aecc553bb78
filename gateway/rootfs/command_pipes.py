"""Open the reading ends of a command's output pipes, which incusd reads.

incusd 6.0.4 to 7.3 may end an output too early: it looks for more every second, and if a command prints and
ends just then, before incusd had its turn again, it takes the output for complete (`execWrapper.Read` of its
internal/linux/poll.go). On a busy host that cost 3 of 2 000 commands that were silent for a second their last
words. They stay in the pipe while somebody has it open.
"""

from __future__ import annotations

import os
from pathlib import Path

from gateway.rootfs.kernel import O_PATH, read_part
from gateway.rootfs.process_tree import stat

_LOOKS = 16  # processes of a command to look at: the kernel lists the one that incusd started first
_PIDS = 256  # bytes of these processes' list
_OUTPUTS = ("fd/4", "fd/5")  # of `incusd forkexec`: standard output and error, as incusd made them
_HELPER = b"forkexec"
_WORDS = 4096  # bytes of its command line, of which the second word counts


def opened(path: Path) -> list[int]:
    """Return descriptors for the outputs of the command in a cgroup, standard output first; [] if unknown.

    They are those of incusd's helper, the parent of the command's first process: what the command has as its
    own may be anything by now. Needs root. Quick enough for the event loop: bounded, and without any disk.
    """
    for pid in _first(path):
        found = stat(pid)
        try:
            # a folder of /proc is of one process, even if its pid is used again
            helper = os.open(f"/proc/{found.parent if found else 0}", os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if read_part(f"/proc/self/fd/{helper}/cmdline", _WORDS).split(b"\0")[1:2] == [_HELPER]:
                return _pipes(helper)
        except OSError:  # it has ended
            pass
        finally:
            os.close(helper)
    return []


def _first(path: Path) -> list[int]:
    """Return the first processes in a cgroup; not of those below it, which only a tenant makes."""
    try:
        text = read_part(path / "cgroup.procs", _PIDS)
    except OSError:  # it is gone
        return []
    return [int(word) for word in text[: text.rfind(b"\n") + 1].split()][:_LOOKS]


def _pipes(helper: int) -> list[int]:
    """Open the outputs of a process. Raises `OSError` if one is no pipe: a tenant may imitate the helper."""
    found: list[int] = []
    try:
        for name in _OUTPUTS:
            named = os.open(name, O_PATH | os.O_CLOEXEC, dir_fd=helper)  # which opens nothing yet
            try:
                if not os.readlink(f"/proc/self/fd/{named}").startswith("pipe:["):
                    raise OSError("not a pipe")
                found.append(os.open(f"/proc/self/fd/{named}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            finally:
                os.close(named)
    except OSError:
        for descriptor in found:
            os.close(descriptor)
        raise
    return found
