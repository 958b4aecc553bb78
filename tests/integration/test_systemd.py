"""The units under a real systemd: a restart leaves commands, a reload and a kill too, a stop ends them.

The gateway runs in a container, whose first process is systemd, and speaks to the incusd of the tests
outside. It has no host of its own there, so `setup` is left out, and commands are ended within their tenant.
"""

from __future__ import annotations

import asyncio
import os
import sys
import sysconfig
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.settings import Settings
from tests.integration import environment
from tests.integration.conftest import BOOTED, Container

ROOT = Path(__file__).parents[2]
HOME = "/var/lib/incus-gateway"
PROGRAM = f"{HOME}/venv/bin/incus-gateway"
CHECKOUT, PACKAGES = "/opt/checkout", "/opt/packages"
LINES = "".join(f"{number}\n" for number in range(1, 141))
# a shell may still say that what it waited for was terminated
COMMAND = "exec 2>/dev/null; for i in $(seq 1 140); do echo $i; sleep 0.05; done; exit 7"
READY = "until curl -sf 127.0.0.1:8080/readyz; do sleep 0.1; done"
# the successor is the main process, and one that cannot serve is not
RELOAD = """
    before=$(systemctl show --property=MainPID --value incus-gateway)
    systemctl reload incus-gateway && curl -sf 127.0.0.1:8080/readyz
    after=$(systemctl show --property=MainPID --value incus-gateway)
    [ "$before" != "$after" ] && [ "$(cat /proc/$after/comm)" = incus-gateway ] &&
    echo 'GATEWAY_MAX_EXECS=many' >>/var/lib/incus-gateway/quickstart.env &&
    ! systemctl reload incus-gateway && sed -i '$d' /var/lib/incus-gateway/quickstart.env &&
    systemctl show --property=StatusText incus-gateway | grep -q GATEWAY_MAX_EXECS &&
    [ "$after" = "$(systemctl show --property=MainPID --value incus-gateway)" ] &&
    curl -sf 127.0.0.1:8080/readyz || exit 1
"""
KILL = "systemctl kill --signal=KILL incus-gateway"

# an environment of its own with what ours has: the units cannot look into a home folder, where ours may be
PYTHON = Path(os.path.realpath(sys.executable))
LIBRARY = f"{HOME}/venv/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
UNITS = f"""
    mkdir -p {HOME}/venv/bin {LIBRARY} {HOME}-caddy /etc/systemd/system/incus-gateway.service.d
    mkdir -p /etc/systemd/system/incus-gateway-hold.service.d
    echo 'home = {PYTHON.parent}' > {HOME}/venv/pyvenv.cfg
    ln -sfn {PYTHON} {HOME}/venv/bin/python
    printf '%s\\n' {CHECKOUT} {CHECKOUT}/clients/python {PACKAGES} > {LIBRARY}/checkout.pth
    sed '1s:.*:#!{HOME}/venv/bin/python:' {CHECKOUT}-bin/incus-gateway > {PROGRAM}
    chmod +x {PROGRAM}
    cp {CHECKOUT}/deploy/*.service /etc/systemd/system
    printf '[Service]\\nExecStartPre=\\n' > /etc/systemd/system/incus-gateway.service.d/zz.conf
"""
# docs/operations.md has the same; what there `setup` does follows
OWN_USER = f"""
    useradd --system --user-group --no-create-home incus-gateway
    groupadd incus-admin
    chgrp incus-admin $INCUS_SOCKET && chmod 660 $INCUS_SOCKET
    cp {CHECKOUT}/deploy/incus-gateway-unprivileged.conf /etc/systemd/system/incus-gateway.service.d
    cp {CHECKOUT}/deploy/incus-gateway-hold-unprivileged.conf /etc/systemd/system/incus-gateway-hold.service.d
    chgrp incus-gateway {HOME} && chmod 710 {HOME} && chown incus-gateway {HOME}-caddy
"""


@pytest.fixture(scope="module")
async def machine(incus_settings: Settings) -> AsyncIterator[Container]:
    """A container with systemd that has the checkout, its Python, and the incusd of the tests."""
    made = Container(f"t-systemd-{os.getpid()}")
    shares = {
        CHECKOUT: ROOT,
        f"{CHECKOUT}-bin": Path(sys.prefix, "bin"),
        PACKAGES: Path(sysconfig.get_path("platlib")),
        **{str(path): path for path in (incus_settings.incus_socket.parent, PYTHON)},
        sysconfig.get_path("stdlib"): Path(sysconfig.get_path("stdlib")),
    }
    try:
        await asyncio.to_thread(
            environment.incus,
            *("create", incus_settings.image, made.name, "--storage", incus_settings.pool),
            *("--network", incus_settings.network, "--config", "security.privileged=true"),
            *("--config", f"{environment.OWNER}={environment.owner(os.getpid())}"),
        )
        for number, (path, source) in enumerate(shares.items()):
            words = ("config", "device", "add", made.name, f"share{number}", "disk")
            await asyncio.to_thread(environment.incus, *words, f"source={source}", f"path={path}")
        await asyncio.to_thread(environment.incus, "start", made.name)
        await asyncio.to_thread(made.sh, BOOTED)
        yield made
    finally:
        await asyncio.to_thread(environment.incus, "delete", "--force", made.name)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("own_user", [False, True], ids=["root", "own-user"])
async def test_a_restart_leaves_commands_and_a_stop_ends_them(
    machine: Container, incus_settings: Settings, shared_tenant: Container, own_user: bool
) -> None:
    """As root, and as a user of its own beside the broker."""
    socket = incus_settings.incus_socket
    settings = "\n".join(f"{name}={value}" for name, value in environment.variables(incus_settings).items())
    state = f"{HOME}/state" if own_user else HOME

    async def sh(script: str, *, check: bool = True) -> str:
        return await asyncio.to_thread(machine.sh, textwrap.dedent(script), check=check, timeout=60)

    async def followed() -> str:
        """Return what a client has of a command that it follows to the end, and its exit code."""
        client = f"""
            export GATEWAY_TOKEN=$({PROGRAM} token --tenant {shared_tenant.name} --scope exec --ttl 1h)
            {PROGRAM} exec {shared_tenant.name} -- sh -c '{COMMAND}'; echo code $?
        """
        return await sh(f"export GATEWAY_STATE_DIR={state}\n{textwrap.dedent(client)}", check=False)

    async def during(script: str) -> str:
        client = asyncio.create_task(followed())
        await asyncio.to_thread(shared_tenant.sh, "until pgrep -x sleep; do :; done")
        await sh(script)
        return await client

    before = socket.stat()
    try:
        await sh(f"INCUS_SOCKET={socket}\nset -e{UNITS}{OWN_USER if own_user else ''}")
        kept = "\n".join(line for line in settings.splitlines() if "STATE_DIR" not in line)
        await sh(f"cat > {HOME}/quickstart.env <<'END'\n{kept}\nGATEWAY_LISTEN=127.0.0.1:8080\nEND")
        await sh("systemctl daemon-reload; systemctl restart incus-gateway-hold incus-gateway")
        await sh(READY)

        survived = await during(f"{RELOAD}systemctl restart incus-gateway; {READY}; {KILL}; {READY}")
        assert survived == f"{LINES}code 7\n"
        stopped = await during("systemctl stop incus-gateway")
        assert stopped.endswith("code 143\n") and LINES.startswith(stopped.removesuffix("code 143\n"))
        left = await asyncio.to_thread(shared_tenant.sh, "pgrep -c sleep", check=False)
        assert left.strip() == "0"
    except BaseException:
        print(await sh("journalctl --no-pager --output=cat --lines=60 --unit='incus-gateway*'", check=False))
        raise
    finally:
        await sh("systemctl stop incus-gateway incus-gateway-hold incus-gateway-broker", check=False)
        os.chown(socket, before.st_uid, before.st_gid)
        socket.chmod(before.st_mode & 0o777)
