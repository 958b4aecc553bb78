"""Provide the tenants' base image in Incus: Debian, systemd, the user `site`, Node, Bun, Python, uv.

An image is built from its definition (`definition`). The definition's digest names the built image on this
host (`artefacts`) and is stored in the image's properties, so that a second daemon imports it without a build
and a changed definition is rebuilt.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gateway.host import Change, Report, Steps, artefacts
from gateway.host.artefacts import Artefact
from gateway.host.cache import CACHE, alone
from gateway.host.definition import PROPERTY, define
from gateway.host.incus import Incus
from gateway.settings import Settings


def build(settings: Settings, report: Report, *, cache: Path = CACHE, rebuild: bool = False) -> list[Change]:
    """Provide the base image under its alias in Incus, building it if it is not cached or `rebuild` is set.

    Takes about a minute, or seconds from the cache. It can be interrupted safely: the alias moves only to a
    complete image. Images of older definitions are removed from Incus, and all but the latest from the cache;
    tenants created from them are not affected.
    """
    definition = define(settings)
    steps = Steps(report)
    incus = Incus(settings.incus_socket, settings.incus_project, timeout=600.0)
    if not rebuild and _imported(incus, settings.image) == definition.digest:
        steps.run(f"image {settings.image}", lambda: None, unchanged=f"definition {definition.digest}")
        return steps.changes
    artefact = artefacts.ensure(definition, steps, cache, rebuild=rebuild)
    with alone(cache, report):  # so that nobody replaces the artefact meanwhile
        steps.run(
            f"image {settings.image}", lambda: _import(incus, settings.image, artefact, definition.digest)
        )
    return steps.changes


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
