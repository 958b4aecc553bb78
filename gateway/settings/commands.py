"""Limits of commands, their output and input, and the shells that wait for them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from gateway.settings.units import KiB, MiB


class CommandSettings(BaseModel):
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
