"""Quickstart's own parts: its files, its messages, how it finds and queries the gateway."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gateway.host import HostError, caddy_service, gateway_process
from gateway.host.gateway_process import (
    ask,
    base_url,
    environment_of,
    expires,
    format_environment,
    parse_environment,
    write_private,
)
from gateway.host.quickstart import Quickstart, farewell, main
from gateway.settings import Settings
from tests.live import free_ports

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def gateway() -> Iterator[str]:
    """Something that answers HTTP as a gateway would; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"path": self.path, "token": self.headers.get("Authorization")}).encode()
            self.send_response(200 if self.path == "/readyz" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def made(tmp_path: Path, **fields: Any) -> Quickstart:
    return Quickstart(Settings(state_dir=tmp_path, runtime="local", **fields), CHECKOUT, "stamp", {})


def test_environment_survives_the_file() -> None:
    """Quotes, dollars, backslashes and newlines survive the round trip."""
    variables = {"GATEWAY_A": 'say "hi" $HOME `id` \\n', "GATEWAY_B": "", "GATEWAY_C": "two\nlines"}
    assert parse_environment(format_environment(variables)) == variables


def test_a_clients_token_and_address_become_no_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who exported the demo's token and ran quickstart again could then use no other tenant."""
    variables = {"GATEWAY_TOKEN": "demo's", "GATEWAY_URL": "http://other:1", "GATEWAY_RUNTIME": "local"}
    (tmp_path / "quickstart.env").write_text(format_environment({**variables, "GATEWAY_MAX_TENANTS": "7"}))
    monkeypatch.setattr(os, "environ", {**os.environ, **variables, "GATEWAY_STATE_DIR": str(tmp_path)})
    os.environ["GATEWAY_LISTEN"] = f"127.0.0.1:{free_ports(1)[0]}"
    kept = environment_of(tmp_path)
    assert not {"GATEWAY_TOKEN", "GATEWAY_URL"} & kept.keys()
    assert (kept["GATEWAY_RUNTIME"], kept["GATEWAY_MAX_TENANTS"]) == ("local", "7")
    main(["status", str(CHECKOUT), "stamp"])
    assert not {"GATEWAY_TOKEN", "GATEWAY_URL"} & os.environ.keys()  # nor what the demo is deployed with


def test_token_file_is_private_from_its_first_byte(tmp_path: Path) -> None:
    """Mode 0600, even if an older file was readable by all; the old file is replaced atomically."""
    file = tmp_path / "token"
    file.write_text("old")
    file.chmod(0o644)
    write_private(file, "new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["token"]


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("0.0.0.0:81", "http://127.0.0.1:81"),
        ("[::1]:81", "http://[::1]:81"),
        ("/run/gateway.sock", "unix:/run/gateway.sock"),
    ],
)
def test_url_is_one_that_a_browser_here_can_open(listen: str, url: str) -> None:
    """The wildcard address is replaced by one that can be opened."""
    assert base_url(listen) == url


def test_expiry_of_what_is_no_token_is_the_past() -> None:
    """A damaged token file leads to a new token, not to a failure."""
    payload = base64.urlsafe_b64encode(json.dumps({"exp": 17}).encode()).decode().rstrip("=")
    assert expires(f"x.{payload}.y") == 17
    assert {expires(text) for text in ("", "x", "a.b.c", "a.e30.c", "a.W10.c")} == {0.0}


def test_asks_the_gateway_past_any_proxy(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request goes directly to the address, with the token."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    status, answer = ask(gateway, "GET", "/readyz", token="t")
    assert (status, answer) == (200, {"path": "/readyz", "token": "Bearer t"})


def test_nobody_there_is_an_os_error(tmp_path: Path) -> None:
    """TCP, a unix socket and a peer that does not speak HTTP fail in the same way."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for listen in (f"127.0.0.1:{port}", str(tmp_path / "none.sock")):
        with pytest.raises(OSError):
            ask(listen, "GET", "/readyz", timeout=1)


def test_port_of_another_is_refused_with_the_setting(gateway: str, tmp_path: Path) -> None:
    """Quickstart says which address is taken and how to choose another."""
    with pytest.raises(HostError, match=r"GATEWAY_LISTEN=127\.0\.0\.1:\d+ deploy/quickstart"):
        made(tmp_path, listen=gateway).gateway._check_port()


def test_stale_pid_file_is_not_believed(tmp_path: Path) -> None:
    """A reused pid is not mistaken for the gateway, and stop leaves that process alone."""
    start = made(tmp_path)
    start.place.pidfile.write_text(f"{os.getpid()}\n")
    assert start.gateway.pid() is None
    assert start.stop() == []
    assert not start.place.pidfile.exists()


def test_gateway_of_the_unit_is_found_whatever_its_state_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drop-in may give it another user and state dir; a unit for another place is not ours."""
    units, bin_ = tmp_path / "units", tmp_path / "bin"
    for folder in (units, bin_):
        folder.mkdir()
    (bin_ / "systemctl").write_text(f'#!/bin/sh\n[ "$1" != show ] || echo {os.getpid()}\n')
    (bin_ / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setattr(gateway_process, "systemd_runs", lambda: True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(gateway_process, "UNITS", units)
    start = made(tmp_path / "here")
    assert start.gateway.pid() is None
    (units / gateway_process.UNIT).write_text(f"ExecStart={start.place.root}/venv/bin/incus-gateway serve\n")
    assert start.gateway.pid() == os.getpid()
    assert made(tmp_path / "there").gateway.pid() is None
    assert start.gateway.stop()  # by the unit alone: a pid that is another's by then is left alone


def test_gateway_without_a_pid_file_is_found_and_stopped(tmp_path: Path) -> None:
    """A gateway is found even if the run that started it was killed right afterwards."""
    start = made(tmp_path)
    command = start.gateway.command = tmp_path / "incus-gateway"
    command.write_text(f"#!{sys.executable}\nimport time\nprint('up', flush=True)\ntime.sleep(60)\n")
    command.chmod(0o755)
    environment = {**os.environ, "GATEWAY_STATE_DIR": str(tmp_path)}
    with subprocess.Popen([command, "serve"], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        other = made(tmp_path / "other")
        other.gateway.command = command
        process.stdout.readline()
        assert (start.gateway.pid(), other.gateway.pid()) == (process.pid, None)
        reaper = threading.Thread(target=process.wait)
        reaper.start()
        assert start.stop() == ["gateway"]
        reaper.join()
    assert start.gateway.pid() is None


def test_status_of_nothing(tmp_path: Path) -> None:
    """Every field of the contract is there before anything ran."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert made(tmp_path, listen=f"127.0.0.1:{port}").status() == {
        "running": False,
        "runtime": "local",
        "url": f"http://127.0.0.1:{port}",
        "editor_url": f"http://127.0.0.1:{port}/#demo",
        "site_url": None,
        "tenant": "demo",
        "token": None,
    }


def test_a_foreign_server_on_the_port_is_not_ours(gateway: str, tmp_path: Path) -> None:
    """`running` means this state dir's gateway, not whatever answers on the address."""
    assert made(tmp_path, listen=gateway).status()["running"] is False


def test_farewell_shows_url_token_and_three_commands(tmp_path: Path) -> None:
    """The closing message has everything needed to continue."""
    state = made(tmp_path).status() | {"token": "secret-token"}
    text = farewell(state, "incus-gateway", Path("/x/quickstart"))
    assert state["url"] in text and "secret-token" in text
    tries = text.partition("Try:\n")[2].splitlines()
    assert len([line for line in tries if line.startswith("  ")]) == 3


def test_the_end_of_the_log_steers_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also that of an earlier gateway, which logged tenants' text unescaped."""
    (tmp_path / "gateway.log").write_text("a command said \x1b]0;owned\x07\u202e\x9b2J\n")
    monkeypatch.setattr(os, "environ", {**os.environ, "GATEWAY_STATE_DIR": str(tmp_path)})
    os.environ |= {"GATEWAY_RUNTIME": "local", "GATEWAY_LISTEN": f"127.0.0.1:{free_ports(1)[0]}"}
    assert main(["status", str(CHECKOUT), "stamp"]) == 1
    said = capsys.readouterr().out
    assert "a command said \\x1b]0;owned\\x07\\u202e\\x9b2J" in said
    assert not set("\x1b\x07\u202e\x9b") & set(said)


def test_wrong_settings_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An invalid setting is reported in one line with its name."""
    monkeypatch.setattr(os, "environ", {**os.environ, "GATEWAY_STATE_DIR": str(tmp_path)})
    os.environ["GATEWAY_TENANT_PROCESSES"] = "many"
    assert main(["status", str(CHECKOUT), "stamp"]) == 1
    assert "GATEWAY_TENANT_PROCESSES" in capsys.readouterr().out


def test_caddy_gets_ports_that_are_free_unless_they_were_said(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        taken = other.getsockname()[1]
        said = Settings(state_dir=tmp_path, caddy_https=taken, caddy_admin="http://127.0.0.1:1")
        choice = caddy_service.chosen(said)
        choice.pop("caddy_dir", None)  # only where Caddy is to be another user
        assert choice.keys() == {"caddy_http", "caddy_ask"}
        assert len({*choice.values()}) == 2
        assert [caddy_service.in_use(port) for port in choice.values()] == [None, None]
        assert caddy_service.in_use(taken) is not None
        settings = said.model_copy(update=caddy_service.chosen(said))
        assert caddy_service.chosen(settings) == {}, "once chosen they stay"
        with pytest.raises(HostError, match=rf"port {taken}.*GATEWAY_CADDY_HTTPS=\d+ deploy/quickstart"):
            caddy_service.CaddyService(settings)._check_ports()


def test_caddy_leaves_the_gateways_of_other_members_their_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a member incusd has 8443, the first port instead of 443."""
    busy = {80: None, 443: "in use", 8443: "in use"}
    monkeypatch.setattr(caddy_service, "in_use", busy.get)
    assert caddy_service.chosen(Settings(state_dir=tmp_path))["caddy_https"] == 8445
    assert caddy_service.chosen(Settings(state_dir=tmp_path, peer_listen=":9444"))["caddy_https"] == 8444


@pytest.mark.parametrize(("user", "folder"), [(None, "/run/gw/caddy"), ("caddy", "/run/gw-caddy")])
def test_caddy_is_reached_by_a_socket_in_its_folder_if_the_path_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str | None, folder: str
) -> None:
    """It is next to the state dir if Caddy's user cannot enter that; an earlier choice stays."""
    monkeypatch.setattr("gateway.host.caddy_service._user", lambda: user)
    short, long = Path("/run/gw"), tmp_path / ("x" * 100)
    chosen = caddy_service.chosen(Settings(state_dir=short))
    assert chosen["caddy_admin"] == f"{folder}/admin/caddy.sock"
    assert chosen.get("caddy_dir") == (Path(folder) if user else None)
    assert "caddy_admin" not in caddy_service.chosen(Settings(state_dir=long))
    elsewhere = Settings(state_dir=short, caddy_dir=tmp_path, caddy_admin="/run/gw/caddy/admin/admin.sock")
    assert not caddy_service.chosen(elsewhere).keys() & {"caddy_dir", "caddy_admin"}


_PACKAGES = """\
#!/bin/sh
case "$(basename "$0") $1" in
  "dpkg --configure")
    if [ ! -e once ] || [ -e for-ever ]; then
      touch once
      echo "dpkg: error: dpkg frontend lock was locked by /usr/bin/apt process with pid 7" >&2
      exit 2
    fi
    [ ! -e broken ] || { echo "dpkg: error: something else" >&2; exit 1; } ;;
esac
echo "$(basename "$0") $*" >>calls
"""


def test_packages_wait_for_another_that_installs_some(tmp_path: Path) -> None:
    """A held lock is waited for, with a message, and never reported as a broken dpkg."""
    for name in ("dpkg", "apt-get", "sleep"):
        program = tmp_path / name
        program.write_text(_PACKAGES if name != "sleep" else "#!/bin/sh\n")
        program.chmod(0o755)

    def install(before: str = ":") -> tuple[int, str]:
        script = f". {CHECKOUT}/deploy/prepare.sh; {before}; install_packages jq"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    code, said = install()
    assert code == 0
    assert said.count("waiting for another program that installs packages") == 1
    assert "pid 7" in said
    assert "install --no-install-recommends jq" in (tmp_path / "calls").read_text()
    (tmp_path / "for-ever").touch()
    code, said = install("lock_timeout=0")
    assert code == 1
    assert "another program has been installing packages" in said and "broken" not in said
    (tmp_path / "for-ever").unlink()
    (tmp_path / "broken").touch()
    code, said = install()
    assert code == 1
    assert "something else" in said and "dpkg is in a broken state" in said


def _beside(script: str) -> subprocess.Popen[str]:
    words = ["bash", "-c", f". {CHECKOUT}/deploy/prepare.sh; {script}"]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_steps_beside_one_another_are_shown_one_by_one() -> None:
    """Their lines do not mix, and a failure is reported where the step is awaited."""
    script = """
      slow() { echo slow 1; read -r <"$gate"; echo slow 2; }
      fails() { step fails; die 'no room'; }
      gate=$(mktemp -u) && mkfifo "$gate"
      begin slow '' slow
      begin fails '' fails
      echo between; finish fails || echo "failed with $?"
      echo >"$gate"; rm "$gate"; finish slow && echo end
    """
    with _beside(script) as process:
        out, errors = process.communicate(timeout=30)
    told = "slow: goes on beside what follows\nfails: goes on beside what follows\n"
    assert out == f"{told}between\nfailed with 1\nslow 1\nslow 2\nend\n"
    assert errors == "failed: fails: no room\n"


@pytest.mark.parametrize("how", [None, signal.SIGINT, signal.SIGTERM], ids=["error", "int", "term"])
def test_what_was_begun_ends_with_the_script(how: signal.Signals | None) -> None:
    """Also everything that it started, however the script ends."""
    job = "exec 3>&1; job() { sh -c 'echo runs >&3; sleep 1000' & wait; }; begin job '' job"
    with _beside(f"{job}; {'finish job' if how else 'read -r; die no'}") as process:
        assert process.stdout is not None and process.stdin is not None
        said = {process.stdout.readline(), process.stdout.readline()}
        assert said == {"job: goes on beside what follows\n", "runs\n"}
        if how:
            process.send_signal(how)
        else:
            process.stdin.close()
        assert process.stdout.read() == "", "each of them holds it open"


def test_the_log_of_a_step_that_outlives_the_script_is_private(tmp_path: Path) -> None:
    """As `doctor` wants all logs in the state dir; also that of an earlier version."""
    log = tmp_path / "image.log"
    log.touch(0o644)
    with _beside(f"umask 022; begin image {log} echo said; stat -c %a {log}; wait; trap - EXIT") as process:
        out, _ = process.communicate(timeout=30)
    assert out.splitlines()[1:] == ["600"]
    assert log.read_text() == "said\n"


def test_script_knows_its_usage(tmp_path: Path) -> None:
    """--help answers 0, an unknown word 2, and status before any start says not running, as JSON too."""
    script = str(CHECKOUT / "deploy" / "quickstart")
    environment = {**os.environ, "GATEWAY_STATE_DIR": str(tmp_path / "none"), "GATEWAY_RUNTIME": "local"}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([script, *words], env=environment, capture_output=True, text=True, check=False)

    shown = call("--help")
    assert shown.returncode == 0 and "quickstart" in shown.stdout
    assert call("destroy").returncode == 2
    status = call("status", "--json")
    assert status.returncode == 1
    assert json.loads(status.stdout)["running"] is False
    assert call("stop").returncode == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("state", "folder", "closed"),
    [
        (
            "/var/lib/incus-gateway",
            "/var/lib/incus-gateway-caddy",
            ["/var/lib/incus", "/var/lib/incus-gateway"],
        ),
        ("/srv/gw", "/var/lib/incus-gateway-x", ["/var/lib/incus", "/srv/gw"]),
        ("/srv/gw", "/srv/gw/caddy", ["/var/lib/incus"]),
    ],
)
def test_caddys_unit_names_its_folder_and_closes_the_state_dir(
    state: str, folder: str, closed: list[str]
) -> None:
    settings = Settings(state_dir=Path(state), caddy_dir=Path(folder))
    text = caddy_service.CaddyService(settings)._unit("/opt/caddy", CHECKOUT / "deploy")
    lines = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"\w+=", line))
    assert lines["ExecStart"] == f"/opt/caddy run --config {folder}/Caddyfile --adapter caddyfile"
    assert lines["ReadWritePaths"] == f"{folder}/data {folder}/admin"
    assert lines["InaccessiblePaths"].split() == [f"-{path}" for path in closed]
