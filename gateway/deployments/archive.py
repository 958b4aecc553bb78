"""Read a folder or a tar into entries that are safe to unpack.

Both may come from a stranger, so names, links and sizes are all checked. What is accepted is packed again,
and unpacked only inside the tenant's container, as its own user.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.errors import InvalidParams, TooLarge
from gateway.rootfs.paths import HOME, show

# generated again where the site runs, or private
LEFT_OUT: Final = frozenset({"node_modules", ".venv", "__pycache__", ".git", ".DS_Store"})
SHOWN: Final = 200  # characters of a template's text that an error quotes
FILES: Final = 10_000  # files and folders of a template
BYTES: Final = 64 << 20  # of a template's files: it is held in memory
_DEPTH: Final = 32
_PATH_MAX: Final = 1024
_BLOCK: Final = 512  # bytes of a tar header; contents are padded to a multiple of it
_MORE_MAX: Final = 64 << 10  # bytes of extended headers of one entry
_FACTS_MAX: Final = 32  # records in them; bsdtar writes a dozen
_EXTENDED: Final = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG: Final = {tarfile.GNUTYPE_LONGNAME: "name", tarfile.GNUTYPE_LONGLINK: "linkname"}
_TOLD_MAX: Final = 8  # extended headers before one entry; two are usual
_FILES: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NAMES: Final = {b"path": "name", b"linkpath": "linkname"}


@dataclass(frozen=True, slots=True)
class ArchiveEntry:
    """A file with its content, a link with its target, or (with neither) a folder."""

    content: bytes | None = None
    link: str | None = None
    executable: bool = False


def refused(why: str) -> InvalidParams:
    return InvalidParams(f"this template is refused: {why}", reason="template_invalid")


def too_many() -> TooLarge:
    return TooLarge(
        f"a template has at most {FILES} files and folders; leave some out",
        reason="template_invalid",
        limit=FILES,
    )


def too_large() -> TooLarge:
    return TooLarge(
        f"a template's files have at most {BYTES} bytes; leave some out",
        reason="template_invalid",
        limit=BYTES,
    )


def folders_above(paths: Iterable[str]) -> set[str]:
    """Return every folder above one of the paths."""
    found: set[str] = set()
    for path in paths:
        above, slash, _ = path.rpartition("/")
        while slash and above not in found:
            found.add(above)
            above, slash, _ = above.rpartition("/")
    return found


def check_entry(path: str, entry: ArchiveEntry, entries: Mapping[str, ArchiveEntry]) -> None:
    parts = path.split("/")
    shown = show(path[:SHOWN])
    # an unprintable character may not be encodable either
    if any(part in ("", ".", "..") for part in parts) or not path.isprintable():
        raise refused(f"the path {shown} is not plain")
    if len(path.encode()) > _PATH_MAX or len(parts) > _DEPTH or any(len(p.encode()) > 255 for p in parts):
        raise refused(f"the path {shown} is too long")
    for depth in range(1, len(parts)):
        above = entries.get("/".join(parts[:depth]))
        if above is not None and (above.content is not None or above.link is not None):
            raise refused(f"{shown} lies below something that is not a folder")
    if entry.link is not None:
        target = entry.link
        if not target or not target.isprintable() or len(target) > _PATH_MAX or target.startswith("/"):
            raise refused(f"the link {shown} points outside the template")
        steps = target.split("/")
        up = next((number for number, step in enumerate(steps) if step != ".."), len(steps))
        # `..` after a name means the parent of wherever that leads, if it is a link itself
        if up >= len(parts) or ".." in steps[up:]:
            raise refused(f"the link {shown} points outside the template")


def read_folder(folder: Path, leaves: Callable[[str, bool], bool] | None = None) -> dict[str, ArchiveEntry]:
    """Read a folder without following links, except what `leaves(path, is_folder)` leaves out.

    Raises `InvalidParams` for anything but files, folders and links, `TooLarge`, and `OSError`.
    """
    entries: dict[str, ArchiveEntry] = {}
    room = BYTES
    pending = [""]
    while pending:
        at = pending.pop()
        with os.scandir(folder / at) as listed:
            for found in sorted(listed, key=lambda entry: entry.name):
                if found.name in LEFT_OUT:
                    continue
                path = f"{at}/{found.name}" if at else found.name
                if leaves is not None and leaves(path, found.is_dir(follow_symlinks=False)):
                    continue
                if len(entries) >= FILES:
                    raise too_many()
                if found.is_symlink():
                    entries[path] = ArchiveEntry(link=str(Path(found.path).readlink()))
                elif found.is_dir(follow_symlinks=False):
                    if path.count("/") >= _DEPTH:
                        raise refused(f"the path {show(path[:SHOWN])} is too long")
                    entries[path] = ArchiveEntry()
                    pending.append(path)
                elif found.is_file(follow_symlinks=False):
                    entries[path] = entry = _read_file(Path(found.path), room)
                    room -= len(entry.content or b"")
                    if room < 0:
                        raise too_large()
                else:
                    raise refused(f"{show(path[:SHOWN])} is a device, a pipe or a socket")
    return entries


def _read_file(path: Path, room: int) -> ArchiveEntry:
    """Read a file, or just over `room` bytes of it."""
    # non-blocking: it may have become a pipe since, which would block us forever
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise refused("a file was replaced by something else while it was read")
        content = file.read(room + 1)
    return ArchiveEntry(content, executable=bool(mode & 0o100))


class _Bounded:
    """Reads gzip or plain bytes up to a limit, so that a decompression bomb ends there."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._gzip = zlib.decompressobj(31) if data[:2] == b"\x1f\x8b" else None
        self._at = 0
        # headers and padding take a block or two of each entry besides its content
        self._left = BYTES + FILES * 2048 + (1 << 20)

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end. Raises `TooLarge` and `EOFError`."""
        self._left -= size
        if self._left < 0:
            raise too_large()
        if self._gzip is None:
            piece = bytes(self._data[self._at : self._at + size])
            self._at += len(piece)
            return piece
        pieces, wanted = list[bytes](), size
        while wanted and not self._gzip.eof:
            fed = self._gzip.unconsumed_tail or bytes(self._data[self._at : self._at + 65536])
            if not self._gzip.unconsumed_tail:
                self._at += len(fed)
            more = self._gzip.decompress(fed, wanted)
            if not more and not fed:
                raise EOFError
            wanted -= len(more)
            pieces.append(more)
        return b"".join(pieces)

    def content(self, size: int) -> bytes:
        """Return a content of `size` bytes and skip its padding. Raises as `read` does."""
        if size < 0:
            raise ValueError
        filled = self.read(-(-size // _BLOCK) * _BLOCK)
        if len(filled) < size:
            raise EOFError
        return filled[:size]


def read_archive(archive: bytes) -> dict[str, ArchiveEntry]:
    """Read a tar, gzipped or not. Raises `InvalidParams` for anything but files, folders and links."""
    entries: dict[str, ArchiveEntry] = {}
    source = _Bounded(archive)
    try:
        for member in _members(source):
            path = member.name.rstrip("/").removeprefix("./")
            content = source.content(member.size) if member.type in _FILES else None
            if path in ("", ".") or LEFT_OUT.intersection(path.split("/")):
                continue
            if len(entries) >= FILES:
                raise too_many()
            if path in entries and entries[path] != ArchiveEntry():
                raise refused(f"{show(path[:SHOWN])} appears twice")
            if content is not None:
                entries[path] = ArchiveEntry(content, executable=bool(member.mode & 0o100))
            elif member.issym():
                entries[path] = ArchiveEntry(link=member.linkname)
            elif member.isdir():
                entries[path] = ArchiveEntry()
            else:
                raise refused(f"{show(path[:SHOWN])} is a device, a pipe, a hard link or a sparse file")
    except (tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        raise refused(f"it is not a tar archive ({type(error).__name__})") from None
    return entries


def _members(source: _Bounded) -> Iterator[tarfile.TarInfo]:
    """Yield the header of each entry. The caller reads a file's content before it takes the next.

    The standard library parses single headers only. It trusts extended ones: a sparse map turns a few bytes
    into gigabytes. Only names and sizes are taken from those here.
    """
    said: dict[str, str | int] = {}
    told = 0  # extended headers of the entry that follows
    for _ in range(3 * FILES + 1000):  # headers count, and entries that are left out
        block = source.read(_BLOCK)
        if not block.strip(b"\0"):
            return
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if member.type not in _EXTENDED and member.type not in _LONG:
            for fact, value in said.items():
                setattr(member, fact, value)
            yield member
            said, told = {}, 0
            continue
        told += 1
        if told > _TOLD_MAX or member.size > _MORE_MAX:
            raise refused("an entry has too many extended headers; pack it as a plain tar")
        more = source.content(member.size)
        if member.type in _LONG:
            said[_LONG[member.type]] = _text(more)
        elif member.type != tarfile.XGLTYPE:  # a header for all entries, such as git's commit
            said |= _facts(more)
    raise too_many()


def _facts(more: bytes) -> dict[str, str | int]:
    """Parse an extended header (pax): records of `LENGTH KEY=VALUE`, each ending with a newline."""
    found, at = dict[str, str | int](), 0
    for _ in range(_FACTS_MAX):
        if at >= len(more) or more[at] == 0:
            return found
        length, _, _ = more[at : at + 8].partition(b" ")
        end = at + int(length)
        key, equals, value = more[at + len(length) + 1 : end - 1].partition(b"=")
        if end <= at + len(length) + 1 or not equals or more[end - 1 : end] != b"\n":
            raise ValueError
        if key in _NAMES:
            found[_NAMES[key]] = _text(value)
        elif key == b"size":
            found["size"] = int(value)
        elif key.startswith(b"GNU.sparse."):
            raise refused("it holds a sparse file; pack it as a plain tar")
        at = end
    raise refused("an entry has too many extended headers; pack it as a plain tar")


def _text(name: bytes) -> str:
    return name.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def packed(entries: Mapping[str, ArchiveEntry], changed: float = 0) -> bytes:
    """Return entries as a tar of plain files, folders and links, folders first.

    All get the modification time `changed`, in seconds since the epoch. What is the gateway's own is for the
    site's user alone.
    """
    buffer = io.BytesIO()
    folders = folders_above(entries) | {path for path, entry in entries.items() if entry == ArchiveEntry()}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(folders):
            member = tarfile.TarInfo(path)
            member.mtime = changed
            member.type, member.mode = tarfile.DIRTYPE, 0o700 if _is_ours(path) else 0o755
            tar.addfile(member)
        for path, entry in sorted(entries.items()):
            member = tarfile.TarInfo(path)
            member.mtime = changed
            if entry.link is not None:
                member.type, member.linkname = tarfile.SYMTYPE, entry.link
                tar.addfile(member)
            elif entry.content is not None:
                mode = 0o600 if _is_ours(path) else 0o755 if entry.executable else 0o644
                member.size, member.mode = len(entry.content), mode
                tar.addfile(member, io.BytesIO(entry.content))
    return buffer.getvalue()


def _is_ours(path: str) -> bool:
    return f"{path}/".startswith(f"{HOME}/")
