"""Starting, losing and stopping an incusd of its own, so that the other tests' daemon stays."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.host import HostError
from gateway.host.daemon import Daemon
from gateway.host.requirements import Finding, doctor
from gateway.settings import Settings
from tests.integration import environment
from tests.integration.conftest import Container
from tests.live import LiveGateway, free_ports


@pytest.fixture(scope="module")
def daemon(incus_settings: Settings) -> Iterator[Daemon]:
    """A daemon that does not run yet, in a folder of its own; nothing of it is left afterwards."""
    made = Daemon(Path(f"{environment.INCUS_DIR}-daemon"))
    for _ in range(2):
        made.stop()
        made.erase()
        if not made.root.exists():
            break
    yield made
    made.stop()
    made.erase()


def silent(line: str) -> None:
    pass


def test_starts_once_and_is_ready(daemon: Daemon) -> None:
    """The first call starts it and returns when it is ready; the second finds it."""
    said: list[str] = []
    assert daemon.pid() is None
    assert daemon.ensure(said.append) is True
    assert daemon.answers()
    assert said == [f"starting incusd on {daemon.root}"]
    assert daemon.ensure(said.append) is False
    assert len(said) == 1
    assert daemon.pidfile.read_text() == f"{daemon.pid()}\n"
    with pytest.raises(HostError, match="still running"):
        daemon.erase()


def test_is_a_session_of_its_own(daemon: Daemon) -> None:
    """A closed terminal or an interrupted test does not reach it."""
    daemon.ensure(silent)
    pid = daemon.pid()
    assert pid is not None
    assert os.getsid(pid) == pid


def test_comes_back_after_a_crash(daemon: Daemon) -> None:
    """After SIGKILL its socket and pid file are still there, and neither stops the next start."""
    daemon.ensure(silent)
    killed = daemon.kill()
    assert daemon.socket.exists() and daemon.pidfile.exists()
    assert not daemon.answers()
    assert daemon.pid() is None
    with pytest.raises(HostError, match="no incusd is running"):
        daemon.kill()
    daemon.pidfile.write_text("1\n")  # the number may be another's by the time of the next start
    assert daemon.ensure(silent) is True
    assert daemon.pid() not in (None, killed, 1)


def test_stops_and_leaves_no_socket(daemon: Daemon) -> None:
    """After `stop` nothing waits to refuse the next caller; stopping again is no error."""
    daemon.ensure(silent)
    assert daemon.stop() is True
    assert not daemon.socket.exists() and not daemon.pidfile.exists()
    assert daemon.stop() is False


def test_two_daemons_do_not_know_each_other(daemon: Daemon) -> None:
    """Stopping one leaves the other: they are told apart by their folder."""
    other = environment.daemon()
    before = other.pid()
    daemon.ensure(silent)
    assert daemon.pid() != before
    daemon.stop()
    assert other.pid() == before
    assert other.answers()


def test_a_container_that_stops_waits_for_no_hook_of_lxcfs(shared_tenant: Container) -> None:
    """The package's hook, half a second of sleep at each stop, is left out of what containers include."""
    shipped = Path("/usr/share/lxc/config/common.conf.d/00-lxcfs.conf").read_text()
    assert "lxc.reboot.hook" in shipped, "the reason for this is gone: remove it"
    config = environment.INCUS_DIR / "run" / shared_tenant.name / "lxc.conf"
    (included,) = [line for line in config.read_text().splitlines() if line.startswith("lxc.include")]
    files = [*Path(included.split(" = ")[1]).iterdir()]
    assert [file.read_text() for file in files] == [
        shipped.replace("lxc.hook.post-stop = /usr/share/lxcfs/lxc.reboot.hook\n", "")
    ]


async def test_a_clustered_one_is_served(daemon: Daemon, tmp_path: Path) -> None:
    """By doctor, which looks at each member, and by serve; what setup does is held by `tests/cluster`."""
    daemon.ensure(silent)
    bridge = f"gwalone{environment.HOST}"  # not the one of an operator's gateway on this machine
    settings = Settings(incus_socket=daemon.socket, state_dir=tmp_path / "state", network=bridge)
    api, peers = free_ports(2)

    def incus(*words: str) -> None:
        subprocess.run(["incus", *words], env=daemon.environment, check=True, capture_output=True, timeout=60)

    def found(what: str) -> Finding:
        return next(finding for finding in doctor(settings) if finding.what == what)

    assert (found("Incus").ok, found("cluster").detail) == (True, "a single server")
    incus("config", "set", f"core.https_address=127.0.0.1:{api}")
    incus("cluster", "enable", "alone")
    assert found("Incus").ok and f"bridge {bridge} of alone" in found("cluster").detail
    given = {**environment.variables(settings), "GATEWAY_PEER_LISTEN": f"127.0.0.1:{peers}"}
    gateway = LiveGateway(given, tmp_path / "log")
    await gateway.start()
    try:
        async with gateway.http("*") as http, http.get("/v1/tenants") as answer:
            assert (answer.status, (await answer.json())["unanswered"]) == (200, [])
    finally:
        assert await gateway.stop() == 0


def test_erasing_takes_bridges_along(daemon: Daemon) -> None:
    """Else the next daemon in that folder could not have one of that name."""
    daemon.ensure(silent)
    bridge = f"gwerased{environment.HOST}"
    words = ["incus", "network", "create", bridge, "ipv4.address=none", "ipv6.address=none"]
    for _ in range(5):  # Incus looks at all bridges, and gives up where another worker's goes meanwhile
        made = subprocess.run(words, env=daemon.environment, capture_output=True, check=False)
        if b"does not exist" not in made.stderr:
            break
    assert made.returncode == 0, made.stderr
    assert Path("/sys/class/net", bridge).exists()
    daemon.kill()
    daemon.erase()
    assert not Path("/sys/class/net", bridge).exists()
