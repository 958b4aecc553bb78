"""Fetch npm packages and check their integrity.

Uses only the standard library, so that a host needs neither Node nor npm.
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
    """Fetch the archive of `NAME@VERSION` to `target`, which appears atomically.

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
    """Return the registry npm would use here, according to the environment and ~/.npmrc."""
    said = os.environ.get("npm_config_registry", "")  # noqa: SIM112 - npm's own name
    npmrc = Path.home() / ".npmrc"
    if not said and npmrc.is_file():
        lines = (line.partition("=") for line in npmrc.read_text(errors="replace").splitlines())
        said = next((value.strip() for key, _, value in lines if key.strip() == "registry"), "")
    return (said or REGISTRY).rstrip("/")


def _download(url: str, target: Path, package: str) -> None:
    # uses the environment's proxies; only the operator can have set a registry without https
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT, context=ssl.create_default_context()) as answer:  # noqa: S310
            with target.open("wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
    except OSError as error:
        raise HostError(
            f"cannot fetch {package} from the npm registry: {error}; check that this machine "
            "can reach it (npm_config_registry sets a mirror), then run again"
        ) from error


def check_integrity(file: Path, expected: str, name: str = "") -> None:
    """Check a file against an npm integrity string, `ALGORITHM-BASE64`. Raises `HostError` if it differs."""
    algorithm, _, digest = expected.partition("-")
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, algorithm).digest()
    if found != base64.b64decode(digest):
        raise HostError(
            f"{name or file.name} is not what was published: its {algorithm} is "
            f"{base64.b64encode(found).decode()}, not {digest}; it was damaged or altered in transit: "
            "run again, and if this repeats, do not use this registry"
        )
