"""The Python environments of quickstart: each version has its own, and a link says which one is in use.

A new version is installed beside the one that runs, whose files stay as they are. The link is switched at
once, and the environment before stays, to go back to.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from gateway.storage.state_dir import exchange


class Environments:
    """The environments of one state dir, as `deploy/quickstart` makes them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.link = root / "venv"
        self._before = root / "venv.previous"
        self._all = root / "venvs"

    @property
    def current(self) -> Path | None:
        """The one in use, None where there is none yet, or a folder that is no link."""
        return self._target(self.link)

    @property
    def previous(self) -> Path | None:
        """The one that was in use before, None where there is none."""
        return self._target(self._before)

    def switch(self, to: Path) -> None:
        """Have another be in use. A kill leaves either this one or the one before."""
        to, before = to.resolve(), self.current
        if to == before:
            return
        if self.link.is_dir() and not self.link.is_symlink():  # made by a version that kept one
            new = self._root / "venv.new"
            new.unlink(missing_ok=True)
            new.symlink_to(to)
            exchange(new, self.link)
            shutil.rmtree(self._all / "0", ignore_errors=True)
            new.rename(self._all / "0")  # until `tidy`: the old gateway still runs from there
            return
        if before is not None:
            self._point(self._before, before)
        self._point(self.link, to)

    def reset(self, current: Path, previous: Path | None) -> None:
        """Undo a switch."""
        self._point(self.link, current)
        if previous is not None:
            self._point(self._before, previous)
        else:
            self._before.unlink(missing_ok=True)

    def holds(self, environment: Path) -> bool:
        """Return whether an environment is one of these, which may be switched to."""
        return environment.resolve().parent == self._all.resolve()

    def tidy(self) -> None:
        """Remove all but the one in use and the one before."""
        kept = {self.current, self.previous}
        with contextlib.suppress(OSError):
            for folder in self._all.iterdir():
                if folder.resolve() not in kept:
                    shutil.rmtree(folder, ignore_errors=True)

    def _target(self, link: Path) -> Path | None:
        if not link.is_symlink() or not link.is_dir():
            return None
        return link.resolve()

    def _point(self, link: Path, to: Path) -> None:
        new = link.with_name(link.name + ".new")
        new.unlink(missing_ok=True)
        new.symlink_to(os.path.relpath(to, link.parent))
        new.rename(link)
