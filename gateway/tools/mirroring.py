"""Find what a workspace has and the folder that is to replace it lacks; runs inside workers.

The folder's ignore files and the patterns of its manifest say what stays. What no deployed folder ever had
stays, too: the site, an agent or a person has written it. Each deployed folder leaves a list of the digests
of its paths in the workspace (`.gateway/deployed`). The tenant controls all of that and the names, so they
are read and matched here and not in the gateway.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Literal

from gateway.errors import Timeout, TooLarge
from gateway.rootfs.paths import HOME
from gateway.rootfs.root import Root
from gateway.rootfs.worker import Operation, Workspace
from gateway.tools.globs import Glob, GlobError, Rules, rules

Kind = Literal["file", "folder", "link"]
LOST: Final = "workspace/lost"
KEPT: Final = "workspace/kept"
_NAMES_MAX: Final = 8 << 20  # bytes
_DEPTH: Final = 64  # folders below which nothing can stay
_IGNORE: Final = b"# made by incus-gateway"  # as gateway/history/adopt.sh begins it
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY
_LISTS: Final = f"{HOME}/deployed"  # one file for each folder that was deployed, except with the same paths
OWN_LISTS: Final = f"{_LISTS}/".encode()
_LISTS_MAX: Final = 32  # newest lists; older ones are removed
_LISTED_MAX: Final = 1000  # names in that folder
_LIST_BYTES: Final = 8 << 20  # of all lists together, 8 for each path
_DIGEST: Final = 8  # bytes of a path's digest
_NOTED_MAX: Final = 1000  # kept paths that are reported
# what tools make again, and would mix up with what an older version has made
_GENERATED: Final = frozenset(
    (
        *(".next", ".nuxt", ".svelte-kit", ".astro", ".cache", ".output", ".turbo", ".vite", ".vinxi"),
        *(".angular", ".docusaurus", ".tanstack", "dist", "build"),
    )
)


def understood(pattern: str) -> str:
    """Return a pattern unchanged. Raises `ValueError` if it does not parse."""
    try:
        Glob(pattern)
    except GlobError as error:
        raise ValueError(str(error)) from None
    return pattern


def listed(paths: Iterable[str]) -> tuple[str, bytes]:
    """Return the path and the content of the list of a folder with these paths, its folders among them."""
    content = b"".join(sorted({_digest(path) for path in paths}))
    return f"{_LISTS}/{hashlib.sha256(content).hexdigest()[:16]}", content


def _digest(path: str) -> bytes:
    return hashlib.blake2b(os.fsencode(path), digest_size=_DIGEST).digest()


@dataclass(slots=True)
class _Deployed:
    """What is known of the folders that were deployed: digests of their paths, None if nothing is."""

    paths: set[bytes] | None = None
    surplus: list[str] = field(default_factory=list)  # paths of lists that are not needed any more


def _deployed(tree: Root) -> _Deployed:
    """Read the lists of the folders that were deployed, newest first and up to a limit."""
    found = list[tuple[float, str]]()
    try:
        descriptor = tree.open_real(_LISTS, _FOLDER)
        try:
            with os.scandir(descriptor) as entries:
                for entry in islice(entries, _LISTED_MAX):
                    if entry.is_file(follow_symlinks=False):
                        found.append((entry.stat(follow_symlinks=False).st_mtime, f"{_LISTS}/{entry.name}"))
        finally:
            os.close(descriptor)
    except OSError:
        return _Deployed()
    found.sort(reverse=True)
    known, room = set[bytes](), _LIST_BYTES
    for _, path in found[:_LISTS_MAX]:
        content = _content(tree, path, room)
        room -= len(content)
        known.update(content[at : at + _DIGEST] for at in range(0, len(content), _DIGEST))
    return _Deployed(known or None, [path for _, path in found[_LISTS_MAX:]])


def _content(tree: Root, path: str, most: int) -> bytes:
    try:
        # without O_NONBLOCK a FIFO under that name would block the worker
        descriptor = tree.open_real(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        return file.read(most) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""


@dataclass(slots=True)
class _Look:
    tree: Root
    deadline: float
    room: int
    visits: int
    there: Mapping[str, Kind]
    left_out: frozenset[str]
    keep: Rules
    ignored: Mapping[str, Rules]
    clean: bool
    deployed: _Deployed
    noted: list[bytes] = field(default_factory=list)  # what stays only because no folder had it

    def written(self, path: str) -> bool:
        """Return whether no deployed folder had something that is not generated either."""
        known = self.deployed.paths
        return not _GENERATED.intersection(path.split("/")) and (known is None or _digest(path) not in known)

    def stays(self, path: str, *, folder: bool) -> bool:
        """Return whether the folder says that something it lacks stays."""
        if self.keep.decide(path, folder=folder):
            return True
        above = path
        while above:  # the innermost ignore file first
            above = above.rpartition("/")[0]
            if (found := self.ignored.get(above)) is not None:
                inner = path[len(above) + 1 :] if above else path
                if (decided := found.decide(inner, folder=folder)) is not None:
                    return decided
        return False

    def inside(self, folder: str) -> list[tuple[str, str, bool]] | None:
        """Return name, path and kind (folder or not) of a folder's entries; None if it cannot be read."""
        try:
            descriptor = self.tree.open_real(folder, _FOLDER)
        except OSError:
            return None
        try:
            with os.scandir(descriptor) as listed:
                names = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in listed)
        finally:
            os.close(descriptor)
        self.visits -= len(names)
        if self.visits < 0:
            raise TooLarge("the workspace has more files than an update may compare")
        if time.monotonic() > self.deadline:
            raise Timeout("finding out what an update removes took too long")
        return [(name, f"{folder}/{name}" if folder else name, is_folder) for name, is_folder in names]

    def kept(
        self, folder: str, depth: int, kept: list[bytes], *, within: bool = False, clean: bool = False
    ) -> None:
        """Collect the paths below a folder that are kept and that the new folder does not have.

        That is what the manifest names and, unless `clean`, what no folder had and no ignore file names.
        The latter begin with "./": a former site has its own of these, since no rollback carries them.
        `within` says that a folder above is named, and so everything here.
        """
        for name, path, is_folder in self.inside(folder) or ():
            if name in self.left_out:
                continue
            named = within or bool(self.keep.decide(path, folder=is_folder))
            ours = clean or path == HOME or (not named and self.stays(path, folder=is_folder))
            if path not in self.there and (named or (not ours and self.written(path))):
                self._name(path if named else f"./{path}", kept)
            elif is_folder and depth < _DEPTH:
                self.kept(path, depth + 1, kept, within=named, clean=ours)

    def below(self, folder: str, depth: int, lost: list[bytes], *, clean: bool) -> bool:
        """Collect what is lost below a folder; return whether anything there stays.

        `clean` says that all goes which the new folder lacks and does not name.
        """
        any_stays = False
        entries = self.inside(folder)
        if entries is None:
            return True  # it has become a link, or the site's user may not read it: the copy reports that
        for name, path, is_folder in entries:
            if (
                name in self.left_out
                or path == HOME
                or self.stays(path, folder=is_folder)
                or self._made(path)
            ):
                any_stays = True
                continue
            kind = self.there.get(path)
            if kind is None and not clean and self.written(path):
                any_stays = True
                if len(self.noted) < _NOTED_MAX:
                    self._name(f"{path}/" if is_folder else path, self.noted)
                continue
            if not is_folder:
                if kind in ("file", "link"):
                    any_stays = True
                else:
                    self._name(path, lost)
                continue
            inner: list[bytes] = []
            gives_way = clean or kind in ("file", "link")
            stays = depth < _DEPTH and self.below(path, depth + 1, inner, clean=gives_way)
            if stays or kind == "folder":
                any_stays = True
                lost += inner
            else:
                self._name(path, lost)
        return any_stays

    def _made(self, path: str) -> bool:
        """Return whether it is the ignore file that the gateway gave a workspace without one."""
        if path != ".gitignore":
            return False
        try:
            descriptor = self.tree.open_real(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            return os.read(descriptor, len(_IGNORE)) == _IGNORE
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def _name(self, path: str, names: list[bytes]) -> None:
        name = os.fsencode(path)
        self.room -= len(name) + 1
        if self.room < 0:
            raise TooLarge("the names that an update removes or keeps are too long in total")
        names.append(name)


def _look(workspace: Workspace, given: dict[str, Any]) -> _Look:
    clean = bool(given.get("clean", True))
    return _Look(
        workspace.root,
        time.monotonic() + workspace.limits.tool_timeout,
        _NAMES_MAX,
        workspace.limits.visit_max,
        given.get("there", {}),
        frozenset(given["left_out"]),
        rules("\n".join(given["keep"])),
        {folder: rules(text) for folder, text in given.get("ignored", {}).items()},
        clean,
        _Deployed() if clean else _deployed(workspace.root),
    )


def _lost(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Return the paths that an update removes, and those that stay because no folder had them.

    Each has a "-" or a "+" before it and a NUL behind it; a folder is one path, with "/" at its end if it
    stays. `there` has every path of the new folder with its kind, `ignored` the ignore files by folder, and
    `keep` the manifest's patterns; `left_out` are names that are never part of a deployed folder. With
    `clean`, which is also the default, nothing stays because no folder had it.
    """
    look, lost = _look(workspace, given), list[bytes]()
    look.below("", 0, lost, clean=look.clean)
    lost += [os.fsencode(path) for path in look.deployed.surplus]
    return b"".join([b"-%b\0" % path for path in lost] + [b"+%b\0" % path for path in look.noted])


def _kept(workspace: Workspace, given: dict[str, Any]) -> bytes:
    """Return the paths that an update keeps and that are not `there`, each followed by a NUL.

    Those that the manifest does not name begin with "./".
    """
    look, kept = _look(workspace, given), list[bytes]()
    look.kept("", 0, kept, clean=look.clean)
    return b"".join(path + b"\0" for path in kept)


OPERATIONS: dict[str, Operation] = {LOST: _lost, KEPT: _kept}
