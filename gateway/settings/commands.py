"""Limits of commands, their output and input, and the shells that wait for them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from gateway.settings.units import KiB, MiB


class CommandSettings(BaseModel):
    max_execs: int = Field(128, gt=0, description="maximum number of running commands of one tenant")
    max_argument: int = Field(
        128 * KiB - 1,
        gt=0,
        description="maximum size of one argument or environment string in bytes (the kernel's limit)",
    )
    max_arguments: int = Field(
        1 * MiB,
        gt=0,
        description="maximum size of all arguments and environment strings of one command in bytes",
    )
    exec_tail: int = Field(
        1 * MiB, gt=0, description="bytes kept of each output stream while nobody is attached"
    )
    exec_window: int = Field(
        256 * KiB, gt=0, description="bytes that a reader may lag behind before its command is slowed down"
    )
    exec_patience: float = Field(
        1.0,
        ge=0,
        description="seconds that a viewer which does not read holds up a command that others read",
    )
    exec_lag: int = Field(
        8 * MiB, ge=0, description="bytes of each output stream kept for a reader that has stalled"
    )
    exec_unacked: int = Field(
        8 * MiB,
        gt=0,
        description="bytes of each output stream kept for a reader that acknowledges, until it does",
    )
    exec_hold: float = Field(
        10.0,
        ge=0,
        description="seconds that a command waits for an acknowledging reader whose connection broke",
    )
    exec_stdin_buffer: int = Field(
        4 * MiB,
        gt=0,
        description="bytes of input kept in memory for a command that does not read; the clients' window",
    )
    exec_stdin_spool: int = Field(
        64 * MiB, ge=0, description="bytes of further input kept on disk for one command; 0: none"
    )
    exec_stdin_spools: int = Field(
        1024 * MiB,
        ge=0,
        description="bytes of input kept on disk for all commands, a quarter of it for one tenant",
    )
    exec_linger: float = Field(
        60.0,
        ge=-1,
        description="seconds that a command keeps running after its last reader left; -1: forever",
    )
    exec_keep: float = Field(600.0, ge=0, description="seconds that the result of an ended command is kept")
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
    exec_bytes: int = Field(
        512 * MiB, gt=0, description="maximum size of the output and input of all commands in memory in bytes"
    )
    exec_tenant_bytes: int = Field(
        128 * MiB,
        gt=0,
        description="maximum size of one tenant's commands' output and input in memory in bytes; "
        "beyond it each stream keeps 64 KiB",
    )
    exec_left: Literal["keep", "kill"] = Field(
        "keep", description="what happens to processes that a command leaves behind when it ends"
    )
    exec_start_timeout: float = Field(20.0, gt=0, description="seconds within which a command must start")
    standby_pipes: int = Field(
        2,
        ge=0,
        description="number of warm shells for commands without a terminal, in a tenant with a connected "
        "client",
    )
    standby_terminals: int = Field(
        1, ge=0, description="number of warm shells for terminals, in a tenant with a connected client"
    )
    standby_delay: float = Field(
        0.1, ge=0, description="seconds after a command's start until the shell that it took is replaced"
    )
    standby_starts: int = Field(
        2, gt=0, description="maximum number of warm shells that are being started at once"
    )
    standby_max: int = Field(64, ge=0, description="maximum number of warm shells of all tenants; 0: none")
    standby_age: float = Field(900.0, gt=0, description="maximum age of a warm shell in seconds")
    standby_idle: float = Field(
        120.0, ge=0, description="seconds that warm shells are kept after a tenant's last client left"
    )
    cancel_grace: float = Field(
        2.0, ge=0, description="seconds between TERM and KILL when a command is cancelled"
    )
    cancel_timeout: float = Field(
        15.0, gt=0, description="seconds after which a cancel answers even if processes survived"
    )
