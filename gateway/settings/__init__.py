"""Every setting, with its type, default and unit: `Settings`, and what a client reads of them by itself.

Environment variables `GATEWAY_…` win over the TOML file named by `GATEWAY_CONFIG`. This is the only
room that reads either. Every limit has a finite default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.settings.client import DEFAULT_CONFIG, ClientSettings

KiB: Final = 1 << 10
MiB: Final = 1 << 20

if TYPE_CHECKING:
    from gateway.settings.settings import Settings
else:

    def __getattr__(name: str) -> object:
        # brings pydantic, which a command that only asks a gateway does without
        if name != "Settings":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from gateway.settings.settings import Settings

        globals()[name] = Settings
        return Settings


__all__ = ["DEFAULT_CONFIG", "ClientSettings", "KiB", "MiB", "Settings", "load", "load_client"]


def load() -> Settings:
    """Read the settings. Raises `pydantic.ValidationError`, which names each wrong one."""
    from gateway.settings.settings import Settings

    return Settings()


def load_client() -> ClientSettings:
    """Read only the settings by which a client finds this machine's gateway. Raises as `load` does."""
    found = ClientSettings.read()
    if found is None:
        settings = load()
        secret = None if settings.secret is None else settings.secret.get_secret_value()
        found = ClientSettings(settings.listen, settings.state_dir, secret)
    return found
