"""Prepare the machine: the Incus daemon, what tenants need of the host, their base image.

Everything here needs root, may be slow, and serves an operator at a terminal; none of it runs while a client
waits. Other packages use `daemon.Daemon`, `setup.setup`, `image.build`, `quickstart.main`, and the names in
this module. Errors are `HostError`, whose message names the step and what to do next.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.errors import GatewayError

Report = Callable[[str], None]
"""Shows one line of progress to a person; without a newline."""

# Programs that incusd and the image build run, with their Debian packages.
PROGRAMS = {
    "/usr/libexec/incus/incusd": "incus-base",
    "incus": "incus-client",
    "dnsmasq": "dnsmasq-base",
    "nft": "nftables",
    "mkfs.btrfs": "btrfs-progs",
    "mksquashfs": "squashfs-tools",
    "mmdebstrap": "mmdebstrap",
}


class HostError(GatewayError):
    """A step of preparing the host failed. Only the operator sees it, so it may name host paths."""


@dataclass(frozen=True, slots=True)
class SetupChange:
    """The outcome of one step of preparing the host."""

    step: str
    changed: bool
    detail: str
    seconds: float

    def __str__(self) -> str:
        return f"{'changed' if self.changed else 'ok':<8} {self.step}: {self.detail}  ({self.seconds:.1f} s)"


class Steps:
    """Runs steps, reports each when it is finished, and collects their outcomes."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.changes: list[SetupChange] = []

    def run(self, step: str, work: Callable[[], str | None], unchanged: str = "as it should be") -> None:
        """Run `work`, which returns what it changed, or None. A `HostError` gets the step's name in front."""
        begun = time.monotonic()
        try:
            done = work()
        except HostError as error:
            raise HostError(f"{step}: {error.message}", step=step) from error
        change = SetupChange(step, done is not None, done or unchanged, time.monotonic() - begun)
        self.changes.append(change)
        self.report(str(change))


def run(
    command: Sequence[str | Path],
    *,
    fix: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    holding: tuple[int, ...] = (),
    given: str = "",
) -> str:
    """Run a program of the host and return its output.

    Raises `HostError` with the end of the program's output and `fix`, which tells the reader what to do.
    `timeout` is in seconds. `holding` are descriptors of locks: if this process is killed, the program keeps
    them until it ends. `given` is its input.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=env,
            timeout=timeout,
            pass_fds=holding,
            check=False,
            input=given,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        package = PROGRAMS.get(words[0])
        hint = f"install it: apt-get install {package}" if package else fix
        raise HostError(f"{words[0]} is not installed; {hint}") from error
    except subprocess.TimeoutExpired as error:
        raise HostError(f"{words[0]} did not end within {timeout:.0f} s; {fix}") from error
    if done.returncode != 0:
        said = " | ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-4:])
        raise HostError(f"{words[0]} ended with {done.returncode}: {said or 'no message'}; {fix}")
    return done.stdout


# --- processes ----------------------------------------------------------------------------------------------


PROC: Final = Path("/proc")


def find_process(is_ours: Callable[[int], bool]) -> int | None:
    """Return the pid of a process outside of containers that `is_ours` accepts, or None."""
    pids = (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())
    return next((pid for pid in pids if is_ours(pid)), None)


def outside_containers(pid: int) -> bool:
    """Return whether a process runs in our own PID namespace; False if it has ended.

    Unlike the links in /proc/PID/ns, everyone may read this of any process.
    """
    try:
        return _pid_namespace_depth(str(pid)) == _pid_namespace_depth("self")
    except OSError:
        return False


def _pid_namespace_depth(process: str) -> int:
    """Return in how many nested PID namespaces a process has a number (proc_pid_status(5))."""
    lines = (PROC / process / "status").read_text(errors="replace").splitlines()
    # a kernel without PID namespaces says nothing of them, and has no containers
    return next((len(line.split()) for line in lines if line.startswith("NSpid:")), 0)
