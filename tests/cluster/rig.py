"""A cluster of Incus on one machine: each member is a server as far as Incus and the gateway can tell.

A member has network, mount, pid, ipc, uts and cgroup namespaces, and folders of its own where Incus, the
gateway and Caddy keep theirs. Its first process is its pid namespace's: SIGKILL of it is a power cut, for
containers, incusd, gateway and Caddy at once. Its cable is a port of a bridge of this machine, from which the
tests reach every member. GATEWAY_TEST_HOST=N names another cluster, as it does another Incus elsewhere.

Not simulated: the latency of a network, a disk that fails, clocks that differ.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gateway.host import HostError, Report, run
from gateway.host.daemon import cannot_run
from tests.integration.environment import HOST
from tests.waits import until_true

HERE: Final = Path(__file__).parent
CHECKOUT: Final = HERE.parents[1]
PORT: Final = 8080
"""Where each member's gateway listens."""

_NAMESPACES: Final = ("mount", "net", "pid", "ipc", "uts", "cgroup")
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_INSTALLED: Final = ("incus", "caddy", "unshare", "nsenter", "ip", "losetup")


class Member:
    """One server of a `Rig`, on or off."""

    def __init__(self, rig: Rig, number: int) -> None:
        self.name, self._rig = f"m{number}", rig
        self.address = f"10.84.{rig.host}.{number}"
        self.state = rig.folder / self.name
        self._port = f"{rig.bridge}p{number}"

    @property
    def url(self) -> str:
        return f"http://{self.address}:{PORT}"

    @property
    def pid(self) -> int | None:
        """The process of this machine that is the member's first one, None while the member is off."""
        try:
            pid, began = (self.state / "pid").read_text().split()
        except (OSError, ValueError):
            return None
        # a number alone may be another's by now
        return int(pid) if _began(int(pid)) == began else None

    # --- power and cable ----------------------------------------------------------------------------

    def power_on(self) -> None:
        """Switch it on with nothing running in it; one that is on stays as it is."""
        if self.pid is not None:
            return
        self.state.mkdir(parents=True, exist_ok=True)
        (self.state / "booted").unlink(missing_ok=True)
        with (self.state / "power_on.log").open("ab") as log:
            inside = [HERE / "power_on.sh", self.state, self.name, f"{self.address}/24", self._rig.router]
            unshare = ["unshare", *(f"--{kind}" for kind in _NAMESPACES), "--fork", "--kill-child", "--"]
            outer = subprocess.Popen(
                [str(word) for word in (*self._in_cgroup, *unshare, *inside)],
                env={"PATH": _PATH, "LANG": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        outer.returncode = 0  # it outlives us: Popen must not wait for it or warn about it
        found: list[int] = []

        def forked() -> bool:  # the child of unshare, which is the first in the new pid namespace
            found[:] = [
                child
                for child in _children(outer.pid)
                if _namespace(child) not in ("", _namespace(os.getpid()))
            ]
            return bool(found)

        try:
            until_true(forked, 15)
            (self.state / "pid").write_text(f"{found[0]} {_began(found[0])}\n")
            self._wire(found[0])
            until_true((self.state / "booted").exists, 30)
        except AssertionError:
            said = (self.state / "power_on.log").read_text().strip().splitlines()[-3:]
            raise HostError(f"{self.name} was not powered on: {' | '.join(said)}") from None

    def _wire(self, pid: int) -> None:
        # the port of a member that died goes when the kernel gets to it
        subprocess.run(["ip", "link", "del", self._port], check=False, capture_output=True)
        _ip("link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", f"/proc/{pid}/ns/net")
        _ip("link", "set", self._port, "master", self._rig.bridge, "up")

    def cut_power(self) -> None:
        """End everything in it at once. Its peers get neither FIN nor RST."""
        pid = self.pid
        if pid is None:
            return
        self.unplug()  # first: what the kernel closes for a killed process is not to be heard
        os.kill(pid, signal.SIGKILL)
        until_true(lambda: self.pid is None, 30)
        subprocess.run(["ip", "link", "del", self._port], check=False, capture_output=True)

    def remove(self) -> None:
        """End and remove all of it."""
        self.cut_power()
        for at in _hierarchies():
            folder = at / self._rig.cgroup / self.name
            # what its processes leave is gone when the kernel has reaped them
            with contextlib.suppress(AssertionError):
                until_true(functools.partial(_remove, folder), 20, every=0.1)
        listed = run(["losetup", "--json", "--list", "--output", "NAME,BACK-FILE"], fix="") or "{}"
        for device in json.loads(listed).get("loopdevices", []):
            if str(device["back-file"]).startswith(f"{self.state}/"):
                subprocess.run(["losetup", "--detach", device["name"]], check=False, capture_output=True)
        shutil.rmtree(self.state, ignore_errors=True)

    def unplug(self) -> None:
        """Pull its cable; all in it goes on."""
        _ip("link", "set", self._port, "down")

    def plug(self) -> None:
        _ip("link", "set", self._port, "up")

    # --- inside -------------------------------------------------------------------------------------

    @property
    def _in_cgroup(self) -> Sequence[str]:
        folders = [str(at / self._rig.cgroup / self.name) for at in _hierarchies()]
        return (str(HERE / "enter.sh"), " ".join(folders))

    def command(self, *words: str | Path, **environment: str) -> list[str]:
        """Return the command of this machine that runs `words` in the member. Raises `HostError`."""
        pid = self.pid
        if pid is None:
            raise HostError(f"{self.name} is off")
        enter = ["nsenter", f"--target={pid}", *(f"--{kind}" for kind in _NAMESPACES), "--"]
        given = {"PATH": _PATH, "HOME": "/run", "LANG": "C.UTF-8", "GATEWAY_CONFIG": "/nonexistent"}
        variables = [f"{name}={value}" for name, value in (given | environment).items()]
        return [str(word) for word in (*self._in_cgroup, *enter, "env", "-i", *variables, *words)]

    def run(self, *words: str | Path, timeout: float = 120, **environment: str) -> str:
        """Run a command in the member and return what it printed. Raises `HostError`."""
        return run(self.command(*words, **environment), fix=f"look into {self.state}", timeout=timeout)

    def incus(self, *words: str, timeout: float = 120) -> str:
        """Run the `incus` command in the member; independent of the code under test."""
        return self.run("incus", *words, timeout=timeout)

    def query(self, path: str, timeout: float = 120) -> Any:
        """Return the metadata of a GET."""
        return json.loads(self.incus("query", path, timeout=timeout))

    def ours(self, *action: str, **environment: str) -> str:
        """Have the member do an action of `tests.cluster.inside`."""
        return self.of(CHECKOUT, *action, **environment)

    def of(self, checkout: Path, *action: str, **environment: str) -> str:
        """Have it do an action by the code of another checkout."""
        python = [sys.executable, "-m", "tests.cluster.inside", *action]
        return self.run(
            *("env", f"--chdir={checkout}", *python),
            timeout=300,
            PYTHONPATH=f"{checkout}:{checkout}/clients/python",
            PYTHONDONTWRITEBYTECODE="1",
            GATEWAY_LISTEN=f"0.0.0.0:{PORT}",
            **environment,
        )


class Rig:
    """A cluster in a folder. What of it is there already stays as it is."""

    def __init__(self, size: int = 3, host: int = HOST) -> None:
        self.host, self.cgroup = host, f"gwclu{host}"
        # not `gw…`: so are the ports of tenants, on which another gateway of this machine keeps order
        self.bridge = f"clu{host}"
        self.folder = Path(f"/var/lib/incus-gateway-cluster{host}")
        self.router = f"10.84.{host}.254"
        self.members = tuple(Member(self, number) for number in range(1, size + 1))

    @property
    def first(self) -> Member:
        return self.members[0]

    def member(self, name: str) -> Member:
        """Return a member by name. Raises `HostError`."""
        for member in self.members:
            if member.name == name:
                return member
        raise HostError(f"a member is {self.first.name} to {self.members[-1].name}, not {name}")

    def up(self, report: Report) -> bool:
        """Have all members on, with incusd, joined; return whether none was. Raises `HostError`."""
        if missing := [name for name in _INSTALLED if shutil.which(name) is None]:
            raise HostError(f"{', '.join(missing)} cannot be found; install what tests/run installs")
        if reason := cannot_run():
            raise HostError(reason)
        self.folder.mkdir(parents=True, exist_ok=True)
        ours = all(member.pid is None for member in self.members)
        if not Path(f"/sys/class/net/{self.bridge}").exists():
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("address", "add", f"{self.router}/24", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
        for member in self.members:
            report(f"{member.name}: power, incusd")
            member.power_on()
            member.ours("incusd")
        if not self.first.query("/1.0")["environment"]["server_clustered"]:
            report(f"{self.first.name}: set up as a single server")
            self.first.ours("found")
            self.first.ours("enable", TEST_NAME=self.first.name)
        joined = {entry["server_name"] for entry in self.first.query("/1.0/cluster/members?recursion=1")}
        for member in self.members:
            if member.name not in joined:
                report(f"{member.name}: joins")
                member.ours("join", TEST_TOKEN=self.first.ours("add", TEST_NAME=member.name).split()[-1])
        return ours

    def down(self, report: Report) -> None:
        """End and remove all of it."""
        # also such as a test added and left
        for folder in self.folder.glob("m[0-9]"):
            Member(self, int(folder.name[1:])).remove()
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)
        for at in _hierarchies():
            _remove(at / self.cgroup)
        shutil.rmtree(self.folder, ignore_errors=True)
        report(f"removed {self.folder}")


def _remove(folder: Path) -> bool:
    """Remove a tree of control groups; return whether it is gone."""
    for inner, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(inner)
    return not folder.exists()


def _hierarchies() -> list[Path]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [Path(line.split()[1]) for line in lines if line.split()[2] in ("cgroup", "cgroup2")]


def _began(pid: int) -> str:
    """Return when a process began, empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _ip(*words: str) -> None:
    run(["ip", *words], fix="a cluster for tests needs root")


def main(words: list[str]) -> int:
    """Do one of the words in the usage below. `up` exits 3 where the cluster is this run's to remove."""
    rig = Rig()
    try:
        match words:
            case ["up"]:
                ours = rig.up(print)
                print(rig.first.incus("cluster", "list"))
                return 3 if ours else 0
            case ["down"]:
                rig.down(print)
            case [("kill" | "heal" | "cut" | "plug" | "gateway" | "ungateway") as action, name]:
                member = rig.member(name)
                match action:
                    case "kill":
                        member.cut_power()
                    case "heal":
                        member.power_on()
                        member.ours("incusd")
                    case "cut":
                        member.unplug()
                    case "plug":
                        member.plug()
                    case _:
                        print(member.ours(action), end="")
            case ["in", name, *command]:
                command = rig.member(name).command(*command)
                os.execvp(command[0], command)
            case _:
                print("usage: python -m tests.cluster.rig up|down", file=sys.stderr)
                print("   or: … kill|heal|cut|plug|gateway|ungateway MEMBER", file=sys.stderr)
                print("   or: … in MEMBER COMMAND…", file=sys.stderr)
                return 2
    except HostError as error:
        print(f"failed: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
