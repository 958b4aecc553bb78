"""Check whether this host has what a gateway needs and whether everything runs, without changing anything.

The state that `setup` manages is checked by `setup`'s own steps, with an Incus client that refuses changes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final, NoReturn

from gateway.deployments.template import named, names
from gateway.errors import GatewayError
from gateway.holder.holder import held_at
from gateway.host import HostError, address_guard, cluster, quotas
from gateway.host import setup as steps
from gateway.host.caddy_service import CaddyService, in_use
from gateway.host.daemon import Daemon
from gateway.host.findings import SETUP, Finding, Hint, Looking
from gateway.host.limits import KERNEL, WANTED
from gateway.host.local_gateway import ask
from gateway.host.permissions import loose, modes, swaps
from gateway.hostnames import own_hosts, own_names, plain, reserved
from gateway.incus import member_of
from gateway.incus.monitor import first_process
from gateway.rootfs import bridge_port
from gateway.rootfs.instance_record import MANAGED, folder_of, is_tenant
from gateway.runtime.incus.golden_copies import GOLDEN_SNAPSHOT, golden_name, prepared_key
from gateway.runtime.incus.records import DEPLOYMENT, DOMAIN
from gateway.runtime.incus.resizing import not_in_force, words
from gateway.runtime.incus.standby_copies import late_copies
from gateway.settings import Settings

GiB: Final = 1 << 30


def doctor(settings: Settings) -> list[Finding]:
    """Run all checks; one that cannot be run counts as a problem."""
    checks: list[tuple[str, Callable[[], str | None]]] = [("state dir", lambda: _state(settings))]
    silent = cluster.undecided(settings) if settings.runtime == "incus" else None
    if silent is not None:  # each of the other checks would wait for it
        checks += [
            ("cluster", lambda: _refused(silent)),
            ("inotify limits", _limits),
            ("broker", lambda: _broker(settings)),
            ("holder", lambda: _holder(settings)),
        ]
    elif settings.runtime == "incus":
        root = settings.incus_socket
        project = settings.incus_project
        checks += [
            ("Incus", lambda: _daemon(settings)),
            ("cluster", lambda: _cluster(settings)),
            ("standby copies", lambda: _copies(settings)),
            (f"project {project}", lambda: steps._project(Looking(root), settings)),
            (
                f"firewall {steps.acl_name(settings)}",
                lambda: steps._acl(Looking(root, project), settings, steps.host_addresses()),
            ),
            (f"bridge {settings.network}", lambda: steps._network(Looking(root, project), settings)),
            (f"addresses of {settings.network}", lambda: _guard(settings)),
            (f"storage pool {settings.pool}", lambda: _pool(settings)),
            (f"profile {settings.profile}", lambda: steps._profile(Looking(root, project), settings)),
            (f"image {settings.image}", lambda: _image(settings)),
            ("templates", lambda: _templates(settings)),
            ("limits in force", lambda: _in_force(settings)),
            ("domains", lambda: _domains(settings)),
            ("addresses", lambda: _addresses(settings)),
            ("inotify limits", _limits),
            ("broker", lambda: _broker(settings)),
            ("holder", lambda: _holder(settings)),
        ]
    checks += [
        ("gateway", lambda: _gateway(settings)),
        ("hosts", lambda: _hosts(settings)),
        ("Caddy", lambda: _caddy(settings)),
    ]
    if silent is None:
        checks += [("routes", lambda: _routes(settings)), ("limits", lambda: _loose(settings))]
    found = []
    for what, check in checks:
        try:
            found.append(Finding(what, True, check() or "as it should be"))
        except Hint as hint:
            found.append(Finding(what, True, str(hint), hint=True))
        except (HostError, GatewayError) as error:
            found.append(Finding(what, False, error.message))
        except OSError as error:
            found.append(Finding(what, False, f"{error.strerror}: {error.filename}; run this as root"))
    return found


def _state(settings: Settings) -> str:
    folder = settings.state_dir
    if not folder.is_dir():
        raise HostError(f"{folder} does not exist; start the gateway once, or set GATEWAY_STATE_DIR")
    if not os.access(folder, os.W_OK):
        raise HostError(f"{folder} is not writable; run this as the gateway's user")
    if (free := shutil.disk_usage(folder).free) < GiB // 4:
        raise HostError(f"only {free >> 20} MiB are free at {folder}; make room")
    if open_to_others := list(modes(settings)):
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


def _daemon(settings: Settings) -> str:
    if not Daemon.at(settings.incus_socket).answers():
        raise HostError(f"nothing answers at {settings.incus_socket}; start Incus: systemctl start incus")
    return "answers"


def _cluster(settings: Settings) -> str:
    incus = Looking(settings.incus_socket, settings.incus_project)
    wrong, better = cluster.problems(incus, settings)
    if not cluster.are_published(incus, steps.host_addresses()):
        wrong.append(f"the other members do not know this host's addresses; {SETUP}")
    if wrong:
        raise HostError("; ".join(wrong))
    if better:
        raise Hint("; ".join(better))
    there = cluster.members(incus)
    return f"{len(there)} members, all online" if there else "a single server"


def _refused(why: str) -> NoReturn:
    raise HostError(why)


def _copies(settings: Settings) -> str:
    if late := late_copies(settings.state_dir):
        raise HostError(
            f"no new copy on another member for three intervals: {', '.join(late[:5])}; more of their work "
            "would be lost with this server: the gateway's log says why"
        )
    return "none is late"


def _pool(settings: Settings) -> str:
    incus = Looking(settings.incus_socket, settings.incus_project)
    found = incus.find("storage-pools", settings.pool)
    if found is None:
        raise HostError(f"it does not exist; {SETUP}")
    space = incus.get("storage-pools", settings.pool, "resources")["space"]
    free = space["total"] - space["used"]
    if free < GiB:
        raise HostError(f"only {free >> 20} MiB are free; enlarge the pool or delete unneeded snapshots")
    if found["driver"] == "dir":
        raise Hint("plain folders, without quotas: one tenant can fill the disk; see GATEWAY_POOL_SOURCE")
    if not quotas.in_force(settings):
        raise HostError(f"the kernel has stopped counting, so no tenant's disk is limited; {SETUP}")
    if os.geteuid() == 0 and (bare := quotas.unlimited(settings, _tenants(settings))):
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
    if quotas.kind(settings) == "full" and quotas.wanted(settings):
        raise Hint(
            "it has full quotas, with which a deployment takes longer the more tenants there are; "
            "docs/operations.md says how to change to simple ones, GATEWAY_SIMPLE_QUOTAS=false keeps them"
        )
    return f"{found['driver']}, {free / GiB:.1f} GiB free"


def _in_force(settings: Settings) -> str:
    """Compare the limits of running tenants with those that the kernel has."""
    project, folder = settings.incus_project, settings.incus_socket.parent
    looked, wrong = 0, []
    for instance in Looking(settings.incus_socket, project).instances():
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


def _image(settings: Settings) -> None:
    incus = Looking(settings.incus_socket, settings.incus_project)
    if incus.find("images", "aliases", settings.image) is None:
        raise HostError("it does not exist; run `incus-gateway image build`")


def _templates(settings: Settings) -> str:
    if not settings.golden:
        return "none is prepared in advance, as set by GATEWAY_GOLDEN"
    incus = Looking(settings.incus_socket, settings.incus_project)
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


def _domains(settings: Settings) -> str:
    """Check for domains set on several tenants, and for the gateway's own names set on any."""
    own = own_names(settings)
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


def _guard(settings: Settings) -> str:
    if not bridge_port.guard_hook(settings.incus_socket.parent, settings.network).exists():
        raise Hint(
            "Incus's own filter keeps each tenant to its address, and takes longer for each packet the more "
            f"tenants there are; {SETUP}, unless this kernel or a network of this size supports no other"
        )
    if os.geteuid() == 0 and not address_guard.in_force(settings):
        raise HostError(f"the table that keeps tenants to their addresses is missing; {SETUP}")
    return "each tenant's own"


def _addresses(settings: Settings) -> str:
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
        for instance in Looking(settings.incus_socket, settings.incus_project).instances()
        if is_tenant(instance)
    ]


def _eldest_first(settings: Settings) -> list[dict[str, Any]]:
    found = Looking(settings.incus_socket, settings.incus_project).instances()
    return sorted(found, key=lambda instance: str(instance["created_at"]))


def _owners(settings: Settings) -> dict[str, str]:
    """Return the tenant of each domain from the gateway's database; empty if there is none yet."""
    database = settings.state_dir / "gateway.db"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return dict(connection.execute("SELECT domain, tenant FROM domains"))
    except sqlite3.Error:
        return {}


def _limits() -> None:
    low = [name for name in WANTED if int((KERNEL / name.replace(".", "/")).read_text()) < WANTED[name]]
    if low:
        raise HostError(f"{', '.join(low)} too low; {SETUP}")


def _broker(settings: Settings) -> str:
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


def _holder(settings: Settings) -> str:
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


def _loose(settings: Settings) -> str:
    said = list(loose(settings))
    if settings.runtime == "incus" and swaps():
        profile = Looking(settings.incus_socket, settings.incus_project).find("profiles", settings.profile)
        if profile is not None and profile["config"].get("limits.memory.swap", "true") == "true":
            said.append(
                "this host has swap that tenants may use: one that thrashes slows down all others; run: "
                f"incus profile set {settings.profile} limits.memory.swap=false"
            )
    if said:
        raise Hint("; ".join(said))
    return "everything is limited, and no share is as large as the whole"


def _hosts(settings: Settings) -> str:
    if "*" in settings.hosts:
        raise Hint(
            "GATEWAY_HOSTS is *: requests are accepted under any name that resolves to this host (DNS "
            "rebinding); list the gateway's names instead"
        )
    return ", ".join(sorted(own_hosts(settings) - {"*"})) or "only addresses"


def _gateway(settings: Settings) -> str:
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


def _caddy(settings: Settings) -> str:
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


def _routes(settings: Settings) -> str:
    routes = CaddyService(settings).caddy
    there = routes.listed() if routes.routes.is_dir() else {}
    own = own_names(settings)
    there = {domain: target for domain, target in there.items() if not reserved(domain, own)}
    if settings.runtime != "incus":
        return f"{len(there)} routes"
    domains: dict[str, bool] = {}
    for instance in Looking(settings.incus_socket, settings.incus_project).instances():
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
