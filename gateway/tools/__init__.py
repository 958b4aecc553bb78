"""Claude Code's file tools, Read, Write, Edit, Glob and Grep: their semantics and their texts.

Other packages use `FileTools`, `ToolSession`, `ToolResult`, `FILE_TOOLS` and `descriptions`. The other
modules run inside workers (see `gateway.rootfs`), which import only what they need, so these names are loaded
on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.tools.file_tools import FileTools, ToolResult
    from gateway.tools.schemas import FILE_TOOLS, descriptions
    from gateway.tools.session import ToolSession

_WHERE = {
    "FILE_TOOLS": "schemas",
    "FileTools": "file_tools",
    "ToolResult": "file_tools",
    "ToolSession": "session",
    "descriptions": "schemas",
}

__all__ = ["FILE_TOOLS", "FileTools", "ToolResult", "ToolSession", "descriptions"]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(name)
    return getattr(import_module(f"gateway.tools.{_WHERE[name]}"), name)
