"""Write the systemd unit of a site (`site.service`) and its environment, as systemd reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from gateway.runtime.sites import ALLOWED, Recipe, Side
from gateway.runtime.sizes import SITE_SHARE
from gateway.settings import Settings

NAMES: Final[Mapping[Side, str]] = {"live": "site.service", "next": "site-next.service"}

_FOLDERS: Final[Mapping[Side, str]] = {"live": "/etc/systemd/system", "next": "/run/systemd/system"}
_ENVIRONMENTS: Final[Mapping[Side, str]] = {"live": "/etc/site.env", "next": "/etc/site-next.env"}
# It starts as soon as /tmp is there, beside the rest of the container's boot and not after it: so a new
# tenant's site answers a good deal earlier.
_UNIT: Final = Path(__file__).with_name("site.service").read_text()


def unit_path(side: Side) -> str:
    """Return where a side's unit lies in the container; the next one is gone after a restart."""
    return f"{_FOLDERS[side]}/{NAMES[side]}"


def environment_path(side: Side) -> str:
    """Return where a side's own environment lies in the container."""
    return _ENVIRONMENTS[side]


def beside(settings: Settings, what: str) -> str:
    """Return a path beside the workspace, in root's folder: the tenant can put no link in its place."""
    folder, _, name = settings.workspace.rpartition("/")
    return f"{folder}/.{name}-{what}"


def unit(settings: Settings, recipe: Recipe, side: Side) -> str:
    """Return the unit of a side."""
    workspace, port = settings.workspace, recipe.listens(side)
    environment, more = _ENVIRONMENTS["live"], ""
    if side == "next":
        environment += f"\nEnvironmentFile=-{_ENVIRONMENTS[side]}"
        # it sees its folder where the live one's is: absolute paths stay true when it becomes that
        more = f"BindPaths={beside(settings, 'next')}:{workspace}\n"
    return _UNIT.format(
        allowed=ALLOWED,
        share=SITE_SHARE,
        user=settings.workspace_user,
        workspace=workspace,
        port=port,
        environment=environment,
        # over whatever the site's own environment says of it: this is where it is looked for
        command=unit_words(("/usr/bin/env", f"PORT={port}", *recipe.command(port))),
        more=more,
    )


def environment_file(env: Mapping[str, str]) -> str:
    """Write variables as systemd's EnvironmentFile wants them (systemd.exec(5)): quoted, one a line."""
    lines = []
    for name, value in env.items():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")
        lines.append(f'{name}="{escaped}"\n')
    return "".join(lines)


def unit_words(argv: Sequence[str]) -> str:
    """Write a command as ExecStart= takes it (systemd.service(5)): quoted, nothing of it expanded."""
    words = []
    for word in argv:
        escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
        words.append('"' + escaped.replace("\n", "\\n") + '"')
    return " ".join(words)
