"""The cache of built images on this host: one artefact for each definition, named by its digest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway.host import Report, run

KEPT = 3  # of each kind of file in the cache


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


def keep(cache: Path, used: Artefact) -> None:
    """Keep what was `used` now and the artefacts used last before it, `KEPT` in all; remove the others.

    Gateways of different versions on one host build different definitions, from one cache.
    """
    os.utime(used.rootfs)
    for old in prune(cache.glob("*.squashfs")):
        old.with_suffix(".tar").unlink(missing_ok=True)


def prune(files: Iterable[Path]) -> list[Path]:
    """Remove all but the `KEPT` files that changed last; return those that were removed."""
    old = sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]
    for path in old:
        path.unlink(missing_ok=True)
    return old


@contextlib.contextmanager
def alone(cache: Path, report: Report) -> Iterator[int]:
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
def workplace(cache: Path) -> Iterator[Path]:
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
