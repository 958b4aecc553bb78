"""Explain why an install or a site failed, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from gateway.errors import ExecFailed
from gateway.limits.pressure import larger
from gateway.rootfs.paths import show
from gateway.runtime.sizes import SIZES, size_of

_IN_THE_WAY: Final = re.compile(
    r"(?i)eaddrinuse|addrinuse|in use|already|another|\block|\bbusy\b|only one|single instance"
)
LAST_OUTPUT: Final = "Its last output: "
# as systemd words it, of a site's process, or of a shell that started it
KILLED: Final = re.compile(r"status=(?:9/KILL|137/)")
SIGKILL: Final = "it was killed (SIGKILL), and the kernel reports no lack of memory"
_SAID: Final = 1000  # characters of a site's last output
_SHOWN: Final = 200  # characters of a command
# a lockfile, the command that makes it anew, and the one that installs without it, if any
_LOCKFILES: Final = {
    "bun": ("bun.lock", "bun install", "bun install"),
    "npm": ("package-lock.json", "npm install", "npm install"),
    "pnpm": ("pnpm-lock.yaml", "pnpm install", "pnpm install"),
    "yarn": ("yarn.lock", "yarn install", "yarn install"),
    "uv": ("uv.lock", "uv lock", "uv sync"),
    "poetry": ("poetry.lock", "poetry lock", ""),
}
# systemd's own messages between the program's
_SYSTEMD: Final = re.compile(r"(?:site(?:-next)?\.service: |(?:Started|Starting|Stopped|Stopping) site)")
# a call inside a package or inside Node, of which an error's stack may have more than is kept
_INNER: Final = re.compile(r"\s+at .*(?:/node_modules/|\(?node:)")
_BEGUN: Final = re.compile(r"^Started site.*$", re.MULTILINE)
_EXITED: Final = re.compile(
    r"Main process exited, code=\w+, status=(\d+)/(\w+)|site\S*\.service: (Deactivated successfully)"
)
_NO_PROGRAM: Final = re.compile(
    r"^(?:/usr/bin/)?env: \W{0,3}([\w./@+-]{1,60})\W{0,3}: No such file", re.MULTILINE
)
_IMAGE: Final = (
    "the gateway's operator can add it with `incus-gateway image build`, or give other commands with "
    "`start` and `install`"
)


def shown(command: Sequence[str]) -> str:
    """Return a command for people, without the programs of ours that stand before it (`Manifest.command`)."""
    words = list(command)
    own = next((at for at, word in enumerate(words) if "\n" in word), None)
    if own is not None and words[own + 1 : own + 2] == ["--"]:  # it starts what follows
        words = words[own + 2 :]
    elif own is not None:
        del words[own - 1 : own + 1]
    return show(" ".join(words)[:_SHOWN])


def more_memory(memory: int) -> str:
    """Return advice: the next size with more than this many bytes of memory, and how to get it."""
    size = larger(memory)
    if size is None:
        return "there is no larger size: reduce what it needs"
    has = size_of(SIZES[size]["memory"]) >> 20
    return (
        f"the size {size} has {has} MiB: deploy with --size {size}, or resize an existing tenant with "
        f"`incus-gateway resize TENANT {size}`"
    )


def install_failed(error: ExecFailed, install: Sequence[str], memory: int) -> ExecFailed:
    """Return the error of an install command, with the reason and the next step if they are known.

    `memory` is the tenant's, in bytes; 0 if unknown.
    """
    command = show(" ".join(install)[:_SHOWN])
    if error.facts.get("reason") == "not_found":
        program = show(install[0][:_SHOWN])
        return ExecFailed(
            f"the tenant's image has no {program}, which `{command}` needs: {_IMAGE}", **error.facts
        )
    match error.facts.get("cause"):
        case "lockfile":
            lockfile, update, without = _LOCKFILES[error.facts["of"]]
            why = f"{lockfile} does not match what the folder requires: run `{update}` there and deploy again"
            if without:
                why += f", or install without it by --install '{without}'"
        case "memory":
            has = f"{memory >> 20} MiB" if memory else "its share of the machine's"
            why = f"`{command}` needs more memory than the tenant has ({has}): {more_memory(memory)}"
        case "killed":
            why = f"`{command}` was killed (SIGKILL), and the kernel reports no lack of memory"
        case "registry":
            why = f"{error.facts['of']} could not be reached; try again when it answers"
        case "program":
            program = show(error.facts["of"])
            why = f"the tenant's image has no {program}, which `{command}` needs: {_IMAGE}"
        case _:
            return error
    return ExecFailed(f"{why}. {error.message}", **error.facts)


def ended(said: str, command: Sequence[str], memory: int, *, short: bool) -> str:
    """Explain why a site keeps ending, from the journal of its unit.

    `short` is whether one of its processes was killed because its `memory` ran out.
    """
    line = shown(command)
    if (missing := _NO_PROGRAM.search(said)) is not None:
        return f"the tenant's image has no {missing[1]}, which `{line}` needs: {_IMAGE}"
    status, kind, clean = (_EXITED.findall(said) or [("", "", "")])[-1]
    if clean:
        how = "it ends by itself, without an error; a site's command must keep running"
    elif KILLED.search(f"status={status}/{kind}"):
        how = f"the kernel kills it because memory runs out: {more_memory(memory)}" if short else SIGKILL
    else:
        how = f"it ends with code {status}" if status else "it ends"
    return f"the site keeps ending: {how}"


def in_the_way(said: str) -> bool:
    """Return whether a program says that it cannot run twice: that a port or a lock is taken.

    Where this is too generous, visitors wait for a broken update; where too strict, a good one fails.
    """
    return _IN_THE_WAY.search(said) is not None


def last_words(said: str, *, finished: bool = False) -> str:
    """Return the last output of a site's program: of its last run, if there is any.

    Of one that has `finished` and is being started again, the last run that is over says why.
    """
    runs = _BEGUN.split(said)
    over = [run for run in runs if _EXITED.search(run) is not None] if finished else []
    words = next((own for run in (*reversed(over), *reversed(runs)) if (own := _own(run))), "")
    return f"{LAST_OUTPUT}{words[-_SAID:] or 'nothing'}"


def _own(said: str) -> str:
    lines = (line for line in said.splitlines() if line.strip())
    return "\n".join(line for line in lines if not (_SYSTEMD.match(line) or _INNER.match(line))).strip()
