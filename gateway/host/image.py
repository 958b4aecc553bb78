"""Build the base image of tenants and import it: Debian, systemd, the user `site`, Node, Bun, uv.

An image is the outcome of its definition (`definition`). The digest of that names the artefact in the cache
(`artefacts`) and is written into the image's properties, so that a second daemon imports without a build, and
a changed definition is rebuilt.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

from gateway.host import Change, Report, Steps, bun, run, toolchain
from gateway.host.artefacts import Artefact, alone, keep, workplace
from gateway.host.definition import (
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
from gateway.host.incus import Incus
from gateway.host.setup import CA_BUNDLE
from gateway.settings import Settings


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
    with alone(cache, report) as lock:
        artefact = Artefact(*(cache / f"{definition.digest}.{kind}" for kind in ("tar", "squashfs")))
        if rebuild or not (artefact.metadata.exists() and artefact.rootfs.exists()):
            with workplace(cache) as place:
                _build(definition, cache, place, steps, artefact, lock)
        steps.run(
            f"image {settings.image}", lambda: _import(incus, settings.image, artefact, definition.digest)
        )
        keep(cache, artefact)
    return steps.changes


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
    # Metadata last: its presence says that the other is whole. Both by rename, within one file system.
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
            f"--include={','.join(definition.packages)}",
            '--aptopt=Apt::Install-Recommends "false"',
            *(f"--aptopt={option}" for option in _apt_options()),
            # the tree is made anew where anything goes wrong; what is flushed to the disk is the packed image
            "--dpkgopt=force-unsafe-io",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            "--dpkgopt=path-exclude=/usr/share/locale/*/LC_MESSAGES/*.mo",
            "--dpkgopt=path-exclude=/usr/lib/udev/hwdb.d/*",  # a container has no hardware to be named
            *(f"--customize-hook={hook}" for hook in hooks),
            SUITE,
            tree,
        ],
        env={**os.environ, "TMPDIR": str(place)},
        holding=(lock,),
        fix="check that this machine reaches a Debian mirror (apt-get update), then run again",
        timeout=1800.0,
    )
    return f"{len(definition.packages)} packages and what they need"


def _apt_options() -> list[str]:
    """Return how this host's apt reaches its mirrors (proxies, timeouts); mmdebstrap starts without it."""
    dump = run(["apt-config", "dump", "Acquire"], fix="this needs Debian or Ubuntu")
    lines = (line.rstrip(";") for line in dump.splitlines())
    wanted = re.compile(r"Acquire::(https?::(Proxy|Timeout|CaInfo)|Check-(Valid-Until|Date)|Retries)\b", re.I)
    return [line for line in lines if wanted.match(line) and not line.endswith('""')]


def _pack(definition: Definition, tree: Path, local: Path, made: Artefact, lock: int) -> str:
    # links: both are on one file system, and only read from here on
    run(["cp", "--archive", "--link", f"{local}/.", tree / "usr/local"], fix="run again")
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
            "description": f"incus-gateway tenant: Debian {SUITE}, Node {toolchain.NODE}, Bun {bun.VERSION}",
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
