"""Quickstart's part in Python on a real Incus: to a running demo, again, after a crash, down."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.auth import issuing
from gateway.host import caddy_service
from gateway.host.gateway_process import ask, parse_environment
from gateway.host.quickstart import TENANT, Quickstart
from gateway.host.requirements import doctor
from gateway.settings import Settings
from tests.integration import environment
from tests.live import free_ports

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def quickstart(incus_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Quickstart]:
    # Here as everywhere: the detached process, not the machine's systemd unit.
    monkeypatch.setattr("gateway.host.gateway_process.systemd_runs", lambda: False)
    monkeypatch.setattr("gateway.host.caddy_service.systemd_runs", lambda: False)
    listen, http, https, ask_port = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="gw-quick-") as place:
        Path(place).chmod(0o755)  # it is closed, whatever it was; Caddy is no root
        settings = environment.settings(
            state_dir=Path(place),
            listen=f"127.0.0.1:{listen}",
            caddy_http=http,
            caddy_https=https,
            caddy_ask=ask_port,
            golden=False,  # a killed gateway's is looked after by the next one of its state dir alone
        )
        made = Quickstart(settings, CHECKOUT, "stamp", environment.variables(settings))
        environment.incus("delete", "--force", TENANT, check=False)
        yield made
        made.stop()
        environment.incus("delete", "--force", TENANT, check=False)
        shutil.rmtree(f"{place}-caddy", ignore_errors=True)


def seen(quickstart: Quickstart) -> str:
    """Return what a browser is shown at the printed address; it looks `*.localhost` up as this machine."""
    url = quickstart.status()["site_url"]
    port = quickstart.settings.caddy_http
    assert url == "http://demo.localhost" + ("" if port == 80 else f":{port}")
    status, text = ask(f"127.0.0.1:{port}", "GET", "/", host=f"demo.localhost:{port}")
    assert status == 200
    return str(text)


def test_to_a_running_demo_again_after_a_crash_and_down(
    quickstart: Quickstart, capfd: pytest.CaptureFixture[str]
) -> None:
    """One run brings the demo up; a second changes nothing, and Caddy is not restarted for another setting; a
    killed gateway comes back; stop ends it.
    """
    quickstart.start()
    state = quickstart.status()
    assert state["running"] is True
    assert (state["runtime"], state["tenant"]) == ("incus", TENANT)
    assert quickstart.place.token.stat().st_mode & 0o777 == 0o600
    pid, token = quickstart.gateway.pid(), state["token"]
    listen = quickstart.settings.listen
    assert ask(listen, "GET", f"/v1/tenants/{TENANT}", token)[1]["status"] == "running"
    assert ask(listen, "GET", "/v1/session", token)[1]["subject"] == issuing.caller()
    assert "Your site is up." in seen(quickstart)
    caddy = quickstart.front.pid()
    assert caddy is not None
    looked = {finding.what: finding for finding in doctor(quickstart.settings)}
    for what in ("gateway", "Caddy", "routes", "broker"):
        assert looked[what].ok, looked[what]
    owner = Path(f"/proc/{caddy}").owner()
    assert owner == "caddy"
    place = quickstart.place
    modes = {path.name: path.stat().st_mode & 0o777 for path in (place.root, *place.root.glob("*.log"))}
    assert modes == {place.root.name: 0o700, "gateway.log": 0o600}
    assert quickstart.front.log.stat().st_mode & 0o777 == 0o600

    capfd.readouterr()
    begun = time.monotonic()
    quickstart.start()
    assert time.monotonic() - begun < 10
    assert (quickstart.gateway.pid(), quickstart.status()["token"]) == (pid, token)
    assert quickstart.front.pid() == caddy
    assert "changed" not in capfd.readouterr().out.replace("nothing to change", "")

    other = caddy_service.CaddyService(quickstart.settings.model_copy(update={"caddy_retry": 31.0}))
    assert other.start(CHECKOUT / "deploy") == f"loaded the new configuration, pid {caddy}"
    assert '"try_duration": 31000000000' in json.dumps(other.running())  # nanoseconds

    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.kill(caddy, signal.SIGKILL)
    routes = quickstart.settings.caddy_folder / "routes"
    (routes / "demo.localhost").rename(routes / "lost.localhost")
    looked = {finding.what: finding for finding in doctor(quickstart.settings)}
    assert not looked["routes"].ok
    assert "missing: demo.localhost; too many: lost.localhost" in looked["routes"].detail
    quickstart.place.token.write_text("damaged")
    environment.incus("stop", "--force", TENANT)
    quickstart.start()
    assert quickstart.status()["running"] is True
    assert quickstart.gateway.pid() not in (None, pid)
    assert quickstart.front.pid() not in (None, caddy)
    assert "Your site is up." in seen(quickstart)

    assert quickstart.stop() == ["gateway", "Caddy"]  # this Incus was not started by it
    assert quickstart.status()["running"] is False
    assert quickstart.status()["site_url"] is None
    assert environment.daemon().answers()


def test_without_incus_the_same_site_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The local runtime serves it, where Caddy was found a port; it has the same after another start."""
    monkeypatch.setattr("gateway.host.gateway_process.systemd_runs", lambda: False)
    monkeypatch.setattr("gateway.host.caddy_service.systemd_runs", lambda: False)
    monkeypatch.setattr("gateway.host.caddy_service._user", lambda: None)  # pytest's folders are one user's
    listen, *others = free_ports(4)
    usual = dict(zip(caddy_service._PORTS, [(port, port) for port in others], strict=True))
    monkeypatch.setattr("gateway.host.caddy_service._PORTS", usual)  # others look for the real ones
    settings = Settings(runtime="local", state_dir=tmp_path, listen=f"127.0.0.1:{listen}")
    quickstart = Quickstart(settings, CHECKOUT, "stamp", environment.variables(settings))
    try:
        quickstart.start()
        assert "Your site is up." in seen(quickstart)
        port = quickstart.settings.caddy_http
        assert quickstart.stop() == ["gateway", "Caddy"]
        again = parse_environment(quickstart.place.environment.read_text())
        assert again["GATEWAY_CADDY_HTTP"] == str(port)
        quickstart.start()
        assert "site demo.localhost: already running at http://demo.localhost" in capfd.readouterr().out
        assert "Your site is up." in seen(quickstart)
    finally:
        quickstart.stop()
