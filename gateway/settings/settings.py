"""Every setting, with its type, default and unit, grouped as an operator thinks."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from gateway.settings import MiB
from gateway.settings.client import LISTEN, STATE_DIR, config_file

# variables of the command line, and those that only tests set
_NOT_SETTINGS: Final = frozenset({"GATEWAY_CONFIG", "GATEWAY_URL", "GATEWAY_TOKEN"})
_OF_TESTS: Final = "GATEWAY_TEST_"


# what may stand in a host by RFC 3986: nothing with a meaning in a Content-Security-Policy
_HOST: Final = re.compile(r"[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\]")


def _url(value: str | None) -> str | None:
    """Check a URL that is named in the editor's policy. Raises `ValueError`."""
    if value is None:
        return None
    parts = urlsplit(value)
    host, _, port = (
        parts.netloc.rpartition(":") if re.search(r":[0-9]+$", parts.netloc) else (parts.netloc, "", "")
    )
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host) or (port and int(port) > 65535):
        raise ValueError("must be http://HOST… or https://HOST…, without a user")
    if parts.fragment or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("must have no fragment, and no characters that a URL must escape")
    return value


def _unset(value: object) -> object:
    return None if value == "" else value


def _names(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _origins(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip().rstrip("/") for part in value.split(",") if part.strip())
    return value


def _suffixes(value: object) -> object:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    entries = (str(part).strip().lower().removeprefix("*.").strip(".") for part in parts)
    return tuple(entry for entry in entries if entry)


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]


Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_origins)]


Suffixes = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_suffixes)]


class AddressSettings(BaseModel):
    """Where the gateway listens, and where its parts and its records are."""

    listen: str = Field(LISTEN, description="address to listen on: HOST:PORT, or the path of a unix socket")
    runtime: Literal["incus", "local"] = Field(
        "incus",
        description="where tenants run: in Incus containers, or as `local` processes, which are not isolated",
    )
    incus_socket: Path = Field(Path("/var/lib/incus/unix.socket"), description="unix socket of incusd")
    incus_project: str = Field("default", description="Incus project of the tenants")
    state_dir: Path = Field(
        Path(STATE_DIR), description="folder for the secret, the records and local tenants"
    )
    domain: str | None = Field(
        None, description="domain of the gateway itself, behind Caddy; needs GATEWAY_LISTEN to be HOST:PORT"
    )
    broker_socket: Path | None = Field(
        None,
        description="unix socket of `incus-gateway broker`; unset: the gateway starts its own broker",
    )
    broker_user: str = Field("incus-gateway", description="user that this broker serves besides root")
    agent_url: Annotated[str | None, BeforeValidator(_unset), AfterValidator(_url)] = Field(
        None,
        description="URL of a server that runs an agent for the browser editor; unset: no prompt box",
    )
    templates_dir: Path | None = Field(
        None, description="folder with more site templates besides the built-in ones"
    )
    hold: float = Field(
        60.0,
        gt=0,
        description="seconds that the holder keeps running commands for a gateway that was restarted or "
        "killed",
    )


class SecuritySettings(BaseModel):
    """Who may ask the gateway."""

    secret: SecretStr | None = Field(
        None, description="key that signs tokens; unset: one is created in the state dir"
    )
    origins: Origins = Field(
        (), description="origins of web pages that may use the gateway besides its own, comma-separated"
    )
    hosts: Names = Field(
        (),
        description="host names that the gateway answers to besides IP addresses, `localhost`, "
        "GATEWAY_DOMAIN and the hosts of GATEWAY_LISTEN and GATEWAY_ORIGINS, comma-separated; "
        "`*` for any",
    )


class ClusterSettings(BaseModel):
    """A gateway among others, on the members of an Incus cluster."""

    peer_listen: str = Field(
        ":8444",
        pattern=r"^.*:[0-9]{1,5}$",
        description="address to listen on for other members' gateways: HOST:PORT; without a host, this "
        "member's address in the cluster",
    )
    advertise: str | None = Field(
        None, description="URL at which clients reach this member's gateway directly; reported as `home`"
    )
    placement: Literal["spread", "local"] = Field(
        "spread",
        description="member that gets a new tenant: the one with the smallest share of its memory in use "
        "(`spread`), or the one that is asked (`local`)",
    )
    local_member: Path | None = Field(
        None,
        description="file of this gateway in a folder through which gateways of the runtime `local` on one "
        "machine find one another, each as a cluster member named like its file",
    )
    cluster_project: str = Field(
        "gateway-keys",
        description="Incus project for the keys that the gateways of a cluster share, and for nothing else",
    )
    standby: float = Field(
        0.0,
        ge=0,
        description="seconds between two copies of each tenant to another member, from which `incus-gateway "
        "cluster recover` brings it back if its own member is lost; 0: none. `user.gateway.standby` of an "
        "instance overrides it",
    )
    standby_project: str = Field(
        "gateway-standby", description="Incus project for these copies, and for nothing else"
    )
    moves_at_once: int = Field(
        2, gt=0, description="maximum number of tenants that leave this member at once"
    )


class SitesSettings(BaseModel):
    """Caddy, the domains of sites, and how sites are deployed."""

    caddy_dir: Path | None = Field(
        None,
        description="folder of Caddy's configuration and routes; unset: `caddy` in the state dir",
    )
    caddy_admin: str = Field("http://127.0.0.1:2019", description="URL or unix socket of Caddy's admin API")
    caddy_http: int = Field(80, gt=0, lt=65536, description="port where Caddy serves HTTP")
    caddy_https: int = Field(443, gt=0, lt=65536, description="port where Caddy serves HTTPS")
    caddy_ask: int = Field(
        2020,
        gt=0,
        lt=65536,
        description="loopback port of Caddy where it and the gateway look sites up",
    )
    caddy_peers: int = Field(
        8445,
        gt=0,
        lt=65536,
        description="port at a cluster member's address where the other members' Caddys request its sites; "
        "the same on all members",
    )
    caddy_issuer: Literal["acme", "internal"] = Field(
        "acme",
        description="issuer of the sites' certificates: a public authority (`acme`) or Caddy itself "
        "(`internal`)",
    )
    caddy_email: str = Field("", description="email address that the public authority writes to")
    caddy_retry: float = Field(
        2.0,
        ge=0,
        description="seconds that visitors wait for a site that accepts no connections, for example while "
        "its server restarts; 0: not at all",
    )
    domain_suffixes: Suffixes = Field(
        ("localhost",),
        description="suffixes under which every token may give its tenants a domain `NAME.SUFFIX`, "
        "comma-separated",
    )
    golden: bool = Field(
        True, description="whether each template is kept installed once, to copy the next tenant from"
    )
    warm_pool: int = Field(
        2, ge=0, description="number of instances kept ready for each template that was deployed; 0: none"
    )
    install_timeout: float = Field(
        300.0, gt=0, description="seconds that a template's install command may take"
    )
    verify_timeout: float = Field(60.0, gt=0, description="seconds within which a started site must answer")
    idle_stop: float = Field(
        0.0,
        ge=0,
        description="seconds without use after which a tenant is put to sleep, until it is needed again; "
        "0: never",
    )
    install_output: int = Field(
        64 * MiB, gt=0, description="bytes that a template's install command may print before it is ended"
    )
    install_log: int = Field(
        2000, gt=0, description="maximum number of an install command's lines that are published"
    )
    settle_time: float = Field(
        3.0,
        ge=0,
        description="seconds that a site must stay up after its first answer for its deployment to "
        "succeed; a site that is made as a copy of one that did is watched for as long after its deployment",
    )
    upload_copies: int = Field(
        16, ge=0, description="maximum number of golden copies of uploaded folders; 0: none"
    )
    owner_upload_copies: int = Field(
        4, ge=0, description="maximum number of golden copies of one owner's uploads"
    )
    owner_upload_copies_bytes: int = Field(
        2048 * MiB,
        ge=0,
        description="maximum size of the golden copies of one owner's uploads in the pool in bytes",
    )
    upload_copies_unused: float = Field(
        7 * 86400.0, gt=0, description="seconds after which an unused golden copy of an upload is removed"
    )


class SizesSettings(BaseModel):
    """What a tenant is made of, and its limits."""

    workspace: str = Field("/srv/site", description="project folder of a tenant inside its container")
    workspace_user: str = Field(
        "site", description="user inside the container that owns the workspace and runs commands"
    )
    workspace_uid: int = Field(
        1000, ge=0, description="uid of that user inside the container; its gid is the same"
    )
    profile: str = Field("gateway-tenant", description="Incus profile of every tenant")
    image: str = Field("gateway-base", description="alias of the base image")
    image_compiler: bool = Field(
        False, description="whether the base image has a C++ compiler, with the headers of Node and Python"
    )
    network: str = Field("gatewaybr0", description="bridge of the tenants")
    network_ipv4: str = Field("10.82.0.1/20", description="IPv4 address and network of that bridge")
    pool: str = Field("gateway", description="storage pool of the tenants")
    pool_source: str = Field(
        "", description="block device for a new pool; empty: a sparse file sized to the free disk"
    )
    simple_quotas: bool = Field(
        True,
        description="whether setup gives a new btrfs pool simple quotas (Linux 6.8, btrfs-progs 6.7)",
    )
    tenant_cpu: str = Field("1", description="CPU limit of a tenant, as Incus's limits.cpu takes it")
    tenant_memory: str = Field(
        "1GiB", description="memory limit of a tenant, as Incus's limits.memory takes it; hard"
    )
    tenant_processes: int = Field(400, gt=0, description="maximum number of processes of a tenant")
    tenant_disk: str = Field("4GiB", description="size of a tenant's root disk, if the pool has quotas")
    tenant_read: str = Field(
        "250MB",
        description="limit of reads from a tenant's root disk in bytes a second, as Incus's limits.read "
        "takes it; empty: none",
    )


class CapacitySettings(BaseModel):
    """How much this host takes, in all and for one tenant."""

    max_tenants: int = Field(1000, gt=0, description="maximum number of tenants that deployments create")
    overcommit: float = Field(
        8.0,
        ge=0,
        description="maximum of the memory limits of all awake tenants, in multiples of this host's "
        "memory; 0: none",
    )
    memory_reserve: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of this host's memory that must be available for another tenant to start",
    )
    pool_reserve: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the storage pool that must stay free for a snapshot, clone or new tenant to "
        "be made",
    )
    max_snapshots: int = Field(20, gt=0, description="maximum number of snapshots of one tenant")
    snapshot_bytes: int = Field(
        0, ge=0, description="maximum size of one tenant's snapshots in bytes; 0: the size of its disk"
    )
    max_deployments: int = Field(
        4, gt=0, description="maximum number of deployments that run at once; more wait"
    )
    upload_copies_bytes: int = Field(
        8192 * MiB, ge=0, description="maximum size of all golden copies of uploads in the pool in bytes"
    )
    upload_max: int = Field(4096 * MiB, gt=0, description="maximum size of a file uploaded by PUT in bytes")
    max_transfers: int = Field(
        32, gt=0, description="maximum number of concurrent uploads and downloads of one tenant"
    )
    max_connections: int = Field(
        2000, gt=0, description="maximum number of websockets and event streams that have shown a token"
    )
    max_tenant_connections: int = Field(
        256,
        gt=0,
        description="maximum number of websockets and event streams of one tenant",
    )
    bytes_in_flight: int = Field(
        512 * MiB, gt=0, description="maximum size of all requests and answers in flight in bytes"
    )
    tenant_bytes: int = Field(
        128 * MiB,
        gt=0,
        description="maximum size of one tenant's requests and answers in flight in bytes",
    )
    max_execs: int = Field(128, gt=0, description="maximum number of running commands of one tenant")
    exec_bytes: int = Field(
        512 * MiB, gt=0, description="maximum size of the output and input of all commands in memory in bytes"
    )
    exec_tenant_bytes: int = Field(
        128 * MiB,
        gt=0,
        description="maximum size of one tenant's commands' output and input in memory in bytes; "
        "beyond it each stream keeps 64 KiB",
    )
    exec_stdin_spools: int = Field(
        1024 * MiB,
        ge=0,
        description="bytes of input kept on disk for all commands, a quarter of it for one tenant",
    )
    warm_shells: int = Field(64, ge=0, description="maximum number of warm shells of all tenants; 0: none")
    max_workers: int = Field(256, gt=0, description="maximum number of file workers")
    worker_memory: int = Field(
        512 * MiB, gt=0, description="memory limit of a file worker in bytes, including page cache"
    )
    incus_timeout: float = Field(
        30.0, gt=0, description="seconds that an Incus request may take, unless it waits for an operation"
    )
    lifecycle_timeout: float = Field(
        60.0, gt=0, description="seconds that a tenant's start, stop or removal may take"
    )
    stop_grace: float = Field(
        15.0,
        gt=0,
        description="seconds that a tenant has to shut down before it is stopped by force; its site has 10",
    )
    reconcile_interval: float = Field(30.0, gt=0, description="seconds between two checks of all instances")
    shutdown_timeout: float = Field(
        20.0, gt=0, description="seconds from SIGTERM until the gateway ends at the latest"
    )
    upgrade_patience: float = Field(
        300.0,
        ge=0,
        description="seconds that an upgrade waits for running deployments before it stops with nothing "
        "changed",
    )


class CommandsSettings(BaseModel):
    """How long commands run."""

    bash_timeout: float = Field(
        120.0,
        gt=0,
        description="seconds after which a Bash call that names no timeout goes to the background",
    )
    bash_timeout_max: float = Field(600.0, gt=0, description="maximum timeout of a Bash call in seconds")
    bash_background_timeout: float = Field(
        1800.0, gt=0, description="seconds after which a background command without a timeout is ended"
    )
    bash_background_timeout_max: float = Field(
        7200.0, gt=0, description="maximum timeout of a background command in seconds"
    )
    exec_left: Literal["keep", "kill"] = Field(
        "keep", description="what happens to processes that a command leaves behind when it ends"
    )
    exec_linger: float = Field(
        60.0,
        ge=-1,
        description="seconds that a command keeps running after its last reader left; -1: forever",
    )
    watch_ignore: Names = Field(
        (".git", "node_modules", ".gateway"),
        description="names that a watch ignores unless it gives its own list, comma-separated",
    )
    exec_tail: int = Field(
        1 * MiB, gt=0, description="bytes kept of each output stream while nobody is attached"
    )
    exec_unacked: int = Field(
        8 * MiB,
        gt=0,
        description="bytes of each output stream kept for a reader that acknowledges, until it does",
    )
    exec_keep_exits: int = Field(
        1000, ge=0, description="maximum number of ended commands kept for one tenant"
    )
    exec_keep_count: int = Field(
        64,
        ge=0,
        description="maximum number of ended commands whose output is kept too, for one tenant",
    )
    exec_keep_bytes: int = Field(
        128 * MiB,
        ge=0,
        description="maximum size of the kept output of ended commands of all tenants in bytes",
    )
    exec_start_timeout: float = Field(20.0, gt=0, description="seconds within which a command must start")
    cancel_grace: float = Field(
        2.0, ge=0, description="seconds between TERM and KILL when a command is cancelled"
    )
    cancel_timeout: float = Field(
        15.0, gt=0, description="seconds after which a cancel answers even if processes survived"
    )
    list_max: int = Field(10_000, gt=0, description="maximum number of entries in one files/list")
    transfer_stall: float = Field(
        60.0, gt=0, description="seconds without progress after which an upload or download is ended"
    )
    watch_folders: int = Field(
        8192, gt=0, description="maximum number of folders that the watches of one tenant cover"
    )
    watch_changes: int = Field(
        1000, gt=0, description="maximum number of changed paths in one message; more are an overflow"
    )
    tool_timeout: float = Field(10.0, gt=0, description="seconds that a file tool call may take")
    write_max: int = Field(
        8 * MiB, gt=0, description="maximum size of a file that Write and Edit accept in bytes"
    )
    worker_idle: float = Field(300.0, gt=0, description="seconds after which an idle file worker ends")
    bash_printed_max: int = Field(
        1024 * MiB, gt=0, description="bytes that a command may print before it is ended"
    )
    bash_output_max: int = Field(
        8 * MiB,
        gt=0,
        description="maximum size of a command's output file in bytes; GATEWAY_WRITE_MAX applies too",
    )
    max_shells: int = Field(
        16, gt=0, description="maximum number of running background commands of one tool session"
    )
    shells_kept: int = Field(
        32, gt=0, description="number of background commands, running or ended, that one tool session keeps"
    )


class RetentionSettings(BaseModel):
    """How long people's work and its records are kept."""

    events_kept: int = Field(10_000, gt=0, description="number of events kept for replay")
    events_age: float = Field(604_800.0, gt=0, description="seconds that events are kept for replay")
    events_bytes: int = Field(
        64 * MiB, gt=0, description="maximum size of the events kept for replay in bytes"
    )
    audit_kept: int = Field(
        100_000, gt=0, description="number of audit entries that are kept, and as many of operators"
    )
    deployments_kept: int = Field(1000, gt=0, description="number of ended deployments that are kept")
    rollbacks_kept: int = Field(
        10,
        ge=0,
        description="number of former sites that each tenant keeps on its disk to roll back to; 0: none",
    )
    idempotency_age: float = Field(
        86_400.0,
        gt=0,
        description="seconds that records of calls and commands are kept",
    )
    history: bool = Field(
        True, description="whether git in the tenant records what each tool session changes"
    )
    turns_kept: int = Field(1000, gt=0, description="maximum number of turns in the history of a tenant")
    history_bytes: int = Field(
        256 * MiB,
        gt=0,
        description="size in bytes of a tenant's history beyond which its oldest half is removed",
    )
    bash_outputs_age: float = Field(
        604_800.0, gt=0, description="seconds after which an output file is removed"
    )
    bash_outputs_max: int = Field(
        128 * MiB,
        gt=0,
        description="maximum size of all output files of a workspace in bytes; the oldest are removed",
    )
    exec_keep: float = Field(600.0, ge=0, description="seconds that the result of an ended command is kept")


GROUPS: Final[tuple[type[BaseModel], ...]] = (
    AddressSettings,
    SecuritySettings,
    ClusterSettings,
    SitesSettings,
    SizesSettings,
    CapacitySettings,
    CommandsSettings,
    RetentionSettings,
)
"""All settings, grouped as an operator thinks."""


# the fields of the last base come first: so they have the order of `GROUPS`
class Settings(
    RetentionSettings,
    CommandsSettings,
    CapacitySettings,
    SizesSettings,
    SitesSettings,
    ClusterSettings,
    SecuritySettings,
    AddressSettings,
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
