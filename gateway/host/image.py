"""The tenants' base image: its definition, its build, and its import into Incus.

The digest of the definition names the built image on this host and is stored in the properties of the
imported one, so that a second daemon imports it without a build and a changed definition is rebuilt.
Everything but the import needs only the standard library, so that quickstart can build the image while it
installs the gateway.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import sys
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gateway.host import HostError, Report, SetupChange, Steps, run
from gateway.host.toolchain import (
    BUN,
    BUN_INTEGRITY,
    CACHE,
    NODE,
    build_folder,
    bun_variant,
    install_tools,
    locked_cache,
    prune,
    tool_archives,
)

if TYPE_CHECKING:
    from gateway.host.incus import IncusAdmin
    from gateway.settings import Settings

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
_BRIDGE_ADDRESS = f"{{{{ config_get('{BRIDGE}', '') }}}}"
TEMPLATES = {
    "/etc/resolv.conf": f"nameserver {_BRIDGE_ADDRESS}\n",
    "/etc/default/bridge": f"BRIDGE={_BRIDGE_ADDRESS}\n",
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
        archives = tool_archives(self.architecture, headers=self.compiler)
        programs = [asdict(archive) for archive in archives], BUN, BUN_INTEGRITY[self.bun]
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
        bun=bun_variant(machine, flags),
        user=choices.workspace_user,
        uid=choices.workspace_uid,
        workspace=choices.workspace,
        certificates=CA_BUNDLE.read_bytes() if CA_BUNDLE.exists() else b"",
        compiler=choices.image_compiler,
    )


# --- build --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Artefact:
    """A built image on disk: Incus's split format."""

    metadata: Path
    rootfs: Path

    @property
    def fingerprint(self) -> str:
        """The fingerprint that Incus gives the image: SHA-256 over both files, metadata first."""
        digest = hashlib.sha256()
        for part in (self.metadata, self.rootfs):
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def ensure_artefact(definition: Definition, steps: Steps, cache: Path, *, rebuild: bool = False) -> Artefact:
    """Return the image of a definition, building it if it is not cached or if `rebuild` is set.

    A build takes about a minute. It can be interrupted safely: the image appears in the cache by one rename.
    Of two concurrent callers, the second waits for the first. Raises `HostError`.
    """
    artefact = Artefact(*(cache / f"{definition.digest}.{kind}" for kind in ("tar", "squashfs")))
    with locked_cache(cache, steps.report) as lock:
        if rebuild or not (artefact.metadata.exists() and artefact.rootfs.exists()):
            with build_folder(cache) as place:
                _build_artefact(definition, cache, place, steps, artefact, lock)
        keep_artefact(cache, artefact)
    return artefact


def keep_artefact(cache: Path, used: Artefact) -> None:
    """Keep `used` and the most recently used other artefacts, `KEPT` in all; remove the rest.

    Gateways of different versions on one host have different definitions and share one cache.
    """
    os.utime(used.rootfs)
    for old in prune(cache.glob("*.squashfs")):
        old.with_suffix(".tar").unlink(missing_ok=True)


def _build_artefact(
    definition: Definition, cache: Path, place: Path, steps: Steps, artefact: Artefact, lock: int
) -> None:
    tree, local = place / "tree", place / "local"
    made = Artefact(place / "metadata.tar", place / "rootfs.squashfs")
    steps.report(f"building Debian {SUITE} for {definition.architecture}, about half a minute")
    with ThreadPoolExecutor(max_workers=1) as beside:
        programs = beside.submit(
            install_tools,
            *(definition.architecture, definition.bun),
            headers=definition.compiler,
            cache=cache,
            target=local,
        )
        steps.run(f"Debian {SUITE}", lambda: _bootstrap(definition, place, tree, lock))
        steps.run("programs", programs.result)
    steps.run("packing", lambda: _pack(definition, tree, local, made, lock))
    # Metadata last: its presence means that the other file is complete. Both by rename within a file system.
    for source, target in ((made.rootfs, artefact.rootfs), (made.metadata, artefact.metadata)):
        with source.open("rb") as file:
            os.fsync(file.fileno())
        source.replace(target)


def _bootstrap(definition: Definition, place: Path, tree: Path, lock: int) -> str:
    overlay = place / "overlay"
    for name, text in FILES.items():
        target = overlay / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(0o644)
    finish = place / "finish_image.sh"
    finish.write_text(FINISH)
    facts = (definition.uid, definition.user, definition.workspace)
    words = " ".join(shlex.quote(str(word)) for word in (*facts, " ".join(MASKED), " ".join(GENERATORS)))
    hooks = [f'copy-in "{overlay}/etc" "{overlay}/usr" /', f'sh "{finish}" "$1" {words}']
    if definition.certificates:
        # A container behind the same network needs the additional CAs that the host trusts.
        bundle = place / "ca-certificates.crt"
        bundle.write_bytes(definition.certificates)
        hooks.append(f'install -m 0644 "{bundle}" "$1{CA_BUNDLE}"')
    run(
        [
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--architectures={definition.architecture}",
            f"--include={','.join(definition.packages)}",
            '--aptopt=Apt::Install-Recommends "false"',
            *(f"--aptopt={option}" for option in _apt_options()),
            # if anything goes wrong the tree is built again, so only the packed image is flushed to disk
            "--dpkgopt=force-unsafe-io",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            "--dpkgopt=path-exclude=/usr/share/locale/*/LC_MESSAGES/*.mo",
            "--dpkgopt=path-exclude=/usr/lib/udev/hwdb.d/*",  # a container has no hardware to name
            *(f"--customize-hook={hook}" for hook in hooks),
            SUITE,
            tree,
        ],
        env={**os.environ, "TMPDIR": str(place)},
        holding=(lock,),
        fix="check that this machine can reach a Debian mirror (apt-get update), then run again",
        timeout=1800.0,
    )
    return f"{len(definition.packages)} packages and their dependencies"


def _apt_options() -> list[str]:
    """Return this host's apt settings for reaching mirrors (proxies, timeouts), which mmdebstrap ignores."""
    dump = run(["apt-config", "dump", "Acquire"], fix="this needs Debian or Ubuntu")
    lines = (line.rstrip(";") for line in dump.splitlines())
    wanted = re.compile(r"Acquire::(https?::(Proxy|Timeout|CaInfo)|Check-(Valid-Until|Date)|Retries)\b", re.I)
    return [line for line in lines if wanted.match(line) and not line.endswith('""')]


def _pack(definition: Definition, tree: Path, local: Path, made: Artefact, lock: int) -> str:
    # hard links: both are on one file system, and only read from here on
    run(["cp", "--archive", "--link", f"{local}/.", tree / "usr/local"], fix="run again")
    # level 6 would save 6% and take 9 s of CPU time instead of 4
    run(
        [
            *("mksquashfs", tree, made.rootfs),
            *("-comp", "zstd", "-Xcompression-level", "3", "-noappend", "-no-progress", "-quiet"),
        ],
        holding=(lock,),
        fix="check whether the disk is full, then run again",
    )
    parts = {"metadata.yaml": json.dumps(image_metadata(definition), indent=2)}  # JSON is YAML
    parts |= {f"templates/{_template_name(path)}": text for path, text in TEMPLATES.items()}
    with tarfile.open(made.metadata, "w") as archive:
        for name, text in parts.items():
            entry, content = tarfile.TarInfo(name), text.encode()
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, BytesIO(content))
    return f"{made.rootfs.stat().st_size >> 20} MiB"


def image_metadata(definition: Definition) -> dict[str, Any]:
    """Return the contents of the image's metadata.yaml for Incus."""
    return {
        "architecture": {"amd64": "x86_64", "arm64": "aarch64"}[definition.architecture],
        # Fixed, so that the fingerprint depends only on the definition and the packages.
        "creation_date": 1,
        "properties": {
            "os": "Debian",
            "release": SUITE,
            "description": f"incus-gateway tenant: Debian {SUITE}, Node {NODE}, Bun {BUN}",
            PROPERTY: definition.digest,
        },
        "templates": {path: {"when": ["create"], "template": _template_name(path)} for path in TEMPLATES},
    }


def _template_name(path: str) -> str:
    return path.rpartition("/")[2] + ".tpl"


def main() -> int:
    """Build the image defined by the default settings into the cache."""
    try:
        ensure_artefact(define(), Steps(_say), CACHE)
    except HostError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())


# --- import -------------------------------------------------------------------------------------------------


def build_image(
    settings: Settings, report: Report, *, cache: Path = CACHE, rebuild: bool = False
) -> list[SetupChange]:
    """Provide the base image under its alias in Incus, building it if it is not cached or `rebuild` is set.

    Takes about a minute, or seconds from the cache. It can be interrupted safely: the alias moves only to a
    complete image. Images of older definitions are removed from Incus, and all but the latest from the cache;
    tenants created from them are not affected.
    """
    from gateway.host.incus import IncusAdmin  # needs pylxd

    definition = define(settings)
    steps = Steps(report)
    incus = IncusAdmin(settings.incus_socket, settings.incus_project, timeout=600.0)
    if not rebuild and _imported_digest(incus, settings.image) == definition.digest:
        steps.run(f"image {settings.image}", lambda: None, unchanged=f"definition {definition.digest}")
        return steps.changes
    artefact = ensure_artefact(definition, steps, cache, rebuild=rebuild)
    with locked_cache(cache, report):  # so that nobody replaces the artefact meanwhile
        steps.run(
            f"image {settings.image}",
            lambda: _import_image(incus, settings.image, artefact, definition.digest),
        )
    return steps.changes


def _imported_digest(incus: IncusAdmin, alias: str) -> str | None:
    """Return the digest of the definition behind an alias, or None."""
    found = incus.find("images", "aliases", alias)
    if found is None:
        return None
    image = incus.find("images", found["target"])
    return None if image is None else image.get("properties", {}).get(PROPERTY)


def _import_image(incus: IncusAdmin, alias: str, artefact: Artefact, digest: str) -> str:
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
    """Return boundary and body of an image upload, in pieces: requests would load whole files into memory."""
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
