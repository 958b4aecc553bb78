"""Quickstart's part in Python on a real Incus: to a running demo, again, after a crash, down."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.host.quickstart import TENANT, Quickstart, ask
from gateway.settings import Settings
from tests.integration import environment

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def quickstart(
    incus_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Quickstart]:
    # Here as everywhere: the detached process, not the machine's systemd unit.
    monkeypatch.setattr("gateway.host.quickstart.systemd_runs", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = environment.settings(state_dir=tmp_path, listen=f"127.0.0.1:{port}")
    made = Quickstart(settings, CHECKOUT, "stamp", environment.variables(settings))
    environment.incus("delete", "--force", TENANT, check=False)
    yield made
    made.stop()
    environment.incus("delete", "--force", TENANT, check=False)


def test_to_a_running_demo_again_after_a_crash_and_down(
    quickstart: Quickstart, capfd: pytest.CaptureFixture[str]
) -> None:
    """One run brings the demo up; a second changes nothing; a killed gateway comes back; stop ends it."""
    quickstart.start()
    state = quickstart.status()
    assert state["running"] is True
    assert (state["runtime"], state["tenant"]) == ("incus", TENANT)
    assert quickstart.place.token.stat().st_mode & 0o777 == 0o600
    pid, token = quickstart._pid(), state["token"]
    listen = quickstart.settings.listen
    assert ask(listen, "GET", f"/v1/tenants/{TENANT}", token)[1]["status"] == "running"
    read = quickstart._tool(token, "Read", {"file_path": "/srv/site/index.html"})
    assert "It works" in read["content"][0]["text"]

    capfd.readouterr()
    begun = time.monotonic()
    quickstart.start()
    assert time.monotonic() - begun < 10
    assert (quickstart._pid(), quickstart.status()["token"]) == (pid, token)
    assert "changed" not in capfd.readouterr().out.replace("nothing to change", "")

    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    quickstart.place.token.write_text("damaged")
    environment.incus("stop", "--force", TENANT)
    quickstart.start()
    assert quickstart.status()["running"] is True
    assert quickstart._pid() not in (None, pid)

    assert quickstart.stop() == ["gateway"]  # this Incus was not started by it
    assert quickstart.status()["running"] is False
    assert environment.daemon().answers()
