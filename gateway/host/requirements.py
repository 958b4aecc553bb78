"""What a host must have for a gateway and its tenants: one list, which `setup` mends and `doctor` checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from gateway.errors import GatewayError
from gateway.host import Report, SetupChange, Steps, checks
from gateway.host import setup as steps
from gateway.host.caddy_service import hand_over
from gateway.host.checks import Hint, ReadOnlyIncus
from gateway.host.cluster import quorum_problem
from gateway.host.setup import Host
from gateway.settings import Settings
from gateway.storage.state_dir import close

Step = Callable[[Host], str | None]


@dataclass(frozen=True, slots=True)
class Requirement:
    """One thing that a host must have.

    `check` returns what it found, or raises `HostError` with what is wrong and what to do, or `Hint`. `mend`
    returns what it changed, or None. Either may be missing.
    """

    name: str
    check: Step | None = None
    mend: Step | None = None
    met: str = "as it should be"
    """What is reported if `mend` has changed nothing."""
    local: bool = False
    """Whether it is required for the local runtime too."""
    asks_incus: bool = True
    """Whether it asks Incus's database, which does not answer without a quorum."""


def requirements(settings: Settings) -> Iterator[Requirement]:
    """Yield what a host with these settings must have, in the order in which it is made."""
    root, own_user = os.geteuid() == 0, settings.broker_socket is not None
    in_cluster = (settings.incus_socket.parent / "cluster.crt").exists()

    def of_settings(check: Callable[[Settings], str | None]) -> Step:
        return lambda host: check(host.settings)

    def both(name: str, step: Step) -> Requirement:
        return Requirement(name, step, step)

    closed = of_settings(close) if root and own_user else None
    yield Requirement(
        "state dir",
        of_settings(checks.state_dir),
        closed,
        "closed to other users",
        local=True,
        asks_incus=False,
    )
    if root and own_user:
        yield Requirement("folders of Caddy's routes", mend=of_settings(hand_over), local=True)
    yield Requirement(
        "inotify limits",
        of_settings(checks.inotify_limits),
        lambda host: steps.raise_limits(),
        "high enough, or cannot be raised here",
        asks_incus=False,
    )
    yield Requirement("Incus", of_settings(checks.daemon))
    yield Requirement("cluster", of_settings(checks.cluster))
    yield Requirement("standby copies", of_settings(checks.standby_copies))
    yield both(f"project {settings.incus_project}", steps.project)
    if in_cluster:
        yield Requirement("addresses of this member", mend=steps.member_addresses)
    yield both(f"firewall {steps.acl_name(settings)}", steps.firewall)
    yield both(f"bridge {settings.network}", steps.bridge)
    yield Requirement(f"forwarding of {settings.network}", mend=of_settings(steps.forwarding))
    yield Requirement(f"storage pool {settings.pool}", of_settings(checks.pool), steps.pool)
    guard = of_settings(steps.guard_addresses) if root else None
    if root:
        yield Requirement("disk quotas", mend=of_settings(steps.enforce_quotas), met="in force")
    yield Requirement(
        f"addresses of {settings.network}", of_settings(checks.address_guard), guard, "each tenant's own"
    )
    yield both(f"profile {settings.profile}", steps.tenant_profile)
    yield Requirement(f"ports of {settings.network}", mend=of_settings(steps.pin))
    yield Requirement(f"image {settings.image}", of_settings(checks.image))
    yield Requirement("templates", of_settings(checks.templates))
    yield Requirement("limits in force", of_settings(checks.limits_in_force))
    yield Requirement("domains", of_settings(checks.domains))
    yield Requirement("addresses", of_settings(checks.addresses))
    yield Requirement("broker", of_settings(checks.broker), asks_incus=False)
    yield Requirement("holder", of_settings(checks.holder), asks_incus=False)
    yield Requirement("gateway", of_settings(checks.gateway), local=True, asks_incus=False)
    yield Requirement("hosts", of_settings(checks.hosts), local=True, asks_incus=False)
    yield Requirement("Caddy", of_settings(checks.caddy), local=True, asks_incus=False)
    yield Requirement("routes", of_settings(checks.routes), local=True)
    yield Requirement("limits", of_settings(checks.shares), local=True)


def setup(settings: Settings, report: Report) -> list[SetupChange]:
    """Make everything that a tenant needs except its image; return the outcome of each step.

    The daemon must be running. Raises `HostError`, which names the failed step; earlier steps stay done, and
    the next run continues from there. A second run changes nothing.
    """
    run, host, local = Steps(report), Host(settings), settings.runtime == "local"
    for one in requirements(settings):
        if one.mend is not None and (one.local or not local):
            run.run(one.name, partial(one.mend, host), unchanged=one.met)
    if local:
        run.run("host", lambda: None, unchanged="the local runtime needs no setup")
    return run.changes


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check; `detail` says what was found, or what is wrong and what to do.

    A hint is no problem, but something that could be better.
    """

    what: str
    ok: bool
    detail: str
    hint: bool = False

    def __str__(self) -> str:
        word = "problem" if not self.ok else "hint" if self.hint else "ok"
        return f"{word:<8} {self.what}: {self.detail}"


def doctor(settings: Settings) -> list[Finding]:
    """Check everything, changing nothing; a check that cannot be run counts as a problem."""
    host, local = Host(settings, ReadOnlyIncus), settings.runtime == "local"
    silent = None if local else quorum_problem(settings)
    found = []
    for one in requirements(settings):
        if one.check is None or (local and not one.local):
            continue
        if silent is None or not one.asks_incus:  # otherwise each check would wait for the database
            found.append(_checked(one.name, one.check, host))
        elif one.name == "cluster":
            found.append(Finding(one.name, False, silent))
    return found


def _checked(name: str, check: Step, host: Host) -> Finding:
    try:
        return Finding(name, True, check(host) or "as it should be")
    except Hint as hint:
        return Finding(name, True, str(hint), hint=True)
    except GatewayError as error:
        return Finding(name, False, error.message)
    except OSError as error:
        return Finding(name, False, f"{error.strerror}: {error.filename}; run this as root")
