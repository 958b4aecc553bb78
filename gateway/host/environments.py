"""The Python environments of quickstart: one for each version, and a link to the one in use.

A new version is installed beside the running one, whose files stay as they are. The link is switched
atomically, and the previous environment is kept to go back to.
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
        """The environment in use; None if there is none yet, or it is a folder instead of a link."""
        return self._target(self.link)

    @property
    def previous(self) -> Path | None:
        """The environment that was in use before, or None."""
        return self._target(self._before)

    def switch(self, to: Path) -> None:
        """Switch to another environment. If killed, either that one or the previous one is in use."""
        to, before = to.resolve(), self.current
        if to == before:
            return
        if self.link.is_dir() and not self.link.is_symlink():  # of a version with one environment only
            new = self._root / "venv.new"
            new.unlink(missing_ok=True)
            new.symlink_to(to)
            exchange(new, self.link)
            shutil.rmtree(self._all / "0", ignore_errors=True)
            new.rename(self._all / "0")  # kept until `tidy`: the old gateway still runs from it
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
        """Return whether an environment is one of these, so that it can be switched to."""
        return environment.resolve().parent == self._all.resolve()

    def tidy(self) -> None:
        """Remove all but the current and the previous environment."""
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
