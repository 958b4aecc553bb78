"""Reads templates: a folder with a manifest, `site.toml`, into entries that are safe to unpack.

A template may come from whoever deploys, so nothing of it is believed: not its names, not its links, not its
sizes. What is accepted is packed anew, and unpacked only inside the tenant's container, as its own user.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shlex
import stat
import tarfile
import tomllib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from gateway.caddy import shipped
from gateway.deployments.frameworks import Framework, Project, expanded, project, recognise
from gateway.errors import InvalidParams, NotFound, TooLarge, Unavailable
from gateway.rootfs.paths import show
from gateway.runtime.sites import Recipe
from gateway.settings import Settings
from gateway.tools.mirroring import Kind, understood

MANIFEST: Final = "site.toml"
NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
LEFT_OUT: Final = frozenset({"node_modules", ".git", ".DS_Store"})  # made anew, or nobody else's business
_DEPTH: Final = 32
_PATH_MAX: Final = 1024
_MANIFEST_MAX: Final = 64 << 10  # bytes
_IGNORE_MAX: Final = 64 << 10  # bytes of one ignore file
_WORD_MAX: Final = 4096  # characters
_SHOWN: Final = 200  # characters of what a template says that an error repeats
_BLOCK: Final = 512  # bytes of a header of a tar; contents are filled up to as many
_MORE_MAX: Final = 64 << 10  # bytes that a tar may say of one entry beside its header
_FACTS_MAX: Final = 32  # facts that may be; bsdtar writes a dozen
_EXTENDED: Final = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG: Final = {tarfile.GNUTYPE_LONGNAME: "name", tarfile.GNUTYPE_LONGLINK: "linkname"}
_TOLD_MAX: Final = 8  # of such headers before one entry; two are usual
_FILES: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NAMES: Final = {b"path": "name", b"linkpath": "linkname"}

# what a shell takes for more than a letter, but for `$PORT`, which needs none
_SHELL: Final = re.compile(r"[|&;<>()`*?\[\]~#!]|\$(?!PORT(?![A-Za-z0-9_])|\{PORT\})|^\s*\w+=")
_SHELLS: Final = frozenset({"sh", "bash", "dash", "zsh", "ksh"})
_UNEXPANDED: Final = re.compile(r"\$\{PORT[^}]+\}")

Word = Annotated[str, StringConstraints(min_length=1, max_length=_WORD_MAX, pattern=r"^[^\x00-\x1f]*$")]
UrlPath = Annotated[str, StringConstraints(pattern=r"^/[!-~]*$", max_length=1024)]


Pattern = Annotated[
    str,
    StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]*$"),
    AfterValidator(understood),
]


def _words(said: Any) -> Any:
    """Return a command that is one string as its words: apart as a shell does, or by a shell if it needs one.

    What is no command is left to be refused.
    """
    if isinstance(said, str):
        if len(said) > _WORD_MAX:
            raise PydanticCustomError("long", "it has over {most} characters", {"most": _WORD_MAX})
        if _SHELL.search(said):
            return ("sh", "-c", said)
        try:
            return tuple(shlex.split(said))
        except ValueError:
            raise PydanticCustomError("quotes", "its quotes have no end") from None
    if not isinstance(said, list | tuple):
        raise PydanticCustomError(
            "command", 'it is a list of words, such as ["bun", "serve.ts"], or a string'
        )
    return said


def _expanded(command: tuple[str, ...]) -> tuple[str, ...]:
    if command[:1] and command[0].rpartition("/")[2] not in _SHELLS:
        for word in command:
            if (found := _UNEXPANDED.search(word)) is not None:
                raise PydanticCustomError(
                    "port", "{said} takes a shell; write $PORT", {"said": show(found[0][:_SHOWN])}
                )
    return command


class Manifest(BaseModel):
    """What `site.toml` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: Annotated[str, Field(max_length=500)] = ""
    install: Annotated[tuple[Word, ...], Field(max_length=64), BeforeValidator(_words)] = ()
    start: Annotated[
        tuple[Word, ...],
        Field(min_length=1, max_length=64),
        BeforeValidator(_words),
        AfterValidator(_expanded),
    ]
    port: Annotated[int, Field(ge=1024, le=65535)] = 3000
    health: UrlPath = "/"
    warm: Annotated[tuple[UrlPath, ...], Field(max_length=16)] = ()
    keep: Annotated[tuple[Pattern, ...], Field(max_length=64)] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """A file with its content, a link with where it leads, or (with neither) a folder."""

    content: bytes | None = None
    link: str | None = None
    executable: bool = False


@dataclass(frozen=True, slots=True)
class Template:
    """A checked template. `shared` where it is the operator's own: only then may others share its copies."""

    name: str
    manifest: Manifest
    entries: Mapping[str, Entry]
    shared: bool

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for path, entry in sorted(self.entries.items()):
            content = hashlib.sha256(entry.content or b"").digest()
            digest.update(
                f"{path}\0{entry.link}\0{entry.executable}\0{entry.content is None}\0".encode() + content
            )
        return digest.hexdigest()

    def stays(self) -> dict[str, Any]:
        """Return what a worker asks to tell what an update by this removes, see `gateway.tools.mirroring`."""
        kinds: dict[str, Kind] = dict.fromkeys(_above(self.entries), "folder")
        ignored = {}
        for path, entry in self.entries.items():
            kinds[path] = "link" if entry.link is not None else "folder" if entry.content is None else "file"
            above, _, name = path.rpartition("/")
            if name == ".gitignore" and entry.content is not None:
                ignored[above] = entry.content[:_IGNORE_MAX].decode("utf-8", "replace")
        return {"there": kinds, "ignored": ignored, "keep": self.manifest.keep, "left_out": [*LEFT_OUT]}

    def project(self) -> Project:
        """Return what its package.json says."""
        manifest = self.entries.get("package.json")
        return project(None if manifest is None else manifest.content)

    def framework(self) -> tuple[Framework | None, tuple[str, ...], tuple[str, ...]]:
        """Return its framework, if that is known, and the words that start and install it."""
        said = self.project()
        start, install = (expanded(words, said) for words in (self.manifest.start, self.manifest.install))
        return recognise(start, said.packages), start, install

    def recipe(self, owner: str = "") -> Recipe:
        """Return what a runtime needs to make a site of it; of an upload nothing is kept without an owner."""
        manifest = self.manifest
        return Recipe(
            archive=packed(self.entries),
            start=manifest.start,
            port=manifest.port,
            health=manifest.health,
            install=manifest.install,
            warm=manifest.warm,
            key=self._key(owner),
            owner="" if self.shared else owner,
            keep=manifest.keep,
            template=self.name,
        )

    def _key(self, owner: str) -> str:
        if self.shared or not owner:
            return self.digest if self.shared else ""
        return hashlib.sha256(f"{owner} {self.digest}".encode()).hexdigest()


def names(settings: Settings) -> dict[str, Path]:
    """Return every template that can be deployed by its name; the operator's win over ours."""
    found: dict[str, Path] = {}
    for folder in (shipped("deploy/templates"), settings.templates_dir):
        if folder is not None and folder.is_dir():
            found |= {
                place.name: place
                for place in sorted(folder.iterdir())
                if NAME.fullmatch(place.name) and (place / MANIFEST).is_file()
            }
    return found


def named(name: str, settings: Settings) -> Template:
    """Read a template by its name. Raises `NotFound`, which names those that there are."""
    known = names(settings)
    if name not in known:
        raise NotFound(
            f"no template {name[:63]}; there are: {', '.join(known) or 'none'}", reason="template_missing"
        )
    try:
        entries = read_folder(known[name], settings)
    except OSError as error:
        raise Unavailable(
            f"template {name} cannot be read: {error.strerror}; mend its folder, or its owner and modes",
            reason="template_invalid",
        ) from error
    return checked(name, entries, settings, shared=True)


def uploaded(archive: bytes, settings: Settings) -> Template:
    """Read a template from a tar, compressed or not."""
    return checked("upload", read_archive(archive, settings), settings, shared=False)


def checked(name: str, entries: Mapping[str, Entry], settings: Settings, *, shared: bool) -> Template:
    """Make a template of entries. Raises `InvalidParams` and `TooLarge`, which say what is wrong."""
    if len(entries) > settings.template_files:
        raise _too_many(settings)
    if sum(len(entry.content or b"") for entry in entries.values()) > settings.template_bytes:
        raise _too_large(settings)
    for path, entry in entries.items():
        _check(path, entry, entries)
    # folders that only names tell of are made, too
    if len(entries.keys() | _above(entries)) > settings.template_files:
        raise _too_many(settings)
    return Template(name, _manifest(entries.get(MANIFEST)), entries, shared)


def _manifest(said: Entry | None) -> Manifest:
    if said is None or said.content is None:
        raise InvalidParams(f"a template needs a {MANIFEST} with at least `start`", reason="template_invalid")
    if len(said.content) > _MANIFEST_MAX:
        raise _refused(f"{MANIFEST} has over {_MANIFEST_MAX >> 10} KiB")
    try:
        return Manifest.model_validate(tomllib.loads(said.content.decode()))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise _refused(f"{MANIFEST}: {show(field[:_SHOWN])}: {problem['msg']}") from None
    except (ValueError, RecursionError) as error:  # TOML's own, text's, a number of 5000 digits, nesting
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _refused(f"{MANIFEST} is not TOML: {show(why[:_SHOWN])}") from None


def _refused(why: str) -> InvalidParams:
    return InvalidParams(f"this template is refused: {why}", reason="template_invalid")


def _too_many(settings: Settings) -> TooLarge:
    limit = settings.template_files
    return TooLarge(
        f"a template has at most {limit} files and folders; leave some out, or raise GATEWAY_TEMPLATE_FILES",
        reason="template_invalid",
        limit=limit,
    )


def _too_large(settings: Settings) -> TooLarge:
    limit = settings.template_bytes
    return TooLarge(
        f"a template's files have at most {limit} bytes; leave some out, or raise GATEWAY_TEMPLATE_BYTES",
        reason="template_invalid",
        limit=limit,
    )


def _above(paths: Iterable[str]) -> set[str]:
    """Return every folder that one of the paths lies in."""
    found: set[str] = set()
    for path in paths:
        above, slash, _ = path.rpartition("/")
        while slash and above not in found:
            found.add(above)
            above, slash, _ = above.rpartition("/")
    return found


def _check(path: str, entry: Entry, entries: Mapping[str, Entry]) -> None:
    parts = path.split("/")
    shown = show(path[:_SHOWN])
    # what is not printable may not be encodable either
    if any(part in ("", ".", "..") for part in parts) or not path.isprintable():
        raise _refused(f"the path {shown} is not plain")
    if len(path.encode()) > _PATH_MAX or len(parts) > _DEPTH or any(len(p.encode()) > 255 for p in parts):
        raise _refused(f"the path {shown} is too long")
    for depth in range(1, len(parts)):
        above = entries.get("/".join(parts[:depth]))
        if above is not None and (above.content is not None or above.link is not None):
            raise _refused(f"{shown} lies below something that is no folder")
    if entry.link is not None:
        target = entry.link
        if not target or not target.isprintable() or len(target) > _PATH_MAX or target.startswith("/"):
            raise _refused(f"the link {shown} leads out of the template")
        steps = target.split("/")
        up = next((number for number, step in enumerate(steps) if step != ".."), len(steps))
        # `..` behind a name is above wherever that may lead, if it is a link itself
        if up >= len(parts) or ".." in steps[up:]:
            raise _refused(f"the link {shown} leads out of the template")


def read_folder(folder: Path, settings: Settings) -> dict[str, Entry]:
    """Read a folder, following nothing.

    Raises `InvalidParams` for what is neither file, folder nor link, `TooLarge`, and `OSError`.
    """
    entries: dict[str, Entry] = {}
    room = settings.template_bytes
    pending = [""]
    while pending:
        at = pending.pop()
        with os.scandir(folder / at) as listed:
            for found in sorted(listed, key=lambda entry: entry.name):
                if found.name in LEFT_OUT:
                    continue
                path = f"{at}/{found.name}" if at else found.name
                if len(entries) >= settings.template_files:
                    raise _too_many(settings)
                if found.is_symlink():
                    entries[path] = Entry(link=str(Path(found.path).readlink()))
                elif found.is_dir(follow_symlinks=False):
                    if path.count("/") >= _DEPTH:
                        raise _refused(f"the path {show(path[:_SHOWN])} is too long")
                    entries[path] = Entry()
                    pending.append(path)
                elif found.is_file(follow_symlinks=False):
                    entries[path] = entry = _read_file(Path(found.path), room)
                    room -= len(entry.content or b"")
                    if room < 0:
                        raise _too_large(settings)
                else:
                    raise _refused(f"{show(path[:_SHOWN])} is a device, a pipe or a socket")
    return entries


def _read_file(path: Path, room: int) -> Entry:
    """Read a file, or just over `room` bytes of it."""
    # not by its name again: what it is may have changed, and a pipe would hold us for ever
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise _refused("a file changed into something else while it was read")
        content = file.read(room + 1)
    return Entry(content, executable=bool(mode & 0o100))


class _Bounded:
    """Unpacks gzip, and reads at most so many bytes: a bomb ends at the limit, not at the machine's."""

    def __init__(self, data: bytes, settings: Settings) -> None:
        self._settings = settings
        self._data = memoryview(data)
        self._gzip = zlib.decompressobj(31) if data[:2] == b"\x1f\x8b" else None
        self._at = 0
        # headers and padding take a block or two of each entry beside its content
        self._left = settings.template_bytes + settings.template_files * 2048 + (1 << 20)

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end. Raises `TooLarge` and `EOFError`."""
        self._left -= size
        if self._left < 0:
            raise _too_large(self._settings)
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
        """Return a content of `size` bytes, which is filled up to whole blocks. Raises the same."""
        if size < 0:
            raise ValueError
        filled = self.read(-(-size // _BLOCK) * _BLOCK)
        if len(filled) < size:
            raise EOFError
        return filled[:size]


def read_archive(archive: bytes, settings: Settings) -> dict[str, Entry]:
    """Read a tar, gzipped or not. Raises `InvalidParams` for what is neither file, folder nor link."""
    entries: dict[str, Entry] = {}
    source = _Bounded(archive, settings)
    try:
        for member in _members(source, settings):
            path = member.name.rstrip("/").removeprefix("./")
            content = source.content(member.size) if member.type in _FILES else None
            if path in ("", ".") or LEFT_OUT.intersection(path.split("/")):
                continue
            if len(entries) >= settings.template_files:
                raise _too_many(settings)
            if path in entries and entries[path] != Entry():
                raise _refused(f"{show(path[:_SHOWN])} is there twice")
            if content is not None:
                entries[path] = Entry(content, executable=bool(member.mode & 0o100))
            elif member.issym():
                entries[path] = Entry(link=member.linkname)
            elif member.isdir():
                entries[path] = Entry()
            else:
                raise _refused(f"{show(path[:_SHOWN])} is a device, a pipe, a hard link or a sparse file")
    except (tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        raise _refused(f"it is no tar archive ({type(error).__name__})") from None
    return entries


def _members(source: _Bounded, settings: Settings) -> Iterator[tarfile.TarInfo]:
    """Yield what a tar says of each entry; whoever takes it reads the content of a file before the next.

    The headers alone are read by the standard library, which believes what it reads in what may follow them:
    a map of holes makes gigabytes of a few bytes. Of that only names and sizes are taken here.
    """
    said: dict[str, str | int] = {}
    told = 0  # headers of what follows, one after another
    for _ in range(3 * settings.template_files + 1000):  # what is left out counts too, and what is told
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
            raise _refused("too much is told of one entry; pack it as a plain tar")
        more = source.content(member.size)
        if member.type in _LONG:
            said[_LONG[member.type]] = _text(more)
        elif member.type != tarfile.XGLTYPE:  # which tells of all: git's commit
            said |= _facts(more)
    raise _too_many(settings)


def _facts(more: bytes) -> dict[str, str | int]:
    """Return what an extended header (pax) tells: records of `LENGTH KEY=VALUE`, each with a line end."""
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
            raise _refused("it holds a sparse file; pack it as a plain tar")
        at = end
    raise _refused("too much is told of one entry; pack it as a plain tar")


def _text(name: bytes) -> str:
    return name.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def packed(entries: Mapping[str, Entry]) -> bytes:
    """Return entries as a tar of nothing but plain files, folders and links, folders first."""
    buffer = io.BytesIO()
    folders = _above(entries) | {path for path, entry in entries.items() if entry == Entry()}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(folders):
            member = tarfile.TarInfo(path)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        for path, entry in sorted(entries.items()):
            member = tarfile.TarInfo(path)
            if entry.link is not None:
                member.type, member.linkname = tarfile.SYMTYPE, entry.link
                tar.addfile(member)
            elif entry.content is not None:
                member.size, member.mode = len(entry.content), 0o755 if entry.executable else 0o644
                tar.addfile(member, io.BytesIO(entry.content))
    return buffer.getvalue()
