"""The definition of the tenants' base image, and its digest: packages, files, units, user.

It consists of this module, `overlay/`, `finish_image.sh`, some settings, and the host's CA certificates.
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
TRUST = ("NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
"""Variables that name `CA_BUNDLE` to programs with their own certificates: Node, Bun; requests; httpx, uv."""
BRIDGE = "user.gateway.bridge"  # the profile's key for the address of the bridge
PROPERTY = "incus-gateway.definition"
SUITE = "trixie"

# What web developers and agents expect to find, and no more: each megabyte counts towards every tenant's
# quota.
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

# For building Node add-ons and Python packages without a wheel; larger than all of the above together.
COMPILER = ("g++", "libc6-dev", "python3-dev")

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}

_HERE = Path(__file__).parent
_OVERLAY = _HERE / "overlay"

FILES = {
    str(path.relative_to(_OVERLAY)): path.read_text()
    for path in sorted(_OVERLAY.rglob("*"))
    if path.is_file()
}
"""Files added to Debian, by path: units, and the files they use."""

# Files that Incus writes before an instance starts for the first time, so that one image serves every bridge.
# Never later: by then the tenant's root could redirect the daemon's writes.
_BRIDGE = f"{{{{ config_get('{BRIDGE}', '') }}}}"
TEMPLATES = {
    "/etc/resolv.conf": f"nameserver {_BRIDGE}\n",
    "/etc/default/bridge": f"BRIDGE={_BRIDGE}\n",
}

# Units for real machines that are useless in a container; each would cost time or memory, or log a failure.
# Nobody logs in, so logind has no sessions. The sockets of networkd and udev would keep starting these
# services when they are not needed; both work without them.
# Not udev itself: a container's /sys is writable, so networkd ignores eth0 until udev has seen it.
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
    # each is one more process before the site starts; devices and /run/lock exist already, /run/nologin never
    # does
    "dev-mqueue.mount",
    "run-lock.mount",
    "systemd-hibernate-clear.service",
    "systemd-journal-flush.service",
    "systemd-tmpfiles-setup-dev-early.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tpm2-setup-early.service",
    "systemd-user-sessions.service",
)

# Generators that make units for hardware. Those for /etc/fstab, /etc/rc.local and /etc/init.d stay.
GENERATORS = tuple(
    f"systemd-{name}-generator"
    for name in ("debug", "getty", "gpt-auto", "hibernate-resume", "run", "ssh", "system-update", "tpm2")
)

FINISH = (_HERE / "finish_image.sh").read_text()


@dataclass(frozen=True, slots=True)
class Definition:
    """Everything that determines the contents of the image."""

    architecture: str  # as Debian names it
    bun: str  # the variant of @oven/bun-linux-…
    user: str
    uid: int
    workspace: str
    certificates: bytes
    compiler: bool

    @property
    def packages(self) -> tuple[str, ...]:
        """The names of the Debian packages."""
        return (*PACKAGES, *COMPILER) if self.compiler else PACKAGES

    @property
    def digest(self) -> str:
        """The definition's name: 16 hex digits of the SHA-256 over everything that determines the image."""
        archives = toolchain.archives(self.architecture, headers=self.compiler)
        programs = [asdict(archive) for archive in archives], bun.VERSION, bun.INTEGRITY[self.bun]
        parts = (SUITE, self.packages, *programs, FILES, MASKED, GENERATORS, TEMPLATES, FINISH)
        text = json.dumps([*parts, self.architecture, self.user, self.uid, self.workspace])
        return hashlib.sha256(text.encode() + b"\0" + self.certificates).hexdigest()[:16]


class Choices(Protocol):
    """The settings that affect the image."""

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
    """The settings' defaults, for code that runs before settings can be read."""

    workspace: str = "/srv/site"
    workspace_user: str = "site"
    workspace_uid: int = 1000
    image_compiler: bool = False


def define(choices: Choices | None = None, machine: str = "", flags: str | None = None) -> Definition:
    """Return the definition of the image for this host, or for another `machine` with CPU `flags`."""
    choices = choices or Defaults()
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise HostError(f"no base image for {machine}: Bun exists only for {' and '.join(MACHINES)}")
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
