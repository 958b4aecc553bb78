"""Permanently raise the kernel limits that hosts with many containers run into.

The inotify use of all containers is counted together, for the owner of their user namespaces: systemd and the
bundlers of a few dozen tenants exhaust the kernel's default of 128 instances.
"""

from __future__ import annotations

from pathlib import Path

from gateway.host import HostError

# As recommended for servers by Incus's documentation (reference/server_settings). Their use counts towards
# the memory of the container or worker.
WANTED = {
    "fs.inotify.max_queued_events": 1_048_576,
    "fs.inotify.max_user_instances": 1_048_576,
    "fs.inotify.max_user_watches": 1_048_576,
}
DROP_IN = Path("/etc/sysctl.d/60-incus-gateway.conf")
KERNEL = Path("/proc/sys")
_HEAD = "# Made by `incus-gateway setup`: many containers watch files.\n"


def raise_limits(drop_in: Path = DROP_IN, kernel: Path = KERNEL) -> str | None:
    """Raise limits that are too low, now and for later boots; return what was changed, or None.

    Never lowers a limit, and skips limits that cannot be set here (as in a container): a watch beyond the
    limit then fails with an error that names it. Raises `HostError` if the drop-in cannot be written.
    """
    raised: dict[str, str] = {}
    for name, wanted in WANTED.items():
        value = kernel / name.replace(".", "/")
        try:
            now = int(value.read_text())
            if now >= wanted:
                continue
            value.write_text(str(wanted))
        except (OSError, ValueError):
            continue
        raised[name] = f"{name.rpartition('.')[2]} {now} -> {wanted}"
    said = [*raised.values()]
    try:
        old = drop_in.read_text() if drop_in.exists() else ""
        # Limits that were high enough without us are left out: they may be set higher elsewhere.
        ours = [name for name in WANTED if name in raised or f"{name} =" in old]
        text = _HEAD + "".join(f"{name} = {WANTED[name]}\n" for name in ours)
        if ours and text != old:
            drop_in.parent.mkdir(parents=True, exist_ok=True)
            drop_in.write_text(text)
            said.append(f"saved in {drop_in}")
    except OSError as error:
        raise HostError(f"cannot write {drop_in}: {error.strerror}") from None
    return ", ".join(said) or None
