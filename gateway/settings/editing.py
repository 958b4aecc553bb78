"""Limits of what an editor calls: listings, transfers, watches; and progress by MCP."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gateway.settings.lists import Names
from gateway.settings.units import MiB


class EditorSettings(BaseModel):
    list_max: int = Field(10_000, gt=0, description="maximum number of entries in one files/list")
    upload_max: int = Field(4096 * MiB, gt=0, description="maximum size of a file uploaded by PUT in bytes")
    max_transfers: int = Field(
        32, gt=0, description="maximum number of concurrent uploads and downloads of one tenant"
    )
    transfer_stall: float = Field(
        60.0, gt=0, description="seconds without progress after which an upload or download is ended"
    )
    watch_folders: int = Field(
        8192, gt=0, description="maximum number of folders that the watches of one tenant cover"
    )
    watch_changes: int = Field(
        1000, gt=0, description="maximum number of changed paths in one message; more are an overflow"
    )
    watch_ignore: Names = Field(
        (".git", "node_modules", ".gateway"),
        description="names that a watch ignores unless it gives its own list, comma-separated",
    )
