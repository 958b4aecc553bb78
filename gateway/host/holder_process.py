"""The holder of a gateway's commands: become one, start one beside a gateway that is no unit, stop it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import gateway
from gateway.settings import Settings
from gateway.storage.state_dir import close

# without the environment's packages, none of which it needs: it takes a tenth of the memory
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from gateway.holder.holding import main; main()"


def run(settings: Settings) -> NoReturn:
    """Become a holder that serves until SIGTERM. Raises `OSError`."""
    close(settings)
    words = command(settings)
    os.execve(words[0], words, {"LANG": "C.UTF-8"})  # noqa: S606 - our own interpreter with our own words


def command(settings: Settings) -> list[str]:
    """Return the command line of a holder."""
    source = str(Path(gateway.__file__ or "").parents[1])
    return [sys.executable, "-ISBc", _BOOT, source, str(settings.holder_socket), str(settings.hold)]
