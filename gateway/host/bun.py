"""Fetch the pinned Bun into a cache, for the image and for building the browser editor."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from gateway.host import HostError, npm
from gateway.host.cache import CACHE, fetching, prune

VERSION = "1.4.5"
# npm's dist.integrity of @oven/bun-linux-VARIANT at that version: `npm view NAME@VERSION dist.integrity`.
INTEGRITY = {
    "x64": "sha512-IWX9BELoGHAUtMonkeSaNaZwXzRk+oDw6Mk+HBFXd3KHYIBNBsIGRupMZPcgNoDbJpLu6gAJjIoIVPZtt1aJ1g==",
    "x64-baseline": (
        "sha512-s8yMwYcFnnrA178gji0gZbkE2WVDej/Ti1x770oPfihxyRxSMNhGhiAQNXV53aDeraZxksdvKV/RAdQBCd0qPA=="
    ),
    "aarch64": (
        "sha512-4BXmsSKnjOrlGWqZV4x/oWa7AVoR+B6lCXddMzOAXBIm3t50eslg9wb66gmtW1AamEQ1l1CDvmmruysEhqOWMg=="
    ),
}


def variant(machine: str = "", flags: str | None = None) -> str:
    """Return the build variant for this processor, or for another `machine` with CPU `flags`."""
    machine = machine or platform.machine()
    if machine in ("aarch64", "arm64"):
        return "aarch64"
    if machine != "x86_64":
        raise HostError(f"Bun does not exist for {machine}, only for x86_64 and aarch64")
    flags = Path("/proc/cpuinfo").read_text() if flags is None else flags
    return "x64" if " avx2" in flags else "x64-baseline"


def ensure(kind: str, cache: Path) -> Path:
    """Return the program of variant `kind`, fetching it into the cache if missing. Raises `HostError`."""
    target = cache / f"bun-{VERSION}-{kind}"
    with fetching(target):
        if not target.exists():
            _fetch(kind, target)
    prune(path for path in cache.glob(f"bun-*-{kind}") if path.is_file())
    return target


def _fetch(kind: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="bun-", dir=target.parent) as place:
        package, fetched = Path(place) / "bun.tgz", Path(place) / "bun"
        npm.fetch(f"@oven/bun-linux-{kind}@{VERSION}", INTEGRITY[kind], package)
        with tarfile.open(package) as archive, fetched.open("wb") as file:
            program = archive.extractfile("package/bin/bun")
            assert program is not None, "the archive's integrity was checked"
            shutil.copyfileobj(program, file, 1 << 20)
        fetched.chmod(0o755)
        fetched.replace(target)


def main() -> int:
    """Print the path of this machine's Bun, in the system's cache for root, else in the user's."""
    cache = CACHE if os.geteuid() == 0 else Path.home() / ".cache" / "incus-gateway"
    try:
        sys.stdout.write(f"{ensure(variant(), cache)}\n")
    except HostError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
