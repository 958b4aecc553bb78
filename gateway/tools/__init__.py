"""Claude Code's file tools, Read, Write, Edit, Glob and Grep: their semantics and their texts.

From outside: `FileTools`, `ToolSession`, `ToolResult`, `FILE_TOOLS`, `descriptions`. The other modules run
inside workers (see `gateway.rootfs`), which import no more than they need; so these names are loaded when
they are first asked for.
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
