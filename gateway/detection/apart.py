"""Have a folder's clues looked at by a process of its own, whose answer is checked as a stranger's."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import threading
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
        found = _answer.validate_json(_asked(clues.packed()))
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


def _asked(clues: bytes) -> bytes:
    """Return what the process answers. Raises `OSError`, `SubprocessError` and `ValueError`."""
    # from a file and not by a pipe, so that of what comes back only as much is read as an answer has
    with tempfile.TemporaryFile() as given:
        given.write(clues)
        given.seek(0)
        with subprocess.Popen(
            _COMMAND, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd="/"
        ) as process:
            assert process.stdout is not None
            over = threading.Timer(_WAIT, process.kill)
            over.start()
            try:
                answer = process.stdout.read(_ANSWER + 1)
                if len(answer) > _ANSWER:
                    raise ValueError("a long answer")
                if process.wait() != 0:
                    raise subprocess.CalledProcessError(process.returncode, _COMMAND)
                return answer
            finally:
                process.kill()
                over.cancel()
