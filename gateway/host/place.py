"""Paths of quickstart's files in the state dir, and what they say."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# What clients read. Kept for the gateway, a token would limit the operator's own commands to its tenants.
CLIENTS: Final = ("GATEWAY_TOKEN", "GATEWAY_URL")


@dataclass(frozen=True, slots=True)
class Place:
    """The files of quickstart in the state dir."""

    root: Path

    @property
    def pidfile(self) -> Path:
        return self.root / "gateway.pid"

    @property
    def log(self) -> Path:
        return self.root / "gateway.log"

    @property
    def token(self) -> Path:
        return self.root / "quickstart.token"

    @property
    def command(self) -> Path:
        """A wrapper of `incus-gateway` with this gateway's settings, written by `deploy/quickstart`."""
        return self.root / "incus-gateway"

    @property
    def environment(self) -> Path:
        return self.root / "quickstart.env"

    @property
    def stamp(self) -> Path:
        """The version of code and settings from which the running gateway was started."""
        return self.root / "quickstart.stamp"

    @property
    def incus_is_ours(self) -> Path:
        """Exists if quickstart started incusd, so that `stop` stops it too."""
        return self.root / "quickstart.incus"


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically, with mode 0600 from the start."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def format_environment(variables: dict[str, str]) -> str:
    """Format variables for systemd's EnvironmentFile (systemd.exec(5)): quoted, one per line."""
    lines = []
    for key, value in sorted(variables.items()):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")
        lines.append(f'{key}="{escaped}"\n')
    return "".join(lines)


def parse_environment(text: str) -> dict[str, str]:
    """Parse the output of `format_environment`."""
    found = re.findall(r'^(\w+)="((?:[^"\\]|\\.)*)"$', text, re.MULTILINE | re.DOTALL)
    return {key: re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL) for key, value in found}


def environment_of(state_dir: Path) -> dict[str, str]:
    """Return the settings of the gateway with this state dir: those of the last run, and what is set now.

    So `stop` and a second run address the same gateway.
    """
    saved: dict[str, str] = {}
    with contextlib.suppress(OSError):
        saved = parse_environment(Place(state_dir).environment.read_text())
    given = {key: value for key, value in os.environ.items() if key.startswith("GATEWAY_")}
    every = {**saved, **given, "GATEWAY_STATE_DIR": str(state_dir)}
    return {name: value for name, value in every.items() if name not in CLIENTS}
