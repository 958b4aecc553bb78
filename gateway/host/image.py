"""Build the base image of tenants and import it: Debian, systemd, the user `site`, Bun.

An image is the outcome of its definition: what this module, `overlay/` and `finish_image.sh` say, the
settings that go into it, and the CA certificates of the host. The digest of that names the artefact in the
cache and is written into the image's properties, so that a second daemon imports without a build, and a
changed definition is rebuilt.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from gateway.host import Change, HostError, Report, Steps, bun, run
from gateway.host.incus import Incus
from gateway.host.setup import BRIDGE, CA_BUNDLE
from gateway.settings import Settings

PROPERTY = "incus-gateway.definition"
SUITE = "trixie"
KEPT = 3  # built images in the cache

# What a web site's developer expects to find, and no more: each megabyte counts against every tenant's quota.
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
    "nano",
    "openssh-client",
    "patch",
    "procps",
    "psmisc",
    "rsync",
    "systemd-sysv",
    "udev",
    "unzip",
    "util-linux",
    "xz-utils",
    "zip",
)

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

    @property
    def digest(self) -> str:
        """Return the name of this definition: 16 hex digits of the SHA-256 over all that decides."""
        program = (bun.VERSION, bun.INTEGRITY[self.bun])
        parts = (SUITE, PACKAGES, *program, FILES, MASKED, GENERATORS, TEMPLATES, FINISH)
        text = json.dumps([*parts, self.architecture, self.user, self.uid, self.workspace])
        return hashlib.sha256(text.encode() + b"\0" + self.certificates).hexdigest()[:16]


def define(settings: Settings, machine: str = "", flags: str | None = None) -> Definition:
    """Return the definition of the image for this host, or for another `machine` with CPU `flags`."""
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise HostError(f"no base image for {machine}: Bun exists for {' and '.join(MACHINES)}")
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", settings.workspace_user):
        raise HostError(f"GATEWAY_WORKSPACE_USER {settings.workspace_user!r} is not a user name")
    if not re.fullmatch(r"(/[A-Za-z0-9._-]+)+", settings.workspace) or ".." in settings.workspace.split("/"):
        raise HostError(f"GATEWAY_WORKSPACE {settings.workspace!r} must be an absolute path of plain names")
    return Definition(
        architecture=MACHINES[machine],
        bun=bun.variant(machine, flags),
        user=settings.workspace_user,
        uid=settings.workspace_uid,
        workspace=settings.workspace,
        certificates=CA_BUNDLE.read_bytes() if CA_BUNDLE.exists() else b"",
    )


@dataclass(frozen=True, slots=True)
class Artefact:
    """A built image on disk: Incus's split format."""

    metadata: Path
    rootfs: Path

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint that Incus gives it: the SHA-256 over both files, metadata first."""
        digest = hashlib.sha256()
        for part in (self.metadata, self.rootfs):
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def build(
    settings: Settings, report: Report, *, cache: Path = bun.CACHE, rebuild: bool = False
) -> list[Change]:
    """Have the base image under its alias in Incus, building it where the cache lacks it.

    Takes about a minute, or seconds from the cache. Safe to interrupt: the artefact appears in the cache
    in one rename, and the alias moves only to a complete image. `rebuild` builds in any case. Images of
    older definitions are removed from Incus, and all but the latest from the cache; tenants that were made
    from them do not notice.
    """
    definition = define(settings)
    steps = Steps(report)
    incus = Incus(settings.incus_socket, settings.incus_project, timeout=600.0)
    if not rebuild and _imported(incus, settings.image) == definition.digest:
        steps.run(f"image {settings.image}", lambda: None, unchanged=f"definition {definition.digest}")
        return steps.changes
    with _alone(cache, report) as lock:
        artefact = Artefact(*(cache / f"{definition.digest}.{kind}" for kind in ("tar", "squashfs")))
        if rebuild or not (artefact.metadata.exists() and artefact.rootfs.exists()):
            with _workplace(cache) as place:
                _build(definition, cache, place, steps, artefact, lock)
        steps.run(
            f"image {settings.image}", lambda: _import(incus, settings.image, artefact, definition.digest)
        )
        keep(cache, artefact)
    return steps.changes


def keep(cache: Path, used: Artefact) -> None:
    """Keep what was `used` now and the artefacts used last before it, `KEPT` in all; remove the others.

    Gateways of different versions on one host build different definitions, from one cache.
    """
    os.utime(used.rootfs)
    for old in sorted(cache.glob("*.squashfs"), key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        old.with_suffix(".tar").unlink(missing_ok=True)  # first: it says that the other is whole
        old.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(cache: Path, report: Report) -> Iterator[int]:
    """Hold the cache: of two builds at once, the second waits and finds the first one's artefact.

    Yields the lock's descriptor for the programs of the build, which may outlive a killed builder.
    """
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another build of the image to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


@contextlib.contextmanager
def _workplace(cache: Path) -> Iterator[Path]:
    """Give an empty folder, removed afterwards; those of killed builds go first, with what they mounted."""
    for left in cache.glob("build-*"):
        _clear(left)
    place = Path(tempfile.mkdtemp(prefix="build-", dir=cache))
    # mmdebstrap drops its privileges to fetch, so the folder must be passable.
    place.chmod(0o755)
    try:
        yield place
    finally:
        _clear(place)


def _clear(place: Path) -> None:
    # A killed mmdebstrap leaves proc and sys mounted in its tree: deleting through them would be a disaster.
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        mount = Path(line.split()[1])
        if mount != place and mount.is_relative_to(place):
            run(["umount", "--lazy", mount], fix=f"unmount {mount} and run again")
    shutil.rmtree(place)


def _build(
    definition: Definition, cache: Path, place: Path, steps: Steps, artefact: Artefact, lock: int
) -> None:
    tree = place / "tree"
    made = Artefact(place / "metadata.tar", place / "rootfs.squashfs")
    steps.run(f"Bun {bun.VERSION} ({definition.bun})", lambda: _fetch_bun(definition, cache))
    steps.report(f"building Debian {SUITE} for {definition.architecture}, about half a minute")
    steps.run(
        f"Debian {SUITE}",
        lambda: _bootstrap(definition, place, tree, bun.ensure(definition.bun, cache), lock),
    )
    steps.run("packing", lambda: _pack(definition, tree, made, lock))
    # Metadata last: its presence says that the other is whole. Both by rename, within one file system.
    for source, target in ((made.rootfs, artefact.rootfs), (made.metadata, artefact.metadata)):
        with source.open("rb") as file:
            os.fsync(file.fileno())
        source.replace(target)


def _fetch_bun(definition: Definition, cache: Path) -> str:
    size = bun.ensure(definition.bun, cache).stat().st_size
    return f"{size >> 20} MiB, integrity checked when it was fetched"


def _bootstrap(definition: Definition, place: Path, tree: Path, program: Path, lock: int) -> str:
    overlay = place / "overlay"
    for name, text in FILES.items():
        target = overlay / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(0o644)
    finish = place / "finish_image.sh"
    finish.write_text(FINISH)
    facts = (definition.uid, definition.user, definition.workspace, program)
    words = " ".join(shlex.quote(str(word)) for word in (*facts, " ".join(MASKED), " ".join(GENERATORS)))
    hooks = [f'copy-in "{overlay}/etc" /', f'sh "{finish}" "$1" {words}']
    if definition.certificates:
        # What the host trusts beside Debian's own, a guest behind the same network needs too.
        bundle = place / "ca-certificates.crt"
        bundle.write_bytes(definition.certificates)
        hooks.append(f'install -m 0644 "{bundle}" "$1{CA_BUNDLE}"')
    run(
        [
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--architectures={definition.architecture}",
            f"--include={','.join(PACKAGES)}",
            '--aptopt=Apt::Install-Recommends "false"',
            *(f"--aptopt={option}" for option in _apt_options()),
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            "--dpkgopt=path-exclude=/usr/share/locale/*/LC_MESSAGES/*.mo",
            *(f"--customize-hook={hook}" for hook in hooks),
            SUITE,
            tree,
        ],
        env={**os.environ, "TMPDIR": str(place)},
        holding=(lock,),
        fix="check that this machine reaches a Debian mirror (apt-get update), then run again",
        timeout=1800.0,
    )
    return f"{len(PACKAGES)} packages and what they need"


def _apt_options() -> list[str]:
    """Return how this host's apt reaches its mirrors (proxies, timeouts); mmdebstrap starts without it."""
    dump = run(["apt-config", "dump", "Acquire"], fix="this needs Debian or Ubuntu")
    lines = (line.rstrip(";") for line in dump.splitlines())
    wanted = re.compile(r"Acquire::(https?::(Proxy|Timeout|CaInfo)|Check-(Valid-Until|Date)|Retries)\b", re.I)
    return [line for line in lines if wanted.match(line) and not line.endswith('""')]


def _pack(definition: Definition, tree: Path, made: Artefact, lock: int) -> str:
    run(
        [
            *("mksquashfs", tree, made.rootfs),
            *("-comp", "zstd", "-Xcompression-level", "6", "-noappend", "-no-progress", "-quiet"),
        ],
        holding=(lock,),
        fix="see whether the disk is full, then run again",
    )
    parts = {"metadata.yaml": json.dumps(image_metadata(definition), indent=2)}  # JSON is YAML
    parts |= {f"templates/{_template(path)}": text for path, text in TEMPLATES.items()}
    with tarfile.open(made.metadata, "w") as archive:
        for name, text in parts.items():
            entry, content = tarfile.TarInfo(name), text.encode()
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, BytesIO(content))
    return f"{made.rootfs.stat().st_size >> 20} MiB"


def image_metadata(definition: Definition) -> dict[str, Any]:
    """Return what Incus's metadata.yaml says of the image."""
    return {
        "architecture": {"amd64": "x86_64", "arm64": "aarch64"}[definition.architecture],
        # Fixed, so that one definition has one fingerprint as far as its packages do.
        "creation_date": 1,
        "properties": {
            "os": "Debian",
            "release": SUITE,
            "description": f"incus-gateway tenant: Debian {SUITE}, Bun {bun.VERSION}",
            PROPERTY: definition.digest,
        },
        "templates": {path: {"when": ["create"], "template": _template(path)} for path in TEMPLATES},
    }


def _template(path: str) -> str:
    return path.rpartition("/")[2] + ".tpl"


def _imported(incus: Incus, alias: str) -> str | None:
    """Return the digest of the definition behind an alias, or None."""
    found = incus.find("images", "aliases", alias)
    if found is None:
        return None
    image = incus.find("images", found["target"])
    return None if image is None else image.get("properties", {}).get(PROPERTY)


def _import(incus: Incus, alias: str, artefact: Artefact, digest: str) -> str:
    fingerprint = artefact.fingerprint
    if incus.find("images", fingerprint) is None:
        boundary, parts = _multipart(artefact)
        incus.post(
            "images",
            data=parts,
            headers={"Content-Type": f"multipart/form-data; boundary={boundary}", "X-Incus-public": "0"},
        )
    target = {"name": alias, "type": "container", "target": fingerprint, "description": ""}
    found = incus.find("images", "aliases", alias)
    if found is None:
        incus.post("images", "aliases", json=target)
    elif found["target"] != fingerprint:
        incus.put("images", "aliases", alias, json=target)
    for other in incus.names("images"):
        image: Mapping[str, Any] = incus.find("images", other) or {}
        if other != fingerprint and PROPERTY in image.get("properties", {}) and not image.get("aliases"):
            incus.delete("images", other)
    return f"imported, definition {digest}"


def _multipart(artefact: Artefact) -> tuple[str, Iterator[bytes]]:
    """Return boundary and body of an image upload, in pieces: requests would hold the files in memory."""
    boundary = "incus-gateway-" + os.urandom(12).hex()

    def pieces() -> Iterator[bytes]:
        for name, part in (("metadata", artefact.metadata), ("rootfs", artefact.rootfs)):
            yield (
                f"--{boundary}\r\n"
                f'Content-Disposition: form-data; name="{name}"; filename="{part.name}"\r\n'
                "Content-Type: application/octet-stream\r\n\r\n"
            ).encode()
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    yield block
            yield b"\r\n"
        yield f"--{boundary}--\r\n".encode()

    return boundary, pieces()
