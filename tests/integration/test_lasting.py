"""The tenant that tests borrow one after the other is as a new one for each of them."""

from __future__ import annotations

from tests.integration import environment
from tests.integration.conftest import Lasting

# files of the user and of root, and commands of both, one of them in a group as the gateway makes them
LEAVE = """
mkdir -p /srv/site/made/deep; chmod 000 /srv/site/made; touch /srv/site/-odd
su site -c 'mkdir -p ~/.local/state/x; touch /tmp/mine'
su site -c 'setsid sleep 1007 & setsid tail -f /dev/null &' >/dev/null 2>&1
g=/sys/fs/cgroup/unified; [ -d $g ] || g=/sys/fs/cgroup
mkdir -p $g/gateway/own/x/below
(echo 0 >$g/gateway/own/x/below/cgroup.procs; exec setsid tail -f /dev/null) >/dev/null 2>&1 &
setsid sleep 1007 >/dev/null 2>&1 &
until [ "$(pgrep -xc 'sleep|tail')" = 4 ]; do :; done
"""
LEFT = """
find /srv/site /home/site/.local/state /tmp -mindepth 1 -user site
find /srv/site -mindepth 1
pgrep -xa 'sleep|tail'
find /sys/fs/cgroup -path '*/gateway/*/*' -type d
"""


async def test_whatever_a_test_left_the_next_one_has_a_tenant_as_new(lasting_tenant: Lasting) -> None:
    """The same one, unless its configuration is another now."""
    tenant = await lasting_tenant.as_new()
    tenant.sh(LEAVE)
    environment.incus("snapshot", "create", tenant.name, "kept")
    assert len(tenant.sh(LEFT, check=False).splitlines()) > 8
    assert await lasting_tenant.as_new() == tenant
    assert tenant.sh(LEFT, check=False) == ""
    assert environment.snapshots(tenant.name) == []
    environment.incus("stop", "--force", tenant.name)
    assert await lasting_tenant.as_new() == tenant
    assert tenant.sh("echo runs") == "runs\n"
    environment.incus("config", "set", tenant.name, "user.left=behind")
    other = await lasting_tenant.as_new()
    assert other != tenant and other.sh("echo runs") == "runs\n"
