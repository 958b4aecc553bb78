"""Fetches packages of npm and checks their integrity.

Needs nothing but Python, so that a host needs neither Node nor npm.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import ssl
import urllib.request
from pathlib import Path
from typing import Final

from gateway.host import HostError

REGISTRY: Final = "https://registry.npmjs.org"
_TIMEOUT: Final = 120.0  # seconds without a byte


def fetch(package: str, integrity: str, target: Path) -> None:
    """Put the archive of `NAME@VERSION` at `target`, which appears once it is whole.

    `integrity` is npm's `dist.integrity`: `npm view NAME@VERSION dist.integrity`. Raises `HostError`.
    """
    name, _, version = package.rpartition("@")
    new = target.with_name(f"{target.name}.{os.getpid()}.new")
    try:
        _download(f"{registry()}/{name}/-/{name.rpartition('/')[2]}-{version}.tgz", new, package)
        check_integrity(new, integrity, package)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)


def registry() -> str:
    """Return the registry that npm would ask here, as far as the environment and plain files say."""
    said = os.environ.get("npm_config_registry", "")  # noqa: SIM112 - npm's own name
    npmrc = Path.home() / ".npmrc"
    if not said and npmrc.is_file():
        lines = (line.partition("=") for line in npmrc.read_text(errors="replace").splitlines())
        said = next((value.strip() for key, _, value in lines if key.strip() == "registry"), "")
    return (said or REGISTRY).rstrip("/")


def _download(url: str, target: Path, package: str) -> None:
    # through the environment's proxies; a registry that is not https is one that the operator has named
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT, context=ssl.create_default_context()) as answer:  # noqa: S310
            with target.open("wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
    except OSError as error:
        raise HostError(
            f"{package} cannot be fetched from the npm registry: {error}; check that this machine "
            "reaches it (npm_config_registry names a mirror), then run again"
        ) from error


def check_integrity(file: Path, expected: str, name: str = "") -> None:
    """Compare a file with an npm integrity text, `ALGORITHM-BASE64`. Raises `HostError` if it differs."""
    algorithm, _, digest = expected.partition("-")
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, algorithm).digest()
    if found != base64.b64decode(digest):
        raise HostError(
            f"{name or file.name} is not what was published: its {algorithm} is "
            f"{base64.b64encode(found).decode()}, not {digest}; it was damaged or altered on the way: "
            "run again, and if it repeats, do not use this registry"
        )
