"""`doctor` finds what is missing or was altered on a real Incus, and leaves it so."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gateway.deployments.template import named
from gateway.host.requirements import doctor
from gateway.runtime.incus.golden_copies import GOLDEN_SNAPSHOT, golden_name, prepared_key
from gateway.settings import Settings
from tests.integration import environment
from tests.live import free_ports


def test_a_prepared_host_is_well(incus_settings: Settings) -> None:
    leave = ("gateway", "Caddy", "routes")  # nothing runs; see the tests of quickstart
    wrong = [str(f) for f in doctor(incus_settings) if not f.ok and f.what not in leave]
    # tenants of other tests on this Incus have had no gateway that limits their disks: see test_quotas
    assert [line for line in wrong if "inotify" not in line and "are not limited" not in line] == []


def test_what_is_missing_is_told_with_what_to_do_and_stays_missing(incus_settings: Settings) -> None:
    names = {"pool": "t-no-pool", "profile": "t-no-profile", "image": "t-no-image"}
    found = {f.what.split()[0]: f for f in doctor(incus_settings.model_copy(update=names))}
    for what, fix in (("storage", "setup"), ("profile", "setup"), ("image", "image build")):
        assert not found[what].ok and fix in found[what].detail
    assert b"t-no-profile" not in environment.incus("profile", "list").stdout


def test_a_template_of_which_no_copy_is_ready_is_a_hint_and_no_problem(
    incus_settings: Settings, tmp_path: Path
) -> None:
    """Those of another gateway do not count; one that is not finished does not, either."""
    settings = incus_settings.model_copy(update={"state_dir": tmp_path})
    target = json.loads(environment.incus("query", f"/1.0/images/aliases/{settings.image}").stdout)["target"]
    copy = golden_name(prepared_key(settings, named("static", settings).recipe(), target))
    environment.incus("init", "--empty", copy, "--storage", settings.pool)
    try:
        for ready in (False, True):
            if ready:
                environment.incus("snapshot", "create", copy, GOLDEN_SNAPSHOT)
            (found,) = [f for f in doctor(settings) if f.what == "templates"]
            assert (found.ok, found.hint) == (True, True)
            assert str(found).startswith("hint ")
            assert ("static" in found.detail) is not ready
            assert "vite-react" in found.detail
    finally:
        environment.incus("delete", "--force", copy)


def test_what_does_not_run_and_who_is_in_its_place(incus_settings: Settings, tmp_path: Path) -> None:
    """Gateway, Caddy and broker: not there, or a stranger at their ports."""
    free, admin = free_ports(2)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        settings = incus_settings.model_copy(
            update={"state_dir": tmp_path, "listen": f"127.0.0.1:{free}", "caddy_http": port}
            | {"caddy_admin": f"http://127.0.0.1:{admin}", "broker_socket": tmp_path / "none.sock"}
        )
        found = {f.what: f for f in doctor(settings)}
        assert not any(found[what].ok for what in ("gateway", "Caddy", "broker"))
        for what, fix in (
            *(("gateway", "deploy/quickstart"), ("broker", "systemctl start incus-gateway-broker")),
            *(("Caddy", "deploy/quickstart"), ("Caddy", f"{port} (")),
        ):
            assert fix in found[what].detail, found[what]
        listening = settings.model_copy(update={"listen": f"127.0.0.1:{port}"})
        stranger.close()
        with ThreadingHTTPServer(("127.0.0.1", port), BaseHTTPRequestHandler) as server:
            serving = threading.Thread(target=server.serve_forever)
            serving.start()
            found = {f.what: f for f in doctor(listening)}
            server.shutdown()
            serving.join()
        assert "is not a gateway" in found["gateway"].detail
