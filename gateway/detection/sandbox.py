"""Run the detection in a separate process, and check its answer like any untrusted input."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import threading
from typing import Final

from pydantic import TypeAdapter, ValidationError

from gateway.detection.clues import Clues, Detection
from gateway.errors import Unavailable

log = logging.getLogger(__name__)

_WAIT: Final = 20.0  # seconds for its answer, on a busy machine
_ANSWER: Final = 64 << 10  # bytes
_COMMAND: Final = (sys.executable, "-I", "-m", "gateway.detection")
_answer: Final = TypeAdapter(Detection)


def detect_sandboxed(clues: Clues) -> Detection:
    """Return what a folder is. Takes some tenths of a second: call it in a thread. Raises `Unavailable`."""
    try:
        found = _answer.validate_json(_process_answer(clues.packed()))
    except (OSError, subprocess.SubprocessError, ValidationError, ValueError) as error:
        log.warning("detection failed: %s", type(error).__name__)
        raise Unavailable(
            "cannot detect what this folder is; give a command with `start` (--start) or in a site.toml",
            reason="undetected",
        ) from None
    if not all(words.isprintable() for words in (found.name, found.title, found.trouble, *found.lines())):
        raise Unavailable("cannot detect what this folder is", reason="undetected")
    return found


def _process_answer(clues: bytes) -> bytes:
    """Return the answer of the process. Raises `OSError`, `SubprocessError` and `ValueError`."""
    # input from a file, not a pipe, so that only a bounded part of the output need be read
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
