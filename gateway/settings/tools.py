"""Limits of the file tools, their workers and sessions, and of Bash."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field

from gateway.settings.units import MiB


class ToolSettings(BaseModel):
    tool_timeout: float = Field(10.0, gt=0, description="seconds that a file tool call may take")
    write_max: int = Field(
        8 * MiB, gt=0, description="maximum size of a file that Write and Edit accept in bytes"
    )
    broker_socket: Path | None = Field(
        None,
        description="unix socket of `incus-gateway broker`; unset: the gateway starts its own broker",
    )
    broker_user: str = Field("incus-gateway", description="user that this broker serves besides root")
    worker_idle: float = Field(300.0, gt=0, description="seconds after which an idle file worker ends")
    worker_memory: int = Field(
        512 * MiB, gt=0, description="memory limit of a file worker in bytes, including page cache"
    )
    max_workers: int = Field(256, gt=0, description="maximum number of file workers")
    # history
    history: bool = Field(
        True, description="whether git in the tenant records what each tool session changes"
    )
    turns_kept: int = Field(1000, gt=0, description="maximum number of turns in the history of a tenant")
    history_bytes: int = Field(
        256 * MiB,
        gt=0,
        description="size in bytes of a tenant's history beyond which its oldest half is removed",
    )
    # Bash
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
    bash_printed_max: int = Field(
        1024 * MiB, gt=0, description="bytes that a command may print before it is ended"
    )
    bash_output_max: int = Field(
        8 * MiB,
        gt=0,
        description="maximum size of a command's output file in bytes; GATEWAY_WRITE_MAX applies too",
    )
    bash_outputs_max: int = Field(
        128 * MiB,
        gt=0,
        description="maximum size of all output files of a workspace in bytes; the oldest are removed",
    )
    bash_outputs_age: float = Field(
        604_800.0, gt=0, description="seconds after which an output file is removed"
    )
    max_shells: int = Field(
        16, gt=0, description="maximum number of running background commands of one tool session"
    )
    shells_kept: int = Field(
        32, gt=0, description="number of background commands, running or ended, that one tool session keeps"
    )
