"""The base image as its user meets it."""

from __future__ import annotations

import subprocess

from tests.integration import environment
from tests.integration.conftest import BOOTED, Container
from tests.waits import until_true


def test_boots_without_a_failed_unit(shared_tenant: Container) -> None:
    """systemd reports `running`, so that a tenant's own failed unit stands out."""
    assert (
        shared_tenant.sh("systemctl is-system-running; systemctl --failed --no-legend").strip() == "running"
    )


def test_an_instance_without_an_address_asks_for_one(shared_tenant: Container) -> None:
    """networkd takes address and route from the bridge, which is its resolver too."""
    bridge = f"{environment.NETWORK}.1"
    assert shared_tenant.address().startswith(f"{environment.NETWORK}.")
    assert shared_tenant.sh("ip -4 route show default").startswith(f"default via {bridge} ")
    assert shared_tenant.sh("cat /etc/resolv.conf") == f"nameserver {bridge}\n"
    assert shared_tenant.sh("cat /etc/default/bridge") == f"BRIDGE={bridge}\n"
    assert shared_tenant.sh("ip -6 addr show dev eth0") == ""


def test_one_with_an_address_runs_next_to_nothing(tenant: Container) -> None:
    """Of a tenant only systemd and its journal run; what else answers starts when it is asked."""
    address = tenant.address()
    early = (
        f"lxc.net.0.ipv4.address = {address}/24\nlxc.net.0.ipv4.gateway = {address.rpartition('.')[0]}.1\n"
    )
    environment.incus("stop", "--force", tenant.name)
    environment.incus("config", "set", tenant.name, "raw.lxc", early)
    mac = "02:00:5e:00:00:77"  # the host knows the address by another
    # with the address, too: Incus would let it use only the first one that is free
    given = f"hwaddr={mac}", f"ipv4.address={address}"
    environment.incus("config", "device", "override", tenant.name, "eth0", *given)
    environment.incus("start", tenant.name)
    tenant.sh(BOOTED)
    assert tenant.sh("systemctl is-system-running; systemctl --failed --no-legend").strip() == "running"
    assert tenant.address() == address
    known = ["ip", "neighbour", "show", address]
    until_true(lambda: mac in subprocess.run(known, capture_output=True, text=True).stdout)  # by a ping
    tenant.sh("while pgrep -x ping >/dev/null; do sleep 0.05; done")
    assert tenant.sh("ps -e -o comm= | sort").split() == ["ps", "sh", "sort", "systemd", "systemd-journal"]
    assert tenant.sh("getent ahostsv4 localhost; ip -4 route show default").count("\n") > 1
    # a user of the tenant asks systemd over the bus
    assert tenant.sh("systemctl is-active systemd-journald", user=1000).strip() == "active"


def test_user_site_owns_its_workspace(shared_tenant: Container) -> None:
    """The user of every command: uid and gid 1000, a home, a workspace that it may write."""
    assert shared_tenant.sh("id -u; id -g; echo $HOME", user=1000).split()[:2] == ["1000", "1000"]
    assert shared_tenant.sh("stat -c %U:%G:%a /srv/site /home/site").split()[0] == "site:site:755"
    shared_tenant.sh("touch /srv/site/.probe && rm /srv/site/.probe", user=1000)


def test_bun_runs_javascript_as_site(shared_tenant: Container) -> None:
    """Bun is on everybody's PATH and runs code, beside a Node that is Node (`test_agent_commands`)."""
    assert shared_tenant.sh("bun -e 'console.log(6 * 7)'", user=1000).strip() == "42"


def test_bun_installs_from_the_registry(shared_tenant: Container) -> None:
    """DNS, NAT and certificates work together: a package arrives."""
    said = shared_tenant.sh(
        "d=$(mktemp -d) && cd $d && echo '{}' > package.json && HOME=$d bun add is-number@7.0.0 2>&1; "
        "test -f node_modules/is-number/package.json && echo arrived; rm -rf $d",
        user=1000,
    )
    assert "arrived" in said, said


def test_nothing_of_the_builds_haste_is_left(shared_tenant: Container) -> None:
    """A tenant's own packages are flushed to the disk, and it has no hardware to look up."""
    assert "unsafe" not in shared_tenant.sh("cat /etc/dpkg/dpkg.cfg.d/*")
    assert (
        shared_tenant.sh("ls /usr/lib/udev/hwdb.bin /usr/lib/udev/hwdb.d/* 2>&1 | grep -v 'No such' || true")
        == ""
    )


def test_two_tenants_differ_in_machine_id(shared_tenant: Container, tenant: Container) -> None:
    """The image carries no machine id; each container makes its own."""
    ids = [
        c.sh("systemd-machine-id-setup --print 2>/dev/null; cat /etc/machine-id").split()[-1]
        for c in (shared_tenant, tenant)
    ]
    assert len(set(ids)) == 2


def test_journal_is_kept_on_disk_and_small(shared_tenant: Container) -> None:
    """The site's log survives a restart and cannot eat the quota."""
    assert shared_tenant.sh("ls -d /var/log/journal/*").strip()
    assert "SystemMaxUse=64M" in shared_tenant.sh("systemd-analyze cat-config systemd/journald.conf")
