"""All settings of a gateway as one object, each group from its module."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from gateway.settings.agents import AgentSettings
from gateway.settings.client import config_file
from gateway.settings.clustering import ClusterSettings
from gateway.settings.commands import CommandSettings
from gateway.settings.connections import ConnectionSettings
from gateway.settings.deployments import DeploymentSettings
from gateway.settings.editing import EditorSettings
from gateway.settings.lifecycle import LifecycleSettings
from gateway.settings.records import RecordSettings
from gateway.settings.routing import RouteSettings
from gateway.settings.serving import ServerSettings
from gateway.settings.sites import SiteSettings
from gateway.settings.tenants import TenantSettings
from gateway.settings.tools import ToolSettings

# variables of the command line, and those that only tests set
_NOT_SETTINGS: Final = frozenset({"GATEWAY_CONFIG", "GATEWAY_URL", "GATEWAY_TOKEN"})
_OF_TESTS: Final = "GATEWAY_TEST_"


# the fields of the last base come first: so they have the order of docs/settings.md
class Settings(
    LifecycleSettings,
    RecordSettings,
    EditorSettings,
    AgentSettings,
    ToolSettings,
    CommandSettings,
    ConnectionSettings,
    SiteSettings,
    DeploymentSettings,
    TenantSettings,
    RouteSettings,
    ClusterSettings,
    ServerSettings,
    BaseSettings,
):
    """All settings of one gateway process, immutable once read."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", extra="ignore", frozen=True)

    @property
    def caddy_folder(self) -> Path:
        """The folder of Caddy's configuration and routes."""
        return self.caddy_dir or self.state_dir / "caddy"

    @property
    def holder_socket(self) -> Path:
        """Where the holder of this gateway's commands listens."""
        return self.state_dir / "holder.sock"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config_file())


def unknown_settings() -> Iterator[str]:
    """Yield a warning for each `GATEWAY_…` variable, and each key of the TOML file, that is not a setting.

    Raises `OSError` or `ValueError` if the file cannot be read, as reading `Settings` does.
    """
    for name in sorted(os.environ):
        setting = name.lower().removeprefix("gateway_")
        if setting != name.lower() and name not in _NOT_SETTINGS and not name.startswith(_OF_TESTS):
            yield from _unknown(name, setting, lambda nearest: f"GATEWAY_{nearest.upper()}")
    file = config_file()
    for key in TomlConfigSettingsSource(Settings, toml_file=file).toml_data:
        yield from _unknown(f"{key} in {file}", key.lower(), str)


def _unknown(given: str, setting: str, spelled: Callable[[str], str]) -> Iterator[str]:
    if setting not in Settings.model_fields:
        nearest = difflib.get_close_matches(setting, Settings.model_fields, 1)
        hint = f"; the nearest setting is {spelled(nearest[0])}" if nearest else ""
        yield f"{given} is not a setting, and has no effect{hint}"
