"""Deployments: templates, the queue, installs, and the copies that make them quick."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gateway.settings.units import MiB


class DeploymentSettings(BaseModel):
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
