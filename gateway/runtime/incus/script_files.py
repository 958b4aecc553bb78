"""Read the shell scripts that run inside Incus containers."""

from __future__ import annotations

from pathlib import Path


def script(name: str) -> str:
    """Return the text of a script in this folder."""
    return Path(__file__).with_name(f"{name}.sh").read_text()


def systemd_script(name: str) -> str:
    """Return the text of a script that uses the container's systemd, which it waits for: up to 20 s."""
    return f"{script('wait_for_systemd')}\n{script(name)}"
