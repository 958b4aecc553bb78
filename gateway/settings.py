"""Knows every setting: its name, type, default, unit and where it is read from.

Environment variables `GATEWAY_…` win over the TOML file named by `GATEWAY_CONFIG`. This is the only
module that reads either. Every limit has a finite default.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

DEFAULT_CONFIG = "/etc/incus-gateway/gateway.toml"

KiB, MiB = 1 << 10, 1 << 20


class Settings(BaseSettings):
    """All settings of one gateway process, immutable once read."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", extra="ignore", frozen=True)

    # where and what
    listen: str = Field("127.0.0.1:8080", description="HOST:PORT, or the path of a unix socket")
    runtime: Literal["incus", "local"] = Field(
        "incus", description="where tenants live; `local` does not isolate"
    )
    incus_socket: Path = Field(Path("/var/lib/incus/unix.socket"), description="unix socket of incusd")
    incus_project: str = Field("default", description="Incus project of the tenants")
    state_dir: Path = Field(Path("/var/lib/incus-gateway"), description="secret, records and local tenants")
    secret: SecretStr | None = Field(None, description="signs tokens; made in the state dir where unset")
    origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="allowed browser origins beside same-origin, comma-separated"
    )
    hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="names by which the gateway may be asked, beside addresses, `localhost`, GATEWAY_DOMAIN "
        "and the hosts of GATEWAY_LISTEN and GATEWAY_ORIGINS; `*` for any",
    )
    caddy_dir: Path | None = Field(
        None,
        description="Caddy's configuration and routes; unset: `caddy` in the state dir",
    )
    caddy_admin: str = Field("http://127.0.0.1:2019", description="URL or unix socket of Caddy's admin API")
    caddy_http: int = Field(80, gt=0, lt=65536, description="port of Caddy for HTTP")
    caddy_https: int = Field(443, gt=0, lt=65536, description="port of Caddy for HTTPS")
    caddy_ask: int = Field(
        2020,
        gt=0,
        lt=65536,
        description="port of Caddy on loopback, by which it and the gateway look sites up",
    )
    caddy_issuer: Literal["acme", "internal"] = Field(
        "acme", description="who signs sites' certificates: a public authority, or Caddy itself"
    )
    caddy_email: str = Field("", description="address that a public authority writes to")
    caddy_keepalive: float = Field(
        4.0,
        gt=0,
        description="seconds that Caddy keeps an unused connection to a site; fewer than the site does",
    )
    domain: str | None = Field(
        None, description="the gateway's own domain behind Caddy; not with a unix socket to listen on"
    )
    domain_suffixes: Annotated[tuple[str, ...], NoDecode] = Field(
        ("localhost",),
        description="suffixes under which every token may give its tenants `NAME.SUFFIX`, comma-separated",
    )
    expose: Literal["address", "port", "socket"] = Field(
        "address",
        description="how Caddy reaches a site: at its address, by a proxy device's port or by its socket",
    )
    expose_ports: str = Field("20000-29999", description="ports of this host for proxy devices")
    templates_dir: Path | None = Field(None, description="folder of site templates beside the built-in ones")

    # tenants
    workspace: str = Field("/srv/site", description="the tenant's project folder inside the container")
    workspace_user: str = Field("site", description="the user that owns the workspace and runs commands")
    workspace_uid: int = Field(
        1000, ge=0, description="that user's uid inside the container; its gid is the same"
    )
    profile: str = Field("gateway-tenant", description="Incus profile of every tenant")
    image: str = Field("gateway-base", description="alias of the base image")
    network: str = Field("gatewaybr0", description="bridge of the tenants")
    network_ipv4: str = Field("10.82.0.1/20", description="the bridge's own address and network")
    pool: str = Field("gateway", description="storage pool of the tenants")
    pool_source: str = Field(
        "", description="block device for a new pool; empty: a sparse file sized to the free disk"
    )
    tenant_cpu: str = Field("1", description="limits.cpu of a tenant")
    tenant_memory: str = Field("1GiB", description="limits.memory of a tenant, hard")
    tenant_processes: int = Field(400, gt=0, description="limits.processes of a tenant")
    tenant_disk: str = Field("4GiB", description="root disk quota of a tenant where the pool can")
    tenant_read: str = Field(
        "250MB", description="limits.read of a tenant's root disk, bytes a second; empty for none"
    )

    overcommit: float = Field(
        8.0,
        ge=0,
        description="times this host's memory that the limits of all tenants awake may come to; 0: any",
    )
    memory_reserve: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of this host's memory below which, available, no further tenant is started",
    )
    max_tenants: int = Field(1000, gt=0, description="tenants that deployments may make in all")

    # deployments
    template_files: int = Field(10_000, gt=0, description="files of one template")
    template_bytes: int = Field(64 * MiB, gt=0, description="bytes of one template's files")
    max_deployments: int = Field(4, gt=0, description="deployments that run at once; more wait")
    waiting_deployments: int = Field(
        256, gt=0, description="deployments that may run or wait, half of them of one owner; more are refused"
    )
    waiting_bytes: int = Field(
        256 * MiB, gt=0, description="bytes of their uploaded templates in memory, half of them of one owner"
    )
    deployments_kept: int = Field(1000, gt=0, description="ended deployments kept on record")
    install_timeout: float = Field(300.0, gt=0, description="seconds of a template's install command")
    install_output: int = Field(
        64 * MiB, gt=0, description="bytes that a template's install command may print before it is ended"
    )
    install_log: int = Field(2000, gt=0, description="lines of an install command that are published")
    verify_timeout: float = Field(60.0, gt=0, description="seconds until a started site must answer")
    settle_time: float = Field(
        3.0,
        ge=0,
        description="seconds that a site must stay up after its first answer until its deployment succeeds; "
        "a copy of one that did is watched for as long afterwards",
    )
    warm_pool: int = Field(
        2, ge=0, description="instances kept ready for each template that was deployed; 0 for none"
    )
    golden: bool = Field(True, description="keep each template installed once, to copy the next tenant from")
    upload_copies: int = Field(
        16, ge=0, description="golden copies of uploaded folders in all; 0: none is made of an upload"
    )
    owner_upload_copies: int = Field(4, ge=0, description="golden copies of one owner's uploads")
    upload_copies_bytes: int = Field(
        8192 * MiB, ge=0, description="bytes of the pool that golden copies of uploads may hold in all"
    )
    owner_upload_copies_bytes: int = Field(
        2048 * MiB, ge=0, description="bytes of the pool that golden copies of one owner's uploads may hold"
    )
    upload_copies_unused: float = Field(
        7 * 86400.0, gt=0, description="seconds after which an unused golden copy of an upload is removed"
    )
    upload_copies_waiting: int = Field(
        64 * MiB, ge=0, description="bytes of memory of uploads that wait for their golden copy to be made"
    )
    health_interval: float = Field(5.0, gt=0, description="seconds between two looks at a site's port")
    health_timeout: float = Field(
        5.0, gt=0, description="seconds without an answer after which a site is unhealthy at once"
    )
    health_failures: int = Field(3, gt=0, description="failed looks after which a site is unhealthy")
    hang_timeout: float = Field(
        4.0,
        ge=0,
        description="seconds after which who visits a site that reads no request is shown a page; 0: never",
    )

    pressure_interval: float = Field(
        2.0, gt=0, description="seconds between two looks at how short of memory the tenants are"
    )
    pressure_patience: float = Field(
        60.0,
        ge=0,
        description="seconds that a site may read its own pages back from the disk for want of memory until "
        "its biggest process is ended; 0: for ever",
    )

    # idle tenants
    idle_stop: float = Field(
        0.0,
        ge=0,
        description="seconds without use after which a tenant sleeps until it is asked for; 0: none",
    )
    idle_look: float = Field(
        15.0, gt=0, le=50, description="seconds between two looks at who uses which tenant"
    )
    wake_timeout: float = Field(
        30.0, gt=0, description="seconds that a request to a sleeping tenant waits for it at most"
    )
    wakes_at_once: int = Field(8, gt=0, description="tenants that are woken or put to sleep at once")
    wakes_waiting: int = Field(
        1000, gt=0, description="visitors that wait for sleeping sites, a quarter for one; more are refused"
    )

    # limits of one connection and one request
    initialize_timeout: float = Field(
        10.0, gt=0, description="seconds until a websocket must have said initialize"
    )
    max_frame: int = Field(16 * MiB, gt=0, description="bytes of one websocket frame")
    max_body: int = Field(16 * MiB, gt=0, description="bytes of one JSON request body")
    max_requests: int = Field(256, gt=0, description="requests in flight on one websocket")
    max_connections: int = Field(
        2000, gt=0, description="websockets and event streams of this gateway, all with a token"
    )
    max_tenant_connections: int = Field(256, gt=0, description="those of one tenant")
    max_anonymous: int = Field(64, gt=0, description="websockets that have shown no token yet, beside those")
    max_anonymous_per_address: int = Field(16, gt=0, description="those of one address")
    max_silent: int = Field(
        1024,
        gt=0,
        description="HTTP connections that wait for a request's head; beyond them the longest silent is cut",
    )
    head_timeout: float = Field(10.0, gt=0, description="seconds in which a request's head must have come")
    body_timeout: float = Field(
        30.0, gt=0, description="seconds without progress after which a request's body is given up"
    )
    bytes_in_flight: int = Field(
        512 * MiB, gt=0, description="bytes of requests and answers in flight, all tenants"
    )
    tenant_bytes: int = Field(128 * MiB, gt=0, description="those of one tenant")
    socket_bytes: int = Field(
        32 * MiB, gt=0, description="those of one websocket; beyond them it is read no further"
    )
    max_subscriptions: int = Field(16, gt=0, description="event subscriptions of one websocket")
    max_tenant_subscriptions: int = Field(
        256, gt=0, description="event subscriptions of all websockets of one tenant"
    )

    # commands
    max_execs: int = Field(128, gt=0, description="running commands of one tenant")
    max_argument: int = Field(
        128 * KiB - 1, gt=0, description="bytes of one argument or environment string (a kernel limit)"
    )
    max_arguments: int = Field(
        1 * MiB, gt=0, description="bytes of all arguments and environment strings of one command"
    )
    exec_tail: int = Field(1 * MiB, gt=0, description="bytes kept of each output stream with nobody attached")
    exec_window: int = Field(
        256 * KiB, gt=0, description="bytes that a reader may lag before its command is slowed down"
    )
    exec_patience: float = Field(
        1.0,
        ge=0,
        description="seconds that a viewer who reads nothing holds up a command which others read",
    )
    exec_lag: int = Field(
        8 * MiB, ge=0, description="bytes of each output stream kept for a viewer that was left behind so"
    )
    exec_unacked: int = Field(
        8 * MiB, gt=0, description="bytes of each output stream kept until a reader that does so acknowledges"
    )
    exec_hold: float = Field(
        10.0, ge=0, description="seconds that a command waits for such a reader whose connection broke"
    )
    exec_stdin_buffer: int = Field(
        4 * MiB,
        gt=0,
        description="bytes of input kept in memory for a command that does not read; the window",
    )
    exec_stdin_spool: int = Field(
        64 * MiB, ge=0, description="bytes of further input kept on disk for one command; 0 for none"
    )
    exec_stdin_spools: int = Field(
        1024 * MiB, ge=0, description="bytes of input kept on disk for all commands; a quarter for a tenant's"
    )
    exec_stall: float = Field(
        600.0, gt=0, description="seconds without progress after which a reader is detached"
    )
    exec_linger: float = Field(
        60.0, ge=-1, description="seconds a command outlives its last reader; -1 for ever"
    )
    exec_keep: float = Field(600.0, ge=0, description="seconds that an ended command can still be asked for")
    exec_keep_exits: int = Field(1000, ge=0, description="ended commands kept of one tenant")
    exec_keep_count: int = Field(64, ge=0, description="those of them whose output is kept too")
    exec_keep_bytes: int = Field(
        128 * MiB, ge=0, description="bytes of output kept of ended commands, all tenants"
    )
    exec_bytes: int = Field(
        512 * MiB, gt=0, description="bytes of output and input of commands kept in memory, all tenants"
    )
    exec_tenant_bytes: int = Field(
        128 * MiB, gt=0, description="those of one tenant; beyond them each stream keeps 64 KiB"
    )
    exec_left: Literal["keep", "kill"] = Field(
        "keep", description="what becomes of processes that a command leaves behind when it ends"
    )
    exec_start_timeout: float = Field(20.0, gt=0, description="seconds until a command must have started")
    exec_timeout: float = Field(
        600.0, gt=0, description="seconds of a waiting HTTP exec that names no timeout"
    )
    exec_output: int = Field(
        8 * MiB, gt=0, description="bytes of each output stream that a waiting HTTP exec returns"
    )
    standby_pipes: int = Field(
        2, ge=0, description="shells kept waiting for commands without a terminal in a tenant with a client"
    )
    standby_terminals: int = Field(1, ge=0, description="shells kept waiting there for terminals")
    standby_delay: float = Field(
        0.1, ge=0, description="seconds after a command's start until the shell that it took is replaced"
    )
    standby_starts: int = Field(2, gt=0, description="such shells being started at a time, all tenants")
    standby_max: int = Field(
        64, ge=0, description="shells kept waiting for commands, all tenants; 0 for none"
    )
    standby_age: float = Field(900.0, gt=0, description="seconds that a shell waits for a command at most")
    standby_idle: float = Field(
        120.0, ge=0, description="seconds that shells are kept after a tenant's last client"
    )
    cancel_grace: float = Field(2.0, ge=0, description="seconds between TERM and KILL")
    cancel_timeout: float = Field(15.0, gt=0, description="seconds until a cancel answers with what survived")

    # file tools
    tool_timeout: float = Field(10.0, gt=0, description="seconds of one file tool call")
    read_max: int = Field(256 * KiB, gt=0, description="bytes of a file that Read returns whole")
    write_max: int = Field(8 * MiB, gt=0, description="bytes that Write and Edit accept")
    result_max: int = Field(1 * MiB, gt=0, description="bytes of one tool result")
    visit_max: int = Field(300_000, gt=0, description="files that one Glob or Grep visits")
    matches_max: int = Field(10_000, gt=0, description="lines or files that one Grep returns")
    depth_max: int = Field(256, gt=0, description="folders that a path or a search goes down")
    pattern_max: int = Field(4000, gt=0, le=4000, description="characters of a pattern or glob")
    pdf_max: int = Field(32 * MiB, gt=0, description="bytes of a PDF that Read shows")
    pdf_pages: int = Field(20, gt=0, description="pages of a PDF that one Read shows")
    broker_socket: Path | None = Field(
        None,
        description="unix socket of `incus-gateway broker`; unset: the gateway starts a broker of its own",
    )
    broker_user: str = Field("incus-gateway", description="the user, beside root, whom that broker serves")
    ripgrep: Path = Field(
        Path("/usr/local/lib/incus-gateway/rg"),
        description="static ripgrep for large searches of what has no literal; `setup` puts it there",
    )
    worker_idle: float = Field(300.0, gt=0, description="seconds after which an idle file worker ends")
    worker_memory: int = Field(512 * MiB, gt=0, description="bytes of a file worker, the page cache included")
    max_workers: int = Field(256, gt=0, description="file workers of this gateway")
    session_idle: float = Field(3600.0, gt=0, description="seconds after which an unused tool session ends")
    max_sessions: int = Field(4096, gt=0, description="named tool sessions of this gateway")
    max_tenant_sessions: int = Field(256, gt=0, description="named tool sessions of one tenant")
    session_bytes: int = Field(
        256 * KiB, gt=0, description="bytes of what one tool session remembers of the files that it read"
    )

    # Bash
    bash_timeout: float = Field(
        120.0, gt=0, description="seconds of a Bash call that names none; then it goes to the background"
    )
    bash_timeout_max: float = Field(600.0, gt=0, description="seconds that a Bash call may ask for")
    bash_background_timeout: float = Field(
        1800.0, gt=0, description="seconds after which a background command without a timeout is ended"
    )
    bash_background_timeout_max: float = Field(
        7200.0, gt=0, description="seconds that a background command may ask for"
    )
    bash_printed_max: int = Field(
        1024 * MiB, gt=0, description="bytes that a command may print before it is ended"
    )
    bash_output_max: int = Field(
        8 * MiB, gt=0, description="bytes of one command's output file; write_max holds too"
    )
    bash_outputs_max: int = Field(
        128 * MiB, gt=0, description="bytes of all output files of a workspace; the oldest are removed"
    )
    bash_outputs_age: float = Field(
        604_800.0, gt=0, description="seconds after which an output file is removed"
    )
    max_shells: int = Field(16, gt=0, description="background commands of one tool session")
    shells_kept: int = Field(32, gt=0, description="background commands kept of one session, ended ones too")

    # the editor's calls
    list_max: int = Field(10_000, gt=0, description="entries of one files/list")
    upload_max: int = Field(4096 * MiB, gt=0, description="bytes of one file that is uploaded by PUT")
    max_transfers: int = Field(32, gt=0, description="uploads and downloads of one tenant at a time")
    transfer_stall: float = Field(
        60.0, gt=0, description="seconds without progress after which an upload or download is ended"
    )

    max_watches: int = Field(16, gt=0, description="file watches of one websocket")
    max_tenant_watches: int = Field(64, gt=0, description="file watches of one tenant")
    watch_folders: int = Field(8192, gt=0, description="folders that the watches of one tenant cover")
    watch_changes: int = Field(1000, gt=0, description="changed paths told at once; more are an overflow")
    watch_ignore: Annotated[tuple[str, ...], NoDecode] = Field(
        (".git", "node_modules", ".gateway"),
        description="names that a watch leaves out unless it says else, comma-separated",
    )

    # clients give up calls of which they hear nothing, some after half a minute
    mcp_progress: float = Field(
        15.0, gt=0, le=20, description="seconds between progress messages of an MCP call"
    )
    # records
    audit_kept: int = Field(
        100_000, gt=0, description="entries kept of who did what, and as many of operators"
    )
    store_waiting: int = Field(10_000, gt=0, description="reads and writes of records that may wait at once")
    call_linger: float = Field(
        30.0,
        ge=0,
        description="seconds that a call with a callId outlives its connection, to be asked again",
    )
    receipts_kept: int = Field(
        1000, gt=0, description="calls and commands kept under the caller's id, of one tenant"
    )
    receipts_bytes: int = Field(16 * MiB, gt=0, description="bytes of those of one tenant, in the store")
    receipts_age: float = Field(86_400.0, gt=0, description="seconds that they are kept")
    receipts_memory: int = Field(
        32 * MiB, gt=0, description="bytes of results kept in memory, of calls that only read, all tenants"
    )

    # events
    events_kept: int = Field(10_000, gt=0, description="events kept for replay")
    events_bytes: int = Field(64 * MiB, gt=0, description="bytes of events kept for replay")
    events_age: float = Field(604_800.0, gt=0, description="seconds that events are kept for replay")
    events_waiting: int = Field(
        50_000, gt=0, description="events that wait in memory while they cannot be written"
    )
    events_keepalive: float = Field(15.0, gt=0, description="seconds between SSE comment lines")

    # Incus
    incus_timeout: float = Field(30.0, gt=0, description="seconds of one Incus request that is not a wait")
    lifecycle_timeout: float = Field(60.0, gt=0, description="seconds of a tenant's start, stop or destroy")
    stop_grace: float = Field(
        5.0,
        gt=0,
        description="seconds in which a tenant may shut down before it is stopped by force",
    )
    max_snapshots: int = Field(20, gt=0, description="snapshots of one tenant")
    snapshot_bytes: int = Field(
        0, ge=0, description="bytes that one tenant's snapshots may hold; 0: as many as its disk"
    )
    pool_reserve: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the storage pool below which no snapshot, clone or new tenant is made",
    )
    logs_max: int = Field(10_000, gt=0, description="lines of a site's log that are asked for at once")
    max_followers: int = Field(8, gt=0, description="readers of one tenant's log at a time")
    reconcile_interval: float = Field(30.0, gt=0, description="seconds between two looks at all instances")
    shutdown_timeout: float = Field(20.0, gt=0, description="seconds from SIGTERM to the end, at most")

    @property
    def caddy_folder(self) -> Path:
        """The folder of Caddy's configuration and routes."""
        return self.caddy_dir or self.state_dir / "caddy"

    @field_validator("domain_suffixes", mode="before")
    @classmethod
    def _split_suffixes(cls, value: object) -> object:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return value
        entries = (str(part).strip().lower().removeprefix("*.").strip(".") for part in parts)
        return tuple(entry for entry in entries if entry)

    @field_validator("watch_ignore", "hosts", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip().rstrip("/") for part in value.split(",") if part.strip())
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        config = Path(os.environ.get("GATEWAY_CONFIG", DEFAULT_CONFIG))
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config)


def load() -> Settings:
    """Read the settings. Raises `pydantic.ValidationError`, which names each wrong one."""
    return Settings()
