"""Raises the kernel limits that hosts with many containers run into, permanently.

What all containers of a host use of inotify is counted together, against the owner of their user namespaces:
of the kernel's 128 instances the systemd and the bundlers of a few dozen tenants take all.
"""

from __future__ import annotations

from pathlib import Path

from gateway.host import HostError

# As Incus's documentation has them for servers (reference/server_settings). What is used of them counts as
# memory of the container or worker that uses it.
WANTED = {
    "fs.inotify.max_queued_events": 1_048_576,
    "fs.inotify.max_user_instances": 1_048_576,
    "fs.inotify.max_user_watches": 1_048_576,
}
DROP_IN = Path("/etc/sysctl.d/60-incus-gateway.conf")
KERNEL = Path("/proc/sys")
_HEAD = "# Made by `incus-gateway setup`: many containers watch files.\n"


def raise_limits(drop_in: Path = DROP_IN, kernel: Path = KERNEL) -> str | None:
    """Raise what is too low, now and after the next boot; return what was changed, or None.

    Lowers nothing, and leaves what this host does not let it set (as in a container): a watch beyond the
    limit then gets an error that names it. Raises `HostError` if the drop-in cannot be written.
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
        # What was high enough without us is left out: it may be set to more elsewhere.
        ours = [name for name in WANTED if name in raised or f"{name} =" in old]
        text = _HEAD + "".join(f"{name} = {WANTED[name]}\n" for name in ours)
        if ours and text != old:
            drop_in.parent.mkdir(parents=True, exist_ok=True)
            drop_in.write_text(text)
            said.append(f"kept in {drop_in}")
    except OSError as error:
        raise HostError(f"{drop_in} cannot be written: {error.strerror}") from None
    return ", ".join(said) or None
