"""Read the limits that the kernel holds a container to, which may differ from those that are configured.

Incus applies a limit when its configuration changes, and not always as configured: a PATCH of a running
instance's `limits.memory` to "" leaves it without one until its next start (measured with Incus 6.0.4). So
what is in force is read from the control groups and the pool's quota, of version 1, 2 or both.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from gateway.rootfs.memory import UNLIMITED, text
from gateway.rootfs.process_tree import mount_point
from gateway.rootfs.quotas import Quotas
from gateway.rootfs.worker_cgroup import controller_mount

# each limit's controller, and its file in version 1 and in version 2
_FILES: Final = {
    "memory": ("memory", "memory.limit_in_bytes", "memory.max"),
    "swap": ("memory", "memory.memsw.limit_in_bytes", "memory.swap.max"),  # version 1 counts memory, too
    "processes": ("pids", "pids.max", "pids.max"),
    "cpu": ("cpuset", "cpuset.cpus", "cpuset.cpus.effective"),
}


def in_force(init: int, pool: Path, folder: str, identity: str) -> Mapping[str, int | None]:
    """Return the limits of the container with the init process `init`; None for one that does not exist.

    `memory`, `swap` and `disk` are in bytes, `processes` and `cpu` are numbers. What this kernel or pool
    cannot limit is missing, and so is the disk where this process may not see it: that takes root. `folder`
    is the instance's in the pool mounted at `pool`, `identity` its id.
    """
    said = text(f"/proc/{init}/cgroup")
    found: dict[str, int | None] = {}
    for name, (controller, first, second) in _FILES.items():
        mount = _mount(controller)
        if (group := _group(said, "" if mount is None else controller)) is None:
            continue
        file = f"{mount or mount_point()}{group}/{second if mount is None else first}"
        if value := text(file).decode().strip():
            found[name] = _cpus(value) if name == "cpu" else _number(value)
            if name == "swap" and mount is not None and (memory := found.get("memory")) is not None:
                found[name] = None if found[name] is None else (found[name] or 0) - memory
    # no quotas, not root's process, or just being removed
    with contextlib.suppress(LookupError, OSError, ValueError):
        found["disk"] = Quotas(pool).limit_of(folder, identity)
    return found


@functools.cache
def _mount(controller: str) -> str | None:
    return controller_mount(controller)


def _group(said: bytes, controller: str) -> str | None:
    """Return a container's cgroup in the hierarchy of a controller of version 1, or of version 2 with ""."""
    for line in said.splitlines():
        names, _, path = line.partition(b":")[2].partition(b":")
        if controller.encode() in names.split(b","):
            return os.fsdecode(path).removesuffix("/init.scope")
    return None


def _number(value: str) -> int | None:
    return int(value) if value.isdecimal() and len(value) < 20 and int(value) < UNLIMITED else None


def _cpus(value: str) -> int:
    """Return how many CPUs a list such as 0-2,5 names."""
    spans = (one.partition("-")[::2] for one in value.split(","))
    return sum(int(last or first) - int(first) + 1 for first, last in spans)
