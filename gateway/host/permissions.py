"""Looks for limits that are off: a share as large as the whole, a budget that this machine does not have."""

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

# what one may have, and what there is for all
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
# what the gateway's own memory may hold at once
BUDGETS: Final = (
    "bytes_in_flight",
    "waiting_bytes",
    "upload_copies_waiting",
    "exec_bytes",
    "exec_keep_bytes",
    "receipts_memory",
)


def loose(settings: Settings) -> Iterator[str]:
    """Yield what could be tighter, each with what to do."""
    for share, whole in SHARES:
        if getattr(settings, share) >= getattr(settings, whole):
            yield f"{_name(share)} is not below {_name(whole)}: one may take all of it; set it lower"
    held = sum(getattr(settings, name) for name in BUDGETS)
    allowed = f"{', '.join(_name(name) for name in BUDGETS)} allow {held // MiB} MiB"
    if held > (has := _memory()) // 2:
        yield f"{allowed}, more than half of this host's {has // MiB}; set them lower"
    end = _end_of_memory()
    if end is None:
        yield (
            "nothing ends the gateway's memory: no unit of systemd with MemoryMax runs it; "
            "start it as deploy/incus-gateway.service does"
        )
    elif held > end:
        yield f"{allowed}, more than the unit's MemoryMax of {end // MiB}; set them lower"
    for suffix in settings.domain_suffixes:
        if "." not in suffix and suffix not in ("localhost", "test", "internal"):
            yield f"GATEWAY_DOMAIN_SUFFIXES has {suffix}: any token may take names in it; name one of yours"
    if settings.pool_reserve < 0.02:
        yield (
            "GATEWAY_POOL_RESERVE is next to nothing: snapshots and new tenants may fill the pool, and then "
            "every site fails to write; set it to 0.1"
        )
    if settings.secret is not None:
        yield (
            "the secret comes from GATEWAY_SECRET or the configuration, where more than the gateway sees it; "
            "put it into `secret` in the state dir, mode 0600"
        )
    if "/" not in settings.caddy_admin.removeprefix("http://"):
        yield (
            f"Caddy's admin API is at {settings.caddy_admin}, where every user of this host may change what "
            "is served; have it listen on a unix socket and set GATEWAY_CADDY_ADMIN"
        )
    if settings.runtime == "local":
        yield "GATEWAY_RUNTIME is local: tenants are folders of this machine, nothing isolates them"


def modes(settings: Settings) -> Iterator[str]:
    """Yield what is open to other users of this host and must not be."""
    folder = settings.state_dir
    found = folder.stat()
    # a gateway with its own user passes by its group
    if found.st_mode & 0o067 or (found.st_mode & 0o010 and found.st_gid == os.getegid()):
        yield f"{folder} is open to others ({stat.S_IMODE(found.st_mode):03o}); run: chmod 700 {folder}"
    named = [folder / name for name in ("secret", "gateway.db", "quickstart.token", "quickstart.env")]
    for path in (*named, *sorted(folder.glob("gateway.db-*")), *sorted(folder.glob("*.log"))):
        if path.exists() and path.stat().st_mode & 0o077:
            yield f"{path} can be read by others; run: chmod 600 {path}"
    config = Path(os.environ.get("GATEWAY_CONFIG", DEFAULT_CONFIG))
    try:
        told = config.stat().st_mode & 0o044 and any(
            line.partition("=")[0].strip() == "secret" for line in config.read_text().splitlines()
        )
    except OSError:
        return
    if told:
        yield f"{config} has the secret and can be read by others; run: chmod 600 {config}"


def swaps() -> bool:
    """Say whether this host has swap."""
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    except OSError:
        return False


def _name(setting: str) -> str:
    return f"GATEWAY_{setting.upper()}"


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _end_of_memory() -> int | None:
    """Return the bytes that the gateway's unit may take, or None if nothing says so."""
    if not systemd_runs():
        return None
    try:
        said = run(
            ["systemctl", "show", "--property=MemoryMax", "--value", _UNIT], fix="see: journalctl -xe"
        ).strip()
    except HostError:
        return None
    return int(said) if said.isdigit() else None
