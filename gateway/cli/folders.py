"""A folder of this machine, prepared for a deployment: what it is, its archive, its manifest."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections import Counter
from pathlib import Path
from typing import Final

from gateway.deployments.entries import LEFT_OUT, packed, read_folder
from gateway.deployments.manifest import MANIFEST, Overrides, written
from gateway.deployments.template import Template, checked
from gateway.errors import InvalidParams, TooLarge
from gateway.rootfs.paths import show
from gateway.settings import Settings
from gateway.tools.globs import Rules, rules

_IGNORE_MAX: Final = 64 << 10  # bytes of an ignore file
_LOOKED_AT: Final = 200_000  # files and folders; a larger folder is not counted to its end


def named(given: str) -> bool:
    """Return whether `--template` gives the name of a template, not a folder."""
    return "/" not in given and not given.startswith(".") and not Path(given).is_dir()


class Ignored:
    """Whether the .gitignore files of a folder and its subfolders leave out a path; called for each.

    `named` lists what was left out, without the contents of folders; folders end with a slash.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rules: dict[str, Rules] = {}
        self.named: list[str] = []

    def __call__(self, path: str, is_folder: bool) -> bool:
        above = path
        while above:  # the innermost file decides
            above = above.rpartition("/")[0]
            inner = path[len(above) + 1 :] if above else path
            decided = self._of(above).decide(inner, folder=is_folder)
            if decided is not None:
                if decided and (name := f"{path}/" if is_folder else path) not in self.named:
                    self.named.append(name)
                return decided
        return False

    def _of(self, folder: str) -> Rules:
        if folder not in self._rules:
            text = b""
            with contextlib.suppress(OSError):
                descriptor = os.open(self._folder / folder / ".gitignore", os.O_RDONLY | os.O_NOFOLLOW)
                with os.fdopen(descriptor, "rb") as file:
                    text = file.read(_IGNORE_MAX)
            self._rules[folder] = rules(text.decode("utf-8", "replace"))
        return self._rules[folder]


def _measure(folder: Path, settings: Settings, ignored: Ignored) -> None:
    """Raise `TooLarge` for a folder beyond the limits of a site, before any file is read."""
    sizes, files, pending = Counter[str](), 0, [""]
    while pending and files < _LOOKED_AT:
        at = pending.pop()
        with os.scandir(folder / at) as listed:
            for found in listed:
                path = f"{at}/{found.name}" if at else found.name
                is_folder = found.is_dir(follow_symlinks=False)
                if found.name in LEFT_OUT or ignored(path, is_folder):
                    continue
                files += 1
                top, below, _ = path.partition("/")
                if is_folder:
                    pending.append(path)
                    sizes[f"{top}/"] += 0
                else:
                    sizes[f"{top}/" if below else top] += found.stat(follow_symlinks=False).st_size
    size = sum(sizes.values())
    if size <= settings.template_bytes and files <= settings.template_files:
        return
    largest = ", ".join(f"{show(name)} ({_bytes(has)})" for name, has in sizes.most_common(3))
    raise TooLarge(
        f"{folder} has {'' if files < _LOOKED_AT else 'over '}{_bytes(size)} in {files} files, and a site "
        f"may have at most {_bytes(settings.template_bytes)} (GATEWAY_TEMPLATE_BYTES) in "
        f"{settings.template_files} (GATEWAY_TEMPLATE_FILES). The largest are {largest}: list what the site "
        "does not need in .gitignore, and keep large files elsewhere",
        limit=settings.template_bytes,
    )


def _bytes(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def read(folder: Path, settings: Settings, overrides: Overrides) -> tuple[Template, list[str]]:
    """Read a folder as the gateway will, so that mistakes show before anything is sent.

    Returns it, and the paths that .gitignore leaves out.
    """
    if not folder.is_dir():
        raise InvalidParams(f"{folder} is not a folder")
    ignored = Ignored(folder)
    try:
        _measure(folder, settings, ignored)
        entries = read_folder(folder, settings, ignored)
    except OSError as error:
        raise InvalidParams(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    try:
        return checked(str(folder), entries, settings, shared=False, overrides=overrides), ignored.named
    except InvalidParams as error:
        # the gateway's own message has no folder to name
        error.message = error.message.replace(" DOMAIN FOLDER/", f" DOMAIN {folder}/")
        raise


def archive(template: Template) -> bytes:
    """Return the archive of a folder, as it is sent."""
    return gzip.compress(packed(template.entries), 6, mtime=0)


def write_manifest(folder: Path, template: Template) -> Path:
    """Write what was detected to the folder's manifest. Raises `InvalidParams` if it has one already."""
    path = folder / MANIFEST
    if template.detected is None or path.exists():
        raise InvalidParams(f"{path} exists already and says how the site is started; leave out --write")
    path.write_text(written(template.detected, template.manifest.port))
    return path
