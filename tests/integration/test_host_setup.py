"""Preparing the host on a real incusd: idempotent, and drift is put right."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.host import HostError, SetupChange
from gateway.host.daemon import Daemon
from gateway.host.image import build_image
from gateway.host.incus import IncusAdmin, Missing
from gateway.host.requirements import setup
from gateway.host.setup import acl_name
from gateway.rootfs.instance_record import MANAGED
from gateway.settings import Settings
from tests.integration import environment
from tests.integration.conftest import Container, MakeTenant


def altered(changes: list[SetupChange]) -> set[str]:
    """Return the kinds of what changed, but for ports: each tenant that another test starts has a new one."""
    return {change.step.split()[0] for change in changes if change.changed} - {"ports"}


def test_second_setup_changes_nothing_and_says_so(incus_settings: Settings) -> None:
    """On a prepared host every step of setup and image reports that nothing changed."""
    lines: list[str] = []
    changes = setup(incus_settings, lines.append) + build_image(incus_settings, lines.append)
    assert altered(changes) == set()
    assert len(lines) == len(changes) == 11
    assert all(line.endswith(" s)") for line in lines)


def test_drift_is_repaired_and_foreign_keys_stay(incus_settings: Settings) -> None:
    """What someone weakened by hand in profile, ACL and bridge is put right; what they added stays."""
    profile, acl, bridge = incus_settings.profile, acl_name(incus_settings), incus_settings.network
    environment.incus("profile", "set", profile, "limits.memory.enforce=soft", "environment.OURS=kept")
    environment.incus("profile", "device", "unset", profile, "eth0", "security.port_isolation")
    environment.incus("network", "acl", "rule", "remove", acl, "egress", "action=drop", "--force")
    for _ in range(5):  # Incus fails where a container stops while it lists the bridge's ports
        if environment.incus("network", "set", bridge, "security.acls=", check=False).returncode == 0:
            break
    assert altered(setup(incus_settings, lambda line: None)) == {"firewall", "bridge", "profile"}
    incus = IncusAdmin(incus_settings.incus_socket)
    found = incus.get("profiles", profile)
    assert found["config"]["limits.memory.enforce"] == "hard"
    assert found["config"]["environment.OURS"] == "kept"
    assert found["config"][MANAGED] == "true"
    assert found["devices"]["eth0"]["security.port_isolation"] == "true"
    assert {rule["action"] for rule in incus.get("network-acls", acl)["egress"]} == {"drop", "allow"}
    assert incus.get("networks", bridge)["config"]["security.acls"] == acl
    environment.incus("profile", "unset", profile, "environment.OURS")
    assert altered(setup(incus_settings, lambda line: None)) == set()


def test_a_tenants_processes_go_first(tenant: Container) -> None:
    """Where the host's memory is short, its commands too."""
    for path in ("/proc/1/oom_score_adj", "/proc/self/oom_score_adj"):
        assert environment.incus("exec", tenant.name, "--", "cat", path).stdout == b"300\n"


async def test_profile_marks_a_tenant(incus_settings: Settings, make_tenant: MakeTenant) -> None:
    """The runtime's mark reaches an instance's expanded configuration."""
    tenant = await make_tenant(start=False)
    found = IncusAdmin(incus_settings.incus_socket).get("instances", tenant.name)
    assert found["expanded_config"][MANAGED] == "true"


def test_other_project_gets_its_own_profile_and_image(incus_settings: Settings) -> None:
    """Everything of the tenants lives in the configured project; a second setup finds it there."""
    elsewhere = incus_settings.model_copy(update={"incus_project": "t-host-project"})
    incus = IncusAdmin(elsewhere.incus_socket, "t-host-project")
    try:
        setup(elsewhere, lambda line: None)
        build_image(elsewhere, lambda line: None)
        assert incus.get("profiles", elsewhere.profile)["config"][MANAGED] == "true"
        again = setup(elsewhere, lambda line: None) + build_image(elsewhere, lambda line: None)
        assert altered(again) == set()
    finally:
        for name in incus.names("images"):
            incus.delete("images", name)
        for name in incus.names("profiles"):
            if name != "default":
                incus.delete("profiles", name)
        IncusAdmin(elsewhere.incus_socket).delete("projects", "t-host-project")


def test_missing_daemon_is_an_error_that_says_what_to_do(tmp_path: Path, incus_settings: Settings) -> None:
    """Without a daemon, setup ends with one sentence, not with a traceback of the library."""
    away = incus_settings.model_copy(update={"incus_socket": tmp_path / "unix.socket"})
    with pytest.raises(HostError, match="is it running"):
        setup(away, lambda line: None)


def test_unknown_object_is_missing(incus_settings: Settings) -> None:
    """Incus's 404 is told apart from every other refusal."""
    with pytest.raises(Missing):
        IncusAdmin(incus_settings.incus_socket).get("profiles", "no-such-profile")


def test_bridge_that_overlaps_the_host_names_the_setting(incus_settings: Settings) -> None:
    """A subnet that the host uses already is refused with the setting that changes it."""
    clash = incus_settings.model_copy(update={"network": "gwtestbr99"})
    with pytest.raises(HostError, match="GATEWAY_NETWORK_IPV4"):
        setup(clash, lambda line: None)


def test_daemon_is_recognised_by_its_folder(incus_settings: Settings, tmp_path: Path) -> None:
    """The tests' daemon is found with and without its pid file, and is not mistaken for another folder's."""
    daemon = Daemon.at(incus_settings.incus_socket)
    pid = daemon.pid()
    assert pid is not None
    kept = daemon.pidfile.read_bytes() if daemon.pidfile.exists() else None
    daemon.pidfile.write_text("1\n")
    try:
        assert daemon.pid() == pid
    finally:
        daemon.pidfile.write_bytes(kept if kept is not None else f"{pid}\n".encode())
    assert Daemon(tmp_path).pid() is None
    assert daemon.ensure(lambda line: None) is False
