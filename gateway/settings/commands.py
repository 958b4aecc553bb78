"""Limits of commands, their output and input, and the shells that wait for them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from gateway.settings.units import MiB


class CommandSettings(BaseModel):
    max_execs: int = Field(128, gt=0, description="maximum number of running commands of one tenant")
    exec_tail: int = Field(
        1 * MiB, gt=0, description="bytes kept of each output stream while nobody is attached"
    )
    exec_unacked: int = Field(
        8 * MiB,
        gt=0,
        description="bytes of each output stream kept for a reader that acknowledges, until it does",
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
    warm_shells: int = Field(64, ge=0, description="maximum number of warm shells of all tenants; 0: none")
    cancel_grace: float = Field(
        2.0, ge=0, description="seconds between TERM and KILL when a command is cancelled"
    )
    cancel_timeout: float = Field(
        15.0, gt=0, description="seconds after which a cancel answers even if processes survived"
    )
