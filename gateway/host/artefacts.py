"""Built images on this host, each named by the digest of its definition and built once.

This module needs only the standard library, so that quickstart can build an image while it installs the
gateway.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from gateway.host import HostError, Steps, bun, run, toolchain
from gateway.host.cache import CACHE, alone, prune, workplace
from gateway.host.definition import (
    CA_BUNDLE,
    FILES,
    FINISH,
    GENERATORS,
    MASKED,
    PROPERTY,
    SUITE,
    TEMPLATES,
    Definition,
    define,
)


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


def ensure(definition: Definition, steps: Steps, cache: Path, *, rebuild: bool = False) -> Artefact:
    """Return the image of a definition, building it if it is not cached or if `rebuild` is set.

    A build takes about a minute. It can be interrupted safely: the image appears in the cache by one rename.
    Of two concurrent callers, the second waits for the first. Raises `HostError`.
    """
    artefact = Artefact(*(cache / f"{definition.digest}.{kind}" for kind in ("tar", "squashfs")))
    with alone(cache, steps.report) as lock:
        if rebuild or not (artefact.metadata.exists() and artefact.rootfs.exists()):
            with workplace(cache) as place:
                _build(definition, cache, place, steps, artefact, lock)
        keep(cache, artefact)
    return artefact


def keep(cache: Path, used: Artefact) -> None:
    """Keep `used` and the most recently used other artefacts, `KEPT` in all; remove the rest.

    Gateways of different versions on one host have different definitions and share one cache.
    """
    os.utime(used.rootfs)
    for old in prune(cache.glob("*.squashfs")):
        old.with_suffix(".tar").unlink(missing_ok=True)


def _build(
    definition: Definition, cache: Path, place: Path, steps: Steps, artefact: Artefact, lock: int
) -> None:
    tree, local = place / "tree", place / "local"
    made = Artefact(place / "metadata.tar", place / "rootfs.squashfs")
    steps.report(f"building Debian {SUITE} for {definition.architecture}, about half a minute")
    with ThreadPoolExecutor(max_workers=1) as beside:
        programs = beside.submit(
            toolchain.lay,
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
    parts |= {f"templates/{_template(path)}": text for path, text in TEMPLATES.items()}
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
            "description": f"incus-gateway tenant: Debian {SUITE}, Node {toolchain.NODE}, Bun {bun.VERSION}",
            PROPERTY: definition.digest,
        },
        "templates": {path: {"when": ["create"], "template": _template(path)} for path in TEMPLATES},
    }


def _template(path: str) -> str:
    return path.rpartition("/")[2] + ".tpl"


def main() -> int:
    """Build the image defined by the default settings into the cache."""
    try:
        ensure(define(), Steps(_say), CACHE)
    except HostError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
