"""Have a folder's clues looked at by a process of its own, whose answer is checked as a stranger's."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Final

from pydantic import TypeAdapter, ValidationError

from gateway.detection.clues import Clues
from gateway.detection.detected import Detected
from gateway.errors import Unavailable

log = logging.getLogger(__name__)

_WAIT: Final = 20.0  # seconds until it must have answered, on a machine that is busy
_ANSWER: Final = 64 << 10  # bytes
_COMMAND: Final = (sys.executable, "-I", "-m", "gateway.detection")
_answer: Final = TypeAdapter(Detected)


def detect_apart(clues: Clues) -> Detected:
    """Return what a folder is. Takes some tenths of a second: do it in a thread. Raises `Unavailable`."""
    try:
        done = subprocess.run(
            _COMMAND, input=clues.packed(), capture_output=True, timeout=_WAIT, env={}, cwd="/", check=True
        )
        if len(done.stdout) > _ANSWER:
            raise ValueError("a long answer")
        found = _answer.validate_json(done.stdout)
    except (OSError, subprocess.SubprocessError, ValidationError, ValueError) as error:
        log.warning("what a folder is could not be found out: %s", type(error).__name__)
        raise Unavailable(
            "what this folder is could not be found out; say how it is started by `start` (--start), or in a "
            "site.toml",
            reason="undetected",
        ) from None
    if not all(words.isprintable() for words in (found.name, found.title, found.trouble, *found.lines())):
        raise Unavailable("what this folder is could not be found out", reason="undetected")
    return found
