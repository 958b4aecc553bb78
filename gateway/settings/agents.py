"""The server of agents that the browser editor offers, and the tokens that it is handed."""

from __future__ import annotations

import re
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

# what may stand in a host by RFC 3986: nothing with a meaning in a Content-Security-Policy
_HOST: Final = re.compile(r"[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\]")


def _url(value: str | None) -> str | None:
    """Check a URL that is named in the editor's policy. Raises `ValueError`."""
    if value is None:
        return None
    parts = urlsplit(value)
    host, _, port = (
        parts.netloc.rpartition(":") if re.search(r":[0-9]+$", parts.netloc) else (parts.netloc, "", "")
    )
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host) or (port and int(port) > 65535):
        raise ValueError("must be http://HOST… or https://HOST…, without a user")
    if parts.fragment or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("must have no fragment, and no characters that a URL must escape")
    return value


def _unset(value: object) -> object:
    return None if value == "" else value


class AgentSettings(BaseModel):
    agent_url: Annotated[str | None, BeforeValidator(_unset), AfterValidator(_url)] = Field(
        None,
        description="URL of a server that runs an agent for the browser editor; unset: no prompt box",
    )
