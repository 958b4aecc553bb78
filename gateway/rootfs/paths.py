"""Names and paths as text: resolve a client's path, display a tenant's names."""

from __future__ import annotations

import os
import re

from gateway.errors import InvalidParams, OutsideWorkspace

NAME_MAX = 255  # bytes of one name, limits.h
PATH_MAX = 4000  # bytes of one path; the kernel's limit is 4096 with the final NUL
HOME = ".gateway"  # the gateway's own folder at the top of a workspace
TEMPORARY = ".gateway-"  # prefix of our temporary files
_UNFINISHED = re.compile(rf"{re.escape(TEMPORARY)}[0-9a-f]{{1,8}}-([0-9a-f]{{12}}|[0-9a-f]{{16}})")


def show(name: str) -> str:
    """Return a tenant's name as printable text: control characters and invalid UTF-8 are escaped."""
    if name.isprintable():  # surrogates and controls are not
        return name
    out = []
    for char in name:
        if char.isprintable():
            out.append(char)
        elif 0xDC80 <= ord(char) <= 0xDCFF:
            out.append(f"\\x{ord(char) - 0xDC00:02x}")
        else:
            out.append(char.encode("unicode_escape").decode("ascii"))
    return "".join(out)


def unfinished(name: str) -> bool:
    """Return whether a name is one of our temporary files; others with the prefix are the tenant's own."""
    return name.startswith(TEMPORARY) and _UNFINISHED.fullmatch(name) is not None


def locate(path: str, cwd: str, workspace: str) -> str:
    """Return `path` relative to `workspace`, judging by its text only.

    `path` is absolute inside the tenant, or relative to `cwd`, which is absolute. `..` is resolved textually,
    as editors do, so the kernel never sees one. Raises `OutsideWorkspace` and `InvalidParams`.
    """
    if not path or "\0" in path:
        raise InvalidParams("the path is empty or has a NUL", reason="invalid")
    full = path if path.startswith("/") else f"{cwd}/{path}"
    if "//" in full or "/." in full or full.endswith("/"):
        full = "/" + os.path.normpath(full).lstrip("/")
    prefix = workspace.rstrip("/") + "/"
    if full == workspace:
        return ""
    if not full.startswith(prefix):
        raise OutsideWorkspace("the path leads out of the workspace", reason="outside")
    found = full[len(prefix) :]
    if len(found) > NAME_MAX // 4:  # a character takes at most four bytes
        try:
            encoded = os.fsencode(found)
        except UnicodeEncodeError:
            raise InvalidParams("the path is not valid text", reason="invalid") from None
        if len(encoded) > PATH_MAX or any(len(part) > NAME_MAX for part in encoded.split(b"/")):
            raise InvalidParams("file name too long", reason="too_long")
    return found
