"""Creates the state dir, and keeps other users out of it.

It has the secret, the records and the logs. If Caddy runs as another user, its files are beside it.
"""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path
from typing import Final

from gateway.settings import Settings

_PRIVATE: Final = 0o700
_MAIN: Final = (Path("/"), Path("/var"))  # folders that belong to more than a gateway


def close(settings: Settings) -> str | None:
    """Create the state dir if needed, and keep other users out; return what was changed, or None.

    Does not change another user's folder or a system's main folders. Users may pass through if they must: a
    Caddy whose folder is inside, or a gateway's own user whose program is.
    """
    folder = settings.state_dir
    folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
    found = folder.stat()
    group = _passing_group(settings, found)
    mode = 0o711 if has_foreign_caddy(settings) else 0o710 if group is not None else _PRIVATE
    shared = found.st_mode & stat.S_ISVTX or folder.resolve().parent in _MAIN
    if found.st_uid != os.geteuid() or shared:
        return None
    if group is not None and found.st_gid != group:
        os.chown(folder, -1, group)
    elif stat.S_IMODE(found.st_mode) & ~mode == 0:
        return None
    folder.chmod(mode)
    return f"mode {mode:03o}"


def has_foreign_caddy(settings: Settings) -> bool:
    """Return whether another user's Caddy has its folder in the state dir, and so must pass through."""
    folder = settings.caddy_folder.resolve()
    if settings.state_dir.resolve() not in folder.parents:
        return False
    own = (folder / "data", folder / "admin")
    return any(place.exists() and place.stat().st_uid != os.geteuid() for place in own)


def _passing_group(settings: Settings, folder: os.stat_result) -> int | None:
    """Return the group of a gateway's own user that runs a program in this folder."""
    if os.geteuid() != 0:
        return None
    try:
        group = pwd.getpwnam(settings.broker_user).pw_gid
    except KeyError:
        return None
    return group if settings.broker_socket is not None or folder.st_gid == group else None


def private(path: str, flags: int) -> int:
    """An opener for `open`: makes the file readable by its owner only, whatever its mode was before."""
    descriptor = os.open(path, flags, 0o600)
    if stat.S_ISREG((found := os.fstat(descriptor)).st_mode) and found.st_uid == os.geteuid():
        os.fchmod(descriptor, 0o600)
    return descriptor
