"""All settings of a gateway as one object, each group from its module."""

from __future__ import annotations

from pathlib import Path

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
