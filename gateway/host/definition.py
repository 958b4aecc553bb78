"""The definition of the tenants' base image: its packages, files, units and user, and the digest of it all.

The definition is what this module, `overlay/` and `finish_image.sh` say, the settings that go into it, and
the CA certificates of the host.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from gateway.host import HostError, bun, toolchain

CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
BRIDGE = "user.gateway.bridge"  # the profile's key with the address of the bridge
PROPERTY = "incus-gateway.definition"
SUITE = "trixie"

# What a web site's developer and an agent expect to find, and no more: each megabyte counts against every
# tenant's quota.
PACKAGES = (
    "bash-completion",
    "ca-certificates",
    "curl",
    "dbus",
    "file",
    "git",
    "iproute2",
    "iputils-ping",
    "jq",
    "less",
    "lsof",
    "make",
    "nano",
    "openssh-client",
    "patch",
    "procps",
    "psmisc",
    "python3",
    "python3-pip",
    "python3-venv",
    "ripgrep",
    "rsync",
    "systemd-sysv",
    "tree",
    "udev",
    "unzip",
    "util-linux",
    "vim-tiny",
    "wget",
    "xz-utils",
    "zip",
)

# What add-ons of Node and Python packages without a wheel are built with; larger than all of the above.
COMPILER = ("g++", "libc6-dev", "python3-dev")

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}

_HERE = Path(__file__).parent
_OVERLAY = _HERE / "overlay"

FILES = {
    str(path.relative_to(_OVERLAY)): path.read_text()
    for path in sorted(_OVERLAY.rglob("*"))
    if path.is_file()
}
"""What is laid over Debian, by path: units, and what they read."""

# What Incus fills in before an instance of the image starts for the first time, so that an image serves every
# bridge. Never later: the tenant's root could lead what the daemon writes then to elsewhere.
_BRIDGE = f"{{{{ config_get('{BRIDGE}', '') }}}}"
TEMPLATES = {
    "/etc/resolv.conf": f"nameserver {_BRIDGE}\n",
    "/etc/default/bridge": f"BRIDGE={_BRIDGE}\n",
}

# Units of a real machine that a container has no use for; each would cost time, memory or log a failure.
# Nobody logs in, so that logind has no sessions. The sockets of networkd and udev would start these again and
# again where they are not needed; both do without.
# Not udev itself: a container's /sys is writable, so networkd leaves eth0 alone until udev has seen it.
MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "getty-static.service",
    "modprobe@.service",
    "systemd-modules-load.service",
    "systemd-network-generator.service",
    "systemd-remount-fs.service",
    "systemd-udev-load-credentials.service",
    "systemd-networkd-wait-online.service",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "console-getty.service",
    "getty@.service",
    "systemd-logind.service",
    "systemd-networkd-persistent-storage.service",
    "systemd-networkd.socket",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    # each a process more until the site starts: devices and /run/lock are there, /run/nologin never is
    "dev-mqueue.mount",
    "run-lock.mount",
    "systemd-hibernate-clear.service",
    "systemd-journal-flush.service",
    "systemd-tmpfiles-setup-dev-early.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tpm2-setup-early.service",
    "systemd-user-sessions.service",
)

# Programs that make units of what a machine has. Those for /etc/fstab, /etc/rc.local and /etc/init.d stay.
GENERATORS = tuple(
    f"systemd-{name}-generator"
    for name in ("debug", "getty", "gpt-auto", "hibernate-resume", "run", "ssh", "system-update", "tpm2")
)

FINISH = (_HERE / "finish_image.sh").read_text()


@dataclass(frozen=True, slots=True)
class Definition:
    """Everything that decides what is in the image."""

    architecture: str  # Debian's word
    bun: str  # the variant of @oven/bun-linux-…
    user: str
    uid: int
    workspace: str
    certificates: bytes
    compiler: bool

    @property
    def packages(self) -> tuple[str, ...]:
        """Return Debian's packages by name."""
        return (*PACKAGES, *COMPILER) if self.compiler else PACKAGES

    @property
    def digest(self) -> str:
        """Return the name of this definition: 16 hex digits of the SHA-256 over all that decides."""
        archives = toolchain.archives(self.architecture, headers=self.compiler)
        programs = [asdict(archive) for archive in archives], bun.VERSION, bun.INTEGRITY[self.bun]
        parts = (SUITE, self.packages, *programs, FILES, MASKED, GENERATORS, TEMPLATES, FINISH)
        text = json.dumps([*parts, self.architecture, self.user, self.uid, self.workspace])
        return hashlib.sha256(text.encode() + b"\0" + self.certificates).hexdigest()[:16]


class Choices(Protocol):
    """What the settings say of the image."""

    @property
    def workspace(self) -> str: ...
    @property
    def workspace_user(self) -> str: ...
    @property
    def workspace_uid(self) -> int: ...
    @property
    def image_compiler(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Defaults:
    """The settings' own defaults, for whoever runs before the settings can be read."""

    workspace: str = "/srv/site"
    workspace_user: str = "site"
    workspace_uid: int = 1000
    image_compiler: bool = False


def define(choices: Choices | None = None, machine: str = "", flags: str | None = None) -> Definition:
    """Return the definition of the image for this host, or for another `machine` with CPU `flags`."""
    choices = choices or Defaults()
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise HostError(f"no base image for {machine}: Bun exists for {' and '.join(MACHINES)}")
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", choices.workspace_user):
        raise HostError(f"GATEWAY_WORKSPACE_USER {choices.workspace_user!r} is not a user name")
    if not re.fullmatch(r"(/[A-Za-z0-9._-]+)+", choices.workspace) or ".." in choices.workspace.split("/"):
        raise HostError(f"GATEWAY_WORKSPACE {choices.workspace!r} must be an absolute path of plain names")
    return Definition(
        architecture=MACHINES[machine],
        bun=bun.variant(machine, flags),
        user=choices.workspace_user,
        uid=choices.workspace_uid,
        workspace=choices.workspace,
        certificates=CA_BUNDLE.read_bytes() if CA_BUNDLE.exists() else b"",
        compiler=choices.image_compiler,
    )
