"""Makes a folder of this machine into what is deployed: what it is, its archive, its manifest."""

from __future__ import annotations

import gzip
from pathlib import Path

from gateway.deployments.entries import packed, read_folder
from gateway.deployments.manifest import MANIFEST, Overrides, written
from gateway.deployments.template import Template, checked
from gateway.errors import InvalidParams
from gateway.settings import Settings


def named(given: str) -> bool:
    """Say whether `--template` is the name of a template, and no folder."""
    return "/" not in given and not given.startswith(".") and not Path(given).is_dir()


def read(folder: Path, settings: Settings, overrides: Overrides) -> Template:
    """Read a folder as the gateway will, so that what is wrong is said before anything is sent."""
    if not folder.is_dir():
        raise InvalidParams(f"{folder} is no folder")
    try:
        entries = read_folder(folder, settings)
    except OSError as error:
        raise InvalidParams(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    try:
        return checked(str(folder), entries, settings, shared=False, overrides=overrides)
    except InvalidParams as error:
        # the gateway is told of no folder; here there is one
        error.message = error.message.replace(" DOMAIN FOLDER/", f" DOMAIN {folder}/")
        raise


def archive(template: Template) -> bytes:
    """Return a folder as it is sent."""
    return gzip.compress(packed(template.entries), 6, mtime=0)


def write_manifest(folder: Path, template: Template) -> Path:
    """Keep what was found as the folder's manifest. Raises `InvalidParams` where it has one."""
    path = folder / MANIFEST
    if template.detected is None or path.exists():
        raise InvalidParams(f"{path} is there already: it says how the site is started")
    path.write_text(written(template.detected, template.manifest.port))
    return path
