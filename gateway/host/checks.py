"""Checks of what this host has and of what runs on it. None of them changes anything.

Each returns what it found, and raises `HostError` with what is wrong and what to do, or `Hint`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import stat
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from gateway.deployments.template import named, names
from gateway.holder.holder import held_at
from gateway.host import HostError, run
from gateway.host.caddy_service import CaddyService, in_use
from gateway.host.cluster import cluster_problems
from gateway.host.daemon import Daemon, systemd_runs
from gateway.host.gateway_process import ask
from gateway.host.incus import IncusAdmin
from gateway.host.setup import (
    INOTIFY_LIMITS,
    KERNEL,
    addresses_published,
    guard_in_force,
    host_addresses,
    members,
    quota_kind,
    quotas_in_force,
    unlimited_tenants,
    wants_simple_quotas,
)
from gateway.hostnames import gateway_hosts, gateway_names, plain, reserved
from gateway.incus import member_of
from gateway.incus.monitor import first_process
from gateway.rootfs import bridge_port
from gateway.rootfs.instance_record import MANAGED, folder_of, is_tenant
from gateway.runtime.incus.golden_copies import GOLDEN_SNAPSHOT, golden_name, prepared_key
from gateway.runtime.incus.records import DEPLOYMENT, DOMAIN
from gateway.runtime.incus.resizing import not_in_force, words
from gateway.runtime.incus.standby_copies import late_copies
from gateway.settings import DEFAULT_CONFIG, Settings

SETUP: Final = "run `incus-gateway setup`"
"""What to do about most of what is missing."""


class Hint(Exception):
    """Raised by a check that found no problem but has a suggestion."""


class ReadOnlyIncus(IncusAdmin):
    """An Incus client that refuses changes, and reports each as a need for setup."""

    def _refuse(self, *path: str, **request: Any) -> NoReturn:
        raise HostError(f"missing or not as it should be; {SETUP}")

    post = put = patch = delete = _refuse


# --- limits and file modes ----------------------------------------------------------------------------------


MiB: Final = 1 << 20
_UNIT: Final = "incus-gateway.service"

# the share of one tenant or client, and the total
SHARES: Final = (
    ("max_tenant_connections", "max_connections"),
    ("tenant_bytes", "bytes_in_flight"),
    ("exec_tenant_bytes", "exec_bytes"),
    ("max_execs", "tenant_processes"),
    ("owner_upload_copies", "upload_copies"),
    ("owner_upload_copies_bytes", "upload_copies_bytes"),
)
# what may be in the gateway's memory at once
BUDGETS: Final = (
    "bytes_in_flight",
    "exec_bytes",
    "exec_keep_bytes",
)


def loose_settings(settings: Settings) -> Iterator[str]:
    """Yield each setting that could be tighter, with what to do."""
    for share, whole in SHARES:
        if getattr(settings, share) >= getattr(settings, whole):
            yield (
                f"{_variable(share)} is not below {_variable(whole)}, so that one can take everything; "
                "lower it"
            )
    held = sum(getattr(settings, name) for name in BUDGETS)
    allowed = f"{', '.join(_variable(name) for name in BUDGETS)} allow {held // MiB} MiB"
    if held > (has := _host_memory()) // 2:
        yield f"{allowed}, more than half of this host's {has // MiB} MiB; lower them"
    end = _memory_max()
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


def exposed_files(settings: Settings) -> Iterator[str]:
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


def host_swaps() -> bool:
    """Return whether this host has swap."""
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    except OSError:
        return False


def _variable(setting: str) -> str:
    return f"GATEWAY_{setting.upper()}"


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_max() -> int | None:
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


# --- checks -------------------------------------------------------------------------------------------------


GiB: Final = 1 << 30


def state_dir(settings: Settings) -> str:
    folder = settings.state_dir
    if not folder.is_dir():
        raise HostError(f"{folder} does not exist; start the gateway once, or set GATEWAY_STATE_DIR")
    if not os.access(folder, os.W_OK):
        raise HostError(f"{folder} is not writable; run this as the gateway's user")
    if (free := shutil.disk_usage(folder).free) < GiB // 4:
        raise HostError(f"only {free >> 20} MiB are free at {folder}; make room")
    if open_to_others := list(exposed_files(settings)):
        raise HostError("; ".join(open_to_others))
    database = folder / "gateway.db"
    if database.exists():
        try:
            connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
            try:
                said = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            finally:
                connection.close()
        except sqlite3.Error as error:
            said = str(error)
        if said != "ok":
            raise HostError(f"{database} is damaged ({said}); see docs/operations.md, the gateway's records")
    return f"{folder}, {free / GiB:.1f} GiB free"


def daemon(settings: Settings) -> str:
    if not Daemon.at(settings.incus_socket).answers():
        raise HostError(f"nothing answers at {settings.incus_socket}; start Incus: systemctl start incus")
    return "answers"


def cluster(settings: Settings) -> str:
    incus = ReadOnlyIncus(settings.incus_socket, settings.incus_project)
    wrong, better = cluster_problems(incus, settings)
    if not addresses_published(incus, host_addresses()):
        wrong.append(f"the other members do not know this host's addresses; {SETUP}")
    if wrong:
        raise HostError("; ".join(wrong))
    if better:
        raise Hint("; ".join(better))
    there = members(incus)
    return f"{len(there)} members, all online" if there else "a single server"


def standby_copies(settings: Settings) -> str:
    if late := late_copies(settings.state_dir):
        raise HostError(
            f"no new copy on another member for three intervals: {', '.join(late[:5])}; more of their work "
            "would be lost with this server: the gateway's log says why"
        )
    return "none is late"


def pool(settings: Settings) -> str:
    incus = ReadOnlyIncus(settings.incus_socket, settings.incus_project)
    found = incus.find("storage-pools", settings.pool)
    if found is None:
        raise HostError(f"it does not exist; {SETUP}")
    space = incus.get("storage-pools", settings.pool, "resources")["space"]
    free = space["total"] - space["used"]
    if free < GiB:
        raise HostError(f"only {free >> 20} MiB are free; enlarge the pool or delete unneeded snapshots")
    if found["driver"] == "dir":
        raise Hint("plain folders, without quotas: one tenant can fill the disk; see GATEWAY_POOL_SOURCE")
    if not quotas_in_force(settings):
        raise HostError(f"the kernel has stopped counting, so no tenant's disk is limited; {SETUP}")
    if os.geteuid() == 0 and (bare := unlimited_tenants(settings, _tenants(settings))):
        raise HostError(
            f"the disks of {', '.join(bare[:5])} are not limited; a running gateway limits them within "
            f"{settings.reconcile_interval:.0f} s: see its log"
        )
    if free < space["total"] * settings.pool_reserve:
        raise HostError(
            f"only {free / GiB:.1f} GiB are free, less than GATEWAY_POOL_RESERVE: snapshots, clones and new "
            "tenants are refused; enlarge the pool or delete unneeded snapshots"
        )
    if free < space["total"] * 1.5 * settings.pool_reserve:
        raise Hint(f"{free / GiB:.1f} GiB are free, close to what GATEWAY_POOL_RESERVE keeps")
    if quota_kind(settings) == "full" and wants_simple_quotas(settings):
        raise Hint(
            "it has full quotas, with which a deployment takes longer the more tenants there are; "
            "docs/operations.md says how to change to simple ones, GATEWAY_SIMPLE_QUOTAS=false keeps them"
        )
    return f"{found['driver']}, {free / GiB:.1f} GiB free"


def limits_in_force(settings: Settings) -> str:
    """Compare the limits of running tenants with those that the kernel has."""
    project, folder = settings.incus_project, settings.incus_socket.parent
    looked, wrong = 0, []
    for instance in ReadOnlyIncus(settings.incus_socket, project).instances():
        instance["project"] = project
        if not is_tenant(instance) or instance["status"] != "Running":
            continue
        if init := first_process(folder, folder_of(instance), instance["last_used_at"]):
            looked += 1
            if found := not_in_force(instance, init, folder / "storage-pools" / settings.pool):
                wrong.append(f"{instance['name']} has {words(found)}")
    if wrong:
        raise HostError(
            f"{'; '.join(wrong[:5])}: a running gateway mends that within "
            f"{2 * settings.reconcile_interval:.0f} s: see its log; else restart the tenant"
        )
    return f"of {looked} running tenants, as configured"


def image(settings: Settings) -> None:
    incus = ReadOnlyIncus(settings.incus_socket, settings.incus_project)
    if incus.find("images", "aliases", settings.image) is None:
        raise HostError("it does not exist; run `incus-gateway image build`")


def templates(settings: Settings) -> str:
    if not settings.golden:
        return "none is prepared in advance, as set by GATEWAY_GOLDEN"
    incus = ReadOnlyIncus(settings.incus_socket, settings.incus_project)
    image = incus.find("images", "aliases", settings.image)
    ready: list[str] = []
    missing: list[str] = []
    member = member_of(incus.get())
    for name in names(settings):
        recipe = named(name, settings).recipe()
        copy = golden_name(prepared_key(settings, recipe, image["target"] if image else "", member))
        there = incus.find("instances", copy, "snapshots", GOLDEN_SNAPSHOT) is not None
        (ready if there else missing).append(name)
    if missing:
        raise Hint(
            f"no copy of {', '.join(missing)} is ready: the next deployment installs everything and takes "
            "longer; after that a copy is made automatically. If it stays missing, look for "
            "gateway.template.failed in `incus-gateway events`, and at the gateway's log"
        )
    return f"copies of {', '.join(ready)} are ready"


def domains(settings: Settings) -> str:
    """Check for domains set on several tenants, and for the gateway's own names set on any."""
    own = gateway_names(settings)
    carried: dict[str, list[str]] = defaultdict(list)
    for instance in _eldest_first(settings):
        config = instance["expanded_config"]
        if config.get(DOMAIN) and config.get(MANAGED) == "true" and not config.get(DEPLOYMENT):
            carried[plain(config[DOMAIN]) or config[DOMAIN]].append(instance["name"])
    owners = _owners(settings)
    said = []
    for domain, tenants in carried.items():
        keeps = owners.get(domain, tenants[0])
        others = [name for name in tenants if name != keeps or reserved(domain, own)]
        if reserved(domain, own):
            said.append(f"{domain} is the gateway's own name, but is set on {', '.join(others)}")
        elif others:
            said.append(f"{domain} is set on {', '.join(tenants)}, and leads to {keeps}")
        if others:
            said[-1] += f"; run: incus config set {others[0]} user.gateway.domain="
    if said:
        raise HostError(". ".join(said))
    return f"{len(carried)}, each of one tenant"


def address_guard(settings: Settings) -> str:
    if not bridge_port.guard_hook(settings.incus_socket.parent, settings.network).exists():
        raise Hint(
            "Incus's own filter keeps each tenant to its address, and takes longer for each packet the more "
            f"tenants there are; {SETUP}, unless this kernel or a network of this size supports no other"
        )
    if os.geteuid() == 0 and not guard_in_force(settings):
        raise HostError(f"the table that keeps tenants to their addresses is missing; {SETUP}")
    return "each tenant's own"


def addresses(settings: Settings) -> str:
    """Check for addresses shared by several instances, which Incus then refuses to start."""
    homes: dict[str, list[str]] = defaultdict(list)
    for instance in _eldest_first(settings):
        for nic in instance["expanded_devices"].values():
            if nic.get("type") == "nic" and nic.get("ipv4.address"):
                homes[nic["ipv4.address"]].append(instance["name"])
    said = [
        f"{', '.join(names)} share the address {address}, so Incus starts none of them; run: "
        f"incus config device remove {names[-1]} eth0 && incus config unset {names[-1]} raw.lxc"
        for address, names in homes.items()
        if len(names) > 1
    ]
    if said:
        raise HostError(". ".join(said))
    return f"{len(homes)}, each of one instance"


def _tenants(settings: Settings) -> list[str]:
    return [
        instance["name"]
        for instance in ReadOnlyIncus(settings.incus_socket, settings.incus_project).instances()
        if is_tenant(instance)
    ]


def _eldest_first(settings: Settings) -> list[dict[str, Any]]:
    found = ReadOnlyIncus(settings.incus_socket, settings.incus_project).instances()
    return sorted(found, key=lambda instance: str(instance["created_at"]))


def _owners(settings: Settings) -> dict[str, str]:
    """Return the tenant of each domain from the gateway's database; empty if there is none yet."""
    database = settings.state_dir / "gateway.db"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return dict(connection.execute("SELECT domain, tenant FROM domains"))
    except sqlite3.Error:
        return {}


def inotify_limits(_: Settings) -> None:
    low = [
        name
        for name in INOTIFY_LIMITS
        if int((KERNEL / name.replace(".", "/")).read_text()) < INOTIFY_LIMITS[name]
    ]
    if low:
        raise HostError(f"{', '.join(low)} too low; {SETUP}")


def broker(settings: Settings) -> str:
    path = settings.broker_socket
    if path is None:
        if os.geteuid() != 0:
            raise HostError(
                "only root's gateway starts its own broker; see docs/operations.md, "
                "the gateway as its own user, and set GATEWAY_BROKER_SOCKET"
            )
        return "a child of the gateway"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(5.0)
        try:
            connection.connect(str(path))
        except OSError as error:
            raise HostError(
                f"nothing listens on {path} ({error.strerror or error}); start it: "
                "systemctl start incus-gateway-broker, or unset GATEWAY_BROKER_SOCKET"
            ) from error
    return f"serves {path}"


def holder(settings: Settings) -> str:
    path = settings.holder_socket
    try:
        return f"holds {held_at(path)} commands and waiting shells at {path}"
    except OSError as error:
        raise Hint(
            f"no holder listens on {path} ({error.strerror or error}): a restart of the gateway ends all "
            "commands; start one: systemctl start incus-gateway-hold, or run `incus-gateway hold`"
        ) from error
    except ValueError as error:
        raise HostError(f"{path} is not a holder of this version; restart it: {error}") from error


def shares(settings: Settings) -> str:
    said = list(loose_settings(settings))
    if settings.runtime == "incus" and host_swaps():
        profile = ReadOnlyIncus(settings.incus_socket, settings.incus_project).find(
            "profiles", settings.profile
        )
        if profile is not None and profile["config"].get("limits.memory.swap", "true") == "true":
            said.append(
                "this host has swap that tenants may use: one that thrashes slows down all others; run: "
                f"incus profile set {settings.profile} limits.memory.swap=false"
            )
    if said:
        raise Hint("; ".join(said))
    return "everything is limited, and no share is as large as the whole"


def hosts(settings: Settings) -> str:
    if "*" in settings.hosts:
        raise Hint(
            "GATEWAY_HOSTS is *: requests are accepted under any name that resolves to this host (DNS "
            "rebinding); list the gateway's names instead"
        )
    return ", ".join(sorted(gateway_hosts(settings) - {"*"})) or "only addresses"


def gateway(settings: Settings) -> str:
    listen = settings.listen
    try:
        status, said = ask(listen, "GET", "/readyz", timeout=5.0)
    except OSError as error:
        host, _, port = listen.rpartition(":")
        reason = in_use(int(port), host.strip("[]")) if "/" not in listen and port.isdigit() else None
        if reason is not None:
            raise HostError(
                f"something else listens on {listen} ({reason}); stop it, or set GATEWAY_LISTEN"
            ) from error
        raise HostError(
            f"not running: nothing answers at {listen}; start it: systemctl start incus-gateway, "
            "or deploy/quickstart"
        ) from error
    if not isinstance(said, dict) or status not in (200, 503):
        raise HostError(f"what answers at {listen} is not a gateway; stop it, or set GATEWAY_LISTEN")
    if status != 200:
        raise HostError(f"not ready: {said.get('detail', said)}; it recovers by itself once that is fixed")
    return f"ready at {listen}"


def caddy(settings: Settings) -> str:
    front = CaddyService(settings)
    running = front.running()
    if running is None:
        taken = [f"{port} ({reason})" for port, reason in front.taken().items()]
        also = f"; its ports {', '.join(taken)} are in use: see GATEWAY_CADDY_…" if taken else ""
        raise HostError(
            f"the admin API at {settings.caddy_admin} does not answer; start Caddy: "
            f"systemctl start incus-gateway-caddy, or deploy/quickstart{also}"
        )
    if not front.caddy.serves(running):
        raise HostError(
            f"the Caddy at {settings.caddy_admin} does not serve the gateway's sites; "
            "start a separate one with deploy/quickstart and another GATEWAY_CADDY_ADMIN, "
            "or, if it serves nothing else, restart the gateway"
        )
    return f"answers at {settings.caddy_admin} and serves the gateway's sites"


def routes(settings: Settings) -> str:
    routes = CaddyService(settings).caddy
    there = routes.listed() if routes.routes.is_dir() else {}
    own = gateway_names(settings)
    there = {domain: target for domain, target in there.items() if not reserved(domain, own)}
    if settings.runtime != "incus":
        return f"{len(there)} routes"
    domains: dict[str, bool] = {}
    for instance in ReadOnlyIncus(settings.incus_socket, settings.incus_project).instances():
        config = instance["expanded_config"]
        if config.get(DOMAIN) and config.get(MANAGED) == "true" and not config.get(DEPLOYMENT):
            domain = plain(config[DOMAIN]) or config[DOMAIN]
            runs = instance["status"] == "Running"  # others may have no address
            domains[domain] = domains.get(domain, False) or (runs and not reserved(domain, own))
    missing = sorted(domain for domain, runs in domains.items() if runs and domain not in there)
    more = sorted(there.keys() - domains.keys())
    if missing or more:
        few = {"missing": missing[:5], "too many": more[:5]}
        said = "; ".join(f"{what}: {', '.join(names)}" for what, names in few.items() if names)
        raise HostError(
            f"they do not match the tenants ({said}); a running gateway corrects them within "
            f"{settings.reconcile_interval:.0f} s: see its log"
        )
    return f"{len(there)}, matching the tenants"
