"""The pure parts of preparing a host: sizes, rules, definitions, recognising processes, writing files."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import subprocess
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from gateway.host import HostError, SetupChange, Steps, run
from gateway.host import setup as steps
from gateway.host.caddy_service import CaddyService, hand_over
from gateway.host.checks import Hint, hosts
from gateway.host.daemon import Daemon, _only_options
from gateway.host.gateway_process import GatewayProcess, QuickstartFiles
from gateway.host.image import (
    CA_BUNDLE,
    FILES,
    PROPERTY,
    TRUST,
    Artefact,
    Definition,
    define,
    image_metadata,
    keep_artefact,
)
from gateway.host.requirements import setup
from gateway.host.setup import PRIVATE, acl, forwarding, network, pool_size, profile, supports_simple_quotas
from gateway.host.toolchain import BUN_INTEGRITY, check_integrity
from gateway.rootfs.instance_record import MANAGED
from gateway.rootfs.quotas import Quotas
from gateway.settings import Settings

GiB = 1 << 30


def test_the_doctor_hints_at_a_gateway_that_answers_to_any_name() -> None:
    assert hosts(Settings(domain="gw.example", hosts="Gw.lan")) == "127.0.0.1, gw.example, gw.lan"
    with pytest.raises(Hint, match="DNS rebinding"):
        hosts(Settings(hosts="gw.lan,*"))


@pytest.mark.parametrize(
    ("free", "size"),
    [(5 * GiB, 5), (8 * GiB, 5), (80 * GiB, 40), (80 * GiB + 1, 40), (4000 * GiB, 200)],
)
def test_pool_takes_half_of_what_is_free_within_bounds(free: int, size: int) -> None:
    """Half of the free disk, 5 GiB at least, 200 GiB at most, in whole GiB."""
    assert pool_size(free) == size * GiB


def test_pool_without_room_names_the_way_out() -> None:
    """A full disk is refused before Incus creates half a pool."""
    with pytest.raises(HostError, match="GATEWAY_POOL_SOURCE"):
        pool_size(5 * GiB - 1)


@pytest.mark.parametrize(
    ("linux", "programs", "simple"),
    [
        ("6.12.48+deb13-amd64", "btrfs-progs v6.14", True),
        ("6.8.0-84-generic", "btrfs-progs v6.6.3", False),
        ("6.7.12", "btrfs-progs v6.14", False),
        ("7.0.1", "btrfs-progs v7.0\n-EXPERIMENTAL +LZO", True),
        ("6.18.44", "", False),
    ],
)
def test_which_hosts_have_simple_quotas(linux: str, programs: str, simple: bool) -> None:
    """Linux 6.7 forgets what a deleted disk has written; older programs make Incus fail to read them."""
    assert supports_simple_quotas(linux, programs) == simple


@pytest.mark.parametrize(
    ("kind", "simple", "begun"), [("off", True, True), ("off", False, False), ("full", True, False)]
)
def test_only_a_pool_without_quotas_gets_simple_ones(
    monkeypatch: pytest.MonkeyPatch, kind: str, simple: bool, begun: bool
) -> None:
    begins = list[bool]()
    monkeypatch.setattr(steps, "wants_simple_quotas", lambda settings: settings.simple_quotas)
    monkeypatch.setattr(Quotas, "kind", lambda self: kind)
    monkeypatch.setattr(Quotas, "begin_simple", lambda self: begins.append(True))
    monkeypatch.setattr(Quotas, "enforce", lambda self, wait: [])
    said = steps.enforce_quotas(Settings(simple_quotas=simple))
    assert (bool(begins), said is not None) == (begun, begun)


def test_acl_closes_private_ranges_and_the_hosts_public_address() -> None:
    """Traffic to the host is dropped, whatever its address; the rest of the internet is allowed."""
    rules = acl(Settings(network_ipv4="10.82.0.1/20"), [IPv4Address("203.0.113.7")])
    drop, allow = rules["egress"]
    closed = [IPv4Network(part) for part in drop["destination"].split(",")]
    assert drop["action"] == "drop" and allow["action"] == "allow"
    for address in ("10.82.0.1", "10.82.15.9", "192.168.1.1", "169.254.169.254", "100.64.0.1", "203.0.113.7"):
        assert any(IPv4Address(address) in part for part in closed), address
    for address in ("1.1.1.1", "203.0.113.8", "172.32.0.1"):
        assert not any(IPv4Address(address) in part for part in closed), address
    assert rules["ingress"] == [{"action": "allow", "state": "enabled", "source": "10.82.0.1/32"}]


def test_acl_closes_a_bridge_outside_the_private_ranges() -> None:
    """Tenants are isolated even if the operator gave the bridge public addresses."""
    drop = acl(Settings(network_ipv4="203.0.113.1/24"), [])["egress"][0]
    assert "203.0.113.0/24" in drop["destination"].split(",")
    assert len(drop["destination"].split(",")) == len(PRIVATE) + 1


def test_profile_carries_mark_limits_and_isolation() -> None:
    """A tenant's limits come from the settings; the mark and the isolation are always set."""
    made = profile(Settings(tenant_memory="1GiB", tenant_processes=99, tenant_disk="3GiB", pool="p"))
    assert made["config"][MANAGED] == "true"
    assert made["config"]["limits.memory"] == "1GiB"
    assert made["config"]["limits.memory.enforce"] == "hard"
    assert made["config"]["limits.processes"] == "99"
    assert made["devices"]["root"] == {
        "type": "disk",
        "path": "/",
        "pool": "p",
        "size": "3GiB",
        "limits.read": "250MB",
    }
    nic = made["devices"]["eth0"]
    assert {key for key, value in nic.items() if value == "true"} == {
        "security.port_isolation",
        "security.mac_filtering",
        "security.ipv4_filtering",
        "security.ipv6_filtering",
    }


def test_commands_and_services_trust_what_the_host_does() -> None:
    """Commands have it from the profile, shells at login and services from the image."""
    given = {f"{name}={CA_BUNDLE}" for name in TRUST}
    config = profile(Settings())["config"]
    assert {f"{name}={config[f'environment.{name}']}" for name in TRUST} == given
    for name, before in (
        ("profile.d/10-tenant.sh", "export "),
        ("systemd/system.conf.d/10-tenant.conf", "="),
    ):
        lines = FILES[f"etc/{name}"].splitlines()
        assert {line.partition(before)[2] for line in lines if str(CA_BUNDLE) in line} == given


def test_bridge_refuses_by_default() -> None:
    """The bridge uses the ACL, and traffic that no rule allows is refused."""
    made = network(Settings(profile="x"))
    assert made["security.acls"] == "x"
    assert made["ipv6.address"] == "none"
    assert {value for key, value in made.items() if "default" in key} == {"reject"}


def definition(**changes: object) -> Definition:
    fields: dict[str, object] = {
        "architecture": "amd64",
        "bun": "x64",
        "user": "site",
        "uid": 1000,
        "workspace": "/srv/site",
        "certificates": b"",
        "compiler": False,
    }
    return Definition(**{**fields, **changes})  # type: ignore[arg-type]  # a dict of mixed fields


def test_digest_changes_with_everything_that_decides_the_image() -> None:
    """The same definition has the same name; another user, path, architecture or certificate changes it."""
    others = [
        definition(architecture="arm64", bun="aarch64"),
        definition(bun="x64-baseline"),
        definition(user="web"),
        definition(uid=1001),
        definition(workspace="/srv/web"),
        definition(certificates=b"one more"),
        definition(compiler=True),
    ]
    assert definition().digest == definition().digest
    assert len({definition().digest, *(other.digest for other in others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("machine", "flags", "variant", "architecture"),
    [
        ("x86_64", "flags: sse avx avx2 bmi", "x64", "amd64"),
        ("x86_64", "flags: sse avx", "x64-baseline", "amd64"),
        ("aarch64", "", "aarch64", "arm64"),
    ],
)
def test_bun_fits_the_processor(machine: str, flags: str, variant: str, architecture: str) -> None:
    """A processor without AVX2 gets the build without it; ARM has its own build."""
    made = define(Settings(), machine, flags)
    assert (made.bun, made.architecture) == (variant, architecture)
    assert variant in BUN_INTEGRITY


@pytest.mark.parametrize(
    "wrong",
    [
        {"workspace_user": "site; rm -rf /"},
        {"workspace_user": "-x"},
        {"workspace": "srv/site"},
        {"workspace": "/srv/../etc"},
        {"workspace": "/srv/$(id)"},
    ],
)
def test_definition_refuses_what_a_shell_would_run(wrong: dict[str, str]) -> None:
    """User and workspace are used in the build's script, so only plain names are accepted."""
    with pytest.raises(HostError, match="GATEWAY_WORKSPACE"):
        define(Settings(**wrong), "x86_64", " avx2")  # type: ignore[arg-type]  # field names from the table


def test_the_image_that_quickstart_begins_with_is_that_of_the_settings_defaults() -> None:
    """It is built before the settings can be read."""
    assert define() == define(Settings())


def test_unknown_processor_is_refused() -> None:
    """There is no image without Bun, which is reported before anything is fetched."""
    with pytest.raises(HostError, match="riscv64"):
        define(Settings(), "riscv64", "")


def test_integrity_accepts_the_published_bytes_and_nothing_else(tmp_path: Path) -> None:
    """The file is compared with npm's `sha512-BASE64`; a single different byte is refused."""
    file = tmp_path / "package.tgz"
    file.write_bytes(b"published")
    expected = "sha512-" + base64.b64encode(hashlib.sha512(b"published").digest()).decode()
    check_integrity(file, expected)
    file.write_bytes(b"publisheD")
    with pytest.raises(HostError, match="not what was published"):
        check_integrity(file, expected)


def test_fingerprint_is_that_of_incus(tmp_path: Path) -> None:
    """A split image's fingerprint is the SHA-256 over metadata and rootfs, in that order."""
    artefact = Artefact(tmp_path / "m", tmp_path / "r")
    artefact.metadata.write_bytes(b"meta")
    artefact.rootfs.write_bytes(b"root")
    assert artefact.fingerprint == hashlib.sha256(b"metaroot").hexdigest()


def test_built_images_of_other_definitions_stay_for_who_uses_them(tmp_path: Path) -> None:
    """Two gateways building in turn both keep their images; long unused ones are removed completely."""
    made = [Artefact(tmp_path / f"{name}.tar", tmp_path / f"{name}.squashfs") for name in "abcde"]
    for age, artefact in enumerate(reversed(made)):
        for file in (artefact.metadata, artefact.rootfs):
            file.touch()
            os.utime(file, (1000 - age, 1000 - age))
    keep_artefact(tmp_path, made[0])  # the oldest, used once more
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"{name}.{kind}" for name in "ade" for kind in ("squashfs", "tar")]


def test_metadata_names_its_definition() -> None:
    """The image in Incus names its definition, and the architecture as the kernel calls it."""
    made = image_metadata(definition(architecture="arm64", bun="aarch64"))
    assert made["architecture"] == "aarch64"
    assert made["properties"][PROPERTY] == definition(architecture="arm64", bun="aarch64").digest


@pytest.mark.parametrize(
    ("words", "daemon"),
    [
        ([b"--group", b"incus-admin", b"--logfile", b"/x", b""], True),
        ([b"--logfile=/x"], True),
        ([b""], True),
        ([b"forkexec", b"name"], False),
        ([b"--group", b"incus-admin", b"waitready"], False),
    ],
)
def test_helpers_of_incusd_are_not_the_daemon(words: list[bytes], daemon: bool) -> None:
    """`incusd forkexec …` outlives a killed daemon and must not be mistaken for it."""
    assert _only_options(words) is daemon


@pytest.mark.parametrize("which", ["incusd", "caddy", "gateway"])
def test_a_tenants_process_passes_for_no_daemon_of_the_host(tmp_path: Path, which: str) -> None:
    """It may have the same command line, variables and user; on the host it is recognised by them."""
    settings = Settings(state_dir=tmp_path, caddy_dir=tmp_path / "caddy")
    gateway = GatewayProcess(settings, QuickstartFiles(tmp_path), None, Path("/usr/bin/incus-gateway"), {})
    (tmp_path / "run").write_text("read line; echo ready; read line\n")
    pid, command = {
        "incusd": (Daemon(tmp_path).pid, "exec -a incusd sh"),
        "caddy": (CaddyService(settings).pid, f"exec -a caddy sh run --config {tmp_path}/caddy/Caddyfile"),
        "gateway": (gateway.pid, "exec sh run /usr/bin/incus-gateway serve"),
    }[which]
    for inside, found in ((False, True), (True, False)):
        apart = ["unshare", "--pid", "--fork", "--kill-child"] if inside else []
        with subprocess.Popen(
            [*apart, "bash", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "INCUS_DIR": str(tmp_path), "GATEWAY_STATE_DIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(b"echo ready\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"ready\n"
            assert (pid() is not None) is found
            process.stdin.close()


def test_stale_socket_and_pid_file_are_not_believed(tmp_path: Path) -> None:
    """The remains of a killed daemon do not count as a daemon: its pid may have been reused."""
    import socket

    daemon = Daemon(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(daemon.socket))
    daemon.pidfile.write_text(f"{os.getpid()}\n")
    assert daemon.socket.exists()
    assert not daemon.answers()
    assert daemon.pid() is None
    daemon.pidfile.write_text("not a number")
    assert daemon.pid() is None


def test_a_socket_that_says_nothing_is_no_daemon(tmp_path: Path) -> None:
    """A server that accepts and closes connections is not mistaken for incusd."""
    import socket
    import threading

    daemon = Daemon(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(daemon.socket))
        listener.listen()
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        assert not daemon.answers()
        thread.join()


def test_steps_say_what_changed_and_how_long_it_took() -> None:
    """Each step prints one line when it ends; the changes are returned as values."""
    lines: list[str] = []
    steps = Steps(lines.append)
    steps.run("one", lambda: "made")
    steps.run("two", lambda: None)
    assert [(change.step, change.changed) for change in steps.changes] == [("one", True), ("two", False)]
    assert lines[0].startswith("changed  one: made") and lines[1].startswith("ok       two: as it should be")
    assert str(SetupChange("s", True, "d", 1.25)).endswith("(1.2 s)")


def test_a_failing_step_names_itself() -> None:
    """The error's message begins with the step's name."""

    def fail() -> None:
        raise HostError("no room")

    with pytest.raises(HostError, match="pool: no room") as caught:
        Steps(lambda line: None).run("pool", fail)
    assert caught.value.facts == {"step": "pool"}


def test_programs_that_fail_say_what_they_said_and_what_to_do() -> None:
    """The message has the end of the program's errors and the advice; for a missing one, its package."""
    with pytest.raises(HostError, match="ended with 3: oh no; turn it off"):
        run(["sh", "-c", "echo oh no >&2; exit 3"], fix="turn it off")
    with pytest.raises(HostError, match="did not end within 0 s"):
        run(["sleep", "5"], fix="wait", timeout=0.05)
    with pytest.raises(HostError, match="no-such-program is not installed; get it"):
        run(["no-such-program"], fix="get it")
    assert run(["echo", "fine"], fix="") == "fine\n"


def test_a_lock_is_held_by_the_programs_of_a_step(tmp_path: Path) -> None:
    """A descriptor that is passed on stays open in the child."""
    with (tmp_path / "lock").open("w") as lock:
        number = lock.fileno()
        assert run(["sh", "-c", f"test -e /proc/self/fd/{number} && echo held"], fix="", holding=(number,))
        with pytest.raises(HostError):
            run(["sh", "-c", f"test -e /proc/self/fd/{number}"], fix="")


def test_a_start_leaves_no_number_by_which_incusd_would_kill_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a number is another process's; a name server that lives on keeps its file."""
    root = tmp_path / "incus"
    monkeypatch.setattr("gateway.host.daemon.INCUSD", Path("/bin/true"))
    lives = subprocess.Popen(["sh", "-c", "read line", f"--dhcp-leasefile={root}/"], stdin=subprocess.PIPE)
    try:
        files = {"alive": lives.pid, "reused": os.getpid(), "gone": 2**22 + 1}
        for bridge, pid in files.items():
            (root / "networks" / bridge).mkdir(parents=True)
            (root / "networks" / bridge / "dnsmasq.pid").write_text(f"name: dnsmasq\npid: {pid}\nuid: 0\n")
        Daemon(root).start()
        assert [file.parent.name for file in root.glob("networks/*/dnsmasq.pid")] == ["alive"]
    finally:
        lives.communicate()


def test_erase_leaves_nothing_of_a_dead_daemon(tmp_path: Path) -> None:
    """All files of a folder without a daemon are removed."""
    daemon = Daemon(tmp_path / "incus")
    (daemon.root / "networks" / "x").mkdir(parents=True)
    (daemon.root / "networks" / "x" / "dnsmasq.pid").write_text("pid: 1\n")
    daemon.erase()
    assert not daemon.root.exists()
    assert stat.S_ISDIR(tmp_path.stat().st_mode)


FAKE_IPTABLES = """\
#!/bin/sh
# Knows one chain, kept as lines of a file, as iptables -w -S|-C|-I CHAIN RULE… would.
rules=$(dirname "$0")/rules
shift
action=$1
shift 2
[ -f "$rules" ] || { echo "No chain/target/match by that name." >&2; exit 1; }
case $action in
  -S) cat "$rules" ;;
  -C) grep -qxF -e "$*" "$rules" ;;
  -I) echo "$*" >>"$rules" ;;
esac
"""


def test_docker_is_told_to_let_the_bridge_through_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Docker's chain nothing is done; with it both directions are allowed, and only once."""
    iptables = tmp_path / "iptables"
    iptables.write_text(FAKE_IPTABLES)
    iptables.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = Settings(network="br7")
    assert forwarding(settings) is None
    (tmp_path / "rules").write_text("")
    assert forwarding(settings) == "allowed in Docker's firewall"
    assert (tmp_path / "rules").read_text().splitlines() == ["-i br7 -j ACCEPT", "-o br7 -j ACCEPT"]
    assert forwarding(settings) is None


def test_local_runtime_needs_nothing_of_the_host() -> None:
    """Setup needs neither Incus nor root if tenants are plain folders."""
    (change,) = setup(Settings(runtime="local", incus_socket=Path("/nonexistent")), lambda line: None)
    assert not change.changed


def test_routes_stay_where_the_broker_serves_root_alone(tmp_path: Path) -> None:
    """A broker beside root's gateway needs no user, and no ownership is changed."""
    settings = Settings(state_dir=tmp_path, broker_user="no-such-user")
    assert hand_over(settings) is None
    assert not list(tmp_path.iterdir())
