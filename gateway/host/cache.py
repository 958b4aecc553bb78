"""The host's cache of built images and the archives they are made from."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from gateway.host import Report, run

CACHE = Path("/var/cache/incus-gateway")
KEPT = 3  # files of each kind


def prune(files: Iterable[Path]) -> list[Path]:
    """Remove all but the `KEPT` most recently changed files; return the removed ones."""
    old = sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]
    for path in old:
        path.unlink(missing_ok=True)
    return old


@contextlib.contextmanager
def alone(cache: Path, report: Report) -> Iterator[int]:
    """Lock the cache for a build: a second one waits, and then finds the first one's artefact.

    Yields the lock's descriptor, to be passed to the build's programs, which may outlive a killed builder.
    """
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another build of the image to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


@contextlib.contextmanager
def workplace(cache: Path) -> Iterator[Path]:
    """Yield an empty folder, removed afterwards. First clears the folders of killed builds."""
    for left in cache.glob("build-*"):
        _clear(left)
    place = Path(tempfile.mkdtemp(prefix="build-", dir=cache))
    # mmdebstrap drops its privileges to fetch, so the folder must be accessible to others.
    place.chmod(0o755)
    try:
        yield place
    finally:
        _clear(place)


def _clear(place: Path) -> None:
    # A killed mmdebstrap leaves proc and sys mounted in its tree; deleting through them would be a disaster.
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        mount = Path(line.split()[1])
        if mount != place and mount.is_relative_to(place):
            run(["umount", "--lazy", mount], fix=f"unmount {mount} and run again")
    shutil.rmtree(place)


@contextlib.contextmanager
def fetching(file: Path) -> Iterator[None]:
    """Lock one file of the cache, so that of two concurrent fetches the second finds the first one's file."""
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
