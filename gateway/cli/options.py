"""The arguments and options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Url = Annotated[
    str | None,
    typer.Option("--url", envvar="GATEWAY_URL", help="The gateway to ask; default: this machine's."),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="GATEWAY_TOKEN", help="A token; default: one made from this machine's secret."
    ),
]
TenantName = Annotated[str, typer.Argument(metavar="TENANT")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class Size(StrEnum):
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


def assignment(entry: str) -> tuple[str, str]:
    """Return the name and value of a `NAME=VALUE`. Raises `typer.BadParameter`."""
    name, equals, value = entry.partition("=")
    if not equals:
        raise typer.BadParameter(f"--env takes NAME=VALUE, not {entry!r}")
    return name, value
