"""Freeze and thaw a whole container by its cgroup, as the kernel alone can, without incusd.

For a server that is cut off from its cluster: incusd neither stops a container nor says anything of it then.
What is here belongs to the host, and is found by LXC's own processes: a tenant controls none of it.
"""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Final

from gateway.bounds import part
from gateway.errors import NotFound, Unavailable
from gateway.rootfs import process_tree

_FREEZING: Final = 1.0  # seconds for all processes to stand still
_LOOK: Final = 0.005  # seconds between two looks whether they do
_BYTES: Final = 4096


def freeze(incus: Path, container: str) -> None:
    """Freeze everything in a container. `incus` is the folder of its incusd. Idempotent. Needs root.

    `container` is its name in host paths. Raises `NotFound` if it is not running, and `Unavailable`.
    """
    group = _group(incus, container)
    _write(group, "1")
    until = time.monotonic() + _FREEZING
    while not process_tree.frozen(group):
        if time.monotonic() > until:
            raise Unavailable(f"some processes of {container} are not frozen yet")
        time.sleep(_LOOK)


def thaw(incus: Path, container: str) -> None:
    """Let everything in a container run again. Idempotent. Raises as `freeze`."""
    _write(_group(incus, container), "0")


def _group(incus: Path, container: str) -> Path:
    """Return the cgroup (v2) of a container of the incusd of a folder."""
    mount = process_tree.mount_point()
    if mount is None:
        raise Unavailable("this host has no cgroup v2, which freezing containers needs")
    # of another incusd on this host a container may have the same name
    title = f"[lxc monitor] {incus}/containers {container}".encode()
    for monitors in mount.glob(f"lxc.monitor.{container}*/cgroup.procs"):
        with contextlib.suppress(OSError, ValueError):
            (monitor,) = part(monitors, _BYTES).split()
            if part(f"/proc/{int(monitor)}/cmdline", _BYTES).rstrip(b"\0 ") != title:
                continue
            (child,) = part(f"/proc/{int(monitor)}/task/{int(monitor)}/children", _BYTES).split()
            group = process_tree.of_init(int(child))
            if group and re.fullmatch(rf"lxc\.payload\.{re.escape(container)}(-\d+)?", group.name):
                return group
    raise NotFound(f"{container} is not running")


def _write(group: Path, text: str) -> None:
    try:
        (group / "cgroup.freeze").write_text(text)
    except FileNotFoundError:
        raise NotFound("it has just ended") from None
    except OSError as error:
        raise Unavailable(f"the cgroup cannot be frozen: {error.strerror}") from error
