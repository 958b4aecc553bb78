"""Makes sites in Incus containers: instances from a pool, a golden copy or the image, with a systemd unit.

`user.gateway.deployment` of an instance says which deployment is not over.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final

from gateway.errors import ExecFailed, GatewayError, Unavailable
from gateway.hostnames import plain
from gateway.incus import IncusError
from gateway.incus.client import instance_path
from gateway.rootfs.locations import MANAGED
from gateway.rootfs.root import show
from gateway.runtime import ExecSpec, Process
from gateway.runtime.incus import unit_status
from gateway.runtime.incus.commands import Commands
from gateway.runtime.incus.creation import has_fixed_address, is_ours, leased
from gateway.runtime.incus.errors import DISK_FULL, POOL_FULL, translated
from gateway.runtime.incus.migrations import old_service
from gateway.runtime.incus.resizing import UPDATING
from gateway.runtime.incus.stock import ROLE, UNMARKED, Stock, owner
from gateway.runtime.incus.tenants import (
    ASLEEP,
    DEPLOYMENT,
    DOMAIN,
    PORT,
    IncusRuntime,
    domain_config,
    lacks_address,
)
from gateway.runtime.incus.uploads import CONTENT, number
from gateway.runtime.probe import answer, ask, network_up
from gateway.runtime.sites import (
    ALLOWED,
    Exposure,
    Order,
    Prepared,
    Quiet,
    Recipe,
    Say,
    Service,
    Side,
    Site,
    Source,
    at_once,
    disk_was_full,
    lines,
    quota_was_reached,
)
from gateway.runtime.sizes import SITE_SHARE, SIZES
from gateway.settings import Settings
from gateway.tasks import whole

log = logging.getLogger(__name__)

HEALTH: Final = "user.gateway.health"
LINK: Final = "volatile.eth0.host_name"

_GENERATION: Final = 2  # of golden copies; a higher one where they are made in another way
_INSTALLS: Final = 3  # runs of an install command until it has failed
# one file system of all: a tenant that reaches its own end there hears of a quota
_SHARED: Final = ("btrfs", "dir", "zfs")
_EMPTY: Final = 0.5  # used of a pool that a command cannot have filled, even if it cleaned up after itself
_REST_LOOK: Final = 0.5  # seconds between two looks at what a container computes
_REST_LOOKS: Final = 3  # at rest one after another until it is believed: a disk may have held it up
_REST_SHARE: Final = 0.05  # of a CPU, below which it is at rest
_REST_TIMEOUT: Final = 60.0
_PATH_SHOWN: Final = 500
_SIZE: Final = 12  # characters of the size that sealing says
_PRINTED: Final = 4 << 20  # bytes that a script of ours may print; it says a few lines
_LOOK: Final = 10.0  # seconds of one that only looks
_TRIES: Final = 20  # ports that are tried until one is free
_FAILURES: Final = 3  # of one port or socket, until it is given up

# It starts as soon as /tmp is there, beside the rest of the container's boot and not after it: so a new
# tenant's site answers a good deal earlier.
_UNIT: Final = """\
[Unit]
Description=The site of this tenant
StartLimitIntervalSec=0
DefaultDependencies=no
After=tmp.mount
Conflicts=shutdown.target
Before=shutdown.target

[Service]
User={user}
WorkingDirectory={workspace}
Environment=PORT={port} HOST=0.0.0.0 NODE_ENV=development
PassEnvironment={allowed}
EnvironmentFile=-{environment}
ExecStart={command}
Restart=always
RestartSec=300ms
RestartSteps=5
RestartMaxDelaySec=10s
TimeoutStopSec=1s
KillMode=mixed
# the site is what may be killed when memory is short, not the tenant's systemd or an agent's command
OOMScoreAdjust=300
OOMPolicy=continue
# Of what the tenant may have; systemd's own default of tasks is 15%. The rest is for who comes to mend the
# site: one that thrashes drops its own pages and not those of a command's shell.
MemoryMax={share}%
TasksMax={share}%
# among the services of a tenant; commands are in a group beside all of these, with as much as they
CPUWeight=80
{more}
[Install]
WantedBy=sysinit.target
"""

# Which folder was the live one is noted before the two are exchanged, so that after a crash both this and its
# undo know whether they were. The exchange is one step: no request ever finds the folder missing.
_SETTLE: Final = """\
set -eu
live="$1" next="$2" note="$3" unit=/etc/systemd/system/site.service
new=$(cat; printf .)
if [ ! -e "$note" ]; then
  if [ -f $unit ]; then cp $unit $unit.old; fi
  if [ -f /etc/site.env ]; then cp -p /etc/site.env /etc/site.env.old; fi
  stat -c %i "$live" >"$note.new"
  mv "$note.new" "$note"
fi
if [ "$(stat -c %i "$live")" = "$(cat "$note")" ]; then mv --exchange -T "$next" "$live"; fi
if [ -f /etc/site-next.env ]; then mv /etc/site-next.env /etc/site.env; fi
printf %s "${new%.}" >$unit
systemctl daemon-reload
systemctl --quiet enable site.service
systemctl restart site.service
"""
# right after a container's start its systemd does not listen yet
_LISTENS: Final = """\
for look in $(seq 400); do
  [ -S /run/systemd/private ] && break
  sleep 0.05
done
"""
_UNSETTLE: Final = (
    f"""\
set -eu
live="$1" next="$2" note="$3" unit=/etc/systemd/system/site.service
[ -e "$note" ] || exit 0
{_LISTENS}"""
    """\
if [ "$(stat -c %i "$live")" != "$(cat "$note")" ]; then mv --exchange -T "$next" "$live"; fi
if [ -f /etc/site.env.old ]; then mv /etc/site.env.old /etc/site.env; else rm -f /etc/site.env; fi
if [ -f $unit.old ]; then
  cp $unit.old $unit
  systemctl daemon-reload
  systemctl restart site.service
else
  systemctl --quiet disable --now site.service || :
  rm -f $unit
fi
rm -f "$note" $unit.old
"""
).replace("{listens}", _LISTENS)
_CLEAR: Final = """\
live="$1" next="$2" note="$3"
systemctl stop site-next.service 2>/dev/null
rm -f /run/systemd/system/site-next.service /etc/site-next.env /etc/site.env.old \
  /etc/systemd/system/site.service.old
systemctl daemon-reload
rm -rf "$next" "$note" "$note.new"
"""
_UNREADABLE: Final = "cannot be read: "
# As the site's user: root would follow what the site puts in its way. What that user cannot read is named.
_STAGE: Final = """\
set -eu
live="$1" next="$2" uid="$4"
rm -rf "$next"
install -d -m 0755 -o "$uid" -g "$uid" "$next"
as_site() { setpriv --reuid="$uid" --regid="$uid" --clear-groups "$@"; }
as_site cp -a --reflink=auto "$live/." "$next/" && exit
file=$(cd "$live" && as_site find . ! -type l '(' ! -readable -o -type d ! -executable ')' -printf %P -quit)
[ -n "$file" ] || exit 1
printf '\n{unreadable}%s' "$file"
exit 1
""".replace("{unreadable}", _UNREADABLE)
# what goes or comes meanwhile is nobody's fault
_CARRY: Final = """\
cd "$1"
setpriv --reuid="$3" --regid="$3" --clear-groups xargs --null --no-run-if-empty \
  cp -a --update --parents --reflink=auto --target-directory="$2" -- || :
"""
_DISCARD: Final = """\
cd "$1"
exec setpriv --reuid="$2" --regid="$2" --clear-groups xargs --null --no-run-if-empty rm -rf --
"""
_UNPACK: Final = """\
exec setpriv --reuid="$2" --regid="$2" --clear-groups \
  tar --extract --file=- --no-same-owner --directory="$1"
"""
# until the container's next start, whose first process is told by Incus
_ALLOW: Final = """\
set -eu
for unit in site site-next; do
  mkdir -p /run/systemd/system/$unit.service.d
  printf '[Service]\\nEnvironment="%s"\\n' "$1" >/run/systemd/system/$unit.service.d/domain.conf
done
systemctl daemon-reload
"""
_START: Final = """\
set -eu
cat >"$1"
{listens}systemctl daemon-reload
[ "$2" = next ] || systemctl --quiet enable site.service
systemctl restart "$3"
""".replace("{listens}", _LISTENS)
# what must not be the same in two copies: the machine's name for itself, and what it logged
_SEAL: Final = """\
set -eu
systemctl stop site.service
systemctl stop systemd-journald-dev-log.socket systemd-journald.socket systemd-journald.service || :
rm -rf /var/log/journal/* /var/lib/systemd/random-seed /var/lib/dbus/machine-id
: >/etc/machine-id
sync -f /
printf '%12s' "$(du -skx / 2>/dev/null | cut -f1)"
"""


class IncusSites:
    """The sites of one Incus project; see `gateway.runtime.sites.Sites`."""

    def __init__(self, settings: Settings, runtime: IncusRuntime) -> None:
        self._settings = settings
        self._incus, self._making = runtime.incus, runtime.making
        # commands of ours in instances that are no tenants, too
        self._commands = Commands(settings, self._incus, self._init_pid)
        self._stock = Stock(settings, self._incus, self._making, self._fill, partial(prepared_key, settings))
        # root's folder is above them, so that the tenant cannot put a link in their place
        self._next = _beside(settings, "next")
        self._note = _beside(settings, "before")

    async def __aenter__(self) -> IncusSites:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stock.aclose()
        await self._commands.aclose()

    # --- instances ----------------------------------------------------------------------------------

    async def create(self, tenant: str, order: Order) -> Source:
        config = {
            MANAGED: "true",
            ROLE: "tenant",
            **domain_config(order.domain),
            PORT: str(order.recipe.port),
            DEPLOYMENT: order.deployment,
            **_content(order.recipe),
        }
        size = SIZES[order.size]
        config |= {f"limits.{name}": size[name] for name in ("cpu", "memory") if name in size}
        key = await self._stock.key(order.recipe)
        if key and await self._stock.claim(tenant, key, config, size):
            return "pool"
        devices = await self._making.devices(size)
        async with self._stock.golden(key) as golden:
            source = golden or {"type": "image", "alias": self._settings.image}
            config |= UNMARKED if golden else {}
            await self._making.make(tenant, source, config, devices, start=True)
        return "golden" if golden else "image"

    async def remove(self, deployment: str) -> None:
        await self._making.remove(
            lambda one: one["config"].get(DEPLOYMENT) == deployment and is_ours(one),
            f"deployment {deployment} was undone",
        )

    async def anchor(self, tenant: str) -> None:
        await self._making.anchor(tenant)

    async def listed(self) -> Sequence[Site]:
        sites = []
        with translated(""):
            instances = await self._incus.instances(state=lacks_address)
        homes = _homes(instances)
        for instance in instances:
            config = instance.get("expanded_config") or {}
            domain = config.get(DOMAIN)
            if not domain or config.get(MANAGED) != "true":
                continue
            port = config.get(PORT, "")
            exposure = _exposure(instance, int(port)) if port.isdigit() else None
            home = () if exposure is None else homes.get(exposure.address, ())
            old = old_service(config)
            sites.append(
                Site(
                    tenant=instance["name"],
                    domain=plain(domain) or domain,
                    running=instance["status"] in ("Running", "Frozen"),
                    exposure=old or (exposure if not home or home[0] == instance["name"] else None),
                    deployment=config.get(DEPLOYMENT) or None,
                    health=config.get(HEALTH) or "/",
                    asleep=config.get(ASLEEP) == "true" and old is None,
                    instance=instance["config"].get("volatile.uuid"),
                    created=instance.get("created_at"),
                    shares_address=len(home) > 1,
                    loose=port.isdigit() and not has_fixed_address(instance),
                    # through a proxy its answers take another way
                    link=config.get(LINK) if self._settings.expose == "address" else None,
                )
            )
        return sites

    # --- the site in its container ------------------------------------------------------------------

    async def push(
        self, tenant: str, side: Side, recipe: Recipe, env: Mapping[str, str] | None, lost: bytes = b""
    ) -> None:
        uid = str(self._settings.workspace_uid)
        if side == "next":
            await self._root(tenant, _STAGE, *self._places(), uid)
            if lost:
                await self._root(tenant, _DISCARD, self._next, uid, given=lost)
        await self._root(tenant, _UNPACK, self._folder(side), uid, given=recipe.archive)
        if env is not None:
            # by standard input: it may hold secrets, and a command line shows on the host
            text = environment_file(env).encode()
            await self._root(tenant, 'umask 077; cat >"$1"', _environment(side), given=text)

    async def install(self, tenant: str, side: Side, recipe: Recipe, say: Say) -> None:
        if not recipe.install:
            return
        await self.reachable(tenant)
        for left in reversed(range(_INSTALLS)):
            try:
                await self._install(tenant, side, recipe, say)
                return
            except ExecFailed as error:
                # registries and name servers fail now and then; what was fetched is kept
                if not left or "exit_code" not in error.facts:
                    raise
                say(f"the install command ended with {error.facts['exit_code']}, trying again")

    async def _install(self, tenant: str, side: Side, recipe: Recipe, say: Say) -> None:
        process = await self._commands.exec(
            tenant, ExecSpec(recipe.install, cwd=self._folder(side), env={"CI": "1"}, merged=True)
        )
        try:
            async with asyncio.timeout(self._settings.install_timeout):
                tail = await lines(process, say, self._settings.install_log, self._settings.install_output)
                exit_ = await process.wait()
        except BaseException as error:
            await asyncio.shield(process.kill(0))
            if isinstance(error, TimeoutError):
                raise ExecFailed(
                    f"the install command did not end within {self._settings.install_timeout:.0f} s; "
                    "GATEWAY_INSTALL_TIMEOUT allows more",
                    reason="install_failed",
                ) from error
            raise
        finally:
            await process.aclose()
        if exit_.code != 0:
            await self._if_full(tail)
            raise ExecFailed(
                f"the install command {' '.join(recipe.install)} ended with {exit_.code}: {tail[-1000:]}",
                reason="install_failed",
                exit_code=exit_.code,
            )

    async def start(self, tenant: str, side: Side, recipe: Recipe) -> None:
        name = "site.service" if side == "live" else "site-next.service"
        folder = "/etc/systemd/system" if side == "live" else "/run/systemd/system"
        if side == "next" and not recipe.alone:
            await self._make_room(tenant)
        unit = _unit(self._settings, recipe, side).encode()
        await self._root(tenant, _START, f"{folder}/{name}", side, name, given=unit)

    async def allow(self, tenant: str, domain: str) -> None:
        await self._root(tenant, _ALLOW, f"{ALLOWED}={domain}", seconds=_LOOK)

    async def restart(self, tenant: str) -> None:
        await self._root(tenant, "exec systemctl restart site.service")

    async def settle(self, tenant: str, recipe: Recipe, kept: bytes = b"") -> None:
        if kept:
            uid = str(self._settings.workspace_uid)
            await self._root(tenant, _CARRY, self._settings.workspace, self._next, uid, given=kept)
        await self._root(
            tenant, _SETTLE, *self._places(), given=_unit(self._settings, recipe, "live").encode()
        )

    async def unsettle(self, tenant: str) -> None:
        await self._root(tenant, _UNSETTLE, *self._places())

    async def clear(self, tenant: str) -> None:
        await self._root(tenant, _CLEAR, *self._places())
        await self._making.remove_device(tenant, "site-next")
        config = (await self._making.placed(tenant))["config"]
        if UPDATING in config:
            before, _, doubled = config[UPDATING].partition(" ")
            change = {UPDATING: ""}
            if config.get("limits.memory") == doubled or not doubled:  # else somebody gave it another one
                change["limits.memory"] = "" if before == "-" else before
            with translated(tenant):
                await self._operate("PATCH", instance_path(tenant), {"config": change})

    async def _make_room(self, tenant: str) -> None:
        """Double the memory while two sites run side by side."""
        path, patience = instance_path(tenant), self._settings.lifecycle_timeout
        for attempt in range(_TRIES):
            with translated(tenant):
                instance, tag = await self._incus.get_tagged(path)
                if UPDATING in instance["config"]:
                    return
                limit = instance["expanded_config"].get("limits.memory", "")
                number, unit = limit.rstrip("KMGTiB"), limit.lstrip("0123456789")
                if not number.isdigit():
                    return
                before, doubled = instance["config"].get("limits.memory", "-"), f"{int(number) * 2}{unit}"
                change = {"config": {UPDATING: f"{before} {doubled}", "limits.memory": doubled}}
                try:
                    await whole(self._incus.operate("PATCH", path, change, timeout=patience, if_match=tag))
                    return
                except IncusError as error:
                    if error.status != 412 or attempt == _TRIES - 1:  # its size was changed meanwhile
                        raise

    async def expose(self, tenant: str, side: Side, recipe: Recipe) -> Exposure:
        device = "site" if side == "live" else "site-next"
        if self._settings.expose != "address":
            await self._add_proxy(tenant, device, recipe.listens(side))
        found = _exposure(await self._making.placed(tenant), recipe.listens(side), device)
        if found is None:
            raise Unavailable(f"tenant {tenant} has no address on {self._settings.network}")
        return found

    async def _add_proxy(self, tenant: str, device: str, port: int) -> None:
        """Give a site a port or a socket of this host.

        Incus adds a device to a running instance only if its listener can be had: so of two gateways that
        choose the same port one fails, and chooses again. And of several proxies that are started at once it
        fails one now and then, for no reason that stays.
        """
        connect = f"tcp:127.0.0.1:{port}"
        first, _, last = self._settings.expose_ports.partition("-")
        failed: Counter[int] = Counter()  # of the one socket as 0
        chosen: int | None = 0
        for attempt in range(_TRIES):
            proxies = {
                (instance["name"], name): entry
                for instance in await self._making.instances()
                for name, entry in instance["devices"].items()
                if entry.get("type") == "proxy"
            }
            there = proxies.get((tenant, device))
            if there is not None and there["connect"] == connect:
                return
            if self._settings.expose == "socket":
                folder = self._settings.caddy_folder.absolute() / "sockets"
                name = tenant if device == "site" else f"{tenant}.next"
                listen = {"listen": f"unix:{folder}/{name}.sock", "mode": "0666"}
            else:
                taken = {entry["listen"].rpartition(":")[2] for entry in proxies.values()}
                free = {number for number in range(int(first), int(last) + 1) if str(number) not in taken}
                chosen = await asyncio.to_thread(_unused, free - {*failed})
                if chosen is None:  # one that failed may be had by now
                    free = {number for number in free if failed[number] < _FAILURES}
                    chosen = await asyncio.to_thread(_unused, free)
                if chosen is None:
                    raise Unavailable(
                        f"every port of {self._settings.expose_ports} is taken; set GATEWAY_EXPOSE_PORTS",
                        reason="port_taken",
                    )
                listen = {"listen": f"tcp:127.0.0.1:{chosen}"}
            proxy = {"type": "proxy", "connect": connect, **listen}
            try:
                await self._operate("PATCH", instance_path(tenant), {"devices": {device: proxy}})
                return
            except IncusError as error:
                # of a listener that cannot be had it says what its child said, or only that it ended
                log.info("tenant %s cannot be exposed by %s: %s", tenant, listen["listen"], error.message)
                failed[chosen or 0] += 1
                again = failed[0] < _FAILURES and attempt < _TRIES - 1
                if "proxy device" in error.message and again:
                    continue
                with translated(tenant):
                    raise

    async def finish(self, tenant: str, order: Order) -> None:
        config = {
            **domain_config(order.domain),
            PORT: str(order.recipe.port),
            HEALTH: order.recipe.health,
            DEPLOYMENT: "",
            CONTENT: "",  # of an upload before this one nothing is kept for this tenant's sake
            **_content(order.recipe),
        }
        with translated(tenant):
            await self._operate("PATCH", instance_path(tenant), {"config": config})

    async def service(self, tenant: str, side: Side) -> Service | None:
        unit = "site.service" if side == "live" else "site-next.service"
        try:
            return unit_status.read(await self._root(tenant, unit_status.SCRIPT, unit, seconds=_LOOK))
        except (GatewayError, TimeoutError):
            return None

    async def log(self, tenant: str, side: Side) -> str:
        unit = "site.service" if side == "live" else "site-next.service"
        try:
            script = f"journalctl --unit={unit} --lines=20 --output=cat --no-pager"
            return await self._root(tenant, script, seconds=_LOOK)
        except (GatewayError, TimeoutError):
            return ""

    def _places(self) -> tuple[str, str, str]:
        return self._settings.workspace, self._next, self._note

    def _folder(self, side: Side) -> str:
        return self._settings.workspace if side == "live" else self._next

    async def _root(
        self, name: str, script: str, *words: str, given: bytes = b"", seconds: float | None = None
    ) -> str:
        """Run a script as the container's root and return the end of what it printed. Raises `ExecFailed`."""
        spec = ExecSpec(
            ("/bin/sh", "-c", script, "sh", *words), cwd="/", user="root", stdin=True, merged=True
        )
        process = await self._commands.exec(name, spec)
        try:
            async with asyncio.timeout(seconds or self._settings.install_timeout):
                feeding = asyncio.create_task(_feed(process, given))
                try:
                    said = await lines(process, None, 0, _PRINTED)
                finally:
                    feeding.cancel()
                    await asyncio.gather(feeding, return_exceptions=True)
                exit_ = await process.wait()
        except BaseException:
            await asyncio.shield(process.kill(0))
            raise
        finally:
            await process.aclose()
        if exit_.code != 0:
            await self._if_full(said)
            _, unreadable, path = said.rpartition(f"\n{_UNREADABLE}")
            if unreadable:
                where = f"{self._settings.workspace}/{show(path[:_PATH_SHOWN])}"
                raise ExecFailed(
                    f"{where} cannot be read by the site's user, so that an update would lose it; "
                    "give it to that user (chown, chmod) or remove it",
                    reason="unreadable",
                )
            raise ExecFailed(f"preparing tenant {name} failed: {said.strip()[-500:]}", reason="script_failed")
        return said

    async def _if_full(self, said: str) -> None:
        """Raise what is right where a command that failed had no room: on its tenant's disk, or in the pool.

        It may also have filled a file system in memory, such as /tmp, which is its own affair.
        """
        if quota_was_reached(said):
            raise Unavailable(DISK_FULL, reason="disk_full")
        if not disk_was_full(said):
            return
        pool = (await self._making.profile())["devices"]["root"]["pool"]
        with translated(""):
            driver = (await self._incus.get(f"/1.0/storage-pools/{pool}"))["driver"]
            space = (await self._incus.get(f"/1.0/storage-pools/{pool}/resources"))["space"]
        if driver not in _SHARED:
            raise Unavailable(DISK_FULL, reason="disk_full")
        if space["used"] > space["total"] * _EMPTY:
            raise Unavailable(POOL_FULL, reason="disk_full")

    # --- what is ready before it is asked for -------------------------------------------------------

    def prepare(
        self, recipe: Recipe, prepared: Prepared, size: str = "small", quiet: Quiet = at_once
    ) -> None:
        self._stock.prepare(recipe, prepared, SIZES[size], quiet)

    async def tidy(self) -> None:
        await self._stock.tidy()

    async def spare(self, wanted: int) -> int:
        return await self._stock.spare(wanted)

    async def adopt(self, recipes: Sequence[Recipe]) -> None:
        await self._stock.adopt(recipes)

    async def _fill(self, name: str, recipe: Recipe) -> int:
        """Make a running instance what copies of it begin with; return the bytes of its files."""
        await self.push(name, "live", recipe, None)
        await self.reachable(name)
        await self.install(name, "live", recipe, lambda line: None)
        await self.start(name, "live", recipe)
        await self._warm(name, recipe)
        return number((await self._root(name, _SEAL))[-_SIZE:].strip()) << 10

    async def _warm(self, name: str, recipe: Recipe) -> None:
        """Wait until the site answers, have it do its first work, and see that it stays up under it."""
        found = _exposure(await self._making.placed(name), recipe.port)
        assert found is not None
        await answer(found.address, found.port, recipe.health, self._settings.verify_timeout)
        answered = time.monotonic()
        for path in recipe.warm:
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                await ask(found.address, found.port, path)
        with contextlib.suppress(TimeoutError):  # one that never rests is as warm as it gets
            async with asyncio.timeout(_REST_TIMEOUT):
                await self._at_rest(name)
        now = await self.service(name, "live")
        if now is not None and now.restarts and now.started > answered:
            raise ExecFailed("its site did not stay up while it was made ready", reason="unsteady")

    async def _at_rest(self, name: str) -> None:
        """Return once a container has hardly computed for a while.

        A dev server goes on after its answers: Vite bundles the dependencies and then writes them down, and
        one that is stopped before has each copy of it do all that again.
        """
        looks, before = 0, await self._computed(name)
        while looks < _REST_LOOKS:
            await asyncio.sleep(_REST_LOOK)
            now = await self._computed(name)
            looks = looks + 1 if now - before < _REST_SHARE * _REST_LOOK else 0
            before = now

    async def _computed(self, name: str) -> float:
        """Return the CPU seconds of a container."""
        with translated(name):
            state = await self._incus.state(name)
        return float(state["cpu"]["usage"]) / 1e9

    async def reachable(self, name: str) -> None:
        """Return once the container's network is up."""
        instance = await self._making.placed(name)
        found = _exposure(instance, 9)
        if found is not None:
            await network_up(found.address, self._settings.verify_timeout)

    # --- Incus --------------------------------------------------------------------------------------

    async def _init_pid(self, name: str) -> int:
        return int((await self._making.instance(name))["state"].get("pid") or 0)

    async def _operate(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        await self._making.operate(method, path, body)


def prepared_key(settings: Settings, recipe: Recipe, image: str) -> str:
    """Name what a recipe becomes on the image of that fingerprint, for one gateway."""
    unit = _unit(settings, recipe, "live")
    facts = f"{_GENERATION} {recipe.key} {image} {owner(settings)} {unit}"
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def _content(recipe: Recipe) -> dict[str, str]:
    return {CONTENT: recipe.key} if recipe.owner else {}


def _beside(settings: Settings, what: str) -> str:
    folder, _, name = settings.workspace.rpartition("/")
    return f"{folder}/.{name}-{what}"


def _unit(settings: Settings, recipe: Recipe, side: Side) -> str:
    workspace, port = settings.workspace, recipe.listens(side)
    # the next site sees its folder where the live one's is: absolute paths stay true when it becomes that
    more = f"BindPaths={_beside(settings, 'next')}:{workspace}\n" if side == "next" else ""
    return _UNIT.format(
        allowed=ALLOWED,
        share=SITE_SHARE,
        user=settings.workspace_user,
        workspace=workspace,
        port=port,
        environment=_environment(side)
        if side == "live"
        else f"/etc/site.env\nEnvironmentFile=-{_environment(side)}",
        # over whatever the site's own environment says of it: this is where it is looked for
        command=unit_words(("/usr/bin/env", f"PORT={port}", *recipe.command(port))),
        more=more,
    )


def _exposure(instance: Mapping[str, Any], port: int, device: str = "site") -> Exposure | None:
    """Return where an instance's site answers: through the proxy device where it has one, else directly."""
    address = next(
        (
            str(nic["ipv4.address"])
            for nic in instance["expanded_devices"].values()
            if nic.get("type") == "nic" and nic.get("ipv4.address")
        ),
        None,
    )
    address = address or leased(instance)
    if address is None:
        return None
    listen = (instance["expanded_devices"].get(device) or {}).get("listen", "")
    if listen.startswith("unix:"):
        return Exposure(address, port, listen.rpartition("/")[2])
    if listen.startswith("tcp:"):
        return Exposure(address, port, listen.removeprefix("tcp:"))
    return Exposure(address, port, f"{address}:{port}")


def _homes(instances: Sequence[Mapping[str, Any]]) -> Mapping[str, Sequence[str]]:
    """Return for each address the instances that have it, the eldest first.

    More than one has it after `incus copy`, which takes the address over; Incus then starts neither of them.
    """
    homes: dict[str, list[str]] = defaultdict(list)
    for instance in sorted(instances, key=lambda one: str(one.get("created_at"))):
        found = _exposure(instance, 9)
        if found is not None:
            homes[found.address].append(instance["name"])
    return homes


def _unused(ports: set[int]) -> int | None:
    """Return one of these ports that no program of this host has now, at random."""
    for port in random.sample(sorted(ports), len(ports)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the proxy does
            probe.bind(("127.0.0.1", port))
            return port
    return None


def _environment(side: Side) -> str:
    return "/etc/site.env" if side == "live" else "/etc/site-next.env"


def environment_file(env: Mapping[str, str]) -> str:
    """Write variables as systemd's EnvironmentFile wants them (systemd.exec(5)): quoted, one a line."""
    lines = []
    for name, value in env.items():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")
        lines.append(f'{name}="{escaped}"\n')
    return "".join(lines)


def unit_words(argv: Sequence[str]) -> str:
    """Write a command as ExecStart= takes it (systemd.service(5)): quoted, nothing of it expanded."""
    words = []
    for word in argv:
        escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
        words.append('"' + escaped.replace("\n", "\\n") + '"')
    return " ".join(words)


async def _feed(process: Process, data: bytes) -> None:
    view = memoryview(data)
    for start in range(0, len(view), 1 << 18):
        await process.write(bytes(view[start : start + (1 << 18)]))
    await process.close_stdin()
