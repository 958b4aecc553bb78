"""The settings by which a client finds the gateway of its own machine, read by the standard library alone.

A command that asks a gateway ends sooner than the libraries are imported that check all settings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

DEFAULT_CONFIG: Final = "/etc/incus-gateway/gateway.toml"
LISTEN: Final = "127.0.0.1:8080"
STATE_DIR: Final = "/var/lib/incus-gateway"


def config_file() -> Path:
    """Return where the TOML file is, if there is one."""
    return Path(os.environ.get("GATEWAY_CONFIG", DEFAULT_CONFIG))


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Where this machine's gateway listens, and what signs its tokens."""

    listen: str
    state_dir: Path
    secret: str | None = field(repr=False)

    @classmethod
    def read(cls) -> ClientSettings | None:
        """Return the values as `Settings` would; None if only `Settings` can report what is wrong."""
        found: dict[str, Any] = {"listen": LISTEN, "state_dir": STATE_DIR, "secret": None}
        try:
            found |= _of_file(config_file())
        except (OSError, ValueError):
            return None
        for name, value in os.environ.items():
            setting = name.lower().removeprefix("gateway_")
            if setting in found and name.lower() != setting:
                found[setting] = value
        listen, state_dir, secret = found["listen"], found["state_dir"], found["secret"]
        if (
            not isinstance(listen, str)
            or not isinstance(state_dir, str)
            or not isinstance(secret, str | None)
        ):
            return None
        return cls(listen, Path(state_dir), secret)


def _of_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    import tomllib

    with path.open("rb") as file:
        found = {name.lower(): value for name, value in tomllib.load(file).items()}
    return {name: found[name] for name in ("listen", "state_dir", "secret") if name in found}
