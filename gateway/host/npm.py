"""Knows how one file of a package is taken from the npm registry, with its integrity checked."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from gateway.host import HostError, run


def fetch(package: str, integrity: str, member: str, target: Path, *, holding: Sequence[int] = ()) -> str:
    """Put `member` of `NAME@VERSION` at `target`, executable; return what to tell of it.

    The folder of `target` is used for what is needed on the way. `integrity` is npm's `dist.integrity`:
    `npm view NAME@VERSION dist.integrity`. Raises `HostError`.
    """
    place = target.parent
    environment = {
        **os.environ,
        "npm_config_update_notifier": "false",
        "npm_config_cache": str(place / "npm"),
    }
    run(
        ["npm", "pack", "--silent", "--pack-destination", place, package],
        cwd=place,
        env=environment,
        holding=tuple(holding),
        fix="check that this machine reaches the npm registry (npm ping), then run again",
    )
    tarball = next(place.glob("*.tgz"), None)
    if tarball is None:
        raise HostError(f"npm pack {package} left no file; run it by hand to see why")
    check_integrity(tarball, integrity)
    with tarfile.open(tarball) as archive:
        binary = archive.extractfile(member)
        if binary is None:
            raise HostError(f"{package} holds no {member}")
        with target.open("wb") as file:
            shutil.copyfileobj(binary, file)
    target.chmod(0o755)
    tarball.unlink()
    return f"fetched, {target.stat().st_size >> 20} MiB, integrity checked"


def check_integrity(file: Path, expected: str) -> None:
    """Compare a file with an npm integrity text, `ALGORITHM-BASE64`. Raises `HostError` where it differs."""
    algorithm, _, digest = expected.partition("-")
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, algorithm).digest()
    if found != base64.b64decode(digest):
        raise HostError(
            f"{file.name} is not what was published: its {algorithm} is {base64.b64encode(found).decode()}, "
            f"not {digest}; it was damaged or altered on the way: run again, and if it repeats, "
            "do not use this registry"
        )
