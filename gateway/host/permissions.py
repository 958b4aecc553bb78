"""Checks of limits and file modes: shares as large as the whole, budgets beyond this machine's memory."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gateway.host import HostError, run
from gateway.host.daemon import systemd_runs
from gateway.settings import DEFAULT_CONFIG, Settings

MiB: Final = 1 << 20
_UNIT: Final = "incus-gateway.service"

# the share of one tenant or client, and the total
SHARES: Final = (
    ("max_tenant_connections", "max_connections"),
    ("max_anonymous_per_address", "max_anonymous"),
    ("socket_bytes", "tenant_bytes"),
    ("tenant_bytes", "bytes_in_flight"),
    ("max_tenant_sessions", "max_sessions"),
    ("exec_tenant_bytes", "exec_bytes"),
    ("max_subscriptions", "max_tenant_subscriptions"),
    ("max_execs", "tenant_processes"),
    ("owner_upload_copies", "upload_copies"),
    ("owner_upload_copies_bytes", "upload_copies_bytes"),
)
# what may be in the gateway's memory at once
BUDGETS: Final = (
    "bytes_in_flight",
    "waiting_bytes",
    "upload_copies_waiting",
    "exec_bytes",
    "exec_keep_bytes",
    "receipts_memory",
)


def loose(settings: Settings) -> Iterator[str]:
    """Yield each setting that could be tighter, with what to do."""
    for share, whole in SHARES:
        if getattr(settings, share) >= getattr(settings, whole):
            yield f"{_name(share)} is not below {_name(whole)}, so that one can take everything; lower it"
    held = sum(getattr(settings, name) for name in BUDGETS)
    allowed = f"{', '.join(_name(name) for name in BUDGETS)} allow {held // MiB} MiB"
    if held > (has := _memory()) // 2:
        yield f"{allowed}, more than half of this host's {has // MiB} MiB; lower them"
    end = _end_of_memory()
    if end is None:
        yield (
            "nothing limits the gateway's memory: it does not run in a systemd unit with MemoryMax; "
            "start it like deploy/incus-gateway.service"
        )
    elif held > end:
        yield f"{allowed}, more than the unit's MemoryMax of {end // MiB} MiB; lower them"
    for suffix in settings.domain_suffixes:
        if "." not in suffix and suffix not in ("localhost", "test", "internal"):
            yield f"GATEWAY_DOMAIN_SUFFIXES has {suffix}: any token may take names in it; use your own domain"
    if settings.pool_reserve < 0.02:
        yield (
            "GATEWAY_POOL_RESERVE is close to 0: snapshots and new tenants can fill the pool, and then "
            "no site can write; set it to 0.1"
        )
    if settings.secret is not None:
        yield (
            "the secret comes from GATEWAY_SECRET or the configuration, where others may see it; "
            "put it into the file `secret` in the state dir, with mode 0600"
        )
    if "/" not in settings.caddy_admin.removeprefix("http://"):
        yield (
            f"Caddy's admin API is at {settings.caddy_admin}, where every user of this host can change what "
            "is served; make it listen on a unix socket and set GATEWAY_CADDY_ADMIN"
        )
    if settings.runtime == "local":
        yield "GATEWAY_RUNTIME is local: tenants are folders on this machine; nothing isolates them"


def modes(settings: Settings) -> Iterator[str]:
    """Yield each file and folder that other users of this host can access but must not."""
    folder = settings.state_dir
    found = folder.stat()
    # a gateway with a user of its own enters through its group
    if found.st_mode & 0o067 or (found.st_mode & 0o010 and found.st_gid == os.getegid()):
        yield f"{folder} is open to other users ({stat.S_IMODE(found.st_mode):03o}); run: chmod 700 {folder}"
    named = [folder / name for name in ("secret", "gateway.db", "quickstart.token", "quickstart.env")]
    for path in (*named, *sorted(folder.glob("gateway.db-*")), *sorted(folder.glob("*.log"))):
        if path.exists() and path.stat().st_mode & 0o077:
            yield f"{path} is readable by other users; run: chmod 600 {path}"
    config = Path(os.environ.get("GATEWAY_CONFIG", DEFAULT_CONFIG))
    try:
        told = config.stat().st_mode & 0o044 and any(
            line.partition("=")[0].strip() == "secret" for line in config.read_text().splitlines()
        )
    except OSError:
        return
    if told:
        yield f"{config} contains the secret and is readable by other users; run: chmod 600 {config}"


def swaps() -> bool:
    """Return whether this host has swap."""
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    except OSError:
        return False


def _name(setting: str) -> str:
    return f"GATEWAY_{setting.upper()}"


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _end_of_memory() -> int | None:
    """Return the memory limit of the gateway's unit in bytes, or None if there is none."""
    if not systemd_runs():
        return None
    try:
        said = run(
            ["systemctl", "show", "--property=MemoryMax", "--value", _UNIT], fix="see: journalctl -xe"
        ).strip()
    except HostError:
        return None
    return int(said) if said.isdigit() else None
