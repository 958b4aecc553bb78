"""Open, list and change files below a directory that a hostile tenant controls.

Everything starts from one descriptor of the workspace, and every open uses `openat2` with RESOLVE_BENEATH,
NO_MAGICLINKS and NO_XDEV: whatever the tenant swaps meanwhile, the kernel never leaves the tree. Paths are
relative, without `.`, `..` or empty parts; "" is the workspace itself. Names are UTF-8 with surrogate
escapes, as in Python.

Without openat2 (not on Linux; the `local` runtime), paths are walked part by part with O_NOFOLLOW.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Final, NamedTuple

from gateway.errors import (
    Conflict,
    Forbidden,
    GatewayError,
    InvalidParams,
    IsADirectory,
    NotAFile,
    NotFound,
    OutsideWorkspace,
    TooLarge,
    Unavailable,
)
from gateway.rootfs import kernel
from gateway.rootfs.messages import DEPTH_MAX
from gateway.rootfs.paths import TEMPORARY, locate

NO_SPACE: Final = "no_space"
"""The `reason` of a write that found no room on the disk."""

Spare = Callable[[str], Awaitable[bool]]
"""Frees space on a tenant's disk after a write found none; returns whether to try again."""


async def nothing_to_spare(tenant: str) -> bool:
    """A `Spare` for disks without anything to give up."""
    return False


# errno -> error, `reason` (a fact that distinguishes errors with the same code), message without a path
_REFUSALS: dict[int, tuple[type[GatewayError], str, str]] = {
    errno.ENOENT: (NotFound, "missing", "no such file or directory"),
    errno.EXDEV: (OutsideWorkspace, "outside", "the path leads out of the workspace"),
    errno.ELOOP: (OutsideWorkspace, "loop", "too many symbolic links"),
    errno.ENOTDIR: (NotAFile, "through_file", "not a directory"),
    errno.EISDIR: (IsADirectory, "directory", "is a directory"),
    errno.ENXIO: (NotAFile, "special", "not a regular file"),
    errno.ENODEV: (NotAFile, "special", "not a regular file"),
    errno.EACCES: (Forbidden, "denied", "permission denied"),
    errno.EPERM: (Forbidden, "denied", "operation not permitted"),
    errno.EOVERFLOW: (Forbidden, "denied", "the owner of the folder is not known here"),
    errno.EROFS: (Forbidden, "denied", "read-only file system"),
    errno.ENAMETOOLONG: (InvalidParams, "too_long", "file name too long"),
    errno.EINVAL: (InvalidParams, "invalid", "invalid path"),
    errno.ENOSPC: (
        TooLarge,
        NO_SPACE,
        "no space left on the disk of the workspace; make room there, or give it a larger one",
    ),
    errno.EDQUOT: (
        TooLarge,
        NO_SPACE,
        "disk quota exceeded; make room in the workspace, or give the tenant a larger disk",
    ),
    errno.EFBIG: (TooLarge, "too_large", "file too large"),
    errno.ENOTEMPTY: (Conflict, "not_empty", "directory not empty"),
    errno.EEXIST: (Conflict, "exists", "file exists"),
    errno.EAGAIN: (Conflict, "busy", "the path keeps changing"),
    errno.ETXTBSY: (Conflict, "busy", "file is busy"),
    errno.EBUSY: (Conflict, "busy", "file is busy"),
}


def refusal(error: OSError) -> GatewayError:
    """Convert a kernel error to the gateway's, with the fact `reason` and without a path."""
    kind, reason, words = _REFUSALS.get(error.errno or 0, (Unavailable, "io", "the file system failed"))
    return kind(words, reason=reason)


LINKS_MAX = 40  # symbolic links in a path, as in the kernel (path_resolution(7))

_BENEATH = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_MAGICLINKS | kernel.RESOLVE_NO_XDEV
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
FOLDER = kernel.FOLDER


def etag(status: os.stat_result) -> str:
    """Return a tag that changes when a file is replaced or written: inode, mtime and size in hex."""
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


class Made(NamedTuple):
    """A folder created for a file: its relative path and its inode."""

    path: str
    inode: int


class Root:
    """The workspace behind a directory descriptor, which this object owns.

    `workspace` is its absolute path inside the tenant; absolute links below it are followed. `nodev` means
    that the mount refuses device nodes; otherwise every file is checked before it is opened. `depth` limits
    the number of folders in clients' paths and in walks.
    """

    def __init__(
        self, descriptor: int, workspace: str, *, nodev: bool = False, depth: int = DEPTH_MAX
    ) -> None:
        self.descriptor = descriptor
        self.workspace = workspace
        self._prefix = workspace.rstrip("/") + "/"
        self._nodev = nodev
        self.depth = depth

    def close(self) -> None:
        os.close(self.descriptor)

    # --- paths --------------------------------------------------------------------------------------

    def locate(self, path: str, cwd: str) -> str:
        """Return `path` relative to the workspace, see the function `locate`."""
        found = locate(path, cwd, self.workspace)
        if found.count("/") > self.depth:
            raise InvalidParams(
                f"the path has more than {self.depth} folders", reason="too_deep", limit=self.depth
            )
        return found

    def absolute(self, path: str) -> str:
        """Return a relative path as the tenant's absolute path."""
        return self._prefix + path if path else self.workspace

    # --- opening ------------------------------------------------------------------------------------

    def open(self, path: str, flags: int) -> int:
        """Open `path`, following links that stay inside. Raises refusals."""
        try:
            return self._open(path, flags)
        except OSError as error:
            raise refusal(error) from None

    def _open(self, path: str, flags: int) -> int:
        if kernel.HAS_OPENAT2:
            try:
                return kernel.openat2(self.descriptor, os.fsencode(path or "."), flags, _BENEATH)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
        # RESOLVE_BENEATH refuses absolute links with EXDEV, but they may point into the workspace.
        for _ in range(4):
            try:
                return self.open_real(self._real(path), flags)
            except OSError as error:
                if error.errno != errno.ELOOP or flags & os.O_NOFOLLOW:
                    raise
                last = error  # it has just become a link
        raise last

    def open_real(self, path: str, flags: int) -> int:
        """Open `path`, which must not contain links; one at the end raises ELOOP."""
        return kernel.open_real(self.descriptor, path, flags)

    def _real(self, path: str) -> str:
        """Resolve every link in `path` by hand; missing parts stay as they are.

        Raises `OSError`: EXDEV if a link leads outside, ELOOP after `LINKS_MAX` links.
        """
        real: list[str] = []
        todo = path.split("/")[::-1] if path else []
        links = 0
        while todo:
            part = todo.pop()
            if part in ("", "."):
                continue
            if part == "..":
                if not real:
                    raise OSError(errno.EXDEV, "outside")
                real.pop()  # correct textually, because no part of `real` is a link
                continue
            target = self._link("/".join(real), part)
            if target is None:
                real.append(part)
                continue
            links += 1
            if links > LINKS_MAX:
                raise OSError(errno.ELOOP, "links")
            if target.startswith("/"):
                if not (target + "/").startswith(self._prefix):
                    raise OSError(errno.EXDEV, "outside")
                target = target[len(self._prefix) :]
                real = []
            todo.extend(target.split("/")[::-1])
        return "/".join(real)

    def _link(self, folder: str, name: str) -> str | None:
        """Return the target of the link `name`, None if it is not a link or is missing."""
        try:
            directory = self.open_real(folder, kernel.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        try:
            return os.readlink(name, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return None
            raise
        finally:
            os.close(directory)

    def open_file(self, path: str) -> tuple[int, os.stat_result]:
        """Open a regular file for reading; return its descriptor and status.

        Raises `NotAFile` for FIFOs, sockets and devices without waiting for them or calling a driver.
        """
        try:
            descriptor = self._open(path, _READ) if self._nodev else self._open_looked_at(path)
        except OSError as error:
            raise refusal(error) from None
        return descriptor, self._regular(descriptor)

    def _open_looked_at(self, path: str) -> int:
        """Open through an O_PATH descriptor, so that exactly the checked inode is opened."""
        if not kernel.O_PATH:
            return self._open(path, _READ)
        handle = self._open(path, kernel.O_PATH)
        try:
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode):
                raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.ENXIO, "not regular")
            return os.open(f"/proc/self/fd/{handle}", _READ | os.O_CLOEXEC)
        finally:
            os.close(handle)

    @staticmethod
    def _regular(descriptor: int) -> os.stat_result:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            return status
        os.close(descriptor)
        raise refusal(OSError(errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.ENXIO, "not regular"))

    def read_file(self, path: str, maximum: int) -> tuple[bytes, os.stat_result]:
        """Read a whole regular file. Raises `TooLarge`, with size and limit, above `maximum` bytes."""
        descriptor, status = self.open_file(path)
        try:
            if status.st_size > maximum:
                raise TooLarge("file too large", reason="too_large", size=status.st_size, limit=maximum)
            return read_all(descriptor, status.st_size, maximum), status
        finally:
            os.close(descriptor)

    # --- folders ------------------------------------------------------------------------------------

    def parent(self, path: str, *, create: bool = False, made: list[Made] | None = None) -> tuple[int, str]:
        """Open the folder of `path`; return its descriptor and the last name.

        With `create`, missing folders are created and added to `made`. Links in the path are followed if they
        stay inside; a folder is never created through a link.
        """
        folder, _, name = path.rpartition("/")
        if not name:
            raise IsADirectory("is a directory", reason="directory")
        flags = kernel.O_PATH | os.O_DIRECTORY
        try:
            return self._open(folder, flags), name
        except FileNotFoundError as error:
            if not create:
                raise refusal(error) from None
        except OSError as error:
            raise refusal(error) from None
        try:
            return self._make_folders(folder, [] if made is None else made), name
        except OSError as error:
            raise refusal(error) from None

    def _make_folders(self, folder: str, made: list[Made]) -> int:
        """Open `folder`, creating missing parts, but never through a dangling link."""
        flags = kernel.O_PATH | os.O_DIRECTORY
        parts = folder.split("/")
        directory = os.dup(self.descriptor)
        try:
            for i, part in enumerate(parts):
                try:
                    following = self._open("/".join(parts[: i + 1]), flags)
                except FileNotFoundError:
                    ours = False
                    # It may have been created meanwhile: the open below decides what it is.
                    with suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=directory)
                        ours = True
                    following = Root(directory, self.workspace).open_real(part, flags)
                    if ours:
                        made.append(Made("/".join(parts[: i + 1]), os.fstat(following).st_ino))
                os.close(directory)
                directory = following
        except BaseException:
            os.close(directory)
            raise
        return directory

    @contextmanager
    def taking_back(self) -> Iterator[list[Made]]:
        """Yield a list for the folders that `parent` creates; an error removes them again.

        Only folders that are empty, unchanged and still in place are removed: those that the tenant has
        moved, filled or replaced stay.
        """
        made: list[Made] = []
        try:
            yield made
        except BaseException:
            for path, inode in reversed(made):
                with suppress(OSError, GatewayError):
                    directory, name = self.parent(path)
                    try:
                        if os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino == inode:
                            os.rmdir(name, dir_fd=directory)
                    finally:
                        os.close(directory)
            raise

    def status(self, path: str) -> os.stat_result:
        """Return the status of `path`; if the last part is a link, that of the link itself."""
        if not path:
            return os.fstat(self.descriptor)
        directory, name = self.parent(path)
        try:
            return os.stat(name, dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            raise refusal(error) from None
        finally:
            os.close(directory)

    def link_target(self, path: str) -> str | None:
        """Return a link's target as a relative path, None if it is outside or `path` is not a link."""
        directory, name = self.parent(path)
        try:
            target = os.readlink(name, dir_fd=directory)
        except OSError:
            return None
        finally:
            os.close(directory)
        try:
            return self.locate(target, self.absolute(path.rpartition("/")[0]))
        except GatewayError:
            return None

    def names(self, path: str, maximum: int) -> list[str]:
        """Return up to `maximum` names in a folder, unordered."""
        descriptor = self.open(path, FOLDER)
        try:
            with os.scandir(descriptor) as entries:
                return [entry.name for entry in islice(entries, maximum)]
        except OSError as error:
            raise refusal(error) from None
        finally:
            os.close(descriptor)

    # --- changing -----------------------------------------------------------------------------------

    def replace(
        self, directory: int, name: str, data: bytes, mode: int, *, expected: os.stat_result | None
    ) -> os.stat_result:
        """Write a temporary file and rename it to `name` atomically; return its status.

        Hard links are broken, symbolic links replaced, readers keep the old file, and a crash leaves one of
        the two complete. Set-uid, set-gid and sticky bits are dropped. `expected` is the file from which the
        new content was derived: if it has been replaced or written to, this raises `Conflict`. In the few
        microseconds between that check and the rename the tenant can still write to the old file; the caller
        serialises the gateway's own writers.
        """
        temporary = f"{TEMPORARY}{os.getpid():x}-{os.urandom(6).hex()}"
        try:
            descriptor = os.open(
                temporary,
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o600,
                dir_fd=directory,
            )
        except OSError as error:
            raise refusal(error) from None
        try:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fchmod(descriptor, mode & 0o777)
                status = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            if expected is not None:
                now = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if etag(now) != etag(expected):
                    raise Conflict("the file changed meanwhile", reason="changed")
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException as error:
            with suppress(FileNotFoundError):  # the tenant may have removed it
                os.unlink(temporary, dir_fd=directory)
            if isinstance(error, OSError):
                raise refusal(error) from None
            raise
        return status


def read_all(descriptor: int, size: int, maximum: int) -> bytes:
    """Read a whole file, but at most `maximum` bytes, because it may grow during the read."""
    data = os.pread(descriptor, size + 1, 0)
    if len(data) <= size:
        return data
    chunks = [data]
    done = len(data)
    while done < maximum:
        chunk = os.pread(descriptor, min(1 << 20, maximum - done), done)
        if not chunk:
            break
        chunks.append(chunk)
        done += len(chunk)
    return b"".join(chunks)
