"""Prepares the machine: the Incus daemon, what tenants need of it, their base image.

Everything here needs root and is slow control plane for an operator at a terminal; nothing of it runs
while a client waits. From outside: `daemon.Daemon`, `setup.setup`, `image.build`, `quickstart.main`, and
the words of this module. Errors are `HostError`, whose message names the step and what to do next.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import GatewayError

Report = Callable[[str], None]
"""Takes one line of progress for a person, without its line end."""

# What incusd and the image build call, with the Debian package that brings each.
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
    """A step of preparing the host failed. Its reader is the operator, so it may name host paths."""


@dataclass(frozen=True, slots=True)
class Change:
    """One step of preparing the host: what it looked after, what it did there, how long it took."""

    step: str
    changed: bool
    detail: str
    seconds: float

    def __str__(self) -> str:
        return f"{'changed' if self.changed else 'ok':<8} {self.step}: {self.detail}  ({self.seconds:.1f} s)"


class Steps:
    """Collects the changes of one run and reports each as it is finished."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.changes: list[Change] = []

    def run(self, step: str, work: Callable[[], str | None], unchanged: str = "as it should be") -> None:
        """Do `work`, which says what it changed, or None. A `HostError` out of it gains the step's name."""
        begun = time.monotonic()
        try:
            done = work()
        except HostError as error:
            raise HostError(f"{step}: {error.message}", step=step) from error
        change = Change(step, done is not None, done or unchanged, time.monotonic() - begun)
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
) -> str:
    """Run a program of the host and return its output.

    Raises `HostError` with the end of what it said and `fix`, which tells the reader what to do.
    `timeout` is in seconds. `holding` are descriptors of locks: should this process be killed, its child
    holds them until it ends too.
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
            stdin=subprocess.DEVNULL,
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
