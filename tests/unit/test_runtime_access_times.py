"""The script that disables access times in golden copies."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.runtime.incus.provisioning import _ACCESS_TIMES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the flags are Linux's")


def flags(path: Path) -> int:
    """Return a file's flags as shown by lsattr(1)."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return int.from_bytes(fcntl.ioctl(file, 0x80086601, bytes(8))[:4], sys.byteorder)
    finally:
        os.close(file)


def test_each_file_and_folder_is_marked_and_no_link_followed(tmp_path: Path) -> None:
    """No other flag changes, and a file that cannot be marked does not stop the script."""
    outside, top = tmp_path / "outside", tmp_path / "top"
    (top / "a/b").mkdir(parents=True)
    outside.write_text("x")
    for name in ("one", "a/two", "a/b/three"):
        (top / name).write_text(name)
    (top / "a/link").symlink_to(outside)
    os.mkfifo(top / "a/pipe")
    try:
        before = {path: flags(path) for path in (outside, top, *top.rglob("[!lp]*"))}
    except OSError:
        pytest.skip("this file system has no such flags")
    subprocess.run([sys.executable, "-c", _ACCESS_TIMES, str(top)], check=True, timeout=60)
    after = {path: flags(path) for path in before}
    assert len(before) == 7
    assert after == {path: had | (0 if path == outside else 0x80) for path, had in before.items()}
