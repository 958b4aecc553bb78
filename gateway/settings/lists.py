"""Settings that are lists: comma-separated in the environment, arrays in the TOML file."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator
from pydantic_settings import NoDecode


def _names(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _origins(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip().rstrip("/") for part in value.split(",") if part.strip())
    return value


def _suffixes(value: object) -> object:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    entries = (str(part).strip().lower().removeprefix("*.").strip(".") for part in parts)
    return tuple(entry for entry in entries if entry)


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_origins)]
Suffixes = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_suffixes)]
