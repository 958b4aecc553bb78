"""Deployments: templates, the queue, installs, and the copies that make them quick."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gateway.settings.units import MiB


class DeploymentSettings(BaseModel):
    max_deployments: int = Field(
        4, gt=0, description="maximum number of deployments that run at once; more wait"
    )
    deployments_kept: int = Field(1000, gt=0, description="number of ended deployments that are kept")
    rollbacks_kept: int = Field(
        10,
        ge=0,
        description="number of former sites that each tenant keeps on its disk to roll back to; 0: none",
    )
    install_timeout: float = Field(
        300.0, gt=0, description="seconds that a template's install command may take"
    )
    install_output: int = Field(
        64 * MiB, gt=0, description="bytes that a template's install command may print before it is ended"
    )
    install_log: int = Field(
        2000, gt=0, description="maximum number of an install command's lines that are published"
    )
    verify_timeout: float = Field(60.0, gt=0, description="seconds within which a started site must answer")
    settle_time: float = Field(
        3.0,
        ge=0,
        description="seconds that a site must stay up after its first answer for its deployment to "
        "succeed; a site that is made as a copy of one that did is watched for as long after its deployment",
    )
    warm_pool: int = Field(
        2, ge=0, description="number of instances kept ready for each template that was deployed; 0: none"
    )
    golden: bool = Field(
        True, description="whether each template is kept installed once, to copy the next tenant from"
    )
    upload_copies: int = Field(
        16, ge=0, description="maximum number of golden copies of uploaded folders; 0: none"
    )
    owner_upload_copies: int = Field(
        4, ge=0, description="maximum number of golden copies of one owner's uploads"
    )
    upload_copies_bytes: int = Field(
        8192 * MiB, ge=0, description="maximum size of all golden copies of uploads in the pool in bytes"
    )
    owner_upload_copies_bytes: int = Field(
        2048 * MiB,
        ge=0,
        description="maximum size of the golden copies of one owner's uploads in the pool in bytes",
    )
    upload_copies_unused: float = Field(
        7 * 86400.0, gt=0, description="seconds after which an unused golden copy of an upload is removed"
    )
