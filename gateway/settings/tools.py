"""Limits of the file tools, their workers and sessions, and of Bash."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field

from gateway.settings.units import KiB, MiB


class ToolSettings(BaseModel):
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
