"""A real systemd on a machine whose first process is another: the manager of one user, with its bus."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.waits import until_true

PROGRAM: Final = Path("/usr/lib/systemd/systemd")
_TREES: Final = tuple(filter(Path.is_dir, map(Path, ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"))))
# systemd --user refuses where it finds no sign of a system's manager
_BOOTED: Final = 'mount -t tmpfs none /run/systemd && mkdir /run/systemd/system && exec "$@"'


class UserSystemd:
    """`systemd --user` of a user, of whom its units run as processes of this machine."""

    def __init__(self, user: str, uid: int) -> None:
        self._user, self._uid = user, uid
        self._run = Path("/run", user)
        self.units = self._run / ".config/systemd/user"
        as_user = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "env", "-i")
        self._as_user = (
            *as_user,
            f"PATH={os.environ['PATH']}",
            f"HOME={self._run}",
            f"XDG_RUNTIME_DIR={self._run}",
            f"DBUS_SESSION_BUS_ADDRESS=unix:path={self._run}/bus",
        )
        self._groups = [tree / user for tree in _TREES or (Path("/sys/fs/cgroup"),)]
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def before(self) -> tuple[str, ...]:
        """The words before a command of systemd, such as `systemctl`, that have it ask this manager."""
        return (*self._as_user, "sh", "-c", 'program=$1; shift; exec "$program" --user "$@"', "sh")

    def start(self) -> None:
        """Start it; return once it answers."""
        subprocess.run(
            ("useradd", "--no-create-home", f"--uid={self._uid}", self._user), check=True, capture_output=True
        )
        for folder in (self._run, self.units):
            folder.mkdir(mode=0o700, parents=True)
        for folder in (self._run, *self._run.rglob("*")):
            os.chown(folder, self._uid, self._uid)
        for group in self._groups:
            group.mkdir()
            for path in (group, *group.iterdir()):
                if path.name in (self._user, "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
                    os.chown(path, self._uid, self._uid)
        Path("/run/systemd").mkdir(exist_ok=True)
        if shutil.which("dbus-daemon"):  # else what needs a bus, such as `busctl`, fails
            address = f"--address=unix:path={self._run}/bus"
            self._begin(*self._as_user, "dbus-daemon", "--session", "--nofork", address)
            until_true((self._run / "bus").exists)
        # in its groups from its beginning, since it finds its own there
        enter = "".join(f"echo 0 >{group}/cgroup.procs && " for group in self._groups)
        begin = ("unshare", "--mount", "sh", "-c", enter + _BOOTED, "sh", *self._as_user)
        self._begin(*begin, str(PROGRAM), "--user", "--unit=basic.target")
        asked = (*self.before, "systemctl", "show", "--property=Version")
        until_true(lambda: subprocess.run(asked, capture_output=True, check=False).returncode == 0)

    def _begin(self, *words: str) -> None:
        self._processes.append(subprocess.Popen(words))

    def stop(self) -> None:
        """End it with all that it started, and remove its user."""
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20)
        for group in self._groups:
            for folder, _, _ in os.walk(group, topdown=False):
                os.rmdir(folder)
        shutil.rmtree(self._run)
        subprocess.run(("userdel", self._user), check=True, capture_output=True)
