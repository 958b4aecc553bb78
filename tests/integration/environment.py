"""The tests' own incusd, separate from an operator's: it has its own folder, bridge, subnet and pool.

`tests/run` calls `up` before pytest and `down` after it; the fixtures call `up` too, so that pytest alone
works. GATEWAY_TEST_HOST=N selects another such daemon, for a second run at the same time. Each of pytest's
workers has its own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gateway.host import HostError, Report
from gateway.host.daemon import Daemon, cannot_run
from gateway.host.image import build_image
from gateway.host.requirements import setup
from gateway.host.setup import enforce_quotas, quota_kind, wants_simple_quotas
from gateway.rootfs import process_tree
from gateway.settings import Settings

_HOSTS = 100  # for first workers; those of the next ones follow
HOST = int(os.environ.get("GATEWAY_TEST_HOST", "0")) + _HOSTS * int(
    os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
)
INCUS_DIR = Path(f"/var/lib/incus-gateway-test{HOST or ''}")
NETWORK = f"10.{83 + HOST // 200}.{HOST % 200}"
"""The first three numbers of its addresses."""
RUNNER = INCUS_DIR / "tests-run"
"""Names the `tests/run` that started the daemon, `PID:START`, so that the next one knows a killed one's."""

OWNER = "user.gateway.test-owner"
"""Marks the containers of the fixtures with the test process that made them, `PID:START`."""


def settings(**changes: Any) -> Settings:
    """Return settings for the tests' Incus; `changes` override fields."""
    fields: dict[str, Any] = {
        "incus_socket": INCUS_DIR / "unix.socket",
        "network": f"gwtestbr{HOST}",
        "network_ipv4": f"{NETWORK}.1/24",
        "pool": "gwtest",
        "tenant_disk": "2GiB",
        "tenant_memory": "512MiB",  # enough for the tests, on a machine of any size
        "state_dir": INCUS_DIR / "gateway",
        "listen": "127.0.0.1:0",
    }
    return Settings(**(fields | changes))


def variables(of: Settings) -> dict[str, str]:
    """Return environment variables that give another process these settings."""
    changed = of.model_dump(mode="json", include=of.model_fields_set)
    return {
        f"GATEWAY_{name.upper()}": ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in changed.items()
    }


def daemon() -> Daemon:
    return Daemon(INCUS_DIR)


def incus(
    *words: str, check: bool = True, stdin: bytes = b"", timeout: float = 60
) -> subprocess.CompletedProcess[bytes]:
    """Run the `incus` command on the tests' daemon, independently of the code under test.

    The frequent ones, `exec` and `query PATH`, call the daemon's API without starting the command.
    """
    if (words[0] == "exec" and not stdin) or (words[0] == "query" and len(words) == 2):
        done = (_executed if words[0] == "exec" else _queried)(*words[1:], timeout=timeout)
        if check and done.returncode != 0:
            said = done.stderr.decode(errors="replace")
            raise AssertionError(f"incus {' '.join(words)}: {done.returncode}: {said}")
        return done
    if words[0] == "exec":
        words = _lingering(words)
    done = subprocess.run(
        ["incus", *words],
        env=daemon().environment,
        capture_output=True,
        check=False,
        timeout=timeout,
        input=stdin,
    )
    if check and done.returncode != 0:
        raise AssertionError(
            f"incus {' '.join(words)}: {done.returncode}: {done.stderr.decode(errors='replace')}"
        )
    return done


def _lingering(words: tuple[str, ...]) -> tuple[str, ...]:
    """Have a command end a second after its last output, which incusd may otherwise not read any more.

    See `gateway.rootfs.process_tree`.
    """
    at = words.index("--") + 1
    linger = '"$@"; code=$?; sleep 1.1; exit "$code"'
    return *words[:at], "sh", "-c", linger, "sh", *words[at:]


def _executed(name: str, *words: str, timeout: float) -> subprocess.CompletedProcess[bytes]:
    """Do what `incus exec` does, which on a busy machine sometimes loses a short command's output.

    Here Incus records the output in files, which are read once the command has ended. They are on the
    instance's disk; if that is full, pass some `stdin`, which runs `incus exec` itself.
    """
    at = words.index("--") if "--" in words else 0
    options = dict(word.removeprefix("--").split("=", 1) for word in words[:at] if "=" in word)
    body = {
        "command": list(words[at + 1 :] if "--" in words else words),
        "record-output": True,
        "user": int(options.get("user", 0)),
        "group": int(options.get("group", 0)),
        "cwd": options.get("cwd", ""),
    }
    with _asking(timeout + 10) as ask:
        begun = json.loads(ask("POST", f"/1.0/instances/{name}/exec", body))
        if begun["type"] == "error":
            return subprocess.CompletedProcess(words, 1, b"", begun["error"].encode())
        ended = json.loads(ask("GET", f"{begun['operation']}/wait?timeout={timeout:.0f}"))
        if ended["type"] == "error":  # as for a command that is not found (127) or cannot be run (126)
            missing = "not found" in ended["error"]
            return subprocess.CompletedProcess(words, 127 if missing else 126, b"", ended["error"].encode())
        if ended["metadata"]["status"] == "Running":
            raise subprocess.TimeoutExpired(words, timeout)
        told = ended["metadata"]["metadata"]
        output = {number: ask("GET", path) for number, path in told["output"].items()}
        for path in told["output"].values():
            ask("DELETE", path)
        return subprocess.CompletedProcess(words, told["return"], output["1"], output["2"])


def _queried(path: str, *, timeout: float) -> subprocess.CompletedProcess[bytes]:
    try:
        with _asking(timeout) as ask:
            said = json.loads(ask("GET", path))
    except OSError as error:
        said = {"type": "error", "error": str(error)}
    if said["type"] == "error":
        return subprocess.CompletedProcess(path, 1, b"", said["error"].encode())
    return subprocess.CompletedProcess(path, 0, json.dumps(said["metadata"]).encode(), b"")


@contextlib.contextmanager
def _asking(timeout: float) -> Iterator[Callable[..., bytes]]:
    """Yield a function that sends requests to the daemon, `ask(method, path, body)`, over one connection."""
    connection = http.client.HTTPConnection("incus", timeout=timeout)
    with contextlib.closing(connection):
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(timeout)
        connection.sock.connect(str(INCUS_DIR / "unix.socket"))

        def ask(method: str, path: str, body: Any = None) -> bytes:
            connection.request(method, path, json.dumps(body) if body else None, {"Host": "incus"})
            return connection.getresponse().read()

        yield ask


def configure(name: str, key: str, value: str) -> None:
    """Set one key of an instance as an operator, even if the gateway is changing it at the same time.

    `incus config set` writes back everything that it read, and is refused if anything has changed meanwhile.
    """
    change = json.dumps({"config": {key: value}})
    incus("query", "--wait", "--request", "PATCH", "--data", change, f"/1.0/instances/{name}")


_inits: dict[str, str] = {}  # by instance, `PID:START` of its first process


def init_pid(name: str) -> int:
    """Return the host's process id of a running instance's first process.

    Incus looks at networks, disks and processes to tell it, so that it is asked once in the instance's run.
    """
    if (known := _inits.get(name)) is None or not _lives(known):
        pid = int(json.loads(incus("query", f"/1.0/instances/{name}/state").stdout)["pid"])
        if (known := owner(pid)) is None:
            return pid
        _inits[name] = known
    return int(known.partition(":")[0])


def cgroup(name: str) -> Path:
    """Return a running instance's cgroup in the v2 tree.

    Read from its first process, since LXC adds a number if an earlier run has left a cgroup of that name.
    """
    found = process_tree.of_init(init_pid(name))
    assert found is not None, f"{name} has no cgroup in the v2 tree"
    return found


def rootfs(name: str, pool: str = "gwtest") -> Path:
    """Return the host's path of a container's `/`."""
    return INCUS_DIR / "storage-pools" / pool / "containers" / name / "rootfs"


def owner(pid: int) -> str | None:
    """Return `PID:START` of a living process, or None. A zombie does not live."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{pid}:{fields[19]}"


def instances() -> list[dict[str, Any]]:
    """Return all instances as Incus reports them."""
    listed: list[dict[str, Any]] = json.loads(incus("query", "/1.0/instances?recursion=1").stdout)
    # Incus returns an incomplete one while it is being created or removed
    return [entry for entry in listed if entry["config"] is not None]


def snapshots(name: str) -> list[str]:
    """Return the snapshots of an instance; none if there is no such instance."""
    done = incus("query", f"/1.0/instances/{name}/snapshots", check=False)
    return [url.rpartition("/")[2] for url in json.loads(done.stdout)] if done.returncode == 0 else []


def up(report: Report) -> bool:
    """Set up daemon, network, pool, profile and image; return whether this run has to stop the daemon.

    It has to if it started the daemon, or if a killed `tests/run` left it running. In these cases all
    containers are left-overs and are removed; otherwise only those whose test process is gone. Raises
    `HostError`.
    """
    if reason := cannot_run():
        raise HostError(reason)
    ours = daemon().ensure(report)
    runner = owner(int(os.environ.get("GATEWAY_TEST_RUNNER", "0")))
    if runner is not None:
        if not ours and RUNNER.exists() and not _lives(RUNNER.read_text()):
            report("taking over the incusd of a killed run")
            ours = True
        if ours:
            RUNNER.write_text(runner)
    if ours:
        _end_gateways(report)
    for instance in instances():
        mark = (instance["config"] or {}).get(OWNER)  # None while another run is creating it
        if ours or (mark and not _lives(mark)):
            report(f"removing {instance['name']}, left by an earlier run")
            incus("delete", "--force", instance["name"], check=False)
    if ours:
        _remove_leftovers(report)
    simplify(report)
    setup(settings(), report)
    build_image(settings(), report)
    return ours


def _remove_leftovers(report: Report) -> None:
    """Remove the projects, profiles, networks, pools and bridges of tests that were killed."""
    own = settings()
    keep = {
        "project": {"default"},
        "profile": {"default", own.profile},
        "network": {own.network},
        "storage": {own.pool},
    }
    for kind, kept in keep.items():
        for entry in json.loads(incus(kind, "list", "--format=json").stdout):
            name = entry["name"]
            if name not in kept and entry.get("managed", True):
                report(f"removing the {kind} {name}, left by an earlier run")
                # --force: with what is in it, which only a project's deletion has, and asks about
                force = ("--force",) if kind == "project" else ()
                incus(kind, "delete", *force, name, check=False, stdin=b"yes\n")
    # where its folder was removed beneath a running Incus, its bridge stays, unknown to the new one
    for entry in json.loads(incus("network", "list", "--format=json").stdout):
        if entry["name"] == own.network and not entry["managed"]:
            report(f"removing the bridge {own.network}, left by an earlier run")
            subprocess.run(["ip", "link", "delete", own.network], check=True)


def simplify(report: Report) -> None:
    """Have a pool of an earlier checkout, which no container uses, get simple quotas by the next setup."""
    if quota_kind(settings()) == "full" and wants_simple_quotas(settings()) and not instances():
        report("taking the full quotas off the pool")
        _quota("disable")


def with_full_quotas() -> None:
    """Give the pool, which no container uses, full quotas until the next `up`."""
    assert not instances()
    _quota("disable")
    _quota("enable")
    enforce_quotas(settings())


def _quota(word: str) -> None:
    pool = INCUS_DIR / "storage-pools" / settings().pool
    subprocess.run(["btrfs", "quota", word, pool], check=True)


def _end_gateways(report: Report) -> None:
    """End the gateways that an interrupted run left, which would keep working on this Incus."""
    used = f"GATEWAY_INCUS_SOCKET={INCUS_DIR / 'unix.socket'}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            serves = b"serve" in (process / "cmdline").read_bytes().split(b"\0")
            if serves and used in (process / "environ").read_bytes().split(b"\0"):
                report(f"ending a gateway left by an earlier run, pid {process.name}")
                os.kill(int(process.name), signal.SIGKILL)


def _lives(mark: str) -> bool:
    pid = mark.partition(":")[0]
    return pid.isdigit() and owner(int(pid)) == mark


def down(report: Report) -> None:
    """Remove the tests' containers and stop the daemon. Pool and image stay for the next run."""
    if daemon().answers():
        for instance in instances():
            incus("delete", "--force", instance["name"], check=False)
    RUNNER.unlink(missing_ok=True)
    if daemon().stop():
        report("stopped the tests' incusd")


def main(words: list[str]) -> int:
    """Run one of the commands in `usage`. `up` exits with 3 if this run has to stop the daemon, else 0."""
    try:
        match words:
            case ["up"]:
                return 3 if up(print) else 0
            case ["down"]:
                down(print)
                return 0
            case ["variables"]:
                print("\n".join(f"{key}={value}" for key, value in variables(settings()).items()))
                return 0
            case ["why-not"]:
                print(cannot_run() or "")
                return 0
            case _:
                print(
                    "usage: python -m tests.integration.environment up|down|variables|why-not",
                    file=sys.stderr,
                )
                return 2
    except HostError as error:
        print(f"failed: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
